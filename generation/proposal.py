"""What a drafter proposes for one round.

R rows that a pass carries, n tokens of a row, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch.nn import functional

from .argument import name_of
from .ranks import decided_numbers, shared_ranks, told

NO_TOKEN = -1
"""Stands where a row has nothing to draft."""


@dataclass
class Proposal:
    """What a drafter proposes.

    Attributes:
        tokens: (R, n), n up to the number that was asked for; NO_TOKEN (-1) from where a row has nothing to draft.
        confidences: how likely each token is accepted once those in front of it are, (R, n), if the drafter can tell.
        probabilities: the distributions that the tokens were sampled from, (R, n, V), if the drafter sampled them
            itself. `choose` remembers its own.
        parents: where the tokens are a tree, the place of the one that each follows, before its own place, (R, n); -1
            for the row's newest token. Tokens stand in the order in which the drafter believes in them: those in front
            are a tree as well. Where no tree was asked for, the path of first children is verified.
        depth: tokens of the tree's longest path at most, if the drafter knows; otherwise the host waits for a device to
            tell.
        sources: which of its drafter's `sources` each row is from, or each token, as booleans or integers, (R,) or
            (R, n); default the first.
    """

    tokens: torch.Tensor
    confidences: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    parents: torch.Tensor | None = None
    depth: int | None = None
    sources: torch.Tensor | None = None


def first_path(proposal: Proposal) -> Proposal:
    """Of a tree the first child of the newest token, that one's first child, and so on, as a chain."""
    tokens, confidences, probabilities, parents = (
        proposal.tokens,
        proposal.confidences,
        proposal.probabilities,
        proposal.parents,
    )
    assert parents is not None  # it is a tree
    rows, width = tokens.shape
    places = torch.arange(width, device=tokens.device)
    node, path = parents.new_full((rows, 1), -1), [parents.new_empty(rows, 0)]
    for _ in range(width):
        is_child = (parents == node) & (places > node) & (tokens != NO_TOKEN)
        node = torch.where(is_child, places, width).amin(dim=1, keepdim=True)  # `width` where there is none
        path.append(node)
    path = torch.cat(path, dim=1)
    path = path[:, : int((path < width).sum(dim=1).amax())]  # as deep as the deepest

    def along(values: torch.Tensor, filling: float) -> torch.Tensor:
        """Those of the path, and `filling` after it: (R, n, ...) -> (R, depth, ...)."""
        filled = functional.pad(values, (0, 0) * (values.ndim - 2) + (0, 1), value=filling)
        here = path.to(values.device)
        return filled[torch.arange(rows, device=here.device)[:, None], here]

    sources = proposal.sources
    if sources is not None and sources.ndim == 2:
        sources = along(sources, 0)
    return Proposal(
        along(tokens, NO_TOKEN),
        None if confidences is None else along(confidences, 0.0),
        None if probabilities is None else along(probabilities, 0.0),
        sources=sources,
    )


def to_verify(proposal: Proposal, keep: Callable[[], int]) -> Proposal:
    """The first `keep()` drafts of a proposal, as what it says of them is needed from here on. Where several processes
    share the target, all of them verify those of the first one."""
    tokens, parents, sources = proposal.tokens, proposal.parents, proposal.sources
    if shared_ranks() is None:
        kept = keep()
        sources = sources if sources is None or sources.ndim == 1 else sources[:, :kept]
        parents = None if parents is None else parents[:, :kept]
        return Proposal(tokens[:, :kept], parents=parents, depth=proposal.depth, sources=sources)
    depth = 0 if parents is None else proposal.depth or -1  # 0: a chain, -1: a tree that does not say
    kept, depth = decided_numbers(2, lambda: [keep(), depth])
    if not kept:
        return Proposal(tokens[:, :0])

    def fitted(values: torch.Tensor | None, filling: int) -> torch.Tensor:
        """(R, kept): another process may have drafted less."""
        values = tokens.new_empty(len(tokens), 0) if values is None else values.to(tokens)
        values = values[:, None].expand(-1, kept) if values.ndim == 1 else values[:, :kept]
        return functional.pad(values, (0, kept - values.shape[1]), value=filling)

    tokens, parents, sources = told(fitted(tokens, NO_TOKEN), fitted(parents, -1), fitted(sources, 0))
    return Proposal(tokens, parents=parents if depth else None, depth=depth if depth > 0 else None, sources=sources)


def check_proposal(proposal: Proposal, drafter, num_rows: int, num_tokens: int, vocab_size: int) -> None:
    """
    Raises:
        ValueError: what a broken drafter gave; the message names it.
    """

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"The drafter {name_of(drafter)} {what}")

    tokens = getattr(proposal, "tokens", None)
    if not isinstance(tokens, torch.Tensor):
        refuse(f"proposed a {type(proposal).__name__}; expected a Proposal, whose tokens are a tensor.")
    if tokens.ndim != 2 or len(tokens) != num_rows or tokens.shape[1] > num_tokens:
        refuse(
            f"proposed tokens of shape {tuple(tokens.shape)}; expected one row for each of the {num_rows} rows, and at "
            f"most {num_tokens} columns."
        )
    if tokens.dtype != torch.long:
        refuse(f"proposed tokens of {tokens.dtype}; expected torch.int64.")
    for name, ndim in (("confidences", 2), ("probabilities", 3), ("parents", 2)):
        value = getattr(proposal, name, None)
        if value is not None and (value.ndim != ndim or value.shape[:2] != tokens.shape):
            refuse(f"proposed {name} of shape {tuple(value.shape)} for tokens of shape {tuple(tokens.shape)}.")
    sources = getattr(proposal, "sources", None)
    if sources is not None and sources.shape not in (tokens.shape[:1], tokens.shape):
        refuse(
            f"proposed sources of shape {tuple(sources.shape)}; expected ({num_rows},), one for each row, or "
            f"{tuple(tokens.shape)}, one for each token."
        )
    if (parents := getattr(proposal, "parents", None)) is not None:
        if parents.dtype != torch.long:
            refuse(f"proposed parents of {parents.dtype}; expected torch.int64.")
        if bool(((parents < -1) | (parents >= torch.arange(parents.shape[1], device=parents.device))).any()):
            refuse("proposed parents that do not stand before their children; expected earlier places, or -1.")
    if not drafter.proposes_known_tokens and tokens.numel():
        lowest, highest = torch.stack(tokens.aminmax()).tolist()
        if lowest < NO_TOKEN or highest >= vocab_size:
            refuse(
                f"proposed tokens from {lowest} to {highest}; expected 0 to {vocab_size - 1}, or {NO_TOKEN} for none."
            )


def count_drafted(drafts: torch.Tensor) -> torch.Tensor:
    """How many tokens each row drafts, of (R, n): those in front of its first NO_TOKEN, (R,)."""
    return (drafts != NO_TOKEN).long().cumprod(dim=1).sum(dim=1)
