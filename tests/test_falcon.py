"""Falcon drafters: the drafts of their own definition, in any batch; with blocks of one token those of EAGLE-3; plain
generate()'s text; what their slots see, and what is shown to them while they learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exactness import check, plain
from foreign import assert_drafts, assert_rows_draft_as_alone, recorded, save
from test_eagle_and_pard import EAGLES, eagle_by_loops
from test_exactness import NEW_TOKENS, SAMPLING, meaningful_target
from test_kinds import cached_logits, make_student
from test_offline import SLOTS, make_answers
from test_tree_sources import FAULTS, compare_with_loops, first_trees
from tiny import llama, ragged_batch

from specformer import generate
from specformer.generation.drafter_eagle import EagleDrafter
from specformer.generation.drafter_falcon import FalconDrafter
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.kinds.falcon import Text
from specformer.scripts.parts.losses import IGNORED


def falcon(size: int, kind: str = "speculators") -> tuple[dict, dict]:
    """Config and weights."""
    config, weights = EAGLES[kind]
    return {**config, "architectures": ["FalconSpeculator"], "block_size": size}, weights


@pytest.mark.parametrize(("size", "kind"), [(2, "speculators"), (3, "speculators, more norms")])
def test_drafts_are_those_of_plain_loops(size: int, kind: str, tmp_path: Path, monkeypatch):
    target, (config, weights) = llama(), falcon(size, kind)
    folder, rounds = save(tmp_path, config, weights), recorded(monkeypatch, FalconDrafter)
    prompt = torch.tensor([[7, 30, 12, 9, 41, 22]])
    settings = dict(max_new_tokens=14, eos_token_id=None, do_sample=False)
    text = generate(target, folder, prompt, num_assistant_tokens=5, prompt_lookup_num_tokens=0, **settings)[0].tolist()
    assert_drafts(
        rounds, text, 7, 5, lambda so_far: eagle_by_loops(target, config, weights, so_far, 5, size=size)
    )  # of which the last block is not whole


@pytest.mark.parametrize("size", [2, 3])
def test_trees_over_blocks_are_those_of_plain_loops(size: int, tmp_path: Path, monkeypatch):
    lengths = compare_with_loops(*falcon(size), tmp_path, monkeypatch, size, sharp=4.0)
    assert len(lengths) > 20 and max(lengths) >= 4  # of two tokens in the third block, which sees the second


@pytest.mark.one_version
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_in_trees_over_blocks_is_found(fault: str, tmp_path: Path, monkeypatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        compare_with_loops(*falcon(2), tmp_path, monkeypatch, 2, sharp=4.0)


def test_a_block_of_one_token_is_a_step_of_eagle(tmp_path: Path, monkeypatch):
    target, batch = llama(), ragged_batch()
    settings = dict(max_new_tokens=14, eos_token_id=None, do_sample=False, num_assistant_tokens=4)
    folders = [save(tmp_path / name, *made) for name, made in (("a", EAGLES["speculators"]), ("b", falcon(1)))]
    chains = []
    for folder, drafter in zip(folders, (EagleDrafter, FalconDrafter), strict=True):
        with monkeypatch.context() as patch:
            chains.append(recorded(patch, drafter))
            generate(target, folder, **batch, **settings, prompt_lookup_num_tokens=0)
    assert chains[0] == chains[1] and len(chains[0]) > 3
    trees = [first_trees(target, folder, batch, monkeypatch, **settings, tree_size=12) for folder in folders]
    assert len(trees[0]) > 3
    for one, other in zip(*trees, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.parents, other.parents)
        torch.testing.assert_close(one.confidences, other.confidences)


def test_every_row_of_a_batch_drafts_as_it_does_alone(tmp_path: Path):
    """Also one whose prompt is shorter than a block."""
    assert_rows_draft_as_alone(llama(), save(tmp_path, *falcon(3)), ragged_batch(padding=(0, 3, 8, 1, 7)))


@pytest.mark.parametrize("name", ["llama", pytest.param("mistral-sliding", marks=pytest.mark.slow)])
def test_the_text_is_that_of_plain_generate(name: str, tmp_path: Path):
    target, batch, eos = meaningful_target(name)
    folder = save(tmp_path, *falcon(2))
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for k, more in ((3, {}), (5, dict(tree_size=14))):
            check(target, batch, reference, folder, k, **more, **arguments)


@pytest.mark.parametrize("size", [0, 17, "2", None])
def test_a_block_size_that_is_none(size, tmp_path: Path):
    config, weights = falcon(2)
    with pytest.raises(ValueError, match=r"block_size is .*; expected a whole number from 1 to 16"):
        generate(llama(), save(tmp_path, config | {"block_size": size}, weights), torch.tensor([[7]]), max_new_tokens=2)


# ---- what slots see while they learn


def student_and_row():
    target, _, _, rows = make_answers(False)
    student = make_student("falcon", target, rows)
    return student, target, rows[0]


def test_slots_see_their_block_and_nothing_that_is_drafted_later():
    """The relaxed-causal mask: the first slot of a block of two depends on the last token in front of the block, which
    is further than a causal mask would let it see; and on none after it."""
    student, _, (tokens, labels) = student_and_row()
    size = student.network.config.block_size
    assert size == 2 < SLOTS

    def states(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return student.drafts(student.network, Answers.collate([(tokens, labels)])).states

    before, seen = states(tokens), set()
    first = max(0, int((labels != IGNORED).long().argmax()) - 1 - SLOTS)  # the position of the first group
    for changed in range(first + 6, first + 12):
        other = tokens.clone()
        other[changed] = (other[changed] + 1) % 40 + 7
        differs = (states(other) != before).any(dim=2)
        for group in range(6):
            position = first + group
            for slot in range(SLOTS):
                known = position + 1 + slot // size * size  # the last token in front of its block
                assert bool(differs[group, slot]) == (changed <= known)
                seen.add((changed <= known, changed == known))
    assert {(True, True), (False, False)} <= seen


def test_as_many_tokens_are_shown_as_a_share_of_the_wrong_ones():
    student, _, row = student_and_row()
    text = Text(student, student.network, Answers.collate([row]), 1.0)
    torch.manual_seed(0)
    number, blocks = torch.full((len(text.labels),), 1.5), 3
    found = torch.stack([text._shown(number, blocks)[:, text.groups.real] for _ in range(200)]).float()
    assert found.sum(dim=1).mean() * text.size == pytest.approx(1.5, rel=0.05)
    assert found.mean(dim=(0, 2)).tolist() == pytest.approx([0.25] * blocks, rel=0.1)  # any block
    assert not text._shown(0 * number, blocks).any()
    assert text._shown(number + 99, blocks)[:, text.groups.real].all()


def test_where_nothing_is_shown_it_drafts_alone_and_where_all_is_from_what_is_true():
    student, target, row = student_and_row()
    network, tokens = student.network, row[0]
    text = Text(student, network, Answers.collate([row]), 1.0)
    with torch.no_grad():
        alone = student.head.draft_logits(text.glanced(0.0).states)
        shown = text.glanced(99.0).states
        true = text._drafts(lambda slot, *_: (text.true(text.next_tokens, slot), text.true(text.fused, slot)))
    torch.testing.assert_close(shown, true.states)
    assert not torch.allclose(text.drafts().states, true.states)
    first = max(0, int((row[1] != IGNORED).long().argmax()) - 1 - SLOTS)
    for group in range(0, len(alone) - SLOTS, 5):
        known = first + group + 1
        drafts = alone[group].argmax(dim=-1)
        ids = drafts if student.head.draft_token_ids is None else student.head.draft_token_ids[drafts]
        own = torch.cat([tokens[: known + 1], ids])
        torch.testing.assert_close(alone[group], cached_logits(student, target, own, known, SLOTS), rtol=0, atol=1e-5)
