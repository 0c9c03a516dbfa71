"""Random combinations of arguments, batches and drafters: plain generate()'s result, or an error in words.

Each case is run through plain generate() and through ours. Allowed are

- the same: tokens, streamer calls, final state of torch's generator, scores and logits;
- our own refusal, but only where the case holds something that is refused;
- an error, where plain generate() raises one as well.

Texts sampled with "coupled" or "rejection" are other ones by design; they must end as generate() ends them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from architectures import make_target
from arguments import (
    LETTERS,
    Outcome,
    is_own_refusal,
    is_raised_on_purpose,
    last_token_is_unlikely,
    observe,
    same_error,
    tokenizer,
)
from exactness import Recorder
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from oracles import Oracle
from tiny import BOS, PAD, VOCAB, llama
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, StopStringCriteria, WatermarkingConfig

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation.accept_noise import StepNoise
from specformer.generation.text import Text

TARGETS = ["llama", "gpt2", "gemma3"]
ORACLES = ["sometimes", "adversarial", "always", "never"]
DRAFTERS = [*ORACLES, *ORACLES, "network", "causal LM", "prompt lookup", "nothing"]


@pytest.fixture(autouse=True)
def quiet():
    """Absurd arguments make transformers warn in every other case."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


target_named = functools.cache(make_target)


@functools.cache
def network_for(name: str) -> SpecFormerModel:
    torch.manual_seed(1)
    return SpecFormerModel(SpecFormerConfig.from_target_config(target_named(name).config)).eval()


@functools.cache
def causal_lm():
    return llama(seed=1, num_hidden_layers=2)


class Informed(Oracle):
    """An oracle that need not be right about the first token: where plain generate() raised, it makes up its answer."""

    default_num_assistant_tokens = 3

    def begin(self, prompts) -> None:
        pass

    def drafts(self, num_tokens) -> torch.Tensor:
        return super().drafts(num_tokens).clamp(0, VOCAB - 1)


# ---- pure functions of their arguments, row by row


def multiples_of_nine_stop(input_ids, scores, **kwargs):
    return input_ids[:, -1] % 9 == 0


def rows_stop_at_lengths(input_ids, scores, **kwargs):
    return torch.tensor(input_ids.shape[1]) >= 6 + torch.arange(len(input_ids)) * 3 % 8


def confident_rows_stop(input_ids, scores, **kwargs):
    """Reads the scores where generate() has them."""
    if not scores:
        return torch.zeros(len(input_ids), dtype=torch.bool)
    return scores[-1].softmax(-1).amax(-1) > 0.9


def parity_of_the_text(input_ids, scores):
    odd = (input_ids.sum(dim=1, keepdim=True) + torch.arange(scores.shape[-1])) % 3 == 0
    return scores.masked_fill(odd, -torch.inf)


def nothing_is_left(input_ids, scores):
    return torch.full_like(scores, -torch.inf) if input_ids.shape[1] > 8 else scores


def even_or_odd(row, input_ids):
    return list(range((row + len(input_ids)) % 2, VOCAB, 2))


def depends_on_the_text(row, input_ids):
    return [(int(input_ids[-1]) * 7 + offset) % VOCAB for offset in range(1, 12, 2)]


def allows_nothing_later(row, input_ids):
    return even_or_odd(row, input_ids) if len(input_ids) < 10 else []


def allows_nothing_from_six_on(row, input_ids):
    return even_or_odd(row, input_ids) if len(input_ids) < 6 else []


# ---- cases

tokens = st.integers(0, VOCAB - 1)
some_tokens = st.lists(tokens, min_size=1, max_size=4)
some_letters = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=8).map(sorted)
factors = st.sampled_from([0.5, 0.8, 1.2, 2.0, 5.0])

SAMPLERS = {
    "temperature": factors,
    "top_k": st.integers(1, 20),
    "top_p": st.sampled_from([0.2, 0.6, 0.95]),
    "min_p": st.sampled_from([0.01, 0.2, 0.6]),
    "typical_p": st.sampled_from([0.2, 0.9]),
    "epsilon_cutoff": st.sampled_from([0.01, 0.2]),
    "eta_cutoff": st.sampled_from([0.01, 0.3]),
    "top_h": st.sampled_from([0.2, 0.7]),
    "num_return_sequences": st.integers(2, 3),
}
OPTIONS = {
    **SAMPLERS,
    "repetition_penalty": factors,
    "encoder_repetition_penalty": factors,
    "no_repeat_ngram_size": st.integers(1, 4),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": st.lists(some_tokens, min_size=1, max_size=3),
    "sequence_bias": st.dictionaries(
        st.lists(tokens, min_size=1, max_size=2).map(tuple), st.floats(-6, 6), min_size=1, max_size=3
    ),
    "suppress_tokens": some_tokens,
    "begin_suppress_tokens": some_tokens,
    "forced_bos_token_id": tokens,
    "forced_eos_token_id": tokens | some_tokens,
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 6), st.sampled_from([1.1, 2.0])),
    "min_length": st.integers(1, 20),
    "min_new_tokens": st.integers(1, 12),
    "max_length": st.integers(2, 20),
    "max_time": st.sampled_from([0.0, 1e6]),
    "eos_token_id": tokens | st.lists(tokens, min_size=2, max_size=16) | st.none(),
    "pad_token_id": tokens | st.none(),
    "renormalize_logits": st.just(True),
    "remove_invalid_values": st.just(True),
    "watermarking_config": st.sampled_from(
        [WatermarkingConfig(bias=3.0), WatermarkingConfig(bias=3.0, seeding_scheme="selfhash", context_width=2)]
    ),
    "prefix_allowed_tokens_fn": st.sampled_from([even_or_odd, depends_on_the_text]),
    "logits_processor": st.sampled_from([[last_token_is_unlikely], [parity_of_the_text]]),
    "stopping_criteria": st.sampled_from([[multiples_of_nine_stop], [rows_stop_at_lengths], [confident_rows_stop]])
    | st.builds(lambda length: [MaxLengthCriteria(length)], st.integers(2, 20))
    | st.builds(lambda ids: [EosTokenCriteria(ids)], some_tokens)
    | st.builds(lambda letters: [StopStringCriteria(tokenizer(), letters)], some_letters),
    "stop_strings": some_letters,
    "prefill_chunk_size": st.integers(1, 10),
    "streamer": st.just(Recorder),
    "return_dict_in_generate": st.just(True),
    "output_scores": st.just(True),
    "output_logits": st.just(True),
    "use_cache": st.booleans(),
    "cache_implementation": st.sampled_from(["dynamic", "static", "hybrid"]),
    "logits_to_keep": st.integers(0, 3),
    "length_penalty": factors,
    "low_memory": st.booleans(),
}
ABSURD = {
    "temperature": st.sampled_from([0.0, -1.0, 2, 1e-30, 1e30]),
    "top_k": st.sampled_from([-1, 0, 2.5, 1000]),
    "top_p": st.sampled_from([-0.1, 0.0, 1.5]),
    "min_p": st.sampled_from([-0.1, 2.0]),
    "typical_p": st.sampled_from([0.0, 2.0]),
    "top_h": st.sampled_from([0.0, 2.0]),
    "repetition_penalty": st.sampled_from([0.0, -1.0, 2]),
    "no_repeat_ngram_size": st.sampled_from([-1, 100, 1.5]),
    "encoder_no_repeat_ngram_size": st.just(100),
    "bad_words_ids": st.sampled_from([[], [[]], [[1000]], [[-1]], 5]),
    "sequence_bias": st.sampled_from([{}, {(1000,): 1.0}, {5: 1.0}]),
    "suppress_tokens": st.sampled_from([[], [1000], [-1], list(range(VOCAB))]),
    "begin_suppress_tokens": st.sampled_from([[], list(range(VOCAB))]),
    "forced_bos_token_id": st.just(1000),
    "forced_eos_token_id": st.sampled_from([1000, -1, []]),
    "exponential_decay_length_penalty": st.sampled_from([(-3, 2.0), (2, 0.0), 3]),
    "min_new_tokens": st.sampled_from([-1, 100]),
    "min_length": st.sampled_from([-1, 100]),
    "max_new_tokens": st.sampled_from([0, -1, 1.5, "4"]),
    "max_length": st.sampled_from([-1, 0, 1]),
    "num_return_sequences": st.sampled_from([0, -1]),
    "max_time": st.just(-1.0),
    "eos_token_id": st.sampled_from([-1, 1000, []]),
    "prefill_chunk_size": st.sampled_from([0, -1, 1000]),
    "prefix_allowed_tokens_fn": st.just(allows_nothing_later),
    "logits_processor": st.just([nothing_is_left]),
    "input_ids": st.sampled_from([-5, 1000]),  # in one place
    "attention_mask": st.sampled_from(["float", "bool", "too narrow", "empty row"]),
    "num_beams": st.sampled_from([0, -1]),
    "watermarking_config": st.just(WatermarkingConfig(greenlist_ratio=2.0)),
    "nonsense": st.just(3),
}
REFUSED = {
    "num_beams": st.just(2),
    "guidance_scale": st.just(1.5),
    "penalty_alpha": st.just(0.6),
    "dola_layers": st.just("low"),
    "token_healing": st.just(True),
    "output_attentions": st.just(True),
    "output_hidden_states": st.just(True),
    "cache_implementation": st.sampled_from(["offloaded", "sliding_window", "quantized"]),
    "synced_gpus": st.just(True),
    "inputs_embeds": st.just(torch.zeros(2, 3, 32, dtype=torch.float64)),
    "stop_strings": st.just("a"),
    "num_assistant_tokens": st.sampled_from([-1, 2.5, True, "3"]),
    "acceptance": st.sampled_from(["nonsense", None]),
    "seed": st.sampled_from([1.5, [1, 2, 3, 4, 5, 6, 7]]),
    "assistant_model": st.sampled_from(["someone/model", 3]),
}
OURS = {"num_assistant_tokens", "acceptance", "seed", "assistant_model", "prompt_lookup_num_tokens"} | {
    "max_matching_ngram_size"
}
ENDINGS = st.sampled_from(["max_new_tokens"] * 5 + ["neither"])


@dataclass
class Case:
    target: str
    prompts: list[list[int]] | None
    mask: list[list[int]] | None
    arguments: dict
    drafter: str
    ours: dict = field(default_factory=dict)
    as_config: bool = False
    positional: bool = False
    ids_dtype: str = "int64"
    absurd: str | None = None
    refused: str | None = None

    @property
    def expanded_batch_size(self) -> int:
        copies = self.arguments.get("num_return_sequences")
        return (1 if self.prompts is None else len(self.prompts)) * max(1, copies or 1)

    @property
    def prompt_width(self) -> int:
        return 1 if self.prompts is None else len(self.prompts[0])

    @property
    def may_be_refused(self) -> bool:
        if self.refused is not None or self.absurd in ("attention_mask", "max_new_tokens", "prefill_chunk_size"):
            return True
        if self.mask is None:  # generate() takes pad tokens for padding, wherever they stand
            pad = self.arguments.get("pad_token_id", PAD)
            return any(pad in prompt for prompt in self.prompts or [[BOS]])
        return self.target == "gemma3" and any(0 in row[row.index(1) :] for row in self.mask)

    @property
    def works_only_here(self) -> bool:
        """Prompts are always read with a cache."""
        return self.arguments.get("use_cache") is False and "prefill_chunk_size" in self.arguments

    @property
    def is_other_text(self) -> bool:
        return bool(self.arguments.get("do_sample")) and self.ours.get("acceptance", "match") != "match"

    def call_arguments(self) -> dict:
        """For one call, of plain generate() or ours: nothing in it has been used before."""
        arguments = dict(self.arguments)
        if "streamer" in arguments:
            arguments["streamer"] = arguments["streamer"]()
        if self.as_config:
            fields = vars(GenerationConfig())
            own = {name: arguments.pop(name) for name in list(arguments) if name in fields}
            arguments["generation_config"] = GenerationConfig(**own)
        if self.prompts is not None:
            name = "inputs" if self.positional else "input_ids"
            arguments[name] = torch.tensor(self.prompts, dtype=getattr(torch, self.ids_dtype))
        if self.mask is not None:
            mask = torch.tensor(self.mask)
            kind = self.arguments.get("attention_mask")
            if kind == "too narrow":
                mask = mask[:, :-1]
            elif kind == "empty row":
                mask[0] = 0
            elif kind is not None:
                mask = mask.to(getattr(torch, kind))
            arguments["attention_mask"] = mask
        else:
            arguments.pop("attention_mask", None)
        return arguments


@st.composite
def batches(draw) -> tuple[list[list[int]] | None, list[list[int]] | None]:
    """Prompts of one width, and their mask: left-padded, now and then with holes, or none."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["padded"] * 6 + ["full", "holes", "no mask", "no mask, pad tokens", "no prompt"]))
    if kind == "no prompt":
        return None, None
    prompts = draw(
        st.lists(st.lists(st.integers(2, VOCAB - 1), min_size=width, max_size=width), min_size=rows, max_size=rows)
    )
    mask = [[1] * width for _ in prompts]
    if kind in ("padded", "holes", "no mask, pad tokens"):
        for row in range(rows):
            for column in range(draw(st.integers(0, width - 1))):
                prompts[row][column], mask[row][column] = PAD, 0
            if kind == "holes" and width > 2 and draw(st.booleans()):
                mask[row][draw(st.integers(1, width - 2))] = 0
    return prompts, None if "no mask" in kind else mask


@st.composite
def cases(draw) -> Case:
    prompts, mask = draw(batches())
    arguments = {}
    if draw(ENDINGS) == "max_new_tokens":
        arguments["max_new_tokens"] = draw(st.integers(1, 14))
    sampled = draw(st.booleans())
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True))
    for name in names:
        arguments[name] = draw(OPTIONS[name])
    if sampled or (draw(st.booleans()) and SAMPLERS.keys() & arguments.keys()):
        arguments["do_sample"] = True
    if "num_return_sequences" in arguments and draw(st.integers(0, 9)):
        arguments["do_sample"] = True
    if {"output_scores", "output_logits"} & arguments.keys():
        arguments["return_dict_in_generate"] = True
    if "max_length" in arguments:
        arguments.pop("max_new_tokens", None)
    if "stop_strings" in arguments:
        arguments["tokenizer"] = tokenizer()
    if "exponential_decay_length_penalty" in arguments:
        arguments.setdefault("eos_token_id", draw(tokens))

    drafter = draw(st.sampled_from(DRAFTERS))
    k = draw(st.integers(0, 9) | st.none())
    if drafter == "prompt lookup":
        ours = {"prompt_lookup_num_tokens": 3 if k is None else k, "max_matching_ngram_size": draw(st.integers(1, 3))}
    else:
        ours = {"num_assistant_tokens": 0 if drafter == "nothing" else k}
        if drafter == "network" and draw(st.booleans()):
            ours["prompt_lookup_num_tokens"] = draw(st.sampled_from([0, 2, 6]))
    ours["acceptance"] = draw(st.sampled_from(["match"] * 6 + ["coupled", "rejection"]))
    if ours["acceptance"] == "coupled":
        ours["seed"] = draw(st.integers(-(2**70), 2**70))

    case = Case(draw(st.sampled_from(TARGETS)), prompts, mask, arguments, drafter, ours)
    case.as_config = draw(st.integers(0, 5)) == 5
    case.positional = draw(st.integers(0, 5)) == 5
    case.ids_dtype = "int64" if draw(st.integers(0, 9)) else "int32"
    strange = draw(st.integers(0, 19))
    if strange < 2:
        case.absurd = draw(st.sampled_from(sorted(ABSURD)))
        value = draw(ABSURD[case.absurd])
        if case.absurd == "input_ids":
            if prompts is not None:
                prompts[0][-1] = value
        else:
            arguments[case.absurd] = value
    elif strange < 4:
        case.refused = draw(st.sampled_from(sorted(REFUSED)))
        (ours if case.refused in OURS else arguments)[case.refused] = draw(REFUSED[case.refused])
    return case


# ---- the property


def run_ours(case: Case, plain: Outcome) -> Outcome:
    target = target_named(case.target)
    assistant = None
    if case.drafter == "network":
        assistant = network_for(case.target)
    elif case.drafter == "causal LM":
        assistant = causal_lm()
    elif case.drafter in ORACLES:
        if plain.error is None:
            answer = torch.tensor(plain.sequences)
        else:
            answer = torch.arange(case.expanded_batch_size * 20).view(-1, 20) * 7 % VOCAB
        eos = case.arguments.get("eos_token_id")
        assistant = Informed(answer, case.prompt_width, case.drafter, eos if isinstance(eos, int) else 0)
    arguments = {"assistant_model": assistant, **case.call_arguments(), **case.ours}
    return observe(functools.partial(generate, target), arguments)


def outcome_of(case: Case) -> str:
    """Run a case both ways.

    Raises:
        AssertionError: what came of it is not allowed.
    """
    try:
        arguments = case.call_arguments()
    except ValueError:
        return "no such config"
    plain = observe(target_named(case.target).generate, arguments)
    ours = run_ours(case, plain)
    if ours.error is not None and plain.error is not None:
        meant = same_error(ours.error, plain.error) or any(is_raised_on_purpose(ours.error, us) for us in (True, False))
        assert meant, f"{ours.error!r}; in plain generate() {plain.error!r}"
        return "both raised"
    if ours.error is not None:
        assert is_own_refusal(ours.error), f"works in plain generate(); here {ours.error!r}"
        assert case.may_be_refused, f"refused for no reason: {ours.error!r}"
        return "refused"
    if case.is_other_text:
        check_that_it_ends_well(case, ours)
        if "seed" in case.ours:
            undrafted = {"num_assistant_tokens": 0, "acceptance": "coupled", "seed": case.ours["seed"]}
            again = run_ours(dataclasses.replace(case, drafter="nothing", ours=undrafted), plain)
            assert again.sequences == ours.sequences, "the text depends on the drafts"
        return "another text"
    if plain.error is not None:
        assert case.works_only_here, f"plain generate() raises {plain.error!r}, and ours does not"
        return "works only here"
    assert not (names := ours.differences(plain)), f"not as in plain generate(): {', '.join(names)}"
    return "equal"


def check_that_it_ends_well(case: Case, result: Outcome) -> None:
    """Prompts first, tokens of the vocabulary, not too many, padding behind the end of a row."""
    sequences, width = torch.tensor(result.sequences), case.prompt_width
    assert len(sequences) == case.expanded_batch_size
    if case.prompts is not None:
        copies = len(sequences) // len(case.prompts)
        assert sequences[:, :width].tolist() == [prompt for prompt in case.prompts for _ in range(copies)]
    new = sequences[:, width:]
    pad = case.arguments.get("pad_token_id", PAD)
    assert ((new >= 0) & (new < VOCAB) | (new == pad)).all()
    limit = case.arguments.get("max_new_tokens", case.arguments.get("max_length", 20 + width) - width)
    if not {"max_length", "stopping_criteria"} & case.arguments.keys():
        assert 1 <= new.shape[1] <= limit
    eos = case.arguments.get("eos_token_id")
    if eos is None or "stopping_criteria" in case.arguments:
        return
    eos = [eos] if isinstance(eos, int) else eos
    pad = eos[0] if pad is None else pad
    for row in new.tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in eos), len(row))
        assert row[end:] == [pad] * (len(row) - end)
        if "max_time" not in case.arguments:
            assert end == len(row) or any(len(other) >= end for other in new.tolist())


def check_cases(number: int, part: int, **options) -> Counter:
    """Check this many random cases, always the same for one `part`; returns how often each outcome came."""
    outcomes: Counter = Counter()

    @seed(part)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        **options,
    )
    @given(cases())
    def holds(case: Case):
        outcome = outcome_of(case)
        event(outcome)
        outcomes[outcome] += 1

    holds()
    return outcomes


def assert_mostly_equal(outcomes: Counter) -> None:
    total = sum(outcomes.values())
    assert outcomes["equal"] > 0.6 * total, outcomes
    assert outcomes["refused"] + outcomes["both raised"] > 0.02 * total, outcomes


def test_random_cases():
    assert_mostly_equal(check_cases(100, part=0))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 9))
def test_many_random_cases(part: int):
    assert_mostly_equal(check_cases(500, part))


# ---- the property is able to fail


def use_noise_of_another_row(monkeypatch) -> None:
    gather = StepNoise.gather
    monkeypatch.setattr(
        StepNoise,
        "gather",
        lambda self, rows, *rest: gather(self, [(row + 1) % self.batch_size for row in rows], *rest),
    )


def hide_the_drafts_from_processors(monkeypatch) -> None:
    """As if a penalty did not read the text."""
    write = Text.write_ahead
    monkeypatch.setattr(
        Text, "write_ahead", lambda self, places, ahead, drafts: write(self, places, ahead, torch.zeros_like(drafts))
    )


@pytest.mark.one_version
@pytest.mark.parametrize("plant", [use_noise_of_another_row, hide_the_drafts_from_processors])
def test_planted_fault_is_found(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_cases(1000, part=0, phases=[Phase.generate])  # up to the first; "auto" drafts as the clock says


# ---- cases that once failed

ROWS = dict(prompts=[[11, 12, 13, 14], [PAD, 22, 23, 24]], mask=[[1, 1, 1, 1], [0, 1, 1, 1]])
FOUND = {
    "a length criterion comes instead of max_new_tokens": Case(
        "llama", **ROWS, arguments=dict(max_new_tokens=3, stopping_criteria=[MaxLengthCriteria(14)]), drafter="always"
    ),
    "a stop string criterion comes instead of stop_strings": Case(
        "llama",
        **ROWS,
        arguments=dict(
            max_new_tokens=9,
            eos_token_id=9,
            tokenizer=tokenizer(),
            stop_strings=list(LETTERS[::2]),
            stopping_criteria=[StopStringCriteria(tokenizer(), list(LETTERS[1::4]))],
        ),
        drafter="always",
    ),
    "int32 tokens": Case("llama", **ROWS, arguments=dict(max_new_tokens=5), drafter="always", ids_dtype="int32"),
    "a mask of ones for fewer columns": Case(
        "llama",
        prompts=[[11, 12, 13, 14]],
        mask=[[1, 1, 1, 1]],
        arguments=dict(max_new_tokens=5, attention_mask="too narrow"),
        drafter="always",
        absurd="attention_mask",
    ),
    "a prefix function that knows no text behind a stop": Case(
        "llama",
        prompts=[[11, 12, 13, 14]],
        mask=[[1, 1, 1, 1]],
        arguments=dict(
            max_new_tokens=9,
            stopping_criteria=[rows_stop_at_lengths],
            prefix_allowed_tokens_fn=allows_nothing_from_six_on,
        ),
        drafter="always",
    ),
    "half a token": Case(
        "llama", **ROWS, arguments=dict(max_new_tokens=2.5), drafter="always", absurd="max_new_tokens"
    ),
    "chunks of no tokens": Case(
        "llama", **ROWS, arguments=dict(max_new_tokens=5, prefill_chunk_size=0), drafter="always"
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_case_that_once_failed(name: str):
    outcome_of(FOUND[name])


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_wrong_prefill_chunk_size(size):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(target_named("llama"), None, torch.tensor([[1, 2]]), num_assistant_tokens=0, prefill_chunk_size=size)
