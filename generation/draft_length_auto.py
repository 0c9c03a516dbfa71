"""How many tokens to draft when the caller names no number: what pays, measured while it runs ("auto")."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Hashable
from itertools import accumulate
from operator import mul
from statistics import NormalDist
from weakref import WeakKeyDictionary

from .draft_length import DraftLength
from .draft_length_times import RoundTimes, lasting_share


class Experience:
    """What is known of one way to draft for a model, from call to call.

    Attributes:
        times: `RoundTimes` by the regime, such as the device.
        rates: how likely slot j was accepted in the last call once the slots before it were; none at first.
        allowance: seconds that the next turn of another length than the best known one may lose.
        lost: seconds that turns of each length were expected to lose; fading.
        catching_up: by how many plain rounds a round takes longer for reading what plain ones in front of it added.
        expectations: of the last rounds of a drafter that knows how likely its drafts are accepted: the tokens that it
            expected of verifying 0, 1, ... of them, and how long drafting took, in units of a plain round.
        predicted, accepted: how many drafts it expected to be accepted of those verified, and how many were. That
            fades, as does what both begin with: it is taken to be right at first.
    """

    REMEMBERED = 32
    FIRST_TRUST = 32.0  # drafts

    def __init__(self):
        self.times: dict = defaultdict(RoundTimes)
        self.rates: list[float] = []
        self.allowance, self.catching_up = 0.0, 0.0
        self.lost: Counter[int] = Counter()
        self.expectations: deque[tuple[list[float], float]] = deque(maxlen=self.REMEMBERED)
        self.predicted = self.accepted = self.FIRST_TRUST


class AutoDraftLength(DraftLength):
    """Each round, the length of the most expected tokens per second, 0 included: plain decoding where nothing pays.

    A round's time is that of the last ones of its kind, or told from others (`RoundTimes`). Acceptance of each slot is
    counted, and fades. Now and then another length has a turn: a time may have changed, and what is not drafted is not
    seen to be right again. What such turns are expected to lose is a small share of all time, so that a length which
    seems nearly as good has them often, and a useless drafter seldom.

    Rows gain unevenly, and a batch lasts as long as its slowest row: what drafting adds to several rows counts as much
    as it shortens the batch (`worth_of_drafts`).

    Args:
        most: tokens that a round drafts at most.
        start: tokens to draft while nothing is known, from 1 on.
        experience: of earlier calls; this one adds to it.
        regime: what the time of a round depends on besides its rows and drafts.
    """

    TRIED = 8  # all lengths up to it have turns, others only beside the best: more rows are not always slower
    LOST = 0.02  # share of the time that turns of other lengths may lose
    LEAST_LOSS = 0.3  # of such a turn, in rounds: however good a length seems, the best known one has most rounds
    FADING_LOSS = 0.9  # weight of what turns have lost, a turn later
    MOST_LATE, FOLLOWED_LATE = 2.0, 0.2  # of a round that catches up: in plain rounds, and how much of it is followed
    FADING = 0.995  # weight of what was seen before, one row's drafts later
    LEAST_GAIN = 1.03  # what drafting must promise beside plain decoding: a hundred drafts in vain promise no more
    MOST_ASKED = 4  # rounds in which a drafter may draft nothing at first
    FIRST_RATE, FIRST_WEIGHT = 0.6, 4.0  # acceptance to begin with, and how many drafts experience is worth

    def __init__(self, most: int, start: int, experience: Experience, regime=()):
        super().__init__(most)
        self.start, self.experience, self.regime = min(start, most), experience, regime
        self.first_rates = list(experience.rates)
        self.drafted, self.accepted = [0.0] * most, [0.0] * most  # per slot, where the slots before it were accepted
        self.worth = 1.0  # of an accepted draft, beside a token that every row gets
        self.planned: list[int] = []
        self.asked = 0
        self.is_trial = True  # whether a round is there to learn of, and not the best known
        self.is_behind = False  # whether the drafter has yet to read what plain rounds added
        self.is_in_vain = False  # whether this round's drafter was asked and drafted nothing

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
        """What a round of 0, 1, ..., `most` drafts adds to a row, in tokens that all rows get."""
        accepted = accumulate(self.rates(), mul)
        return list(accumulate((self.worth * chance for chance in accepted), initial=1.0))

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
        seconds = times.estimate(num_rows, self.most)
        self.worth = worth_of_drafts(num_rows, lasting_share(times.known(), num_rows), self.rates()[0])
        speeds = self.speeds(seconds)
        speeds[0] *= self.LEAST_GAIN
        best, speed = self.best(speeds)
        rounds = {length: self.rounds_of_turn(num_rows, length, best) for length in self.others(best)}
        known = self.experience
        behind = known.catching_up * seconds[0] if best == 0 else 0.0
        losses = {
            length: max(count * seconds[length] * (1 - speeds[length] / speed), self.LEAST_LOSS * seconds[best])
            + behind
            for length, count in rounds.items()
        }
        # each length may lose as much as any other, so that cheap turns come more often than dear ones
        other = min(losses, key=lambda length: known.lost[length] + losses[length])
        known.allowance += self.LOST * seconds[best]
        if known.allowance < losses[other]:
            self.is_trial = False
            return best
        known.allowance = 0.0
        known.lost = Counter({length: self.FADING_LOSS * lost for length, lost in known.lost.items()})
        known.lost[other] += losses[other]
        self.planned = [other] * (rounds[other] - 1)
        return other

    def rounds_of_turn(self, num_rows: int, length: int, best: int) -> int:
        """As many as it takes to know its time. The first round behind plain ones catches up, and is not timed."""
        times = self.experience.times[self.regime]
        return max(1, times.LEAST - times.count(num_rows, length)) + (best == 0)

    def best(self, speeds: list[float]) -> tuple[int, float]:
        """The best length, and its speed."""
        best = max(range(self.most + 1), key=speeds.__getitem__)
        return best, speeds[best]

    def others(self, best: int) -> list[int]:
        """The lengths that have turns beside the best one."""
        lengths = (best + 1, best - 1, *range(min(self.most, self.TRIED) + 1))
        return [length for length in dict.fromkeys(lengths) if 0 <= length <= self.most and length != best]

    def keep(self, drafts, confidences, idle, started) -> int:
        self.is_in_vain = not drafts.shape[1]
        return drafts.shape[1]

    def record(self, num_rows: int, drafted: int, outcome: list[tuple[int, int]], seconds: float) -> None:
        asked, self.is_in_vain = drafted > 0 or self.is_in_vain, False
        times = self.experience.times[self.regime]
        # the time of a round that was asked for drafts in vain is neither a plain round's nor that of a length
        if not asked or (drafted and not self.is_behind):
            times.add(num_rows, drafted, seconds)
        elif drafted and times.count(num_rows, drafted) >= times.LEAST:
            usual = times.estimate(num_rows, drafted)
            late = min(max((seconds - usual[drafted]) / max(usual[0], 1e-9), 0.0), self.MOST_LATE)
            self.experience.catching_up += self.FOLLOWED_LATE * (late - self.experience.catching_up)
        self.is_behind = not asked
        if not asked:
            return
        verified = [accepted for accepted, added in outcome if added]  # others stopped earlier and are carried along
        for counts in (self.drafted, self.accepted):
            counts[:] = [self.FADING ** len(verified) * count for count in counts]
        for accepted in verified:
            for slot in range(min(accepted + 1, max(drafted, 1))):  # what was not drafted is as good as wrong
                self.drafted[slot] += 1
                self.accepted[slot] += slot < accepted
        self.experience.rates = self.rates()


SPREAD = 0.9
"""By how much the drafts that are accepted each round differ between texts: their standard deviation in parts of their
mean, where hardly a draft is accepted. It was 0.45 in answers to MT-Bench, of 64 and of 256 tokens, with copies and
without, where half of the first drafts are; where all are, texts cannot differ."""


def worth_of_drafts(num_rows: int, lasting: float, rate: float) -> float:
    """By how much a draft that is accepted in a row shortens a batch, where one for every row shortens it by 1.

    The slowest of many rows has fewer of them than the mean row, and until it is through, the share `lasting` of a
    round's time goes on that does not depend on the rows. What the other rows' own share of it is, they save.

    Args:
        rate: how likely the first draft is accepted.
    """
    expected_slowest = NormalDist().inv_cdf((num_rows - 0.375) / (num_rows + 0.25))  # standard deviations from the mean
    slowest = max(1 - SPREAD * (1 - rate) * expected_slowest, 0.0)
    return 1 - lasting * (1 - slowest)


_experience: WeakKeyDictionary = WeakKeyDictionary()  # target -> what drafts for it -> in which way -> what is known


def experience_of(target, drafting, way: Hashable, make: type = Experience):
    """What earlier calls in this process know of `drafting`, a model, as the drafter of `target` in some `way`: what
    `make()` is at first. Of an object that is not hashable, or cannot be referred to weakly, nothing is known."""
    try:
        ways = _experience.setdefault(target, WeakKeyDictionary()).setdefault(drafting, {})
    except TypeError:
        return make()
    return ways.setdefault(way, make())
