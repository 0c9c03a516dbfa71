"""Where the real tokens of a padded batch of prompts are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from .prompt_groups import group_rows


class PromptGroup(NamedTuple):
    """Rows of a batch that read their prompts together, without the columns in which all of them are padded.

    Attributes:
        rows: their places in the batch, (N,).
        width: the last columns, which are left.
        layout: of these rows and columns.
    """

    rows: torch.Tensor
    width: int
    layout: PromptLayout


@dataclass
class PromptLayout:
    """
    Args:
        columns: the columns of row b's real tokens in order, then its padding, (B, P).
        lengths: real tokens per row, (B,).
        host_lengths: the same as Python integers.
        host_widths: columns from each row's first real token on.
        pass_tokens: what a pass over some of the rows must save to be worth it, see `group_rows`.
    """

    columns: torch.Tensor
    lengths: torch.Tensor
    host_lengths: list[int]
    host_widths: list[int]
    pass_tokens: int | None = None

    @classmethod
    def from_mask(
        cls, attention_mask: torch.Tensor | None, input_ids: torch.Tensor, pass_tokens: int | None = None
    ) -> PromptLayout:
        """Read a 2-D mask (B, P); `None` means that nothing is padded.

        Raises:
            ValueError: a row is empty or padded on the right: there is no last token to go on from.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}; "
                "expected one entry for every token of the prompts."
            )
        real = attention_mask.to(input_ids.device).bool()
        if not bool(real[:, -1].all()):
            rows = (~real[:, -1]).nonzero().flatten().tolist()
            raise ValueError(
                f"Rows {rows} of the batch are padded on the right (their last attention_mask entry is 0). Pad on the "
                "left: tokenizer.padding_side = 'left'."
            )
        columns = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        lengths = real.sum(1)
        host_lengths, host_widths = torch.stack([lengths, real.shape[1] - columns[:, 0]]).tolist()
        return cls(columns, lengths, host_lengths, host_widths, pass_tokens)

    @property
    def longest(self) -> int:
        return max(self.host_lengths)

    @property
    def has_holes(self) -> bool:
        """Whether padding stands between real tokens of some row."""
        return self.host_widths != self.host_lengths

    @cached_property
    def groups(self) -> list[PromptGroup]:
        """The rows that read their prompts together."""
        groups = []
        for rows in group_rows(self.host_widths, self.pass_tokens):
            host_lengths, host_widths = (
                [values[row] for row in rows] for values in (self.host_lengths, self.host_widths)
            )
            width = max(host_widths)
            rows = torch.tensor(rows, device=self.columns.device)
            lengths, dropped = self.lengths[rows], self.columns.shape[1] - width
            # a row's tokens stay, and of its padding, which comes after them, the first columns go
            index = torch.arange(width, device=rows.device)
            index = index + dropped * (index >= lengths[:, None])  # (N, width)
            columns = self.columns[rows].gather(1, index) - dropped
            groups.append(PromptGroup(rows, width, PromptLayout(columns, lengths, host_lengths, host_widths)))
        return groups

    def numbers_rows_from_zero(self, position_ids: torch.Tensor) -> bool:
        """Whether position ids (B or 1, P) count the real tokens of each row: 0, 1, 2, ..."""
        ids = position_ids.to(self.columns.device).expand(len(self.lengths), -1).gather(1, self.columns)
        expected = torch.arange(ids.shape[1], device=ids.device)
        return bool(((ids == expected) | (expected >= self.lengths[:, None])).all())

    def to(self, device: torch.device) -> PromptLayout:
        return replace(self, columns=self.columns.to(device), lengths=self.lengths.to(device))

    def mask(self) -> torch.Tensor:
        """The 2-D attention mask, (B, P), of integers."""
        real = torch.arange(self.columns.shape[1], device=self.columns.device) < self.lengths[:, None]
        return torch.zeros_like(self.columns).scatter(1, self.columns, real.long())

    def compact(self, states: torch.Tensor) -> torch.Tensor:
        """Move real tokens to the front: (B, P, ...) -> (B, P, ...), row b's tokens at 0..lengths[b]-1."""
        index = self.columns.to(states.device)
        return states[torch.arange(len(index), device=states.device)[:, None], index]
