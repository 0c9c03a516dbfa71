"""The target's own MTP layer as a drafter: the drafts of its definition, in any batch, and plain generate()'s text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from exactness import assert_meaningful, check, choose_eos, plain
from foreign import assert_drafts, assert_rows_draft_as_alone, recorded
from safetensors.torch import load_file, save_file
from test_exactness import NEW_TOKENS, SETTINGS
from tiny import VOCAB, llama, ragged_batch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig, Glm4MoeForCausalLM, MellumConfig
from transformers.modeling_layers import MtpModel

from specformer import generate
from specformer.generation.backend_versions import cache_argument
from specformer.generation.drafter_mtp import MtpDrafter

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
EXPERTS = dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
FAMILIES = {
    "GLM-4.5": lambda: Glm4MoeConfig(**SIZES, **EXPERTS, head_dim=8, num_mtp_layers=1),
    "DeepSeek-V3": lambda: DeepseekV3Config(
        **SIZES | dict(num_key_value_heads=4), **EXPERTS, **LATENT, num_mtp_layers=1
    ),
    "Mellum": lambda: MellumConfig(
        **SIZES, head_dim=8, num_experts=4, sliding_window=5, num_mtp_layers=1, layer_types=["sliding_attention"] * 2
    ),
}
if not hasattr(MellumConfig, "mtp_layer_types"):  # of transformers before its MTP layers were known
    del FAMILIES["Mellum"]


@cache
def target_with_layer(family: str):
    """A target in float64 whose text is varied, its MTP layer, a batch, and a token that ends rows of it."""
    batch = ragged_batch()
    for seed in range(20):
        torch.manual_seed(seed)
        target = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float64).eval()
        target.set_experts_implementation("eager")  # the grouped kernels do not take float64
        sequences = target.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None)
        try:
            assert_meaningful(target, batch, sequences)
        except AssertionError:
            continue
        return target, MtpModel(target, 1).to(torch.float64).eval(), batch, choose_eos(sequences, 9)
    raise AssertionError(f"no seed gives {family} a text worth testing")


@torch.no_grad()
def by_definition(target, layers: MtpModel, text: list[int], count: int) -> list[int]:
    """Greedy drafts after `text`, whose last token the target has not read, without a cache: all pairs of state and
    next token are read again for each draft."""
    states = list(target.model(input_ids=torch.tensor([text[:-1]])).last_hidden_state[0])
    drafts: list[int] = []
    for _ in range(count):
        tokens = torch.tensor([[*text[1:], *drafts]])
        embeds = target.get_input_embeddings()(tokens)
        place = torch.arange(tokens.shape[1])
        behind = place[:, None] - place
        window = layers.config.sliding_window if getattr(layers.config, "layer_types", None) else tokens.shape[1]
        kinds = {"layer_type": layers.config.layer_types[0]} if getattr(layers, "has_per_layer_rope", False) else {}
        layer = layers.layers[0]
        given = layer(
            embeds,
            torch.stack(states)[None],
            position_embeddings=target.model.rotary_emb(embeds, position_ids=place[None] + 1, **kinds),
            attention_mask=((behind >= 0) & (behind < window))[None, None],
            position_ids=place[None] + 1,
            **cache_argument(layer, None),
        )[0, -1]
        drafts.append(int(target.lm_head(given).argmax()))
        states.append(given)
    return drafts


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_are_those_of_the_definition(family: str, monkeypatch):
    target, layers, _, _ = target_with_layer(family)
    rounds = recorded(monkeypatch, MtpDrafter)
    prompt = torch.tensor([[7, 30, 12, 9, 41, 22, 5]])
    settings = dict(max_new_tokens=12, eos_token_id=None, do_sample=False, prompt_lookup_num_tokens=0)
    text = generate(target, layers, prompt, num_assistant_tokens=3, **settings)[0].tolist()
    assert_drafts(rounds, text, 8, 3, lambda so_far: by_definition(target, layers, so_far, 3))


def test_every_row_of_a_batch_drafts_as_it_does_alone():
    target, layers, batch, _ = target_with_layer("GLM-4.5")
    assert_rows_draft_as_alone(target, layers, batch)


@pytest.mark.parametrize(
    ("family", "setting"),
    [(family, "sampling" if family != "DeepSeek-V3" else "greedy") for family in FAMILIES]
    + [pytest.param(family, setting, marks=pytest.mark.slow) for family in FAMILIES for setting in SETTINGS],
)
def test_the_text_is_that_of_plain_generate(family: str, setting: str):
    target, layers, batch, eos = target_with_layer(family)
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for k in (1, 4, "auto"):
        check(target, batch, reference, layers, k, **arguments)
    check(target, batch, reference, layers, 2, prompt_lookup_num_tokens=0, **arguments)


def test_eager_attention():
    target, layers, batch, _ = target_with_layer("GLM-4.5")
    target, layers = (part.to(torch.float32) for part in (target, layers))
    try:
        drafted = []
        for attention in ("sdpa", "eager"):
            target.set_attn_implementation(attention)
            settings = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None, prompt_lookup_num_tokens=0)
            output = generate(target, layers, **batch, **settings, return_dict_in_generate=True, num_assistant_tokens=2)
            expected = target.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None)
            assert output.sequences.tolist() == expected.tolist()
            drafted.append(output.statistics.was_drafted)
        assert drafted[0] == drafted[1]
    finally:
        target.set_attn_implementation("sdpa")
        target.double(), layers.double()


# ---- from a checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch) -> Path:
    """As the Hub's are: the layer behind the last one of the model, with two norms and a projection more."""
    torch.manual_seed(4)
    config = Glm4MoeConfig(**SIZES | dict(num_hidden_layers=3), **EXPERTS, head_dim=8, num_mtp_layers=1)
    Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    weights, place = load_file(tmp_path / "model.safetensors"), "model.layers.2."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"{place}{name}.weight"] = 1 + 0.1 * torch.randn(32)
    weights[f"{place}eh_proj.weight"] = 0.2 * torch.randn(32, 64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(fields | dict(num_hidden_layers=2)), encoding="utf-8")
    # of the sizes that were published, which the class names by their last layers
    monkeypatch.setattr(Glm4MoeForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\..*"])
    return tmp_path


def loaded(checkpoint: Path):
    target = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    target.set_experts_implementation("eager")
    return target


def test_use_mtp(checkpoint: Path):
    target, batch = loaded(checkpoint), ragged_batch()
    settings = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None, do_sample=False)
    expected = target.generate(**batch, **settings).tolist()
    output = generate(target, **batch, **settings, use_mtp=True, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected
    target.generation_config.use_mtp = True  # as transformers' own decoding takes it, for one row
    assert generate(target, **batch, **settings).tolist() == expected
    row = batch["input_ids"][:1]
    output = generate(
        target, None, row, **settings, num_assistant_tokens=1, prompt_lookup_num_tokens=0, return_dict_in_generate=True
    )
    assert sum(output.statistics.drafted_per_slot) > 0
    assert output.sequences.tolist() == target.generate(row, **settings).tolist()


def test_what_is_told_from_a_checkpoint(checkpoint: Path, monkeypatch):
    target = loaded(checkpoint)
    rounds = recorded(monkeypatch, MtpDrafter)
    prompt = torch.tensor([[7, 30, 12, 9, 41, 22]])
    settings = dict(max_new_tokens=12, eos_token_id=None, do_sample=False, prompt_lookup_num_tokens=0)
    text = generate(target, None, prompt, num_assistant_tokens=2, use_mtp=True, **settings)[0].tolist()
    layers = MtpModel.from_pretrained(target).double()
    assert layers.layers[0].eh_proj.weight.std() > 0.1
    assert_drafts(rounds, text, 7, 2, lambda so_far: by_definition(target, layers, so_far, 2))


# ---- what is refused


def test_a_target_without_such_layers():
    with pytest.raises(ValueError, match=r"use_mtp is True, and LlamaForCausalLM has no MTP layers"):
        generate(llama(), **ragged_batch(), max_new_tokens=2, use_mtp=True)


def test_layers_that_are_not_in_the_checkpoint(tmp_path: Path):
    target, _, batch, _ = target_with_layer("GLM-4.5")
    target.save_pretrained(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"MTP layers of Glm4MoeForCausalLM could not be loaded"):
        generate(target, **batch, max_new_tokens=2, use_mtp=True)


def test_two_drafters():
    target, layers, batch, _ = target_with_layer("GLM-4.5")
    with pytest.raises(ValueError, match="assistant_model and use_mtp were both given"):
        generate(target, layers, **batch, max_new_tokens=2, use_mtp=True)


def test_more_layers_than_one():
    target, _, batch, _ = target_with_layer("GLM-4.5")
    target.config.num_mtp_layers = 2
    try:
        with pytest.raises(ValueError, match="has 2 MTP layers; one is drafted with"):
            generate(target, MtpModel(target, 2).double(), **batch, max_new_tokens=2)
    finally:
        target.config.num_mtp_layers = 1


def test_layers_of_another_dtype():
    target, _, batch, _ = target_with_layer("GLM-4.5")
    layers = MtpModel(target, 1)
    layers.layers.float()  # the rest is the target's
    with pytest.raises(ValueError, match=r"MTP layer is in torch\.float32 and Glm4MoeForCausalLM in torch\.float64"):
        generate(target, layers, **batch, max_new_tokens=2)
