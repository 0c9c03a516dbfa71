"""Drafts that are a tree: several guesses at a position, each with its own continuation.

A pass reads each row's newest token and n drafted ones, a block of q = n + 1 places, of which place 0 is the newest
token. What a token follows is its parent, at an earlier place; where it stands in the text is its depth. So a token
sees the text before the block and its own ancestors, and of two siblings one at most comes to stay.

R rows that a pass carries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from .proposal import NO_TOKEN, Proposal


@dataclass(frozen=True)
class DraftTree:
    """
    Attributes:
        tokens: drafted, (R, n); NO_TOKEN where a row has fewer than others.
        parents: of these, places in the block, (R, n).
        depths: of the block's tokens, 0 of the newest one, (R, q).
        ancestors: which tokens of the block each one sees, itself among them, bool (R, q, q).
        depth: of the deepest token, known to the host.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    depth: int

    @classmethod
    def of(cls, tokens: torch.Tensor, proposal: Proposal, most_depth: int) -> DraftTree | None:
        """Of a proposal that is a tree its first `tokens` (R, n), as far as they are no deeper than `most_depth`;
        `None` for a chain.

        Where the drafter did not say how deep its tree is at most, the host waits for a device to tell.
        """
        if proposal.parents is None or not tokens.numel():
            return None
        parents, width = proposal.parents[:, : tokens.shape[1]] + 1, tokens.shape[1] + 1
        seen = functional.one_hot(functional.pad(parents, (1, 0)), width).bool()
        seen = seen | torch.eye(width, dtype=torch.bool, device=tokens.device)  # itself, and its parent
        for _ in range((width - 1).bit_length()):  # and twice as far back each time
            seen = (seen.float() @ seen.float()).bool()
        depths = seen.sum(dim=2) - 1
        missing = functional.pad(tokens == NO_TOKEN, (1, 0))
        is_there = ~(seen & missing[:, None]).any(dim=2)[:, 1:] & (depths[:, 1:] <= most_depth)
        depth = proposal.depth
        if depth is None or tokens.device.type == "cpu":  # which tells at once how deep it is in fact
            depth = int(depths[:, 1:].masked_fill(~is_there, 0).amax())
        depth = min(depth, most_depth, width - 1)
        return cls(tokens.masked_fill(~is_there, NO_TOKEN), parents, depths, seen, depth)

    def children(self, nodes: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The children of `nodes` (R, 1) that are `tokens` (R, 1), places (R, 1), and whether there are such, bool
        (R, 1). Of several the first."""
        is_child = (self.parents == nodes) & (self.tokens == tokens) & (self.tokens != NO_TOKEN)
        return is_child.long().argmax(dim=1, keepdim=True) + 1, is_child.any(dim=1, keepdim=True)

    def rows(self, of: Callable[[torch.Tensor], torch.Tensor]) -> DraftTree:
        """Of the tree of a whole batch that of some of its rows, which `of` selects."""
        return DraftTree(of(self.tokens), of(self.parents), of(self.depths), of(self.ancestors), self.depth)

    def drafted(self) -> torch.Tensor:
        """How deep each row's own tree is, (R,)."""
        return self.depths[:, 1:].masked_fill(self.tokens == NO_TOKEN, 0).amax(dim=1)


def staying(confidences: torch.Tensor, parents: torch.Tensor, depth: int) -> torch.Tensor:
    """How likely each token of a tree, no deeper than `depth`, comes to stay, by how likely that is where its parent
    does, (R, n) each."""
    chances = confidences
    for _ in range(depth - 1):  # a token further back each time
        chances = confidences * of_parents(chances, parents, 1.0)
    return chances


def of_parents(values: torch.Tensor, parents: torch.Tensor, of_newest: float) -> torch.Tensor:
    """What the parents of tokens have of `values`, (R, N) each, and `of_newest` where that is the newest token."""
    return torch.where(parents < 0, of_newest, values.gather(1, parents.clamp(min=0)))


def along(values: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """What a block has at the places `path` (R, p): (R, q, ...) -> (R, p, ...)."""
    rows, width = values.shape[:2]
    places = torch.arange(0, rows * width, width, device=values.device)[:, None] + path.to(values.device)
    # a row of memory at a time, where an index of two tensors goes number by number
    return values.flatten(0, 1).index_select(0, places.flatten()).view(*path.shape, *values.shape[2:])
