"""The network of a ParallelSpec drafter (arXiv 2410.05589), by the tensor names of speculators' P-EAGLE (2602.01469).

It is an EAGLE-3 network whose layer drafts all tokens in one pass: behind the last position that the target has read
come masks, one for each further token. A mask has the embedding of a mask token and, in the place of the target's
states, states that were learnt; it sees the text and the masks in front of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .drafter_eagle_network import EagleConfig, EagleNetwork


@dataclass
class ParallelSpecConfig(EagleConfig):
    """As `EagleConfig`, and `mask_token_id`: whose embedding each mask has."""

    mask_token_id: int = 0

    @classmethod
    def from_dict(cls, config: dict, where: str) -> ParallelSpecConfig:
        """
        Raises:
            ValueError: a field that is needed is missing, or its value is of no use.
        """
        parsed = super().from_dict({"embed_requires_grad": True, **config}, where)
        assert isinstance(parsed, cls)
        mask = config.get("mask_token_id")
        if type(mask) is not int or not 0 <= mask < parsed.layer.vocab_size:
            raise ValueError(
                f"{where}: mask_token_id is {mask!r}; expected a token of the {parsed.layer.vocab_size:,} that there "
                "are."
            )
        parsed.mask_token_id = mask
        return parsed


class ParallelSpecNetwork(EagleNetwork):
    """See the module. `mask_hidden` (1, 1, S * d_t) stands for the target's states at a mask."""

    kind = "ParallelSpec"
    config: ParallelSpecConfig

    def __init__(self, config: ParallelSpecConfig):
        super().__init__(config)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, self.fc.in_features))

    def masks(self, rows: int, count: int) -> torch.Tensor:
        """Fused states of masks, (rows, count, d)."""
        learnt = self.mask_hidden.view(1, 1, self.config.num_states, self.config.target_hidden_size)
        return self.fuse(learnt).expand(rows, count, -1)
