"""Assistants and prompt lookup through the same loop: any batch, plain generate()'s text, and drafts worth having."""

from __future__ import annotations

import pytest
import torch
from architectures import make_target
from exactness import check, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, UNDER_A_DRAFTER, crossed, meaningful_target
from tiny import EOS, PAD, llama, ragged_batch

from specformer import generate
from specformer.generation import generate as entry
from specformer.generation.draft_length import DraftLength
from specformer.generation.drafter import Prompts
from specformer.generation.drafter_assistant import AssistantDrafter
from specformer.generation.drafter_prompt_lookup import PromptLookupDrafter, find_repetition
from specformer.generation.prompt import PromptLayout
from specformer.generation.proposal import NO_TOKEN

# ---- a causal LM as assistant


@pytest.mark.parametrize(("assistant", "setting"), crossed("llama", "gemma3", "gpt2"))
def test_assistant(assistant: str, setting: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    assistant = make_target(assistant, seed=11)
    for k in (1, 2, 5):
        check(target, batch, reference, assistant, k, **arguments)


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral-sliding", "opt"])
def test_target_as_its_own_assistant_is_always_right(name: str, sampling: dict):
    """One position or cache slot off, in either model, and it would not be."""
    target, batch, eos = meaningful_target(name)
    arguments = dict(sampling, max_new_tokens=NEW_TOKENS)
    for eos_token_id in (None, eos):
        reference = plain(target, batch, **arguments, eos_token_id=eos_token_id)
        for k in (1, 3, 8):
            statistics = check(target, batch, reference, target, k, **arguments, eos_token_id=eos_token_id)
            if eos_token_id is None:
                assert statistics.accepted_per_slot == statistics.drafted_per_slot
            else:  # what is drafted behind a row's end counts as drafted
                assert statistics.tokens_per_pass > (1.4 if k > 1 else 1.2)


def test_drafts_are_what_the_assistant_writes_alone(monkeypatch):
    target, batch, _ = meaningful_target("llama")
    assistant = llama(seed=11, num_hidden_layers=2)
    proposed: list[torch.Tensor] = []
    propose = AssistantDrafter.propose

    def recorded(self, num_tokens, choose):
        proposal = propose(self, num_tokens, choose)
        proposed.append(proposal.tokens)
        return proposal

    monkeypatch.setattr(AssistantDrafter, "propose", recorded)
    reference = plain(target, batch, eos_token_id=None, max_new_tokens=NEW_TOKENS)
    check(target, batch, reference, assistant, 4, eos_token_id=None, max_new_tokens=NEW_TOKENS)
    written = [9 + 1] * 5  # tokens of each row, padding included
    text = reference.sequences
    assert len(proposed) > 5
    for drafts in proposed[:5]:  # the first rounds: no row has left, all have room
        for row, drafted in enumerate(drafts):
            start = int((1 - batch["attention_mask"][row]).sum())
            ids = text[row : row + 1, start : written[row]]
            alone = assistant.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, eos_token_id=None)
            assert drafted.tolist() == alone[0, -4:].tolist()
            right = (drafted == text[row, written[row] : written[row] + 4]).long().cumprod(0).sum()
            written[row] += int(right) + 1


@pytest.mark.parametrize("acceptance", ["match", "rejection", "coupled"])
@pytest.mark.parametrize("vocab_size", [254, 258])
def test_vocabulary_padded_to_another_size(vocab_size: int, acceptance: str):
    target, assistant = llama(vocab_size=256), llama(seed=11, vocab_size=vocab_size)
    batch = ragged_batch()
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, max_new_tokens=NEW_TOKENS, eos_token_id=None)
        reference = plain(target, batch, **arguments)
        if sampling and acceptance != "match":
            torch.manual_seed(3)
            ids = generate(target, assistant, **batch, **arguments, acceptance=acceptance)
            assert ids.shape == reference.sequences.shape
            assert ids.max() < 256
        else:
            check(target, batch, reference, assistant, 4, **arguments, acceptance=acceptance)


def test_assistant_whose_position_table_ends_inside_the_text():
    target, batch, _ = meaningful_target("llama")
    assistant = make_target("gpt2", n_positions=14)
    for arguments in (dict(max_new_tokens=NEW_TOKENS, eos_token_id=None), dict(SAMPLING, max_new_tokens=NEW_TOKENS)):
        reference = plain(target, batch, **arguments)
        check(target, batch, reference, assistant, 4, **arguments)


def test_assistant_in_another_dtype_and_in_chunks():
    target, batch, eos = meaningful_target("llama")
    assistant = llama(torch.float32, seed=11)
    arguments = dict(SAMPLING, max_new_tokens=NEW_TOKENS, eos_token_id=eos, prefill_chunk_size=4)
    reference = plain(target, batch, **arguments)
    check(target, batch, reference, assistant, 4, **arguments)
    assert assistant.dtype == torch.float32


def test_number_of_drafts_comes_from_the_assistant_where_nobody_says():
    target, batch, _ = meaningful_target("llama")
    assistant = llama(seed=11)
    arguments = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)
    reference = plain(target, batch, **arguments)
    assert check(target, batch, reference, assistant, None, **arguments).rounds_per_length[4] >= 1  # "auto" begins so
    assistant.generation_config.num_assistant_tokens = 2
    assert len(check(target, batch, reference, assistant, None, **arguments).drafted_per_slot) == 2
    assert len(check(target, batch, reference, assistant, 3, **arguments).drafted_per_slot) == 3


# ---- prompt lookup


@pytest.mark.parametrize("setting", UNDER_A_DRAFTER)
def test_prompt_lookup(setting: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for k, size in ((1, None), (4, 1), (4, 3), (30, 2)):
        lookup = dict(prompt_lookup_num_tokens=k, max_matching_ngram_size=size)
        check(target, batch, reference, None, None, **arguments, **lookup)


def test_prompt_lookup_in_a_repeating_text():
    """A text that repeats itself is drafted right: few passes."""
    target = llama()
    batch = ragged_batch()
    repeat = dict(logits_processor=[repeats_what_came_five_before], max_new_tokens=40, eos_token_id=None)
    reference = plain(target, batch, **repeat)
    statistics = check(target, batch, reference, None, None, **repeat, prompt_lookup_num_tokens=8)
    assert statistics.tokens_per_pass > 4


def test_as_many_copies_as_pay(monkeypatch):
    """ "auto" with copies alone: up to `prompt_lookup_num_tokens`; plain numbers are as before."""
    target, batch = llama(), ragged_batch()
    repeat = dict(logits_processor=[repeats_what_came_five_before], max_new_tokens=40, eos_token_id=None)
    reference = plain(target, batch, **repeat)
    lengths, decode = [], entry.decode
    monkeypatch.setattr(entry, "decode", lambda *args: lengths.append(args[6]) or decode(*args))
    check(target, batch, reference, None, "auto", **repeat, prompt_lookup_num_tokens=6)
    check(target, batch, reference, None, 2, **repeat, prompt_lookup_num_tokens=6)
    assert [length.most for length in lengths] == [6, 6]
    assert [type(length) is DraftLength for length in lengths] == [False, True]


def repeats_what_came_five_before(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.scatter(1, input_ids[:, -5:-4], 100.0)


def test_prompt_lookup_settings_from_generation_configs():
    target, batch, eos = meaningful_target("llama")
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    target.generation_config.prompt_lookup_num_tokens = 3
    assert len(check(target, batch, reference, None, None, **arguments).drafted_per_slot) == 3
    statistics = check(target, batch, reference, None, None, **arguments, prompt_lookup_num_tokens=2)
    assert len(statistics.drafted_per_slot) == 2
    assert not check(target, batch, reference, None, 0, **arguments).drafted_per_slot
    assistant = llama(seed=11)
    check(target, batch, reference, assistant, 2, **arguments, prompt_lookup_num_tokens=None)


def naive_source(text: list[int], max_size: int) -> int:
    for size in range(max_size, 0, -1):
        for behind in range(len(text) - 1, size - 1, -1):
            if size < len(text) and text[behind - size : behind] == text[-size:]:
                return behind
    return -1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 6),
)
def test_lookup_against_the_obvious_way(rows: list[list[int]], max_size: int, k: int):
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    expected = [naive_source(row, max_size) for row in rows]
    found = zip(*(part.tolist() for part in find_repetition(ids, lengths, max_size)), strict=True)
    assert [source if matched else -1 for source, matched in found] == expected

    drafter = PromptLookupDrafter(max_size)
    padded = torch.tensor([[EOS] * (width - len(row)) + row for row in rows])  # the prompts end one token earlier
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    drafter.begin(Prompts(padded, PromptLayout.from_mask(mask, padded), padded[:, :1], 100))
    texts = [[*row, int(padded[place, 0])] for place, row in enumerate(rows)]
    drafts = drafter.propose(k, None).tokens
    sources = [naive_source(text, max_size) for text in texts]
    if max(sources) < 0:
        assert drafts.shape == (len(rows), 0)
        return
    for text, source, drafted in zip(texts, sources, drafts.tolist(), strict=True):
        expected = list(text)
        for _ in range(k):
            expected.append(expected[source - len(text)] if source >= 0 else NO_TOKEN)
        assert drafted == expected[len(text) :]


def test_rows_do_not_draft_from_one_another():
    ids = torch.tensor([[7, 8, 9, 7], [1, 2, 3, 4]])
    source, matched = find_repetition(ids, torch.tensor([4, 4]), 2)
    assert source[0] == 1 and matched.tolist() == [1, 0]
