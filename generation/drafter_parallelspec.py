"""A ParallelSpec network as a drafter: the first token from the last position that the target has read, the others from
masks behind it, all in one pass."""

from __future__ import annotations

import torch

from .drafter_eagle import CANDIDATES, EagleDrafter
from .drafter_parallelspec_network import ParallelSpecNetwork
from .drafter_tree import best_first
from .proposal import Proposal


class ParallelSpecDrafter(EagleDrafter):
    """It reads the target's states as an EAGLE-3 drafter does; the arguments are the same."""

    network: ParallelSpecNetwork

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        return Proposal(choose(self._logits(num_tokens), token_ids=self.draft_token_ids))

    @torch.no_grad()
    def propose_tree(self, num_tokens, tree_size, chances) -> Proposal:
        logits = self._logits(num_tokens)
        best, places = logits.topk(min(CANDIDATES, logits.shape[-1]))  # (R, k, C)
        ids = places if self.draft_token_ids is None else self.draft_token_ids[places]

        def candidates(slot: int, tokens: torch.Tensor, _) -> tuple[torch.Tensor, torch.Tensor]:
            of_slot, known = (part[:, slot, None].expand(-1, tokens.shape[1], -1) for part in (best, ids))
            return known, chances(of_slot, slot, known)

        return best_first(self.cache.lengths[:, None], num_tokens, tree_size, candidates)

    def _logits(self, num_tokens: int) -> torch.Tensor:
        """Of all slots, (R, num_tokens, V')."""
        self.read()
        states = self.state
        if num_tokens > 1:
            positions = self.cache.prepare(num_tokens - 1)
            masks = self.network.masks(*positions.shape)
            embeds = self.embed(torch.full_like(positions, self.network.config.mask_token_id))
            # the cache is not advanced: keys and values of masks are overwritten by what is read next
            given = self.network(masks, embeds, positions, self.cache, self.cache.mask(positions))
            states = torch.cat([states, given], dim=1)
        return self.network.lm_head(self.network.norm(states))
