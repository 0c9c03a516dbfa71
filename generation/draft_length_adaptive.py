"""How much to draft by how much was drafted and accepted: the adaptive draft length of DiffuSpec (arXiv 2510.02358)."""

from __future__ import annotations

from math import floor

import torch

from .draft_length import DraftLength
from .proposal import Proposal, count_drafted


class AdaptiveDraftLength(DraftLength):
    """As many tokens as drafts had lately, their ends counted, and `GROWTH` more where as many were accepted; within
    bounds. The means of a batch stand for its rows. No clock decides, so that a call drafts the same each time.

    Args:
        least, most: tokens to draft. The first round drafts `most`.
    """

    SHARE = 0.5  # of the newest round in what is remembered
    GROWTH = 10

    def __init__(self, least: int, most: int):
        super().__init__(most)
        self.least, self.length = min(least, most), most
        self.drafted = self.accepted = 0.0  # tokens of a row; both fade
        self.of_round = 0.0

    def next(self, num_rows: int) -> int:
        return self.length

    def keep(self, proposal: Proposal, idle: torch.Tensor, started: float) -> int:
        drafts = proposal.tokens
        running = ~idle.to(drafts.device)
        if drafts.shape[1] and bool(running.any()):
            self.of_round = float(count_drafted(drafts)[running].float().mean())
        return drafts.shape[1]

    def record(self, num_rows, drafted, outcome, seconds, path=None) -> None:
        accepted = [count for count, added in outcome if added]  # others stopped earlier and are carried along
        if not drafted or not accepted:
            return
        self.drafted += self.SHARE * (self.of_round - self.drafted)
        self.accepted += self.SHARE * (sum(accepted) / len(accepted) - self.accepted)
        longer = self.GROWTH if self.accepted >= self.drafted else 0
        self.length = min(max(floor(self.drafted) + longer, self.least), self.most)
