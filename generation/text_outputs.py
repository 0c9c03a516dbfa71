"""Scores or logits of every step, as generate() returns them."""

from __future__ import annotations

import torch


class StepOutputs:
    """One tensor (B, V) per generated token, filled row by row as each row gets there.

    Rows write all the positions of a block, those behind a rejected draft included: when the row really gets there it
    writes over them.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.steps: list[torch.Tensor] = []

    def write(self, values: torch.Tensor, rows: list[int], steps: list[int]) -> None:
        """Values (N, V) of the given rows at the given steps."""
        for step in sorted(set(steps)):
            while len(self.steps) <= step:
                self.steps.append(values.new_zeros(self.batch_size, values.shape[-1]))
            places = [place for place, other in enumerate(steps) if other == step]
            self.steps[step][[rows[place] for place in places]] = values[places]

    def first(self, count: int) -> tuple[torch.Tensor, ...]:
        """Those of the first `count` tokens."""
        return tuple(self.steps[:count])
