"""What is passed as `assistant_model` where drafting takes more than one model: settings, parts and what is remembered,
of which each call makes a drafter of its own.

One object serves any number of calls and threads. What lives on is in it, or in an object that was passed to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch

from .drafter import Drafter
from .prompt import PromptLayout


@dataclass(frozen=True)
class Parts:
    """What a call has for the systems in it.

    Attributes:
        drafter: from anything that is an `assistant_model`, and the model that it drafts for, to its drafter.
        text_depends_on_drafts: whether the acceptance rule is one under which nothing about a round may be decided from
            what was drafted in it ("rejection", but of trees, whose tokens are not sampled).
    """

    drafter: Callable[[object, object], Drafter]
    text_depends_on_drafts: bool


class DraftingSystem:
    """A way to draft."""

    def drafter_for(self, target, parts: Parts) -> Drafter:
        """The drafter of one call.

        Raises:
            ValueError: it does not fit `target`; the message says what was expected.
        """
        raise NotImplementedError

    def finished(self, texts: list[list[int]]) -> None:
        """A call has written these texts, prompts included. Called once it can no longer fail, in
        each of the processes that share the target."""


def is_system(thing) -> TypeGuard[DraftingSystem]:
    """Whether `thing` is one, whatever copy of this code its class is from."""
    return all(callable(getattr(thing, name, None)) for name in ("drafter_for", "finished"))


def finished_texts(sequences: torch.Tensor, layout: PromptLayout, counts: list[int]) -> list[list[int]]:
    """Rows of `sequences` (B, P + T) without padding: prompts, and the first `counts` of their new tokens."""
    width = layout.columns.shape[1]
    prompts, new = layout.compact(sequences[:, :width]).tolist(), sequences[:, width:].tolist()
    return [
        prompt[:length] + tokens[:count]
        for prompt, length, tokens, count in zip(prompts, layout.host_lengths, new, counts, strict=True)
    ]
