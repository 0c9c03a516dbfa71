"""Stopping criteria under speculation, sorted by how they are evaluated."""

from __future__ import annotations

import math

import torch
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .argument import name_of
from .ranks import decided, told
from .text_in_step import InStep


class StoppingRules:
    """
    Attributes:
        eos_token_ids: ids that end a row, or `None`. Checked for all new tokens at once.
        max_length: columns, prompt and padding included, at which generation ends: past the prompt by one at least,
            since plain generate() asks its criteria after the first token.
        timers: `max_time`, asked once a round for the whole batch.
        others: stop strings and custom criteria. They are asked token by token about text that plain generate() would
            show them: the whole batch in its original order, all rows at one length.
        custom: those of them that somebody else wrote.
        pads: whether plain generate() pads a row that has stopped, which it does when a criterion has an
            `eos_token_id`. Otherwise it goes on writing real tokens into the row until all rows have stopped.
    """

    def __init__(self, criteria: StoppingCriteriaList, max_length: int, prompt_width: int):
        eos = [criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.eos_token_ids = torch.cat([ids.flatten() for ids in eos]) if eos else None
        limits = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        # A caller's MaxLengthCriteria takes the place of the one that generate() makes of max_length.
        self.max_length = max(math.ceil(min(limits, default=max_length)), prompt_width + 1)
        self.timers = StoppingCriteriaList(c for c in criteria if isinstance(c, MaxTimeCriteria))
        self.others = StoppingCriteriaList(
            criterion
            for criterion in criteria
            if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria) and criterion not in self.timers
        )
        self.custom = [c for c in self.others if type(c) is not StopStringCriteria]
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    def is_eos(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of `tokens` end their row, bool of the same shape."""
        if self.eos_token_ids is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return torch.isin(tokens, self.eos_token_ids.to(tokens.device))

    def others_stop(self, input_ids: torch.Tensor, scores, in_step: InStep) -> list[bool]:
        """Which rows of the whole batch `others` stop at the text `input_ids` (B, T)."""
        batch_size = len(input_ids)
        stopped = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
        with in_step.watch(self.custom):
            for criterion in self.others:
                answer = criterion(input_ids, scores)
                if not isinstance(answer, torch.Tensor) or answer.shape != (batch_size,):
                    in_step.require(f"{name_of(criterion)} gives one answer for the whole batch, not one for each row.")
                stopped = stopped | answer
        if self.custom:  # which may look at a clock
            (stopped,) = told(stopped)
        return stopped.tolist()

    def time_is_up(self, input_ids: torch.Tensor) -> bool:
        return bool(self.timers) and bool(decided(lambda: bool(self.timers(input_ids, None).any())))


def with_stop_strings(criteria, stop_strings, tokenizer) -> StoppingCriteriaList:
    """`criteria`, and one for `stop_strings`: a callable strategy is not given the tokenizer.

    Raises:
        ValueError: there is no tokenizer to find them with.
    """
    criteria = StoppingCriteriaList(criteria or [])
    if stop_strings is None:
        return criteria
    if tokenizer is None:
        raise ValueError(f"stop_strings is {stop_strings!r}; pass tokenizer=... as well, to find them in the text.")
    if not any(isinstance(criterion, StopStringCriteria) for criterion in criteria):
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
    return criteria
