"""What the decode loop asks of a drafter, and the drafter that drafts nothing.

A drafter is begun with the prompts, proposes, and is told what became of the proposal. The others are in files of their
own: `specformer_drafter`, `assistant_drafter`, `prompt_lookup_drafter`, `copying_drafter`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from .prompt import PromptLayout


class Drafter(Protocol):
    """As a context manager a drafter may watch the target's passes; whatever it attached is gone on exit."""

    max_draft_tokens: int
    default_num_assistant_tokens: int
    """How many to begin with where the caller names no number. 0: nothing is drafted then."""
    confidences: torch.Tensor | None
    """Of the last proposal, how likely each token is accepted once those in front of it are, (R, k). A drafter that
    cannot tell has `None`, or no such attribute."""

    def __enter__(self): ...

    def __exit__(self, *exception) -> None: ...

    def begin(self, input_ids: torch.Tensor, layout: PromptLayout, first_tokens: torch.Tensor, max_length: int) -> None:
        """The target has read the prompts `input_ids` (B, P) and taken `first_tokens` (B, 1)."""

    def propose(self, num_tokens: int, choose: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Draft tokens (R, num_tokens), or fewer columns.

        `choose(logits, ahead=0, token_ids=None)` turns logits (R, n, C) for the n positions from `ahead` on into tokens
        (R, n). `token_ids`, (C,) or (R, n, C), are the tokens that the logits are of, each once; `None` means the
        vocabulary in its order. A drafter calls it for all of its tokens in order, or for none where it has no logits.
        """

    def update(self, tokens: torch.Tensor, counts: torch.Tensor, longest: int) -> None:
        """The target has read the last token and the drafts, and row r's text goes on with tokens[r, : counts[r]].

        `tokens` is (R, q), with q = 1 where nothing was proposed; `longest` is the number of tokens of the longest row
        that the target has read. Rows with count 0 have finished, or wait for others.
        """

    def select_rows(self, index: torch.Tensor, longest: int) -> None:
        """Only the rows of `index` (R',) go on; `longest` as in `update`."""


class NoDrafter:
    """Plain decoding through the same loop."""

    max_draft_tokens = default_num_assistant_tokens = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def begin(self, input_ids, layout, first_tokens, max_length) -> None:
        pass

    def propose(self, num_tokens, choose) -> torch.Tensor:
        raise ValueError(f"{num_tokens} draft tokens were asked for, but there is no drafter.")

    def update(self, tokens, counts, longest) -> None:
        pass

    def select_rows(self, index, longest) -> None:
        pass
