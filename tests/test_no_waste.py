"""One wait per round, no copies of cached data, no memory for text that is never written, no passes for rows that
have finished."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from architectures import make_target
from exactness import check, choose_eos, oracle, plain
from tiny import llama, ragged_batch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria

from specformer import SpecFormerConfig, SpecFormerModel, generate, target_specformer
from specformer.generation import cache_ragged as ragged_cache
from specformer.generation import decoding, drafter_dtype
from specformer.generation import drafter_specformer as drafter_module
from specformer.generation import target as target_module
from specformer.generation import text as text_module
from specformer.generation.cache_ragged import RaggedCache
from specformer.generation.text import Text

WAITING_OPS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
WAITING_METHODS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def target():
    return llama()


def make_network(target) -> SpecFormerModel:
    return SpecFormerModel(SpecFormerConfig.from_target_config(target.config, initializer_range=0.3))


def spread_eos(target, batch, new_tokens: int):
    """An end-of-sequence token at which the rows of the greedy text end one by one, and plain generate()'s text."""
    free = target.generate(**batch, eos_token_id=None, max_new_tokens=new_tokens)
    eos = choose_eos(free, batch["input_ids"].shape[1])
    return eos, plain(target, batch, eos_token_id=eos, max_new_tokens=new_tokens)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, outside `to_host`."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.transfers, self.allowed = 0, False
        monkeypatch.setattr(ragged_cache, "is_on_host", lambda tensor: False)
        to_host = text_module.to_host

        def counted(packed):
            self.transfers, self.allowed = self.transfers + 1, True
            result = to_host(packed)
            self.allowed = False
            return result

        monkeypatch.setattr(text_module, "to_host", counted)
        for name in WAITING_METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.noting(name, getattr(torch.Tensor, name)))

    def noting(self, name: str, method):
        def noted(*args, **kwargs):
            self.found[name] += not self.allowed
            return method(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.found[name] += name in WAITING_OPS and not self.allowed
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ends", [False, True])
def test_one_wait_per_round(ends: bool, target):
    """`ends`: rows end at different times, and leave."""
    batch, network = ragged_batch(), make_network(target)
    eos = spread_eos(target, batch, 32)[0] if ends else None
    generate(target, network, **batch, max_new_tokens=2)  # the probe, once per target
    found = []
    for new_tokens in (16, 32):
        with pytest.MonkeyPatch.context() as patch, Waits(patch) as waits:
            output = generate(
                target,
                network,
                **batch,
                eos_token_id=eos,
                max_new_tokens=new_tokens,
                num_assistant_tokens=3,
                return_dict_in_generate=True,
            )
        assert waits.transfers == output.statistics.rounds + 1
        found.append((output.statistics.rounds, +waits.found))
    (few, found_in_few), (many, found_in_many) = found
    assert many > few + 5
    assert found_in_many == found_in_few


@pytest.mark.one_version
def test_the_wait_check_can_fail(target, monkeypatch):
    batch, network = ragged_batch(), make_network(target)
    advance, found = RaggedCache.advance, []

    def careless(self, counts, longest):
        advance(self, counts, int(self.lengths.max()) + 8)

    monkeypatch.setattr(RaggedCache, "advance", careless)
    for new_tokens in (4, 8):
        with pytest.MonkeyPatch.context() as patch, Waits(patch) as waits:
            generate(target, network, **batch, eos_token_id=None, max_new_tokens=new_tokens)
        found.append(+waits.found)
    assert found[0] != found[1]


@contextmanager
def watched_caches():
    """All (capacity, rows, buffers) of every cache, in the order of passes."""
    seen: dict[int, list] = {}
    with pytest.MonkeyPatch.context() as patch:
        advance = RaggedCache.advance

        def watched(self, counts, longest):
            buffers = [buffer for layer in self.layers for buffer in (layer.keys, layer.values)]
            seen.setdefault(id(self), []).append((self.capacity, len(self.lengths), buffers))
            advance(self, counts, longest)

        patch.setattr(RaggedCache, "advance", watched)
        yield seen


def small_first_capacity(monkeypatch) -> None:
    for module in (target_module, drafter_module):
        monkeypatch.setattr(module, "FIRST_CAPACITY", 4)
    monkeypatch.setattr(text_module, "FIRST_WIDTH", 4)


def test_cached_data_moves_only_when_rows_leave_or_the_buffer_grows(target, monkeypatch):
    small_first_capacity(monkeypatch)
    batch, network = ragged_batch(), make_network(target)
    eos, reference = spread_eos(target, batch, 40)
    with watched_caches() as seen:
        output = generate(target, network, **batch, eos_token_id=eos, max_new_tokens=40, num_assistant_tokens=3)
    assert output.tolist() == reference.sequences.tolist()
    caches = [passes for passes in seen.values() if len(passes) > 3]
    assert len(caches) == 2  # the target's and the drafter's
    for passes in caches:
        moves = Counter()
        for (capacity, rows, old), (next_capacity, next_rows, new) in pairwise(passes):
            cause = "dropped" if next_rows < rows else "grew" if next_capacity > capacity else None
            moved = [before.data_ptr() != after.data_ptr() for before, after in zip(old, new, strict=True)]
            assert all(moved) if cause else not any(moved)
            moves[cause] += 1
        assert moves["dropped"] >= 1
        assert moves["grew"] >= 1
        assert moves[None] > moves["dropped"] + moves["grew"]


class StopAfter(StoppingCriteria):
    """Ends all rows after some columns."""

    def __init__(self, columns: int):
        self.columns = columns

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.columns)


@pytest.mark.parametrize("k", [1, 4])
def test_memory_is_for_text_that_may_come_soon(k: int, target):
    batch = ragged_batch(padding=(2, 3, 5, 2, 8))  # the longest prompt has 7 tokens
    arguments = dict(max_new_tokens=100_000, stopping_criteria=[StopAfter(9 + 12)], eos_token_id=None)
    reference = plain(target, batch, **arguments)
    with watched_caches() as seen:
        output = generate(target, make_network(target), **batch, num_assistant_tokens=k, **arguments)
    assert output.tolist() == reference.sequences.tolist()
    slots = {buffer.shape[2] for passes in seen.values() if len(passes) > 3 for *_, kept in passes for buffer in kept}
    assert slots == {7 + 256 + 1, 7 + 256 + k + 1 + 1}  # and the spare slot each


def test_memory_is_not_for_more_than_max_length(target):
    batch = ragged_batch()
    with watched_caches() as seen:
        generate(target, make_network(target), **batch, eos_token_id=None, max_new_tokens=10, num_assistant_tokens=4)
    caches = [passes for passes in seen.values() if len(passes) > 3]
    assert {buffer.shape[2] for passes in caches for *_, kept in passes for buffer in kept} == {9 + 10 + 1}


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3"])
def test_memory_beside_the_static_cache_of_plain_generate(name: str):
    """Within 5 %, once texts are as long as they may get."""
    overrides = {} if name == "llama" else dict(sliding_window=200)
    target = make_target(name, max_position_embeddings=1000, **overrides)
    batch = ragged_batch(padding=(0, 300, 20), width=600)
    arguments = dict(max_new_tokens=40, eos_token_id=None)
    output = target.generate(**batch, **arguments, cache_implementation="static", return_dict_in_generate=True)
    of_plain = [buffer for layer in output.past_key_values.layers for buffer in (layer.keys, layer.values)]
    reference = plain(target, batch, **arguments)
    with watched_caches() as seen:
        check(target, batch, reference, oracle(reference, batch, "sometimes", None), 4, **arguments)
    every = [buffers for passes in seen.values() for _, rows, buffers in passes if rows == 3]
    ours = max(every, key=lambda buffers: sum(buffer.numel() for buffer in buffers))
    sizes = [sum(buffer.numel() for buffer in buffers) for buffers in (of_plain, ours)]
    assert sizes[1] <= 1.05 * sizes[0]
    if name != "llama":  # nor is it for whole texts in every layer
        assert sizes[1] < 0.75 * 3 * 2 * len(target.get_decoder().layers) * 640 * ours[0][0, :, 0].numel()


@pytest.mark.parametrize("kind", ["specformer", "sometimes", "always"])
def test_growth_keeps_the_text(kind: str, target, monkeypatch):
    small_first_capacity(monkeypatch)
    batch, k = ragged_batch(), 3
    eos, reference = spread_eos(target, batch, 60)
    drafter = make_network(target) if kind == "specformer" else oracle(reference, batch, kind, eos)
    with watched_caches() as seen:
        output = generate(target, drafter, **batch, eos_token_id=eos, max_new_tokens=60, num_assistant_tokens=k)
    assert output.tolist() == reference.sequences.tolist()
    for passes in seen.values():
        capacities = [capacity for capacity, *_ in passes]
        if len(capacities) > 5:
            distinct = sorted(set(capacities))
            assert capacities == sorted(capacities)
            assert distinct[0] in (9 + 4, 9 + 4 + k + 1)
            assert len(distinct) > 1
            for small, large in pairwise(distinct):
                assert large == min(2 * small, 9 + 60)


def test_rows_leave_when_half_of_the_carried_ones_have_finished(target, monkeypatch):
    batch = ragged_batch(padding=(0, 3, 5, 1, 8, 2, 0, 4))
    eos, reference = spread_eos(target, batch, 40)
    passes, drops = [], []
    drop_finished, verify = Text.drop_finished, decoding.verify

    def watched_drop(self):
        carried = list(self.rows)
        running = [row for row in carried if self.is_running(row)]
        index = drop_finished(self)
        if 2 * len(running) > len(carried):
            assert index is None
            assert self.rows == carried
        else:
            assert [carried[place] for place in index.tolist()] == self.rows == running
            drops.append((len(carried), len(running)))
        passes.append((len(self.rows), len(running)))
        return index

    def watched_verify(model, cache, tokens, *more):
        assert len(tokens) == passes[-1][0]
        return verify(model, cache, tokens, *more)

    monkeypatch.setattr(Text, "drop_finished", watched_drop)
    monkeypatch.setattr(decoding, "verify", watched_verify)
    output = generate(
        target,
        oracle(reference, batch, "sometimes", eos),
        **batch,
        eos_token_id=eos,
        max_new_tokens=40,
        num_assistant_tokens=2,
    )
    assert output.tolist() == reference.sequences.tolist()
    assert len(drops) >= 2
    assert all(running < carried <= 8 for carried, running in drops)
    assert all(2 * running > carried for carried, running in passes)
    assert any(running < carried for carried, running in passes)  # fewer than half are carried along


def test_a_second_call_copies_no_weights(monkeypatch):
    """The network in the target's dtype, and the layer of the head's rows of the tokens that are drafted, with what is
    made of it, are kept from call to call: until weights change, and no longer than the models live."""
    target, batch = llama(torch.float64), ragged_batch()
    config = SpecFormerConfig.from_target_config(target.config, draft_vocab_size=24)
    network = SpecFormerModel(config).eval()  # float32
    network.choose_draft_tokens(torch.rand(target.config.vocab_size))
    copies, rows = [], []
    deepcopy, kept = copy.deepcopy, target_specformer.kept_rows

    def noted(*args):
        layer = kept(*args)
        if not rows or rows[-1]() is not layer:
            rows.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(
        drafter_dtype.copy,
        "deepcopy",
        lambda thing, *args: copies.append(isinstance(thing, SpecFormerModel)) or deepcopy(thing, *args),
    )
    monkeypatch.setattr(target_specformer, "kept_rows", noted)

    def call(target=target, network=network) -> tuple[int, int]:
        generate(target, network, **batch, max_new_tokens=6, num_assistant_tokens=2)
        return sum(copies), len(rows)

    assert [call() for _ in range(3)] == [(1, 1)] * 3
    with torch.no_grad():
        next(network.parameters()).mul_(2)
    assert [call() for _ in range(2)] == [(2, 1)] * 2
    with torch.no_grad():
        target.lm_head.weight.mul_(0.5)
    assert [call() for _ in range(2)] == [(2, 2)] * 2
    network.choose_draft_tokens(torch.rand(target.config.vocab_size))
    assert call()[1] == 3
    gone = weakref.ref(network), weakref.ref(target.lm_head)
    del network, target, call
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_drafts_are_multiplied_in_one_piece(k: int, target, monkeypatch):
    """torch multiplies states that lie apart row by row, and copies the head's weights for each of them."""
    choose, pieces = drafter_module.choose_drafts, []

    def noted(network, borrowed, states, *args):
        pieces.append(states.is_contiguous())
        return choose(network, borrowed, states, *args)

    monkeypatch.setattr(drafter_module, "choose_drafts", noted)
    generate(target, make_network(target), **ragged_batch(), max_new_tokens=12, num_assistant_tokens=k)
    assert pieces and all(pieces)
