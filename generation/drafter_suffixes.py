"""Where in many texts a suffix stands, and how they go on there: binary search among all contexts, which are sorted
backwards.

Texts are one tensor of tokens, with NO_TOKEN in front of each text. N tokens, R suffixes, D tokens of a context.
"""

from __future__ import annotations

import torch

from .proposal import NO_TOKEN

DEPTH = 16
"""Tokens of a context: contexts that agree so far back are the same."""
NOTHING = -2
"""Stands in a suffix where the text has not begun yet: equal to no token of a text."""
VOTERS = 32
"""Places that are asked how a text goes on, of those that agree with it; evenly from all."""


def in_one(texts: list[list[int]]) -> torch.Tensor:
    """Texts as one tensor, (N,) of int32."""
    parts = [torch.tensor([NO_TOKEN, *text], dtype=torch.int32, device="cpu") for text in texts]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device="cpu")


def sorted_places(tokens: torch.Tensor) -> torch.Tensor:
    """Places of the tokens (N,) that follow another one of their text, sorted by what stands in front of them,
    backwards: (M,) of int32. The rank of 2n tokens in front follows from that of n, and of the n in front of these."""
    if not len(tokens):
        return tokens
    before = torch.cat([tokens.new_full((1,), NO_TOKEN), tokens[:-1]])
    rank, reach = torch.unique(before, return_inverse=True)[1], 1
    while reach < DEPTH:
        # in front of the first text there is nothing, as in front of its first token, whose rank is 0
        further = torch.cat([rank.new_zeros(min(reach, len(rank))), rank[:-reach]])
        rank = torch.unique(rank * (rank.max() + 1) + further, return_inverse=True)[1]
        reach *= 2
    order = rank.argsort(stable=True)
    return order[(before[order] != NO_TOKEN) & (tokens[order] != NO_TOKEN)].to(torch.int32)


def suffixes(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The last tokens of texts (R, T), of which the first `lengths` (R,) count, the newest first: (R, D)."""
    place = lengths[:, None] - 1 - torch.arange(DEPTH, device=ids.device)
    return ids.gather(1, place.clamp(min=0)).masked_fill(place < 0, NOTHING)


class SortedTexts:
    """Texts (N,), and the sorted places of their tokens (M,), which may be memory-mapped."""

    def __init__(self, tokens: torch.Tensor, places: torch.Tensor):
        self.tokens, self.places = tokens, places

    def __len__(self) -> int:
        return len(self.tokens)

    def find(self, suffixes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which places have most of `suffixes` (R, D) in front of them: from the first (R,) to before the last (R,)
        in sorted order, and how many tokens agree (R,), 0 if none."""
        depth = torch.full_like(suffixes[:, 0], DEPTH)
        if not len(self.places):
            return depth * 0, depth * 0, depth * 0
        near = self._bisect(suffixes, depth, after=False)
        # the longest is next to where the suffix itself would stand
        matched = torch.maximum(self._agreeing(suffixes, near - 1), self._agreeing(suffixes, near))
        return self._bisect(suffixes, matched, after=False), self._bisect(suffixes, matched, after=True), matched

    def continuations(self, first: torch.Tensor, last: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The most frequent token after those places, the most frequent one after it where it stands, and so on:
        (R, num_tokens), NO_TOKEN from where texts end."""
        here, votes = self._voters(first, last)
        chosen = []
        for _ in range(num_tokens):
            token = self.tokens[here.clamp(max=len(self.tokens) - 1)].long()
            votes = votes & (token != NO_TOKEN) & (here < len(self.tokens))
            agree = (token[:, :, None] == token[:, None, :]) & votes[:, None, :] & votes[:, :, None]
            most, best = agree.sum(dim=2).max(dim=1, keepdim=True)
            chosen.append(token.gather(1, best).masked_fill(most == 0, NO_TOKEN))  # (R, 1)
            votes, here = votes & (token == chosen[-1]), here + 1
        return torch.cat(chosen, dim=1)

    def different(
        self, first: torch.Tensor, last: torch.Tensor, num_tokens: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Up to `count` ways in which texts go on after those places, all of them different: first the one that agrees
        with others furthest, then that of those which do not go on so, and so on. Tokens (R, count, num_tokens), and
        which share of the texts that are the same so far has each of them, of the same shape; NO_TOKEN and 0 from where
        there are none."""
        here, votes = self._voters(first, last)
        place = here[..., None] + torch.arange(num_tokens, device="cpu")  # (R, voters, n)
        texts = self.tokens[place.clamp(max=len(self.tokens) - 1)].long()
        goes_on = votes[..., None] & (texts != NO_TOKEN) & (place < len(self.tokens))
        goes_on = goes_on.long().cumprod(dim=2).bool()
        same = (texts[:, :, None] == texts[:, None]) & goes_on[:, :, None] & goes_on[:, None]
        same = same.long().cumprod(dim=3)  # (R, voters, voters, n)
        agree, left = same.sum(dim=3), goes_on[..., 0]
        chosen, shares = [], []
        for _ in range(count):
            best = (agree * left[:, None]).sum(dim=2).masked_fill(~left, -1).argmax(dim=1)  # (R,)
            rows = torch.arange(len(best), device="cpu")
            is_there = goes_on[rows, best] & left.any(dim=1)[:, None]  # (R, n)
            chosen.append(texts[rows, best].masked_fill(~is_there, NO_TOKEN))
            number = same[rows, best].sum(dim=1)  # (R, n), of texts that go on so
            before = torch.cat([goes_on[..., 0].sum(dim=1, keepdim=True), number[:, :-1]], dim=1)
            shares.append(number / before.clamp(min=1) * is_there)
            left = left & (agree[rows, best] < agree[rows, best, best, None])
        return torch.stack(chosen, dim=1), torch.stack(shares, dim=1)

    def _voters(self, first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the sorted places from `first` to before `last` (R,) those that are asked, where they are, and whether
        there is one, (R, voters)."""
        voter = torch.arange(VOTERS, device="cpu")
        count = (last - first)[:, None]  # (R, 1)
        index = first[:, None] + torch.where(count > VOTERS, voter * count // VOTERS, voter)
        return self._places(index), index < last[:, None]

    def _places(self, index: torch.Tensor) -> torch.Tensor:
        places = self.places[index.clamp(0, len(self.places) - 1)].long()
        return places.clamp(0, len(self.tokens) - 1)  # also of a file that is broken

    def _contexts(self, index: torch.Tensor) -> torch.Tensor:
        """What stands in front of the places at `index` (R,) in sorted order, the newest first: (R, D)."""
        place = self._places(index)[:, None] - 1 - torch.arange(DEPTH, device="cpu")
        return self.tokens[place.clamp(min=0)].long().masked_fill(place < 0, NO_TOKEN)

    def _agreeing(self, suffixes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return (self._contexts(index) == suffixes).long().cumprod(dim=1).sum(dim=1)

    def _bisect(self, suffixes: torch.Tensor, depth: torch.Tensor, after: bool) -> torch.Tensor:
        """Where in sorted order contexts begin that are not before the first `depth` (R,) tokens of a suffix, or those
        that are `after` them: (R,)."""
        low, high = torch.zeros_like(depth), torch.full_like(depth, len(self.places))
        counted = torch.arange(DEPTH, device="cpu") < depth[:, None]
        for _ in range(len(self.places).bit_length()):
            middle = (low + high) // 2
            contexts = self._contexts(middle)
            differs = (contexts != suffixes) & counted
            at = differs.long().argmax(dim=1, keepdim=True)
            sign = (contexts - suffixes).gather(1, at)[:, 0].sign() * differs.any(dim=1)
            right = ((sign <= 0) if after else (sign < 0)) & (low < high)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        return low
