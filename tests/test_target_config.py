"""Sizes of a drafter from the config of its target, for every causal LM of the installed transformers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from exactness import check, plain
from tiny import BOS, PAD, VOCAB, ragged_batch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from specformer import SpecFormerConfig, SpecFormerModel

CONFIGS = sorted({config.__name__ for config in MODEL_FOR_CAUSAL_LM_MAPPING})
NO_HEADS = {"BltConfig", "FalconMambaConfig", "Mamba2Config", "MambaConfig", "RwkvConfig", "xLSTMConfig"}
NO_HEADS |= {"Gemma4AssistantConfig", "Gemma4UnifiedAssistantConfig"}  # in transformers 5.17
"""State-space models, and such as are made of several models."""


class Config(PreTrainedConfig):
    """Of remote code: it holds the fields that it is given, and no others."""

    model_type = "someones"


SIZES = dict(vocab_size=90, hidden_size=32, num_attention_heads=4, num_hidden_layers=6)


def derived(fields: dict, **overrides) -> SpecFormerConfig:
    return SpecFormerConfig.from_target_config(Config(**{**SIZES, **fields}), **overrides)


def of_most_layers(config: PreTrainedConfig, name: str):
    values = [getattr(layer, name) for layer in config.per_layer_config]
    return Counter(values).most_common(1)[0][0]


# ---- every family


@pytest.mark.parametrize("name", CONFIGS)
def test_default_configs(name: str):
    """A config from which a drafter can be made, or a sentence."""
    try:
        target = next(config for config in MODEL_FOR_CAUSAL_LM_MAPPING if config.__name__ == name)()
    except Exception as error:
        pytest.skip(f"transformers makes no default config of it ({type(error).__name__})")
    if target.is_encoder_decoder:
        with pytest.raises(ValueError, match=f"{name} describes an encoder-decoder, and only a decoder-only model"):
            SpecFormerConfig.from_target_config(target)
        return
    text_config = target.get_text_config(decoder=True)
    if name in NO_HEADS and not hasattr(text_config, "num_attention_heads"):
        with pytest.raises(ValueError, match=r"Config does not say .*num_attention_heads.*as keywords"):
            SpecFormerConfig.from_target_config(target)
        return
    config = SpecFormerConfig.from_target_config(target)
    assert config.vocab_size == text_config.vocab_size
    assert config.hidden_size == text_config.hidden_size
    assert config.target_num_hidden_layers == text_config.num_hidden_layers
    assert SpecFormerConfig(**config.to_dict()).to_dict() == config.to_dict()
    with torch.device("meta"):
        drafter = SpecFormerModel(config)
    assert sum(parameter.numel() for parameter in drafter.parameters()) == config.num_parameters


# ---- layers that differ


def test_layers_with_configs_of_their_own():
    """Gemma 4's layers of full attention have wider heads: transformers refuses to name one width for all."""
    target = getattr(transformers, "Gemma4TextConfig", None)
    if target is None:
        pytest.skip("this transformers has no Gemma 4")
    target = target(num_hidden_layers=6, head_dim=256, global_head_dim=512)
    with pytest.raises(RuntimeError):
        _ = target.head_dim
    config = SpecFormerConfig.from_target_config(target)
    assert config.head_dim == of_most_layers(target, "head_dim") == 256
    assert config.num_key_value_heads == of_most_layers(target, "num_key_value_heads")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(intermediate_size=[64, 96, 96, 96, 64, 96]), dict(intermediate_size=96)),
        (dict(head_dim=[8, 16, 16, 8, 8, 8]), dict(head_dim=8)),
        (dict(num_key_value_heads=(1, 2, 2, 1, 2, 2)), dict(num_key_value_heads=2)),
        (dict(num_attention_heads=[4, 8, 8, 4, 8, 8]), dict(num_attention_heads=8, head_dim=4)),
        # no layer has these two together
        (
            dict(num_attention_heads=[6, 6, 6, 8, 8], num_key_value_heads=[3, 3, 4, 4, 4]),
            dict(num_attention_heads=6, num_key_value_heads=2),
        ),
        (dict(intermediate_size=[0, None, 0, 96]), dict(intermediate_size=96)),  # layers without one
    ],
    ids=lambda value: "-".join(value),
)
def test_lists_of_every_layers_value(fields: dict, expected: dict):
    config = derived(fields)
    assert {name: getattr(config, name) for name in expected} == expected


# ---- other names, and none


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(n_embd=48), dict(hidden_size=48)),
        (dict(d_model=48), dict(hidden_size=48)),
        (dict(n_head=8), dict(num_attention_heads=8)),
        (dict(n_layer=3), dict(target_num_hidden_layers=3)),
        (dict(ffn_dim=80), dict(intermediate_size=80)),
        (dict(n_inner=80), dict(intermediate_size=80)),
        (dict(n_inner=None), dict(intermediate_size=128)),
        (dict(num_kv_heads=2), dict(num_key_value_heads=2)),
        ({}, dict(num_key_value_heads=4, head_dim=8, intermediate_size=128, rms_norm_eps=1e-5, rope_theta=1e4)),
        (
            dict(num_key_value_heads=None, head_dim=None, intermediate_size=None),
            dict(num_key_value_heads=4, head_dim=8),
        ),
        (dict(head_dim=7), dict(head_dim=8)),
        (dict(rms_norm_eps=None), dict(rms_norm_eps=1e-5)),
        (dict(rms_norm_eps=1e-6), dict(rms_norm_eps=1e-6)),
    ],
    ids=str,
)
def test_names_and_what_is_missing(fields: dict, expected: dict):
    standard = {"n_embd": "hidden_size", "d_model": "hidden_size", "n_head": "num_attention_heads"}
    standard |= {"n_layer": "num_hidden_layers"}
    others = {name: size for name, size in SIZES.items() if name not in [standard.get(field) for field in fields]}
    config = SpecFormerConfig.from_target_config(Config(**{**others, **fields}))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_special_tokens(name: str):
    assert getattr(derived({name: 7}), name) == 7
    target = Config(**SIZES)
    vars(target).pop(name, None)
    assert getattr(SpecFormerConfig.from_target_config(target), name) is None


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 1e4),
        (dict(rope_type="default", rope_theta=5e5), 5e5),
        (dict(sliding_attention=dict(rope_theta=1e4), full_attention=dict(rope_theta=1e6)), 1e6),
        (dict(sliding_attention=dict(rope_theta=2e4), full_attention=None), 2e4),
        (dict(main=dict(rope_theta=3e4), compress=dict(rope_theta=1e5)), 3e4),
    ],
    ids=str,
)
def test_rotary_base(rope: dict | None, expected: float):
    target = Config(**SIZES)
    target.rope_parameters = rope
    assert SpecFormerConfig.from_target_config(target).rope_theta == expected


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_missing_sizes_can_be_given(missing: str):
    target = Config(**{name: size for name, size in SIZES.items() if name != missing})
    field = {"num_hidden_layers": "target_num_hidden_layers"}.get(missing, missing)
    with pytest.raises(ValueError, match=f"Config does not say {field}. .*as keywords"):
        SpecFormerConfig.from_target_config(target)
    config = SpecFormerConfig.from_target_config(target, **{field: SIZES[missing]})
    assert config.to_dict() == derived({}).to_dict()


def test_fields_that_are_given_are_kept():
    config = derived({}, num_attention_heads=2, head_dim=12, intermediate_size=7, rms_norm_eps=1e-3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 12)
    assert (config.intermediate_size, config.rms_norm_eps) == (7, 1e-3)
    with pytest.raises(ValueError, match=r"hidden_size is '32'; expected a positive integer"):
        derived({}, hidden_size="32")


# ---- drafters of families whose configs differ


COMMON = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
LIKE_LLAMA = dict(COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
LIKE_LLAMA |= dict(num_key_value_heads=2, head_dim=8, sliding_window=6, max_position_embeddings=64)
FAMILIES = {
    "Gemma4": dict(LIKE_LLAMA, global_head_dim=16, hidden_size_per_layer_input=4, vocab_size_per_layer_input=VOCAB),
    "CodeGen": dict(COMMON, n_embd=32, n_layer=4, n_head=4, n_positions=64, rotary_dim=4),
    "Cohere2Moe": dict(LIKE_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "ModernBertDecoder": dict(LIKE_LLAMA, local_attention=6, cls_token_id=BOS, sep_token_id=BOS),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_drafters_of_other_families_are_exact(name: str):
    model_class = getattr(transformers, f"{name}ForCausalLM", None)
    if model_class is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    target = model_class(model_class.config_class(**FAMILIES[name])).double().eval()
    target.set_experts_implementation("eager")  # the grouped kernels do not take float64
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.normal_(std=0.15) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config)).eval()
    drafter.init_from_target(target)
    batch, arguments = ragged_batch(), dict(max_new_tokens=12, eos_token_id=None)
    reference = plain(target, batch, **arguments)
    assert len(set(reference.sequences[:, 9:].flatten().tolist())) > 5
    statistics = check(target, batch, reference, drafter, 4, **arguments)
    assert sum(statistics.drafted_per_slot) > 0
