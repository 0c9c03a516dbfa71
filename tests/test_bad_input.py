"""What cannot be done is refused before the first token, in words that help, and leaves the target as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from exactness import Recorder, check, oracle, plain
from tiny import BOS, EOS, PAD, VOCAB, llama, llama_config, ragged_batch
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, PreTrainedModel

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation import target_probe as probe
from specformer.generation.target_probe import probe_target
from specformer.generation.target_refusals import UnsupportedTargetError

NEW_TOKENS = 8


class Spy:
    """A logits processor that counts its calls: none means that no token was chosen."""

    def __init__(self, fail_at: int | None = None):
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the processor broke")
        return scores


def drafter_for(target: PreTrainedModel, **overrides) -> SpecFormerModel:
    torch.manual_seed(1)
    return SpecFormerModel(SpecFormerConfig.from_target_config(target.config, **overrides)).eval()


def hooks_of(target: torch.nn.Module) -> int:
    return sum(
        len(hooks)
        for module in target.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_with_kwargs)
    )


def refusal(target, drafter=None, error: type[Exception] = ValueError, **arguments) -> str:
    """The message of the error that generate() raises before the first token, with the target left as it was."""
    spy, implementation = Spy(), target.config._attn_implementation
    if drafter is None and "assistant_model" not in arguments:
        drafter = drafter_for(target)
    arguments = {**ragged_batch(), "max_new_tokens": NEW_TOKENS, "logits_processor": [spy], **arguments}
    drafter = arguments.pop("assistant_model", drafter)
    with pytest.raises(error) as caught:
        generate(target, drafter, **arguments)
    assert spy.calls == 0
    assert hooks_of(target) == 0
    assert target.config._attn_implementation == implementation
    return str(caught.value)


def contains(message: str, *parts: str) -> bool:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"
    return True


# ---- drafters


@pytest.mark.parametrize(
    ("field", "value", "sizes"),
    [
        ("hidden_size", 48, "hidden_size is 32 there and 48 here"),
        ("vocab_size", 80, "vocab_size is 64 there and 80 here"),
        ("num_hidden_layers", 6, "num_hidden_layers is 4 there and 6 here"),
    ],
)
def test_drafter_of_another_target(field: str, value: int, sizes: str):
    target = llama()
    target.name_or_path = target.config.name_or_path = "someone/this-target"
    config = SpecFormerConfig.from_target_config(
        llama_config(**{field: value}), target_name_or_path="someone/that-target"
    )
    message = refusal(target, SpecFormerModel(config))
    assert contains(message, "someone/this-target", "someone/that-target", sizes, "Load the drafter of this target")


def test_drafter_without_recorded_target_name():
    config = SpecFormerConfig.from_target_config(llama_config(vocab_size=80))
    message = refusal(llama(), SpecFormerModel(config))
    assert contains(message, "another target", "LlamaForCausalLM", "vocab_size is 64 there and 80 here")


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), 4], ids=["module", "number"])
def test_assistant_of_wrong_type(wrong):
    message = refusal(llama(), assistant_model=wrong)
    assert contains(message, f"assistant_model is a {type(wrong).__name__}", "AutoModel.from_pretrained")


def test_assistant_with_another_vocabulary():
    message = refusal(llama(), assistant_model=llama(vocab_size=80))
    assert contains(message, "80 tokens", "64", "tokenizer")


def test_assistant_that_cannot_keep_one_length_per_row():
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2)
    message = refusal(llama(), assistant_model=transformers.BloomForCausalLM(config))
    assert contains(message, "BloomForCausalLM", "ALiBi")


def test_assistant_with_a_shorter_position_table_than_the_prompt():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=12, bos_token_id=BOS, eos_token_id=EOS
    )
    with pytest.raises(ValueError, match=r"at most 12 tokens and the longest prompt has 15"):
        generate(llama(), transformers.GPT2LMHeadModel(config), **ragged_batch(width=15), max_new_tokens=NEW_TOKENS)


def test_no_assistant():
    message = refusal(llama(), assistant_model=None)
    assert contains(
        message, "Nothing was passed that drafts", "assistant_model=AutoModel.from_pretrained", "num_assistant_tokens=0"
    )


# ---- targets


SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
TOKENS = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48)

# name -> (prefix and suffix of the classes, fields, what the message says about it)
REFUSED_TARGETS: dict[str, tuple[str, str, dict, str]] = {
    "t5": (
        "T5",
        "ForConditionalGeneration",
        dict(TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD),
        "encoder-decoder",
    ),
    "bart": (
        "Bart",
        "ForConditionalGeneration",
        dict(TOKENS, **BART, encoder_attention_heads=4, decoder_attention_heads=4, forced_eos_token_id=None),
        "encoder-decoder",
    ),
    "bloom": ("Bloom", "ForCausalLM", dict(TOKENS, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    "falcon-alibi": ("Falcon", "ForCausalLM", dict(SIZES, alibi=True, new_decoder_architecture=False), "ALiBi"),
    "mpt": ("Mpt", "ForCausalLM", dict(TOKENS, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), "ALiBi"),
    "rwkv": ("Rwkv", "ForCausalLM", dict(TOKENS, hidden_size=32, num_hidden_layers=2), "recurrent state of its own"),
}


@pytest.mark.parametrize("name", REFUSED_TARGETS)
def test_refused_target(name: str):
    prefix, suffix, fields, reason = REFUSED_TARGETS[name]
    config = getattr(transformers, f"{prefix}Config")(**fields)
    target = getattr(transformers, f"{prefix}{suffix}")(config).eval()
    message = refusal(target, drafter_for(llama(torch.float32)), UnsupportedTargetError)
    assert contains(message, f"{prefix}{suffix}", reason, "without custom_generate")


def test_position_ids_of_several_axes():
    batch = ragged_batch()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    message = refusal(llama(), error=UnsupportedTargetError, position_ids=positions)
    assert contains(message, "LlamaForCausalLM", "3 axes", "expected (batch, tokens)")


LIMIT = 24


def dynamic_llama() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return llama(max_position_embeddings=LIMIT, rope_parameters=rope, eos_token_id=None)


def longrope_phi3() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": LIMIT,
        "partial_rotary_factor": 1.0,
    }
    fields = dict(SIZES, eos_token_id=None, max_position_embeddings=4 * LIMIT, initializer_range=0.15)
    torch.manual_seed(0)
    config = transformers.Phi3Config(**fields, rope_parameters=rope, original_max_position_embeddings=LIMIT)
    return transformers.Phi3ForCausalLM(config).double().eval()


@pytest.mark.parametrize(("make", "kind"), [(dynamic_llama, "dynamic"), (longrope_phi3, "longrope")])
class TestRopeThatChanges:
    def test_crossing_is_refused(self, make: Callable, kind: str):
        message = refusal(make(), error=UnsupportedTargetError, max_new_tokens=LIMIT - 9 + 1)
        assert contains(message, f"{kind} rotary embedding changes at {LIMIT} positions", str(LIMIT + 1))
        assert contains(message, f"at most {LIMIT} tokens")

    @pytest.mark.parametrize("kind_of_draft", ["sometimes", "adversarial"])
    def test_up_to_the_limit_is_exact(self, make: Callable, kind: str, kind_of_draft: str):
        """Rows that are ahead draft past the limit; that must not change the embedding of the others."""
        target, batch = make(), ragged_batch(padding=(0, 3, 0, 1, 8))
        reference = plain(target, batch, max_length=LIMIT)
        assert reference.sequences.shape[1] == LIMIT
        for k in (3, 8):
            drafter = oracle(reference, batch, kind_of_draft, None)
            check(target, batch, reference, drafter, k, max_length=LIMIT)
        check(target, batch, reference, drafter_for(target), 4, max_length=LIMIT)

    def test_prompts_on_both_sides_are_refused(self, make: Callable, kind: str):
        batch = ragged_batch(padding=(0, LIMIT - 4), width=LIMIT + 2)
        message = refusal(make(), error=UnsupportedTargetError, **batch)
        assert contains(message, f"{kind} rotary embedding changes at {LIMIT} positions")
        assert f"at most {LIMIT} tokens" not in message  # a prompt is longer


def test_longrope_above_its_limit_throughout():
    target, batch = longrope_phi3(), ragged_batch(padding=(0, 3, 1), width=LIMIT + 4)
    reference = plain(target, batch, max_new_tokens=NEW_TOKENS)
    check(target, batch, reference, drafter_for(target), 4, max_new_tokens=NEW_TOKENS)


def test_longrope_with_a_wide_batch_of_short_prompts():
    """Phi3 throws its cache away when the columns, not the tokens, reach the limit."""
    target, batch = longrope_phi3(), ragged_batch(padding=(12, 15, 13), width=LIMIT + 2)
    reference = plain(target, batch, max_new_tokens=NEW_TOKENS)
    check(target, batch, reference, drafter_for(target), 4, max_new_tokens=NEW_TOKENS)


# ---- calls


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(num_beams=2), ["beam search", "num_beams=2", "Set num_beams=1"]),
        (dict(num_beams=2, do_sample=True), ["beam sample", "num_beams=2", "Set num_beams=1"]),
        (dict(penalty_alpha=0.6, top_k=4), ["contrastive search", "unset"]),
        (dict(dola_layers="low"), ["dola generation", "unset"]),
        (dict(prompt_lookup_num_tokens=-3), ["prompt_lookup_num_tokens is -3", "integer"]),
        (dict(max_matching_ngram_size=0), ["max_matching_ngram_size is 0", "positive integer"]),
        (dict(prompt_lookup_num_tokens=-3, assistant_model=None), ["prompt_lookup_num_tokens is -3", "integer"]),
        (dict(attention_mask=[[1, 1]]), ["attention_mask is a list", "tensor"]),
        (dict(acceptance="coupled", seed=1.5), ["seed is 1.5", "integer"]),
        (dict(acceptance="coupled", seed=[1, True]), ["seed is [1, True]", "integer"]),
        (dict(seed=3), ["acceptance='coupled'", "torch.manual_seed(3)"]),
        (dict(acceptance="coupled", do_sample=True, seed=[1, 2]), ["2 seeds", "5 rows"]),
        (dict(num_beams=4, num_beam_groups=2), ["beam", "num_beams=4"]),
        (dict(guidance_scale=2.0), ["guidance_scale", "Switch it off"]),
        (
            dict(
                do_sample=True,
                watermarking_config=transformers.SynthIDTextWatermarkingConfig(keys=[3, 4, 5], ngram_len=3),
            ),
            ["watermarking_config", "SynthID", "Switch it off"],
        ),
        (dict(output_attentions=True, return_dict_in_generate=True), ["output_attentions", "unset"]),
        (dict(output_hidden_states=True, return_dict_in_generate=True), ["output_hidden_states", "unset"]),
        (dict(acceptance="nonsense"), ["acceptance", "'nonsense'", "'match'"]),
        (dict(synced_gpus=True), ["synced_gpus=True", "not supported"]),
        (dict(stop_strings="a"), ["stop_strings", "'a'", "tokenizer="]),
        (dict(generation_config=GenerationConfig(stop_strings=["a"])), ["stop_strings", "['a']", "tokenizer="]),
        (dict(cache_implementation="quantized"), ["cache_implementation", "quantized", "unset"]),
        (
            dict(generation_config=GenerationConfig(cache_implementation="quantized")),
            ["cache_implementation", "quantized", "unset"],
        ),
        (dict(cache_implementation="offloaded"), ["cache_implementation", "offloaded", "unset"]),
        (dict(cache_implementation="paged"), ["cache_implementation", "paged", "unset"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_argument(arguments: dict, parts: list[str]):
    assert contains(refusal(llama(eos_token_id=None), **arguments), *parts)


@pytest.mark.parametrize("value", [-1, 2.5, True, "4"], ids=repr)
@pytest.mark.parametrize("with_drafter", [True, False])
def test_wrong_num_assistant_tokens(value, with_drafter: bool):
    target = llama()
    drafter = drafter_for(target, num_draft_tokens=6) if with_drafter else None
    message = refusal(target, assistant_model=drafter, num_assistant_tokens=value)
    assert contains(message, f"num_assistant_tokens is {value!r}", "expected an integer", "0 for plain decoding")


def test_no_drafter_and_false():
    """`False == 0`, but it is not a number of tokens."""
    assert contains(refusal(llama(), assistant_model=None, num_assistant_tokens=False), "False")


@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_empty_batch(name: str):
    empty = torch.zeros(0, 5, dtype=torch.long)
    message = refusal(llama(), **{"input_ids": None, "attention_mask": None, name: empty})
    assert contains(message, "empty", "(0, 5)", "at least one prompt")


def test_right_padded_batch():
    batch = ragged_batch(padding=(0, 3))
    batch = {name: values.flip(1) for name, values in batch.items()}
    message = refusal(llama(), **batch)
    assert contains(message, "[1]", "on the right", "padding_side = 'left'")


def test_row_of_padding_only():
    batch = ragged_batch(padding=(0, 3))
    batch["attention_mask"][1] = 0
    assert contains(refusal(llama(), **batch), "[1]")


def test_inputs_embeds():
    embeds = torch.zeros(2, 5, 32, dtype=torch.float64)
    message = refusal(llama(), input_ids=None, attention_mask=None, inputs_embeds=embeds)
    assert contains(message, "inputs_embeds", "Pass input_ids")


def test_filled_cache():
    target, batch = llama(), ragged_batch(padding=(0, 0))
    filled = target(input_ids=batch["input_ids"][:, :4], use_cache=True).past_key_values
    for cache in (filled, DynamicCache(config=target.config)):
        message = refusal(target, **batch, past_key_values=cache)
        assert contains(message, "past_key_values", "keeps its own cache")


def test_positions_of_the_callers_own():
    target, batch = llama(), ragged_batch(padding=(0, 3))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    drafter = drafter_for(target)
    reference = plain(target, batch | {"position_ids": positions}, max_new_tokens=8)
    check(target, batch | {"position_ids": positions}, reference, drafter, 4, max_new_tokens=8)
    message = refusal(target, **batch, position_ids=2 * positions)
    assert contains(message, "position_ids", "leave them unset")


@pytest.mark.parametrize("inputs", [[[1, 2, 3]], "text", torch.tensor([1, 2, 3]), torch.zeros(2, 0, dtype=torch.long)])
def test_inputs_that_are_no_batch_of_tokens(inputs):
    target = llama()
    with pytest.raises(ValueError, match="input_ids"):
        generate(target, drafter_for(target), inputs)


def test_mask_of_another_shape():
    target, batch = llama(), ragged_batch(padding=(0, 3))
    message = refusal(target, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"][:, :-1])
    assert contains(message, "attention_mask has shape", "input_ids")


def test_unknown_input():
    message = refusal(llama(), token_type_ids=torch.zeros(5, 9, dtype=torch.long))
    assert contains(message, "token_type_ids")


# ---- draft lengths that work


@pytest.mark.parametrize(("requested", "longest"), [(100, 8), (None, 3), (0, 0)])
def test_too_large_unset_and_zero_work(requested: int | None, longest: int):
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, max_new_tokens=16, eos_token_id=None)
    drafter = drafter_for(target, default_num_assistant_tokens=3)
    settings = dict(max_new_tokens=16, eos_token_id=None, tree_size=0)  # of a tree they need not follow one another
    statistics = check(target, batch, reference, drafter, requested, **settings)
    if requested is None:  # "auto" begins with the drafter's default, and goes on by the clock
        assert statistics.rounds_per_length[longest] >= 1
    else:
        assert len(statistics.drafted_per_slot) == longest


class OwnInteger:
    def __index__(self) -> int:
        return 3


INTEGERS = [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), OwnInteger()]
NO_INTEGERS = [np.float64(3.0), np.bool_(True), np.array([3]), torch.tensor(3.0), torch.tensor(True), "3"]


@pytest.mark.parametrize("integer", INTEGERS, ids=lambda value: f"{type(value).__module__}.{type(value).__name__}")
def test_integers_of_others_work(integer):
    target, batch = llama(), ragged_batch()
    drafter = drafter_for(target)
    settings = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None, return_dict_in_generate=True)

    def compare(drafter, **arguments) -> None:
        calls = []
        for number in (3, integer):
            given = {name: number if value is int else value for name, value in arguments.items()}
            output = generate(target, drafter, **batch, **settings, **given)
            calls.append((output.sequences.tolist(), output.statistics.drafted_per_slot))
        assert calls[0] == calls[1]

    compare(drafter, num_assistant_tokens=int)
    compare(llama(seed=1), num_assistant_tokens=int, prefill_chunk_size=int)
    compare(drafter, num_assistant_tokens=2, prompt_lookup_num_tokens=int)
    compare(None, prompt_lookup_num_tokens=4, max_matching_ngram_size=int)
    compare(drafter, num_assistant_tokens=2, prefill_chunk_size=int)
    compare(drafter, num_assistant_tokens=2, do_sample=True, acceptance="coupled", seed=int)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=PAD)
    config.num_assistant_tokens = integer
    output = generate(target, drafter, **batch, generation_config=config, return_dict_in_generate=True)
    assert len(output.statistics.drafted_per_slot) == 3


@pytest.mark.parametrize(
    "seeds", [np.arange(5), torch.arange(5), list(np.arange(5)), (0, 1, 2, np.int32(3), 4)], ids=repr
)
def test_seeds_of_others_work(seeds):
    target, arguments = llama(), dict(ragged_batch(), max_new_tokens=NEW_TOKENS, do_sample=True, acceptance="coupled")
    texts = [
        generate(target, drafter_for(target), **arguments, seed=given).tolist() for given in (list(range(5)), seeds)
    ]
    assert texts[0] == texts[1]


NUMBERS = ["num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size", "prefill_chunk_size"]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_no_integers(name: str, value):
    assert contains(refusal(llama(), **{name: value}), f"{name} is {value!r}", "expected")


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_no_seeds(value):
    message = refusal(llama(), acceptance="coupled", seed=[1, value])
    assert contains(message, f"seed is {[1, value]!r}", "expected an integer")


def test_zero_without_a_drafter():
    target, batch = llama(), ragged_batch()
    for sampling in ({}, dict(do_sample=True)):
        reference = plain(target, batch, max_new_tokens=NEW_TOKENS, **sampling)
        statistics = check(target, batch, reference, None, 0, max_new_tokens=NEW_TOKENS, **sampling)
        assert statistics.drafted_per_slot == []


def test_generation_configs_are_honoured():
    target, batch = llama(eos_token_id=None), ragged_batch()
    drafter = drafter_for(target, default_num_assistant_tokens=3)

    def drafted(**arguments) -> int:
        output = generate(target, drafter, **batch, return_dict_in_generate=True, **arguments)
        return len(output.statistics.drafted_per_slot)

    passed = GenerationConfig(max_new_tokens=12, num_assistant_tokens=5)
    assert drafted(generation_config=passed) == 5
    assert drafted(generation_config=passed, num_assistant_tokens=2) == 2
    target.generation_config.num_assistant_tokens = 4
    assert drafted(max_new_tokens=12) == 4
    assert drafted(generation_config=passed) == 5
    assert drafted(generation_config=GenerationConfig(max_new_tokens=12)) == 4
    assert drafted(max_new_tokens=12, num_assistant_tokens=1) == 1


@pytest.mark.parametrize("place", ["passed", "model's"])
def test_wrong_number_in_a_generation_config(place: str):
    target, config = llama(), GenerationConfig(pad_token_id=PAD)
    config.num_assistant_tokens = -3
    if place == "passed":
        message = refusal(target, generation_config=config)
    else:
        target.generation_config = config
        message = refusal(target)
    assert contains(message, "num_assistant_tokens is -3")


def test_zero_in_a_generation_config_needs_no_drafter():
    target, batch = llama(), ragged_batch()
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, num_assistant_tokens=0, pad_token_id=PAD, eos_token_id=EOS)
    reference = target.generate(**batch, generation_config=config)
    assert torch.equal(generate(target, None, **batch, generation_config=config), reference)


# ---- configurations


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (dict(hidden_size=0), ["hidden_size is 0", "positive integer"]),
        (dict(vocab_size=-5), ["vocab_size is -5", "positive integer"]),
        (dict(num_draft_tokens=2.5), ["num_draft_tokens is 2.5", "positive integer"]),
        (dict(num_draft_tokens=True), ["num_draft_tokens is True", "positive integer"]),
        (dict(intermediate_size="8"), ["intermediate_size is '8'", "positive integer"]),
        (dict(num_attention_heads=0), ["num_attention_heads is 0", "positive integer"]),
        (dict(head_dim=7), ["head_dim is 7", "even"]),
        (dict(hidden_size=4, num_attention_heads=9), ["head_dim is 0", "positive integer"]),
        (dict(num_key_value_heads=3, num_attention_heads=4), ["num_attention_heads (4)", "num_key_value_heads (3)"]),
        (dict(target_layer_ids=[0, 31]), ["[0, 31]", "from 0 to 30"]),
        (dict(target_layer_ids=[-1]), ["[-1]", "from 0 to 30"]),
        (dict(target_layer_ids=[3, 1]), ["[3, 1]", "ascending"]),
        (dict(target_layer_ids=[]), ["[]", "one or more"]),
        (dict(default_num_assistant_tokens=-1), ["default_num_assistant_tokens is -1"]),
        (dict(default_num_assistant_tokens="4"), ["default_num_assistant_tokens is '4'"]),
    ],
    ids=lambda value: "-".join(f"{name}={field}" for name, field in value.items()) if isinstance(value, dict) else "",
)
def test_bad_sizes(fields: dict, parts: list[str]):
    with pytest.raises(ValueError) as caught:
        SpecFormerConfig(**fields)
    assert contains(str(caught.value), "SpecFormerConfig", *parts)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("anchor", [True, False])
def test_shallow_targets_work(layers: int, anchor: bool):
    """The default layers coincide there."""
    target, batch = llama(num_hidden_layers=layers), ragged_batch()
    reference = plain(target, batch, max_new_tokens=NEW_TOKENS)
    check(target, batch, reference, drafter_for(target, use_anchor_token=anchor), 4, max_new_tokens=NEW_TOKENS)


# ---- attention implementations, and exceptions in the middle


class BreakingStreamer(Recorder):
    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.calls) == 3:
            raise RuntimeError("the streamer broke")


def flex_llama() -> PreTrainedModel:
    target = llama(torch.float32, eos_token_id=None)
    target.set_attn_implementation("flex_attention")
    return target


def test_flex_attention_is_switched_and_restored():
    batch, target = ragged_batch(), flex_llama()
    reference = plain(llama(torch.float32, eos_token_id=None), batch, max_new_tokens=NEW_TOKENS)
    seen: list[str] = []
    hook = target.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(target.config._attn_implementation))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(target, batch, reference, drafter_for(target), 4, max_new_tokens=NEW_TOKENS)
    hook.remove()
    ours = [entry for entry in caught if "attn_implementation" in str(entry.message)]
    assert len(ours) == 1
    assert contains(str(ours[0].message), "'flex_attention'", "'sdpa'")
    assert ours[0].filename == __file__.replace("test_bad_input", "exactness")  # the caller of generate()
    assert set(seen) == {"sdpa"}
    assert target.config._attn_implementation == "flex_attention"
    assert hooks_of(target) == 0


@pytest.mark.parametrize("make", [flex_llama, llama], ids=["flex", "sdpa"])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda: dict(logits_processor=[Spy(fail_at=3)]), "the processor broke"),
        (lambda: dict(streamer=BreakingStreamer()), "the streamer broke"),
    ],
    ids=["processor", "streamer"],
)
@pytest.mark.filterwarnings("ignore:This target was loaded with attn_implementation")
def test_exception_in_the_middle(make: Callable, arguments: Callable, reason: str):
    target = make()
    implementation = target.config._attn_implementation
    batch, drafter = ragged_batch(), drafter_for(target)
    with pytest.raises(RuntimeError, match=reason):
        generate(target, drafter, **batch, max_new_tokens=16, eos_token_id=None, **arguments())
    assert hooks_of(target) == 0
    assert target.config._attn_implementation == implementation
    reference = plain(llama(target.dtype), batch, max_new_tokens=NEW_TOKENS)  # and the target works as before
    check(target, batch, reference, drafter, 4, max_new_tokens=NEW_TOKENS)
    assert target.config._attn_implementation == implementation


@pytest.mark.filterwarnings("ignore:This target was loaded with attn_implementation")
def test_refusal_restores_flex_attention():
    refusal(flex_llama(), num_beams=2)


# ---- probe


class IgnoresPositions(LlamaForCausalLM):
    """Counts positions from 0 in every row, padding or not."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )


class IgnoresMask(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        return super().forward(
            input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs
        )


class CountsPaddedPrompts(LlamaForCausalLM):
    """Counts columns under a 2-D mask, as plain generate() passes it, and believes the positions under a 4-D one."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if attention_mask is None or attention_mask.ndim == 2:
            position_ids = None
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


@pytest.mark.parametrize("target_class", [IgnoresPositions, IgnoresMask, CountsPaddedPrompts])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_probe_refuses(target_class: type, dtype: torch.dtype):
    torch.manual_seed(0)
    target = target_class(llama_config()).to(dtype).eval()
    with pytest.raises(UnsupportedTargetError) as caught:
        probe_target(target)
    assert contains(str(caught.value), target_class.__name__, "trial", "without custom_generate")
    for _ in range(2):  # it is refused each time
        message = refusal(target, error=UnsupportedTargetError)
        assert contains(message, target_class.__name__, "trial")


def rounds_to_float32(target, args, kwargs, outputs):
    outputs.logits = outputs.logits * (1 + torch.finfo(torch.float32).eps * len(kwargs["input_ids"]))
    return outputs


def test_probe_expects_no_more_than_float32():
    """A part of it is computed in float32, whose rounding depends on the batch, as of mixtures of experts."""
    target, passes = llama(), []
    target.register_forward_hook(lambda *of_pass: passes.append(1) or rounds_to_float32(*of_pass), with_kwargs=True)
    probe_target(target)
    assert passes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_probe_passes_once(dtype: torch.dtype, monkeypatch):
    target, batch = llama(dtype), ragged_batch()
    probes: list[int] = []
    verify = probe.verify
    monkeypatch.setattr(probe, "verify", lambda *args: probes.append(1) or verify(*args))
    generate(target, drafter_for(target), **batch, max_new_tokens=2)
    first = len(probes)
    generate(target, drafter_for(target), **batch, max_new_tokens=2)
    assert len(probes) == first > 0
    if dtype != torch.float64:  # with padding, float64 eager attention of transformers is NaN
        target.set_attn_implementation("eager")
        generate(target, drafter_for(target), **batch, max_new_tokens=2)
        assert len(probes) == 2 * first  # another kernel is another target
