"""What on_round is told: put together it is the text, with who drafted what; and nothing of it can change one."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
import torch
from exactness import check, oracle, plain
from test_exactness import NEW_TOKENS, SAMPLING, StopAt, meaningful_target
from test_no_waste import Waits, make_network, spread_eos
from tiny import llama, ragged_batch
from trees import OracleTree

import specformer
from specformer import Proposal, Round, RowRound, generate
from specformer.generation import call_rounds
from specformer.generation.text_stopping import StoppingRules

SETTINGS = {
    "greedy": {},
    "sampling": SAMPLING,
    "no end of sequence": dict(eos_token_id=None),
    "penalty": dict(repetition_penalty=1.3),
    "rows stop on their own": dict(stopping_criteria=[StopAt([12, 30, 17, 11, 22])]),
    "nothing pads": dict(stopping_criteria=[StopAt([12, 30, 17, 11, 22])], eos_token_id=None),
    "scores": dict(output_scores=True, return_dict_in_generate=True),
}


def put_together(rounds: list[Round], batch_size: int) -> list[list[int]]:
    """The new tokens of each row."""
    text: list[list[int]] = [[] for _ in range(batch_size)]
    for told in rounds:
        for row in told.rows:
            text[row.row] += row.tokens
    return [row[:length] for row, length in zip(text, rounds[-1].lengths, strict=True)]


def check_rounds(rounds: list[Round], output, batch: dict) -> None:
    """That `rounds` are those of `output`, tokens and statistics."""
    prompts, found = batch["input_ids"], output.statistics
    new = output.sequences[:, prompts.shape[1] :].tolist()
    text = put_together(rounds, len(prompts))
    assert text == [row[:length] for row, length in zip(new, found.tokens_per_row, strict=True)]
    assert [told.number for told in rounds] == list(range(found.rounds + 1))
    assert [told.done for told in rounds] == [False] * found.rounds + [True]
    was_drafted: list[list[bool]] = [[] for _ in text]
    drafted, finished = 0, set()
    for told in rounds:
        assert [row.row for row in told.rows] == sorted({row.row for row in told.rows} - finished)
        for row in told.rows:
            assert row.tokens[: row.accepted] == row.drafted[: row.accepted]
            assert len(row.tokens) == row.accepted + (row.from_target is not None) > 0
            assert (row.source is None) == (not row.drafted)
            was_drafted[row.row] += [place < row.accepted for place in range(len(row.tokens))]
            drafted += len(row.drafted)
            finished |= {row.row} if row.finished else set()
    assert finished == set(range(len(text)))
    assert [of_row[: len(row)] for of_row, row in zip(was_drafted, text, strict=True)] == found.was_drafted
    assert drafted == sum(found.drafted_per_slot)


def run(target, drafter, batch: dict, k: int, seed: int = 3, **arguments):
    rounds: list[Round] = []
    torch.manual_seed(seed)
    arguments |= dict(num_assistant_tokens=k, return_dict_in_generate=True, on_round=rounds.append)
    return generate(target, drafter, **batch, **arguments), rounds


@pytest.mark.one_version
@pytest.mark.parametrize("kind", ["never", "sometimes", "adversarial"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_rounds_put_together_are_the_text(setting: str, kind: str):
    """Rows that end at different times, and leave; rows that are carried on; rows that end inside of their drafts."""
    target, batch, eos = meaningful_target("llama")
    arguments = {"eos_token_id": eos, **SETTINGS[setting], "max_new_tokens": NEW_TOKENS}
    expected = {name: value for name, value in arguments.items() if name != "output_scores"}
    reference = plain(target, batch, **{**expected, "return_dict_in_generate": False})
    for k in (1, 4):
        output, rounds = run(target, oracle(reference, batch, kind, eos), batch, k, **arguments)
        assert output.sequences.tolist() == reference.sequences.tolist()
        check_rounds(rounds, output, batch)
        assert {row.source for told in rounds for row in told.rows} == {None, "drafter"}


FAULTS = {
    "another row's tokens": lambda tokens, drafts, drafted, outcome: (tokens.roll(1, 0), drafts, drafted, outcome),
    "one token less": lambda tokens, drafts, drafted, outcome: (
        tokens,
        drafts,
        drafted,
        [(accepted, max(min(added, 1), added - 1)) for accepted, added in outcome],
    ),
    "all drafts accepted": lambda tokens, drafts, drafted, outcome: (
        tokens,
        drafts,
        drafted,
        [(count, added) for count, (_, added) in zip(drafted, outcome, strict=True)],
    ),
}


@pytest.mark.one_version
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_can_fail(fault: str, monkeypatch):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    report = call_rounds.Rounds.report

    def wrong(self, *given):
        report(self, *FAULTS[fault](*given[:4]), *given[4:])

    monkeypatch.setattr(call_rounds.Rounds, "report", wrong)
    output, rounds = run(target, oracle(reference, batch, "sometimes", eos), batch, 4, **arguments)
    with pytest.raises(AssertionError):
        check_rounds(rounds, output, batch)


@pytest.mark.parametrize("pads", [True, False])
def test_rows_that_the_clock_cuts(pads: bool):
    """Rows that are ahead are cut to the column of the others, also those that had finished."""
    target, batch, eos = meaningful_target("llama")
    endless = dict(eos_token_id=eos if pads else None, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **endless)
    drafter = oracle(reference, batch, "adversarial", eos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoppingRules, "time_is_up", lambda self, ids: drafter.rounds == 4)
        output, rounds = run(target, drafter, batch, 4, **endless)
    check_rounds(rounds, output, batch)
    told = sum(len(row.tokens) for told in rounds for row in told.rows)
    assert told > sum(rounds[-1].lengths), "nothing was cut"


# ---- who drafted


def sources(target, drafter, batch: dict, **arguments) -> set[str | None]:
    reference = plain(target, batch, eos_token_id=None, max_new_tokens=NEW_TOKENS)
    rounds: list[Round] = []
    settings = dict(eos_token_id=None, max_new_tokens=NEW_TOKENS, on_round=rounds.append)
    output = generate(target, drafter, **batch, **settings, return_dict_in_generate=True, **arguments)
    assert output.sequences.tolist() == reference.sequences.tolist()
    check_rounds(rounds, output, batch)
    return {row.source for told in rounds for row in told.rows}


def test_who_drafted():
    target, batch = llama(), ragged_batch()
    batch["input_ids"][0] = torch.tensor([7, 8, 9, 7, 8, 9, 7, 8, 9])
    network = make_network(target)
    assert sources(target, network, batch, num_assistant_tokens=3) == {None, "network", "copy"}
    alone = dict(num_assistant_tokens=3, prompt_lookup_num_tokens=0)
    assert sources(target, network, batch, **alone) == {None, "network"}
    assert sources(target, target, batch, num_assistant_tokens=3) == {None, "assistant"}
    assert sources(target, None, batch, prompt_lookup_num_tokens=3) == {None, "copy"}
    together = dict(prompt_lookup_num_tokens=3, num_assistant_tokens="auto", tree_size=0)
    assert sources(target, None, batch, **together) <= {None, "copy"}
    assert sources(target, network, batch, num_assistant_tokens=0) == {None}


def test_copies_are_told_from_the_network(monkeypatch):
    """Row by row: what is called a copy stood in the row's own text, after the token that it follows."""
    target, batch = llama(), ragged_batch()
    rounds: list[Round] = []
    generate(target, make_network(target), **batch, max_new_tokens=60, num_assistant_tokens=2, on_round=rounds.append)
    text = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    seen = set()
    for told in rounds:
        for row in told.rows:
            before = text[row.row]
            if row.source == "copy":
                assert (before[-1], row.drafted[0]) in pairwise(before)
            seen.add(row.source)
            before += row.tokens
    assert {"copy", "network"} <= seen


class TwoWays(specformer.Drafter):
    """Names who drafts by itself."""

    sources = ("a table", "a guess")
    names = (0, 1, 1, 0, 1)

    def begin(self, prompts):
        self.places, self.newest = torch.arange(len(prompts.input_ids)), prompts.first_tokens

    def propose(self, num_tokens, choose):
        return Proposal(self.newest.expand(-1, num_tokens), sources=torch.tensor(self.names)[self.places])

    def update(self, verified):
        self.newest = verified.newest(self.newest)

    def select_rows(self, index, longest):
        self.places, self.newest = self.places[index], self.newest[index]


def test_a_drafter_names_its_sources():
    rounds: list[Round] = []
    target = llama()
    generate(target, TwoWays(), **ragged_batch(), max_new_tokens=12, on_round=rounds.append, num_assistant_tokens=2)
    named = {row.row: row.source for told in rounds[1:] for row in told.rows if row.drafted}
    assert [named[row] for row in range(5)] == ["a table", "a guess", "a guess", "a table", "a guess"]


@pytest.mark.parametrize("names, said", [((0, 1, 2, 0, 1), "has the 2 sources"), ((0, 1), r"expected \(5,\)")])
def test_a_broken_drafter_is_named(names: tuple, said: str):
    class Broken(TwoWays):
        def propose(self, num_tokens, choose):
            return Proposal(self.newest.expand(-1, num_tokens), sources=torch.tensor(names))

    with pytest.raises(ValueError, match=f"Broken.*{said}"):
        generate(llama(), Broken(), **ragged_batch(), max_new_tokens=12, on_round=print, num_assistant_tokens=2)


# ---- what it cannot do


@pytest.mark.parametrize("acceptance", ["match", "coupled", "rejection"])
def test_a_callback_changes_no_text(acceptance: str):
    """One that draws random numbers, tries to change what it is given, and takes its time."""
    target, batch = llama(), ragged_batch()
    network = make_network(target)
    settings = dict(SAMPLING, acceptance=acceptance, max_new_tokens=24, num_assistant_tokens=3)

    def meddle(told: Round) -> None:
        torch.rand(5)
        assert not torch.is_grad_enabled()
        for thing, name in ((told, "number"), (told.rows[0], "tokens")):
            with pytest.raises(FrozenInstanceError):
                setattr(thing, name, 0)
        assert all(type(part) is int for row in told.rows for part in (*row.tokens, *row.drafted))
        assert isinstance(told.rows, tuple) and isinstance(told.lengths, tuple)

    texts = []
    for on_round in (None, meddle):
        torch.manual_seed(3)
        texts.append(generate(target, network, **batch, **settings, on_round=on_round).tolist())
    assert texts[0] == texts[1]


def test_the_same_with_and_without():
    """The text, the streamer's calls, and where torch's generator is left."""
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SAMPLING, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    rounds: list[Round] = []
    check(target, batch, reference, oracle(reference, batch, "sometimes", eos), 3, on_round=rounds.append, **arguments)
    assert rounds[-1].done


def test_an_exception_ends_the_call_and_nothing_else():
    target, batch = llama(), ragged_batch()
    network = make_network(target)
    settings = dict(max_new_tokens=24, num_assistant_tokens=3)
    expected = target.generate(**batch, max_new_tokens=24).tolist()

    def stop(told: Round) -> None:
        if told.number == 2:
            raise InterruptedError("enough")

    for _ in range(2):
        with pytest.raises(InterruptedError, match="enough"):
            generate(target, network, **batch, **settings, on_round=stop)
        assert target.generate(**batch, max_new_tokens=24).tolist() == expected
        assert generate(target, network, **batch, **settings).tolist() == expected


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match=r"on_round is a builtins\.int; expected a function that takes one argument"):
        generate(llama(), None, **ragged_batch(), prompt_lookup_num_tokens=2, on_round=3)


def test_through_custom_generate(tmp_path):
    """The strategy is another copy of the code, whose rounds are the same."""
    target, batch = llama(), ragged_batch()
    network = make_network(target)
    network.save_pretrained(tmp_path)
    ours, theirs = [], []
    settings = dict(max_new_tokens=12, num_assistant_tokens=3)
    generate(target, network, **batch, **settings, on_round=ours.append)
    strategy = dict(assistant_model=network, custom_generate=str(tmp_path), trust_remote_code=True)
    target.generate(**batch, **settings, **strategy, on_round=theirs.append)
    assert list(map(repr, ours)) == list(map(repr, theirs))
    assert isinstance(ours[0], Round) and isinstance(ours[0].rows[0], RowRound)


# ---- what it costs


@pytest.mark.parametrize("kind", ["always", "sometimes"])
def test_rounds_of_trees(kind: str):
    """What the target took of a tree comes first, and the branches beside it after that."""
    target, batch, eos = meaningful_target("llama")
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    drafter, rounds = OracleTree(reference.sequences, 9, kind, eos), []
    options = dict(num_assistant_tokens=4, tree_size=9, return_dict_in_generate=True)
    output = generate(target, drafter, **batch, **arguments, **options, on_round=rounds.append)
    assert put_together(rounds, 5) == [
        row[:length]
        for row, length in zip(output.sequences[:, 9:].tolist(), output.statistics.tokens_per_row, strict=True)
    ]
    rows = [row for told in rounds for row in told.rows]
    assert all(row.tokens[: row.accepted] == row.drafted[: row.accepted] for row in rows)
    assert any(len(row.drafted) > 4 > row.accepted > 0 for row in rows)  # branches beside an accepted path
    assert {row.source for row in rows} == {None, "drafter"}


@pytest.mark.parametrize("used", [False, True])
def test_waits_of_the_host(used: bool, monkeypatch):
    """None but those of a round where it is not used, whose tensors are then not touched either; one a round where it
    is."""
    target, batch = llama(), ragged_batch()
    network = make_network(target)
    eos, _ = spread_eos(target, batch, 32)
    generate(target, network, **batch, max_new_tokens=2)  # the probe, once per target
    with pytest.MonkeyPatch.context() as patch, Waits(patch) as waits:
        patch.setattr(call_rounds, "to_host", lambda packed: specformer.generation.text.to_host(packed))
        settings = dict(eos_token_id=eos, max_new_tokens=32, num_assistant_tokens=3, return_dict_in_generate=True)
        statistics = generate(
            target, network, **batch, **settings, on_round=(lambda told: None) if used else None
        ).statistics
    assert waits.transfers == (statistics.rounds + 1) * (1 + used)
    assert ("on_round" in statistics.seconds) == used
