"""The ragged cache and the layout of padded prompts, on their own."""

from __future__ import annotations

import pytest
import torch

from specformer.generation.cache_ragged import KV_LENGTH_STEP, RaggedCache
from specformer.generation.prompt import PromptLayout

HEADS, HEAD_DIM = 2, 3


def states(rows: int, count: int) -> torch.Tensor:
    """Keys or values that are all different."""
    return torch.randn(rows, HEADS, count, HEAD_DIM)


def make_cache(lengths: list[int], capacity: int = 10, max_length: int = 100, layers: int = 1) -> RaggedCache:
    return RaggedCache(layers, torch.tensor(lengths), max(lengths), capacity, max_length)


def test_update_writes_behind_each_row():
    cache = make_cache([0, 0, 0], layers=2)
    expected = [[], [], []]
    for q, counts in ((4, [4, 1, 2]), (3, [1, 3, 0]), (1, [1, 0, 1])):
        positions = cache.prepare(q)
        assert positions.tolist() == [[len(row) + i for i in range(q)] for row in expected]
        keys, values = states(3, q), states(3, q)
        for layer in range(2):
            seen_keys, seen_values = cache.update(keys + layer, values + layer, layer)
            assert seen_keys.shape == seen_values.shape == (3, HEADS, cache.kv_length, HEAD_DIM)
            for row, kept in enumerate(expected):
                now = [*kept, *((keys[row, :, i], values[row, :, i]) for i in range(q))]
                for slot, (key, value) in enumerate(now):
                    assert torch.equal(seen_keys[row, :, slot], key + layer)
                    assert torch.equal(seen_values[row, :, slot], value + layer)
        for row, count in enumerate(counts):
            expected[row] += [(keys[row, :, i], values[row, :, i]) for i in range(count)]
        cache.advance(torch.tensor(counts), max(map(len, expected)))
    assert cache.lengths.tolist() == [6, 4, 3]
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("is_recorded", [False, True])
def test_one_row_is_written_as_the_first_of_two(is_recorded: bool):
    """Its slots are known to the host, unless the pass is recorded; past max_length they are the spare one again."""
    one, two = make_cache([5], capacity=6, max_length=14), make_cache([5, 3], capacity=6, max_length=14)
    one.is_recorded, length = is_recorded, 5
    for q, count in ((3, 2), (1, 1), (4, 4), (3, 1), (2, 1)):
        keys, values = states(2, q), states(2, q)
        seen = []
        for cache in (one, two):
            rows = len(cache.lengths)
            assert cache.prepare(q)[0].tolist() == [min(length + i, 13) for i in range(q)]
            seen.append(cache.update(keys[:rows], values[:rows], 0))
            cache.advance(torch.full((rows,), count), length + count)
        assert (one.span is None) == (is_recorded or length + q > 14)
        for ours, theirs in zip(*seen, strict=True):
            assert torch.equal(ours[0, :, : min(length + q, 14)], theirs[0, :, : min(length + q, 14)])
        length += count
    assert length == 14


def test_unwritten_slots_are_zero():
    cache = make_cache([0, 0])
    cache.prepare(2)
    keys, _ = cache.update(states(2, 2), states(2, 2), 0)
    assert keys.shape[2] == 10
    assert not keys[:, :, 2:].any()


def test_positions_at_max_length_go_to_the_spare_slot():
    cache = make_cache([2, 5], capacity=6, max_length=6)
    positions = cache.prepare(3)
    assert positions.tolist() == [[2, 3, 4], [5, 5, 5]]  # clamped for models with a position table
    assert cache.slots.tolist() == [[2, 3, 4], [5, 6, 6]]
    keys = states(2, 3)
    seen, _ = cache.update(keys, keys, 0)
    assert seen.shape[2] == 6  # the spare slot is not among what attention sees
    assert torch.equal(seen[0, :, 2:5], keys[0])
    assert torch.equal(seen[1, :, 5], keys[1, :, 0])
    assert not seen[1, :, :5].any()
    assert cache.layers[0].keys.shape[2] == 7


def test_capacity_doubles_up_to_max_length():
    cache = make_cache([0], capacity=4, max_length=30)
    capacities, written = [], []
    for _ in range(10):
        cache.prepare(3)
        keys = states(1, 3)
        cache.update(keys, -keys, 0)
        written.append(keys)
        cache.advance(torch.tensor([3]), cache.longest + 3)
        capacities.append(cache.capacity)
        seen = torch.cat(written, dim=2)
        layer = cache.layers[0]
        assert layer.keys.shape[2] == layer.values.shape[2] == cache.capacity + 1
        assert torch.equal(layer.keys[:, :, : seen.shape[2]], seen)
        assert torch.equal(layer.values[:, :, : seen.shape[2]], -seen)
        assert not layer.keys[:, :, seen.shape[2] :].any()
    assert capacities == [4, 8, 16, 16, 16, 30, 30, 30, 30, 30]


def test_growth_leaves_the_old_spare_slot_behind():
    """What was not to be kept does not become a slot."""
    cache = make_cache([3, 0], capacity=4, max_length=100)
    cache.prepare(1)
    keys = states(2, 1)
    cache.update(keys, keys, 0)
    cache.layers[0].keys[:, :, 4] = torch.nan
    cache.capacity = 8
    cache.layers[0].resize()
    assert cache.layers[0].keys.shape[2] == 9
    assert cache.layers[0].keys.isfinite().all()


@pytest.mark.parametrize(
    ("needed", "capacity", "expected"),
    [(1, 1000, KV_LENGTH_STEP), (64, 1000, 64), (65, 1000, 128), (65, 100, 100), (10, 12, 12)],
)
def test_attention_sees_whole_steps_of_slots(needed: int, capacity: int, expected: int):
    cache = make_cache([needed - 1], capacity=capacity, max_length=2000)
    cache.prepare(1)
    assert cache.kv_length == expected
    assert cache.get_mask_sizes(1, 0) == (expected, 0)


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_mask_is_the_brute_force_one(window: int | None, chunk: int | None):
    cache = make_cache([0, 2, 9, 5], capacity=13, max_length=12)
    positions = cache.prepare(3)
    mask = cache.mask(positions, window=window, chunk=chunk)
    assert mask.dtype == torch.bool
    assert mask.shape == (4, 1, 3, cache.kv_length)
    for row, length in enumerate([0, 2, 9, 5]):
        for i in range(3):
            query = length + i
            visible = [
                slot
                for slot in range(cache.kv_length)
                if slot <= query
                and (window is None or slot > query - window)
                and (chunk is None or slot // chunk == query // chunk)
            ]
            assert mask[row, 0, i].nonzero().flatten().tolist() == visible


def visible_states(seen: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The keys that each query of each row sees, in no order that counts: sorted by their first number."""
    found = []
    for row in range(len(mask)):
        for i in range(mask.shape[2]):
            keys = seen[row][:, mask[row, 0, i]].transpose(0, 1).flatten(1)
            found.append(keys[keys[:, 0].argsort()])
    return found


@pytest.mark.parametrize("too_small", [False, True])
@pytest.mark.parametrize("window", [1, 3, 6])
def test_a_ring_shows_what_a_whole_buffer_does(window: int, too_small: bool):
    """Over ragged rounds of different lengths, many times around. A ring of one slot less does not."""
    torch.manual_seed(window)
    block, lengths, max_length = 4, [5, 1, 9], 70
    columns = torch.arange(9).expand(3, -1)
    ring = window - 1 + block - too_small
    sizes = torch.tensor(lengths), max(lengths), 12, max_length
    caches = [RaggedCache(2, *sizes, ring, [1]), RaggedCache(2, *sizes)]
    prompt = states(3, 9)
    for cache in caches:
        for layer in cache.layers:
            layer.load(torch.arange(3), prompt, -prompt, columns)
    assert caches[0].layers[1].keys.shape[2] == min(ring, 12) + 1
    equal = []
    while caches[0].longest < max_length:
        q = int(torch.randint(1, block + 1, ()))
        new, shown = states(3, q), []
        for cache in caches:
            positions = cache.prepare(q)
            cache.update(new, -new, 0)
            seen, values = cache.update(new, -new, 1)
            assert torch.equal(seen, -values)
            mask = cache.mask(positions, window=window)
            assert seen.shape[2] == mask.shape[3] == cache.get_mask_sizes(q, 1)[0]
            running = [row for row in range(3) if int(cache.lengths[row]) + q <= max_length]
            shown.append(visible_states(seen[running], mask[running]))
        equal.append(all(torch.equal(*pair) for pair in zip(*shown, strict=True)))
        counts = torch.randint(0, q + 1, (3,))
        counts = torch.minimum(counts, max_length - caches[0].lengths)
        for cache in caches:
            cache.advance(counts, int((cache.lengths + counts).max()))
    assert caches[0].layers[1].keys.shape[2] == ring + 1
    assert all(equal) is not too_small


def test_rows_of_a_ring_leave_and_are_replaced():
    """The order of a ring's slots depends on its row alone."""
    window, block = 3, 2
    make = lambda lengths: RaggedCache(1, torch.tensor(lengths), max(lengths), 8, 50, window - 1 + block, [0])  # noqa: E731
    first, other = make([7, 4, 6]), make([5])
    for cache, prompt in ((first, states(3, 7)), (other, states(1, 5))):
        columns = torch.arange(prompt.shape[2]).expand(len(prompt), -1)
        cache.layers[0].load(torch.arange(len(prompt)), prompt, prompt, columns)
    first.select_rows(torch.tensor([0, 2]), 7)
    first.replace_rows(torch.tensor([1]), other, 7)
    seen = []
    for cache, new in ((first, torch.ones(2, HEADS, 1, HEAD_DIM)), (other, torch.ones(1, HEADS, 1, HEAD_DIM))):
        positions = cache.prepare(1)
        keys, _ = cache.update(new, new, 0)
        seen.append(keys[-1][:, cache.mask(positions, window=window)[-1, 0, 0]])
    assert seen[0].shape == (HEADS, window, HEAD_DIM)
    assert torch.equal(*seen)


def test_select_rows():
    cache = make_cache([4, 1, 3], layers=2)
    cache.prepare(2)
    keys, values = states(3, 2), states(3, 2)
    for layer in range(2):
        cache.update(keys + layer, values + layer, layer)
    cache.advance(torch.tensor([2, 1, 2]), 6)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache.select_rows(torch.tensor([1, 2]), 5)
    assert cache.lengths.tolist() == [2, 5]
    assert cache.get_seq_length() == 5
    for layer, (old_keys, old_values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, old_keys[1:])
        assert torch.equal(layer.values, old_values[1:])
    assert cache.prepare(1).tolist() == [[2], [5]]


def test_load_moves_real_columns_to_the_front():
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    layout = PromptLayout.from_mask(mask, mask)
    keys, values = states(3, 5), states(3, 5)
    cache = make_cache(layout.host_lengths, capacity=8)
    cache.layers[0].load(torch.arange(3), keys, values, layout.columns)
    for row, padding in enumerate([0, 2, 4]):
        length = 5 - padding
        assert torch.equal(cache.layers[0].keys[row, :, :length], keys[row, :, padding:])
        assert torch.equal(cache.layers[0].values[row, :, :length], values[row, :, padding:])
    assert not cache.layers[0].keys[:, :, 5:].any()
    positions = cache.prepare(1)
    new = states(3, 1)
    seen, _ = cache.update(new, new, 0)
    mask = cache.mask(positions)
    for row, padding in enumerate([0, 2, 4]):
        text = torch.cat([keys[row, :, padding:], new[row]], dim=1)
        assert torch.equal(seen[row][:, mask[row, 0, 0]], text)


# ---- prompt layout


def test_layout_without_a_mask():
    input_ids = torch.arange(10).view(2, 5)
    layout = PromptLayout.from_mask(None, input_ids)
    assert layout.host_lengths == layout.lengths.tolist() == [5, 5]
    assert layout.longest == 5
    assert not layout.has_holes
    assert torch.equal(layout.compact(input_ids), input_ids)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_layout_of_left_padding(dtype: torch.dtype):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=dtype)
    layout = PromptLayout.from_mask(mask, torch.zeros(3, 4, dtype=torch.long))
    assert layout.host_lengths == layout.lengths.tolist() == [2, 4, 1]
    assert layout.longest == 4
    assert not layout.has_holes
    ids = torch.arange(12).view(3, 4)
    assert layout.compact(ids).tolist() == [[2, 3, 0, 1], [4, 5, 6, 7], [11, 8, 9, 10]]
    vectors = torch.randn(3, 4, 2, 5)
    assert torch.equal(layout.compact(vectors)[0, :2], vectors[0, 2:])


def test_layout_with_holes():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    layout = PromptLayout.from_mask(mask, mask)
    assert layout.has_holes
    assert layout.host_lengths == [3, 5]
    ids = torch.arange(10).view(2, 5)
    assert layout.compact(ids)[0, :3].tolist() == [1, 3, 4]


def test_layout_refuses_right_padding_and_empty_rows():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"Rows \[1, 3\].*padding_side = 'left'"):
        PromptLayout.from_mask(mask, mask)
