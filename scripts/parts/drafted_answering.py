"""A target answers prompts in a batch whose rows are refilled, with drafted tokens.

Rows that joined the batch together are a call to generate() of their own, with its settings, its text and its drafter.
What they share with the other rows are the target's cache and its passes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import torch
from transformers import GenerationMixin

from specformer.generation.call_drafter import DraftSettings
from specformer.generation.call_settings import CallSettings
from specformer.generation.call_statistics import GenerationStatistics
from specformer.generation.decoding import longest_read
from specformer.generation.draft_length import DraftLength, round_draft_length
from specformer.generation.drafter import Prompts, Verified
from specformer.generation.drafter_tree import complete
from specformer.generation.generate import PreparedCall, Strategy
from specformer.generation.proposal import NO_TOKEN, Proposal, count_drafted
from specformer.generation.proposal_tree import DraftTree, along
from specformer.generation.target import prefill, verify
from specformer.generation.target_positions import positions_in_table
from specformer.generation.target_states import StateReader
from specformer.scripts.parts.answering import Answer, Answering, left_padded


class Joined:
    """Rows that joined the batch together.

    Shapes: B rows of the batch, R of them that `text` carries, k drafts.

    Args:
        call: the call that they are.
        answers: what they answer.

    Attributes:
        places: where in the batch the rows are that `text` carries. Of one that has finished, another may be there.
    """

    def __init__(self, call: PreparedCall, answers: list[Answer]):
        self.call, self.answers = call, answers
        self.text, self.choice, self.drafter = call.text, call.choice, call.drafter
        self.statistics = GenerationStatistics(len(answers))
        self.places: list[int] = []
        self.answered = [False] * len(answers)
        self.entered = ExitStack()
        self.entered.enter_context(self.drafter)
        self.entered.enter_context(self.choice.rule)

    def begin(self, input_ids: torch.Tensor, logits: torch.Tensor, states, drafts: bool) -> None:
        """The target has read the prompts (N, P): logits (N, 1, V) after them, and states as in `Prompts`."""
        tokens, accepted, _ = self.choice.of_target(logits, input_ids.new_empty(len(input_ids), 0))
        _, outcome, drafted = self.text.append(tokens, accepted)
        self.statistics.count(self.text.rows, 0, drafted, outcome, is_prompt=True)
        if drafts and not self.text.done:
            self.drafter.begin(Prompts(input_ids, self.call.layout, tokens, self.text.rules.max_length, states))

    def drop_finished(self) -> None:
        if (kept := self.text.drop_finished()) is not None:
            self.places = [self.places[row] for row in kept.tolist()]
            self.drafter.select_rows(kept, longest_read(self.text, self.call.layout))

    def running(self) -> tuple[list[int], list[int]]:
        """Of the rows that go on, where they are in the batch, and where in what `text` carries."""
        here = [place for place, row in enumerate(self.text.rows) if self.text.is_running(row)]
        return [self.places[place] for place in here], here

    def room(self, wanted: int) -> int:
        """How many of so many tokens are worth drafting."""
        if not self.text.stops.in_step.may_draft():
            return 0
        return round_draft_length(wanted, min(self.text.running_lengths()), self.text.stops.limit)

    def propose(self, num_tokens: int, tree_size: int) -> Proposal:
        """Drafts (R, k or fewer), or, with a `tree_size`, a tree of so many that is no deeper than k."""
        if tree_size:
            proposal = self.drafter.propose_tree(num_tokens, tree_size, self.choice.chances)
        else:
            proposal = self.drafter.propose(num_tokens, self.choice.for_drafter)
        return self.choice.checked(proposal, self.drafter, num_tokens, tree_size)

    def take(
        self, logits: torch.Tensor, drafts: torch.Tensor, tree: DraftTree | None
    ) -> tuple[torch.Tensor, list[tuple[int, int]], torch.Tensor | None]:
        """Go on by what the target has said, logits (B, k + 1, V) after the `drafts` (B, k) of the whole batch: how
        many tokens each row got (R,), and for the host how many of them were drafted. Of a `tree`, of the whole batch
        too, also the places that the target's tokens go through, (R, depth + 1) or fewer."""
        drafts, tree = self.own(drafts), None if tree is None else tree.rows(self.own)
        tokens, accepted, path = self.choice.of_target(self.own(logits), drafts, tree)
        in_all = count_drafted(drafts) if tree is None else tree.drafted()
        counts, outcome, drafted = self.text.append(tokens, accepted, in_all)
        deepest = drafts.shape[1] if tree is None else tree.depth
        self.statistics.count(self.text.rows, deepest, drafted, outcome, is_prompt=False)
        self.taken = tokens, counts
        return counts, outcome, path

    def update(self, logits: torch.Tensor, states: torch.Tensor | None) -> None:
        """Tell the drafter what was taken: logits and states of the whole batch, (B, k + 1, V) and (B, k + 1, S, d),
        of trees at the places of the path."""
        width = self.taken[0].shape[1]  # of a tree the rows of others may have gone further
        seen = self.own(logits)[:, :width] if self.drafter.reads_logits else None
        states = None if states is None else self.own(states)[:, :width]
        self.drafter.update(Verified(*self.taken, longest_read(self.text, self.call.layout), states, seen))
        self.choice.rule.forget_before(min(self.text.running_lengths()))

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """Of what the whole batch has (B, ...), what the rows have that `text` carries (R, ...)."""
        if self.places == list(range(len(values))):
            return values
        return values[torch.tensor(self.places, device=values.device)]

    def completed(self) -> Iterator[tuple[int, Answer]]:
        """The answers that are complete since the last time, and where in the batch they were."""
        text = self.text
        for place, row in zip(self.places, text.rows, strict=True):
            if text.is_running(row) or self.answered[row]:
                continue
            end = text.prompt_width + text.generated[row]
            new, answer = text.ids[row, text.prompt_width : end], self.answers[row]
            answer.response_ids, answer.finished = new.tolist(), bool(text.rules.is_eos(new[-1:]))
            self.answered[row] = True
            yield place, answer


class DraftedAnswering(Answering):
    """A batch of prompts that is refilled, whose answers are drafted: the tokens are those of plain generate() with the
    same settings, greedily, or sampled with noise that depends on `seed`, the index of the prompt and the position
    alone (acceptance "coupled").

    Args:
        target: a causal LM.
        batch_size: rows of the batch.
        settings: arguments of generate(), `max_new_tokens` among them. What is not there is what the target's
            generation config says.
        drafter: what drafts, as `assistant_model` of generate(); `None` where `drafting` names copies.
        drafting: `num_assistant_tokens`, `tree_size`, `prompt_lookup_num_tokens` and the like.
        seed: of sampling.

    Attributes:
        tokens, passes: of complete answers, the prompts' passes and the token of each left out.

    Raises:
        ValueError: see `generate`.
    """

    refills = 4  # each time it is a drafter more

    def __init__(
        self, target, batch_size: int, settings: dict, drafter=None, drafting: dict | None = None, seed: int = 0
    ):
        super().__init__(target, batch_size, settings["max_new_tokens"], seed=seed)
        drafting = dict(drafting or {})
        length, tree_size = (drafting.pop(name, None) for name in ("num_assistant_tokens", "tree_size"))
        settings_left = CallSettings(drafting, target.generation_config)
        self.drafts = DraftSettings.of_call(target, drafter, length, tree_size, settings_left)
        self.settings, self.groups = settings, list[Joined]()
        self.draft_length: DraftLength | None = None
        self.reads_text: bool | None = None  # whether a processor does, and so would read padding
        self.tokens = self.passes = 0

    def run(self, prompts: Iterator[Answer]) -> Generator[Answer, None, None]:
        try:
            yield from super().run(prompts)
        finally:
            for group in self.groups:
                group.entered.close()
            self.groups, self.draft_length = [], None

    def _admit(self, answers: list[Answer], free: list[int]) -> list[Answer]:
        """Where a processor reads the text, those of one length after the other, without padding: as it is alone."""
        if self.reads_text is None:
            one = self._prepared(answers[:1], *left_padded(answers[:1], self.device))
            self.reads_text = one.choice.processors.need_prefix
        if not self.reads_text:
            return super()._admit(answers, free)
        complete: list[Answer] = []
        for length in sorted({len(answer.prompt_ids) for answer in answers}):
            some = [answer for answer in answers if len(answer.prompt_ids) == length]
            is_new = not self.rows
            complete += super()._admit(some, free)
            free = self._widen(len(answers)) if is_new else free[len(some) :]
        return complete

    def _widen(self, batch_size: int) -> list[int]:
        """Make room for more rows in a batch that has begun; returns where."""
        count = len(self.rows)
        more = [0] * (batch_size - count)  # copies of the first row, which others replace
        self.rows, self.read = [*self.rows, *[None for _ in more]], [*self.read, *(self.read[row] for row in more)]
        index = torch.tensor([*range(count), *more], device=self.device)
        self.cache.select_rows(index, self._longest())
        return list(range(count, batch_size))

    def _prepared(self, answers: list[Answer], input_ids: torch.Tensor, mask: torch.Tensor) -> PreparedCall:
        seeds = [self.seed + answer.index for answer in answers]
        strategy = Strategy(self.drafts, "coupled", seeds, None, None, False, None)
        call: Any = GenerationMixin.generate(
            self.target, input_ids, attention_mask=mask, custom_generate=strategy.prepared, **self.settings
        )
        return call

    def _read(self, answers: list[Answer], input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[Any, Any]:
        call = self._prepared(answers, input_ids, mask)
        if self.draft_length is None:
            self.draft_length = call.draft_length
            layers = call.drafter.hidden_state_layers if call.draft_length.most else None
            self.states_of = StateReader(self.target, layers)
        logits, cache, states = prefill(
            self.target,
            input_ids,
            call.layout,
            self.max_length,
            self.draft_length.widest + 1,
            call.model_kwargs,
            states_of=self.states_of,
            more_slots=self.draft_length.widest,
        )
        group = Joined(call, answers)
        self.groups.append(group)
        group.begin(call.text.ids, logits, states, bool(self.draft_length.most))
        return cache, group

    def _begin(self, begun: Joined, places: list[int]) -> list[Answer]:
        begun.places = places
        return self._completed()

    def _step(self) -> list[Answer]:
        """One round: draft, verify, accept. Returns the answers that are complete."""
        assert self.draft_length is not None  # of the first prompts
        started = perf_counter()
        for group in self.groups:
            group.drop_finished()
        newest, drafts, tree = self._propose(started)
        block = torch.cat([newest, self.groups[0].choice.readable(drafts)], dim=1)  # (B, k + 1)
        branches = () if tree is None else (tree.depths, tree.ancestors)
        logits, states = verify(self.target, self.cache, block, self.states_of, branches)
        counts, outcome, order = torch.zeros_like(newest[:, 0]), [], list[int]()
        path = None if tree is None else newest.new_zeros(len(newest), tree.depth + 1)  # (B, depth + 1)
        for group in self.groups:
            places, here = group.running()
            of_group, of_rows, path_of_group = group.take(logits, drafts, tree)
            counts[places] = of_group[here]
            if path is not None and path_of_group is not None:
                path[places] = path_of_group[here][:, -1:]  # it stays there where others go further
                path[places, : path_of_group.shape[1]] = path_of_group[here]
            outcome += [of_rows[row] for row in here]
            order += places
            for place, row in zip(places, here, strict=True):
                self.read[place] += of_rows[row][1]
        if path is not None:
            self.cache.follow(path)
            logits, states = along(logits, path), None if states is None else along(states, path)
        taken = None if path is None else path[order]
        self.draft_length.record(len(self.rows), drafts.shape[1], outcome, perf_counter() - started, taken)
        self.cache.advance(counts, self._longest())
        if self.draft_length.most:
            for group in self.groups:
                if not group.text.done:
                    group.update(logits, states)
        return self._completed()

    def _propose(self, started: float) -> tuple[torch.Tensor, torch.Tensor, DraftTree | None]:
        """The newest token of each row (B, 1), and its drafts (B, k), which may be a tree; something where it has
        finished."""
        assert self.draft_length is not None
        batch_size = len(self.rows)
        newest = torch.zeros(batch_size, 1, dtype=torch.long, device=self.device)
        idle = torch.ones(batch_size, dtype=torch.bool, device=self.device)
        running = [group.running() for group in self.groups]
        for group, (places, here) in zip(self.groups, running, strict=True):
            newest[places], idle[places] = group.text.last_tokens()[here], False
        wanted, largest = self.draft_length.amounts(batch_size)
        tree_size, deepest = wanted if largest else 0, min(wanted, self.draft_length.most)
        if (table := positions_in_table(self.target)) is not None:
            deepest = max(0, min(deepest, table - 1 - self._longest()))
        lengths = [group.room(deepest) for group in self.groups]
        if not max(lengths):
            return newest, newest[:, :0], None
        drafts = newest.new_full((batch_size, tree_size or max(lengths)), NO_TOKEN)
        together = Proposal(drafts, torch.zeros_like(drafts, dtype=torch.float32), depth=0)
        together.parents = torch.full_like(drafts, -1) if tree_size else None
        widest = 0
        for group, length, (places, here) in zip(self.groups, lengths, running, strict=True):
            if length:
                proposal = group.propose(length, tree_size)
                widest = max(widest, proposal.tokens.shape[1])
                put(proposal, here, together, places)
        for name in ("tokens", "confidences", "parents"):
            if (part := getattr(together, name)) is not None:
                setattr(together, name, part[:, :widest])
        drafts = together.tokens[:, : self.draft_length.keep(together, idle, started)]
        return newest, drafts, DraftTree.of(drafts, together, max(lengths))

    def _completed(self) -> list[Answer]:
        complete = []
        for group in self.groups:
            for place, answer in group.completed():
                self.rows[place] = None
                complete.append(answer)
        for group in [group for group in self.groups if group.text.done]:
            self.tokens += sum(len(answer.response_ids) - 1 for answer in group.answers)
            self.passes += sum(group.statistics.target_passes_per_row)
            group.choice.finish()
            group.entered.close()
            self.groups.remove(group)
        return complete

    def _drop(self, free: list[int]) -> None:
        super()._drop(free)
        kept = [place for place in range(len(self.rows) + len(free)) if place not in set(free)]
        now = {place: number for number, place in enumerate(kept)}
        for group in self.groups:
            group.places = [now.get(place, 0) for place in group.places]  # one that has finished may be anywhere

    def _longest(self) -> int:
        """Of finished rows as well, which the passes still write behind."""
        return max(self.read, default=0)


def put(proposal: Proposal, here: list[int], together: Proposal, places: list[int]) -> None:
    """Write the rows `here` of a group's proposal into the rows `places` of that of the whole batch, which is one of
    trees where it has parents, and knows confidences where all groups do."""
    width, whole = proposal.tokens.shape[1], proposal
    if together.parents is not None:
        whole = complete(proposal, together.tokens.device)  # a chain is a tree as well
        assert whole.parents is not None and together.depth is not None
        together.parents[places, :width] = whole.parents[here]
        together.depth = max(together.depth, whole.depth or width)
    together.tokens[places, :width] = whole.tokens[here]
    if proposal.confidences is None:
        together.confidences = None
    if together.confidences is not None and whole.confidences is not None:
        together.confidences[places, :width] = whole.confidences[here].to(together.confidences)
