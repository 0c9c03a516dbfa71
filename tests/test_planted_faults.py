"""The exactness check is able to fail: each of these faults, planted into the product, must make it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exactness import check, oracle, plain
from test_exactness import NEW_TOKENS, meaningful_target

from specformer.generation import cache_masks
from specformer.generation import generate as entry
from specformer.generation import target as target_passes
from specformer.generation import target_probe as probe
from specformer.generation.cache_masks import sliding_layers
from specformer.generation.cache_ragged import RaggedCache
from specformer.generation.target_refusals import UnsupportedTargetError

mask, prepare, advance, masks = (
    RaggedCache.mask,
    RaggedCache.prepare,
    RaggedCache.advance,
    cache_masks.attention_masks,
)


def ignore_the_window(monkeypatch) -> None:
    """A ring still holds tokens that have just left it."""

    def fault(self, ids, window=None, chunk=None):
        return mask(self, ids, window and 10**6, chunk)

    monkeypatch.setattr(RaggedCache, "mask", fault)


def count_padding_as_positions(monkeypatch) -> None:
    monkeypatch.setattr(
        RaggedCache, "prepare", lambda self, q: prepare(self, q) + (self.longest - self.lengths)[:, None]
    )


def show_one_future_slot(monkeypatch) -> None:
    monkeypatch.setattr(RaggedCache, "mask", lambda self, ids, **kwargs: mask(self, ids + 1, **kwargs))


def use_one_mask_for_all_layer_types(monkeypatch) -> None:
    def fault(*args):
        per_type = masks(*args)
        return dict.fromkeys(per_type, per_type["full_attention"])

    monkeypatch.setattr(target_passes, "attention_masks", fault)


def count_one_token_too_many(monkeypatch) -> None:
    def fault(self, counts, longest):
        advance(self, counts + 1, longest + 1)

    monkeypatch.setattr(RaggedCache, "advance", fault)


def keep_one_slot_less_of_the_window(monkeypatch) -> None:
    def fault(*args):
        window, layers = sliding_layers(*args)
        return window and window - 1, layers

    monkeypatch.setattr(target_passes, "sliding_layers", fault)


def mix_up_the_groups(monkeypatch) -> None:
    """What the prompts' groups leave is taken to be in the order of the rows."""
    load = RaggedCache.load
    monkeypatch.setattr(
        RaggedCache, "load", lambda self, rows, *args: load(self, rows.flip(0) if len(rows) > 1 else rows, *args)
    )


FAULTS = [
    ("mistral-sliding", keep_one_slot_less_of_the_window),
    ("gemma3", keep_one_slot_less_of_the_window),
    ("mistral-sliding", ignore_the_window),
    ("gemma3", ignore_the_window),
    ("gpt2", count_padding_as_positions),  # rotary embeddings do not notice a constant offset
    ("opt", count_padding_as_positions),
    ("llama", show_one_future_slot),
    ("gpt2", show_one_future_slot),
    ("gemma3", use_one_mask_for_all_layer_types),
    ("olmo3", use_one_mask_for_all_layer_types),
    ("llama", count_one_token_too_many),
    ("gemma3", count_one_token_too_many),
    ("llama", mix_up_the_groups),
    ("gemma3", mix_up_the_groups),
]


def run(name: str) -> None:
    target, batch, eos = meaningful_target(name)
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for kind in ("always", "sometimes"):
        check(target, batch, reference, oracle(reference, batch, kind, eos), 4, **arguments)


@pytest.mark.one_version
@pytest.mark.parametrize(("name", "plant"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_planted_fault_is_found(name: str, plant: Callable, monkeypatch):
    # The probe would refuse most of these before the first token, and must not be what saves the check.
    monkeypatch.setattr(entry, "probe_target", lambda model: None)
    run(name)
    plant(monkeypatch)
    # The mask of another layer type has another shape than a ring.
    with pytest.raises((AssertionError, RuntimeError) if plant is use_one_mask_for_all_layer_types else AssertionError):
        run(name)


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("gpt2", count_padding_as_positions),
        ("llama", show_one_future_slot),
        ("gpt2", show_one_future_slot),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_probe_refuses_a_target_that_would_be_decoded_wrongly(name: str, plant: Callable, monkeypatch):
    target, _, _ = meaningful_target(name)
    plant(monkeypatch)
    with pytest.raises(UnsupportedTargetError, match="did not agree with plain decoding"):
        probe.probe_target(target)


@pytest.mark.one_version
def test_noise_of_another_row_is_found(monkeypatch):
    """The check of seeded sampling can fail as well."""
    from specformer.generation.accept_noise import StepNoise
    from specformer.generation.text_positions import Positions

    target, batch, eos = meaningful_target("llama")
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS, do_sample=True)
    reference = plain(target, batch, **arguments)
    gather = StepNoise.gather
    monkeypatch.setattr(
        StepNoise, "gather", lambda self, at, *of: gather(self, Positions((at.rows + 1) % 5, at.steps), *of)
    )
    with pytest.raises(AssertionError):
        check(target, batch, reference, oracle(reference, batch, "sometimes", eos), 4, **arguments)
    monkeypatch.undo()
    check(target, batch, reference, oracle(reference, batch, "sometimes", eos), 4, **arguments)
    assert torch.equal(torch.get_rng_state(), reference.generator_state)
