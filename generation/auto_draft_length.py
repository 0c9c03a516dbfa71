"""How many tokens to draft when the caller names no number: what pays, measured while it runs ("auto")."""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median_low
from weakref import WeakKeyDictionary

from .draft_length import DraftLength


class RoundTimes:
    """Seconds of the last few rounds, by how many tokens each row drafted, for passes of one number of rows."""

    KEPT = 5

    def __init__(self):
        self.samples: dict[int, deque] = defaultdict(lambda: deque(maxlen=self.KEPT))

    def count(self, drafted: int) -> int:
        return len(self.samples[drafted])

    def add(self, drafted: int, seconds: float) -> None:
        self.samples[drafted].append(seconds)

    def estimate(self, most: int) -> list[float]:
        """Seconds of a round that drafts 0, 1, ..., `most`: medians where there are some, straight lines between them
        and on behind the last. Two lengths must have been timed."""
        known = sorted((drafted, median_low(samples)) for drafted, samples in self.samples.items() if samples)
        times = []
        for drafted in range(most + 1):
            end = next((place for place in range(1, len(known)) if known[place][0] >= drafted), len(known) - 1)
            (left, before), (right, after) = known[end - 1], known[end]
            times.append(before + (after - before) * (drafted - left) / (right - left))
        return times


class AutoDraftLength(DraftLength):
    """Each round, the length of the most expected tokens per second, 0 included: plain decoding where nothing pays.

    A round's time is that of the last rounds of as many rows; it is kept from call to call. How likely slot j is
    accepted once the slots before it are, is counted, and old rounds fade. Now and then another length has a turn: a
    time may have changed, and what is not drafted is not seen to be right again.

    Args:
        most: tokens that a round drafts at most.
        start: tokens to draft while nothing is known, from 1 on.
        times: `RoundTimes` by what a round's time depends on: `regime`, and rows of the pass.
    """

    TRIALS = 2  # rounds of a length before its time counts
    FIRST_PATIENCE, LAST_PATIENCE = 8, 128  # rounds between two turns of other lengths
    FADING = 0.995  # weight of what was seen before, one row's drafts later
    FIRST_RATE, FIRST_WEIGHT = 0.6, 4.0  # acceptance to begin with, and how many drafts that is worth

    def __init__(self, most: int, start: int, times: dict, regime=()):
        super().__init__(most)
        self.start, self.times, self.regime = min(start, most), times, regime
        self.drafted, self.accepted = [0.0] * most, [0.0] * most  # per slot, where the slots before it were accepted
        self.best = self.start
        self.waited, self.patience, self.turns = 0, self.FIRST_PATIENCE, 0
        self.planned: list[int] = []
        self.is_behind = False  # whether the drafter has yet to read what plain rounds added

    def expected_tokens(self) -> list[float]:
        """Tokens that a round of 0, 1, ..., `most` drafts adds to a row."""
        tokens, chance, rate = [1.0], 1.0, self.FIRST_RATE
        for drafted, accepted in zip(self.drafted, self.accepted, strict=True):
            # a slot that has rarely been seen is taken to be like the one before it
            rate = (accepted + self.FIRST_WEIGHT * rate) / (drafted + self.FIRST_WEIGHT)
            chance *= rate
            tokens.append(tokens[-1] + chance)
        return tokens

    def next(self, num_rows: int) -> int:
        times = self.times[self.regime, num_rows]
        for length in (self.start, 0):
            if times.count(length) < self.TRIALS:
                return length
        if self.planned:
            return self.planned.pop()
        expected, seconds = self.expected_tokens(), times.estimate(self.most)
        speeds = [tokens / max(time, 1e-9) for tokens, time in zip(expected, seconds, strict=True)]
        best = max(range(self.most + 1), key=speeds.__getitem__)
        if best != self.best:
            self.best, self.waited, self.patience = best, 0, self.FIRST_PATIENCE
        self.waited += 1
        if self.waited <= self.patience:
            return best
        self.waited, self.patience = 0, min(2 * self.patience, self.LAST_PATIENCE)
        others = [length for length in (best + 1, best - 1, 0) if 0 <= length <= self.most and length != best]
        other = others[self.turns % len(others)]
        self.turns += 1
        self.planned = [] if best else [other]  # the first of two rounds catches up, and is not timed
        return other

    def record(self, num_rows: int, drafted: int, outcome: list[tuple[int, int]], seconds: float) -> None:
        if not (drafted and self.is_behind):
            self.times[self.regime, num_rows].add(drafted, seconds)
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


_times: WeakKeyDictionary = WeakKeyDictionary()  # target -> what drafts for it -> RoundTimes


def times_of(target, drafting) -> dict:
    """What earlier calls in this process know of rounds in which `drafting`, a model, drafts for `target`."""
    return _times.setdefault(target, WeakKeyDictionary()).setdefault(drafting, defaultdict(RoundTimes))
