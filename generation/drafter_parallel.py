"""A causal LM that drafts all tokens in one pass, as mask tokens behind the text: PARD (arXiv 2504.18583).

Its config names the mask token, `pard_token`. Its logits at the newest token and at k - 1 masks behind are those of k
drafts.
"""

from __future__ import annotations

import torch

from .argument import whole_number
from .drafter_assistant import AssistantDrafter
from .proposal import Proposal


class ParallelDrafter(AssistantDrafter):
    """See the module; the arguments are those of `AssistantDrafter`."""

    def __init__(self, assistant, target, chunk_size: int | None = None):
        super().__init__(assistant, target, chunk_size)
        mask = whole_number(assistant.config.pard_token)
        if mask is None or not 0 <= mask < self.config.vocab_size:
            raise ValueError(
                f"pard_token of {assistant.name_or_path or type(assistant).__name__} is "
                f"{assistant.config.pard_token!r}; expected one of its {self.config.vocab_size} tokens."
            )
        self.mask = mask

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        masks = self.tokens.new_full((len(self.tokens), num_tokens - 1), self.mask)
        drafts = choose(self.read_with(masks)[0])
        # its tokens stay in the cache, but for the newest, so that there is one to read in any case; no mask does
        self.cache.advance(self.counts - 1, self.cache.longest + self.tokens.shape[1] - 1)
        self.leave_newest()
        return Proposal(drafts)
