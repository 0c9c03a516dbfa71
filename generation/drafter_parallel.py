"""A causal LM that drafts all tokens in one pass, as mask tokens behind the text: PARD (arXiv 2504.18583).

Its config names the mask token, `pard_token`. Its logits at the newest token and at k - 1 masks behind are those of k
drafts.
"""

from __future__ import annotations

import torch

from .argument import whole_number
from .drafter import Prompts, Verified
from .drafter_assistant import AssistantDrafter
from .proposal import Proposal
from .target import verify


class ParallelDrafter(AssistantDrafter):
    """See the module; the arguments are those of `AssistantDrafter`.

    Attributes:
        tokens: those of each row that it has not read yet, (R, q), of which counts (R,) are tokens; at least one is.
    """

    def __init__(self, assistant, target, chunk_size: int | None = None):
        super().__init__(assistant, target, chunk_size)
        mask = whole_number(assistant.config.pard_token)
        if mask is None or not 0 <= mask < self.config.vocab_size:
            raise ValueError(
                f"pard_token of {assistant.name_or_path or type(assistant).__name__} is "
                f"{assistant.config.pard_token!r}; expected one of its {self.config.vocab_size} tokens."
            )
        self.mask = mask

    def begin(self, prompts: Prompts) -> None:
        super().begin(prompts)
        self.tokens, self.counts = self.newest, torch.ones_like(self.newest[:, 0])

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        width = self.tokens.shape[1]
        place = torch.arange(width + num_tokens - 1, device=self.device)
        # behind each row's tokens come masks: those that are asked for, and some that nothing reads
        masks = self.tokens.new_full((len(self.tokens), num_tokens - 1), self.mask)
        block = torch.cat([self.tokens, masks], dim=1).masked_fill(place >= self.counts[:, None], self.mask)
        logits, _ = verify(self.assistant, self.cache, block)
        read = self.counts[:, None] - 1 + torch.arange(num_tokens, device=self.device)  # (R, k)
        drafts = choose(logits[torch.arange(len(read), device=self.device)[:, None], read])
        # of the block its tokens stay, but for the newest, so that there is one to read in any case
        self.cache.advance(self.counts - 1, self.cache.longest + width - 1)
        self.tokens, self.counts = self.tokens.gather(1, self.counts[:, None] - 1), torch.ones_like(self.counts)
        return Proposal(drafts)

    def update(self, verified: Verified) -> None:
        new, counts = self._known(verified.tokens), verified.counts.to(self.device)
        place = torch.arange(self.tokens.shape[1] + new.shape[1], device=self.device)
        # row r goes on with its own `tokens` and then with the new ones
        index = torch.where(place < self.counts[:, None], place, place - self.counts[:, None] + self.tokens.shape[1])
        both = torch.cat([self.tokens, new], dim=1)
        self.tokens = both.gather(1, index.clamp(max=both.shape[1] - 1))
        self.counts = self.counts + counts
        self.cache.longest = verified.longest  # no row has read more than the target
        self.tokens = self.tokens[:, : int(self.counts.amax())]

    def select_rows(self, index, longest) -> None:
        index = index.to(self.device)
        self.cache.select_rows(index, longest)
        self.tokens, self.counts = self.tokens[index], self.counts[index]
