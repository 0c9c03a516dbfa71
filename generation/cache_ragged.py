"""A key/value cache in which every row has its own length, and the masks that go with it.

Row b's real tokens occupy slots 0..lengths[b]-1 of one buffer per layer, so that a slot's number is the token's
position. New keys and values are scattered after each row's length; those of rejected tokens are overwritten by the
next pass. Nothing is cropped, shifted or padded again: cached data moves only when the buffer grows or rows leave.

Layers with a sliding window keep a ring of slots: position p is in slot p modulo its size. With window - 1 slots for
what the next token sees, and one for each token that may be written before the row's length is known, a slot is
overwritten only once no later token sees it.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin

KV_LENGTH_STEP = 64
"""What attention sees grows by so many slots: shapes that recur save more than the masked slots cost."""
KV_LENGTH_STEP_RECORDED = 256
"""The same where passes are recorded: also the capacity is so many whole steps, so that no pass is cut off by it."""


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, kv heads, capacity + 1, head_dim). The last slot is spare: it takes what must
    not be kept.

    Args:
        ring: most slots of the layer, if they are a ring.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    keys: torch.Tensor  # both once `is_initialized`
    values: torch.Tensor

    def __init__(self, owner: RaggedCache, ring: int | None = None):
        super().__init__()
        self.owner, self.ring = weakref.proxy(owner), ring  # or buffers would wait for Python's garbage collection

    @property
    def capacity(self) -> int:
        return self.owner.capacity if self.ring is None else min(self.owner.capacity, self.ring)

    @property
    def kv_length(self) -> int:
        """Slots that attention sees."""
        return min(self.owner.kv_length, self.capacity)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, not empty: a masked slot still enters 0 * value, and 0 * NaN is NaN.
        self.keys, self.values = (
            states.new_zeros(len(self.owner.lengths), states.shape[1], self.capacity + 1, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write this pass's states (B, kv heads, q, head_dim) at the owner's slots; return the slots in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.owner.span is not None and self.ring is None:
            self.keys[:, :, self.owner.span], self.values[:, :, self.owner.span] = key_states, value_states
        else:
            slots = self.owner.slots if self.ring is None else self.owner.ring_slots
            rows, slots = self.owner.rows.to(self.device), slots.to(self.device)  # (B, 1), (B, q)
            # Under torch.autocast a pass may leave other dtypes than the prompt's did.
            self.keys[rows, :, slots] = key_states.transpose(1, 2).to(self.keys.dtype)
            self.values[rows, :, slots] = value_states.transpose(1, 2).to(self.values.dtype)
        return self.keys[:, :, : self.kv_length], self.values[:, :, : self.kv_length]

    def load(
        self, rows: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor, columns: torch.Tensor
    ) -> None:
        """Fill the slots of `rows` (N,) with prompt states: position p of the n-th takes column columns[n, p]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.ring is not None:
            held = positions_held(self.owner.lengths[rows, None] - 1, self.capacity, self.ring)
            columns = columns.gather(1, held.clamp(0, columns.shape[1] - 1))
        rows, index = rows.to(self.device), columns.to(self.device)[:, None, :, None]  # (N,), (N, 1, P, 1)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            states = states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[-1]))
            buffer[:, :, : columns.shape[1]].index_copy_(0, rows, states)

    def follow(self, path: torch.Tensor) -> None:
        """Move what the last pass wrote at places `path` (B, p) of its block to the first p places."""
        slots = self.owner.slots if self.ring is None else self.owner.ring_slots
        rows, slots, path = (part.to(self.device) for part in (self.owner.rows, slots, path))
        taken, places = slots.gather(1, path), slots[:, : path.shape[1]]
        for buffer in (self.keys, self.values):
            buffer[rows, :, places] = buffer[rows, :, taken]

    def resize(self) -> None:
        """Follow the owner's capacity."""
        if self.is_initialized and self.keys.shape[2] <= self.capacity:
            extra = self.capacity + 1 - (self.keys.shape[2] - 1)
            self.keys, self.values = (
                functional.pad(buffer[:, :, :-1], (0, 0, 0, extra)) for buffer in (self.keys, self.values)
            )

    def select_rows(self, index: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = (buffer[index.to(self.device)] for buffer in (self.keys, self.values))

    def replace_rows(self, index: torch.Tensor, other: RaggedLayer) -> None:
        if other.is_initialized:
            width = other.keys.shape[2] - 1
            for buffer, states in ((self.keys, other.keys), (self.values, other.values)):
                buffer[index.to(self.device), :, :width] = states[:, :, :width]

    def get_seq_length(self) -> int:
        return self.owner.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kv_length, 0

    def get_max_length(self) -> int:
        return -1


class RaggedCache(Cache):
    """One `RaggedLayer` per layer of a model, and one length per row.

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

    Attributes:
        kv_length: slots that attention sees.
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
    ):
        self.lengths, self.longest = lengths, longest
        self.capacity, self.max_length, self.ring = capacity, max_length, ring
        self.max_slots = max_length + more_slots
        self.branches: tuple[torch.Tensor, torch.Tensor] | None = None  # of the next pass, where it reads trees
        self.kv_length = longest
        self.moves, self.is_recorded = 0, False
        self.span: slice | None = None  # slots of the next pass, where there is but one row, on a CPU
        self.slots: torch.Tensor | None = None
        self.ring_slots: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.ragged_layers = [RaggedLayer(self, ring if n in ring_layers else None) for n in range(num_layers)]
        super().__init__(layers=[*self.ragged_layers])  # which may be of any kind

    def load(self, rows: torch.Tensor, prompt_cache: Cache, columns: torch.Tensor) -> None:
        """Take over the states of a prompt pass over `rows` (N,), and leave none in `prompt_cache`.

        Args:
            columns: where that pass had position p of the n-th row, (N, P). Positions after a row's length may be
                anywhere.
        """
        width = prompt_cache.get_seq_length()
        for ragged, dynamic in zip(self.ragged_layers, prompt_cache.layers, strict=True):
            if not isinstance(dynamic, CacheLayerMixin):
                raise TypeError(f"A ragged cache takes over keys and values, and a {type(dynamic).__name__} has none.")
            if dynamic.keys is not None and dynamic.values is not None:
                # A sliding layer kept its last columns only; the others are out of every later query's window.
                dropped = width - dynamic.keys.shape[2]
                ragged.load(rows, dynamic.keys, dynamic.values, (columns - dropped).clamp(min=0))
                dynamic.keys = dynamic.values = None

    def reserve(self, query_length: int) -> None:
        """Make room for the next pass."""
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
            depths: of the tokens of a tree, (B, q), where the pass reads one: see `DraftTree`.
            ancestors: which of them each one sees, bool (B, q, q).
        """
        self.reserve(query_length)
        self.span, self.branches = None, None
        if len(self.lengths) == 1 and is_on_host(self.lengths) and not self.is_recorded:
            start = int(self.lengths[0])
            if start + query_length <= (self.max_length if depths is None else self.max_slots):
                self.span = slice(start, start + query_length)
        slots = positions = self.lengths[:, None] + torch.arange(query_length, device=self.lengths.device)
        is_kept = positions < self.max_length
        if depths is not None and ancestors is not None:
            self.branches = depths, ancestors
            positions, is_kept = self.lengths[:, None] + depths, slots < self.max_slots
        # filled, since torch.where would copy its number from the host
        self.slots = slots.masked_fill(~is_kept, self.capacity)
        if self.ring is not None:
            self.ring_slots = (slots % self.ring).masked_fill(~is_kept, min(self.ring, self.capacity))
        self.rows = torch.arange(len(positions), device=positions.device)[:, None]
        return positions.clamp(max=self.max_length - 1)

    def follow(self, path: torch.Tensor) -> None:
        """Of the trees that the last pass read, have the tokens at places `path` (B, p) behind one another, as if the
        pass had read nothing else."""
        for layer in self.ragged_layers:
            layer.follow(path)

    def advance(self, counts: torch.Tensor, longest: int) -> None:
        """Keep `counts` (B,) more tokens of each row; `longest` is the largest length that results."""
        self.lengths, self.longest = self.lengths + counts, longest

    def select_rows(self, index: torch.Tensor, longest: int) -> None:
        """Keep only the rows of `index` (R,); `longest` is the largest of their lengths."""
        self.lengths, self.longest = self.lengths[index], longest
        self.moves += 1
        for layer in self.ragged_layers:
            layer.select_rows(index)

    def replace_rows(self, index: torch.Tensor, other: RaggedCache, longest: int) -> None:
        """Put the rows of `other` in the place of rows `index` (N,); `longest` is the largest length that results."""
        if other.capacity > self.capacity:
            self._grow(other.capacity)
        for layer, theirs in zip(self.ragged_layers, other.ragged_layers, strict=True):
            layer.replace_rows(index, theirs)
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
        (depths, ancestors), width = self.branches, position_ids.shape[1]
        lengths = self.lengths[:, None]
        held = torch.arange(self.kv_length, device=position_ids.device)[None]  # what each slot would hold of a chain
        if window is not None and self.ring is not None:
            held = positions_held(lengths + width - 1, min(self.kv_length, self.ring), self.ring)
        place = held - lengths  # in the block; negative in the text before it: (B, K)
        inside = place.clamp(0, width - 1)
        of_block = ancestors.gather(2, inside[:, None].expand(-1, width, -1)) & (place < width)[:, None]  # (B, q, K)
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


def positions_held(newest: torch.Tensor, count: int, ring: int) -> torch.Tensor:
    """The position that each of the first `count` slots of a ring holds where `newest` (B, 1) is the last one written:
    (B, count), negative where there is none."""
    slot = torch.arange(count, device=newest.device)
    return newest - (newest - slot) % ring


def sliding_layers(config, num_layers: int) -> tuple[int | None, list[int]]:
    """The window of a model's sliding layers, and their indices."""
    config = config.get_text_config(decoder=True)
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if layer_types is None:
        return window, [] if window is None else list(range(num_layers))
    return window, [layer for layer in range(num_layers) if layer_types[layer] == "sliding_attention"]


def attention_masks(config, cache: RaggedCache, position_ids: torch.Tensor, dtype: torch.dtype):
    """The `attention_mask` argument of one pass: a 4-D mask, or one per layer type where the config tells types apart.

    Bool for sdpa; for eager attention, which adds its mask, floats of `dtype`.
    """
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)

    def for_layers(layer_type: str):
        visible = cache.mask(
            position_ids,
            window=window if layer_type == "sliding_attention" else None,
            chunk=config.attention_chunk_size if layer_type == "chunked_attention" else None,
        )
        if config._attn_implementation == "sdpa":
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    if (layer_types := getattr(config, "layer_types", None)) is not None:
        return {layer_type: for_layers(layer_type) for layer_type in set(layer_types)}
    return for_layers("full_attention" if window is None else "sliding_attention")
