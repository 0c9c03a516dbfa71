"""A drafter of one's own: the documented example works in batches, a broken one ends in a sentence that names it."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
from exactness import check, plain
from test_exactness import NEW_TOKENS, SAMPLING, meaningful_target
from tiny import VOCAB, llama, ragged_batch

import specformer
from specformer import Drafter, Proposal, generate
from specformer.generation import drafter as contract
from specformer.generation.proposal import first_path

ENDLESS = dict(eos_token_id=None, max_new_tokens=NEW_TOKENS)


def example() -> type[Drafter]:
    """The class that the contract shows, as it stands there."""
    shown = contract.__doc__[
        contract.__doc__.index("    class RepeatLast") : contract.__doc__.index("    specformer.generate(")
    ]
    space = {"Drafter": specformer.Drafter, "Proposal": specformer.Proposal}
    exec(textwrap.dedent(shown), space)
    assert len(shown.strip().splitlines()) <= 16
    return space["RepeatLast"]


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_the_example_works_and_appears_in_statistics(sampling: dict):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    statistics = check(target, batch, reference, example()(), 3, **arguments)
    assert statistics.drafted_per_slot[0] > 0 and len(statistics.drafted_per_slot) == 3


def test_the_example_through_custom_generate(tmp_path):
    """Its class is derived from the package's `Drafter`, and the strategy is another copy of the code."""
    target, batch, _ = meaningful_target("llama")
    reference = plain(target, batch, **ENDLESS)
    specformer.SpecFormerModel(specformer.SpecFormerConfig.from_target_config(target.config)).save_pretrained(tmp_path)
    output = target.generate(
        **batch, **ENDLESS, assistant_model=example()(), custom_generate=str(tmp_path), trust_remote_code=True
    )
    assert output.tolist() == reference.sequences.tolist()


class SomeRows(Drafter):
    """The right tokens in the first rows, nothing in the others."""

    def __init__(self, text: torch.Tensor, rows: int):
        self.text, self.num_rows = text, rows

    def begin(self, prompts):
        self.rows = torch.arange(len(prompts.input_ids))
        self.written = torch.ones_like(self.rows)

    def propose(self, num_tokens, choose):
        steps = self.written[:, None] + torch.arange(num_tokens)
        tokens = self.text[self.rows[:, None], steps.clamp(max=self.text.shape[1] - 1)]
        return Proposal(tokens.masked_fill(self.rows[:, None] >= self.num_rows, -1))

    def update(self, verified):
        self.written = self.written + verified.counts

    def select_rows(self, index, longest):
        self.rows, self.written = self.rows[index], self.written[index]


@pytest.mark.parametrize("acceptance", ["match", "rejection", "coupled"])
@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("rows", [0, 2, 5])
def test_rows_with_nothing_to_draft_do_not_count(rows: int, sampling: dict, acceptance: str):
    target, batch, _ = meaningful_target("llama")
    reference = plain(target, batch, **ENDLESS, **sampling)
    drafter = SomeRows(reference.sequences[:, 9:], rows)
    if sampling and acceptance != "match":
        torch.manual_seed(3)
        settings = dict(ENDLESS, **sampling, acceptance=acceptance, num_assistant_tokens=4)
        statistics = generate(target, drafter, **batch, **settings, return_dict_in_generate=True).statistics
        assert (sum(statistics.drafted_per_slot) == 0) == (rows == 0)
        return
    statistics = check(target, batch, reference, drafter, 4, **ENDLESS, **sampling)
    assert statistics.drafted_per_slot[:1] == statistics.accepted_per_slot[:1]  # nothing that was drafted was wrong
    assert sum(statistics.drafted_per_slot) - sum(statistics.accepted_per_slot) <= 3  # but past the end of the text
    passes = statistics.target_passes_per_row
    assert all(count == NEW_TOKENS - 1 for count in passes[rows:])
    assert all(count < NEW_TOKENS / 3 for count in passes[:rows])


class Sees(SomeRows):
    """Notes what it is shown."""

    hidden_state_layers = [1, 4]
    reads_logits = True

    def __init__(self, *args):
        super().__init__(*args)
        self.shown = []

    def begin(self, prompts):
        super().begin(prompts)
        self.groups = [
            (states, group) for states, group in zip(prompts.hidden_states, prompts.layout.groups, strict=True)
        ]

    def update(self, verified):
        self.shown.append((verified, self.rows.clone(), self.written.clone()))
        super().update(verified)


@torch.no_grad()
def test_hidden_states_and_logits_are_those_of_the_text():
    """State i enters layer i, the last one is what the head reads; at the positions of a round, and of the prompts."""
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    drafter = Sees(reference.sequences[:, 9:], 3)
    check(target, batch, reference, drafter, 4, **ENDLESS)
    padding = (batch["attention_mask"] == 0).sum(1).tolist()
    whole = []
    for row, text in enumerate(reference.sequences):
        output = target(input_ids=text[None, padding[row] :], output_hidden_states=True)
        whole.append((torch.stack([output.hidden_states[1], output.hidden_states[4]], dim=2)[0], output.logits[0]))
    for states, group in drafter.groups:
        for row, of_row in zip(group.rows.tolist(), states, strict=True):
            length = 9 - padding[row]
            torch.testing.assert_close(of_row[-length:], whole[row][0][:length], rtol=0, atol=1e-9)
    assert len(drafter.shown) > 5
    for verified, rows, written in drafter.shown:
        for place, row in enumerate(rows.tolist()):
            count = int(verified.counts[place])
            start = 9 - padding[row] + int(written[place]) - 1
            states, logits = (part[start : start + count] for part in whole[row])
            torch.testing.assert_close(verified.hidden_states[place, :count], states, rtol=0, atol=1e-9)
            torch.testing.assert_close(verified.logits[place, :count], logits, rtol=0, atol=1e-9)


class SamplesByItself(SomeRows):
    """Draws uniformly from ten tokens, and says so."""

    def propose(self, num_tokens, choose):
        tokens = torch.randint(10, (len(self.rows), num_tokens))
        return Proposal(tokens, probabilities=torch.zeros(*tokens.shape, VOCAB).index_fill_(2, torch.arange(10), 0.1))


@pytest.mark.one_version
def test_probabilities_of_a_drafter_that_samples_by_itself_keep_the_distribution():
    """Rejection sampling of one token, 8,000 times: the target's distribution, and not if the drafter lies."""
    target = llama(torch.float32)
    ids = torch.randint(6, VOCAB, (1, 6)).expand(8000, -1)
    settings = dict(do_sample=True, max_new_tokens=3, eos_token_id=None, acceptance="rejection", num_assistant_tokens=1)
    first = int(target(input_ids=ids[:1]).logits[0, -1].argmax())
    prefix = torch.cat([ids, torch.full((8000, 1), first)], dim=1)
    expected = target(input_ids=prefix[:1]).logits[0, -1].softmax(-1)

    def distance(drafter) -> float:
        torch.manual_seed(0)
        output = generate(
            target,
            drafter,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **settings,
            prefix_allowed_tokens_fn=lambda row, text: [first] if len(text) == 6 else list(range(VOCAB)),
        )
        seen = output[:, 7].bincount(minlength=VOCAB) / 8000
        return float((seen - expected).abs().sum() / 2)

    class Lies(SamplesByItself):
        def propose(self, num_tokens, choose):
            proposal = super().propose(num_tokens, choose)
            proposal.probabilities = torch.full_like(proposal.probabilities, 1e-9)
            return proposal

    arguments = (torch.zeros(8000, 2, dtype=torch.long), 8000)
    assert distance(SamplesByItself(*arguments)) < 0.07
    assert distance(Lies(*arguments)) > 0.12


# ---- trees


class Tree(SomeRows):
    """The right tokens as the first children, and wrong siblings between them."""

    def propose(self, num_tokens, choose):
        right = super().propose((num_tokens + 1) // 2, choose).tokens
        wrong = (right + 1) % VOCAB
        tokens = torch.stack([right, wrong], dim=2).flatten(1)[:, :num_tokens]
        places = torch.arange(num_tokens)
        parents = torch.where(places < 2, -1, 2 * (places // 2) - 2).expand(len(tokens), -1)
        return Proposal(tokens.masked_fill(tokens == 0, -1), parents=parents)


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_the_first_path_of_a_tree_is_verified(sampling: dict):
    target, batch, _ = meaningful_target("llama")
    reference = plain(target, batch, **ENDLESS, **sampling)
    drafter = Tree(reference.sequences[:, 9:], 5)
    statistics = check(target, batch, reference, drafter, 5, **ENDLESS, **sampling)  # three right ones and two wrong
    assert len(statistics.drafted_per_slot) == 3
    assert sum(statistics.drafted_per_slot) - sum(statistics.accepted_per_slot) <= 5  # past the end of a row


def test_first_path_of_rows_with_trees_of_their_own():
    tokens = torch.tensor([[7, 8, 9, 10], [7, 8, 9, -1], [-1, -1, -1, -1], [5, 6, 7, 8]])
    parents = torch.tensor([[-1, -1, 1, 0], [-1, 0, 1, 2], [-1, 0, 1, 2], [-1, -1, -1, -1]])
    confidences = torch.rand(4, 4)
    path = first_path(Proposal(tokens, confidences, parents=parents))
    assert path.tokens.tolist() == [[7, 10, -1], [7, 8, 9], [-1] * 3, [5, -1, -1]]
    assert path.confidences[0, :2].tolist() == confidences[0, [0, 3]].tolist()
    nothing = Proposal(tokens[:, :0], parents=parents[:, :0])
    assert first_path(nothing).tokens.shape == (4, 0)


def test_a_tree_of_chosen_tokens_is_refused_where_the_text_depends_on_what_they_were_sampled_from():
    class Chosen(Tree):
        def propose(self, num_tokens, choose):
            proposal = super().propose(num_tokens, choose)
            return Proposal(choose(torch.zeros(*proposal.tokens.shape, VOCAB)), parents=proposal.parents)

    target, batch = llama(), ragged_batch()
    drafter = Chosen(torch.ones(5, NEW_TOKENS, dtype=torch.long), 5)
    with pytest.raises(ValueError, match=r"test_own_drafter.*Chosen proposed a tree, and acceptance='rejection' needs"):
        generate(target, drafter, **batch, **ENDLESS, do_sample=True, acceptance="rejection", num_assistant_tokens=4)


# ---- broken ones


class Broken(SomeRows):
    def __init__(self, proposal):
        super().__init__(torch.zeros(5, 40, dtype=torch.long), 5)
        self.proposal = proposal

    def propose(self, num_tokens, choose):
        return self.proposal(num_tokens)


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("proposal", "sentence"),
    [
        (lambda k: torch.zeros(5, k, dtype=torch.long), r"proposed a Tensor; expected a Proposal"),
        (lambda k: None, r"proposed a NoneType; expected a Proposal"),
        (
            lambda k: Proposal(torch.zeros(4, k, dtype=torch.long)),
            r"shape \(4, 3\); expected one row for each of the 5",
        ),
        (lambda k: Proposal(torch.zeros(5, k + 1, dtype=torch.long)), r"shape \(5, 4\); .* at most 3 columns"),
        (lambda k: Proposal(torch.zeros(5, dtype=torch.long)), r"shape \(5,\)"),
        (lambda k: Proposal(torch.zeros(5, k)), r"proposed tokens of torch.float32; expected torch.int64"),
        (lambda k: Proposal(torch.full((5, k), VOCAB)), r"from 64 to 64; expected 0 to 63, or -1 for none"),
        (lambda k: Proposal(torch.full((5, k), -2)), r"from -2 to -2"),
        (
            lambda k: Proposal(torch.zeros(5, k, dtype=torch.long), torch.ones(5)),
            r"proposed confidences of shape \(5,\)",
        ),
        (
            lambda k: Proposal(torch.zeros(5, k, dtype=torch.long), parents=torch.arange(k).expand(5, -1)),
            r"proposed parents that do not stand before their children",
        ),
        (
            lambda k: Proposal(torch.zeros(5, k, dtype=torch.long), parents=torch.full((5, k), -1.0)),
            r"proposed parents of torch.float32",
        ),
    ],
)
@pytest.mark.parametrize("sampling", [{}, dict(do_sample=True, acceptance="rejection")], ids=["greedy", "rejection"])
def test_broken_proposal(proposal, sentence: str, sampling: dict):
    target, batch = llama(), ragged_batch()
    with pytest.raises(ValueError, match=rf"The drafter test_own_drafter\.Broken .*{sentence}"):
        generate(target, Broken(proposal), **batch, **ENDLESS, **sampling, num_assistant_tokens=3)
    # and leaves nothing behind
    reference = plain(target, batch, **ENDLESS)
    check(target, batch, reference, SomeRows(reference.sequences[:, 9:], 3), 3, **ENDLESS)


class Pads:
    """Rows that it stops are padded, and may leave the batch."""

    eos_token_id = torch.tensor([63])

    def __init__(self, criterion):
        self.criterion = criterion

    def __call__(self, *args, **kwargs):
        return self.criterion(*args, **kwargs)


@pytest.mark.parametrize("step", contract.STEPS)
def test_errors_of_a_drafter_say_whose_they_are(step: str):
    def fails(self, *args):
        raise ZeroDivisionError("its own mistake")

    def rows_stop(input_ids, scores, **kwargs):
        return input_ids.shape[1] >= 12 + 4 * torch.arange(len(input_ids))

    target, batch = llama(), ragged_batch()
    settings = dict(max_new_tokens=NEW_TOKENS, pad_token_id=0, stopping_criteria=[Pads(rows_stop)])
    reference = plain(target, batch, **settings)
    broken = type("Failing", (SomeRows,), {step: fails})
    with pytest.raises(ZeroDivisionError, match="its own mistake") as caught:
        generate(target, broken(reference.sequences[:, 9:], 5), **batch, **settings, num_assistant_tokens=3)
    assert re.search(rf"Raised by the drafter .*Failing, in {step}\(\)", "".join(caught.value.__notes__))


def test_what_is_no_drafter_is_refused():
    class Half:
        def propose(self, num_tokens, choose):
            return None

    with pytest.raises(ValueError, match=r"assistant_model is a Half; expected a SpecFormer drafter.* Drafter"):
        generate(llama(), Half(), **ragged_batch(), max_new_tokens=2)
