"""Trees from what drafters say of the slots after a text: the likeliest tokens first, under a budget.

The chance that a drafted token comes to stay is that of its parent, times its own. Whatever the budget, the tokens of
the highest chances are a tree, since no token has a higher one than its parent; and the expected number of accepted
drafts is the sum of these chances, which no other tree of the size exceeds.

R rows, w tokens of a row that are continued at once, C candidates after each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .proposal import NO_TOKEN, Proposal

LEAST_LOSS = 1e-3
"""By which a token is less likely than its parent, as a logarithm, however sure a drafter is."""

Candidates = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Slot, and tokens (R, w) in front of it -> candidates after each of these, and the logarithms of their chances,
(R, w, C) each."""


def best_first(newest: torch.Tensor, num_tokens: int, tree_size: int, candidates: Candidates) -> Proposal:
    """The likeliest `tree_size` tokens after the `newest` (R, 1) of each row, in at most `num_tokens` slots. The
    confidence of each is its chance, where its parent stays."""
    rows = len(newest)
    tokens, places = newest, newest.new_full((rows, 1), -1)  # of the last slot, and where they are among all
    chances = torch.zeros(rows, 1, device=newest.device)
    found: list[tuple[torch.Tensor, ...]] = []  # per slot: tokens, chances, those of their parents, parents
    count = 0
    for slot in range(num_tokens):
        ids, own = candidates(slot, tokens)
        after = (chances[..., None] + own.clamp(max=-LEAST_LOSS)).flatten(1)  # (R, w * C)
        after, index = after.topk(min(tree_size, after.shape[1]))
        parent = index // ids.shape[2]
        found.append((ids.flatten(1).gather(1, index), after, chances.gather(1, parent), places.gather(1, parent)))
        tokens, chances = found[-1][:2]
        places = torch.arange(count, count + tokens.shape[1], device=tokens.device).expand(rows, -1)
        count += tokens.shape[1]
    tokens, chances, before, parents = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    best, order = chances.topk(min(tree_size, count))
    rank = torch.full_like(tokens, -1).scatter(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    tokens, before, parents = (part.gather(1, order) for part in (tokens, before, parents))
    is_there = best.isfinite()
    parents = torch.where(parents < 0, parents, rank.gather(1, parents.clamp(min=0)))
    return Proposal(
        tokens.masked_fill(~is_there, NO_TOKEN),
        (best - before).exp().masked_fill(~is_there, 0.0),
        parents=parents.masked_fill(~is_there, -1),
        depth=min(num_tokens, order.shape[1]),
    )
