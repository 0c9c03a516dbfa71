"""How long a round takes, by its rows and by how many tokens each of them drafts: measured, or told from others."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import exp, log

Shape = tuple[int, int]
"""Rows of a round, and tokens that each row drafts."""


class RoundTimes:
    """How many seconds rounds of every shape take, from the rounds so far.

    A shape is known once it was timed twice: the first round of a new shape may be one that compiles. Others are told
    from a straight line over the tokens of a pass, through all that are known; where shapes of as many rows are, by how
    far these are off it.

    A machine is now faster and now slower, and longer texts take longer whatever is drafted: `pace` follows that, and
    times are kept relative to it. So shapes that were timed at different moments can be compared.

    Attributes:
        counts: how often each shape was timed, the last one last.
        means: of the logarithm of its seconds, the pace subtracted.
        pace: by how much rounds take longer lately, as a logarithm.
    """

    LEAST = 2
    REMEMBERED = 128  # shapes, the last ones
    MOST_OFF = 0.25  # how much longer than known a round counts: what else the machine does makes some much longer
    NEWEST = 0.03  # weight of the last round of a shape that was timed often
    WELL_KNOWN = 5  # times, from which on what a round is off is rather the machine's pace than an error of the mean
    ADAPTING = 0.1  # how much of it the pace follows

    def __init__(self):
        self.counts: dict[Shape, int] = {}
        self.means: dict[Shape, float] = {}
        self.pace = 0.0

    def count(self, num_rows: int, drafted: int) -> int:
        return self.counts.get((num_rows, drafted), 0)

    def known(self) -> dict[Shape, float]:
        """Seconds of the shapes that are known, at the present pace."""
        counts = list(self.counts.items())  # not by iterating over the dict: another thread may add to it
        return {
            shape: exp(self.means[shape] + self.pace)
            for shape, count in counts
            if count >= self.LEAST and shape in self.means
        }

    def knows(self, drafting: bool) -> bool:
        """Whether rounds that draft something are known, or such that draft nothing, of any number of rows."""
        return any((drafted > 0) is drafting for _, drafted in self.known())

    def add(self, num_rows: int, drafted: int, seconds: float) -> None:
        shape, relative = (num_rows, drafted), log(max(seconds, 1e-9)) - self.pace
        count, mean = self.counts.pop(shape, 0), self.means.get(shape, relative)
        if count < self.LEAST:
            mean = min(mean, relative)
        else:
            off = min(relative - mean, self.MOST_OFF)
            mean += max(2 / (count + 2), self.NEWEST) * off
            if count >= self.WELL_KNOWN:
                self.pace += self.ADAPTING * max(off, -self.MOST_OFF)
        self.means[shape] = mean
        self.counts[shape] = count + 1
        for forgotten in list(self.counts)[: -self.REMEMBERED]:
            self.counts.pop(forgotten, None)
            self.means.pop(forgotten, None)

    def estimate(self, num_rows: int, most: int) -> list[float]:
        """Seconds of a round of `num_rows` rows that draft 0, 1, ..., `most`, at the present pace. Something must be
        known."""
        known = self.known().items()
        line = straight_line([(rows * (drafted + 1), seconds) for (rows, drafted), seconds in known])
        expected = [line(num_rows * (drafted + 1)) for drafted in range(most + 1)]
        off = sorted(
            (drafted, seconds / line(rows * (drafted + 1))) for (rows, drafted), seconds in known if rows == num_rows
        )
        times = [seconds * interpolate(off or [(0, 1.0)], drafted) for drafted, seconds in enumerate(expected)]
        return [max(times[0], seconds) for seconds in times]  # drafting makes no round shorter: such a time was noise


def straight_line(points: list[tuple[int, float]]) -> Callable[[int], float]:
    """The rising line through points (tokens, seconds) of the least relative errors, as a function."""
    # of (a + b * tokens) / seconds - 1, summed and squared
    inverse = [(1 / max(seconds, 1e-9), tokens / max(seconds, 1e-9)) for tokens, seconds in points]
    uu, uv, vv = sum(u * u for u, _ in inverse), sum(u * v for u, v in inverse), sum(v * v for _, v in inverse)
    u, v = sum(u for u, _ in inverse), sum(v for _, v in inverse)
    determinant = uu * vv - uv * uv
    base, slope = u / uu, 0.0  # what is left where the tokens do not differ, or more of them took less time
    if determinant > 1e-9 * uu * vv and uu * v > uv * u:
        base, slope = (vv * u - uv * v) / determinant, (uu * v - uv * u) / determinant
        if base < 0:
            base, slope = 0.0, v / vv
    return lambda tokens: base + slope * tokens


def interpolate(points: list[tuple[int, float]], place: int) -> float:
    """Straight lines between `points`, which are in order, and level outside."""
    for (left, before), (right, after) in pairwise(points):
        if left <= place <= right:
            return before + (after - before) * (place - left) / (right - left)
    return points[0][1] if place < points[0][0] else points[-1][1]
