"""Where the real tokens of a padded batch of prompts are."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class PromptLayout:
    """
    Args:
        columns: the columns of row b's real tokens in order, then its padding, (B, P).
        lengths: real tokens per row, (B,).
        host_lengths: the same as Python integers.
    """

    columns: torch.Tensor
    lengths: torch.Tensor
    host_lengths: list[int]

    @classmethod
    def from_mask(cls, attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> PromptLayout:
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
        host_lengths = real.sum(1).tolist()
        if not bool(real[:, -1].all()):
            rows = (~real[:, -1]).nonzero().flatten().tolist()
            raise ValueError(
                f"Rows {rows} of the batch are padded on the right (their last attention_mask entry is 0). Pad on the "
                "left: tokenizer.padding_side = 'left'."
            )
        columns = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        return cls(columns, real.sum(1), host_lengths)

    @property
    def longest(self) -> int:
        return max(self.host_lengths)

    @property
    def has_holes(self) -> bool:
        """Whether padding stands between real tokens of some row."""
        width = self.columns.shape[1]
        first = self.columns[:, 0]
        return bool((width - first != self.lengths).any())

    def numbers_rows_from_zero(self, position_ids: torch.Tensor) -> bool:
        """Whether position ids (B or 1, P) count the real tokens of each row: 0, 1, 2, ..."""
        ids = position_ids.to(self.columns.device).expand(len(self.lengths), -1).gather(1, self.columns)
        expected = torch.arange(ids.shape[1], device=ids.device)
        return bool(((ids == expected) | (expected >= self.lengths[:, None])).all())

    def to(self, device: torch.device) -> PromptLayout:
        return PromptLayout(self.columns.to(device), self.lengths.to(device), self.host_lengths)

    def mask(self) -> torch.Tensor:
        """The 2-D attention mask, (B, P), of integers."""
        real = torch.arange(self.columns.shape[1], device=self.columns.device) < self.lengths[:, None]
        return torch.zeros_like(self.columns).scatter(1, self.columns, real.long())

    def compact(self, states: torch.Tensor) -> torch.Tensor:
        """Move real tokens to the front: (B, P, ...) -> (B, P, ...), row b's tokens at 0..lengths[b]-1."""
        index = self.columns.to(states.device)
        return states[torch.arange(len(index), device=states.device)[:, None], index]
