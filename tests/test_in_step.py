"""Processors and criteria that need all rows at one length get that, or end in a sentence: never another text."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import warnings
from collections import Counter

import pytest
import torch
import transformers
from exactness import check, oracle, plain
from test_exactness import NEW_TOKENS, SAMPLING, meaningful_target
from tiny import EOS, VOCAB, llama, ragged_batch
from transformers import LogitsProcessor, StoppingCriteria

from specformer import generate
from specformer.generation.backend_versions import rows_of_a_prompt
from specformer.generation.text_own_state import Opaque, state_of

ENDLESS = dict(eos_token_id=None, max_new_tokens=NEW_TOKENS)


# ---- what an object remembers


class Remembers:
    def __init__(self):
        self.steps = 0
        self.rows: dict[int, list[int]] = {}
        self.mask = torch.zeros(3)

    def count(self):
        self.steps += 1

    def note(self):
        self.rows.setdefault(0, []).append(1)

    def write(self):
        self.mask[1] += 1


class WithSlots:
    __slots__ = ("steps",)

    def __init__(self):
        self.steps = 0


def closure():
    steps = 0

    def call():
        nonlocal steps
        steps += 1

    return call


GLOBAL_STEPS = 0


def by_global():
    global GLOBAL_STEPS
    GLOBAL_STEPS += 1


def with_default(seen=[]):  # noqa: B006
    seen.append(1)


@pytest.mark.parametrize("change", [Remembers.count, Remembers.note, Remembers.write])
def test_change_of_an_attribute_is_seen(change):
    thing = Remembers()
    before = state_of(thing)
    assert state_of(thing) == before
    change(thing)
    assert state_of(thing) != before
    bound = functools.partial(change, thing)
    before = state_of(bound)
    change(thing)
    assert state_of(bound) != before


@pytest.mark.parametrize("function", [closure(), by_global, with_default])
def test_change_that_a_function_makes_is_seen(function):
    before = state_of(function)
    assert state_of(function) == before
    function()
    assert state_of(function) != before


def test_slots_inference_tensors_arrays_and_generators_are_looked_at():
    slots = WithSlots()
    before = state_of(slots)
    slots.steps = 1
    assert state_of(slots) != before
    with torch.inference_mode():
        tensor = torch.zeros(2)
        before = state_of([tensor])
        tensor[0] = 1
        assert state_of([tensor]) != before
    array = torch.zeros(2).numpy()
    before = state_of({"array": array})
    array[0] = 1
    assert state_of({"array": array}) != before
    source = random.Random(3)
    before = state_of(source)
    source.random()
    assert state_of(source) != before


def test_what_cannot_be_looked_into_is_said():
    for thing in (iter([1, 2]), torch.Generator(), (number for number in range(3)), itertools.count()):
        with pytest.raises(Opaque, match="holds a"):
            state_of({"in": [thing]})


def test_what_refers_to_itself_ends():
    thing = Remembers()
    thing.rows = {0: [thing]}
    before = state_of(thing)
    thing.steps = 5
    assert state_of(thing) != before


def test_constants_are_no_state():
    pure = functools.lru_cache(lambda text: len(text))
    holder = Remembers()
    holder.rows = {"pattern": re.compile("a+"), "function": pure, "type": Counter, "model": llama()}
    before = state_of(holder)
    pure("abc")
    assert state_of(holder) == before


# ---- processors


class CountsItsCalls(LogitsProcessor):
    """Favours another token in every step."""

    def __init__(self):
        self.steps = 0

    def __call__(self, input_ids, scores):
        self.steps += 1
        scores = scores.clone()
        scores[:, (20 + 7 * self.steps) % VOCAB] += 1.5
        return scores


class FollowsEachRow(LogitsProcessor):
    """As grammars do: takes in the newest token of every row in each call, and asserts that there is just one."""

    def __init__(self):
        self.seen: list[list[int]] | None = None

    def __call__(self, input_ids, scores):
        if self.seen is None:
            self.seen = [row.tolist() for row in input_ids]
        else:
            for row, tokens in zip(self.seen, input_ids.tolist(), strict=True):
                row.append(tokens[-1])
                assert row == tokens
        bonus = torch.zeros_like(scores)
        for place, row in enumerate(self.seen):
            bonus[place, (5 * len(row) + 3 * sum(row[-3:])) % VOCAB] = 4.0
        return scores + bonus


class DrawsNumbers(LogitsProcessor):
    def __init__(self):
        self.source = torch.Generator().manual_seed(3)

    def __call__(self, input_ids, scores):
        return scores + torch.randn(scores.shape, generator=self.source, dtype=torch.float64)


def counting_function():
    steps = 0

    def processor(input_ids, scores):
        nonlocal steps
        steps += 1
        return scores.roll(steps, dims=1)

    return processor


STATEFUL = {
    "counter": CountsItsCalls,
    "every row": FollowsEachRow,
    "random numbers": DrawsNumbers,
    "closure": counting_function,
}


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", STATEFUL)
def test_processor_that_keeps_state(name: str, sampling: dict):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, logits_processor=[STATEFUL[name]()], **arguments)
    assert reference.sequences.tolist() != plain(target, batch, **arguments).sequences.tolist()
    with pytest.warns(UserWarning, match="state between its calls.* advance together"):
        statistics = check(
            target,
            batch,
            reference,
            oracle(reference, batch, "sometimes", eos),
            4,
            logits_processor=[STATEFUL[name]()],
            **arguments,
        )
    assert sum(statistics.drafted_per_slot) == 0


@pytest.mark.parametrize("name", STATEFUL)
def test_one_row_is_drafted_for_all_the_same(name: str):
    target, batch = llama(), ragged_batch(padding=(0,))
    reference = plain(target, batch, logits_processor=[STATEFUL[name]()], **ENDLESS)
    for kind in ("sometimes", "adversarial"):
        drafter = oracle(reference, batch, kind, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            statistics = check(target, batch, reference, drafter, 4, logits_processor=[STATEFUL[name]()], **ENDLESS)
        assert sum(statistics.drafted_per_slot) > 0


class PreparesItself(LogitsProcessor):
    """Pure, but for what its first call makes."""

    def __init__(self):
        self.bonus = None

    def __call__(self, input_ids, scores):
        if self.bonus is None:
            self.bonus = torch.linspace(-2, 2, scores.shape[-1], dtype=scores.dtype).sin()
        return scores + self.bonus * input_ids[:, -1:]


def test_processor_that_prepares_itself_in_its_first_call_is_no_obstacle():
    target, batch, _ = meaningful_target("llama")
    reference = plain(target, batch, logits_processor=[PreparesItself()], **ENDLESS)
    drafter = oracle(reference, batch, "sometimes", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = check(target, batch, reference, drafter, 4, logits_processor=[PreparesItself()], **ENDLESS)
    assert sum(statistics.accepted_per_slot) > 0


class RemembersLate(LogitsProcessor):
    """Its state changes for the first time when rows have got apart."""

    def __init__(self):
        self.active = False

    def __call__(self, input_ids, scores):
        self.active |= input_ids.shape[1] > 16
        return scores.roll(1, dims=1) if self.active else scores


def test_state_that_shows_too_late_ends_in_a_sentence():
    target, batch, _ = meaningful_target("llama")
    reference = plain(target, batch, logits_processor=[RemembersLate()], **ENDLESS)
    arguments = dict(ENDLESS, logits_processor=[RemembersLate()])
    with pytest.raises(RuntimeError, match=r"RemembersLate keeps state .* num_assistant_tokens=0, or one prompt"):
        generate(target, oracle(reference, batch, "sometimes", None), **batch, num_assistant_tokens=4, **arguments)
    arguments["logits_processor"] = [RemembersLate()]
    assert generate(target, **batch, num_assistant_tokens=0, **arguments).tolist() == reference.sequences.tolist()


# ---- criteria


class WholeBatchCounts(StoppingCriteria):
    """One answer for the batch, after some calls, as many people write criteria."""

    def __init__(self, calls: int, answer=bool):
        self.left, self.answer = calls, answer

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        return self.answer(self.left <= 0)


class WholeBatchLength(StoppingCriteria):
    """One answer for the batch, without state."""

    def __init__(self, length: int, answer=bool):
        self.length, self.answer = length, answer

    def __call__(self, input_ids, scores, **kwargs):
        return self.answer(input_ids.shape[1] >= self.length)


class AnyRowHas(StoppingCriteria):
    """Stops all rows when one of them has a token: what one row's text says of another."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return bool((input_ids[:, 9:] == self.token).any())


class CountsRowsOnItsOwn(StoppingCriteria):
    """One answer for each row, from a counter."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.arange(len(input_ids)) * 2 + 3 <= self.calls


ANSWERS = {"bool": bool, "0-d": torch.tensor, "one entry": lambda done: torch.tensor([done])}


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", [WholeBatchCounts, WholeBatchLength])
def test_criterion_with_one_answer_for_the_batch(kind, answer: str, sampling: dict, eos):
    target, batch, _ = meaningful_target("llama")
    at = 7 if kind is WholeBatchCounts else batch["input_ids"].shape[1] + 7
    arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)

    def criteria():
        return dict(stopping_criteria=[kind(at, ANSWERS[answer])])

    reference = plain(target, batch, **criteria(), **arguments)
    assert reference.sequences.shape[1] == batch["input_ids"].shape[1] + 7
    with pytest.warns(UserWarning, match="advance together"):
        drafter = oracle(reference, batch, "sometimes", eos)
        check(target, batch, reference, drafter, 4, **criteria(), **arguments)


def test_criterion_that_lets_one_row_stop_all():
    target, batch, _ = meaningful_target("llama")
    token = int(plain(target, batch, **ENDLESS).sequences[2, 9 + 8])
    reference = plain(target, batch, stopping_criteria=[AnyRowHas(token)], **ENDLESS)
    assert 9 < reference.sequences.shape[1] < 9 + NEW_TOKENS
    with pytest.warns(UserWarning, match="AnyRowHas gives one answer for the whole batch"):
        drafter = oracle(reference, batch, "sometimes", None)
        check(target, batch, reference, drafter, 4, stopping_criteria=[AnyRowHas(token)], **ENDLESS)


@pytest.mark.parametrize("eos", [None, EOS])
def test_criterion_that_counts_its_calls_for_each_row(eos):
    target, batch, _ = meaningful_target("llama")
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, stopping_criteria=[CountsRowsOnItsOwn()], **arguments)
    with pytest.warns(UserWarning, match="CountsRowsOnItsOwn keeps state"):
        drafter = oracle(reference, batch, "sometimes", eos)
        check(target, batch, reference, drafter, 4, stopping_criteria=[CountsRowsOnItsOwn()], **arguments)


def test_one_row_with_a_criterion_of_one_answer_is_drafted_for():
    target, batch = llama(), ragged_batch(padding=(0,))
    reference = plain(target, batch, stopping_criteria=[WholeBatchCounts(9)], **ENDLESS)
    drafter = oracle(reference, batch, "sometimes", None)
    statistics = check(target, batch, reference, drafter, 4, stopping_criteria=[WholeBatchCounts(9)], **ENDLESS)
    assert sum(statistics.accepted_per_slot) > 0


# ---- prefix_allowed_tokens_fn


def by_prompt_or_row(batch_id: int, input_ids: torch.Tensor) -> list[int]:
    """Another rule for every id: what an id means shows in the text."""
    return [(7 * batch_id + 5 * int(input_ids[-1]) + offset) % VOCAB for offset in range(12)]


@pytest.mark.parametrize("sequences", [1, 2, 3])
@pytest.mark.parametrize("prompts", [1, 3])
def test_prefix_function_with_several_sequences_of_a_prompt(sequences: int, prompts: int):
    target, batch = llama(), ragged_batch(padding=(0, 3, 5)[:prompts])
    arguments = dict(ENDLESS, do_sample=True, num_return_sequences=sequences, prefix_allowed_tokens_fn=by_prompt_or_row)
    reference = plain(target, batch, **arguments)
    expanded = {name: part.repeat_interleave(sequences, dim=0) for name, part in batch.items()}
    for kind in ("sometimes", "adversarial"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*prefix_allowed_tokens_fn holds for")
            check(target, batch, reference, oracle(reference, expanded, kind, None), 4, **arguments)


@pytest.mark.parametrize("banned_for", ["every sequence", "some"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_prefix_function_whose_only_token_is_banned(sequences: int, banned_for: str):
    """Plain generate() raises, or since transformers 5.24 takes the token where it is banned for all sequences of the
    prompt: whatever it does, ours does too."""
    target, batch = llama(), ragged_batch(padding=(0, 3))

    def only_one(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        if input_ids.shape[0] not in (12, 13):
            return list(range(6, VOCAB))
        if banned_for == "some" and int(input_ids[9]) % 2:
            return list(range(6, VOCAB))
        return [20]

    arguments = dict(ENDLESS, do_sample=True, num_return_sequences=sequences)
    arguments.update(prefix_allowed_tokens_fn=only_one, bad_words_ids=[[20]])
    expanded = {name: part.repeat_interleave(sequences, dim=0) for name, part in batch.items()}
    outcomes = set()
    for seed in range(6):
        try:
            reference = plain(target, batch, seed=seed, **arguments)
        except (RuntimeError, ValueError):
            outcomes.add("raises")
            with pytest.raises((RuntimeError, ValueError)), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                generate(target, **batch, prompt_lookup_num_tokens=3, **arguments)
            continue
        outcomes.add("goes on")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(target, batch, reference, oracle(reference, expanded, "sometimes", None), 4, seed=seed, **arguments)
    forces = "unsatisfiable" in transformers.PrefixConstrainedLogitsProcessor.__call__.__code__.co_varnames
    assert ("goes on" in outcomes) if forces else ("raises" in outcomes)


def test_rows_of_a_prompt_are_read_from_the_processor():
    processor = transformers.PrefixConstrainedLogitsProcessor(by_prompt_or_row, 3)
    assert rows_of_a_prompt(processor) == 3


# ---- structured output


CHARACTERS = [chr(code) for code in range(32, 32 + 91)] + ["{", "|", "}"]


def json_target():
    target = llama(vocab_size=len(CHARACTERS) + 1, eos_token_id=len(CHARACTERS), pad_token_id=0)
    batch = ragged_batch()
    return target, batch, len(CHARACTERS)


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("rows", [1, 4])
def test_json_schema_with_xgrammar(rows: int, sampling: dict):
    """xgrammar's processor for transformers: a matcher for each row, told the newest token in every call."""
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor as GrammarProcessor

    target, batch, eos = json_target()
    batch = {name: part[:rows] for name, part in batch.items()}
    vocabulary = xgrammar.TokenizerInfo([*CHARACTERS, "</s>"], stop_token_ids=[eos])
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["red", "blue", "green"]}, "b": {"type": "boolean"}, "c": {"enum": [1, 22, 333]}},
        "required": ["a", "b", "c"],
    }
    compiled = xgrammar.GrammarCompiler(vocabulary).compile_json_schema(json.dumps(schema), any_whitespace=False)
    arguments = dict(sampling, max_new_tokens=60)
    reference = plain(target, batch, logits_processor=[GrammarProcessor(compiled)], **arguments)
    texts = ["".join(CHARACTERS[token] for token in row if token < eos) for row in reference.sequences[:, 9:].tolist()]
    texts = [text.rstrip() for text in texts]  # the pad token is a space
    assert all(set(json.loads(text)) == {"a", "b", "c"} for text in texts)
    drafter = oracle(reference, batch, "sometimes", eos)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*advance together")
        statistics = check(
            target, batch, reference, drafter, 4, logits_processor=[GrammarProcessor(compiled)], **arguments
        )
    assert (sum(statistics.accepted_per_slot) > 0) == (rows == 1)
