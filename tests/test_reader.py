"""Copies of stored texts, and behind drafts (READER): which, how sure, that no text changes; what stores survive."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from exactness import check, plain, texts_of_threads
from oracles import Oracle
from test_drafters import repeats_what_came_five_before
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, UNDER_A_DRAFTER, meaningful_target
from tiny import VOCAB, llama, ragged_batch

from specformer import AnswerStore, Reader, generate
from specformer.generation import drafter_suffixes as index
from specformer.generation.drafter_copying import CopyRates
from specformer.generation.drafter_reader import ReaderDrafter
from specformer.generation.drafter_suffixes import DEPTH, SortedTexts, in_one, sorted_places, suffixes
from specformer.generation.proposal import NO_TOKEN
from specformer.scripts.store import main as build
from specformer.scripts.store import parse


def some_texts(count: int = 30, tokens: int = 5, seed: int = 0) -> list[list[int]]:
    """Of few different tokens, so that much of them is there several times."""
    numbers = random.Random(seed)
    return [[numbers.randrange(tokens) for _ in range(numbers.randrange(1, 40))] for _ in range(count)]


def texts_of(sequences: torch.Tensor, batch: dict) -> list[list[int]]:
    padding = (batch["attention_mask"] == 0).sum(1).tolist()
    return [row[count:] for row, count in zip(sequences.tolist(), padding, strict=True)]


# ---- looking up


def by_hand(texts: list[list[int]], suffix: list[int], num_tokens: int) -> tuple[int, set[int]]:
    """How much of `suffix` stands in front of some token at most, and the most frequent tokens there."""
    longest, votes = 0, {}
    for text in texts:
        for place in range(1, len(text)):
            agree = 0
            while agree < min(place, len(suffix), DEPTH) and text[place - 1 - agree] == suffix[-1 - agree]:
                agree += 1
            if agree > longest:
                longest, votes = agree, {}
            if agree == longest:
                votes[text[place]] = votes.get(text[place], 0) + 1
    return longest, {token for token, count in votes.items() if count == max(votes.values())}


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_suffix_is_found_and_the_most_frequent_token(seed: int, monkeypatch):
    monkeypatch.setattr(index, "VOTERS", 700)
    texts = some_texts(seed=seed)
    tokens = in_one(texts)
    stored = SortedTexts(tokens, sorted_places(tokens))
    rows = [*some_texts(40, seed=seed + 100), texts[3], [9, 9], [9, 1]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    first, last, matched = stored.find(suffixes(ids, torch.tensor([len(row) for row in rows])))
    copies = stored.continuations(first, last, 3)
    lengths = set()
    for row, agree, copy in zip(rows, matched.tolist(), copies.tolist(), strict=True):
        expected, best = by_hand(texts, row, 3)
        assert agree == expected
        if agree:
            assert copy[0] in best
            assert any(str(row[-agree:] + copy[: copy.index(-1) if -1 in copy else 3])[1:-1] in str(t) for t in texts)
        lengths.add(agree)
    assert len(lengths) > 4 and min(lengths) == 0  # the search had something to tell apart


def test_a_text_ends_where_the_next_one_begins():
    tokens = in_one([[1, 2, 3], [4, 5]])
    stored = SortedTexts(tokens, sorted_places(tokens))
    found = stored.find(suffixes(torch.tensor([[1, 2], [3, 4], [9, 3]]), torch.tensor([2, 2, 2])))
    assert found[2].tolist() == [2, 1, 0]  # of [3, 4] only the 4: they are of two texts
    assert stored.continuations(found[0][:2], found[1][:2], 3).tolist() == [[3, -1, -1], [5, -1, -1]]


def test_searches_may_be_empty(tmp_path: Path):
    store = AnswerStore(tmp_path, max_grown_tokens=100)
    assert store.find(torch.full((2, DEPTH), 3), 4)[1].tolist() == [0, 0]
    store.add([[], [7]])  # nothing follows anything
    assert store.num_tokens == 0 and not list(tmp_path.iterdir())


# ---- texts


@pytest.mark.parametrize("setting", UNDER_A_DRAFTER)
def test_the_text_does_not_depend_on_the_store(setting: str, tmp_path: Path):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    store = AnswerStore(tmp_path, max_grown_tokens=10_000)
    store.add(some_texts(tokens=VOCAB))
    for k in (None, 1, 8, 8):  # while it grows by these very texts
        check(target, batch, reference, Reader(store), k, **arguments)
    assert store.num_tokens > 1000 or "num_return_sequences" not in arguments


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_other_families(name: str, tmp_path: Path):
    target, batch, eos = meaningful_target(name)
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        store = AnswerStore(tmp_path / str(len(sampling)), max_grown_tokens=10_000)
        for _ in range(2):
            check(target, batch, reference, Reader(store, llama(seed=4)), 5, **arguments)


ENDLESS = dict(max_new_tokens=40, eos_token_id=None)


def test_a_second_run_over_a_filled_store_is_copied_and_other_prompts_are_as_before(tmp_path: Path):
    """READER's show: nearly k + 1 tokens a pass where the store has the answers; elsewhere what copies give alone."""
    target, batch = llama(), ragged_batch()
    other = ragged_batch(seed=9)
    references = [plain(target, prompts, **ENDLESS) for prompts in (batch, other)]
    store = AnswerStore(tmp_path, max_grown_tokens=100_000)
    alone = [
        check(target, prompts, reference, Reader(), 8, **ENDLESS).tokens_per_pass
        for prompts, reference in zip((batch, other), references, strict=True)
    ]
    first = check(target, batch, references[0], Reader(store), 8, **ENDLESS).tokens_per_pass
    assert first == pytest.approx(alone[0])
    before = store.num_tokens
    fixed = AnswerStore(tmp_path)  # which does not grow
    second = check(target, batch, references[0], Reader(fixed), 8, **ENDLESS).tokens_per_pass
    assert second > 7 and second > 2 * first
    elsewhere = check(target, other, references[1], Reader(fixed), 8, **ENDLESS).tokens_per_pass
    assert elsewhere > 0.9 * alone[1]
    assert fixed.num_tokens == before == sum(len(text) + 1 for text in texts_of(references[0].sequences, batch))


def test_a_fault_in_the_search_costs_drafts_and_no_text(tmp_path: Path, monkeypatch):
    """The measure of the test before can fail; what is written cannot."""
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    store = AnswerStore(tmp_path, max_grown_tokens=100_000)
    store.add(texts_of(reference.sequences, batch))
    find = SortedTexts.find
    monkeypatch.setattr(SortedTexts, "find", lambda self, suffixes: find(self, suffixes.roll(1, 1)))
    fixed = AnswerStore(tmp_path)
    assert check(target, batch, reference, Reader(fixed), 8, **ENDLESS).tokens_per_pass < 3


def test_a_prompt_that_holds_its_answer_is_copied():
    target = llama()
    repeat = dict(logits_processor=[repeats_what_came_five_before], **ENDLESS)
    batch = ragged_batch()
    reference = plain(target, batch, **repeat)
    assert check(target, batch, reference, Reader(), 8, **repeat).tokens_per_pass > 5


class Short(Oracle):
    """Knows two tokens."""

    max_draft_tokens = 2

    def propose(self, num_tokens, choose):
        assert num_tokens <= 2
        return super().propose(num_tokens, choose)


@pytest.mark.parametrize("kind", ["always", "sometimes"])
def test_drafts_are_gone_on_with_where_they_stand_in_the_store(kind: str, tmp_path: Path, monkeypatch):
    """Deepening: behind two right drafts come copies, and all of them are accepted."""
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    AnswerStore(tmp_path, max_grown_tokens=10**5).add(texts_of(reference.sequences, batch))
    store = AnswerStore(tmp_path)
    monkeypatch.setattr(ReaderDrafter, "LEAST_MATCHED", 99)  # so that nothing is copied in place of drafts

    def accepted() -> list[int]:
        drafter = Short(reference.sequences, 9, kind)
        system = Reader(store, drafter, num_tokens=6)
        statistics = check(target, batch, reference, system, 6, **ENDLESS)
        seen = (system.store_rates.seen - CopyRates().seen).sum()
        return [*statistics.accepted_per_slot, int(seen > 1)]

    deep = accepted()
    assert deep[5] > 0 and deep[6] == 1
    assert kind == "sometimes" or deep[5] > 0.7 * deep[0]
    monkeypatch.setattr(ReaderDrafter, "LEAST_BEHIND", 99)
    assert sum(accepted()[2:]) == 0


def test_under_rejection_the_other_drafter_drafts_alone(tmp_path: Path):
    target, batch = llama(), ragged_batch()
    store = AnswerStore(tmp_path, max_grown_tokens=1000)
    assistant = llama(seed=5, num_hidden_layers=2)
    settings = dict(do_sample=True, acceptance="rejection", num_assistant_tokens=4, **ENDLESS)
    texts = []
    for drafter in (assistant, Reader(store, assistant)):
        torch.manual_seed(3)
        texts.append(generate(target, drafter, **batch, **settings).tolist())
    assert texts[0] == texts[1] and store.num_tokens > 0


@pytest.mark.parametrize("filled", [False, True])
def test_rejection_keeps_the_distribution_whatever_is_copied(filled: bool, tmp_path: Path):
    target = llama(torch.float32)
    ids = torch.tensor([[7, 8, 9, 7, 8]]).expand(4000, -1)
    store = AnswerStore(tmp_path, max_grown_tokens=1000)
    logits = target(input_ids=torch.tensor([[7, 8, 9, 7, 8, 9]])).logits[0, -1].detach()
    if filled:
        store.add([[7, 8, 9, int(logits.argmax())]])
    torch.manual_seed(0)
    only = lambda row, text: [9] if len(text) == 5 else list(range(VOCAB))  # noqa: E731
    output = generate(
        target, Reader(AnswerStore(tmp_path) if filled else None), input_ids=ids, attention_mask=torch.ones_like(ids),
        do_sample=True, acceptance="rejection", max_new_tokens=3, eos_token_id=None, num_assistant_tokens=1,
        prefix_allowed_tokens_fn=only, return_dict_in_generate=True,
    )  # fmt: skip
    assert output.statistics.drafted_per_slot[0] > 0
    seen = output.sequences[:, 6].bincount(minlength=VOCAB) / len(ids)
    assert float((seen - logits.softmax(-1)).abs().sum() / 2) < 0.08


def test_calls_in_threads_share_a_store(tmp_path: Path):
    target, batch = llama(), ragged_batch()
    expected = plain(target, batch, **ENDLESS).sequences.tolist()
    reader = Reader(AnswerStore(tmp_path, max_grown_tokens=2000))
    found = texts_of_threads(target, reader, batch, **ENDLESS, num_assistant_tokens=6)
    assert len(found) == 9 and all(text == expected for text in found)


# ---- rates


def test_each_source_has_rates_of_its_own(tmp_path: Path):
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    store = AnswerStore(tmp_path, max_grown_tokens=10**5)
    store.add([[*text[:-1], text[-1]] for text in texts_of(reference.sequences, batch)])
    reader, first = Reader(AnswerStore(tmp_path)), CopyRates()
    check(target, batch, reference, reader, 8, **ENDLESS)
    stored = reader.store_rates
    assert stored.seen.sum() > first.seen.sum() + 20
    long = torch.tensor([10])
    assert stored.chances(long, 1) > first.chances(long, 1)
    assert reader.own_rates.seen.sum() < stored.seen.sum()


# ---- files


def test_it_grows_in_few_files_up_to_its_bound(tmp_path: Path):
    store = AnswerStore(tmp_path, max_grown_tokens=500)
    store.add([[1, 2, 3, 4, 5]] * 20, "built")
    last = 0
    for number in range(200):
        store.add([[number % 50, last, number % 7, 3, 4]])
        last = number % 50
        assert len(store._files) <= 12
        assert sum(len(file.texts) for name, file in store._files.items() if name.startswith("grown")) <= 500
    assert len(list(tmp_path.iterdir())) == len(store._files)
    _, matched = store.find(suffixes(torch.tensor([[1, 2, 3], [48, 3, 3]]), torch.tensor([3, 2])), 2)
    assert matched.tolist()[0] >= 3  # what it was built of stays
    newest = suffixes(torch.tensor([[199 % 50, 198 % 50]]), torch.tensor([2]))
    assert store.find(newest, 2)[0].tolist() == [[199 % 7, 3]]


def test_a_text_longer_than_the_bound_leaves_its_end(tmp_path: Path):
    store = AnswerStore(tmp_path, max_grown_tokens=10)
    store.add([list(range(50))])
    assert store.num_tokens == 10
    assert store.find(suffixes(torch.tensor([[45, 46]]), torch.tensor([2])), 2)[0].tolist() == [[47, 48]]


def test_what_another_object_adds_is_seen_and_what_it_replaces_goes_on_working(tmp_path: Path):
    one, two = (AnswerStore(tmp_path, max_grown_tokens=1000) for _ in range(2))
    one.add([[1, 2, 3]])
    query = suffixes(torch.tensor([[1, 2]]), torch.tensor([2]))
    assert two.find(query, 1)[1].tolist() == [0]
    two.refresh()
    assert two.find(query, 1)[0].tolist() == [[3]]
    one.add([[1, 2, 3]])  # in one file with the first
    assert two.find(query, 1)[0].tolist() == [[3]]  # of a file that is gone
    two.refresh()
    assert two.num_tokens == 8 and len(list(tmp_path.iterdir())) == 1


def test_files_that_were_replaced_before_a_kill_are_forgotten(tmp_path: Path, monkeypatch):
    store = AnswerStore(tmp_path, max_grown_tokens=1000)
    store.add([[1, 2, 3]])
    monkeypatch.setattr(AnswerStore, "_remove", lambda self, name: None)  # killed in front of it
    store.add([[4, 5, 6]])
    (tmp_path / ".grown-half.part").write_bytes(b"half")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    monkeypatch.undo()
    again = AnswerStore(tmp_path)
    assert again.num_tokens == 8 and len(list(tmp_path.glob("*.safetensors"))) == 1


def add_many(folder: str, seed: int) -> None:
    store = AnswerStore(folder, max_grown_tokens=10**6)
    for number in range(1000):
        store.add([[seed, number, seed, number, 3]])


def test_two_processes_and_kills(tmp_path: Path):
    """Killed at any moment, nothing that was written is damaged or lost."""
    context = multiprocessing.get_context("fork")
    for turn in range(4):
        workers = [context.Process(target=add_many, args=(str(tmp_path), turn * 2 + each)) for each in range(2)]
        for worker in workers:
            worker.start()
        workers[0].join(timeout=0.5 + 0.1 * turn)
        for worker in workers:
            os.kill(worker.pid, 9)
            worker.join()
        store = AnswerStore(tmp_path)
        for each in range(2 * turn + 2):
            query = suffixes(torch.tensor([[each, 0, each, 0]]), torch.tensor([4]))
            assert store.find(query, 1)[0].tolist() == [[3]]  # the first text of each


def test_a_damaged_file_of_another_process_costs_no_text(tmp_path: Path):
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    store = AnswerStore(tmp_path, max_grown_tokens=1000)
    texts, refresh = texts_of(reference.sequences, batch), store.refresh
    store.refresh = lambda: (refresh(), (tmp_path / "grown-1-half.safetensors").write_bytes(b"half"))
    with pytest.warns(UserWarning, match=r"did not grow: .*grown-1-half.safetensors is no file of a store, or damaged"):
        check(target, batch, reference, Reader(store), 4, **ENDLESS)
    (tmp_path / "grown-1-half.safetensors").unlink()
    store.add(texts)
    assert store.num_tokens > 100


def test_a_full_disk_is_told_and_costs_no_text(tmp_path: Path, monkeypatch):
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    store = AnswerStore(tmp_path, max_grown_tokens=1000)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("specformer.generation.drafter_store.save_file", full)
    with pytest.warns(UserWarning, match=r"did not grow: .*No space left.*what was there before is safe"):
        check(target, batch, reference, Reader(store), 4, **ENDLESS)
    assert not list(tmp_path.iterdir())


# ---- bad input


def fixed_store(folder: Path) -> AnswerStore:
    AnswerStore(folder, 99).add([[1, 2, 3]])
    return AnswerStore(folder)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: AnswerStore(folder), r"holds no texts. Make them with `specformer store"),
        (lambda folder: AnswerStore(folder, -1), r"max_grown_tokens is -1; expected an integer"),
        (lambda folder: AnswerStore(folder, True), r"max_grown_tokens is True"),
        (lambda folder: AnswerStore(folder, 99).add([[1, -1, 2]]), r"negative token ids"),
        (lambda folder: fixed_store(folder).add([[1, 2, 3]]), r"max_grown_tokens=0, so it keeps no more texts"),
        (lambda folder: Reader("store"), r"store is a builtins.str; expected an AnswerStore"),
        (lambda folder: Reader(num_tokens=0), r"num_tokens is 0; expected a positive integer"),
    ],
)
def test_bad_arguments(make, sentence: str, tmp_path: Path):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        make(tmp_path / "store")


def test_damaged_files_are_named(tmp_path: Path):
    store = AnswerStore(tmp_path / "store", max_grown_tokens=1000)
    store.add([[1, 2, 3]])
    (path,) = (tmp_path / "store").iterdir()
    whole = path.read_bytes()
    for content in (b"", whole[:40], whole[:-4], whole.replace(b"texts 1", b"texts 9")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} is no file of a store, or damaged .*Delete it"):
            AnswerStore(tmp_path / "store")


def test_a_store_of_another_tokenizer_is_refused_before_the_first_token(tmp_path: Path):
    store = AnswerStore(tmp_path, max_grown_tokens=1000)
    store.add([[1, 2, VOCAB]])
    with pytest.raises(ValueError, match=r"holds the token 64, and the target has 64 tokens: it is of another"):
        generate(llama(), Reader(store), **ragged_batch(), max_new_tokens=2)


def test_copies_alone_are_not_asked_for_twice():
    with pytest.raises(ValueError, match=r"assistant_model and prompt_lookup_num_tokens were both given"):
        generate(llama(), Reader(), **ragged_batch(), max_new_tokens=2, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("assistant", [Reader, lambda: llama(seed=4, num_hidden_layers=1)], ids=["system", "causal LM"])
def test_no_copies_go_with_any_drafter(assistant):
    target, batch = llama(), ragged_batch()
    output = generate(target, assistant(), **batch, max_new_tokens=8, prompt_lookup_num_tokens=0)
    assert torch.equal(output, target.generate(**batch, max_new_tokens=8))


# ---- the command


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["specformer store", *map(str, arguments)])
    build(parse())


@pytest.mark.parametrize("kind", ["distilled", "rows", "lists", "numpy"])
def test_the_command_builds_a_store_of_any_token_file(kind: str, tmp_path: Path, monkeypatch):
    import numpy

    source = tmp_path / "data.jsonl"
    if kind == "distilled":
        source = tmp_path / "answers"
        source.mkdir()
        row = {"id": 0, "prompt_ids": [7, 8], "response_ids": [9, 10], "finished": True}
        (source / "answers-00000.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    elif kind == "numpy":
        source = tmp_path / "data.npy"
        numpy.save(source, numpy.array([7, 8, 9, 10]))
    else:
        row = {"input_ids": [7, 8, 9, 10]} if kind == "rows" else [7, 8, 9, 10]
        source.write_text(json.dumps(row) + "\n\n", encoding="utf-8")
    command(monkeypatch, "--data", source, "--output", tmp_path / "store")
    store = AnswerStore(tmp_path / "store")
    assert store.find(suffixes(torch.tensor([[7, 8]]), torch.tensor([2])), 3)[0].tolist() == [[9, 10, NO_TOKEN]]
    with pytest.raises(FileExistsError, match=r"exists; name another one, or --add"):
        command(monkeypatch, "--data", source, "--output", tmp_path / "store")
    command(monkeypatch, "--data", source, "--output", tmp_path / "store", "--add")
    assert AnswerStore(tmp_path / "store").num_tokens == 10


@pytest.mark.parametrize("line", ["{}", "[1, -1]", '{"input_ids": [1.5]}', "[true]", "no"])
def test_the_command_names_the_line_that_holds_no_ids(line: str, tmp_path: Path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("[1, 2, 3]\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: expected .*'prompt_ids'"):
        command(monkeypatch, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data.jsonl is not there"):
        command(monkeypatch, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "store")
