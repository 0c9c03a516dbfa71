"""A target answers prompts in a batch whose rows are refilled."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from specformer.generation.accept_noise import HashedNoise
from specformer.generation.accept_sampling import sample_with_noise
from specformer.generation.backend_linear import fast_linears
from specformer.generation.cache_ragged import RaggedCache
from specformer.generation.target import prefill, prompt_arguments, prompt_layout, verify
from specformer.generation.target_attention import usable_attention
from specformer.generation.target_probe import probe_target
from specformer.generation.target_refusals import check_target, input_device
from specformer.generation.target_states import StateReader
from specformer.generation.text_positions import Positions


@dataclass
class Answer:
    """One prompt and what the target has answered so far."""

    index: int
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    finished: bool = False
    states: list[torch.Tensor] = field(default_factory=list)
    """Of the tokens that the target has read, (T, S, d) in parts, where states are kept."""
    states_at: int | None = None
    """Where its states begin in the file of states, in tokens."""
    text: str | None = None
    """What was answered, where it is kept in words as well."""

    def to_json(self) -> str:
        row: dict[str, Any] = {"id": self.index} if self.text is None else {"id": self.index, "text": self.text}
        row.update(prompt_ids=self.prompt_ids, response_ids=self.response_ids, finished=self.finished)
        if self.states_at is not None:
            row["states_at"] = self.states_at
        return json.dumps(row, separators=(",", ":"))


class Answering:
    """A batch of prompts that is refilled: the row of a finished answer is taken by the next prompt.

    Args:
        target: a causal LM.
        batch_size: rows of the batch.
        max_new_tokens: longest answer.
        temperature: 0 takes the best token, otherwise tokens are sampled, with noise that depends on `seed`, the index
            of the prompt and the position alone.
        layer_ids: layers whose states answers bring with them: the target has read all of a text but its last token.
    """

    refills: ClassVar[int] = 8
    """As a share of the batch: rows are taken by new prompts once one in so many is free."""

    def __init__(
        self,
        target,
        batch_size: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        layer_ids: Sequence[int] | None = None,
    ):
        check_target(target)
        self.target, self.device = target, input_device(target)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.temperature, self.seed = temperature, seed
        self.states_of = StateReader(target, layer_ids)
        eos = target.generation_config.eos_token_id
        self.eos_token_ids = set(eos if isinstance(eos, list) else [eos])

    def run(self, prompts: Iterator[Answer]) -> Generator[Answer, None, None]:
        """Yield answers as they are complete. In between the target is as it was, for whatever the caller does."""
        waiting = deque(prompts)
        self.rows: list[Answer | None] = []  # the one in each row of the batch, None where it is complete
        self.read: list[int] = []  # tokens of each row that the target has read
        # A row may be taken by a longer prompt later, so the buffers' limit is the model's.
        limit = getattr(self.target.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20
        longest = max((len(answer.prompt_ids) for answer in waiting), default=0)
        self.max_length = max(limit, longest + self.max_new_tokens)
        is_probed = False
        while waiting or any(self.rows):
            with torch.no_grad(), usable_attention(self.target), fast_linears(self.target):
                if not is_probed:
                    probe_target(self.target)
                    is_probed = True
                complete: list[Answer] = []
                while not complete and (waiting or any(self.rows)):
                    complete = self._refill(waiting)
                    if any(self.rows):
                        complete += self._step()
            yield from complete

    def _refill(self, waiting: deque[Answer]) -> list[Answer]:
        """Give free rows to prompts that wait, or drop them. Returns answers of one token."""
        free = [place for place, answer in enumerate(self.rows) if answer is None]
        if waiting and (not any(self.rows) or len(free) >= max(1, self.batch_size // self.refills)):
            count = len(free) if self.rows else self.batch_size
            return self._admit([waiting.popleft() for _ in range(min(count, len(waiting)))], free)
        if len(free) > len(self.rows) // 2:
            self._drop(free)
        return []

    def _admit(self, answers: list[Answer], free: list[int]) -> list[Answer]:
        """Read prompts into free rows, or into a new batch, and take their first tokens."""
        cache, begun = self._read(answers, *left_padded(answers, self.device))
        if not self.rows:
            self.cache, self.rows, places = cache, list(answers), list(range(len(answers)))
            self.read = [len(answer.prompt_ids) for answer in answers]
        else:
            places = free[: len(answers)]
            for place, answer in zip(places, answers, strict=True):
                self.rows[place], self.read[place] = answer, len(answer.prompt_ids)
            self.cache.replace_rows(torch.tensor(places, device=self.device), cache, self._longest())
        return self._begin(begun, places)

    def _read(self, answers: list[Answer], input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[RaggedCache, Any]:
        """Read prompts (N, P): the target's cache of them, and what `_begin` needs to go on from there."""
        layout = prompt_layout(self.target, mask, input_ids)
        arguments = prompt_arguments(self.target, layout)
        logits, cache, states = prefill(
            self.target, input_ids, layout, self.max_length, 1, arguments, states_of=self.states_of
        )
        for group, states_of_group in zip(layout.groups, states or (), strict=states is not None):
            for row, states_of_row in zip(group.rows.tolist(), states_of_group, strict=True):
                answers[row].states.append(states_of_row[-len(answers[row].prompt_ids) :].to("cpu"))
        return cache, logits

    def _begin(self, begun: Any, places: list[int]) -> list[Answer]:
        """What was read is in the rows at `places`. Returns answers that one token completes."""
        return self._take(begun[:, -1], places)

    def _step(self) -> list[Answer]:
        """One more token for every row. Returns the answers that are complete."""
        newest = [0 if answer is None else answer.response_ids[-1] for answer in self.rows]
        block = torch.tensor(newest, device=self.device)[:, None]
        logits, states = verify(self.target, self.cache, block, self.states_of)
        if states is not None:
            for answer, states_of_row in zip(self.rows, states.to("cpu"), strict=True):
                if answer is not None:
                    answer.states.append(states_of_row)
        running = [int(answer is not None) for answer in self.rows]
        self.read = [read + count for read, count in zip(self.read, running, strict=True)]
        self.cache.advance(torch.tensor(running, device=self.device), self._longest())
        return self._take(logits[:, -1], list(range(len(self.rows))))

    def _take(self, logits: torch.Tensor, places: list[int]) -> list[Answer]:
        """The next token of the rows at `places`. Returns the answers that it completes."""
        scores = logits.to(self.device, torch.float32)
        if self.temperature:
            answers = [self.rows[place] or Answer(0, []) for place in places]  # complete ones are only carried along
            noise = HashedNoise([self.seed + answer.index for answer in answers], self.device)
            steps = torch.tensor([len(answer.response_ids) for answer in answers])
            noise = noise.gather(Positions(torch.arange(len(answers)), steps), scores.shape[-1])
            tokens = sample_with_noise(scores / self.temperature, noise)
        else:
            tokens = scores.argmax(-1)
        complete = []
        for place, token in zip(places, tokens.tolist(), strict=True):
            if (answer := self.rows[place]) is None:
                continue
            answer.response_ids.append(token)
            answer.finished = token in self.eos_token_ids
            if answer.finished or len(answer.response_ids) == self.max_new_tokens:
                self.rows[place] = None
                complete.append(answer)
        return complete

    def _drop(self, free: list[int]) -> None:
        """There is nothing left to fill rows with: carry on the running ones alone."""
        kept = [place for place in range(len(self.rows)) if place not in set(free)]
        self.rows, self.read = [self.rows[place] for place in kept], [self.read[place] for place in kept]
        self.cache.select_rows(torch.tensor(kept, device=self.device), self._longest())

    def _longest(self) -> int:
        """Tokens of the longest running row that the target has read."""
        return max((read for read, answer in zip(self.read, self.rows, strict=True) if answer is not None), default=0)


def left_padded(answers: Sequence[Answer], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch, (N, P), and its attention mask."""
    width = max(len(answer.prompt_ids) for answer in answers)
    missing = [width - len(answer.prompt_ids) for answer in answers]
    ids = [[0] * pad + answer.prompt_ids for pad, answer in zip(missing, answers, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in missing]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
