"""Groups of draft slots behind many positions of a text, side by side in one pass.

A group begins at a position n of its text, sees the text up to there and of its own slots what its kind lets it see,
and nothing of other groups: what it drafts is what it would draft alone, with a cache of that text. A row of the pass
has no more groups than make what they cannot see of each other little work; long texts have several rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MOST_SLOTS = 256
"""Of a row, unless a single group has more."""


class Groups(NamedTuple):
    """G groups in each of R rows.

    Attributes:
        texts: which text each row belongs to, (R,).
        starts: the position n at which each group begins, (R, G); 0 where there is none.
        real: where there is a group, bool (R, G). In their order these are the positions that were asked for.
    """

    texts: torch.Tensor
    starts: torch.Tensor
    real: torch.Tensor

    @classmethod
    def at(cls, wanted: torch.Tensor, slots: int) -> Groups:
        """A group of `slots` slots at each position that is True in `wanted` (B, T)."""
        most = max(1, MOST_SLOTS // slots)
        starts = [row.nonzero().flatten().split(most) for row in wanted]
        texts = [text for text, parts in enumerate(starts) for part in parts if len(part)]
        parts = [part for of_text in starts for part in of_text if len(part)]
        if not parts:
            nothing = torch.zeros(0, 1, dtype=torch.long, device=wanted.device)
            return cls(nothing[:, 0], nothing, nothing.bool())
        pad = torch.nn.utils.rnn.pad_sequence
        real = pad([torch.ones_like(part, dtype=torch.bool) for part in parts], batch_first=True)
        return cls(torch.tensor(texts, device=wanted.device), pad(parts, batch_first=True), real)

    def places(self, slots: int, first: int) -> torch.Tensor:
        """Positions n + first, n + first + 1, ... of the slots of every group, (R, G * slots)."""
        return (self.starts[:, :, None] + first + torch.arange(slots, device=self.starts.device)).flatten(1)

    def of_texts(self, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """What `values` (B, T, ...) have at `places` (R, n) of each row's text; past its end, the last one's."""
        return values[self.texts[:, None], places.clamp(max=values.shape[1] - 1)]

    def visible(self, slots: int, length: int) -> torch.Tensor:
        """Which of the `length` tokens of its text each slot sees: bool (R, 1, G * slots, length)."""
        tokens = torch.arange(length, device=self.starts.device)
        return (tokens <= self.starts[:, :, None]).repeat_interleave(slots, dim=1)[:, None]

    def own(self, slots: int, causal: bool) -> torch.Tensor:
        """Which slots of a row each slot sees, those of its own group up to itself, or all: bool (G * slots,
        G * slots)."""
        count = self.starts.shape[1]
        within = torch.ones(slots, slots, dtype=torch.bool, device=self.starts.device)
        of_groups = torch.eye(count, dtype=torch.bool, device=self.starts.device)
        return torch.kron(of_groups.byte(), (within.tril() if causal else within).byte()).bool()

    def taken(self, states: torch.Tensor) -> torch.Tensor:
        """Of states (R, G * slots, d) those of real groups, (N, slots, d)."""
        return states.unflatten(1, (self.starts.shape[1], -1))[self.real]
