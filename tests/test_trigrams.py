"""Chains of what followed each two tokens (ADED): which, that no text changes, how tables adapt, what they survive."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from exactness import check, plain, texts_of_threads
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, UNDER_A_DRAFTER, meaningful_target
from tiny import VOCAB, llama, ragged_batch

from specformer import TrigramChains, TrigramTable, generate
from specformer.generation.drafter import Prompts
from specformer.generation.drafter_chains import DOUBT, ChainDrafter
from specformer.generation.drafter_trigrams import MOST_SUCCESSORS, Votes
from specformer.generation.prompt import PromptLayout
from specformer.scripts.store import main as build
from specformer.scripts.store import parse


def some_texts(seed: int = 0, tokens: int = 20) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[int(tokens * numbers.random() ** 2) for _ in range(numbers.randrange(60))] for _ in range(40)]


def learned(table: TrigramTable, pair) -> dict[int, float]:
    (weights,) = table.after([pair])
    return weights


def test_counts_are_shares_of_the_most_frequent_successors():
    texts, table = some_texts(tokens=30), TrigramTable()
    table.count(texts)
    counts: dict[tuple, Counter] = {}
    for text in texts:
        for first, second, third in zip(text, text[1:], text[2:], strict=False):
            counts.setdefault((first, second), Counter())[third] += 1
    assert len(table) == len(counts) and max(map(len, counts.values())) > MOST_SUCCESSORS
    found = table.after([*counts, (99, 99)])
    assert found.pop() == {}
    for (pair, after), weights in zip(counts.items(), found, strict=True):
        shares = {token: count / after.total() for token, count in after.items()}
        assert len(weights) == min(len(after), MOST_SUCCESSORS), pair
        assert sorted(weights.values()) == pytest.approx(sorted(shares.values())[-len(weights) :])
        assert all(weights[token] == pytest.approx(shares[token]) for token in weights)


def test_what_is_written_gains_weight_up_to_a_bound():
    table = TrigramTable()
    table.count([[1, 2, 3], [1, 2, 4]])
    table.learn([[1, 2, 4]])
    assert learned(table, (1, 2)) == pytest.approx({3: 0.5, 4: 0.5 + table.VOTE})
    table.learn([[1, 2, 4]] * 100)
    assert learned(table, (1, 2))[4] == 0.5 + Votes.MOST
    table.frozen = True
    table.learn([[1, 2, 3]])
    assert learned(table, (1, 2))[3] == 0.5
    table.forget()
    assert learned(table, (1, 2)) == pytest.approx({3: 0.5, 4: 0.5})


def test_what_is_learned_is_bounded():
    votes = Votes(0.3, most_pairs=10)
    for number in range(1000):
        votes.add([number % 25, 1, number % 31])
        votes.add([7, 7, number % 40])
        assert len(votes.weights) <= 10 and max(map(len, votes.weights.values())) <= MOST_SUCCESSORS
    assert votes.get((7, 7)) and votes.get((999 % 25, 1))  # the newest stay


def drafts(table: TrigramTable, text: list[int], num_tokens: int = 6):
    drafter, ids = ChainDrafter(table), torch.tensor([text[:-1]])
    drafter.begin(Prompts(ids, PromptLayout.from_mask(None, ids), torch.tensor([text[-1:]]), 99))
    return drafter.propose(num_tokens, None)


def test_the_chain_of_the_most_expected_tokens():
    """Not the likeliest token first: what follows it is unknown, and what follows the other one goes on for long."""
    table = TrigramTable()
    table.count([[1, 2, 3]] * 6 + [[1, 2, 4, 5, 6, 7]] * 5)
    proposal = drafts(table, [1, 2])
    assert proposal.tokens.tolist() == [[4, 5, 6, 7]]
    assert proposal.confidences.tolist()[0] == pytest.approx([5 / 11 / (1 + DOUBT), *[1 / (1 + DOUBT)] * 3])
    assert drafts(table, [1, 2], 1).tokens.tolist() == [[3]]
    assert drafts(table, [9, 9]).tokens.shape == (1, 0)


def test_a_rows_own_text_counts_more_than_the_table():
    table = TrigramTable()
    table.count([[1, 2, 3]] * 9)
    assert drafts(table, [1, 2, 4, 1, 2, 4, 1, 2], 1).tokens.tolist() == [[4]]
    assert drafts(table, [8, 9, 1, 2], 1).tokens.tolist() == [[3]]


# ---- texts


@pytest.mark.parametrize("setting", UNDER_A_DRAFTER)
def test_the_text_does_not_depend_on_the_table(setting: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    table = TrigramTable()
    table.count(some_texts(tokens=VOCAB))
    for k in (None, 1, 8, 8):  # while it adapts
        check(target, batch, reference, TrigramChains(table), k, **arguments)


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_other_families(name: str):
    target, batch, eos = meaningful_target(name)
    chains = TrigramChains()
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for _ in range(2):
            check(target, batch, reference, chains, 5, **arguments)


ENDLESS = dict(max_new_tokens=40, eos_token_id=None)


@pytest.mark.one_version
def test_the_second_half_of_the_answers_is_ahead_of_the_first():
    """ADED's show: the table has learned by then; with the table cleared in between, it is not; nor if it is frozen."""
    target = llama()
    batches = [ragged_batch(padding=(0, 3, 5), seed=seed) for seed in (1, 2, 1, 2)]
    references = [plain(target, batch, **ENDLESS) for batch in batches]

    def halves(table: TrigramTable, clear: bool) -> list[float]:
        rates = []
        for number, (batch, reference) in enumerate(zip(batches, references, strict=True)):
            if number == 2 and clear:
                table.forget()
            rates.append(check(target, batch, reference, TrigramChains(table), 6, **ENDLESS).tokens_per_pass)
        return [sum(rates[:2]) / 2, sum(rates[2:]) / 2]

    first, second = halves(TrigramTable(), clear=False)
    assert second > 2.5 and second > 1.5 * first
    assert halves(TrigramTable(), clear=True) == pytest.approx([first, first])
    frozen = halves(TrigramTable(frozen=True), clear=False)
    assert frozen[0] == pytest.approx(frozen[1]) and frozen[0] <= first


def test_a_fault_in_the_table_costs_drafts_and_no_text(monkeypatch):
    """What the test before measures can fail; what is written cannot."""
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    table = TrigramTable()
    table.count(reference.sequences.tolist())
    right = check(target, batch, reference, TrigramChains(table), 6, **ENDLESS).tokens_per_pass
    after = TrigramTable.after
    monkeypatch.setattr(TrigramTable, "after", lambda self, pairs: after(self, [pair[::-1] for pair in pairs]))
    assert check(target, batch, reference, TrigramChains(table), 6, **ENDLESS).tokens_per_pass < right / 2


@pytest.mark.one_version
def test_rejection_keeps_the_distribution():
    target = llama(torch.float32)
    ids = torch.tensor([[7, 8, 9, 7, 8]]).expand(4000, -1)
    logits = target(input_ids=torch.tensor([[7, 8, 9, 7, 8, 9]])).logits[0, -1].detach()
    table = TrigramTable(frozen=True)
    table.count([[8, 9, int(logits.argmax())]])
    torch.manual_seed(0)
    only = lambda row, text: [9] if len(text) == 5 else list(range(VOCAB))  # noqa: E731
    output = generate(
        target, TrigramChains(table), input_ids=ids, attention_mask=torch.ones_like(ids),
        do_sample=True, acceptance="rejection", max_new_tokens=3, eos_token_id=None, num_assistant_tokens=1,
        prefix_allowed_tokens_fn=only, return_dict_in_generate=True,
    )  # fmt: skip
    assert output.statistics.drafted_per_slot[0] > 3000
    seen = output.sequences[:, 6].bincount(minlength=VOCAB) / len(ids)
    assert float((seen - logits.softmax(-1)).abs().sum() / 2) < 0.08


@pytest.mark.one_version
def test_calls_in_threads_share_a_table():
    target, batch = llama(), ragged_batch()
    expected = plain(target, batch, **ENDLESS).sequences.tolist()
    chains = TrigramChains(TrigramTable(max_adapted_pairs=50))
    found = texts_of_threads(target, chains, batch, **ENDLESS, num_assistant_tokens=6)
    assert len(found) == 9 and all(text == expected for text in found)


# ---- files, and bad input


def test_what_was_counted_and_learned_is_saved(tmp_path: Path):
    table = TrigramTable(max_adapted_pairs=77)
    table.count(some_texts())
    table.learn([[1, 2, 3, 4], [50, 51, 52]])
    table.save(tmp_path / "folder" / "table.safetensors")
    loaded = TrigramTable.load(tmp_path / "folder" / "table.safetensors", frozen=True)
    pairs = [(first, second) for first in range(60) for second in range(60)]
    for ours, theirs in zip(loaded.after(pairs), table.after(pairs), strict=True):
        assert ours == pytest.approx(theirs)
    assert loaded.largest_token == 52 and loaded._votes.most_pairs == 77 and loaded.frozen
    loaded.frozen = False
    loaded.learn([[1, 2, 9]])
    loaded.save(tmp_path / "folder" / "table.safetensors")  # over the file that it is read from
    assert learned(TrigramTable.load(tmp_path / "folder" / "table.safetensors"), (1, 2))[9] > 0
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch):
    table, path = TrigramTable(), tmp_path / "table.safetensors"
    table.count([[1, 2, 3]])
    table.save(path)
    before = path.read_bytes()

    def full(tensors, place, about):
        place.write_bytes(b"half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("specformer.generation.drafter_trigrams.save_file", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left.*what was there before is safe"):
        table.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_damaged_tables_are_named(tmp_path: Path):
    table, path = TrigramTable(), tmp_path / "table.safetensors"
    with pytest.raises(FileNotFoundError, match=r"is not there. Make it with `specformer store --trigrams"):
        TrigramTable.load(path)
    table.count([[1, 2, 3]])
    table.save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:40], whole[:-4], whole.replace(b"trigrams 1", b"trigrams 9")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"table.safetensors is no table of trigrams, or damaged .*Make it again"):
            TrigramTable.load(path)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TrigramTable(0), r"max_adapted_pairs is 0; expected a positive integer.*frozen=True"),
        (lambda: TrigramTable().count([[1, -1, 2]]), r"negative token ids"),
        (lambda: TrigramTable().count([[1, 2]]), r"no text of three tokens or more"),
        (lambda: TrigramChains("table"), r"table is a builtins.str; expected a TrigramTable"),
    ],
)
def test_bad_arguments(make, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("how", ["count", "learn"])
def test_a_table_of_another_tokenizer_is_refused(how: str):
    table = TrigramTable()
    getattr(table, how)([[1, 2, VOCAB]])
    with pytest.raises(ValueError, match=r"holds the token 64, and the target has 64 tokens: it is of another"):
        generate(llama(), TrigramChains(table), **ragged_batch(), max_new_tokens=2)


def test_the_command(tmp_path: Path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("[1, 2, 3]\n[1, 2, 4]\n", encoding="utf-8")

    def command(*more: str):
        options = ["--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "table"), "--trigrams", *more]
        monkeypatch.setattr(sys, "argv", ["specformer store", *options])
        build(parse())

    command()
    assert learned(TrigramTable.load(tmp_path / "table"), (1, 2)) == {3: 0.5, 4: 0.5}
    with pytest.raises(FileExistsError, match=r"table exists; name another one"):
        command()
    with pytest.raises(ValueError, match=r"counted from all texts at once"):
        command("--add")
