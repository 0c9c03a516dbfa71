"""Scores or logits of every step, as generate() returns them."""

from __future__ import annotations

import torch

from .text_positions import Positions


class StepOutputs:
    """One tensor (B, V) per generated token, filled row by row as each row gets there.

    Rows write all the positions of a block, those after a rejected draft included: when the row really gets there it
    writes over them.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.steps: list[torch.Tensor] = []

    def write(self, values: torch.Tensor, positions: Positions) -> None:
        """Values (N, q, V) at positions (N, q)."""
        for step in positions.steps.unique().tolist():
            while len(self.steps) <= step:
                self.steps.append(values.new_zeros(self.batch_size, values.shape[-1]))
            here = positions.steps == step
            self.steps[step][positions.rows[here].to(values.device)] = values[here.to(values.device)]

    def first(self, count: int) -> tuple[torch.Tensor, ...]:
        """Those of the first `count` tokens."""
        return tuple(self.steps[:count])
