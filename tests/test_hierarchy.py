"""A middle model between drafter and target (HSD): it proposes what it would write alone, in fewer passes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import test_dflash as dflash
import test_eagle_and_pard as eagles
import torch
from architectures import make_target
from exactness import check, plain
from foreign import recorded, save
from test_copying import network_of
from test_drafters import repeats_what_came_five_before
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, crossed, meaningful_target
from tiny import VOCAB, llama, ragged_batch

from specformer import Drafter, Hierarchy, Proposal, Reader, TrigramChains, generate
from specformer.generation import drafter_assistant as assisting
from specformer.generation.accept_tokens import BestDrafts
from specformer.generation.call_drafter import drafter_of_network
from specformer.generation.drafter import Prompts
from specformer.generation.drafter_assistant import AssistantDrafter
from specformer.generation.drafter_hierarchy import HierarchyDrafter, MiddleCosts
from specformer.generation.drafter_loading import drafting_model
from specformer.generation.drafter_specformer import SpecFormerDrafter
from specformer.generation.prompt import PromptLayout
from specformer.generation.target import prefill, prompt_arguments
from specformer.generation.target_states import StateReader

ENDLESS = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)


class Wrong(Drafter):
    """Never what the middle model takes, as far as that can be said of one token in 64."""

    can_rewind = True

    def begin(self, prompts):
        self.newest = prompts.first_tokens

    def propose(self, num_tokens, choose):
        return Proposal((self.newest.expand(-1, num_tokens) + 7) % VOCAB)

    def update(self, verified):
        self.newest = verified.newest(self.newest)

    def select_rows(self, index, longest):
        self.newest = self.newest[index]

    def mark(self):
        return self.newest

    def rewind(self, mark):
        self.newest = mark


class HalfRight(AssistantDrafter):
    """The middle model as its own drafter, with every other draft spoilt, at other places in each row and round."""

    rounds = 0

    def propose(self, num_tokens, choose):
        self.rounds += 1
        tokens = super().propose(num_tokens, choose).tokens
        place = torch.arange(num_tokens) + torch.arange(len(tokens))[:, None] + self.rounds
        return Proposal(torch.where(place % 2 == 0, (tokens + 1) % VOCAB, tokens))


def middle_of(target, noise: float = 0.05):
    """A model that is right about half of the time, or more often with less noise."""
    middle = copy.deepcopy(target)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for weights in middle.model.layers.parameters():
            weights += noise * torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
    return middle


def inner_ones(middle, target) -> dict[str, object]:
    return {
        "always right": middle,
        "half right": HalfRight(middle, middle),
        "wrong": Wrong(),
        "another model": llama(seed=7, num_hidden_layers=1),
        "copies": Reader(),
    }


INNER = ["always right", "half right", "wrong", "another model", "copies"]


@pytest.mark.one_version
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_it_proposes_what_the_middle_model_proposes_alone(inner: str, sampling: dict, monkeypatch):
    """Token for token, in every round of a ragged batch that loses rows; by how the inner one is, in fewer passes."""
    target, batch, eos = meaningful_target("llama")
    middle = middle_of(target)
    for eos_token_id in (None, eos):
        arguments = dict(sampling, eos_token_id=eos_token_id, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        with monkeypatch.context() as patch:
            alone = recorded(patch, AssistantDrafter)
            by_itself = check(target, batch, reference, middle, 6, **arguments)
        drafter = inner_ones(middle, target)[inner]
        system = Hierarchy(drafter, middle, num_inner_tokens=3, flush=False)
        with monkeypatch.context() as patch:
            rounds = recorded(patch, HierarchyDrafter)
            statistics = check(target, batch, reference, system, 6, **arguments)
        assert rounds == alone and len(rounds) > 3
        assert statistics.accepted_per_slot == by_itself.accepted_per_slot
        assert 0 < sum(statistics.accepted_per_slot) < sum(statistics.drafted_per_slot)  # a middle model worth testing
        passes = system.costs.passes / sum(len(each[0]) for each in rounds)
        if inner == "always right":
            assert passes < 0.45
        elif inner == "half right":
            assert passes < 0.8
        elif inner == "wrong":
            assert passes > 0.85


@pytest.mark.one_version
def test_the_comparison_finds_a_slot_that_is_off(monkeypatch):
    """The test before can fail: a middle model that sees one position too many proposes something else."""
    target, batch, _ = meaningful_target("llama")
    middle = middle_of(target)
    reference = plain(target, batch, **ENDLESS)
    read_with = AssistantDrafter.read_with

    def rounds(plant: bool) -> list:
        with monkeypatch.context() as patch:
            if plant:

                def fault(self, behind):
                    self.cache.lengths = self.cache.lengths - 1
                    try:
                        return read_with(self, behind)
                    finally:
                        self.cache.lengths = self.cache.lengths + 1

                patch.setattr(HierarchyDrafter, "read_with", fault)
            found = recorded(patch, HierarchyDrafter)
            check(target, batch, reference, Hierarchy(middle, middle, 3, flush=False), 6, **ENDLESS)
        return found

    assert rounds(False) == rounds(False) != rounds(True)


@pytest.mark.parametrize(("inner", "setting"), crossed("half right", "copies"))
def test_the_text_does_not_depend_on_it(inner: str, setting: str):
    target, batch, eos = meaningful_target("llama")
    middle = middle_of(target)
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    system = Hierarchy(inner_ones(middle, target)[inner], middle)
    for k in (None, 1, 7):
        check(target, batch, reference, system, k, **arguments)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mistral-sliding"])
def test_other_families(name: str):
    """As targets, as middle models, and as inner ones."""
    target, batch, eos = meaningful_target(name)
    system = Hierarchy(make_target("gpt2", seed=3), make_target(name, seed=5))
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        check(target, batch, reference, system, 5, **arguments)


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_a_hierarchy_in_a_hierarchy(sampling: dict, monkeypatch):
    """Four levels: what the second one proposes is what it proposes alone."""
    target, batch, _ = meaningful_target("llama")
    middle = middle_of(target)
    small = middle_of(middle)
    reference = plain(target, batch, **ENDLESS, **sampling)
    with monkeypatch.context() as patch:
        alone = recorded(patch, AssistantDrafter)
        check(target, batch, reference, middle, 6, **ENDLESS, **sampling)
    inner = Hierarchy(Reader(), small, 2, flush=False)
    system = Hierarchy(inner, middle, 3, flush=False)
    with monkeypatch.context() as patch:
        propose, rounds = HierarchyDrafter.propose, []

        def noted(self, num_tokens, choose):
            proposal = propose(self, num_tokens, choose)
            if self.assistant is middle:
                rounds.append(proposal.tokens.tolist())
            return proposal

        patch.setattr(HierarchyDrafter, "propose", noted)
        check(target, batch, reference, system, 6, **ENDLESS, **sampling)
    assert rounds == alone
    assert 0 < system.costs.passes < 6 * len(rounds) and inner.costs.passes > 0


@pytest.mark.one_version
def test_a_draft_ends_at_a_correction():
    target, batch, _ = meaningful_target("llama")
    middle = middle_of(target)
    reference = plain(target, batch, **ENDLESS)
    rates, passes = [], []
    for flush in (False, True):
        system = Hierarchy(HalfRight(middle, middle), middle, 3, flush)
        statistics = check(target, batch, reference, system, 6, **ENDLESS)
        rates.append(sum(statistics.accepted_per_slot) / sum(statistics.drafted_per_slot))
        passes.append(system.costs.passes / statistics.rounds)
    assert rates[1] > rates[0] and passes[1] < passes[0]


@pytest.mark.one_version
def test_the_inner_length_follows_times_and_acceptance():
    """By hand: the length of the most tokens per second."""

    def best(rate: float, drafting: float, reading: float) -> int:
        costs = MiddleCosts()
        for _ in range(300):
            costs.record(4, 1000, round(1000 * rate), 1, 4 * drafting, reading)
        speed = [
            sum(rate**place for place in range(length + 1)) / (reading + length * drafting)
            for length in range(MiddleCosts.MOST + 1)
        ]
        assert abs(costs.best_length() - max(1, speed.index(max(speed)))) <= 1
        return costs.best_length()

    assert MiddleCosts().best_length() == MiddleCosts.FIRST
    assert best(0.95, 0.001, 1.0) == MiddleCosts.MOST
    assert best(0.05, 0.5, 1.0) == 1
    assert 2 < best(0.7, 0.05, 1.0) < 9 and best(0.7, 0.3, 1.0) < best(0.7, 0.05, 1.0)


@pytest.mark.one_version
def test_rejection_keeps_the_distribution():
    target = llama(torch.float32)
    middle = llama(torch.float32, seed=4)
    ids = torch.tensor([[7, 8, 9, 7, 8]]).expand(4000, -1)
    logits = target(input_ids=torch.tensor([[7, 8, 9, 7, 8, 9]])).logits[0, -1].detach()
    torch.manual_seed(0)
    only = lambda row, text: [9] if len(text) == 5 else list(range(VOCAB))  # noqa: E731
    output = generate(
        target, Hierarchy(Reader(), middle), input_ids=ids, attention_mask=torch.ones_like(ids),
        do_sample=True, acceptance="rejection", max_new_tokens=3, eos_token_id=None, num_assistant_tokens=1,
        prefix_allowed_tokens_fn=only, return_dict_in_generate=True,
    )  # fmt: skip
    assert output.statistics.drafted_per_slot[0] == len(ids)
    seen = output.sequences[:, 6].bincount(minlength=VOCAB) / len(ids)
    assert float((seen - logits.softmax(-1)).abs().sum() / 2) < 0.08


@pytest.mark.one_version
@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_other_rules_run_in_batches(acceptance: str):
    target, batch, eos = meaningful_target("llama")
    middle = middle_of(target)
    settings = dict(SAMPLING, acceptance=acceptance, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    texts = []
    for inner in (middle, Wrong(), Hierarchy(Reader(), middle)):
        torch.manual_seed(3)
        texts.append(generate(target, Hierarchy(inner, middle), **batch, **settings, num_assistant_tokens=4).tolist())
    if acceptance == "coupled":
        assert texts[0] == texts[1] == texts[2]


# ---- a causal LM that is not told what it proposed


def test_an_assistant_reads_what_was_verified_in_place_of_its_drafts(monkeypatch):
    """Beside copies that are right where it is wrong, it drafts what it writes alone behind each row's text."""
    target, batch = llama(), ragged_batch(padding=(0, 3, 5))
    repeat = dict(logits_processor=[repeats_what_came_five_before], **ENDLESS)
    reference = plain(target, batch, **repeat)
    assistant, propose = middle_of(target), AssistantDrafter.propose
    padding, rounds = (batch["attention_mask"] == 0).sum(1), []

    def noted(self, num_tokens, choose):
        proposal = propose(self, num_tokens, choose)
        if len(proposal.tokens) == len(padding):  # of all rows
            rounds.append((self.cache.lengths + 1, proposal.tokens.tolist()))  # its newest token is left to be read
        return proposal

    def are_its_own() -> list[bool]:
        rounds.clear()
        statistics = check(target, batch, reference, Reader(drafter=assistant), 4, **repeat)
        assert sum(statistics.accepted_per_slot) > 30
        same = []
        for lengths, proposed in rounds:
            for row, drafts in enumerate(proposed):
                if lengths[row] >= reference.sequences.shape[1] - padding[row]:  # it has ended, and is carried along
                    continue
                text = reference.sequences[row, padding[row] :][: lengths[row]][None]
                alone = assistant.generate(
                    text, attention_mask=torch.ones_like(text), max_new_tokens=4, eos_token_id=None
                )
                same.append(drafts == alone[0, lengths[row] :][: len(drafts)].tolist())
        return same

    monkeypatch.setattr(AssistantDrafter, "propose", noted)
    same = are_its_own()
    assert len(same) > 15 and all(same)
    # and this can fail: not if it took what was verified for its own
    monkeypatch.setattr(assisting, "count_accepted", lambda same: same.new_full((len(same),), 99, dtype=torch.long))
    assert not all(are_its_own())


# ---- an inner drafter that reads the middle model's states


def reading(middle, preset: str = "anchor", near: bool = True):
    """A SpecFormer network of the middle model; near it, half of its first drafts are right."""
    network = network_of(middle, preset)
    if near:
        network.init_from_target(middle)
    return network


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("preset", "sampling"),
    [
        ("all of it", {}),
        ("paper", SAMPLING),
        *(pytest.param(preset, SAMPLING, marks=pytest.mark.slow) for preset in ("all of it", "context")),
    ],
)
def test_a_network_drafts_for_the_middle_model(preset: str, sampling: dict, monkeypatch):
    """The middle model's tokens are those that it proposes alone, in a batch that loses rows."""
    target, batch, eos = meaningful_target("llama")
    middle = middle_of(target)
    arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    with monkeypatch.context() as patch:
        alone = recorded(patch, AssistantDrafter)
        check(target, batch, reference, middle, 6, **arguments)
    for inner in (reading(middle, preset), Reader(drafter=reading(middle, preset))):
        with monkeypatch.context() as patch:
            rounds = recorded(patch, HierarchyDrafter)
            check(target, batch, reference, Hierarchy(inner, middle, 3, flush=False), 6, **arguments)
        assert rounds == alone and len(rounds) > 3


class Told(Drafter):
    """Mixed into a drafter: notes what each row's text is by what it is told, and whether it drafts what it drafts of
    that text alone."""

    def begin(self, prompts):
        super().begin(prompts)
        rows = zip(prompts.input_ids.tolist(), prompts.first_tokens.tolist(), strict=True)
        lengths = prompts.layout.host_lengths
        self.texts = [ids[-length:] + first for (ids, first), length in zip(rows, lengths, strict=True)]
        self.same: list[bool] = []

    def propose(self, num_tokens, choose):
        proposal = super().propose(num_tokens, choose)
        for text, drafts in zip(self.texts, proposal.tokens.tolist(), strict=True):
            self.same.append(drafts == self.alone(text, num_tokens))
        return proposal

    def alone(self, text: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([text[:-1]])
        layout, middle = PromptLayout.from_mask(None, ids), self.middle
        run, other = StateReader(middle, self.hidden_state_layers), self.kind(self.network, middle)
        states = prefill(middle, ids, layout, 99, 8, prompt_arguments(middle, layout), None, run)[2]
        other.begin(Prompts(ids, layout, torch.tensor([text[-1:]]), 99, states))
        return other.propose(num_tokens, BestDrafts(VOCAB)).tokens[0].tolist()

    def update(self, verified):
        super().update(verified)
        rows = zip(self.texts, verified.tokens.tolist(), verified.counts.tolist(), strict=True)
        self.texts = [text + tokens[:count] for text, tokens, count in rows]

    def select_rows(self, index, longest):
        super().select_rows(index, longest)
        self.texts = [self.texts[row] for row in index.tolist()]

    def mark(self):
        return super().mark(), self.texts

    def rewind(self, mark):
        before, self.texts = mark
        super().rewind(before)


def told(drafter: Drafter, middle) -> Told:
    made = type("Told", (Told, type(drafter)), {})(drafter.network, middle)
    made.kind, made.middle = type(drafter), middle
    return made


def readers_of_states(middle, folder: Path) -> dict[str, Drafter]:
    """One of each kind, so that each draft depends on the states that it is given."""
    raw, weights, _ = dflash.checkpoints(middle)["raw"]
    files = {
        "dflash": (raw, weights),
        "eagle": (eagles.speculators_config(), eagles.eagle_weights()),
    }
    foreign = {name: drafting_model(save(folder / name, *parts), middle) for name, parts in files.items()}
    return {
        "anchor": SpecFormerDrafter(reading(middle), middle),
        "all of it": SpecFormerDrafter(reading(middle, "all of it"), middle),
        **{name: drafter_of_network(network, middle) for name, network in foreign.items()},
    }


@pytest.mark.one_version
@pytest.mark.parametrize(
    "kind", ["anchor", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("all of it", "dflash", "eagle"))]
)
def test_it_drafts_what_it_drafts_of_that_text_alone(kind: str, monkeypatch, tmp_path: Path):
    """Behind texts, and behind what the middle model has written on top of them, in a batch that loses rows."""
    target, batch, eos = meaningful_target("llama")
    middle, batch = middle_of(target, 0.01), {name: values[:3] for name, values in batch.items()}
    arguments = dict(eos_token_id=eos, max_new_tokens=12)
    reference = plain(target, batch, **arguments)

    def are_its_own(drafter: Drafter) -> list[bool]:
        noted = told(drafter, middle)
        statistics = check(target, batch, reference, Hierarchy(noted, middle, 3, flush=False), 5, **arguments)
        assert 5 < sum(statistics.accepted_per_slot) < sum(statistics.drafted_per_slot)
        return noted.same

    drafter = readers_of_states(middle, tmp_path)[kind]
    same = are_its_own(drafter)
    assert len(same) > 10 and all(same)
    # and this can fail: not if the states that it is given are those of the token before
    update = HierarchyDrafter.update

    def late(self, verified):
        if self.held is not None:
            self.held = self.held.roll(1, dims=1)
        update(self, verified)

    monkeypatch.setattr(HierarchyDrafter, "update", late)
    assert not all(are_its_own(drafter))


def test_a_network_in_a_hierarchy_in_a_hierarchy():
    target, batch, eos = meaningful_target("llama")
    middle = middle_of(target)
    small = middle_of(middle)
    system = Hierarchy(Hierarchy(reading(small), small, 2), middle)
    batch = {name: values[:3] for name, values in batch.items()}
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=12)
        check(target, batch, plain(target, batch, **arguments), system, 5, **arguments)


# ---- bad input


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Hierarchy(Reader(), "middle"), r"middle is a builtins.str; expected a causal LM"),
        (lambda: Hierarchy(Reader(), llama(), 0), r"num_inner_tokens is 0; expected a positive integer, or 'auto'"),
        (lambda: Hierarchy(None, llama()), r"Nothing was passed that drafts"),
        (lambda: Hierarchy(TrigramChains(), llama()), r"ChainDrafter cannot go back in its text"),
        (lambda: Hierarchy(Reader(), llama(vocab_size=80)), r"The assistant LlamaForCausalLM has 80 tokens"),
    ],
)
def test_bad_arguments(make, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        generate(llama(), make(), **ragged_batch(), max_new_tokens=2)
