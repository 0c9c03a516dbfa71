"""How large the trees of a round are when the caller names no number ("auto")."""

from __future__ import annotations

import torch

from .draft_length_auto import AutoDraftLength, Experience
from .proposal import Proposal
from .proposal_tree import staying

SIZES = (0, 1, 2, 3, 4, 5, 7, 11, 15, 23, 31, 47, 63)
"""That come into question: among more of them each would be timed too seldom. A pass is over one token more, and fills
the blocks of rows in which products are made, of 6 on a CPU, of 8 or 16 on a GPU: one more costs another block."""

LONGEST_CHAIN = 4
"""Fewer tokens than a tree is worth: whatever its size, it takes longer to make and to go through than a chain."""


class AutoTreeSize(AutoDraftLength):
    """`AutoDraftLength` where more than a few tokens are a tree. Its tokens stand in the order of their chances, so
    that a larger tree is a smaller one and what follows: each has a promise of its own, and trust is in its place.

    What pays is a tree where a pass over a few tokens more costs little, and a chain or nothing at many rows.

    Args:
        depth: tokens that it drafts at most one after the other.
        tree_size: and in all.
        longest_chain: up to so many are drafted as a chain.

    Attributes:
        tree_size: that number in rounds that draft a tree, 0 in others.
    """

    def __init__(self, depth: int, tree_size: int, start: int, experience: Experience, longest_chain: int = 0):
        super().__init__(tree_size, start, experience)
        self.most, self.largest, self.tree_size = depth, tree_size, tree_size
        self.longest_chain = min(longest_chain, depth)
        self.lengths = [size for size in SIZES if size < tree_size] + [tree_size]

    @property
    def widest(self) -> int:
        return max(self.most, self.largest)

    def next(self, num_rows: int) -> int:
        length = super().next(num_rows)
        self.tree_size = self.largest if length > self.longest_chain else 0
        return length

    def keep(self, proposal, idle, started) -> int:
        kept = super().keep(proposal, idle, started)
        if proposal.parents is not None and self.promises:
            known = self.experience
            known.of_trees = faded(
                known.of_trees or guess(self.largest), [1 - min(self.promises[0], 1.0), *self.promises]
            )
        return kept

    def _expected(self, promises: list[float]) -> list[float]:
        # a chain says nothing of what a tree would have had instead of going on
        wrong = 1 - min(promises[0], 1.0) if promises else 0.0
        seen, *trees = self.experience.of_trees or guess(self.largest)
        return super()._expected(
            [*promises, *(wrong * promise / max(seen, 1e-9) for promise in trees[len(promises) :])]
        )

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


def guess(size: int) -> list[float]:
    """What `faded` has to begin with: how likely the first token of a tree is wrong, and promises of `size` tokens.

    Those behind a chain's stand for what comes in place of its first token, and matter as that may be wrong: trees of
    the drafters for Qwen2.5-Coder and SmolLM2 have begun with an eighth of that, and less by a fourteenth from token to
    token."""
    return [1.0, *(0.125 * 0.93**place for place in range(-LONGEST_CHAIN, size - LONGEST_CHAIN))]


def faded(before: list[float], now: list[float], share: float = 0.1) -> list[float]:
    """Means of what was seen `before` and what is seen `now`, of which the latter is a `share`."""
    width = max(len(before), len(now))
    before, now = (part + [0.0] * (width - len(part)) for part in (before or now, now))
    return [old + share * (new - old) for old, new in zip(before, now, strict=True)]
