"""A drafter that copies where the text repeats itself, and drafts by itself elsewhere."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from .drafter import Drafter, Prompts, Verified
from .drafter_prompt_lookup import PromptLookupDrafter
from .drafter_tree import complete, side_by_side, united
from .proposal import NO_TOKEN, Proposal
from .ranks import decided

MOST_COPIED = 8
"""Tokens that are copied each round where no number is given."""


class CopyRates:
    """How likely a copied token is right once those in front of it are, by how many tokens in front of it stood there
    before, the copied ones included.

    What was seen fades; at first it is what greedy answers of SmolLM2-135M-Instruct showed.
    """

    FIRST = (0.25, 0.53, 0.64, 0.69, 0.75, 0.77, 0.8, 0.8, 0.85, 0.85, 0.85, 0.88, 0.88, 0.9, 0.9, 0.95)
    FIRST_WEIGHT = 16.0  # how many copied tokens that is worth
    FADING = 0.99  # a round later

    def __init__(self):
        self.first = self.FIRST_WEIGHT * torch.tensor((0.0, *self.FIRST), device="cpu")  # until a call has moved it
        self.seen, self.right = torch.full_like(self.first, self.FIRST_WEIGHT), self.first

    def to(self, device: torch.device) -> CopyRates:
        self.first, self.seen, self.right = (part.to(device) for part in (self.first, self.seen, self.right))
        return self

    def chances(self, matched: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """For copies after `matched` tokens (R,) that stood there before: (R, num_tokens), 0 after none."""
        return (self.right / self.seen)[self._lengths(matched, num_tokens)] * (matched > 0)[:, None]

    def count(self, matched: torch.Tensor, copies: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Of `copies` (R, k), the text went on with the first `counts` (R,) of `tokens` (R, k or more). Rows with
        `matched` 0 copied nothing, and where a stored text ends it is NO_TOKEN. Nothing is known of copies behind a
        wrong one."""
        width = copies.shape[1]
        same = copies == tokens[:, :width]  # (R, k)
        reached = functional.pad(same.long().cumprod(dim=1)[:, :-1], (1, 0), value=1).bool()  # beside it in a tree
        copied = (matched > 0)[:, None] & (copies != NO_TOKEN)
        decided = copied & reached & (torch.arange(width, device=matched.device) < counts[:, None])
        is_right = decided & same
        lengths = self._lengths(matched, width).flatten()
        # new tensors, since those of a call in inference mode could not be changed in another one
        seen = self.FADING * (self.seen - self.FIRST_WEIGHT) + self.FIRST_WEIGHT
        right = self.FADING * (self.right - self.first) + self.first
        self.seen = seen.index_add(0, lengths, decided.flatten().to(seen.dtype))
        self.right = right.index_add(0, lengths, is_right.flatten().to(right.dtype))

    def _lengths(self, matched: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """How much stood there before each copied token, (R, num_tokens)."""
        return (matched[:, None] + torch.arange(num_tokens, device=matched.device)).clamp(max=len(self.FIRST))


def expected(chances: torch.Tensor) -> torch.Tensor:
    """How many drafts are accepted, of slots with `chances` (R, k) once those in front of them are: (R,)."""
    return chances.cumprod(dim=1).sum(dim=1)


class CopyingDrafter(Drafter):
    """Each row's drafts are copied from its own text, or another drafter's: those of which more are likely right.

    A copy is what followed the last time that the row's newest tokens stood in it. What is copied depends on what the
    other drafter says, so this is for rules whose text does not depend on the drafts.

    Args:
        drafter: the other one. It must not mind that others are verified than it proposed. With a `NoDrafter` all
            drafts are copies.
        num_tokens: that a round copies at most, if that is more than the other drafter drafts.
        rates: of the calls before; this one adds to them.
        max_matching_ngram_size: longest run of newest tokens that is looked for.
    """

    SURE = 0.6  # expected share of right copies that the other drafter is not asked to beat
    LEAST_MATCHED = 2  # tokens that must have stood there before, where the other drafter does not tell how sure it is

    def __init__(self, drafter, num_tokens: int, rates: CopyRates, max_matching_ngram_size: int | None = None):
        self.drafter, self.rates = drafter, rates
        self.lookup = PromptLookupDrafter(max_matching_ngram_size or len(rates.FIRST))
        self.max_draft_tokens = max(drafter.max_draft_tokens, num_tokens)
        self.default_num_assistant_tokens = drafter.default_num_assistant_tokens
        self.hidden_state_layers, self.reads_logits = drafter.hidden_state_layers, drafter.reads_logits
        self.proposes_known_tokens = drafter.proposes_known_tokens
        self.proposes_trees = getattr(drafter, "proposes_trees", False) or not drafter.max_draft_tokens
        self.can_rewind = getattr(drafter, "can_rewind", False)  # not in older copies of this code
        self.sources = ("copy", *drafter.sources[:1])
        self.knows_confidence = False  # whether the other drafter tells how sure it is
        # of this round: the copies (R, k), and how much stood in front of them before (R,); 0 where none is used
        self.copied: tuple[torch.Tensor, torch.Tensor] | None = None
        # the same of a tree: rates, and the copies that they are counted of
        self.followed: list[tuple[CopyRates, torch.Tensor, torch.Tensor]] = []

    def __enter__(self):
        self.drafter.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.drafter.__exit__(*exception)

    def begin(self, prompts: Prompts) -> None:
        self.drafter.begin(prompts)
        self.lookup.begin(prompts)
        self.rates.to(prompts.input_ids.device)
        self.running = torch.ones_like(prompts.layout.lengths, dtype=torch.bool)  # (R,)

    def propose(self, num_tokens, choose) -> Proposal:
        copies, matched, chances = self.copies(self.lookup, num_tokens)
        own = min(num_tokens, self.drafter.max_draft_tokens)
        if not own or self._needs_no_other(chances[:, :own]):
            self.copied = copies, matched
            return Proposal(copies.masked_fill(matched[:, None] == 0, NO_TOKEN), chances)
        proposal = self.drafter.propose(own, choose)
        drafts, confidences = proposal.tokens.to(copies.device), proposal.confidences
        drafted, self.knows_confidence = drafts.shape[1], confidences is not None
        if confidences is None:
            is_own = matched < self.LEAST_MATCHED
        else:
            confidences = functional.pad(confidences.to(chances), (0, num_tokens - drafted))  # (R, k)
            is_own = expected(chances) <= expected(confidences)
            confidences = torch.where(is_own[:, None], confidences, chances)
        self.copied = copies, matched.masked_fill(is_own, 0)
        drafts = functional.pad(drafts, (0, num_tokens - drafted), value=NO_TOKEN)
        return Proposal(torch.where(is_own[:, None], drafts, copies), confidences, sources=is_own)

    def propose_tree(self, num_tokens, tree_size, chances) -> Proposal:
        """Copies from several places are branches of the other drafter's tree, which keeps the likeliest tokens."""
        trees, surest = self.branches(min(num_tokens, tree_size))
        if surest.device.type == "cpu" and not surest.any():  # a GPU is not waited for
            trees = []
        own = min(num_tokens, self.drafter.max_draft_tokens)
        if own and not self._needs_no_other(surest[:, :own]):
            tree = complete(self.drafter.propose_tree(own, tree_size, chances), surest.device)
            self.knows_confidence = True
            of_other = self.of_other(tree, num_tokens)
            return united([*trees, *of_other], tree_size) if trees or len(of_other) > 1 else of_other[0]
        return united(trees, tree_size) if trees else Proposal(self.lookup.ids[:, :0])

    def branches(self, num_tokens: int) -> tuple[list[Proposal], torch.Tensor]:
        """Copies as trees, no deeper than `num_tokens`, and how likely those of each row's surest copy are, once those
        in front of them are (R, num_tokens)."""
        copies, matched = self.lookup.find_several(num_tokens)  # (R, m, k), (R, m)
        likely = self.rates.chances(matched.flatten(), num_tokens).view(copies.shape)
        self.followed = [(self.rates, copies[:, 0], matched[:, 0])]
        return [side_by_side(copies, likely)], likely[:, 0]

    def of_other(self, tree: Proposal, num_tokens: int) -> list[Proposal]:
        """The other drafter's `tree`, as it takes part."""
        return [replace(tree, sources=torch.ones_like(tree.tokens))]

    def copies(self, lookup: PromptLookupDrafter, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies (R, k) behind the texts of `lookup`, after how many tokens that stood there before (R,), and how
        likely each is right once those in front of it are (R, k)."""
        copies, matched = lookup.find(num_tokens)
        return copies, matched, self.rates.chances(matched, num_tokens)

    def _needs_no_other(self, chances: torch.Tensor) -> bool:
        """Whether the other drafter would hardly be likelier right in any row, so that its time can be saved. A GPU is
        not asked, for which the host would have to wait; nor is this for a drafter that does not tell how sure it is.
        """
        if chances.device.type != "cpu" or not self.knows_confidence:
            return False
        sure = (expected(chances) >= self.SURE * chances.shape[1]) | ~self.running
        return bool(decided(lambda: bool(sure.all())))  # the other drafter may use a head that processes share

    def update(self, verified: Verified) -> None:
        self.drafter.update(verified)
        self.lookup.update(verified)
        tokens, counts = verified.tokens, verified.counts
        self.running = counts > 0
        if self.copied is not None:
            self.count(*self.copied, tokens, counts)
        for rates, copies, matched in self.followed:
            rates.count(matched, copies[:, : tokens.shape[1]], tokens, counts)
        self.copied, self.followed = None, []

    def count(self, copies: torch.Tensor, matched: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """The rows in which `copies` (R, k) after `matched` (R,) tokens, 0 in others, were verified go on with the
        first `counts` (R,) of `tokens` (R, q)."""
        self.rates.count(matched, copies[:, : tokens.shape[1]], tokens, counts)

    def select_rows(self, index, longest) -> None:
        self.drafter.select_rows(index, longest)
        self.lookup.select_rows(index, longest)
        self.running = self.running[index]

    def mark(self):
        return self.lookup.mark(), self.drafter.mark(), self.running

    def rewind(self, mark) -> None:
        of_lookup, of_drafter, self.running = mark
        self.lookup.rewind(of_lookup)
        self.drafter.rewind(of_drafter)
        self.copied, self.followed = None, []
