"""A ParallelSpec network as a drafter: the first token from the last position that the target has read, the others from
masks behind it, all in one pass."""

from __future__ import annotations

import torch

from .drafter_eagle import EagleDrafter
from .drafter_parallelspec_network import ParallelSpecNetwork
from .proposal import Proposal


class ParallelSpecDrafter(EagleDrafter):
    """It reads the target's states as an EAGLE-3 drafter does; the arguments are the same."""

    network: ParallelSpecNetwork

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        self.read()
        states = self.state
        if num_tokens > 1:
            positions = self.cache.prepare(num_tokens - 1)
            masks = self.network.masks(*positions.shape)
            embeds = self.embed(torch.full_like(positions, self.network.config.mask_token_id))
            # the cache is not advanced: keys and values of masks are overwritten by what is read next
            given = self.network(masks, embeds, positions, self.cache, self.cache.mask(positions))
            states = torch.cat([states, given], dim=1)
        logits = self.network.lm_head(self.network.norm(states))
        return Proposal(choose(logits, token_ids=self.draft_token_ids))
