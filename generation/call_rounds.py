"""What a call tells `on_round` while it runs: round by round and row by row, who drafted what and what came of it.

    def on_round(round):
        for row in round.rows:
            print(row.row, row.source, row.drafted, row.accepted, row.from_target)

    specformer.generate(target, drafter, **inputs, on_round=on_round)

The tokens of all rounds, put together, are the text: `text[row] += tokens`, cut to `lengths[row]` in the end.

R rows that a pass carries, B rows of the batch, k drafted tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .accept_noise import default_generator
from .accept_rules import AcceptanceRule
from .argument import name_of
from .call_statistics import GenerationStatistics
from .drafter import Drafter
from .proposal import NO_TOKEN
from .text import Text, to_host


@dataclass(frozen=True)
class RowRound:
    """What a round made of one row.

    Attributes:
        row: of the batch, from 0; with `num_return_sequences` of the expanded one.
        source: who drafted: "network" (a network that reads the target's hidden states), "assistant" (a causal LM),
            "copy" (the row's own text), "drafter" (a class of the caller's, unless its `sources` says something else);
            `None` where nothing was drafted.
        drafted: token ids that the target verified; of a tree those that it took first.
        accepted: how many of them the text goes on with, from the first one on. Those after it were wrong, or stood
            behind the end of the text, or beside it in a tree.
        tokens: token ids that the text goes on with: the accepted ones, and the target's own after them, unless the
            text ended before it.
        finished: whether the row's text is complete.
    """

    row: int
    source: str | None
    drafted: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]
    finished: bool

    @property
    def from_target(self) -> int | None:
        """The token that the target wrote by itself; `None` where the text ended with a draft."""
        return self.tokens[self.accepted] if self.accepted < len(self.tokens) else None


@dataclass(frozen=True)
class Round:
    """One pass of the target, and what it gave.

    Attributes:
        number: 0 is the pass over the prompts, which verifies nothing.
        rows: what came of each row that still ran, in the order of the batch. Rows that have finished are left out.
        lengths: tokens that each of all B rows has so far. After the last round these can be fewer than came: where
            `max_time` ends a batch, or nothing pads its rows, plain `generate()` cuts all of them at one column.
        done: whether this was the last one.
    """

    number: int
    rows: tuple[RowRound, ...]
    lengths: tuple[int, ...]
    done: bool


def check_on_round(on_round) -> None:
    """
    Raises:
        ValueError: what is no function.
    """
    if on_round is not None and not callable(on_round):
        raise ValueError(
            f"on_round is a {name_of(on_round)}; expected a function that takes one argument, a specformer.Round."
        )


class Rounds:
    """Calls `on_round`, if there is one, with what can be read and not changed. Only then are tokens brought to the
    host, in one transfer a round.

    An exception of `on_round` ends the call, as a streamer's does. What it draws from torch's generator is not missing
    from a text that depends on it; its time is booked by itself, and is nothing to "auto".
    """

    def __init__(
        self,
        on_round: Callable[[Round], object] | None,
        statistics: GenerationStatistics,
        drafter: Drafter,
        text: Text,
        rule: AcceptanceRule,
    ):
        self.on_round, self.statistics, self.text, self.rule = on_round, statistics, text, rule
        self.drafter = drafter
        self.sources = getattr(drafter, "sources", Drafter.sources)  # of another copy of this code it may have none
        self.number = 0
        self.lengths = [0] * text.batch_size

    def report(
        self,
        tokens: torch.Tensor,
        drafts: torch.Tensor,
        drafted: list[int],
        outcome: list[tuple[int, int]],
        sources: torch.Tensor | None = None,
        path: torch.Tensor | None = None,
    ) -> None:
        """A round is over: the target's `tokens` (R, k + 1) for `drafts` (R, k), and what `Text.append` says of it.
        `sources` as in `Proposal`. Of trees also the `path` (R, depth + 1) that the target took through the block."""
        if self.on_round is None:
            return
        text = self.text
        width, depth = drafts.shape[1], tokens.shape[1]
        which = drafts.new_zeros(len(drafts)) if sources is None else sources.to(drafts)
        which = which[:, None].expand(-1, width) if which.ndim == 1 else which[:, :width]
        chain = torch.arange(depth, device=tokens.device).expand_as(tokens)
        told = torch.cat([tokens, chain if path is None else path, drafts, which], dim=1)
        rows = []
        for place, numbers in enumerate(to_host(told)):
            row, (accepted, added) = text.rows[place], outcome[place]
            drafts_of_row, sources_of_row = numbers[2 * depth : 2 * depth + width], numbers[2 * depth + width :]
            taken = [at - 1 for at in numbers[depth + 1 : depth + 1 + accepted]]
            verified = range(drafted[place]) if path is None else range(width)
            order = [*taken, *(at for at in verified if at not in taken and drafts_of_row[at] != NO_TOKEN)]
            if added == 0:
                continue  # stopped earlier, and only carried along
            self.lengths[row] += added
            rows.append(
                RowRound(
                    row,
                    self._name(sources_of_row[order[0]]) if order else None,
                    tuple(drafts_of_row[at] for at in order),
                    min(accepted, added),
                    tuple(numbers[:added]),
                    text.finished[row] or text.has_ended(row),
                )
            )
        if text.done:
            self.lengths = [min(pair) for pair in zip(self.lengths, text.stops.tokens_per_row, strict=True)]
        self._tell(Round(self.number, tuple(rows), tuple(self.lengths), text.done))
        self.number += 1
        self.statistics.lap("on_round")

    def _name(self, source: int) -> str:
        if not 0 <= source < len(self.sources):
            raise ValueError(
                f"The drafter {name_of(self.drafter)} proposed tokens of its source {source}, and has the "
                f"{len(self.sources)} sources {self.sources}."
            )
        return self.sources[source]

    def _tell(self, told: Round) -> None:
        assert self.on_round is not None
        if not self.rule.text_depends_on_drafts:
            self.on_round(told)
            return
        generator = default_generator(self.text.ids.device)  # of which the next tokens are drawn
        state = generator.get_state()
        try:
            self.on_round(told)
        finally:
            generator.set_state(state)
