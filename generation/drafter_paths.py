"""The likeliest path through the candidates of slots that were drafted at once: DiffuSpec's causal-consistency path
search (arXiv 2510.02358, equations 6 to 9).

Slots of a parallel drafter do not know one another's tokens. A beam goes through their candidates and weighs what the
drafter says of each slot against how likely each token follows the two in front of it.
"""

from __future__ import annotations

from collections.abc import Collection
from math import log
from typing import NamedTuple

import torch

from .argument import name_of
from .drafter import Drafter, Prompts, Verified
from .drafter_chains import RowTexts
from .drafter_system import DraftingSystem, Parts, is_system
from .drafter_trigrams import Pair, TrigramTable
from .proposal import NO_TOKEN, Proposal

Candidates = list[tuple[int, float]]
"""Tokens of a slot, with the logarithm of how likely the drafter takes each."""


class PathSearch(DraftingSystem):
    """Drafts of another drafter, whose tokens are those of the best path.

    The path is the same each time, also when sampling: it counts as certain, so every rule is exact, and drafts are
    accepted by how likely the target takes them. The drafter's own samples, which share the target's noise, are not
    used.

    Args:
        drafter: one that drafts its slots at once: a SpecFormer, DFlash or PARD network, `MaskedDiffusion`; anything
            that is an `assistant_model`.
        table: what follows what; it is adapted meanwhile. By default an empty one of its own.
        weight: of what the drafter says, from 0 to 1; the rest is the table's. 1 takes each slot's best token.
        width: paths that are gone on with.

    Raises:
        ValueError: a number out of range, or what is no table.
    """

    def __init__(self, drafter, table: TrigramTable | None = None, weight: float = 0.5, width: int = 3):
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight!r}; expected a number from 0 to 1.")
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"width is {width!r}; expected a positive integer: paths to go on with.")
        if table is not None and not callable(getattr(table, "after", None)):
            raise ValueError(f"table is a {name_of(table)}; expected a TrigramTable.")
        self.drafter, self.weight, self.width = drafter, weight, width
        self.table = TrigramTable() if table is None else table

    def drafter_for(self, target, parts: Parts) -> Drafter:
        self.table.check_fits(target)
        ends = getattr(target.generation_config, "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        return PathDrafter(parts.drafter(self.drafter, target), self.table, self.weight, self.width, ends)

    def finished(self, texts: list[list[int]]) -> None:
        if is_system(self.drafter):
            self.drafter.finished(texts)


class Path(NamedTuple):
    """
    Attributes:
        pair: the last two tokens.
        score: weighed logarithms, summed.
    """

    pair: Pair
    tokens: list[int]
    score: float
    has_ended: bool = False

    @property
    def mean(self) -> float:
        """By which paths of different lengths are compared: a sum would favour those that end at once."""
        return self.score / max(len(self.tokens), 1)


class PathDrafter(Drafter):
    """
    Args:
        drafter: whose slots are searched.
        ends: tokens behind which nothing is drafted.
    """

    MASS, MOST = 0.8, 15  # candidates of a slot: as many as have this mass together, and at most

    def __init__(self, drafter: Drafter, table: TrigramTable, weight: float, width: int, ends: Collection[int]):
        self.drafter, self.table, self.weight, self.width, self.ends = drafter, table, weight, width, set(ends)
        self.max_draft_tokens = drafter.max_draft_tokens
        self.default_num_assistant_tokens = drafter.default_num_assistant_tokens
        self.hidden_state_layers, self.reads_logits = drafter.hidden_state_layers, drafter.reads_logits
        self.own_draft_length = getattr(drafter, "own_draft_length", None)
        self.sources = drafter.sources

    def __enter__(self):
        self.drafter.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.drafter.__exit__(*exception)

    def begin(self, prompts: Prompts) -> None:
        self.drafter.begin(prompts)
        self.texts = RowTexts(self.table, prompts)

    def propose(self, num_tokens, choose) -> Proposal:
        self.behind = [Path((newest[0], newest[1]), [], 0.0) for newest in self.texts.newest]
        proposal = self.drafter.propose(num_tokens, self._choose)
        return Proposal(proposal.tokens, proposal.confidences, sources=proposal.sources)

    def _choose(self, logits: torch.Tensor, ahead: int | torch.Tensor = 0, token_ids: torch.Tensor | None = None):
        """In place of the call's `choose`: the tokens (R, n) of the best path through n slots, behind those that were
        chosen before."""
        found = []
        for row, slots in enumerate(self._candidates(logits, token_ids)):
            path = self._search(row, slots)
            self.behind[row] = path
            found.append(path.tokens[-len(slots) :] if len(path.tokens) >= len(slots) else path.tokens)
        shape = logits.shape[:2]
        rows = [tokens + [NO_TOKEN] * (shape[1] - len(tokens)) for tokens in found]
        return torch.tensor(rows, dtype=torch.long, device=logits.device).view(shape)

    def _candidates(self, logits: torch.Tensor, token_ids: torch.Tensor | None) -> list[list[Candidates]]:
        """Of each row and slot the likeliest tokens, as many as have `MASS` together, and those that end a text."""
        scores = logits.float().log_softmax(dim=-1)
        best, places = scores.topk(min(self.MOST, scores.shape[-1]))
        in_front = best.exp().cumsum(dim=-1) - best.exp()
        kept = (in_front < self.MASS).sum(dim=-1)
        if token_ids is None:
            tokens = places
            ends = [token for token in self.ends if token < scores.shape[-1]]
            at_ends = scores[..., ends]  # (R, n, E)
        else:
            token_ids = token_ids.to(logits.device).expand(scores.shape)
            tokens, ends, at_ends = token_ids.gather(-1, places), [], scores[..., :0]
        rows = zip(tokens.tolist(), best.tolist(), kept.tolist(), at_ends.tolist(), strict=True)
        return [
            [
                list({**dict(zip(ends, likely, strict=True)), **dict(zip(ids[:most], values, strict=False))}.items())
                for ids, values, most, likely in zip(*of_row, strict=True)
            ]
            for of_row in rows
        ]

    def _search(self, row: int, slots: list[Candidates]) -> Path:
        paths = [self.behind[row]]
        for candidates in slots:
            longer = [path for path in paths if path.has_ended]
            going_on = [path for path in paths if not path.has_ended]
            if not going_on:
                break
            chances = self.texts.chances([row] * len(going_on), [path.pair for path in going_on])
            for path, chance in zip(going_on, chances, strict=True):
                # what was never seen behind the pair shares what is left
                unseen = max(1.0 - sum(chance.values()), 1e-9) / self.MOST
                longer += [
                    Path(
                        (path.pair[1], token),
                        [*path.tokens, token],
                        path.score + self.weight * likely + (1 - self.weight) * log(chance.get(token, unseen)),
                        token in self.ends,
                    )
                    for token, likely in candidates
                ]
            paths = sorted(longer, key=lambda path: path.mean, reverse=True)[: self.width]
        return paths[0]

    def update(self, verified: Verified) -> None:
        self.drafter.update(verified)
        self.texts.update(verified)

    def select_rows(self, index, longest) -> None:
        self.drafter.select_rows(index, longest)
        self.texts.select_rows(index)
