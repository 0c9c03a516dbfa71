"""How much of a round's drafts to verify, where the drafter knows how likely each is to be accepted ("auto")."""

from __future__ import annotations

from contextlib import suppress
from itertools import accumulate
from time import perf_counter

import torch

from .draft_length_auto import AutoDraftLength


class ConfidentDraftLength(AutoDraftLength):
    """As long as the drafter tells nothing, what `AutoDraftLength` does. One that tells has drafted all slots by then,
    and a round verifies as many of them as are worth their time.

    Rows that get s tokens a second elsewhere lose s tokens with every second of a pass: of v drafts, the v of the
    highest expected tokens - s * seconds is verified, 0 included. s is the speed of doing so, or that of plain decoding
    if this is higher; then nothing is drafted at all. Both follow from the confidences of the last rounds. In several
    rows drafts count as what they are worth there.

    A cut looks at all of a round's drafts, so this is for rules whose text does not depend on the drafts.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.speed = 0.0  # tokens per second of a row
        self.drafted_speed = 0.0  # the same where everything is drafted, and verified as far as it is worth it
        self.expected: list[float] | None = None  # this round's, of 0, 1, ... verified drafts
        self.seconds: list[float] | None = None  # of a round that verifies 0, 1, ..., as far as is known
        self.tried = 0  # how many drafts this round verifies if it is a trial

    def next(self, num_rows: int) -> int:
        self.tried = length = super().next(num_rows)
        return self.most if self.is_trial and length and self.experience.expectations else length

    def keep(self, drafts: torch.Tensor, confidences: torch.Tensor | None, idle: torch.Tensor, started: float) -> int:
        width, known = super().keep(drafts, confidences, idle, started), self.experience
        tried = min(self.tried, width) if self.is_trial else None
        if confidences is None or not width:
            if width:
                with suppress(IndexError):
                    known.expectations.popleft()  # it may have told before, which counts less and less
            return width if tried is None else tried
        counted = ~idle.to(confidences.device)[:, None]  # (R, 1)
        # of a drafter whose numbers are broken nothing is expected
        chances = confidences.nan_to_num(0.0).cumprod(dim=1).masked_fill(~counted, 0.0)
        # the one wait of a round that the drafter's confidences cost
        *chances, rows = torch.cat([chances, counted.to(chances)], dim=1).sum(dim=0).tolist()
        if not rows:
            self.is_in_vain = True
            return 0
        self.expected = list(accumulate((chance / rows for chance in chances), initial=1.0))
        if self.seconds is None:
            return width
        drafting = perf_counter() - started
        known.expectations.append((self.expected, drafting / max(self.seconds[0], 1e-9)))
        if tried is not None:
            return tried
        return self._worthy(self.expected, drafting, self.seconds[: width + 1], self.speed)

    def best(self, speeds: list[float]) -> tuple[int, float]:
        # which length is verified follows from the confidences: what remains is whether to draft at all
        if not self.experience.expectations:
            return super().best(speeds)
        return (self.most, self.drafted_speed) if self.drafted_speed > speeds[0] else (0, speeds[0])

    def record(self, num_rows, drafted, outcome, seconds) -> None:
        expected, self.expected = self.expected, None
        if expected is not None and drafted:
            verified = [accepted for accepted, added in outcome if added]
            fading, known = self.FADING ** len(verified), self.experience
            known.predicted = fading * known.predicted + len(verified) * (expected[drafted] - 1)
            known.accepted = fading * known.accepted + sum(verified)
        if expected is not None and not drafted:  # it took the time of drafting, and is no plain round
            self.is_behind = False
            return
        super().record(num_rows, drafted, outcome, seconds)

    def speeds(self, seconds: list[float]) -> list[float]:
        self.seconds, plain = seconds, 1 / max(seconds[0], 1e-9)
        # another thread may add to them
        rounds = [(expected, drafting * seconds[0]) for expected, drafting in list(self.experience.expectations)]
        if not rounds:
            return super().speeds(seconds)
        self.speed = plain
        for _ in range(2):  # what is worth its time depends on the speed, and the speed on what is verified
            tokens = spent = 0.0
            for expected, drafting in rounds:
                length = self._worthy(expected, drafting, seconds[: len(expected)], self.speed)
                tokens += self._tokens(expected)[length]
                spent += seconds[length] + (0.0 if length else drafting)
            self.drafted_speed = tokens / max(spent, 1e-9)
            self.speed = max(self.drafted_speed, plain)
        # of lengths that are verified whatever is expected of them; a round near the end of a text drafts fewer
        mean = [
            sum(expected[min(length, len(expected) - 1)] for expected, _ in rounds) / len(rounds)
            for length in range(self.most + 1)
        ]
        return [tokens / max(time, 1e-9) for tokens, time in zip(self._tokens(mean), seconds, strict=True)]

    def _tokens(self, expected: list[float]) -> list[float]:
        """Expected tokens, as far as such expectations came true, and as they shorten the batch."""
        trust = self.experience.accepted / max(self.experience.predicted, 1e-9)
        return [1 + self.worth * trust * (tokens - 1) for tokens in expected]

    def _worthy(self, expected: list[float], drafting: float, seconds: list[float], speed: float) -> int:
        """How many drafts to verify once `drafting` seconds have been spent."""
        worth = [tokens - speed * time for tokens, time in zip(self._tokens(expected), seconds, strict=True)]
        worth[0] -= speed * drafting
        return max(range(len(worth)), key=worth.__getitem__)
