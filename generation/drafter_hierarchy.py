"""Hierarchical speculative decoding (arXiv 2510.19705): a small drafter drafts for a middle model, which drafts for the
target, with fewer passes than it has tokens.

The middle model's tokens are those that it would write alone, whatever the inner drafter says; the hierarchy is as
lossless as any drafter, under every rule. "match" and "coupled": the middle model samples with the noise that the
target will sample with, at each row's own place. "rejection": it takes the best tokens, which count as certain.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from time import perf_counter

import torch
from transformers import GenerationMixin

from .accept_sampling import best_tokens, count_accepted
from .argument import name_of, whole_number
from .draft_length import AUTO
from .drafter import Drafter, Prompts, Verified
from .drafter_assistant import AssistantDrafter
from .drafter_system import DraftingSystem, Parts, is_system
from .proposal import NO_TOKEN, Proposal, count_drafted
from .ranks import ranks_of
from .target_states import StateReader


class Hierarchy(DraftingSystem):
    """
    Args:
        inner: what drafts for the middle model: anything that is an `assistant_model` and can go back in its text, such
            as a causal LM, a network that reads the middle model's states, `Reader()` for copies, or another hierarchy.
        middle: a causal LM with the target's tokenizer, smaller than the target.
        num_inner_tokens: that the inner one drafts for a pass of the middle model; "auto": what gives the most tokens
            of the middle model per second, by how long both took and how many were accepted in the calls before, and 4
            under "rejection", whose text depends on it.
        flush: whether a row's draft ends where the middle model corrected the inner one: what both agree on is likelier
            what the target takes than what the middle model says alone. Otherwise it ends where it is full.

    Attributes:
        costs: what was seen of the middle model's passes; of all calls.

    Raises:
        ValueError: what is no causal LM, or no number.
    """

    def __init__(self, inner, middle, num_inner_tokens: int | str = AUTO, flush: bool = True):
        if not isinstance(middle, GenerationMixin):
            raise ValueError(f"middle is a {name_of(middle)}; expected a causal LM, loaded with AutoModelForCausalLM.")
        if num_inner_tokens != AUTO and (whole_number(num_inner_tokens) or 0) < 1:
            raise ValueError(f"num_inner_tokens is {num_inner_tokens!r}; expected a positive integer, or {AUTO!r}.")
        self.inner, self.middle, self.flush = inner, middle, flush
        self.num_inner_tokens, self.costs = num_inner_tokens, MiddleCosts()

    def drafter_for(self, target, parts: Parts) -> Drafter:
        if ranks_of(self.middle) is not None:
            raise ValueError(
                f"The weights of the middle model {name_of(self.middle)} are shared by several processes, and each "
                "asks it as often as its own clock finds right. Load it whole in each of them."
            )
        inner = parts.drafter(self.inner, self.middle)
        if not getattr(inner, "can_rewind", False):
            raise ValueError(
                f"The inner drafter {name_of(inner)} cannot go back in its text, as the drafter of a middle model has "
                "to where the target takes less than that model did. Pass a causal LM, a network that reads the "
                "middle model's states, Reader(), or another Hierarchy."
            )
        fixed: int | None = MiddleCosts.FIRST
        if self.num_inner_tokens != AUTO:
            fixed = int(self.num_inner_tokens)
        elif not parts.text_depends_on_drafts:
            fixed = None
        return HierarchyDrafter(self.middle, target, inner, self.costs, fixed, self.flush, parts.text_depends_on_drafts)

    def finished(self, texts: list[list[int]]) -> None:
        if is_system(self.inner):
            self.inner.finished(texts)


class MiddleCosts:
    """How long passes of a middle model and the drafts for them take, and how many of these it accepts.

    Attributes:
        passes: of the middle model.
        tokens: of its own that it proposed to the target.
    """

    FIRST, MOST = 4, 16  # tokens of the inner drafter: while nothing is known, and at most
    FADING = 0.95  # a pass later
    FIRST_RATE, WEIGHT = 0.7, 4.0  # accepted at first, and how many drafts that is worth

    def __init__(self):
        self.passes = self.tokens = 0
        self.reached, self.accepted = self.WEIGHT, self.WEIGHT * self.FIRST_RATE  # drafts; both fade
        self.drafting: float | None = None  # seconds of a token
        self.reading: float | None = None  # seconds of a pass
        self._lock = threading.Lock()

    def record(self, drafted: int, reached: int, accepted: int, tokens: int, drafting: float, reading: float) -> None:
        """A pass read `drafted` tokens of each row. Of all rows' drafts, `reached` were looked at and `accepted`
        right; `tokens` were added to proposals."""
        with self._lock:
            self.passes, self.tokens = self.passes + 1, self.tokens + tokens
            self.reached, self.accepted = self.FADING * self.reached + reached, self.FADING * self.accepted + accepted
            if drafted:
                self.drafting = mean(self.drafting, drafting / drafted, 1 - self.FADING)
            self.reading = mean(self.reading, reading, 1 - self.FADING)

    def best_length(self) -> int:
        """Tokens to draft for a pass: (1 - a**(n + 1)) / (1 - a) tokens of the middle model, for n of the inner one of
        which each is accepted with probability a, in the time of both."""
        with self._lock:
            if self.drafting is None or self.reading is None:
                return self.FIRST
            rate = (self.accepted + self.WEIGHT * self.FIRST_RATE) / (self.reached + self.WEIGHT)
            drafting, reading = self.drafting, self.reading
        tokens, reached, speeds = 0.0, 1.0, []
        for length in range(self.MOST + 1):
            tokens, reached = tokens + reached, reached * rate
            speeds.append(tokens / (reading + length * drafting))
        return max(1, speeds.index(max(speeds)))  # what is never tried is never seen to be right


def mean(before: float | None, value: float, share: float) -> float:
    return value if before is None else before + share * (value - before)


class HierarchyDrafter(AssistantDrafter):
    """A middle model as the target's assistant, and an inner drafter as its own.

    Args:
        middle, target: the models.
        inner: drafts for `middle`; can go back in its text.
        costs: of the calls before; this one adds to it.
        num_inner_tokens: that `inner` drafts for a pass, `None` for what `costs` says.
        flush: whether a row's proposal ends at a correction.
        takes_the_best: whether the middle model's tokens are its best ones, and not chosen as the call samples.

    Attributes:
        held: where the inner one reads states of the middle model, those of each row's newest token and of what this
            round proposed and read behind it, (R, n, S, d).
    """

    default_num_assistant_tokens = 8

    def __init__(self, middle, target, inner: Drafter, costs, num_inner_tokens, flush: bool, takes_the_best: bool):
        super().__init__(middle, target)
        self.inner, self.costs, self.flush = inner, costs, flush
        self.num_inner_tokens, self.takes_the_best = num_inner_tokens, takes_the_best
        self.vocab_size = target.config.get_text_config(decoder=True).vocab_size

    def __enter__(self):
        super().__enter__()
        with ExitStack() as stack:
            stack.push(super().__exit__)
            stack.enter_context(self.inner)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._entered.__exit__(*exception)

    def begin(self, prompts: Prompts) -> None:
        if (layers := getattr(self.inner, "hidden_state_layers", None)) is not None:
            self.states_of = StateReader(self.assistant, layers)
        self.inner.begin(replace(prompts, hidden_states=self.read_prompts(prompts)))
        self.held: torch.Tensor | None = None

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        text = self.cache.lengths + self.counts  # (R,), tokens of each row's text
        written, going_on = torch.zeros_like(text), torch.ones_like(text, dtype=torch.bool)
        proposal = self.tokens.new_full((len(text), num_tokens + 1), NO_TOKEN)  # its last column is spare
        # what reads states of this model drafts only behind what this model has read, but for the newest token
        waits = self.states_of is not None and self.tokens.shape[1] > 1
        of_inner = None if waits else self.inner.mark()
        start = None
        while True:
            room = num_tokens - int(written[going_on].min())
            wanted = 0 if waits and start is None else min(self._inner_length(), room - 1)
            taken, drafted, accepted, states = self._pass(wanted, written, going_on, choose)
            if start is None:  # the newest tokens of the texts, which the next round begins with
                if waits:
                    assert states is not None  # of `states_of`
                    states = self._tell_of_text(states, int(text.amax()) - 1)
                    of_inner = self.inner.mark()
                self.leave_newest()
                start = self.tokens
                if states is not None:
                    self.held = states.new_zeros(len(text), num_tokens + 1, *states.shape[2:])
            counts = torch.minimum(accepted + 1, num_tokens - written) * going_on
            place = torch.arange(taken.shape[1], device=self.device)
            is_new = place < counts[:, None]  # (R, j + 1)
            places = (written[:, None] + place).masked_fill(~is_new, num_tokens)
            proposal.scatter_(1, places, taken)
            if states is not None and self.held is not None:
                self.held.scatter_(1, places[..., None, None].expand_as(states), states)
            newest = taken.gather(1, (counts[:, None] - 1).clamp(min=0))
            self.tokens = torch.where(counts[:, None] > 0, newest, self.tokens)
            written = written + counts
            longest = int((text + written).amax()) - 1  # known to the host, which has to wait for `going_on` anyway
            self.cache.advance(text + written - 1 - self.cache.lengths, longest)
            going_on = going_on & (written < num_tokens)
            if self.flush:
                going_on = going_on & (accepted == drafted)
            if not going_on.any():
                break
            self.inner.update(Verified(taken, counts, longest, states))
        self.inner.rewind(of_inner)
        proposal = proposal[:, : int(written.amax())]
        # back to the texts; what it wrote last it has not read
        self.cache.advance(text - 1 - self.cache.lengths, int(text.amax()) - 1)
        self.tokens = start
        self.read = proposal.scatter(1, written[:, None] - 1, NO_TOKEN)
        return Proposal(proposal)

    def _tell_of_text(self, states: torch.Tensor, longest: int) -> torch.Tensor:
        """The inner drafter is told of the tokens that this model has just read in front of each row's newest one;
        returns the states of the newest ones, (R, 1, S, d)."""
        self.inner.update(Verified(self.tokens[:, 1:], self.counts - 1, longest, states[:, :-1]))
        return states[torch.arange(len(states), device=states.device), self.counts - 1][:, None]

    def _inner_length(self) -> int:
        return self.costs.best_length() if self.num_inner_tokens is None else self.num_inner_tokens

    def _pass(
        self, num_tokens: int, written: torch.Tensor, going_on: torch.Tensor, choose
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One pass of the middle model over `num_tokens` drafts of the inner one, behind `written` (R,) of its own: its
        tokens (R, j + 1), how many each row drafted (R,), how many of them are its own (R,), and the states that the
        inner one reads, of all that was read (R, q + j, S, d)."""

        def at_its_place(logits: torch.Tensor, ahead: int | torch.Tensor = 0, token_ids: torch.Tensor | None = None):
            if self.takes_the_best:
                return best_tokens(logits[..., : self.vocab_size].float() if token_ids is None else logits, token_ids)
            return choose(logits, written + ahead, token_ids)

        began, drafts = perf_counter(), self.tokens[:, :0]
        if num_tokens:
            drafts = self.inner.propose(min(num_tokens, self.inner.max_draft_tokens), at_its_place).tokens
            drafts = drafts.to(self.device)
        drafted_at = perf_counter()
        logits, states = self.read_with(self._known(drafts))
        taken = at_its_place(logits).to(self.device)
        drafted = count_drafted(drafts)
        accepted = count_accepted(taken[:, :-1] == drafts)
        reached, right = torch.stack([torch.minimum(accepted + 1, drafted), accepted])[:, going_on].sum(dim=1).tolist()
        self.costs.record(
            num_tokens, reached, right, right + int(going_on.sum()), drafted_at - began, perf_counter() - drafted_at
        )
        return taken, drafted, accepted, states

    def update(self, verified: Verified) -> None:
        read = self.take_over(verified)
        if self.states_of is None:
            self.inner.update(verified)
        elif self.held is not None:  # of what is not read yet the inner one is told when it is
            width = min(self.held.shape[1], verified.tokens.shape[1])
            tokens = verified.tokens[:, :width].to(self.device)
            self.inner.update(Verified(tokens, read, verified.longest, self.held[:, :width]))
        self.held = None

    def select_rows(self, index, longest) -> None:
        super().select_rows(index, longest)
        self.inner.select_rows(index, longest)

    def mark(self):
        return super().mark(), self.inner.mark()

    def rewind(self, mark) -> None:
        of_middle, of_inner = mark
        super().rewind(of_middle)
        self.inner.rewind(of_inner)
