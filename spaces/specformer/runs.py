"""A run: some prompts as one batch, with drafts and then by plain generate(), told while it goes on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from models import ASSISTANT, Models

MOST_PROMPTS, MOST_PROMPT_TOKENS, MOST_NEW_TOKENS, MOST_DRAFTED, MOST_IN_TREE = 8, 400, 192, 10, 32
BETWEEN = 0.15
"""Seconds between two looks at a run."""


class BadInput(ValueError):
    """What a visitor gave cannot be run; the message is for them."""


class Stopped(Exception):
    """Raised inside of generate() when a visitor has had enough."""


@dataclass(frozen=True)
class Settings:
    """What a visitor asked for. `num_tokens` are drafted a round, or `tree_size` as a tree that is so deep; a
    temperature of 0 is greedy."""

    prompts: tuple[str, ...]
    drafter: str
    num_tokens: int
    tree_size: int
    temperature: float
    seed: int
    max_new_tokens: int


def number(value, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"The {name} should be a number from {low:g} to {high:g}.")
    return value


def checked(text, drafter, num_tokens, tree_size, temperature, seed, max_new_tokens, models: Models) -> Settings:
    """
    Raises:
        BadInput: with a sentence that says what would do.
    """
    prompts = tuple(line.strip() for line in str(text or "").splitlines() if line.strip())
    if not prompts:
        raise BadInput("There is nothing to answer yet: write a prompt, or several, each on a line of its own.")
    if len(prompts) > MOST_PROMPTS:
        raise BadInput(f"These are {len(prompts)} prompts; this page takes up to {MOST_PROMPTS} at once.")
    for place, prompt in enumerate(prompts, start=1):
        width = models.encode([prompt])["input_ids"].shape[1]
        if width > MOST_PROMPT_TOKENS:
            raise BadInput(f"Prompt {place} has {width} tokens; this page takes up to {MOST_PROMPT_TOKENS}.")
        if not width:
            raise BadInput(f"Of prompt {place} no tokens are left; write some text.")
    if drafter not in models.drafters:
        raise BadInput(f"There is no drafter {drafter!r} here; choose {', or '.join(models.drafters)}.")
    tree_size = int(number(tree_size, "size of a tree", 0, MOST_IN_TREE))
    if tree_size and drafter == ASSISTANT:
        raise BadInput("A smaller model drafts no trees: choose another drafter, or a tree of 0 tokens.")
    if not isinstance(seed, int | float) or seed != int(seed) or not 0 <= seed < 2**63:
        raise BadInput("The seed should be a whole number, 0 or more.")
    return Settings(
        prompts,
        drafter,
        int(number(num_tokens, "number of drafted tokens", 0, MOST_DRAFTED)),
        tree_size,
        float(number(temperature, "temperature", 0, 2)),
        int(seed),
        int(number(max_new_tokens, "number of new tokens", 1, MOST_NEW_TOKENS)),
    )


@dataclass
class Piece:
    """What one token adds to a text, who drafted it (`None`: the target's own), and the drafts that it replaced."""

    text: str
    source: str | None = None
    rejected: str = ""


@dataclass
class Row:
    """One text so far. `rounds` has (accepted, drafted) of each."""

    tokenizer: Any
    ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    rounds: list[tuple[int, int]] = field(default_factory=list)
    finished: bool = False
    shown: str = ""

    def add(self, token: int, source: str | None = None, rejected: tuple[int, ...] = ()) -> None:
        """A character of several tokens comes with the last of them."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        new = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(self.shown) :]
        self.shown += new
        self.pieces.append(Piece(new, source, self.tokenizer.decode(rejected) if rejected else ""))


@dataclass
class Side:
    """One way of generating, while it runs.

    Attributes:
        state: "waits", "runs", "done", "stopped" or "failed".
        passes: of the target for all rows together, prompts left out.
        drafted, accepted: by slot, how often; a draft counts as accepted with those in front of it.
        slots: that a round drafts; a tree may have more tokens.
    """

    rows: list[Row]
    slots: int = 0
    state: str = "waits"
    passes: int = 0
    seconds: float = 0.0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def tokens_per_pass(self) -> float | None:
        return (self.tokens - sum(bool(row.ids) for row in self.rows)) / self.passes if self.passes else None

    def take(self, told) -> None:
        """A `Round` of the call."""
        for each in told.rows:
            row = self.rows[each.row]
            for place, token in enumerate(each.tokens):
                own = place >= each.accepted
                row.add(token, None if own else each.source, each.drafted[place:] if own else ())
            row.finished = each.finished
            if told.number:
                self.passes += 1
                row.rounds.append((each.accepted, len(each.drafted)))
            slots = min(len(each.drafted), self.slots)
            missing = slots - len(self.drafted)
            self.drafted += [0] * missing
            self.accepted += [0] * missing
            for slot in range(slots):
                self.drafted[slot] += 1
                self.accepted[slot] += slot < each.accepted

    def take_column(self, column: list[int], ends: set[int]) -> None:
        """A token of each row, as plain generate() streams them: padding where a row has ended."""
        for row, token in zip(self.rows, column, strict=True):
            if not row.finished:
                row.add(token)
                row.finished = token in ends
                self.passes += len(row.ids) > 1


class Run:
    """What one visitor started: `speculative`, which runs first, and `plain`. Set `stop` to end it."""

    def __init__(self, models: Models, settings: Settings):
        self.models, self.settings = models, settings
        self.speculative, self.plain = (
            Side([Row(models.tokenizer) for _ in settings.prompts], settings.num_tokens) for _ in range(2)
        )
        self.stop = threading.Event()
        self.error: Exception | None = None

    @property
    def identical(self) -> bool | None:
        """Whether both sides wrote the same tokens, as far as both have got; `None` while one has none."""
        if not self.plain.tokens:
            return None
        pairs = zip(self.speculative.rows, self.plain.rows, strict=True)
        if self.is_complete:
            return all(ours.ids == theirs.ids for ours, theirs in pairs)
        return all(a == b for ours, theirs in pairs for a, b in zip(ours.ids, theirs.ids, strict=False))

    @property
    def is_complete(self) -> bool:
        return self.plain.state == self.speculative.state == "done"

    def looks(self) -> Iterator[None]:
        """Generates in another thread, and yields when there may be more to see; for the last time when all is over.
        An iterator that is closed before stops it.

        Raises:
            Exception: what generate() raised.
        """
        news: queue.SimpleQueue = queue.SimpleQueue()
        thread = threading.Thread(target=self._work, args=(news,), daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(BETWEEN)
                take_all(news)
                yield
        finally:
            self.stop.set()
            thread.join()
        take_all(news)
        yield
        if self.error is not None:
            raise self.error

    def _work(self, news: queue.SimpleQueue) -> None:
        """Runs in a thread of its own, which changes nothing that is looked at: it only tells `news`."""
        try:
            while not self.models.lock.acquire(timeout=BETWEEN):
                self._go_on()
            try:
                self._generate(news, self.speculative, self.with_drafts)
                self._generate(news, self.plain, self.without_drafts)
            finally:
                self.models.lock.release()
        except Stopped:
            pass
        except Exception as error:
            self.error = error

    def _generate(self, news: queue.SimpleQueue, side: Side, arguments) -> None:
        def tell(take, *told) -> None:
            news.put((take, *told))
            news.put((setattr, side, "seconds", time.perf_counter() - started))
            self._go_on()

        settings, models = self.settings, self.models
        sampling = dict(do_sample=True, temperature=settings.temperature) if settings.temperature else {}
        inputs = models.encode(list(settings.prompts))
        news.put((setattr, side, "state", "runs"))
        torch.manual_seed(settings.seed)
        started = time.perf_counter()
        try:
            self._go_on()
            models.target.generate(
                **inputs,
                **{"do_sample": False, **sampling},
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=models.tokenizer.pad_token_id,
                **arguments(side, tell),
            )
            state = "done"
        except Stopped:
            state = "stopped"
            raise
        except Exception:
            state = "failed"
            raise
        finally:
            news.put((setattr, side, "state", state))

    def with_drafts(self, side: Side, tell) -> dict:
        settings = self.settings
        drafting = self.models.drafting(settings.drafter, settings.num_tokens, settings.tree_size)
        return dict(drafting, on_round=lambda told: tell(side.take, told))

    def without_drafts(self, side: Side, tell) -> dict:
        ends = self.models.target.generation_config.eos_token_id
        ends = frozenset(ends if isinstance(ends, list) else [ends])
        return dict(streamer=Columns(lambda column: tell(side.take_column, column, ends)))

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise Stopped


class Columns:
    """A streamer for batches: hands on the tokens of each step, without the prompts that come first."""

    def __init__(self, take):
        self.take, self.is_first = take, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_first:
            self.take(value.tolist())
        self.is_first = False

    def end(self) -> None:
        pass


def take_all(news: queue.SimpleQueue) -> None:
    while True:
        try:
            take, *told = news.get_nowait()
        except queue.Empty:
            return
        take(*told)
