"""The layers of a ragged cache: keys and values of one layer of a model, with states beside them or without.

Layers with a sliding window keep a ring of slots: position p is in slot p modulo its size. With window - 1 slots for
what the next token sees, and one for each token that may be written before the row's length is known, a slot is
overwritten only once no later token sees it.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from .cache_states import RowLengths, StateLayer


class Owner(RowLengths, Protocol):
    """What layers read of the cache that they are in: see `RaggedCache`."""

    longest: int
    capacity: int
    kv_length: int
    span: slice | None
    slots: torch.Tensor | None
    ring_slots: torch.Tensor | None
    rows: torch.Tensor | None


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

    def __init__(self, owner: Owner, ring: int | None = None):
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


class RaggedStateLayer(RaggedLayer, StateLayer):  # type: ignore[misc]  # as transformers' own
    """Keys and values, and states beside them."""

    def __init__(self, owner: Owner, ring: int | None = None, number_of_states: int = 1):
        RaggedLayer.__init__(self, owner, ring)
        StateLayer.__init__(self, owner, number_of_states)


def new_layer(owner: Owner, ring: int | None, like):
    """A layer that keeps what `like` keeps, a layer of a prompt's cache; `None` keeps keys and values."""
    if not isinstance(like, LinearAttentionCacheLayerMixin):
        has_keys = like is None or isinstance(like, CacheLayerMixin)
        return RaggedLayer(owner, ring) if has_keys else like  # which keeps nothing
    if isinstance(like, CacheLayerMixin):
        return RaggedStateLayer(owner, ring, like.number_of_states)
    return StateLayer(owner, like.number_of_states)


def positions_held(newest: torch.Tensor, count: int, ring: int) -> torch.Tensor:
    """The position that each of the first `count` slots of a ring holds where `newest` (B, 1) is the last one written:
    (B, count), negative where there is none."""
    slot = torch.arange(count, device=newest.device)
    return newest - (newest - slot) % ring
