"""How much of a round's drafts to verify, where the drafter knows how likely each is to be accepted ("auto")."""

from __future__ import annotations

from itertools import accumulate
from math import exp, isfinite
from time import perf_counter

import torch

from .auto_draft_length import AutoDraftLength


class ConfidentDraftLength(AutoDraftLength):
    """As long as the drafter tells nothing, what `AutoDraftLength` does. One that tells has drafted all slots by then,
    and a round verifies as many of them as are worth their time.

    Rows that get s tokens a second elsewhere lose s tokens with every second of a pass: of v drafts, the v of the
    highest expected tokens - s * seconds is verified, 0 included. s is the speed of doing so, or that of plain decoding
    if this is higher; then nothing is drafted at all. Both follow from the confidences of the last rounds.

    A cut looks at all of a round's drafts, so this is for rules whose text does not depend on the drafts.
    """

    FIRST_TRUST = 32.0  # how many drafts it is worth that confidences are taken to be right

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.speed = 0.0  # tokens per second of a row
        self.expected: list[float] | None = None  # this round's, of 0, 1, ... verified drafts
        self.seconds: list[float] | None = None  # of a round that verifies 0, 1, ..., once something was expected
        self.tried = 0  # how many drafts this round verifies if it is a trial

    def next(self, num_rows: int) -> int:
        length = super().next(num_rows)
        if not (self.is_trial and length and self.experience.expectations):
            return length
        self.tried = length
        return self.most

    def keep(self, drafts: torch.Tensor, confidences: torch.Tensor | None, idle: torch.Tensor, started: float) -> int:
        width = drafts.shape[1]
        if confidences is None or not width:
            return width
        counted = ~idle.to(confidences.device)[:, None]  # (R, 1)
        chances = (confidences.cumprod(dim=1) * counted).sum(dim=0) / counted.sum()
        self.expected = list(accumulate(chances.tolist(), initial=1.0))
        drafting = perf_counter() - started
        if not isfinite(self.expected[-1]):  # no row counts, or the drafter's numbers are broken
            return 0
        self.experience.expectations.append((self.expected, drafting / exp(self.experience.times[self.regime].pace)))
        if self.seconds is None:
            return width
        if self.is_trial:
            return min(self.tried, width)
        return self._worthy(self.expected, drafting, self.seconds[: width + 1], self.speed)

    def best(self, speeds: list[float]) -> int:
        # which length is verified follows from the confidences: what remains is whether to draft at all
        if not self.experience.expectations:
            return super().best(speeds)
        return self.most if speeds[self.most] > speeds[0] else 0

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
        pace = exp(self.experience.times[self.regime].pace)
        rounds = [(expected, pace * drafting) for expected, drafting in list(self.experience.expectations)]
        if not rounds:
            return super().speeds(seconds)
        self.seconds, plain = seconds, 1 / max(seconds[0], 1e-9)
        self.speed = plain
        for _ in range(2):  # what is worth its time depends on the speed, and the speed on what is verified
            tokens = spent = 0.0
            for expected, drafting in rounds:
                length = self._worthy(expected, drafting, seconds[: len(expected)], self.speed)
                tokens += self._tokens(expected)[length]
                spent += seconds[length] + (0.0 if length else drafting)
            drafted = tokens / max(spent, 1e-9)
            self.speed = max(drafted, plain)
        # the lengths between are those of a turn, which verifies so many whatever is expected of them
        mean = [
            sum(expected[min(length, len(expected) - 1)] for expected, _ in rounds) / len(rounds)
            for length in range(self.most)
        ]
        return [*(tokens / max(time, 1e-9) for tokens, time in zip(self._tokens(mean), seconds, strict=False)), drafted]

    def _tokens(self, expected: list[float]) -> list[float]:
        """Expected tokens, as far as such expectations came true."""
        known = self.experience
        trust = (known.accepted + self.FIRST_TRUST) / (known.predicted + self.FIRST_TRUST)
        return [1 + trust * (tokens - 1) for tokens in expected]

    def _worthy(self, expected: list[float], drafting: float, seconds: list[float], speed: float) -> int:
        """How many drafts to verify once `drafting` seconds have been spent."""
        worth = [tokens - speed * time for tokens, time in zip(self._tokens(expected), seconds, strict=True)]
        worth[0] -= speed * drafting
        return max(range(len(worth)), key=worth.__getitem__)
