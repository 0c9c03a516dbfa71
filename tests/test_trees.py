"""Trees of drafts are verified as losslessly as chains, whatever their shapes, in rows of their own."""

from __future__ import annotations

import pytest
import torch
from architectures import FAMILIES
from exactness import Reference, check, plain
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, meaningful_target
from trees import OracleTree

from specformer import SpecFormerConfig, SpecFormerModel


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


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("knows_depth", [True, False])
def test_settings(setting: str, knows_depth: bool):
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
    from architectures import make_target
    from tiny import ragged_batch

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
