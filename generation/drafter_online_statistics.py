"""What a drafter that learns while it serves has done, and whether what it is asked for has changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

MOST_STEPS = 1000
"""Of which what came of them is remembered, the newest."""


@dataclass
class AdaptationStatistics:
    """
    Attributes:
        calls: that are over.
        texts: that were learned from.
        steps: of the optimizer.
        skipped: steps whose gradient was not finite, without effect.
        losses: of the last steps, before each of them.
        acceptances: of the last steps, the acceptance in the calls since the step before.
        serving_seconds, learning_seconds: that calls and steps took.
    """

    RECENT, USUAL = 0.8, 0.99  # fading of what is compared, a call later

    calls: int = 0
    texts: int = 0
    steps: int = 0
    skipped: int = 0
    losses: list[float] = field(default_factory=list)
    acceptances: list[float | None] = field(default_factory=list)
    serving_seconds: float = 0.0
    learning_seconds: float = 0.0
    recent: list[float] = field(default_factory=lambda: [0.0, 0.0])  # drafts looked at, and right; both fade
    usual: list[float] = field(default_factory=lambda: [0.0, 0.0])
    since_step: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def acceptance(self) -> float | None:
        """How likely a draft was right lately once those in front of it were; `None` before the first."""
        return share(self.recent)

    @property
    def drift(self) -> float | None:
        """By how much that differs from what it was over many calls: below 0 where texts have become of another kind
        than the drafter knows, above while it learns."""
        recent, usual = share(self.recent), share(self.usual)
        return None if recent is None or usual is None else recent - usual

    def count(self, reached: int, right: int, seconds: float) -> None:
        """A call is over, of whose drafts `reached` were looked at and `right` right."""
        self.calls += 1
        self.serving_seconds += seconds
        for counts, fading in ((self.recent, self.RECENT), (self.usual, self.USUAL), (self.since_step, 1.0)):
            counts[:] = fading * counts[0] + reached, fading * counts[1] + right

    def count_step(self, texts: int, loss: float, had_effect: bool, seconds: float) -> None:
        """A step over `texts` is over."""
        self.learning_seconds += seconds
        if not had_effect:
            self.skipped += 1
            return
        self.steps, self.texts = self.steps + 1, self.texts + texts
        self.losses = [*self.losses, loss][-MOST_STEPS:]
        self.acceptances = [*self.acceptances, share(self.since_step)][-MOST_STEPS:]
        self.since_step = [0.0, 0.0]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> AdaptationStatistics:
        """
        Raises:
            TypeError: other fields than these.
        """
        if set(values) != {each.name for each in fields(cls)}:
            raise TypeError(f"its statistics are {sorted(values)}")
        return cls(**values)


def share(counts: list[float]) -> float | None:
    """Of (all, some), some / all."""
    return counts[1] / counts[0] if counts[0] else None
