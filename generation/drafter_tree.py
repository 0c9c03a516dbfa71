"""Trees from what drafters say of the slots after a text: the likeliest tokens first, under a budget.

The chance that a drafted token comes to stay is that of its parent, times its own. Whatever the budget, the tokens of
the highest chances are a tree, since no token has a higher one than its parent; and the expected number of accepted
drafts is the sum of these chances, which no other tree of the size exceeds.

R rows, w tokens of a row that are continued at once, C candidates after each, n tokens of a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from .proposal import NO_TOKEN, Proposal
from .proposal_tree import of_parents

LEAST_LOSS = 1e-3
"""By which a token is less likely than its parent, as a logarithm, however sure a drafter is."""

Candidates = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Slot, tokens (R, w) in front of it, and what these follow, as places among the tokens in front of the slot before
(R, w) -> candidates after each of them, and the logarithms of their chances, (R, w, C) each."""


def best_first(
    newest: torch.Tensor, num_tokens: int, tree_size: int, candidates: Candidates, width: int | None = None
) -> Proposal:
    """The likeliest `tree_size` tokens after the `newest` (R, 1) of each row, in at most `num_tokens` slots. The
    confidence of each is its chance, where its parent stays.

    Args:
        width: only so many tokens of a slot are continued, the likeliest.
    """
    rows = len(newest)
    tokens, places = newest, newest.new_full((rows, 1), -1)  # of the last slot, and where they are among all
    follows, chances = torch.zeros_like(newest), torch.zeros(rows, 1, device=newest.device)
    found: list[tuple[torch.Tensor, ...]] = []  # per slot: tokens, chances, those of their parents, parents
    count = 0
    for slot in range(num_tokens):
        ids, own = candidates(slot, tokens, follows)
        after = (chances[..., None] + own.to(chances).clamp(max=-LEAST_LOSS)).flatten(1)  # (R, w * C)
        after, index = after.topk(min(tree_size, after.shape[1]))
        follows = index // ids.shape[2]
        found.append((ids.flatten(1).gather(1, index), after, chances.gather(1, follows), places.gather(1, follows)))
        tokens, chances, follows = (part[:, :width] for part in (*found[-1][:2], follows))
        places = torch.arange(count, count + tokens.shape[1], device=tokens.device).expand(rows, -1)
        count += after.shape[1]
    tokens, chances, before, parents = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return likeliest(tokens, chances, before, parents, tree_size, num_tokens)


def likeliest(
    tokens: torch.Tensor,
    chances: torch.Tensor,
    before: torch.Tensor,
    parents: torch.Tensor,
    tree_size: int,
    depth: int,
    sources: torch.Tensor | None = None,
) -> Proposal:
    """The likeliest `tree_size` of tokens (R, N), by the logarithms of the chances that they and all `before` them
    stay, and of those before them alone, (R, N) each. `parents` (R, N) are places among them, -1 for the newest token;
    `depth` is that of the longest path."""
    best, order = chances.topk(min(tree_size, chances.shape[1]))
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
        depth=min(depth, order.shape[1]),
        sources=None if sources is None else sources.gather(1, order),
    )


def side_by_side(texts: torch.Tensor, chances: torch.Tensor) -> Proposal:
    """Several guesses (R, m, k) of how a row goes on, the best one first, as a tree: each a branch of its own.

    Args:
        chances: of each token, where those in front of it stay, if its guess were the only one, (R, m, k).
    """
    number, length = texts.shape[1:]
    agree = texts[:, :, None] == texts[:, None]  # (R, m, m, k)
    together = functional.pad(agree.long().cumprod(dim=3)[..., :-1], (1, 0), value=1).bool()
    earlier = torch.ones(number, number, dtype=torch.bool, device=texts.device).tril(-1)[..., None]
    # a token comes into question where an earlier guess, that was the same so far, is wrong
    taken = (chances[:, None] * (together & ~agree & earlier)).amax(dim=2)
    place = torch.arange(number * length, device=texts.device)
    return Proposal(
        texts.flatten(1),
        (chances * (1 - taken)).flatten(1).masked_fill(texts.flatten(1) == NO_TOKEN, 0.0),
        parents=torch.where(place % length == 0, -1, place - 1).expand(len(texts), -1),
        depth=length,
    )


def united(trees: Sequence[Proposal], tree_size: int) -> Proposal:
    """The likeliest `tree_size` tokens of several trees, each of which tells its confidences and how deep it is. What
    stands in more than one of them is there once, as likely as the surest of them says; the first one is its source."""
    tokens, own = (torch.cat([getattr(tree, name) for tree in trees], dim=1) for name in ("tokens", "confidences"))
    parents, sources, offset = [], [], 0
    for tree in trees:
        assert tree.parents is not None
        parents.append(torch.where(tree.parents < 0, -1, tree.parents + offset))
        sources.append(torch.zeros_like(tree.tokens) if tree.sources is None else tree.sources.to(tree.tokens))
        offset += tree.tokens.shape[1]
    follows = torch.cat(parents, dim=1)  # (R, N)
    depth = max(tree.depth or 0 for tree in trees)

    alike, place = tokens[:, :, None] == tokens[:, None], torch.arange(offset, device=tokens.device)
    first, after, same = place.expand_as(tokens), follows, alike
    for _ in range(depth):  # a slot further each time: equal tokens after the same one
        after = of_parents(first, follows, -1)
        same = alike & (after[:, :, None] == after[:, None])  # (R, N, N)
        first = same.long().argmax(dim=2)
    is_first = first == place
    own = (same * own[:, None]).amax(dim=2)
    # trees do not know of one another: of several tokens in one place no more than one is right
    together = ((after[:, :, None] == after[:, None]) & is_first[:, None]).to(own)
    own = own / (together @ own[..., None])[..., 0].clamp(min=1)
    own, chances = own.log().clamp(max=-LEAST_LOSS), torch.zeros_like(own)
    for _ in range(depth):
        chances = own + of_parents(chances, after, 0.0)
    before = of_parents(chances, after, 0.0)
    chances = chances.masked_fill(~is_first, -torch.inf)
    return likeliest(tokens, chances, before, after, tree_size, depth, torch.cat(sources, dim=1))


def complete(proposal: Proposal, device: torch.device) -> Proposal:
    """A drafter's tree, or chain, with all that trees are united by, on `device`. A drafter that tells nothing of its
    tokens is taken to be half sure of each; how deep its tree is, is no more than its tokens are."""
    tokens, told, parents = proposal.tokens.to(device), proposal.confidences, proposal.parents
    width = tokens.shape[1]
    told = torch.full(tokens.shape, 0.5, device=device) if told is None else told.to(device, torch.float32)
    chain = torch.arange(-1, width - 1, device=device).expand_as(tokens)
    return Proposal(
        tokens,
        told.nan_to_num(0.0).masked_fill(tokens == NO_TOKEN, 0.0),
        parents=chain if parents is None else parents.to(device),
        depth=width if proposal.depth is None or parents is None else proposal.depth,
    )
