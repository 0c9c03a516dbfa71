"""What the trial on a target finds that no short text shows, and position tables that end inside a draft."""

from __future__ import annotations

import functools

import pytest
import torch
from architectures import make_target
from exactness import check, oracle, plain
from tiny import VOCAB, llama, llama_config, ragged_batch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from specformer import generate
from specformer.generation.backend_versions import CACHE_NAMES
from specformer.generation.target_positions import positions_in_table
from specformer.generation.target_probe import numbers_of, probe_target
from specformer.generation.target_refusals import UnsupportedTargetError


def gpt_neo():
    """Its local window goes by the number of keys."""
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, initializer_range=0.15)
    torch.manual_seed(0)
    config = GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 2]], bos_token_id=1, eos_token_id=None)
    config.pad_token_id = 0
    return GPTNeoForCausalLM(config).double().eval()


class ScalesByCacheLength(LlamaForCausalLM):
    """Temperature that changes with the length of the cache, far behind what a trial reads."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        length = 0 if cache is None else cache.get_seq_length()
        outputs.logits = outputs.logits * (1.0 if length < self.config.floor_scale else 0.5)
        return outputs


class WindowOfKeys(LlamaAttention):
    """Sees the last keys that there are, whatever they are."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        if attention_mask is not None:
            width = attention_mask.shape[-1]
            seen = torch.arange(width) >= width - self.config.attention_span
            attention_mask = attention_mask & seen
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)


def window_of_keys():
    target = llama(attention_span=200)
    for layer in target.model.layers:
        layer.self_attn.__class__ = WindowOfKeys
    return target


def scales_by_cache_length():
    torch.manual_seed(0)
    return ScalesByCacheLength(llama_config(floor_scale=100_000)).double().eval()


@pytest.mark.parametrize("make", [gpt_neo, scales_by_cache_length, window_of_keys])
def test_what_goes_by_the_number_of_keys_is_refused(make):
    target, batch = make(), ragged_batch()
    assert plain(target, batch, max_new_tokens=4).sequences.shape[1] == 13
    with pytest.raises(UnsupportedTargetError, match="goes by the number of keys, masked ones included"):
        generate(target, **batch, max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_every_number_of_a_config_counts():
    found = set(numbers_of({"a": 5, "b": [{"window": 300}, 2.5], "c": {"d": (7, True, None, "9")}}))
    assert found == {5, 300, 7}


def test_the_trial_leaves_a_cache_as_it_was_where_the_model_fails(monkeypatch):
    """An error of the model in the trial names itself, and the target can be used afterwards."""
    target, batch = llama(), ragged_batch()
    forward, seen = type(target).forward, []

    @functools.wraps(forward)
    def fails(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == 3:  # the one with many slots
            raise RuntimeError("no room")
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(target), "forward", fails)
        with pytest.raises(UnsupportedTargetError, match="no room"):
            probe_target(target)
    reference = plain(target, batch, max_new_tokens=6)
    check(target, batch, reference, oracle(reference, batch, "sometimes", None), 3, max_new_tokens=6)


# ---- position tables

WITH_TABLE, WITHOUT = ["gpt2", "opt", "gptj"], ["llama", "gpt-neox", "qwen2-sliding", "cohere", "deepseek-v3"]


@pytest.mark.parametrize("name", WITH_TABLE + WITHOUT)
def test_which_families_have_a_position_table(name: str):
    assert positions_in_table(make_target(name)) == (64 if name in WITH_TABLE else None)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", WITH_TABLE)
def test_table_that_ends_inside_a_draft(name: str, rows: int):
    """The text ends by itself with the last position that there is, or some before: plain generate() gets there."""
    target, batch = make_target(name), ragged_batch(padding=(0, 3, 5, 1, 8)[:rows])
    whole = plain(target, batch, max_new_tokens=64 - 9, eos_token_id=None)
    text = whole.sequences[0, 9:].tolist()
    # tokens that come up late for the first time in the longest row, whose positions are its columns
    late = [token for place, token in enumerate(text) if place > 40 and token not in text[:place]]
    assert late or rows  # below, the last position is reached in any case
    for eos in [*late[-2:], None]:
        new_tokens = 64 - 9 + 1 if eos is None else 80  # the token behind the last position is not read any more
        arguments = dict(max_new_tokens=new_tokens, eos_token_id=eos)
        try:
            reference = plain(target, batch, **arguments)
        except IndexError:  # some other row goes on past the end
            continue
        for kind in ("always", "sometimes", "adversarial"):
            check(target, batch, reference, oracle(reference, batch, kind, eos), 8, **arguments)


def test_text_that_goes_past_the_table_fails_as_in_plain_generate():
    target, batch = make_target("gpt2"), ragged_batch()
    arguments = dict(max_new_tokens=70, eos_token_id=None)
    with pytest.raises(IndexError):
        plain(target, batch, **arguments)
    with pytest.raises(IndexError):
        generate(target, **batch, prompt_lookup_num_tokens=4, **arguments)


# ---- plain generate() that forgets


class ForgetsWhereItSwitches(LlamaForCausalLM):
    """Begins a new cache at some length, as families with two rotary embeddings do, and reads the last token alone."""

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        switch = self.config.original_max_position_embeddings
        if cache is not None and input_ids.shape[1] > switch and cache.get_seq_length() <= switch:
            kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)


def test_plain_generate_that_forgets_its_text_is_not_gone_past():
    torch.manual_seed(0)
    target = ForgetsWhereItSwitches(llama_config(original_max_position_embeddings=16)).double().eval()
    batch = ragged_batch(padding=(0, 3))
    reference = plain(target, batch, max_new_tokens=7, eos_token_id=None)
    check(target, batch, reference, oracle(reference, batch, "sometimes", None), 3, max_new_tokens=7, eos_token_id=None)
    with pytest.raises(UnsupportedTargetError, match=r"passes 16 tokens its plain generate.. drops the cache"):
        generate(target, **batch, max_new_tokens=12, prompt_lookup_num_tokens=2)
