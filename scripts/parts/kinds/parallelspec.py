"""Training of a ParallelSpec network (arXiv 2410.05589): groups of masks behind many positions of a text in one pass.
Saved in speculators' format of P-EAGLE."""

from __future__ import annotations

from typing import Any

import torch

from specformer.generation.drafter_parallelspec_network import ParallelSpecNetwork
from specformer.scripts.parts.kinds.eagle3 import EagleStudent
from specformer.scripts.parts.kinds.speculators import SWITCHES


class ParallelSpecStudent(EagleStudent):
    """It reads texts as an EAGLE-3 network does; see the module."""

    kind, name, title = "parallelspec", "PEagleSpeculator", "ParallelSpec"
    about = "a ParallelSpec drafter in speculators' format of P-EAGLE"
    algorithm = "peagle"
    switches = SWITCHES | {"mask_token_id"}
    slots_side_by_side = 8
    network: ParallelSpecNetwork

    @classmethod
    def with_mask(cls, fields, token) -> dict[str, Any]:
        return {"mask_token_id": token, **fields}

    @classmethod
    def build(cls, fields) -> ParallelSpecNetwork:
        network = super().build(fields)
        assert isinstance(network, ParallelSpecNetwork)
        torch.nn.init.normal_(network.mask_hidden)  # as large as states are
        return network

    def behind(self, groups, first, next_tokens, cache, length) -> torch.Tensor:
        slots, drafted = self.num_draft_tokens - 1, groups.taken(first)
        if not slots:
            return drafted
        places = groups.places(slots, 1)
        own = groups.own(slots, causal=True)
        seen = groups.visible(slots, length)
        seen = torch.cat([seen, own.expand(len(seen), 1, -1, -1)], dim=-1)
        masks = torch.full_like(places, self.network.config.mask_token_id)
        given = self.network(self.network.masks(*places.shape), self.embed(masks), places, cache, seen)
        return torch.cat([drafted, groups.taken(given)], dim=1)
