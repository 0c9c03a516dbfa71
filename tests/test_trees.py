"""Trees of drafts are verified as losslessly as chains, whatever their shapes, in rows of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, make_target
from exactness import Reference, check, plain
from foreign import save
from test_dflash import checkpoints
from test_eagle_and_pard import EAGLES
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, crossed, meaningful_target
from test_outputs import OUTPUTS, assert_same_steps
from test_parallelspec import checkpoint
from tiny import VOCAB, llama, ragged_batch
from trees import OracleTree

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation import accept_tokens, call_drafter
from specformer.generation.accept_sampling import with_confidence
from specformer.generation.accept_tokens import BestDrafts
from specformer.generation.cache_layers import RaggedLayer
from specformer.generation.cache_ragged import RaggedCache
from specformer.generation.drafter_dflash import DFlashDrafter
from specformer.generation.drafter_eagle import EagleDrafter
from specformer.generation.drafter_parallelspec import ParallelSpecDrafter
from specformer.generation.drafter_specformer import SpecFormerDrafter
from specformer.generation.drafter_tree import LEAST_LOSS
from specformer.generation.proposal import NO_TOKEN, first_path
from specformer.generation.proposal_tree import DraftTree
from specformer.generation.target_probe import tree_obstacle
from specformer.generation.target_refusals import UnsupportedTargetError


def oracle_tree(reference: Reference, batch: dict, kind: str, eos: int | None, **options) -> OracleTree:
    return OracleTree(reference.sequences, batch["input_ids"].shape[1], kind, eos or 0, **options)


IN_EVERY_RUN = ["llama", "gemma3", "gpt2", "mistral-sliding", "opt"]


@pytest.mark.parametrize(
    "name", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_family(name: str):
    target, batch, eos = meaningful_target(name)
    for arguments in (dict(eos_token_id=eos), dict(eos_token_id=None, **SAMPLING)):
        arguments = dict(arguments, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        accepted = 0
        for depth, size in ((4, 12), (8, 5)):
            for kind in ("always", "adversarial"):
                drafter = oracle_tree(reference, batch, kind, eos)
                statistics = check(target, batch, reference, drafter, depth, tree_size=size, **arguments)
                accepted += sum(statistics.accepted_per_slot[1:])
        assert accepted  # second tokens of paths


@pytest.mark.parametrize(("knows_depth", "setting"), crossed(True, False))
def test_settings(knows_depth: bool, setting: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for kind in ("always", "sometimes", "never"):
        drafter = oracle_tree(reference, batch, kind, eos, knows_depth=knows_depth)
        statistics = check(target, batch, reference, drafter, 5, tree_size=9, **arguments)
        if kind == "never":
            assert not sum(statistics.accepted_per_slot)
        elif kind == "always":
            assert statistics.tokens_per_pass > 1.5


def test_the_end_of_a_position_table():
    target, batch = make_target("gpt2", n_positions=32), ragged_batch(padding=(0, 3, 5, 0, 8))
    reference = plain(target, batch, max_length=32)
    check(target, batch, reference, oracle_tree(reference, batch, "always", None), 6, tree_size=16, max_length=32)


@pytest.mark.parametrize("fields", [{}, dict(previous_token_rank=8, num_candidates=5), dict(draft_vocab_size=24)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_network(name: str, fields: dict):
    target, batch, eos = meaningful_target(name)
    torch.manual_seed(0)
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, **fields))
    for arguments in ({}, SAMPLING):
        arguments = dict(arguments, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for copies in (0, 3):
            check(target, batch, reference, drafter, 4, tree_size=12, prompt_lookup_num_tokens=copies, **arguments)


ONE_LAYER = EAGLES | {"ParallelSpec": checkpoint()}
CHECKPOINTS = ["raw", "raw, tokens of its own", "dspark", "dspark, gated, tokens of its own"]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_dflash(kind: str, tmp_path: Path):
    target, batch, eos = meaningful_target("llama")
    config, weights, _ = checkpoints(target)[kind]
    folder = save(tmp_path / "drafter", config, weights)
    for arguments in ({}, SAMPLING):
        arguments = dict(arguments, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for copies in (0, 3):
            check(target, batch, reference, folder, 3, tree_size=10, prompt_lookup_num_tokens=copies, **arguments)


@pytest.mark.parametrize("kind", ["SpecFormer", "SpecFormer, confident", *CHECKPOINTS, *ONE_LAYER])
def test_the_first_children_are_the_chain(kind: str, tmp_path: Path, monkeypatch):
    """What a drafter would propose as a chain is the likeliest path from the root on, as far as the tree goes there;
    and it is as confident in it."""
    target, batch = llama(), ragged_batch()
    if kind.startswith("SpecFormer"):
        torch.manual_seed(0)
        fields = dict(previous_token_rank=4, confidence_head=kind.endswith("confident"))
        drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, **fields))
        torch.nn.init.normal_(drafter.previous_token_correction.up_proj.weight)
        if fields["confidence_head"]:
            torch.nn.init.normal_(drafter.confidence_head.out_proj.weight, std=2)
            torch.nn.init.normal_(drafter.confidence_head.shift)  # another one of each slot
        drafting = SpecFormerDrafter
    else:
        config, weights = ONE_LAYER[kind] if kind in ONE_LAYER else checkpoints(target)[kind][:2]
        drafter = save(tmp_path / "drafter", config, weights)
        drafting = EagleDrafter if kind in EAGLES else ParallelSpecDrafter if kind in ONE_LAYER else DFlashDrafter
    propose_tree, compared = drafting.propose_tree, []

    def watched(self, num_tokens, tree_size, chances):
        tree, chain = propose_tree(self, num_tokens, tree_size, chances), self.propose(num_tokens, BestDrafts(VOCAB))
        first = first_path(tree)
        path = first.tokens
        assert ((path == chain.tokens[:, : path.shape[1]]) | (path == NO_TOKEN)).all()
        if kind.endswith("confident"):
            expected = chain.confidences[:, : path.shape[1]].clamp(max=math.exp(-LEAST_LOSS))
            torch.testing.assert_close(first.confidences, torch.where(path == NO_TOKEN, 0, expected), check_dtype=False)
        compared.append(path.shape[1])
        return tree

    monkeypatch.setattr(drafting, "propose_tree", watched)
    settings = dict(max_new_tokens=12, eos_token_id=None, prompt_lookup_num_tokens=0)
    generate(target, drafter, **batch, **settings, num_assistant_tokens=3, tree_size=12)
    assert max(compared) > 1


def test_a_confidence_moves_the_best_of_several_chances():
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(200, 5, generator=generator).log_softmax(dim=-1)
    told = torch.rand(200, generator=generator)
    found = with_confidence(chances, told).exp()
    for before, best, after in zip(chances.exp().tolist(), told.tolist(), found.tolist(), strict=True):
        at = before.index(max(before))
        factor = min(best / before[at], (1 - best) / (1 - before[at]))
        expected = [best if place == at else chance * factor for place, chance in enumerate(before)]
        assert after == pytest.approx(expected, rel=1e-4)
        assert sum(after) < 1.0001 and max(after) == after[at]  # none overtakes it
    torch.testing.assert_close(with_confidence(chances, chances.amax(dim=-1).exp()), chances)
    none = torch.full((1, 3), -torch.inf)
    assert with_confidence(none, torch.tensor([0.5])).isneginf().all()
    one = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert with_confidence(one, torch.tensor([0.3])).exp()[0].tolist() == pytest.approx([0, 0.3, 0])


def of_other_trees(change: Callable[[DraftTree], DraftTree]) -> Callable:
    """A fault in what the passes are told of trees."""
    made = DraftTree.of

    def plant(monkeypatch) -> None:
        def other(*args):
            return None if (tree := made(*args)) is None else change(tree)

        monkeypatch.setattr(DraftTree, "of", other)

    return plant


def at_other_depths(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """Tokens of trees stand at other positions than they should."""
    prepare = RaggedCache.prepare

    def other(self, width, *branches):
        return prepare(self, width, change(branches[0]), branches[1]) if branches else prepare(self, width)

    return lambda monkeypatch: monkeypatch.setattr(RaggedCache, "prepare", other)


def not_moved(monkeypatch) -> None:
    monkeypatch.setattr(RaggedCache, "follow", lambda self, path: None)


def moved_one_place_further(monkeypatch) -> None:
    follow = RaggedLayer.follow
    monkeypatch.setattr(RaggedLayer, "follow", lambda self, path: follow(self, path.roll(-1, dims=1)))


def the_first_child_whatever_it_is(monkeypatch) -> None:
    """Down another path than the target's."""

    def children(self, nodes, tokens):
        is_child = self.parents == nodes
        return is_child.long().argmax(dim=1, keepdim=True) + 1, is_child.any(dim=1, keepdim=True)

    monkeypatch.setattr(DraftTree, "children", children)


def states_of_the_wrong_nodes(monkeypatch) -> None:
    """The target's logits at the newest token, wherever the path is."""
    monkeypatch.setattr(accept_tokens, "along", lambda values, path: values[:, :1].expand(-1, path.shape[1], -1))


FAULTS = {
    "the parent is not seen": of_other_trees(
        lambda tree: replace(tree, ancestors=torch.eye(tree.ancestors.shape[1], dtype=torch.bool) & tree.ancestors)
    ),
    "siblings are seen": of_other_trees(lambda tree: replace(tree, ancestors=torch.ones_like(tree.ancestors).tril())),
    "positions of a chain": at_other_depths(lambda depths: torch.arange(depths.shape[1]).expand_as(depths)),
    "one position too far": at_other_depths(lambda depths: depths + (depths > 0)),
    "not moved": not_moved,
    "moved one place further": moved_one_place_further,
    "another path": the_first_child_whatever_it_is,
    "logits of other nodes": states_of_the_wrong_nodes,
}


@pytest.mark.one_version
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_planted_fault_is_found(name: str, fault: str, monkeypatch):
    target, batch, eos = meaningful_target(name)
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)

    def run() -> None:
        for kind in ("always", "sometimes"):
            check(target, batch, reference, oracle_tree(reference, batch, kind, eos), 5, tree_size=10, **arguments)

    run()
    # the trial would refuse some of these, and must not be what saves the check
    monkeypatch.setattr(call_drafter, "tree_obstacle", lambda model: None)
    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        run()


def test_what_is_refused():
    target, batch = llama(), ragged_batch()
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))
    for arguments, sentence in (
        (dict(assistant_model=llama(seed=1)), "tree_size is 8, and .* proposes chains"),
        (dict(assistant_model=drafter, tree_size=-1), "tree_size is -1; expected an integer"),
    ):
        with pytest.raises(ValueError, match=sentence):
            generate(target, **{"tree_size": 8, **arguments}, **batch, max_new_tokens=4)


@pytest.mark.parametrize("fault", ["siblings are seen", "positions of a chain", "one position too far"])
def test_the_trial_finds_a_target_that_does_not_see_trees(fault: str, monkeypatch):
    target = make_target("gpt2")
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))
    assert tree_obstacle(make_target("gpt2")) is None
    if fault == "siblings are seen":
        prepare = RaggedCache.prepare
        monkeypatch.setattr(
            RaggedCache,
            "prepare",
            lambda self, width, *branches: prepare(self, width, *(branches and (branches[0], branches[1] | True))),
        )
    else:
        FAULTS[fault](monkeypatch)
    with pytest.raises(UnsupportedTargetError, match=r"GPT2LMHeadModel cannot verify trees: .* Leave out tree_size"):
        generate(target, drafter, **ragged_batch(), max_new_tokens=4, num_assistant_tokens=4, tree_size=8)
    monkeypatch.setattr(RaggedCache, "follow", lambda self, path: pytest.fail("a tree was verified"))
    generate(target, drafter, **ragged_batch(), max_new_tokens=12)  # "auto" goes on with chains


@pytest.mark.parametrize("arguments", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_trees_of_any_size_under_auto(arguments: dict):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(arguments, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    widths = set()
    for kind in ("always", "sometimes", "never") * 2:
        drafter = oracle_tree(reference, batch, kind, eos)
        drafter.default_num_assistant_tokens = 4
        widths |= check(target, batch, reference, drafter, "auto", tree_size=12, **arguments).rounds_per_length.keys()
    assert len(widths) > 2


@pytest.mark.parametrize("setting", ["greedy", "sampling with a penalty"])
def test_scores_and_logits(setting: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    torch.manual_seed(3)
    expected = target.generate(**batch, **arguments, **OUTPUTS)
    for kind in ("always", "sometimes"):
        drafter = oracle_tree(reference, batch, kind, eos)
        torch.manual_seed(3)
        ours = generate(target, drafter, **batch, **arguments, **OUTPUTS, num_assistant_tokens=4, tree_size=9)
        assert_same_steps(ours.scores, expected.scores)
        assert_same_steps(ours.logits, expected.logits)
