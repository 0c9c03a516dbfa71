"""How far each row of a batch has got, and where it stops: the host's view, round by round."""

from __future__ import annotations

from typing import Protocol

import torch

from .text_in_step import InStep
from .text_outputs import StepOutputs
from .text_stopping import StoppingRules


class ShownText(Protocol):
    """What criteria are asked about: see `Text`."""

    rows: list[int]
    ids: torch.Tensor

    def first_columns(self, generated: int) -> torch.Tensor: ...

    def pad_behind(self, row: int, generated: int) -> None: ...


class RowStops:
    """
    Args:
        rules: when to stop.
        batch_size, prompt_width: of the prompts (B, P).
        is_read: whether processors read the text. They must not see what plain generate() would not write.
        scores: the processed scores of all steps, for criteria that look at them.
        in_step: whether all rows must advance together.

    Attributes:
        generated: new tokens of each row.
        stopped_at: how many a row had when it stopped; `None` while it goes on.
        end: new tokens of the result, once that is known.
    """

    def __init__(
        self,
        rules: StoppingRules,
        batch_size: int,
        prompt_width: int,
        is_read: bool = False,
        scores: StepOutputs | None = None,
        in_step: InStep | None = None,
    ):
        self.rules, self.is_read, self.scores = rules, is_read, scores
        self.in_step = InStep(batch_size) if in_step is None else in_step
        self.max_new_tokens = rules.max_length - prompt_width
        self.generated = [0] * batch_size
        self.stopped_at: list[int | None] = [None] * batch_size
        self.end: int | None = None
        self.answers: dict[tuple[int, int], bool] = {}  # (row, length): do other criteria stop it there?

    @property
    def limit(self) -> int:
        """New tokens after which no row goes on."""
        return self.max_new_tokens if self.end is None else self.end

    def limit_of(self, row: int) -> int:
        """New tokens after which this row does not go on yet.

        Where plain generate() does not pad a row that has stopped, it writes into it for as long as other rows run,
        which is not known further than one token ahead. What it would not write, processors must not see.
        """
        if not self.is_read or self.rules.pads or self.stopped_at[row] is None or self.end is not None:
            return self.limit
        running = (n for n, at in zip(self.generated, self.stopped_at, strict=True) if at is None)
        return max(running) + 1

    @property
    def tokens_per_row(self) -> list[int]:
        """New tokens of each row of a complete text, padding after its end left out."""
        assert self.end is not None
        if self.rules.pads:
            return [self.end if at is None else min(at, self.end) for at in self.stopped_at]
        return [self.end] * len(self.generated)

    def going_on(self, text: ShownText, places: list[int], ahead: int) -> list[int]:
        """Those of `places` whose text, with what was written `ahead`, no stop string or custom criterion ends."""
        if not self.rules.others:
            return places
        rows = {place: text.rows[place] for place in places}
        for length in sorted({self.generated[row] for row in rows.values()}):
            here = [row for row in rows.values() if self.generated[row] == length and self.stopped_at[row] is None]
            self._ask(text, here, length + ahead + 1)
        return [
            place
            for place, row in rows.items()
            if self.stopped_at[row] is not None or not self.answers[row, self.generated[row] + ahead + 1]
        ]

    def close_round(self, text: ShownText, added: list[int], ended: list[int]) -> None:
        """Take note of what one round added to each carried row of `text`, and whether an EOS ended it. A row that
        another criterion ends before that is cut."""
        before = list(self.generated)
        for row, count, end in zip(text.rows, added, ended, strict=True):
            self.generated[row] += count
            if self.stopped_at[row] is None and (end or self.generated[row] == self.max_new_tokens):
                self.stopped_at[row] = self.generated[row]
        if self.rules.others:
            self._ask_about_new_tokens(text, before)
            self.answers.clear()
        if (self.end is None or not self.rules.pads) and self.rules.time_is_up(text.ids):
            # Rows that were cut by the clock end at the same column, as plain generate()'s do.
            cut = [
                length
                for length, at in zip(self.generated, self.stopped_at, strict=True)
                if at is None or not self.rules.pads
            ]
            self.end = min(cut, default=max(self.generated))
            self.stopped_at = [self.end if at is None else at for at in self.stopped_at]
        elif None not in self.stopped_at:
            self.end = max(at for at in self.stopped_at if at is not None)

    def _ask(self, text: ShownText, rows: list[int], length: int) -> None:
        """Note in `answers` whether stop strings and custom criteria stop rows at `length` new tokens."""
        if all((row, length) in self.answers for row in rows):
            return
        scores = None if self.scores is None else self.scores.first(length)
        is_done = self.rules.others_stop(text.first_columns(length), scores, self.in_step)
        self.answers.update({(row, length): is_done[row] for row in rows})

    def _ask_about_new_tokens(self, text: ShownText, before: list[int]) -> None:
        """Ask stop strings and custom criteria about every new token, shortest text first."""
        lengths = {n for old, new in zip(before, self.generated, strict=True) for n in range(old + 1, new + 1)}
        for length in sorted(lengths):
            rows = []
            for row in text.rows:
                stopped_at = self.stopped_at[row]
                if before[row] < length <= self.generated[row] and (stopped_at is None or stopped_at > length):
                    rows.append(row)
            if not rows:
                continue
            self._ask(text, rows, length)
            for row in rows:
                if self.answers[row, length]:
                    self.stopped_at[row] = length
                    if self.rules.pads or self.is_read:
                        self.generated[row] = length
                        text.pad_behind(row, length)
