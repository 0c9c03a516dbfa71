"""A cache in which every row has its own length, and what the rows' tokens see of it.

Row b's real tokens occupy slots 0..lengths[b]-1 of one buffer per layer, so that a slot's number is the token's
position. New keys and values are scattered after each row's length; those of rejected tokens are overwritten by the
next pass. Nothing is cropped, shifted or padded again: cached data moves only when the buffer grows or rows leave.

Layers with a sliding window keep a ring of slots, see `cache_layers`; those that keep states are in `cache_states`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache_layers import RaggedLayer, new_layer, positions_held
from .cache_states import MiniMaxNames, StateLayer

KV_LENGTH_STEP = 64
"""What attention sees grows by so many slots: shapes that recur save more than the masked slots cost."""
KV_LENGTH_STEP_RECORDED = 256
"""The same where passes are recorded: also the capacity is so many whole steps, so that no pass is cut off by it."""


class Mixers(Protocol):
    """How modules that keep states read several tokens, see `target_mixers`."""

    @property
    def states_of(self) -> Mapping: ...

    are_compiled: bool

    def __call__(self, cache: RaggedCache, mixer: torch.nn.Module, forward: Callable, args: tuple, kwargs: dict): ...


class RaggedCache(MiniMaxNames):
    """What each layer of a model keeps of the rows' tokens, and one length per row.

    A pass goes: `position_ids = cache.prepare(q)`, the forward, then `cache.advance(counts, longest)` with the number
    of tokens that each row keeps of the q.

    Args:
        num_layers: layers of the model.
        lengths: tokens already there per row, (B,); put there by `load`.
        longest: the largest of them, known to the host.
        capacity: slots to start with. They double when the longest row needs more.
        max_length: positions at or past it are never kept. They go to the spare slot, and their position ids are
            clamped below it, since models with a position table fail past its end.
        more_slots: that trees need beyond `max_length`, whose tokens take a slot each until it is known which of them
            stay.
        ring: most slots of the layers that are rings: their window - 1, and the most tokens that are written after a
            row's length before it is known which of them are kept.
        ring_layers: indices of these layers.
        like: the layers of a prompt's cache, which tell what each layer keeps; default keys and values.
        states: tokens after which a layer's state is kept: one more than are written before it is known which of them
            are. More where a pass writes more.

    Attributes:
        ragged_layers: those that keep keys and values.
        state_layers: those that keep states, by their index.
        mixers: how the modules that keep states read several tokens, where there are any.
        kv_length: slots that attention sees.
        width: tokens of the next pass.
        moves: how often the buffers were replaced by others.
        is_recorded: whether passes are replayed later with other lengths, so that these may not be taken for constants,
            and few shapes are better than narrow ones.
    """

    def __init__(
        self,
        num_layers: int,
        lengths: torch.Tensor,
        longest: int,
        capacity: int,
        max_length: int,
        ring: int | None = None,
        ring_layers: Collection[int] = (),
        more_slots: int = 0,
        like: Sequence | None = None,
        states: int = 1,
    ):
        self.lengths, self.longest = lengths, longest
        self.capacity, self.max_length, self.ring = capacity, max_length, ring
        self.max_slots = max_length + more_slots
        self.branches: tuple[torch.Tensor, torch.Tensor] | None = None  # of the next pass, where it reads trees
        self.kv_length, self.width = longest, 0
        self.moves, self.is_recorded = 0, False
        self.span: slice | None = None  # slots of the next pass, where there is but one row, on a CPU
        self.slots: torch.Tensor | None = None
        self.ring_slots: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.mixers: Mixers | None = None
        self.states = states
        layers = [
            new_layer(self, ring if n in ring_layers else None, None if like is None else like[n])
            for n in range(num_layers)
        ]
        self.ragged_layers = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        self.state_layers = {n: layer for n, layer in enumerate(layers) if isinstance(layer, StateLayer)}
        super().__init__(layers=layers)

    def load(self, rows: torch.Tensor, prompt_cache: Cache, columns: torch.Tensor) -> None:
        """Take over the states of a prompt pass over `rows` (N,), and leave none in `prompt_cache`.

        Args:
            columns: where that pass had position p of the n-th row, (N, P). Positions after a row's length may be
                anywhere.
        """
        width = prompt_cache.get_seq_length() if self.ragged_layers else 0
        for ours, theirs in zip(self.layers, prompt_cache.layers, strict=True):
            if isinstance(ours, RaggedLayer):
                if not isinstance(theirs, CacheLayerMixin):
                    kind = type(theirs).__name__
                    raise TypeError(f"A ragged cache takes over keys and values, and a {kind} has none.")
                if theirs.keys is not None and theirs.values is not None:
                    # A sliding layer kept its last columns only; the others are out of every later query's window.
                    dropped = width - theirs.keys.shape[2]
                    ours.load(rows, theirs.keys, theirs.values, (columns - dropped).clamp(min=0))
                    theirs.keys = theirs.values = None
            if isinstance(ours, StateLayer):
                ours.load_states(rows, theirs)  # type: ignore[arg-type]

    def reserve(self, query_length: int) -> None:
        """Make room for the next pass."""
        self.keep_states(query_length + 1)
        needed = min(self.longest + query_length, self.max_slots)
        if self.is_recorded:
            needed = whole_steps(needed, KV_LENGTH_STEP_RECORDED)
            if needed > self.capacity:
                self._grow(whole_steps(max(2 * self.capacity, needed), KV_LENGTH_STEP_RECORDED))
            self.kv_length = needed
            return
        if needed > self.capacity:
            self._grow(min(max(2 * self.capacity, needed), self.max_slots))
        self.kv_length = min(whole_steps(needed, KV_LENGTH_STEP), self.capacity)

    def prepare(
        self, query_length: int, depths: torch.Tensor | None = None, ancestors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Choose the slots of the next pass; returns its position ids (B, q).

        Args:
            depths: of the tokens of a tree, (B, n), where the pass reads one: see `DraftTree`. It reads the last q of
                them; those in front were read by passes before, in which no row kept any.
            ancestors: which of them each of the q sees, bool (B, q, n).
        """
        read = 0 if depths is None else depths.shape[1] - query_length
        self.reserve(read + query_length)
        self.width, self.span, self.branches = query_length, None, None
        if len(self.lengths) == 1 and is_on_host(self.lengths) and not self.is_recorded:
            start = int(self.lengths[0]) + read
            if start + query_length <= (self.max_length if depths is None else self.max_slots):
                self.span = slice(start, start + query_length)
        slots = positions = self.lengths[:, None] + read + torch.arange(query_length, device=self.lengths.device)
        is_kept = positions < self.max_length
        if depths is not None and ancestors is not None:
            self.branches = depths, ancestors
            positions, is_kept = self.lengths[:, None] + depths[:, read:], slots < self.max_slots
        # filled, since torch.where would copy its number from the host
        self.slots = slots.masked_fill(~is_kept, self.capacity)
        if self.ring is not None:
            self.ring_slots = (slots % self.ring).masked_fill(~is_kept, min(self.ring, self.capacity))
        self.rows = torch.arange(len(positions), device=positions.device)[:, None]
        return positions.clamp(max=self.max_length - 1)

    def follow(self, path: torch.Tensor) -> None:
        """Of the trees that the last pass read, have the tokens at places `path` (B, p) behind one another, as if the
        pass had read nothing else. Where a path stays in a place, nothing more is of use."""
        if path.device.type == "cpu":  # which tells at once that most of them are in their places
            places = torch.arange(path.shape[1], device=path.device)
            moved = (path != places)[:, 1:] & (path[:, 1:] != path[:, :-1])
            path = path[:, : 1 + int((moved * places[1:]).amax()) if moved.any() else 0]
            if not path.shape[1]:
                return
        for layer in self.ragged_layers:
            layer.follow(path)

    def keep_states(self, states: int) -> None:
        """Keep the states after so many of the last tokens, at least."""
        if self.state_layers and states > self.states:
            before, self.states, self.moves = self.states, states, self.moves + 1
            for layer in self.state_layers.values():
                layer.widen(before)

    def advance(self, counts: torch.Tensor, longest: int) -> None:
        """Keep `counts` (B,) more tokens of each row; `longest` is the largest length that results."""
        self.lengths, self.longest = self.lengths + counts, longest

    def select_rows(self, index: torch.Tensor, longest: int) -> None:
        """Keep only the rows of `index` (R,); `longest` is the largest of their lengths."""
        self.lengths, self.longest = self.lengths[index], longest
        self.moves += 1
        for layer in self.ragged_layers:
            layer.select_rows(index)
        for states in self.state_layers.values():
            states.select_states(index)

    def replace_rows(self, index: torch.Tensor, other: RaggedCache, longest: int) -> None:
        """Put the rows of `other` in the place of rows `index` (N,); `longest` is the largest length that results."""
        if other.capacity > self.capacity:
            self._grow(other.capacity)
        for layer, theirs in zip(self.ragged_layers, other.ragged_layers, strict=True):
            layer.replace_rows(index, theirs)
        for number, states in self.state_layers.items():
            states.replace_states(index, other.state_layers[number])
        self.lengths = self.lengths.index_copy(0, index, other.lengths)
        self.longest = longest

    def _grow(self, capacity: int) -> None:
        self.capacity, self.moves = capacity, self.moves + 1
        for layer in self.ragged_layers:
            layer.resize()

    def mask(self, position_ids: torch.Tensor, window: int | None = None, chunk: int | None = None) -> torch.Tensor:
        """Which slots the queries at `position_ids` (B, q) see, bool (B, 1, q, kv_length): themselves and what came
        before, within a sliding `window` or a `chunk` of positions where the layer has one."""
        if self.branches is not None:
            return self._mask_of_trees(position_ids, window, chunk)
        query = position_ids[:, None, :, None]
        slot = torch.arange(self.kv_length, device=position_ids.device)
        visible = slot <= query
        if window is not None:
            if self.ring is not None:
                newest = position_ids[:, -1:]  # of this pass; what comes after it was rejected before
                slot = positions_held(newest, min(self.kv_length, self.ring), self.ring)[:, None, None]
                visible = (slot >= 0) & (slot <= query)
            visible = visible & (slot > query - window)
        if chunk is not None:
            visible = visible & (slot // chunk == query // chunk)
        return visible

    def _mask_of_trees(self, position_ids: torch.Tensor, window: int | None, chunk: int | None) -> torch.Tensor:
        """The same where tokens of the block stand beside one another: each sees its ancestors, at their depths."""
        assert self.branches is not None  # `mask` has looked
        depths, ancestors = self.branches
        queries, width = ancestors.shape[1:]
        lengths = self.lengths[:, None]
        held = torch.arange(self.kv_length, device=position_ids.device)[None]  # what each slot would hold of a chain
        if window is not None and self.ring is not None:
            held = positions_held(lengths + width - 1, min(self.kv_length, self.ring), self.ring)
        place = held - lengths  # in the block; negative in the text before it: (B, K)
        inside = place.clamp(0, width - 1)
        of_block = ancestors.gather(2, inside[:, None].expand(-1, queries, -1)) & (place < width)[:, None]  # (B, q, K)
        visible = torch.where((place < 0)[:, None], (held >= 0)[:, None], of_block)
        key = torch.where(place < 0, held, lengths + depths.gather(1, inside))[:, None]
        query = position_ids[..., None]
        if window is not None:
            visible = visible & (key > query - window)
        if chunk is not None:
            visible = visible & (key // chunk == query // chunk)
        return visible[:, None]


def whole_steps(count: int, step: int) -> int:
    return -(-count // step) * step


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether its values can be read without waiting for a GPU."""
    return tensor.device.type == "cpu"
