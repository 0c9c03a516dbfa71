"""How large the trees of a round are when the caller names no number ("auto")."""

from __future__ import annotations

import torch

from .draft_length_auto import AutoDraftLength, Experience
from .proposal import Proposal
from .proposal_tree import staying

SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""That come into question: among more of them each would be timed too seldom."""


class AutoTreeSize(AutoDraftLength):
    """`AutoDraftLength` where the number of tokens is that of a tree. Tokens stand in the order of their chances, so
    that a larger tree is a smaller one and what follows: each has a promise of its own, and trust is in its place.

    What pays at one row is a tree, at many rows a chain or nothing; a small tree of a sure drafter is a chain.

    Args:
        depth: tokens that it drafts at most one after the other.
        tree_size: and in all.
    """

    def __init__(self, depth: int, tree_size: int, start: int, experience: Experience):
        super().__init__(tree_size, start, experience)
        self.most, self.tree_size = depth, tree_size
        self.lengths = [size for size in SIZES if size < tree_size] + [tree_size]

    def _shares(self, trust):
        return trust

    def _chances(self, proposal: Proposal) -> torch.Tensor | None:
        if proposal.confidences is None or proposal.parents is None:  # a chain, such as of copies alone
            return super()._chances(proposal)
        depth = proposal.tokens.shape[1] if proposal.depth is None else proposal.depth
        return staying(proposal.confidences.nan_to_num(0.0), proposal.parents, depth)

    def _count_kept(self, drafted, outcome, path) -> None:
        rows = [row for row, (_, added) in enumerate(outcome) if added]
        fading, kept = self.FADING ** len(rows), [0] * drafted
        places = None if path is None else path.tolist()  # the host has just waited for the device
        for row in rows:
            accepted = outcome[row][0]
            for place in range(1, accepted + 1) if places is None else places[row][1 : accepted + 1]:
                kept[place - 1] += 1
        for place, promise in enumerate(self.promises[:drafted]):
            self.promised[place] = fading * self.promised[place] + len(rows) * promise
            self.kept[place] = fading * self.kept[place] + kept[place]
