"""Stopping criteria under speculation, sorted by how they are evaluated."""

from __future__ import annotations

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList


class StoppingRules:
    """
    Attributes:
        eos_token_ids: ids that end a row, or `None`. Checked for all new tokens at once.
        max_length: columns, prompt and padding included, at which generation ends.
        timers: `max_time`, asked once a round for the whole batch.
        others: stop strings and custom criteria. They are asked token by token about text that plain generate() would
            show them: the whole batch in its original order, all rows at one length.
        pads: whether plain generate() pads a row that has stopped, which it does when a criterion has an
            `eos_token_id`. Otherwise it goes on writing real tokens into the row until all rows have stopped.
    """

    def __init__(self, criteria: StoppingCriteriaList, max_length: int):
        eos = [criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.eos_token_ids = torch.cat([ids.flatten() for ids in eos]) if eos else None
        limits = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        self.max_length = min([max_length, *limits])
        self.timers = StoppingCriteriaList(c for c in criteria if type(c) is MaxTimeCriteria)
        known = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
        self.others = StoppingCriteriaList(criterion for criterion in criteria if type(criterion) not in known)
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    def first_eos(self, tokens: torch.Tensor) -> torch.Tensor:
        """Offset of the first end-of-sequence token in each row of `tokens` (R, q); q where there is none: (R,)."""
        if self.eos_token_ids is None:
            return tokens.new_full((len(tokens),), tokens.shape[1])
        is_eos = torch.isin(tokens, self.eos_token_ids.to(tokens.device))
        return (~is_eos).long().cumprod(dim=1).sum(dim=1)

    def time_is_up(self, input_ids: torch.Tensor) -> bool:
        return bool(self.timers) and bool(self.timers(input_ids, None).any())
