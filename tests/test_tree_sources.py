"""Trees of copies, stored answers, trigrams and EAGLE-3: which tokens are in them, and that no text changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES
from exactness import check, plain
from foreign import save
from test_eagle_and_pard import EAGLES, eagle_by_loops
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, meaningful_target
from test_parallelspec import checkpoint
from test_reader import some_texts, texts_of
from test_trigrams import some_texts as texts_for_trigrams
from tiny import VOCAB, llama, ragged_batch
from trees import OracleTree

from specformer import AnswerStore, Reader, SpecFormerConfig, SpecFormerModel, TrigramChains, TrigramTable, generate
from specformer.generation.cache_ragged import RaggedCache
from specformer.generation.drafter import NoDrafter, Prompts, Verified
from specformer.generation.drafter_chains import DOUBT, ChainDrafter
from specformer.generation.drafter_copying import CopyingDrafter, CopyRates
from specformer.generation.drafter_eagle import EagleDrafter
from specformer.generation.drafter_reader import ReaderDrafter
from specformer.generation.drafter_suffixes import DEPTH
from specformer.generation.drafter_tree import LEAST_LOSS, complete, side_by_side, united
from specformer.generation.prompt import PromptLayout
from specformer.generation.proposal import NO_TOKEN, Proposal

CPU = torch.device("cpu")


def all_paths(tree: Proposal, row: int = 0) -> list[tuple[tuple[int, ...], float]]:
    """The path to each token of a row's tree, and how likely all of it stays."""
    tokens, parents, own = (part[row].tolist() for part in (tree.tokens, tree.parents, tree.confidences))
    paths: list[tuple[tuple[int, ...], float]] = []
    for token, parent, chance in zip(tokens, parents, own, strict=True):
        before, reached = paths[parent] if parent >= 0 else ((), 1.0)
        paths.append(((*before, token), reached * chance))
    return [(path, reached) for path, reached in paths if NO_TOKEN not in path]


def paths_of(tree: Proposal, row: int = 0) -> dict[tuple[int, ...], float]:
    """The same of a tree in which each is once."""
    paths = all_paths(tree, row)
    assert len(paths) == len(dict(paths))
    return dict(paths)


# ---- several trees as one


def some_tree(numbers: random.Random, size: int) -> tuple[list[int], list[float], list[int]]:
    """Of few different tokens, with some of them missing."""
    tokens = [numbers.choice([1, 2, 3, NO_TOKEN]) for _ in range(size)]
    return tokens, [numbers.random() / 3 for _ in tokens], [numbers.randrange(-1, place) for place in range(size)]


def united_by_hand(rows: list[tuple], size: int) -> dict[tuple[int, ...], float]:
    own: dict[tuple[int, ...], float] = {}
    for tokens, told, parents in rows:
        paths: list[tuple[int, ...]] = []
        for token, chance, parent in zip(tokens, told, parents, strict=True):
            paths.append((*paths[parent], token) if parent >= 0 else (token,))
            if NO_TOKEN not in paths[-1]:
                own[paths[-1]] = max(own.get(paths[-1], 0.0), chance)
    totals: dict[tuple[int, ...], float] = {}
    for path, chance in own.items():
        totals[path[:-1]] = totals.get(path[:-1], 0.0) + chance
    reached = {(): 1.0}
    for path in sorted(own, key=len):
        mine = own[path] / max(totals[path[:-1]], 1.0)
        reached[path] = reached[path[:-1]] * min(mine, 2.718281828459045**-LEAST_LOSS)
    del reached[()]
    return dict(sorted(reached.items(), key=lambda item: -item[1])[:size])


@pytest.mark.parametrize("seed", range(4))
def test_trees_are_united_as_by_hand(seed: int):
    numbers = random.Random(seed)
    rows = [[some_tree(numbers, size) for size in (9, 1, 14)] for _ in range(5)]
    trees = []
    for place in range(3):
        tokens, told, parents = zip(*(row[place] for row in rows), strict=True)
        tree = Proposal(torch.tensor(tokens), torch.tensor(told), parents=torch.tensor(parents))
        trees.append(complete(tree, CPU))
        trees[-1].sources = torch.full_like(tree.tokens, place)
    for size in (6, 40):
        tree = united(trees, size)
        for row, of_row in enumerate(rows):
            found, expected = paths_of(tree, row), united_by_hand(of_row, size)
            assert found == pytest.approx(expected, rel=1e-4)
            first = [dict(all_paths(one, row)) for one in trees]
            for path, source in zip(found, tree.sources[row].tolist(), strict=False):
                assert source == next(place for place, known in enumerate(first) if path in known)
        assert (tree.parents < torch.arange(tree.parents.shape[1])).all()
        assert tree.depth >= max(len(path) for row in range(5) for path in paths_of(tree, row))


def test_guesses_side_by_side():
    """Of two that part, the second one comes into question where the first is wrong."""
    texts = torch.tensor([[[1, 2, 3], [1, 2, 4], [5, NO_TOKEN, NO_TOKEN]]])
    tree = side_by_side(texts, torch.tensor([[[0.9, 0.8, 0.7], [0.6, 0.6, 0.6], [0.4, 0.0, 0.0]]]))
    found = paths_of(united([tree], 9))
    assert {path: round(reached, 4) for path, reached in found.items()} == {
        (1,): 0.9, (1, 2): 0.72, (1, 2, 3): 0.504, (1, 2, 4): 0.1296, (5,): 0.04
    }  # fmt: skip


# ---- copies of the text


def copying(text: list[int], **options) -> CopyingDrafter:
    drafter, ids = CopyingDrafter(NoDrafter(), 8, CopyRates(), **options), torch.tensor([text[:-1]])
    drafter.begin(Prompts(ids, PromptLayout.from_mask(None, ids), torch.tensor([text[-1:]]), 99))
    return drafter


def test_copies_from_several_places_are_branches():
    drafter = copying([1, 2, 3, 9, 1, 2, 4, 8, 7, 1, 2])
    paths = list(paths_of(drafter.propose_tree(3, 8, None)))
    assert paths[:2] == [(4,), (4, 8)] and (3,) in paths and (4, 8, 7) in paths  # the newest one is the likeliest
    # the text went on with the second one, of which nothing is known behind it
    before, right = drafter.rates.seen.clone(), drafter.rates.right.clone()
    drafter.update(Verified(torch.tensor([[3, 9, 7, 0]]), torch.tensor([3]), 11))
    assert (drafter.rates.seen - before).round().nonzero()[:, 0].tolist() == [2]
    torch.testing.assert_close(drafter.rates.right, right)


def test_copies_of_different_lengths_are_branches():
    """What stood behind three tokens comes before what stood behind one; the same copy is there once."""
    tree = copying([5, 1, 2, 6, 9, 9, 5, 1, 2, 6, 9, 2, 7, 8, 5, 1, 2]).propose_tree(2, 8, None)
    assert list(paths_of(tree)) == [(6,), (6, 9), (7,), (7, 8)]


def test_nothing_is_proposed_where_nothing_is_found():
    assert copying([1, 2, 3, 4]).propose_tree(3, 8, None).tokens.shape == (1, 0)


SOURCES = {
    "copies": lambda folder, reference, batch: (None, dict(prompt_lookup_num_tokens=5)),
    "store": lambda folder, reference, batch: (Reader(store_of(folder, reference, batch)), {}),
    "store and drafts": lambda folder, reference, batch: (
        Reader(store_of(folder, reference, batch), oracle(reference, batch)),
        {},
    ),
    "trigrams": lambda folder, reference, batch: (TrigramChains(table_of(reference)), {}),
}


def store_of(folder: Path, reference, batch: dict) -> AnswerStore:
    """Half of the answers, twice, as they are and changed in places, among other texts."""
    store, numbers = AnswerStore(folder / "store", max_grown_tokens=10_000), random.Random(0)
    texts = texts_of(reference.sequences[: len(batch["input_ids"])], batch)[::2]
    changed = [[token if numbers.random() < 0.8 else numbers.randrange(VOCAB) for token in text] for text in texts]
    store.add([*some_texts(tokens=VOCAB), *texts, *changed])
    return store


def table_of(reference) -> TrigramTable:
    table = TrigramTable()
    table.count([*reference.sequences.tolist(), *texts_for_trigrams(tokens=VOCAB)])
    return table


def oracle(reference, batch: dict) -> OracleTree:
    drafter = OracleTree(reference.sequences, batch["input_ids"].shape[1], "sometimes")
    drafter.default_num_assistant_tokens = 4
    return drafter


@pytest.mark.parametrize("setting", ["greedy", "sampling with a penalty"])
@pytest.mark.parametrize("source", SOURCES)
def test_no_text_changes(source: str, setting: str, tmp_path: Path):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    accepted = 0
    for k, size in ((4, 10), (8, 5), ("auto", None)):
        drafter, more = SOURCES[source](tmp_path / f"{k}{size}", reference, batch)
        statistics = check(target, batch, reference, drafter, k, tree_size=size, **more, **arguments)
        accepted += sum(statistics.accepted_per_slot)
    assert accepted or source == "copies"


@pytest.mark.parametrize(
    "name", [name if name == "gemma3" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_family(name: str, tmp_path: Path):
    target, batch, eos = meaningful_target(name)
    for number, sampling in enumerate(({}, SAMPLING)):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for source in SOURCES:
            drafter, more = SOURCES[source](tmp_path / f"{number}{source}", reference, batch)
            check(target, batch, reference, drafter, 5, tree_size=9, **more, **arguments)


def test_copies_beside_a_network(tmp_path: Path):
    """They are branches of its tree, in texts that repeat themselves and in others."""
    target, batch = llama(), ragged_batch()
    torch.manual_seed(0)
    network = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, confidence_head=True))
    seen: set[str | None] = set()
    arguments = dict(eos_token_id=None, max_new_tokens=30)
    reference = plain(target, batch, **arguments)
    on_round = lambda told: seen.update(row.source for row in told.rows if row.accepted)  # noqa: E731
    for drafter in (network, Reader(store_of(tmp_path, reference, batch), network)):
        check(target, batch, reference, drafter, 4, tree_size=12, on_round=on_round, **arguments)
    assert {"copy", "network"} <= seen


# ---- stored answers

ENDLESS = dict(max_new_tokens=40, eos_token_id=None)


def test_ways_in_which_stored_texts_went_on_are_branches(tmp_path: Path):
    """By how many of them did so, also where they part later."""
    store = AnswerStore(tmp_path, max_grown_tokens=1000)
    store.add([[7, 8, 1, 2, 3], [7, 8, 1, 2, 4], [7, 8, 1, 2, 3], [7, 8, 5, 6]])
    suffix = torch.tensor([[8, 7, *[-2] * 14], [9, 9, *[-2] * 14]])
    copies, shares, matched = store.find_several(suffix, 3, 3)
    assert copies[0].tolist() == [[1, 2, 3], [1, 2, 4], [5, 6, NO_TOKEN]]
    assert shares[0].flatten().tolist() == pytest.approx([3 / 4, 1, 2 / 3, 3 / 4, 1, 1 / 3, 1 / 4, 1, 0])
    assert matched.tolist() == [2, 0] and (copies[1] == NO_TOKEN).all() and not shares[1].any()


def test_an_answer_of_the_store_that_most_others_hide_is_accepted(tmp_path: Path):
    """In a chain the most frequent continuation is copied, in a tree the other one is there as well."""
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    texts = texts_of(reference.sequences, batch)
    misleading = [
        [*text[place - DEPTH : place], (text[place] + 1) % VOCAB] for text in texts for place in range(DEPTH, len(text))
    ]
    AnswerStore(tmp_path, max_grown_tokens=10**5).add([*texts, *misleading, *misleading])
    chain, tree = (
        check(target, batch, reference, Reader(AnswerStore(tmp_path)), 6, tree_size=size, **ENDLESS).tokens_per_pass
        for size in (0, 16)
    )
    assert tree > 1.3 * chain


class ShortTree(OracleTree):
    """Knows two tokens, and has a wrong guess beside the first."""

    max_draft_tokens = 2

    def propose_tree(self, num_tokens, tree_size, chances):
        drafts = self.drafts(num_tokens)
        wrong = (drafts[:, :1] + 1) % VOCAB
        parents = torch.tensor([*range(-1, num_tokens - 1), -1]).expand(len(drafts), -1)
        return Proposal(torch.cat([drafts, wrong], dim=1), parents=parents)


def test_copies_go_on_behind_the_likeliest_path(tmp_path: Path, monkeypatch):
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    AnswerStore(tmp_path, max_grown_tokens=10**5).add(texts_of(reference.sequences, batch))
    monkeypatch.setattr(ReaderDrafter, "branches", lambda self, *args: CopyingDrafter.branches(self, *args))

    def accepted() -> list[int]:
        system = Reader(AnswerStore(tmp_path), ShortTree(reference.sequences, 9, "always"), num_tokens=6)
        found = check(target, batch, reference, system, 6, tree_size=16, **ENDLESS).accepted_per_slot
        return [*found, 0, 0, 0, 0, int((system.store_rates.seen - CopyRates().seen).sum())]

    deep = accepted()
    assert sum(deep[2:5]) > 10 and deep[-1] > 1
    monkeypatch.setattr(ReaderDrafter, "LEAST_BEHIND", 99)
    assert sum(accepted()[2:5]) < sum(deep[2:5]) / 2


# ---- trigrams


def test_the_tree_of_trigrams_is_that_of_the_likeliest_paths():
    table = TrigramTable()
    table.count([[1, 2, 3]] * 6 + [[1, 2, 4, 5, 6, 7]] * 5 + [[2, 4, 8]])
    drafter, ids = ChainDrafter(table), torch.tensor([[1]])
    drafter.begin(Prompts(ids, PromptLayout.from_mask(None, ids), torch.tensor([[2]]), 99))
    tree = drafter.propose_tree(4, 6, None)
    sure, first = 1 / (1 + DOUBT), 5 / 11 / (1 + DOUBT)
    five = first * sure * 5 / 6
    assert paths_of(tree) == pytest.approx(
        {(3,): first * 6 / 5, (4,): first, (4, 5): five, (4, 5, 6): five * sure, (4, 5, 6, 7): five * sure**2,
         (4, 8): five / 5}
    )  # fmt: skip
    assert len(paths_of(drafter.propose_tree(2, 2, None))) == 2
    assert drafter.propose_tree(1, 6, None).depth == 1


# ---- EAGLE-3


@pytest.mark.parametrize(
    "kind", ["SafeAILab", pytest.param("speculators, more norms", marks=pytest.mark.slow), "ParallelSpec"]
)
def test_the_text_under_trees_of_one_layer_is_that_of_plain_generate(kind: str, tmp_path: Path):
    folder = save(tmp_path, *(EAGLES[kind] if kind in EAGLES else checkpoint()))
    target, batch, eos = meaningful_target("gemma3" if kind == "SafeAILab" else "mistral-sliding")
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for k, size, copies in ((3, 10, 0), (5, 20, 3)):
            more = dict(arguments, tree_size=size, prompt_lookup_num_tokens=copies)
            check(target, batch, reference, folder, k, **more)


def first_trees(target, folder: Path, batch: dict, monkeypatch, **settings) -> list[Proposal]:
    trees, propose_tree = [], EagleDrafter.propose_tree

    def noted(self, *args):
        trees.append(propose_tree(self, *args))
        return trees[-1]

    with monkeypatch.context() as patch:
        patch.setattr(EagleDrafter, "propose_tree", noted)
        settings = dict(eos_token_id=None, prompt_lookup_num_tokens=0, do_sample=False) | settings
        generate(target, folder, **batch, **settings)
    return trees


def compare_with_loops(
    config: dict, weights: dict, tmp_path: Path, monkeypatch, size: int = 1, sharp: float = 2.0
) -> list[int]:
    """The best child of each token of the first trees is what the network drafts behind the path to it. Returns how
    long the paths are."""
    target, batch = llama(), ragged_batch(padding=(0, 3, 5, 1, 6))
    texts = texts_of(plain(target, batch, max_new_tokens=1, eos_token_id=None, do_sample=False).sequences, batch)
    weights = {**weights, "lm_head.weight": sharp * weights["lm_head.weight"]}  # so that trees are deep
    sizes = dict(max_new_tokens=8, num_assistant_tokens=6, tree_size=48)
    tree, compared = first_trees(target, save(tmp_path, config, weights), batch, monkeypatch, **sizes)[0], []
    for row, text in enumerate(texts):
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        paths: dict[int, list[int]] = {-1: []}
        for place, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            paths[place] = [*paths[parent], token]
            if parent not in parents[:place]:  # its first child
                path = paths[parent]
                assert token == eagle_by_loops(target, config, weights, text, len(path) + 1, path, size)[-1]
                compared.append(len(path))
    return compared


@pytest.mark.one_version
@pytest.mark.parametrize("kind", ["SafeAILab", "speculators, more norms"])
def test_trees_of_eagle_are_those_of_plain_loops(kind: str, tmp_path: Path, monkeypatch):
    assert sum(length > 1 for length in compare_with_loops(*EAGLES[kind], tmp_path, monkeypatch)) > 10


def told_otherwise(change: Callable) -> Callable:
    prepare = RaggedCache.prepare

    def other(self, width, *branches):
        is_target = len(self.ragged_layers) > 1
        return prepare(self, width, *(branches if is_target or not branches else change(*branches)))

    return lambda monkeypatch: monkeypatch.setattr(RaggedCache, "prepare", other)


FAULTS = {
    "siblings are seen": told_otherwise(lambda depths, seen: (depths, torch.ones_like(seen))),
    "parents are not seen": told_otherwise(
        lambda depths, seen: (depths, seen & (torch.arange(seen.shape[2]) >= seen.shape[2] - seen.shape[1]))
    ),
    "a position too far": told_otherwise(lambda depths, seen: (depths + 1, seen)),
    "states of the first parent": lambda monkeypatch: monkeypatch.setattr(
        "specformer.generation.drafter_eagle.best_first", with_the_first_parent
    ),
}


def with_the_first_parent(newest, num_tokens, tree_size, candidates, width):
    from specformer.generation.drafter_tree import best_first

    def others(slot, tokens, follows):
        return candidates(slot, tokens, torch.zeros_like(follows))

    return best_first(newest, num_tokens, tree_size, others, width)


@pytest.mark.one_version
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_in_the_trees_of_eagle_is_found(fault: str, tmp_path: Path, monkeypatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        compare_with_loops(*EAGLES["SafeAILab"], tmp_path, monkeypatch)
