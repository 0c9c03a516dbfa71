"""Places in the texts of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Positions:
    """Whose they are, and how many tokens are generated before each. Both are on the host, which knows them without
    asking a device.

    Attributes:
        rows: of the batch, (N, q) for N rows with q positions each.
        steps: generated tokens of that row before the position, of the same shape.
    """

    rows: torch.Tensor
    steps: torch.Tensor

    @classmethod
    def at(cls, rows: list[int], step: int) -> Positions:
        """One position of each of `rows`, all after `step` tokens: (N, 1)."""
        return cls(
            torch.tensor(rows, dtype=torch.long, device="cpu")[:, None], torch.full((len(rows), 1), step, device="cpu")
        )

    def __getitem__(self, which) -> Positions:
        """Of the positions, as tensors are indexed."""
        return Positions(self.rows[which], self.steps[which])
