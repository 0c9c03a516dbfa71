"""What a call leaves for a drafter that learns while it serves: texts, with what the target said of each token.

A text's first tokens are its prompt and the token after it, of which nothing is learned; of each of the others the
target's distribution is known from the round that verified it.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch

from .accept_sampling import count_accepted
from .drafter import Drafter, Prompts, Verified
from .drafter_states import read_prompts
from .proposal import NO_TOKEN, Proposal, first_path

MOST_LIKELY = 16
"""Tokens of the target's distribution that are kept, with their probabilities."""


@dataclass
class VerifiedText:
    """The text of a row as far as it was noted, T tokens, of which the last G were verified in rounds.

    Attributes:
        tokens: (T,).
        likely: the target's likeliest tokens in the place of each of the last G, (G, K).
        chances: logarithms of how likely they are, (G, K).
        states: the target's, of all tokens but the last, (T - 1, S, d); `None` where the drafter reads none.
    """

    tokens: torch.Tensor
    likely: torch.Tensor
    chances: torch.Tensor
    states: torch.Tensor | None

    @property
    def first(self) -> int:
        """The place of the first verified token."""
        return len(self.tokens) - len(self.likely)

    def usable(self) -> VerifiedText:
        """The same for autograd: what was noted in inference mode could not be learned from."""
        noted = (part.clone() if part.is_inference() else part for part in (self.tokens, self.likely, self.chances))
        states = self.states
        return VerifiedText(*noted, states=states if states is None or not states.is_inference() else states.clone())


class Recording:
    """What is noted of one call.

    Args:
        prompts: what it begins with.
        max_tokens: positions that are held. Prompts take half of them at most: rows that do not fit are not noted; nor
            is what is written when passes have taken the rest.
        with_states: whether the drafter reads the target's states.
    """

    def __init__(self, prompts: Prompts, max_tokens: int, with_states: bool):
        layout, device = prompts.layout, prompts.input_ids.device
        lengths, left = layout.host_lengths, max_tokens // 2
        self.kept: list[int] = []  # rows of the batch
        for row, length in enumerate(lengths):
            if length < left:
                self.kept.append(row)
                left -= length + 1
        self.room = max_tokens - max_tokens // 2 + left
        ids = torch.cat([layout.compact(prompts.input_ids), prompts.first_tokens], dim=1)
        self.tokens = {row: [torch.cat([ids[row, : lengths[row]], ids[row, -1:]])] for row in self.kept}
        self.states: dict[int, list[torch.Tensor]] | None = None
        if with_states:
            self.states = {}
            for read in read_prompts(prompts, device):
                for row, states in zip(read.rows.tolist(), read.states, strict=True):
                    if row in self.tokens:
                        self.states[row] = [states[: lengths[row]].clone()]  # not a view of all rows
        self.rows = torch.arange(len(lengths), device=device)  # those that passes still carry
        self.places = self.rows[self.kept]  # of those that are noted, among them
        self.rounds: list[tuple[torch.Tensor, ...]] = []

    def add(self, verified: Verified) -> None:
        """Note a round, as tensors: the host need not wait for them."""
        self.room -= len(self.places) * verified.tokens.shape[1]
        if self.room < 0 or not len(self.places):
            self.room = -1  # nor what comes later, without this in front of it
            return
        assert verified.logits is not None  # the drafter asks for them
        logits = verified.logits[self.places.to(verified.logits.device)].float()
        best = logits.topk(min(MOST_LIKELY, logits.shape[-1]))
        chances = best.values - logits.logsumexp(dim=-1, keepdim=True)
        given = [verified.tokens, verified.counts]
        if self.states is not None:
            assert verified.hidden_states is not None
            given.append(verified.hidden_states)
        tokens, counts, *states = (part[self.places.to(part.device)] for part in given)
        noted = tokens, counts, best.indices, chances, *states
        self.rounds.append((self.rows[self.places], *(part.to(self.rows.device) for part in noted)))

    def select_rows(self, index: torch.Tensor) -> None:
        self.rows = self.rows[index.to(self.rows.device)]
        kept = set(self.kept)
        places = [place for place, row in enumerate(self.rows.tolist()) if row in kept]
        self.places = torch.tensor(places, dtype=torch.long, device=self.rows.device)

    def texts(self) -> list[VerifiedText]:
        """Those of which something was verified."""
        likely: dict[int, list[torch.Tensor]] = {row: [] for row in self.kept}
        chances: dict[int, list[torch.Tensor]] = {row: [] for row in self.kept}
        for rows, tokens, counts, best, of_best, *states in self.rounds:
            for place, (row, count) in enumerate(zip(rows.tolist(), counts.tolist(), strict=True)):
                if not count:
                    continue
                self.tokens[row].append(tokens[place, :count])
                likely[row].append(best[place, :count])
                chances[row].append(of_best[place, :count])
                if self.states is not None:
                    self.states[row].append(states[0][place, :count])
        return [
            VerifiedText(
                torch.cat(self.tokens[row]),
                torch.cat(likely[row]),
                torch.cat(chances[row]),
                None if self.states is None else torch.cat(self.states[row]),
            )
            for row in self.kept
            if likely[row]
        ]


class Learner(Protocol):
    """Whoever learns from calls."""

    def take(self, texts: list[VerifiedText], reached: int, right: int, seconds: float) -> None:
        """A call is over: its texts, how many drafts were looked at and right, and how long it took."""


class LearningDrafter(Drafter):
    """A drafter of whose call is noted what is to be learned from it.

    Args:
        drafter: the one that drafts.
        owner: is given what was noted.
        max_tokens: of texts that are kept; `None`: nothing is to be learned.
    """

    def __init__(self, drafter: Drafter, owner: Learner, max_tokens: int | None):
        self.drafter, self.owner, self.max_tokens = drafter, owner, max_tokens
        self.max_draft_tokens = drafter.max_draft_tokens
        self.default_num_assistant_tokens = drafter.default_num_assistant_tokens
        self.hidden_state_layers = drafter.hidden_state_layers
        self.reads_logits = drafter.reads_logits or max_tokens is not None
        self.proposes_known_tokens, self.proposes_trees = drafter.proposes_known_tokens, drafter.proposes_trees
        self.own_draft_length, self.sources = getattr(drafter, "own_draft_length", None), drafter.sources
        self.recording: Recording | None = None
        self.proposed: torch.Tensor | None = None  # of this round
        self.counts: list[torch.Tensor] = []  # drafts that were looked at and right, of each round

    def __enter__(self):
        self.started = perf_counter()
        self.drafter.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.drafter.__exit__(*exception)
        if exception[0] is None:
            reached, right = torch.stack(self.counts).sum(dim=0).tolist() if self.counts else (0, 0)
            texts = [] if self.recording is None else self.recording.texts()
            self.owner.take(texts, reached, right, perf_counter() - self.started)

    def begin(self, prompts: Prompts) -> None:
        self.drafter.begin(prompts)
        if self.max_tokens is not None:
            self.recording = Recording(prompts, self.max_tokens, self.hidden_state_layers is not None)

    def propose(self, num_tokens, choose) -> Proposal:
        proposal = self.drafter.propose(num_tokens, choose)
        self.proposed = proposal.tokens
        return proposal

    def propose_tree(self, num_tokens, tree_size, chances) -> Proposal:
        proposal = self.drafter.propose_tree(num_tokens, tree_size, chances)
        self.proposed = first_path(proposal).tokens
        return proposal

    def update(self, verified: Verified) -> None:
        self.drafter.update(verified)
        if self.proposed is not None:
            self.counts.append(looked_at_and_right(self.proposed, verified))
            self.proposed = None
        if self.recording is not None:
            self.recording.add(verified)

    def select_rows(self, index, longest) -> None:
        self.drafter.select_rows(index, longest)
        if self.recording is not None:
            self.recording.select_rows(index)


def looked_at_and_right(drafts: torch.Tensor, verified: Verified) -> torch.Tensor:
    """Of `drafts` (R, k) up to the first wrong one, whoever's were verified: how many the text decides about, and how
    many are right, (2,)."""
    tokens, counts = verified.tokens.to(drafts.device), verified.counts.to(drafts.device)
    width = min(drafts.shape[1], tokens.shape[1])
    place = torch.arange(width, device=drafts.device)
    drafts, tokens = drafts[:, :width], tokens[:, :width]
    decided = (place < counts[:, None]) & (drafts != NO_TOKEN)
    right = count_accepted(decided & (drafts == tokens))
    return torch.stack([torch.minimum(right + 1, decided.sum(dim=1)).sum(), right.sum()])
