"""How many tokens to draft when the caller names no number: what gives the most expected tokens per second ("auto")."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate
from operator import mul
from statistics import NormalDist
from time import perf_counter
from weakref import WeakKeyDictionary

import torch

from .draft_length import DraftLength
from .draft_length_times import RoundTimes
from .proposal import Proposal


class Experience:
    """What is known of one way to draft for a model, from call to call.

    Attributes:
        drafting: seconds of drafting 0, 1, ... tokens a row.
        passes: seconds of the rest of a round, which verifies 0, 1, ... of them.
        promises: of the last rounds that drafted, per slot, how likely its draft and all in front of it were said to be
            accepted; means over the rows. A drafter that does not tell how sure it is promises all of its drafts.
        of_trees: of trees alone, how likely their first token was said to be wrong, and such promises of their tokens;
            means that fade. Empty where there were none.
        trust: per slot, how many drafts are accepted of a promised one, where those in front of it are.
        tried: the round that verified 0, 1, ... drafts last; `rounds` counts them.
        allowance: seconds that the next trial may lose.
    """

    REMEMBERED = 32

    def __init__(self):
        self.drafting, self.passes = RoundTimes(), RoundTimes()
        self.tried: Counter[int] = Counter()
        self.rounds, self.allowance = 0, 0.0
        self.forget_promises()

    def forget_promises(self) -> None:
        """How much of the drafts was accepted says nothing any more. How long they take stays known."""
        self.promises: deque[list[float]] = deque(maxlen=self.REMEMBERED)
        self.of_trees: list[float] = []
        self.trust: list[float] = []


class AutoDraftLength(DraftLength):
    """Each round, the length of the most expected tokens per second, 0 included: plain decoding where nothing pays.

    Tokens are expected as the last rounds' promises say, as far as promises are kept; times are those measured. Once a
    round's own promises are there, as many of its drafts are verified as are worth the time of the pass, which could
    give tokens elsewhere at the speed that was expected. Now and then another length is tried, whatever is promised: a
    time may have changed, and what is not drafted is not seen to be right again. What trials are expected to lose is a
    small share of all time, so that a length which seems nearly as good is tried often, and a useless drafter seldom.

    Rows gain unevenly, and a batch lasts as long as its slowest row: what drafting adds to several rows counts as much
    as it shortens the batch (`worth_of_drafts`).

    Args:
        most: tokens that a round drafts at most.
        start: tokens to draft while nothing is known, from 1 on.
        experience: of earlier calls; this one adds to it.
        may_cut: whether how many drafts are verified may follow from the drafts: not where the text depends on them.
    """

    LOST = 0.02  # share of the time that trials may lose
    LEAST_LOSS = 0.3  # of a trial, in rounds: however good a length seems, the best known one has most rounds
    FADING = 0.995  # weight of what was seen before, one row's drafts later
    FIRST_TRUST, WEIGHT = 0.6, 4.0  # trust to begin with, and how many promises experience is worth

    def __init__(self, most: int, start: int, experience: Experience, may_cut: bool = True):
        super().__init__(most)
        self.start, self.experience, self.may_cut = min(start, most), experience, may_cut
        self.lengths: Sequence[int] = range(most + 1)  # that come into question
        self.first_trust = list(experience.trust)
        self.promised, self.kept = [0.0] * most, [0.0] * most  # per slot, where those in front are accepted; fading
        self.length, self.more_trials = 0, 0  # what this round drafts, and how many more rounds try that
        self.is_trial = True  # whether a round is there to learn of, and verifies all that it drafts
        self.speed = 0.0  # expected tokens per second of a row
        self.drafting: list[float] = []  # expected seconds of drafting 0, 1, ... tokens
        self.passes: list[float] = []  # and of the rest of a round that verifies 0, 1, ... of them
        self.worth: list[float] = []  # of a promised draft of each slot, in tokens that every row gets
        self.promises: list[float] = []  # of this round
        self.seconds: float | None = None  # of this round's drafting
        self.is_behind = False  # whether the drafter has yet to read what plain rounds added

    def next(self, num_rows: int) -> int:
        known, self.is_trial, self.seconds = self.experience, True, None
        if not known.promises or not known.drafting.known():
            self.length = self.start
        elif all(verified > 0 for _, verified in known.passes.known()):
            self.length = 0
        elif self.more_trials:
            self.more_trials -= 1
        else:
            self._choose(num_rows)
        return self.length

    def _choose(self, num_rows: int) -> None:
        known, lengths = self.experience, self.lengths
        self.passes = known.passes.estimate(num_rows, self.widest)
        self.drafting = [0.0, *known.drafting.estimate(num_rows, self.widest)[1:]]
        self.worth = self._worth(num_rows)
        self.speed = max(self.speed, 1 / self.passes[0])
        recent = [self._expected(promises) for promises in list(known.promises)]  # another thread may add to them
        tokens, seconds = dict.fromkeys(lengths, 0.0), dict.fromkeys(lengths, 0.0)  # of a round that drafts so many
        for expected in recent:
            verified = 0
            for drafted in lengths:
                if not self.may_cut or self._gain(expected, drafted) > self._gain(expected, verified):
                    verified = drafted
                tokens[drafted] += expected[verified] / len(recent)
                seconds[drafted] += (self.drafting[drafted] + self.passes[verified]) / len(recent)
        # a drafter that was tried with few tokens may take as long for each of many
        longest = 2 * max(1, *(verified for _, verified in known.passes.known()))
        likely = [drafted for drafted in lengths if drafted <= longest]
        best = max(likely, key=lambda drafted: tokens[drafted] / seconds[drafted])
        self.speed, self.length, self.is_trial = tokens[best] / seconds[best], best, False
        known.allowance += self.LOST * seconds[best]
        losses = {}  # of verifying all that are drafted, in seconds
        for drafted in {*lengths} - {best}:
            whole = sum(expected[drafted] for expected in recent) / len(recent)
            loss = self.drafting[drafted] + self.passes[drafted] - whole / self.speed
            rounds = max(1, RoundTimes.LEAST - known.passes.count(num_rows, drafted))
            losses[drafted] = rounds * max(loss, self.LEAST_LOSS * seconds[best]), rounds
        # each may lose as much as any other, so that cheap trials come more often than dear ones
        other = max(losses, key=lambda drafted: (known.rounds - known.tried[drafted]) / losses[drafted][0])
        loss, rounds = losses[other]
        if known.allowance >= loss:
            known.allowance = 0.0
            self.length, self.more_trials, self.is_trial = other, rounds - 1, True

    def _worth(self, num_rows: int) -> list[float]:
        known, trust = self.experience, self._trust()
        first = trust[0] * sum(promises[0] for promises in list(known.promises) if promises) / len(known.promises)
        lasting = min(known.passes.estimate(1, 0)[0] / self.passes[0], 1.0)
        worth = worth_of_drafts(num_rows, lasting, min(first, 1.0))
        return [worth * share for share in self._shares(trust)]

    def _shares(self, trust: list[float]) -> Iterable[float]:
        """Of each promise, what is kept of it."""
        return accumulate(trust, mul)

    def _trust(self) -> list[float]:
        trust, before = [], self.FIRST_TRUST
        for slot, (promised, kept) in enumerate(zip(self.promised, self.kept, strict=True)):
            # a slot that nothing is known of is taken to be like the one before it
            first = self.first_trust[slot] if slot < len(self.first_trust) else before
            before = (kept + self.WEIGHT * first) / (promised + self.WEIGHT)
            trust.append(before)
        return trust

    def _expected(self, promises: list[float]) -> list[float]:
        """Tokens of a round that verifies 0, 1, ..., `most` drafts. Slots that were not drafted are taken to go on as
        those in front of them did."""
        expected, before, promise = [1.0], 1.0, 0.0
        for slot, worth in enumerate(self.worth):
            if slot < len(promises):
                before, promise = (promise if slot else 1.0), promises[slot]
            else:
                before, promise = promise, promise * promise / max(before, 1e-9)
            expected.append(expected[-1] + worth * promise)
        return expected

    def _gain(self, expected: list[float], verified: int) -> float:
        """Of a pass, in tokens beside those that its time is worth elsewhere."""
        return expected[verified] - self.speed * self.passes[verified]

    def _chances(self, proposal: Proposal) -> torch.Tensor | None:
        """How likely each draft is accepted, those in front of it too, (R, k), if the drafter knows."""
        # of a drafter whose numbers are broken nothing is expected
        return None if proposal.confidences is None else proposal.confidences.nan_to_num(0.0).cumprod(dim=1)

    def keep(self, proposal: Proposal, idle: torch.Tensor, started: float) -> int:
        width, rows = proposal.tokens.shape[1], 1.0
        self.promises = [1.0] * width
        if (chances := self._chances(proposal)) is not None and width and self.may_cut:
            running = ~idle.to(chances.device)[:, None]  # (R, 1)
            chances = chances.masked_fill(~running, 0.0)
            # the one wait of a round that the drafter's confidences cost
            *promised, rows = torch.cat([chances, running.to(chances)], dim=1).sum(dim=0).tolist()
            self.promises = [chance / max(rows, 1.0) for chance in promised]
        self.seconds = perf_counter() - started
        if not rows:
            return 0
        self.experience.promises.append(self.promises)
        if self.is_trial or not self.may_cut:
            return width
        expected = self._expected(self.promises)
        verifiable = {width, *(length for length in self.lengths if length < width)}
        return max(sorted(verifiable), key=lambda verified: self._gain(expected, verified))

    def record(self, num_rows, drafted, outcome, seconds, path=None) -> None:
        known = self.experience
        known.rounds += 1
        known.tried[drafted] = known.rounds
        known.passes.add(num_rows, drafted, seconds - (self.seconds or 0.0))
        if self.seconds is None:
            self.is_behind = True
            return
        if self.is_behind and self.drafting:  # which is no time of drafting, and yet lost
            known.allowance -= max(self.seconds - self.drafting[self.length], 0.0)
        else:
            known.drafting.add(num_rows, self.length, self.seconds)
        self.is_behind = False
        self._count_kept(drafted, outcome, path)
        known.trust = self._trust()

    def _count_kept(self, drafted: int, outcome: list[tuple[int, int]], path: torch.Tensor | None) -> None:
        """What was promised of a round's drafts, and what was kept of it."""
        verified = [accepted for accepted, added in outcome if added]  # others stopped earlier and are carried along
        fading, before = self.FADING ** len(verified), 1.0
        for slot, promise in enumerate(self.promises[:drafted]):
            reached = sum(accepted >= slot for accepted in verified)
            self.promised[slot] = fading * self.promised[slot] + reached * promise / max(before, 1e-9)
            self.kept[slot] = fading * self.kept[slot] + sum(accepted > slot for accepted in verified)
            before = promise


def worth_of_drafts(num_rows: int, lasting: float, rate: float) -> float:
    """By how much a draft that is accepted in a row shortens a batch, where one for every row shortens it by 1.

    The slowest of many rows has fewer of them than the mean row, and until it is through, the share `lasting` of a
    round's time goes on that does not depend on the rows. What the other rows' own share of it is, they save. Texts
    differ the more the fewer drafts are accepted: by a standard deviation of (1 - rate)**2 in parts of the mean, as in
    answers to MT-Bench with copies alone and with a drafter that is right at half of the first slots.

    Args:
        rate: how likely the first draft is accepted.
    """
    expected_slowest = NormalDist().inv_cdf((num_rows - 0.375) / (num_rows + 0.25))  # standard deviations from the mean
    slowest = max(1 - (1 - rate) ** 2 * expected_slowest, 0.0)
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


def forget_promises(target, drafting) -> None:
    """The weights of `drafting`, which drafts for `target`, are others now."""
    try:
        ways = _experience.get(target, {}).get(drafting, {})
    except TypeError:  # see `experience_of`
        return
    for known in list(ways.values()):
        if isinstance(known, Experience):
            known.forget_promises()
