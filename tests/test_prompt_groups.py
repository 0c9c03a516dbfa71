"""Prompts of similar length are read together: as little padding as pays, and the same states for every row."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PRESETS, llama, ragged_batch

from specformer import SpecFormerModel, generate
from specformer.generation.drafter import Prompts
from specformer.generation.drafter_specformer import SpecFormerDrafter
from specformer.generation.prompt import PromptLayout
from specformer.generation.prompt_groups import LEAST_ON_ACCELERATOR, group_rows, tokens_of_a_pass
from specformer.generation.target import prefill, prompt_arguments
from specformer.generation.target_states import StateReader


def cost(widths: list[int], groups: list[list[int]], pass_tokens: int) -> int:
    return sum(len(rows) * max(widths[row] for row in rows) + pass_tokens for rows in groups)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 60))
def test_no_division_costs_less(widths: list[int], pass_tokens: int):
    groups = group_rows(widths, pass_tokens)
    assert sorted(row for rows in groups for row in rows) == list(range(len(widths)))
    every = []
    for labels in product(range(len(widths)), repeat=len(widths)):
        divided = [[row for row, own in enumerate(labels) if own == label] for label in set(labels)]
        every.append(cost(widths, divided, pass_tokens))
    assert cost(widths, groups, pass_tokens) == min(every)


@pytest.mark.parametrize(
    ("widths", "pass_tokens", "groups"),
    [
        ([7], 0, [[0]]),
        ([5, 5, 5], 0, [[0, 1, 2]]),
        ([5, 9, 5, 9], 3, [[0, 2], [1, 3]]),
        ([5, 9, 5, 9], 8, [[0, 1, 2, 3]]),
        ([5, 9, 5, 9], None, [[0, 1, 2, 3]]),
        ([400, 40, 50, 380, 60], 32, [[0, 3], [1, 2, 4]]),
    ],
)
def test_group_rows(widths: list[int], pass_tokens: int | None, groups: list[list[int]]):
    assert group_rows(widths, pass_tokens) == groups


def test_many_rows_are_divided_at_once():
    widths = torch.randint(1, 2000, (256,)).tolist()
    groups = group_rows(widths, 48)
    assert sum(len(rows) * max(widths[row] for row in rows) for rows in groups) < 1.1 * sum(widths)


def test_an_accelerator_wants_more_saved_and_big_models_less_so():
    small, big = llama().to("meta"), llama(hidden_size=1024, intermediate_size=4096, vocab_size=50_000).to("meta")
    assert tokens_of_a_pass(llama()) < LEAST_ON_ACCELERATOR <= tokens_of_a_pass(big) < tokens_of_a_pass(small)


def layout_of(batch, pass_tokens: int | None) -> PromptLayout:
    return PromptLayout.from_mask(batch["attention_mask"], batch["input_ids"], pass_tokens)


def with_holes() -> dict:
    batch = ragged_batch()
    batch["attention_mask"][0, 4] = batch["attention_mask"][2, 6] = 0
    return batch


@pytest.mark.parametrize("make", [ragged_batch, with_holes])
def test_groups_hold_the_tokens_of_their_rows(make):
    batch = make()
    layout = layout_of(batch, 2)
    groups = layout.groups
    assert len(groups) > 1
    for group in groups:
        assert group.width == max(layout.host_widths[row] for row in group.rows.tolist())
        ids = group.layout.compact(batch["input_ids"][group.rows, -group.width :])
        expected = layout.compact(batch["input_ids"])[group.rows]
        for row, length in enumerate(group.layout.host_lengths):
            assert torch.equal(ids[row, :length], expected[row, :length])
        assert torch.equal(group.layout.mask(), batch["attention_mask"][group.rows, -group.width :])


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("make", [ragged_batch, with_holes])
@torch.no_grad()
def test_prompts_leave_the_same_in_groups(make, chunk_size: int | None):
    target, batch = llama(), make()
    left, read = [], []
    with_groups, together = (layout_of(batch, pass_tokens) for pass_tokens in (2, None))
    for layout in (with_groups, together):
        sizes: list[int] = []
        hook = target.model.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        logits, cache, _ = prefill(
            target, batch["input_ids"], layout, 20, 4, prompt_arguments(target, layout), chunk_size=chunk_size
        )
        hook.remove()
        states = [
            states[row, :, :length]
            for layer in cache.layers
            for states in (layer.keys, layer.values)
            for row, length in enumerate(layout.host_lengths)
        ]
        left.append([logits, *states])
        read.append(sum(sizes))
    for ours, theirs in zip(*left, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert read[0] == sum(group.width * len(group.rows) for group in with_groups.groups) < read[1]
    assert read[1] == batch["input_ids"].numel()


@pytest.mark.parametrize("preset", ["paper", "anchor", "context", "all of it"])
@torch.no_grad()
def test_a_drafter_drafts_the_same_in_groups(preset: str):
    target, batch = llama(), ragged_batch()
    network = SpecFormerModel(PRESETS[preset](target.config, initializer_range=0.3)).double()
    first = batch["input_ids"][:, :1] + 1
    found = []
    for pass_tokens in (2, None):
        layout = layout_of(batch, pass_tokens)
        with SpecFormerDrafter(network, target) as drafter:
            arguments = prompt_arguments(target, layout)
            read = StateReader(target, drafter.hidden_state_layers)
            *_, states = prefill(target, batch["input_ids"], layout, 30, 4, arguments, states_of=read)
            drafter.begin(Prompts(batch["input_ids"], layout, first, 30, states))
            drafts = drafter.propose(4, lambda logits, ahead=0, token_ids=None: logits.argmax(-1)).tokens
            found.append((drafter.context, drafts))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_generate_reads_less_than_plain_generate():
    """In the whole call, and the text is the same."""
    target, batch = llama(), ragged_batch()
    network = SpecFormerModel(PRESETS["anchor"](target.config, initializer_range=0.3))
    read: list[int] = []
    target.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    arguments = dict(max_new_tokens=1, do_sample=False)  # the prompts' passes alone
    expected = target.generate(**batch, **arguments)
    plain = sum(read)
    generate(target, network, **batch, **arguments)  # the probe reads as well, once
    read.clear()
    assert torch.equal(generate(target, network, **batch, **arguments), expected)
    assert int(batch["attention_mask"].sum()) <= sum(read) < plain
