"""The contract between the decode loop and whatever drafts.

A drafter is begun with the prompts, proposes tokens each round, and is told what the target made of them. Its text may
be as wrong as it likes: what the target does not take is not written. A drafter of one's own is a subclass:

    class RepeatLast(Drafter):
        "Drafts each row's newest token again."

        def begin(self, prompts):
            self.newest = prompts.first_tokens

        def propose(self, num_tokens, choose):
            return Proposal(self.newest.expand(-1, num_tokens))

        def update(self, verified):
            self.newest = verified.newest(self.newest)

        def select_rows(self, index, longest):
            self.newest = self.newest[index]

    specformer.generate(target, RepeatLast(), **inputs)

The drafters that are here are the other files whose names begin with `drafter_`.

Shapes: B rows of the batch, R rows that passes still carry, P columns of the prompts, q positions of a pass, S layers
whose states are read, d channels, V entries of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from .argument import name_of
from .draft_length import DraftLength
from .prompt import PromptLayout
from .proposal import Proposal

STEPS = ("begin", "propose", "update", "select_rows")


@dataclass
class Prompts:
    """What a drafter begins with: the target has read the prompts and taken a token after each.

    Attributes:
        input_ids: prompts with their padding, (B, P).
        layout: where in them the tokens are.
        first_tokens: the token after each prompt, (B, 1).
        max_length: tokens, prompt and padding included, at which generate() stops.
        hidden_states: of the layers that the drafter reads, (N, width, S, d) for each of `layout.groups`.
    """

    input_ids: torch.Tensor
    layout: PromptLayout
    first_tokens: torch.Tensor
    max_length: int
    hidden_states: list[torch.Tensor] | None = None


@dataclass
class Verified:
    """What the target made of a round: it has read each row's newest token and drafts.

    Attributes:
        tokens: row r's text goes on with tokens[r, : counts[r]]; (R, q), q = 1 where nothing was drafted. Those after
            may be NO_TOKEN.
        counts: (R,), 0 in rows that have finished or wait for others.
        longest: tokens of the longest row that the target has read.
        hidden_states: of the layers that the drafter reads, at the positions that were read, (R, q, S, d).
        logits: the target's, for a drafter that reads them, (R, q, V).
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    longest: int
    hidden_states: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def newest(self, before: torch.Tensor) -> torch.Tensor:
        """The newest token of each row, (R, 1): that of `before` (R, 1) where there is no other."""
        counts, tokens = self.counts.to(before.device), self.tokens.to(before.device)
        last = tokens.gather(1, (counts[:, None] - 1).clamp(min=0))
        return torch.where(counts[:, None] > 0, last, before)


class Drafter:
    """One batch's drafter. Around its use it is entered as a context manager; what it attached is gone on exit.

    Attributes:
        max_draft_tokens: most tokens that it can propose.
        default_num_assistant_tokens: how many to begin with where the caller names no number. 0: nothing is drafted
            then.
        hidden_state_layers: which states of the target it reads, as `SpecFormerConfig.target_layer_ids` counts them;
            `None`: none.
        reads_logits: whether `update` is given the target's logits.
        proposes_known_tokens: whether all tokens that it proposes are the target's for certain. Those of others are
            checked, for which the host waits for a GPU.
        proposes_trees: whether it has `propose_tree`, which is asked where the caller gives a `tree_size`.
        can_rewind: whether it has `mark` and `rewind`.
        own_draft_length: makes the `DraftLength` of a call that names no number; `None`: what gives the most expected
            tokens per second.
        sources: what `on_round` is told of who drafted; several where `Proposal.sources` says which.
    """

    max_draft_tokens: int = 64
    default_num_assistant_tokens: int = 4
    hidden_state_layers: Sequence[int] | None = None
    reads_logits: bool = False
    proposes_known_tokens: bool = False
    proposes_trees: bool = False
    can_rewind: bool = False
    own_draft_length: Callable[[], DraftLength] | None = None
    sources: tuple[str, ...] = ("drafter",)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for step in STEPS:
            if step in vars(cls):
                setattr(cls, step, blamed(vars(cls)[step], step))

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def begin(self, prompts: Prompts) -> None:
        """A batch starts. Called once, before the other methods."""

    def propose(self, num_tokens: int, choose: Callable[..., torch.Tensor]) -> Proposal:
        """Draft up to `num_tokens` for each row.

        `choose(logits, ahead=0, token_ids=None)` turns logits (R, n, C) into tokens (R, n), as the call samples, for
        the n positions from `ahead` on: one number, or one of each row (R,). `token_ids`, (C,) or (R, n, C), are the
        tokens that the logits are of, each once; `None` means the vocabulary in its order. A drafter calls it for all
        of its tokens in order, or for none where it has no logits.
        """
        raise NotImplementedError(f"{type(self).__name__} has no propose(num_tokens, choose).")

    def propose_tree(self, num_tokens: int, tree_size: int, chances: Callable[..., torch.Tensor]) -> Proposal:
        """Draft up to `tree_size` tokens for each row as a tree that is no deeper than `num_tokens`.

        `chances(logits, ahead, token_ids, confidence=None)` turns logits (R, w, C) of the tokens `token_ids` (R, w, C),
        after w beginnings that are `ahead` drafts long each, into logarithms of how likely the call takes each. A
        drafter that knows how likely the best of them is the target's best says so: `confidence` (R, w).
        """
        raise NotImplementedError(f"{type(self).__name__} has no propose_tree(num_tokens, tree_size, chances).")

    def update(self, verified: Verified) -> None:
        """A round is over. Also called after rounds for which nothing was asked."""

    def select_rows(self, index: torch.Tensor, longest: int) -> None:
        """Only the rows of `index` (R',) go on; `longest` as in `Verified`."""

    def mark(self):
        """What `rewind` needs to come back to here: a model that is asked in between may take tokens that the target
        does not take (`drafter_hierarchy`)."""
        raise NotImplementedError(f"{type(self).__name__} cannot go back in its text.")

    def rewind(self, mark) -> None:
        """Be again as when `mark` was taken, of the same rows. Texts went on since then, and may go on otherwise."""
        raise NotImplementedError(f"{type(self).__name__} cannot go back in its text.")


class NoDrafter(Drafter):
    """Plain decoding through the same loop."""

    max_draft_tokens = default_num_assistant_tokens = 0
    proposes_known_tokens = can_rewind = True

    def mark(self):
        return None

    def rewind(self, mark) -> None:
        pass


def is_drafter(thing) -> TypeGuard[Drafter]:
    """Whether `thing` has a drafter's methods, whatever copy of this code its class was derived from."""
    return all(callable(getattr(thing, name, None)) for name in STEPS)


def blamed(method: Callable, step: str) -> Callable:
    """`method`, a drafter's `step`, whose errors say so."""

    @functools.wraps(method)
    def named(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            note = f"Raised by the drafter {name_of(self)}, in {step}()."
            if note not in getattr(error, "__notes__", ()):  # of the class that this one is derived from
                error.add_note(note)
            raise

    return named
