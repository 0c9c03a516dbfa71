"""Tokens, streamer calls and the generator's final state equal plain generate()'s, family by family.

Targets are tiny and random, float64; batches are ragged and left-padded; drafters know the answer and use that
knowledge in the ways that could break something.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from architectures import FAMILIES, make_target
from exactness import assert_meaningful, check, choose_eos, oracle, plain
from oracles import Oracle
from tiny import VOCAB, ragged_batch
from transformers import MaxLengthCriteria, MaxTimeCriteria

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation import text as text_module

NEW_TOKENS = 24
SAMPLING = dict(do_sample=True, temperature=1.3, top_k=20, top_p=0.95)


@cache
@torch.no_grad()
def meaningful_seed(name: str) -> tuple[int, int]:
    """The first seed whose greedy text is varied and free of near ties, and a token that ends it."""
    batch = ragged_batch()
    for seed in range(20):
        target = make_target(name, seed)
        sequences = target.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None)
        try:
            assert_meaningful(target, batch, sequences)
        except AssertionError:
            continue
        return seed, choose_eos(sequences, batch["input_ids"].shape[1])
    raise AssertionError(f"no seed gives {name} a text worth testing")


def meaningful_target(name: str):
    """A new target, since tests change theirs, with a text worth testing; a batch; and a token that ends its rows."""
    seed, eos = meaningful_seed(name)
    return make_target(name, seed), ragged_batch(), eos


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str):
    target, batch, eos = meaningful_target(name)
    for arguments in (dict(eos_token_id=eos), dict(eos_token_id=eos, **SAMPLING), dict(eos_token_id=None)):
        arguments = dict(arguments, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for k in (1, 4, 8):
            for kind in ("sometimes", "adversarial"):
                drafter = oracle(reference, batch, kind, eos)
                check(target, batch, reference, drafter, k, **arguments)


SETTINGS = {
    "greedy": {},
    "repetition penalty": dict(repetition_penalty=1.4),
    "no repeated n-gram": dict(no_repeat_ngram_size=2),
    "min_new_tokens": dict(min_new_tokens=12),
    "sampling": SAMPLING,
    "sampling with a penalty": dict(SAMPLING, repetition_penalty=1.2),
    "num_return_sequences": dict(SAMPLING, num_return_sequences=3),
}


ON_BOTH_VERSIONS = ("greedy", "sampling with a penalty")
UNDER_A_DRAFTER = [
    pytest.param(name, marks=() if name in ON_BOTH_VERSIONS else pytest.mark.one_version) for name in SETTINGS
]
"""Settings of the texts under one kind of drafter: `test_full_cross` tries all of them on each version."""


def crossed(first, *others) -> list:
    """Things with which to try a kind of drafter, and settings: `UNDER_A_DRAFTER` with the first, two with each of the
    others, and the rest of the cross in long runs."""
    cases = [pytest.param(first, *setting.values, marks=setting.marks) for setting in UNDER_A_DRAFTER]
    for other in others:
        for name in SETTINGS:
            cases.append(pytest.param(other, name, marks=() if name in ON_BOTH_VERSIONS else pytest.mark.slow))
    return cases


IN_EVERY_RUN = ["llama", "gemma3", "gpt2"]
IN_LONG_RUNS = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in IN_EVERY_RUN]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["never", "always", "sometimes", "adversarial"])
@pytest.mark.parametrize("name", [*IN_EVERY_RUN, *IN_LONG_RUNS])
def test_full_cross(name: str, kind: str, setting: str):
    target, batch, eos = meaningful_target(name)
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for k in range(1, 9):
        statistics = check(target, batch, reference, oracle(reference, batch, kind, eos), k, **arguments)
        if kind == "never":
            assert sum(statistics.accepted_per_slot) == 0
        if kind == "always":
            assert statistics.accepted_per_slot == statistics.drafted_per_slot or eos in reference.sequences
            assert statistics.tokens_per_pass > 1 or not sum(statistics.drafted_per_slot)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("kind", ["always", "sometimes", "adversarial"])
def test_max_length_is_the_position_table(kind: str, k: int):
    """Blocks reach past the last position of the table; what they write there is never kept."""
    target = make_target("gpt2", n_positions=32)
    batch = ragged_batch(padding=(0, 3, 5, 0, 8))
    for sampling in ({}, SAMPLING):
        reference = plain(target, batch, max_length=32, **sampling)
        assert reference.sequences.shape[1] == 32
        check(target, batch, reference, oracle(reference, batch, kind, None), k, max_length=32, **sampling)


@pytest.mark.parametrize("anchor", [True, False], ids=["anchor", "paper"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "deepseek-v3"])
def test_the_network_as_drafter(name: str, anchor: bool):
    """The same with a (random) SpecFormer network, in a batch that loses rows on the way."""
    target, batch, eos = meaningful_target(name)
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, use_anchor_token=anchor))
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for k in (0, 1, 4, None, 100):
            check(target, batch, reference, drafter, k, **arguments)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_float32(implementation: str):
    target, batch, eos = meaningful_target("gemma3")
    target = target.float()
    target.set_attn_implementation(implementation)
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for kind in ("sometimes", "adversarial"):
        check(target, batch, reference, oracle(reference, batch, kind, eos), 4, **arguments)


class StopAt:
    """A custom criterion without an EOS id: each row stops at one of the given lengths."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor(input_ids.shape[1]) >= self.lengths


@pytest.mark.parametrize("with_eos", [False, True])
@pytest.mark.parametrize("kind", ["always", "sometimes", "adversarial"])
def test_rows_that_stop_are_padded_exactly_where_plain_generate_pads_them(kind: str, with_eos: bool):
    """Without an EOS id plain generate() writes real tokens into a stopped row until every row has stopped."""
    target, batch, eos = meaningful_target("llama")
    arguments = dict(
        eos_token_id=eos if with_eos else None,
        max_new_tokens=NEW_TOKENS,
        stopping_criteria=[StopAt([12, 30, 17, 11, 22])],
    )
    for sampling in ({}, SAMPLING):
        reference = plain(target, batch, **arguments, **sampling)
        assert reference.sequences.shape[1] < 9 + NEW_TOKENS
        for k in (1, 4, 8):
            check(target, batch, reference, oracle(reference, batch, kind, eos), k, **arguments, **sampling)


def test_prefix_function_is_asked_about_real_text_only():
    target, batch, eos = meaningful_target("llama")
    seen: set[tuple] = set()

    def allowed(row: int, input_ids: torch.Tensor) -> list[int]:
        seen.add((row, tuple(input_ids.tolist())))
        return list(range((row + len(input_ids)) % 5, 64, 2))

    arguments = dict(eos_token_id=None, max_new_tokens=NEW_TOKENS, prefix_allowed_tokens_fn=allowed)
    reference = plain(target, batch, **arguments)
    asked_by_plain = set(seen)
    for kind in ("never", "sometimes", "adversarial"):
        seen.clear()
        check(target, batch, reference, oracle(reference, batch, kind, eos), 4, **arguments)
        assert seen == asked_by_plain


class CutRow:
    """Stops row 0 once it holds the first `length` of its tokens; reads the text in ways that need it contiguous."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        input_ids.view(-1)
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[0] = input_ids.shape[1] >= self.length
        return done


class RightInTheFirstRow(Oracle):
    """The others fall behind it."""

    def drafts(self, num_tokens):
        drafts = super().drafts(num_tokens)
        drafts[self.rows > 0] = (drafts[self.rows > 0] + 1) % VOCAB
        return drafts


@pytest.mark.parametrize("length", range(26, 36))
def test_row_cut_by_a_criterion_at_the_edge_of_the_buffer(length: int, monkeypatch):
    """The cut row's accepted drafts were longer; its place in the buffer must not stay ahead of the other rows."""
    monkeypatch.setattr(text_module, "FIRST_WIDTH", 16)
    target, batch, eos = meaningful_target("llama")
    unused = next(token for token in range(6, 64) if token != eos)
    arguments = dict(eos_token_id=unused, max_new_tokens=40, stopping_criteria=[CutRow(length)])
    reference = plain(target, batch, **arguments)
    drafter = RightInTheFirstRow(reference.sequences, batch["input_ids"].shape[1], "always")
    check(target, batch, reference, drafter, 8, **arguments)


def test_length_criterion_that_the_prompt_already_meets():
    target, batch, eos = meaningful_target("llama")
    arguments = dict(stopping_criteria=[MaxLengthCriteria(4)], max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    assert reference.sequences.shape[1] == batch["input_ids"].shape[1] + 1
    for k in (0, 4):
        check(target, batch, reference, oracle(reference, batch, "always", eos), k, **arguments)


class AfterCalls(MaxTimeCriteria):
    """A clock that runs out at a known round."""

    def __init__(self, calls: int):
        super().__init__(max_time=1e9)
        self.calls = calls

    def __call__(self, input_ids, scores, **kwargs):
        self.calls -= 1
        return torch.full((len(input_ids),), self.calls < 0)


@pytest.mark.parametrize("with_eos", [False, True])
def test_rows_cut_by_the_clock_end_at_the_same_column(with_eos: bool):
    """What is there when the time is up is a beginning of plain generate()'s text, and no unfinished row is padded."""
    target, batch, eos = meaningful_target("llama")
    arguments = dict(eos_token_id=eos if with_eos else None, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    drafter = oracle(reference, batch, "sometimes", eos)
    clock = [AfterCalls(3)]
    output = generate(
        target,
        drafter,
        **batch,
        **arguments,
        num_assistant_tokens=4,
        stopping_criteria=clock,
        return_dict_in_generate=True,
    )
    ours = output.sequences
    assert max(output.statistics.tokens_per_row) == ours.shape[1] - batch["input_ids"].shape[1]
    assert batch["input_ids"].shape[1] < ours.shape[1] < reference.sequences.shape[1]
    assert ours.tolist() == reference.sequences[:, : ours.shape[1]].tolist()


def test_row_that_cannot_be_sampled_raises_as_in_plain_generate():
    target, batch, _ = meaningful_target("llama")
    nothing = [lambda input_ids, scores: torch.full_like(scores, -torch.inf)]
    with pytest.raises(RuntimeError):
        target.generate(**batch, do_sample=True, logits_processor=nothing)
    with pytest.raises(RuntimeError, match="cannot be sampled"):
        generate(target, None, **batch, num_assistant_tokens=0, do_sample=True, logits_processor=nothing)


def test_mask_with_holes():
    target, batch, eos = meaningful_target("llama")
    batch["attention_mask"][2, 6] = 0
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for kind in ("sometimes", "adversarial"):
        check(target, batch, reference, oracle(reference, batch, kind, eos), 4, **arguments)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_prefill_in_chunks(name: str):
    target, batch, eos = meaningful_target(name)
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS, prefill_chunk_size=4)
    reference = plain(target, batch, **arguments)
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))
    check(target, batch, reference, drafter, 4, **arguments)
