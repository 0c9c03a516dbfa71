"""Recurrent and convolutional state of rows that have lengths of their own.

What a layer remembers of a text is one state, which every token replaces: rejected tokens cannot be masked as their
keys can. So a layer keeps its states after each of the last few tokens, in a ring: the one after n tokens of a row is
in place n modulo its size. A pass begins with the states at the rows' lengths, and adds one for each of its tokens.
Which of them are taken is then a matter of lengths alone, as it is with keys and values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

StateName = tuple[str, int]
"""The dictionary of `LinearAttentionLayer` that a state is in, and its number there."""
KINDS = ("conv_states", "recurrent_states")


class RowLengths(Protocol):
    """What layers read of the cache that they are in.

    Attributes:
        lengths: tokens of each row, (B,).
        states: after how many of the last ones states are kept.
    """

    lengths: torch.Tensor
    states: int


class MiniMaxNames(Cache):
    """A cache whose states are also got and set by the names that MiniMax's code has for that."""

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        layer = self.layers[layer_idx]
        assert isinstance(layer, LinearAttentionCacheLayerMixin)  # for others nobody asks
        return layer.recurrent_states[0]

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)


class StateLayer(LinearAttentionLayer):
    """The states of one layer, each (B, ring, ...).

    A mixer sees and changes those of one length of each row: between `recall` and `remember` the layer is what
    transformers' own is.

    Args:
        owner: the cache, which knows the rows' lengths and the size of the rings, `states`.
        number_of_states: convolutional ones, and recurrent ones, that the layer may have.
    """

    is_compileable = False

    def __init__(self, owner: RowLengths, number_of_states: int = 1):
        super().__init__(number_of_states)
        self.owner = weakref.proxy(owner)
        self.rings: dict[StateName, torch.Tensor] = {}

    def load_states(self, rows: torch.Tensor, layer: LinearAttentionLayer) -> None:
        """Take over the states of a prompt pass over `rows` (N,), and leave none in its `layer`."""
        places = self.owner.lengths[rows] % self.owner.states
        self.has_previous_state = dict(layer.has_previous_state)
        self.conv_kernel_size = dict(layer.conv_kernel_size)
        for kind in KINDS:
            for number, state in getattr(layer, kind).items():
                if state is None:
                    continue
                name = kind, number
                if name not in self.rings:
                    self.rings[name] = state.new_zeros(len(self.owner.lengths), self.owner.states, *state.shape[1:])
                    getattr(self, f"is_{kind}_initialized")[number] = True
                ring = self.rings[name]
                ring[rows.to(ring.device), places.to(ring.device)] = state
                getattr(layer, kind)[number] = None

    def recall(self, names: Iterable[StateName]) -> None:
        """Go on from the states at the rows' lengths."""
        for kind, number in names:
            ring = self.rings[kind, number]
            rows, places = self._places(0, ring.device)
            getattr(self, kind)[number] = ring[rows, places]

    def remember(self, names: Iterable[StateName], tokens: int) -> None:
        """Keep what the states are after so many `tokens` of a pass."""
        for kind, number in names:
            ring = self.rings[kind, number]
            rows, places = self._places(tokens, ring.device)
            # Under torch.autocast a pass may leave other dtypes than the prompt's did.
            ring[rows, places] = getattr(self, kind)[number].to(ring.dtype)

    def _places(self, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = self.owner.lengths.to(device)
        return torch.arange(len(lengths), device=device), (lengths + tokens) % self.owner.states

    def select_states(self, index: torch.Tensor) -> None:
        self.rings = {name: ring[index.to(ring.device)] for name, ring in self.rings.items()}

    def replace_states(self, index: torch.Tensor, other: StateLayer) -> None:
        """Put the rows of `other` in the place of rows `index` (N,), with nothing to take back."""
        for name, theirs in other.rings.items():
            ring, (rows, places) = self.rings[name], other._places(0, theirs.device)
            ring[index.to(ring.device), other.owner.lengths.to(ring.device) % self.owner.states] = theirs[rows, places]

    def widen(self, before: int) -> None:
        """Follow the owner's `states`, which were fewer `before`."""
        for name, ring in self.rings.items():
            wider = ring.new_zeros(len(ring), self.owner.states, *ring.shape[2:])
            rows = torch.arange(len(ring), device=ring.device)[:, None]
            lengths = self.owner.lengths.to(ring.device)[:, None]
            recent = lengths - torch.arange(before, device=ring.device)  # (B, before)
            wider[rows, recent % self.owner.states] = ring[rows, recent % before]
            self.rings[name] = wider
