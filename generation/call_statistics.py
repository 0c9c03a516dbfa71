"""What a call to generate() did, for the caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class GenerationStatistics:
    """
    Attributes:
        rounds: target passes after the prompt's.
        target_passes_per_row: rounds in which each row of the batch was running.
        tokens_per_row: tokens generated per row, the one from the prompt pass included.
        was_drafted: per row, of each of these tokens, whether it is a draft that the target accepted.
        drafted_per_slot: how often slot j was drafted for a running row. Rows with nothing to draft do not count.
        accepted_per_slot: how often it was accepted, the slots before it included.
        rounds_per_length: how many rounds verified so many drafts of each row.
        seconds: wall-clock of the host in "prefill", "draft", "verify" and "accept", and in the caller's "on_round".
            On a GPU the host runs ahead, so only the sum means something there.
    """

    batch_size: int
    rounds: int = 0
    target_passes_per_row: list[int] = field(default_factory=list)
    tokens_per_row: list[int] = field(default_factory=list)
    was_drafted: list[list[bool]] = field(default_factory=list)
    drafted_per_slot: list[int] = field(default_factory=list)
    accepted_per_slot: list[int] = field(default_factory=list)
    rounds_per_length: dict[int, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.target_passes_per_row = [0] * self.batch_size
        self.tokens_per_row = [0] * self.batch_size
        self.was_drafted = [[] for _ in range(self.batch_size)]
        self._clock = perf_counter()

    def lap(self, part: str) -> None:
        """Book the time since the last lap under `part`."""
        now = perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._clock
        self._clock = now

    def count(
        self, rows: list[int], width: int, drafted: list[int], outcome: list[tuple[int, int]], is_prompt: bool
    ) -> None:
        """Book one pass over `width` drafts: how many each of `rows` had `drafted`, and its `outcome`, (accepted
        drafts, tokens added)."""
        if not is_prompt:
            self.rounds += 1
            self.rounds_per_length[width] = self.rounds_per_length.get(width, 0) + 1
        slots = max(width, len(self.drafted_per_slot))
        for counts in (self.drafted_per_slot, self.accepted_per_slot):
            counts.extend([0] * (slots - len(counts)))
        for row, count, (accepted, added) in zip(rows, drafted, outcome, strict=True):
            if added == 0:
                continue  # stopped earlier and only carried along
            self.target_passes_per_row[row] += not is_prompt
            self.was_drafted[row] += [place < accepted for place in range(added)]
            for slot in range(count):
                self.drafted_per_slot[slot] += 1
                self.accepted_per_slot[slot] += slot < accepted

    def finish(self, tokens_per_row: list[int]) -> None:
        """The text is complete. Tokens that a row was given after the others had reached the end do not count."""
        self.tokens_per_row = tokens_per_row
        self.was_drafted = [each[:count] for each, count in zip(self.was_drafted, tokens_per_row, strict=True)]

    @property
    def tokens_per_pass_per_row(self) -> list[float | None]:
        """Tokens per target pass of each row, prompt pass and its token left out; `None` for rows without a pass."""
        return [
            (tokens - 1) / passes if passes else None
            for tokens, passes in zip(self.tokens_per_row, self.target_passes_per_row, strict=True)
        ]

    @property
    def tokens_per_pass(self) -> float | None:
        """The same over all rows together. 1 is plain decoding."""
        passes = sum(self.target_passes_per_row)
        return sum(tokens - 1 for tokens in self.tokens_per_row) / passes if passes else None
