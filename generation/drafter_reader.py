"""Copies of a row's own text and of stored ones, in place of another drafter's drafts and behind them, or as branches
beside them (READER, arXiv 2508.09072)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from .argument import name_of, whole_number
from .drafter import Drafter, NoDrafter
from .drafter_copying import MOST_COPIED, CopyingDrafter, CopyRates, expected
from .drafter_prompt_lookup import DIFFERENT, PromptLookupDrafter
from .drafter_store import AnswerStore
from .drafter_suffixes import suffixes
from .drafter_system import DraftingSystem, Parts, is_system
from .drafter_tree import side_by_side
from .proposal import NO_TOKEN, Proposal, count_drafted, first_path
from .ranks import is_first


class Reader(DraftingSystem):
    """Rows are copied from where most of their newest tokens stand: in their own prompt and text, or in a store.

    With another drafter, each row of a round has its drafts or the copies, whichever are likelier accepted, and where
    text with its drafts behind stands somewhere, copies go on behind the drafts. Under "rejection" it drafts alone:
    what is copied would depend on what was drafted.

    Args:
        store: texts to copy from; each call also looks for what other processes have added. A store that may grow keeps
            the texts of finished calls.
        drafter: the other one, anything that is an `assistant_model`; `None`: all drafts are copies.
        num_tokens: that a round copies at most, also behind the other's drafts.

    Raises:
        ValueError: what is no store, or no number.
    """

    def __init__(self, store: AnswerStore | None = None, drafter=None, num_tokens: int = MOST_COPIED):
        if store is not None and not callable(getattr(store, "grow", None)):
            raise ValueError(f"store is a {name_of(store)}; expected an AnswerStore, or None for copies alone.")
        if (whole_number(num_tokens) or 0) < 1:
            raise ValueError(f"num_tokens is {num_tokens!r}; expected a positive integer: tokens to copy in a round.")
        self.store, self.drafter, self.num_tokens = store, drafter, int(num_tokens)
        self.own_rates, self.store_rates = CopyRates(), CopyRates()  # of copies from the text, and from the store

    def drafter_for(self, target, parts: Parts) -> Drafter:
        if self.store is not None:
            self.store.refresh()
            size = target.config.get_text_config(decoder=True).vocab_size
            if (largest := self.store.largest_token) >= size:
                raise ValueError(
                    f"The store {self.store.folder} holds the token {largest}, and the target has {size} tokens: it is "
                    "of another tokenizer. Pass a store of this target's answers."
                )
        other = NoDrafter() if self.drafter is None else parts.drafter(self.drafter, target)
        if self.drafter is not None and parts.text_depends_on_drafts:
            return other
        return ReaderDrafter(other, self.num_tokens, self.own_rates, self.store, self.store_rates)

    def finished(self, texts: list[list[int]]) -> None:
        if self.store is not None and is_first():
            self.store.grow(texts)
        if is_system(self.drafter):
            self.drafter.finished(texts)


class ReaderDrafter(CopyingDrafter):
    """
    Args:
        drafter, num_tokens, rates: as in `CopyingDrafter`.
        store_rates: of copies from the store.
    """

    LEAST_IN_STORE = 2  # tokens that must agree: one stands nearly everywhere
    LEAST_BEHIND = 3  # the same behind drafts, which may be wrong

    def __init__(self, drafter, num_tokens: int, rates: CopyRates, store: AnswerStore | None, store_rates: CopyRates):
        super().__init__(drafter, num_tokens, rates)
        self.store, self.store_rates = store, store_rates
        self.default_num_assistant_tokens = self.default_num_assistant_tokens or num_tokens
        self.proposes_known_tokens = drafter.proposes_known_tokens and store is None
        # of this round: copies behind drafts (R, k), after how many tokens that stood there before (R,), 0 where none
        # is used, the drafts (R, n), how many they are (R,), and whether the copies are the store's (R,)
        self.behind: tuple[torch.Tensor, ...] | None = None

    def begin(self, prompts) -> None:
        super().begin(prompts)
        self.store_rates.to(prompts.input_ids.device)
        # rows whose copies are the store's, of the last search, (R,)
        self.stored = torch.zeros_like(prompts.layout.lengths, dtype=torch.bool)

    def copies(self, lookup, num_tokens):
        copies, matched, chances = super().copies(lookup, num_tokens)
        self.stored = torch.zeros_like(matched, dtype=torch.bool)
        if self.store is None:
            return copies, matched, chances
        found, agree = self.store.find(suffixes(lookup.ids, lookup.lengths), num_tokens)
        agree = agree * (agree >= self.LEAST_IN_STORE)
        likely = self.store_rates.chances(agree, num_tokens) * (found != NO_TOKEN)
        self.stored = expected(likely) > expected(chances)
        stored = self.stored[:, None]
        return (
            torch.where(stored, found, copies),
            torch.where(self.stored, agree, matched),
            torch.where(stored, likely, chances),
        )

    def propose(self, num_tokens, choose) -> Proposal:
        proposal = super().propose(num_tokens, choose)
        in_place, self.behind = self.stored, None
        if self.copied is not None:
            proposal = self._deepened(proposal, num_tokens, self.copied[1] > 0)
        self.stored = in_place
        return proposal

    def propose_tree(self, num_tokens, tree_size, chances) -> Proposal:
        in_place, self.behind = self.stored, None
        proposal = super().propose_tree(num_tokens, tree_size, chances)
        self.stored = in_place
        return proposal

    def branches(self, num_tokens):
        trees, surest = super().branches(num_tokens)
        if self.store is None:
            return trees, surest
        copies, shares, agree = self.store.find_several(
            suffixes(self.lookup.ids, self.lookup.lengths), num_tokens, DIFFERENT
        )
        agree = agree * (agree >= self.LEAST_IN_STORE)
        rates = self.store_rates.chances(agree, num_tokens)
        likely = rates[:, None] * shares
        likely[:, 0] = rates * (shares[:, 0] > 0)  # they are of the first one
        self.followed.append((self.store_rates, copies[:, 0], agree))
        surest = torch.where((expected(likely[:, 0]) > expected(surest))[:, None], likely[:, 0], surest)
        return [*trees, side_by_side(copies, likely)], surest

    def of_other(self, tree, num_tokens):
        """Copies go on behind the likeliest of its paths."""
        trees, path = super().of_other(tree, num_tokens), first_path(tree)
        deeper = self._deepened(path, num_tokens, torch.zeros_like(self.running))
        if deeper is path:
            return trees
        place = torch.arange(deeper.tokens.shape[1], device=path.tokens.device)
        sources = (place < count_drafted(path.tokens)[:, None]).long()
        assert deeper.confidences is not None
        return [*trees, replace(side_by_side(deeper.tokens[:, None], deeper.confidences[:, None]), sources=sources)]

    def _deepened(self, proposal: Proposal, num_tokens: int, is_copied: torch.Tensor) -> Proposal:
        """With copies behind the drafts of rows that are not copied themselves."""
        drafted = count_drafted(proposal.tokens)  # (R,)
        open_ended = ~is_copied & (drafted > 0) & (drafted < num_tokens) & self.running
        if not open_ended.any():
            return proposal
        copies, matched, chances = self.copies(with_drafts(self.lookup, proposal.tokens, drafted), num_tokens)
        matched = matched * (open_ended & (matched >= self.LEAST_BEHIND))
        self.behind = copies, matched, proposal.tokens, drafted, self.stored
        width = proposal.tokens.shape[1]
        tokens = functional.pad(proposal.tokens, (0, num_tokens - width), value=NO_TOKEN)
        place = torch.arange(num_tokens, device=tokens.device) - drafted[:, None]  # (R, k), among the copies
        is_behind = (place >= 0) & (matched > 0)[:, None]
        tokens = torch.where(is_behind, copies.gather(1, place.clamp(min=0)), tokens)
        confidences = proposal.confidences
        if confidences is not None:
            confidences = functional.pad(confidences, (0, num_tokens - width))
            confidences = torch.where(is_behind, chances.gather(1, place.clamp(min=0)).to(confidences), confidences)
        return Proposal(tokens, confidences, sources=proposal.sources)

    def update(self, verified) -> None:
        behind, self.behind = self.behind, None
        super().update(verified)
        if behind is not None:
            copies, matched, drafts, drafted, self.stored = behind
            width = verified.tokens.shape[1]
            place = torch.arange(width, device=drafted.device)
            drafts = functional.pad(drafts, (0, max(width - drafts.shape[1], 0)), value=NO_TOKEN)[:, :width]
            was_written = ((drafts == verified.tokens) | (place >= drafted[:, None])).all(dim=1)  # of a tree's branches
            further = verified.tokens.gather(1, (drafted[:, None] + place).clamp(max=width - 1))
            self.count(copies, matched * was_written, further, (verified.counts - drafted).clamp(min=0))

    def count(self, copies, matched, tokens, counts) -> None:
        super().count(copies, matched * ~self.stored, tokens, counts)
        self.store_rates.count(matched * self.stored, copies[:, : tokens.shape[1]], tokens, counts)

    def rewind(self, mark) -> None:
        super().rewind(mark)
        self.behind = None


def with_drafts(lookup: PromptLookupDrafter, drafts: torch.Tensor, drafted: torch.Tensor) -> PromptLookupDrafter:
    """`lookup` as if each row's text had the first `drafted` (R,) of `drafts` (R, k) behind it."""
    longer = PromptLookupDrafter(lookup.max_matching_ngram_size)
    width = drafts.shape[1]
    longer.ids = functional.pad(lookup.ids[:, : lookup.longest], (0, width))
    place = lookup.lengths[:, None] + torch.arange(width, device=drafts.device)
    longer.ids.scatter_(1, place, drafts.clamp(min=0))
    longer.lengths, longer.longest = lookup.lengths + drafted, lookup.longest + width
    return longer
