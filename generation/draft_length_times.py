"""How long something takes, by rows and by tokens that each of them drafts: measured, or told from what was."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from threading import Lock

Shape = tuple[int, int]
"""Rows, and tokens that each row drafts."""


class RoundTimes:
    """Seconds of every shape: known once it was timed twice, since the first time may be one that compiles. Others are
    told from a straight line over the tokens of a pass, through all that are known, and from how far the nearest of
    these is off it.

    A machine is now faster and now slower, and longer texts take longer whatever is drafted: `pace` follows that, and
    times are kept relative to it. So shapes that were timed at different moments can be compared.

    What a time is off is the pace's where its shape was timed a moment ago, and the shape's own where that is long ago.

    Attributes:
        shapes: how often each was timed, the mean of the logarithm of its seconds beside the pace, and the number of
            the time that was its last; in that order.
        pace: by how much everything takes longer than at the beginning, as a logarithm.
    """

    LEAST = 2
    REMEMBERED = 128  # shapes, the last ones
    MOST_OFF = 0.25  # how far from what is known a time counts: what else the machine does makes some much longer
    WELL_KNOWN = 8  # times that a shape was timed, from which on a time that is off may be the machine's doing
    FOLLOWED = 0.1  # how much of that is followed, by the pace and by the shape together
    OWN = 0.01  # how much of it by the shape, for every time of any shape since its last one
    MOST_OWN = 0.3

    def __init__(self):
        self.shapes: dict[Shape, tuple[int, float, int]] = {}
        self.pace, self.times = 0.0, 0
        self._lock = Lock()  # threads that generate with the same models share their experience

    def count(self, num_rows: int, drafted: int) -> int:
        return self.shapes.get((num_rows, drafted), (0,))[0]

    def known(self) -> dict[Shape, float]:
        """Seconds of the shapes that are known, at the present pace."""
        with self._lock:
            return {
                shape: exp(mean + self.pace) for shape, (count, mean, _) in self.shapes.items() if count >= self.LEAST
            }

    def add(self, num_rows: int, drafted: int, seconds: float) -> None:
        with self._lock:
            self.times += 1
            relative = log(max(seconds, 1e-9)) - self.pace
            count, mean, last = self.shapes.pop((num_rows, drafted), (0, relative, self.times))
            off = min(relative - mean, self.MOST_OFF)
            if count < self.LEAST:
                mean = min(mean, relative)
            elif count < self.WELL_KNOWN:
                mean += 2 / (count + 2) * off
            else:
                off, own = max(off, -self.MOST_OFF), min(self.OWN * (self.times - last), self.MOST_OWN)
                mean += own * off
                self.pace += max(self.FOLLOWED - own, 0.0) * off
            self.shapes[num_rows, drafted] = count + 1, mean, self.times  # behind all others
            if len(self.shapes) > self.REMEMBERED:
                del self.shapes[next(iter(self.shapes))]

    def estimate(self, num_rows: int, most: int) -> list[float]:
        """Seconds of `num_rows` rows that draft 0, 1, ..., `most`, at the present pace. Something must be known."""
        known = self.known()
        line = straight_line([(rows * (drafted + 1), seconds) for (rows, drafted), seconds in known.items()])
        near = min((rows for rows, _ in known), key=lambda rows: abs(log(rows / num_rows)))
        off = {
            drafted: seconds / line(rows * (drafted + 1)) for (rows, drafted), seconds in known.items() if rows == near
        }
        nearest = [min(off, key=lambda known: abs(known - drafted)) for drafted in range(most + 1)]
        times = [off[length] * line(num_rows * (drafted + 1)) for drafted, length in enumerate(nearest)]
        return [max(times[0], seconds) for seconds in times]  # drafting makes nothing shorter: such a time was noise


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
