"""How many tokens to draft when the caller names no number: what pays, measured while it runs ("auto")."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from weakref import WeakKeyDictionary

from .draft_length import DraftLength
from .round_times import RoundTimes


@dataclass
class Pace:
    """When lengths other than the best known one have their turns.

    Attributes:
        best: the best length known.
        waited: rounds since the last turn.
        patience: rounds between two turns; it grows as long as the best length stays the best.
        turns: how many there were.
    """

    best: int
    waited: int = 0
    patience: int = 0
    turns: int = 0


class Experience:
    """What is known of one way to draft for a model, from call to call.

    Attributes:
        times: `RoundTimes` by the regime, such as the device.
        rates: how likely slot j was accepted in the last call once the slots before it were; none at first.
        pace: of the last call's turns, which the next one keeps up.
        expectations: of the last rounds of a drafter that knows how likely its drafts are accepted: the tokens that it
            expected of verifying 0, 1, ... of them, and the seconds that drafting took.
        predicted, accepted: how many drafts it expected to be accepted of those verified, and how many were; fading.
    """

    REMEMBERED = 32

    def __init__(self):
        self.times: dict = defaultdict(RoundTimes)
        self.rates: list[float] = []
        self.pace: Pace | None = None
        self.expectations: deque[tuple[list[float], float]] = deque(maxlen=self.REMEMBERED)
        self.predicted = self.accepted = 0.0


class AutoDraftLength(DraftLength):
    """Each round, the length of the most expected tokens per second, 0 included: plain decoding where nothing pays.

    A round's time is that of the last ones of its kind, or told from others (`RoundTimes`). Acceptance of each slot is
    counted, and fades. Now and then another length has a turn: a time may have changed, and what is not drafted is not
    seen to be right again.

    Args:
        most: tokens that a round drafts at most.
        start: tokens to draft while nothing is known, from 1 on.
        experience: of earlier calls; this one adds to it.
        regime: what the time of a round depends on besides its rows and drafts.
    """

    TRIED = 8  # all lengths up to it have turns, others only beside the best: more rows are not always slower
    FIRST_PATIENCE, LAST_PATIENCE = 8, 128  # rounds between two turns of other lengths
    PATIENCE_OF_A_CALL = 64  # at its beginning, at most: its text may be of another kind
    FADING = 0.995  # weight of what was seen before, one row's drafts later
    LEAST_GAIN = 1.05  # tokens per second that drafting must promise, in units of plain decoding: rows end unevenly
    MOST_ASKED = 4  # rounds in which a drafter may draft nothing at first
    FIRST_RATE, FIRST_WEIGHT = 0.6, 4.0  # acceptance to begin with, and how many drafts experience is worth

    def __init__(self, most: int, start: int, experience: Experience, regime=()):
        super().__init__(most)
        self.start, self.experience, self.regime = min(start, most), experience, regime
        self.first_rates = list(experience.rates)
        self.drafted, self.accepted = [0.0] * most, [0.0] * most  # per slot, where the slots before it were accepted
        self.pace = experience.pace = experience.pace or Pace(self.start, patience=self.FIRST_PATIENCE)
        self.pace.patience = min(self.pace.patience, self.PATIENCE_OF_A_CALL)
        self.planned: list[int] = []
        self.asked = 0
        self.is_trial = True  # whether a round is there to learn of, and not the best known
        self.is_behind = False  # whether the drafter has yet to read what plain rounds added

    def rates(self) -> list[float]:
        """How likely each slot is accepted once the slots before it are."""
        rates, rate = [], self.FIRST_RATE
        for slot, (drafted, accepted) in enumerate(zip(self.drafted, self.accepted, strict=True)):
            # a slot that nothing is known of is taken to be like the one before it
            first = self.first_rates[slot] if slot < len(self.first_rates) else rate
            rate = (accepted + self.FIRST_WEIGHT * first) / (drafted + self.FIRST_WEIGHT)
            rates.append(rate)
        return rates

    def expected_tokens(self) -> list[float]:
        """Tokens that a round of 0, 1, ..., `most` drafts adds to a row."""
        return list(accumulate(accumulate([1.0, *self.rates()], mul)))

    def speeds(self, seconds: list[float]) -> list[float]:
        """Expected tokens per second of a row, of rounds of 0, 1, ..., `most` drafts that take `seconds`."""
        return [tokens / max(time, 1e-9) for tokens, time in zip(self.expected_tokens(), seconds, strict=True)]

    def next(self, num_rows: int) -> int:
        self.is_trial = True
        times = self.experience.times[self.regime]
        if not times.knows(drafting=True) and self.asked < self.MOST_ASKED:
            self.asked += 1
            return self.start
        if not times.knows(drafting=False):
            return 0
        if self.planned:
            return self.planned.pop()
        speeds = self.speeds(times.estimate(num_rows, self.most))
        speeds[0] *= self.LEAST_GAIN
        best = max(range(self.most + 1), key=speeds.__getitem__)
        pace = self.pace
        if best != pace.best:
            pace.best, pace.waited, pace.patience = best, 0, self.FIRST_PATIENCE
        pace.waited += 1
        if pace.waited <= pace.patience:
            self.is_trial = False
            return best
        pace.waited, pace.patience = 0, min(2 * pace.patience, self.LAST_PATIENCE)
        others = self.others(best)
        other = others[pace.turns % len(others)]
        pace.turns += 1
        # the first round behind plain ones catches up, and is not timed
        self.planned = [other] * (self.rounds_of_turn(num_rows, other) - 1 + (best == 0))
        return other

    def others(self, best: int) -> list[int]:
        """The lengths that have turns beside the best one."""
        lengths = (best + 1, best - 1, 0, *range(min(self.most, self.TRIED) + 1))
        return [length for length in dict.fromkeys(lengths) if 0 <= length <= self.most and length != best]

    def rounds_of_turn(self, num_rows: int, length: int) -> int:
        """As many as it takes to know its time."""
        times = self.experience.times[self.regime]
        return max(1, times.LEAST - times.count(num_rows, length))

    def record(self, num_rows: int, drafted: int, outcome: list[tuple[int, int]], seconds: float) -> None:
        if not (drafted and self.is_behind):
            self.experience.times[self.regime].add(num_rows, drafted, seconds)
        self.is_behind = drafted == 0
        if drafted == 0:
            return
        verified = [accepted for accepted, added in outcome if added]  # others stopped earlier and are carried along
        for counts in (self.drafted, self.accepted):
            counts[:] = [self.FADING ** len(verified) * count for count in counts]
        for accepted in verified:
            for slot in range(min(accepted + 1, drafted)):
                self.drafted[slot] += 1
                self.accepted[slot] += slot < accepted
        self.experience.rates = self.rates()


_experience: WeakKeyDictionary = WeakKeyDictionary()  # target -> what drafts for it -> in which way -> what is known


def experience_of(target, drafting, way: Hashable, make: type = Experience):
    """What earlier calls in this process know of `drafting`, a model, as the drafter of `target` in some `way`: what
    `make()` is at first."""
    ways = _experience.setdefault(target, WeakKeyDictionary()).setdefault(drafting, {})
    return ways.setdefault(way, make())
