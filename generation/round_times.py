"""How long a round takes, by its rows and by how many tokens each of them drafts: measured, or told from others."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from itertools import pairwise
from statistics import median_low

Shape = tuple[int, int]
"""Rows of a round, and tokens that each row drafts."""


class RoundTimes:
    """Seconds of the last few rounds of every shape.

    A shape is known once it was timed twice: the first round of a new shape may be one that compiles. Others are told
    from a straight line over the tokens of a pass, through all that are known; where shapes of as many rows are, by how
    far these are off it.
    """

    KEPT = 5
    LEAST = 2
    REMEMBERED = 128  # shapes, the last ones

    def __init__(self):
        self.samples: dict[Shape, deque[float]] = defaultdict(lambda: deque(maxlen=self.KEPT))
        self.known: dict[Shape, float] = {}  # medians, the newest last

    def count(self, num_rows: int, drafted: int) -> int:
        return len(self.samples.get((num_rows, drafted), ()))

    def knows(self, drafting: bool) -> bool:
        """Whether rounds that draft something are known, or such that draft nothing, of any number of rows."""
        return any((drafted > 0) is drafting for _, drafted in list(self.known))

    def add(self, num_rows: int, drafted: int, seconds: float) -> None:
        samples = self.samples[num_rows, drafted]
        samples.append(seconds)
        if len(samples) >= self.LEAST:
            self.known.pop((num_rows, drafted), None)
            self.known[num_rows, drafted] = median_low(list(samples))
            for shape in list(self.known)[: -self.REMEMBERED]:
                self.known.pop(shape, None)

    def estimate(self, num_rows: int, most: int) -> list[float]:
        """Seconds of a round of `num_rows` rows that draft 0, 1, ..., `most`. Something must be known."""
        known = list(self.known.items())  # not by iterating over the dict: another thread may add to it
        line = straight_line([(rows * (drafted + 1), seconds) for (rows, drafted), seconds in known])
        expected = [line(num_rows * (drafted + 1)) for drafted in range(most + 1)]
        off = sorted(
            (drafted, seconds / line(rows * (drafted + 1))) for (rows, drafted), seconds in known if rows == num_rows
        )
        return [seconds * interpolate(off or [(0, 1.0)], drafted) for drafted, seconds in enumerate(expected)]


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
