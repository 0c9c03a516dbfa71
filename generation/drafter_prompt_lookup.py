"""Drafts without a model: what followed the last time a row's newest tokens stood in its own text."""

from __future__ import annotations

import torch
from torch.nn import functional

from .drafter import Drafter, Prompts, Verified
from .proposal import NO_TOKEN, Proposal

FIRST_WIDTH = 256
"""New tokens that the buffer has room for at first; it doubles."""
PLACES, DIFFERENT = 16, 4
"""Places that are looked at where several copies are wanted, and how many different ones are taken of them."""


class PromptLookupDrafter(Drafter):
    """Prompt lookup (Saxena 2023; `prompt_lookup_num_tokens` of transformers), for every row of a batch at once.

    The longest suffix of a row, of at most `max_matching_ngram_size` tokens, that occurs earlier in the same row is
    looked up, the latest occurrence of several, and the tokens after it are drafted. Where the copy reaches the end of
    the row it goes on with itself, as a repeating text does. Rows without an occurrence draft nothing.
    """

    proposes_known_tokens = True
    can_rewind = True
    sources = ("copy",)

    def __init__(self, max_matching_ngram_size: int = 2, max_draft_tokens: int = Drafter.max_draft_tokens):
        self.max_matching_ngram_size, self.max_draft_tokens = max_matching_ngram_size, max_draft_tokens

    def begin(self, prompts: Prompts) -> None:
        layout = prompts.layout
        # Real tokens go to the front: (R, width), the first `lengths` of a row count
        self.ids = layout.compact(prompts.input_ids)[:, : layout.longest]
        self.lengths, self.longest = layout.lengths, layout.longest
        self.update(Verified(prompts.first_tokens, torch.ones_like(self.lengths), layout.longest))

    def propose(self, num_tokens, choose) -> Proposal:
        drafts, matched = self.find(num_tokens)
        if not matched.any():
            return Proposal(drafts[:, :0])
        return Proposal(drafts.masked_fill(matched[:, None] == 0, NO_TOKEN))

    def find(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies (R, num_tokens), and how many tokens in front of them stood there before (R,), 0 where none did."""
        source, matched = find_repetition(self.ids[:, : self.longest], self.lengths, self.max_matching_ngram_size)
        return self._copied(source[:, None], matched[:, None], num_tokens)[:, 0], matched

    def find_several(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies from several places (R, m, num_tokens), all of them different, and how many tokens in front of each
        stood there before (R, m), the most of them first; 0 where there are no more."""
        known = self.ids[:, : self.longest], self.lengths, self.max_matching_ngram_size
        source, matched = find_repetitions(*known, PLACES)
        copies = self._copied(source, matched, num_tokens)
        same = (copies[:, :, None] == copies[:, None]).all(dim=3)  # (R, places, places)
        place = torch.arange(copies.shape[1], device=copies.device)
        matched = matched * (same.long().argmax(dim=2) == place)
        order = (matched == 0).long().argsort(dim=1, stable=True)[:, :DIFFERENT]
        return copies.gather(1, order[..., None].expand(-1, -1, num_tokens)), matched.gather(1, order)

    def _copied(self, source: torch.Tensor, matched: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """What stands from `source` (R, m) on, (R, m, num_tokens), where something `matched` (R, m)."""
        source = torch.where(matched > 0, source, self.lengths[:, None] - 1)
        period = self.lengths[:, None] - source
        offsets = torch.arange(num_tokens, device=self.ids.device) % period[..., None]
        return self.ids.gather(1, (source[..., None] + offsets).flatten(1)).unflatten(1, (-1, num_tokens))

    def update(self, verified: Verified) -> None:
        tokens = verified.tokens
        width = self.longest + tokens.shape[1]
        if width > self.ids.shape[1]:
            extra = max(width, 2 * self.ids.shape[1], FIRST_WIDTH) - self.ids.shape[1]
            self.ids = functional.pad(self.ids, (0, extra))
        columns = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.ids.scatter_(1, columns, tokens.clamp(min=0))  # those after `counts` are written over, or never read
        self.lengths = self.lengths + verified.counts
        self.longest = verified.longest + 1  # the newest token, which the target has not read

    def select_rows(self, index, longest) -> None:
        self.ids, self.lengths, self.longest = self.ids[index], self.lengths[index], longest + 1

    def mark(self):
        return self.lengths, self.longest

    def rewind(self, mark) -> None:
        self.lengths, self.longest = mark  # what stands behind is written over


def find_repetition(ids: torch.Tensor, lengths: torch.Tensor, max_ngram_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the text goes on after the latest earlier occurrence of each row's longest repeated suffix.

    Args:
        ids: tokens (R, T), of which the first `lengths` (R,) count.
        max_ngram_size: longest suffix to look for.

    Returns:
        Index of the token after the occurrence (R,), and the length of the suffix (R,): 0 where not even the last
        token occurs earlier.
    """
    source, matched = find_repetitions(ids, lengths, max_ngram_size, 1)
    return source[:, 0], matched[:, 0]


def find_repetitions(
    ids: torch.Tensor, lengths: torch.Tensor, max_ngram_size: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for up to `count` occurrences of suffixes, the longest and then the latest first: (R, count) each."""
    size, width = min(max_ngram_size, ids.shape[1]), ids.shape[1]
    padded = functional.pad(ids, (size, 0), value=-1)
    windows = padded.unfold(1, size, 1)[:, 1:]  # (R, T, size): the last tokens up to each place
    suffix = padded.gather(1, lengths[:, None] + torch.arange(size, device=ids.device))
    same = (windows == suffix[:, None]).flip(2).to(torch.uint8)
    matched = same.cumprod(dim=2, dtype=torch.uint8).sum(dim=2)  # (R, T): how far back the text in front is the same
    place = torch.arange(width, device=ids.device)
    matched = matched * (place < lengths[:, None] - 1)
    best = (matched * width + place).topk(min(count, width), dim=1).indices  # the longest, and of several the latest
    return best + 1, matched.gather(1, best)
