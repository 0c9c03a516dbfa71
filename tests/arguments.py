"""Every argument of generate(): values to try, and what comes of them beside plain generate().

`python tests/arguments.py` writes docs/arguments.md from really running them. An argument that a new transformers
brings goes into `trials`: a value that changes plain generate()'s result if there is one, and what it needs along.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import re
import string
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from exactness import Recorder
from oracles import Oracle
from tiny import VOCAB, llama, ragged_batch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerFast,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation.backend_versions import CACHE_NAMES
from specformer.generation.target_refusals import refuse

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "arguments.md"
GENERATION = Path(inspect.getfile(refuse)).parent
NEW_TOKENS = 12
LONGEST_REASON = 150

INTRODUCTION = """\
# Arguments of generate()

Each row was run on a tiny target, through plain `generate()` and through speculation. `python tests/arguments.py`
writes this page, and the tests fail where it is not true.

- **works**: it changes what plain `generate()` returns, and speculation returns the same: tokens, streamer calls,
  scores, final state of torch's generator. Arguments about drafting change what is drafted, and not the text.
- **no effect**: accepted, and nothing changes. Nor does it in plain `generate()`, arguments about drafting aside.
- **refused**: a `ValueError` before the first token, with this reason."""


# ---- what the trials use


@functools.cache
def target():
    return llama(eos_token_id=None)


@functools.cache
def network() -> SpecFormerModel:
    torch.manual_seed(1)
    return SpecFormerModel(SpecFormerConfig.from_target_config(target().config)).eval()


def batch() -> dict[str, torch.Tensor]:
    return ragged_batch(padding=(0, 3, 5))


LETTERS = string.ascii_letters + string.digits + "+-"
"""One for each token."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({letter: token for token, letter in enumerate(LETTERS)}, unk_token=LETTERS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@functools.cache
def greedy_text() -> torch.Tensor:
    return target().generate(**batch(), max_new_tokens=NEW_TOKENS)[:, batch()["input_ids"].shape[1] :]


def some_token(row: int = 0, step: int = 4) -> int:
    """A token of the greedy text."""
    return int(greedy_text()[row, step])


def even_tokens_at_even_lengths(row: int, input_ids: torch.Tensor) -> list[int]:
    return list(range(len(input_ids) % 2, VOCAB, 2))


CYCLE = [7, 8, 11, 9, 8, 12]
"""What follows the 8 can be told from two tokens, not from one."""


def next_in_the_cycle(row: int, input_ids: torch.Tensor) -> list[int]:
    return [CYCLE[len(input_ids) % len(CYCLE)]]


def last_token_is_unlikely(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores - 3.0 * torch.nn.functional.one_hot(input_ids[:, -1].long(), scores.shape[-1])


def after_some_token(input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
    return input_ids[:, -1] == some_token()


@functools.cache
def strategy_folder() -> str:
    """A repository with a generation strategy of its own."""
    folder = Path(tempfile.mkdtemp(prefix="strategy-"))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs):\n    return 'a strategy'\n")
    return str(folder)


class Labelled:
    """A value that the page calls something else than its repr."""

    def __init__(self, label: str, value):
        self.label, self.value = label, value


def label_of(value) -> str:
    if isinstance(value, Labelled):
        return value.label
    if value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)):
        return f"`{value!r}`"
    return f"a {type(value).__name__}"


def value_of(value):
    return value.value() if isinstance(value, Labelled) else value


@dataclass
class Trial:
    """
    Attributes:
        values: what to pass.
        along: what to pass besides, with and without the argument.
        unset: what of the usual arguments to leave out.
        drafting: whether it concerns drafting: it is then passed to ours alone, and judged by what is drafted.
        drafter: what drafts, "network", or "none" where that is up to the argument.
    """

    values: list
    along: dict = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    drafting: bool = False
    drafter: str = "network"


SAMPLING = dict(do_sample=True)
DICTIONARY = dict(return_dict_in_generate=True)


@functools.cache
def trials() -> dict[str, Trial]:
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    beams = dict(num_beams=2)
    about_drafting = functools.partial(Trial, drafting=True, along=dict(num_assistant_tokens=2))
    return {
        # parameters of generate()
        "inputs": Trial(
            [Labelled("token ids", lambda: ids[:2]), Labelled("a list", lambda: [[7, 8], [9, 10]])],
            unset=("input_ids", "attention_mask"),
        ),
        "generation_config": Trial([GenerationConfig(max_new_tokens=5, repetition_penalty=1.5)]),
        "logits_processor": Trial([Labelled("a function", lambda: [last_token_is_unlikely])]),
        "stopping_criteria": Trial(
            [Labelled("a function", lambda: [after_some_token])], along=dict(eos_token_id=some_token(1))
        ),
        "prefix_allowed_tokens_fn": Trial([Labelled("a function", lambda: even_tokens_at_even_lengths)]),
        "synced_gpus": Trial([False, True]),
        "assistant_model": Trial(
            [
                Labelled("a SpecFormer drafter", network),
                Labelled("a causal LM", lambda: llama(seed=1, num_hidden_layers=2)),
                Labelled("a causal LM of another vocabulary", lambda: llama(seed=1, vocab_size=80)),
                Labelled("a name", lambda: "someone/model"),
            ],
            along=dict(num_assistant_tokens=3),
            drafting=True,
            drafter="none",
        ),
        "streamer": Trial([Labelled("a streamer", Recorder)]),
        "negative_prompt_ids": Trial([Labelled("token ids", lambda: ids)]),
        "negative_prompt_attention_mask": Trial([Labelled("a mask", lambda: mask)]),
        "custom_generate": Trial(
            [Labelled("this repository", lambda: str(ROOT)), Labelled("another one", strategy_folder)],
            along=dict(trust_remote_code=True),
            drafting=True,
        ),
        # what generate() takes as keywords beside its parameters
        "input_ids": Trial([Labelled("token ids", lambda: ids + 1)]),
        "attention_mask": Trial(
            [
                Labelled("padding on the left", lambda: torch.cat([mask[1:], mask[:1]])),
                Labelled("padding between tokens", lambda: mask.index_fill(1, torch.tensor(6), 0)),
                Labelled("padding on the right", lambda: mask.flip(1)),
            ]
        ),
        "position_ids": Trial(
            [Labelled("each row's from 0", lambda: positions), Labelled("others", lambda: 2 * positions)]
        ),
        **{name: Trial([Labelled("a cache", lambda: DynamicCache(config=target().config))]) for name in CACHE_NAMES},
        "inputs_embeds": Trial([Labelled("embeddings", lambda: torch.zeros(3, 9, 32, dtype=torch.float64))]),
        "logits_to_keep": Trial([3]),
        "tokenizer": Trial([Labelled("a tokenizer", tokenizer)]),
        "assistant_tokenizer": Trial(
            [Labelled("a tokenizer", tokenizer)],
            along=dict(tokenizer=tokenizer(), num_assistant_tokens=2),
            drafting=True,
        ),
        # length
        "max_length": Trial([14], unset=("max_new_tokens",)),
        "max_new_tokens": Trial([5], unset=("max_new_tokens",)),
        "min_length": Trial([18], along=dict(eos_token_id=some_token())),
        "min_new_tokens": Trial([9], along=dict(eos_token_id=some_token())),
        "early_stopping": Trial([True]),
        "max_time": Trial([0.0]),
        "stop_strings": Trial(
            [
                Labelled("a string", lambda: "".join(LETTERS[some_token(0, step)] for step in (3, 4))),
                Labelled("two of them", lambda: [LETTERS[some_token(1)], LETTERS[some_token(2)]]),
            ],
            along=dict(tokenizer=tokenizer(), eos_token_id=9),
        ),
        # strategy
        "do_sample": Trial([True]),
        "num_beams": Trial([2]),
        "use_mtp": Trial([True]),
        "penalty_alpha": Trial([0.6], along=dict(top_k=4)),
        "dola_layers": Trial(["low"]),
        "diversity_penalty": Trial([0.5]),
        "num_beam_groups": Trial([2], along=beams),
        "constraints": Trial([Labelled("a list", lambda: [7])]),
        "force_words_ids": Trial([[[7, 8]]]),
        # cache
        "use_cache": Trial([False]),
        "cache_implementation": Trial(
            ["dynamic", "static", "hybrid", "sliding_window", "offloaded", "offloaded_static", "quantized", "paged"]
        ),
        "cache_config": Trial([{"nbits": 4}]),
        "max_cache_len": Trial([64]),
        "prefill_chunk_size": Trial([4]),
        "low_memory": Trial([True]),
        "compile_config": Trial([CompileConfig()]),
        "disable_compile": Trial([True]),
        "continuous_batching_config": Trial([Labelled("a dictionary", dict)]),
        # scores
        "temperature": Trial([0.3], along=SAMPLING),
        "top_k": Trial([2], along=SAMPLING),
        "top_p": Trial([0.4], along=SAMPLING),
        "min_p": Trial([0.4], along=SAMPLING),
        "top_h": Trial([0.4], along=SAMPLING),
        "typical_p": Trial([0.3], along=SAMPLING),
        "epsilon_cutoff": Trial([0.2], along=SAMPLING),
        "eta_cutoff": Trial([0.5], along=SAMPLING),
        "repetition_penalty": Trial([1.8]),
        "encoder_repetition_penalty": Trial([3.0]),
        "length_penalty": Trial([2.0]),
        "no_repeat_ngram_size": Trial([1]),
        "encoder_no_repeat_ngram_size": Trial([1]),
        "bad_words_ids": Trial([Labelled("token ids", lambda: [[some_token()], [some_token(1), some_token(1, 5)]])]),
        "renormalize_logits": Trial([True], along=dict(SAMPLING, **DICTIONARY, output_scores=True)),
        "forced_bos_token_id": Trial([9], along=dict(input_ids=ids[:, -1:], attention_mask=mask[:, -1:])),
        "forced_eos_token_id": Trial([9]),
        "remove_invalid_values": Trial(
            [True], along=dict(DICTIONARY, output_scores=True, bad_words_ids=[[some_token()]])
        ),
        "exponential_decay_length_penalty": Trial([(2, 3.0)], along=dict(eos_token_id=9)),
        "suppress_tokens": Trial([Labelled("token ids", lambda: [some_token(), some_token(1)])]),
        "begin_suppress_tokens": Trial([Labelled("token ids", lambda: [some_token(0, 0), some_token(1, 0)])]),
        "sequence_bias": Trial(
            [
                Labelled("a dictionary", lambda: {(9,): 4.0, (some_token(), some_token(0, 5)): -9.0}),
                Labelled("a list", lambda: [[[9], 4.0]]),
            ]
        ),
        "token_healing": Trial([True], along=dict(tokenizer=tokenizer())),
        "guidance_scale": Trial([2.0]),
        "watermarking_config": Trial(
            [
                WatermarkingConfig(bias=4.0),
                Labelled(
                    "a selfhash WatermarkingConfig",
                    lambda: WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2),
                ),
                SynthIDTextWatermarkingConfig(keys=[3, 4, 5], ngram_len=3),
            ],
            along=SAMPLING,
        ),
        # what is returned
        "num_return_sequences": Trial([2], along=SAMPLING),
        "output_attentions": Trial([True], along=DICTIONARY),
        "output_hidden_states": Trial([True], along=DICTIONARY),
        "output_scores": Trial([True], along=dict(DICTIONARY, repetition_penalty=1.5)),
        "output_logits": Trial([True], along=dict(DICTIONARY, repetition_penalty=1.5)),
        "return_dict_in_generate": Trial([True]),
        # tokens
        "pad_token_id": Trial([3], along=dict(eos_token_id=some_token())),
        "bos_token_id": Trial([9], unset=("input_ids", "attention_mask")),
        "eos_token_id": Trial([some_token(), [some_token(1), some_token(2)]]),
        "decoder_start_token_id": Trial([9]),
        # drafting
        "num_assistant_tokens": about_drafting([0, 3, 100, -1]),
        "prompt_lookup_num_tokens": Trial([3, 0, -1], drafting=True, drafter="none"),
        "max_matching_ngram_size": Trial(
            [1],
            along=dict(
                prompt_lookup_num_tokens=3,
                input_ids=torch.tensor([CYCLE + CYCLE]),
                attention_mask=torch.ones(1, 2 * len(CYCLE), dtype=torch.long),
                prefix_allowed_tokens_fn=next_in_the_cycle,
            ),
            drafting=True,
            drafter="none",
        ),
        "num_assistant_tokens_schedule": about_drafting(["heuristic", "constant"]),
        "assistant_confidence_threshold": about_drafting([0.9]),
        "assistant_lookbehind": about_drafting([3]),
        "target_lookbehind": about_drafting([3]),
        "assistant_ensemble_weight": about_drafting([0.5]),
        "assistant_early_exit": about_drafting([2]),
        "speculation_type": about_drafting(["dflash"]),
        "is_assistant": Trial(
            [True], along=dict(DICTIONARY, output_scores=True, input_ids=ids[:1], attention_mask=mask[:1])
        ),
        "transformers_version": Trial(["5.0.0"]),
    }


def installed_arguments() -> list[str]:
    """Parameters of the installed generate() and fields of its GenerationConfig."""
    parameters = [
        name for name in inspect.signature(GenerationMixin.generate).parameters if name not in ("self", "kwargs")
    ]
    return parameters + [name for name in vars(GenerationConfig()) if not name.startswith("_")]


# ---- running them


@dataclass
class Outcome:
    """What one call came to: an error, or what the caller gets and what it leaves behind."""

    error: Exception | None = None
    sequences: list | None = None
    keys: list[str] = field(default_factory=list)
    streamed: list | None = None
    generator_state: bytes = b""
    steps: dict[str, list] = field(default_factory=dict)
    drafted: tuple | None = None

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not equal; scores and logits may differ by rounding."""
        names = [
            n for n in ("sequences", "keys", "streamed", "generator_state") if getattr(self, n) != getattr(other, n)
        ]
        for name in self.steps.keys() & other.steps.keys():
            ours, theirs = self.steps[name], other.steps[name]
            if len(ours) != len(theirs) or not all(
                a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
                for a, b in zip(ours, theirs, strict=True)
            ):
                names.append(name)
        return names


def observe(call: Callable, arguments: dict) -> Outcome:
    """Call with these arguments, whose values are made anew."""
    arguments = {name: value_of(value) for name, value in arguments.items()}
    torch.manual_seed(3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = call(**arguments)
    except Exception as error:
        return Outcome(error)
    state = torch.get_rng_state().numpy().tobytes()
    streamed = getattr(arguments.get("streamer"), "calls", None)
    if not hasattr(output, "keys"):
        return Outcome(None, getattr(output, "tolist", lambda: output)(), [], streamed, state)
    statistics = getattr(output, "statistics", None)
    return Outcome(
        None,
        output.sequences.tolist(),
        sorted(output.keys() - {"statistics", *CACHE_NAMES}),
        streamed,
        state,
        {name: output[name] for name in ("scores", "logits") if name in output},
        statistics and (statistics.rounds, statistics.drafted_per_slot, statistics.accepted_per_slot),
    )


def is_raised_on_purpose(error: Exception, by_us: bool) -> bool:
    """Whether it comes from a `raise` in a file of this project, or else of transformers."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    path = Path(traceback.tb_frame.f_code.co_filename)
    if not linecache.getline(str(path), traceback.tb_lineno).strip().startswith("raise"):
        return False
    if by_us:
        return path.parent == GENERATION or path.name.endswith("_specformer.py")
    return "transformers" in path.parts


def is_own_refusal(error: Exception) -> bool:
    return isinstance(error, ValueError) and is_raised_on_purpose(error, by_us=True)


def same_error(error: Exception, other: Exception | None) -> bool:
    return type(error) is type(other) and str(error) == str(other)


class Spy:
    """A logits processor that counts its calls: none means that no token was chosen."""

    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores


def speculate(drafter, name: str) -> Callable:
    if name == "custom_generate":  # of this repository, it is how one calls it
        return lambda custom_generate=None, **arguments: (
            generate(target(), drafter, custom_generate=custom_generate, **arguments)
            if custom_generate == strategy_folder()
            else target().generate(assistant_model=drafter, custom_generate=custom_generate or str(ROOT), **arguments)
        )
    return lambda assistant_model=None, **arguments: generate(target(), assistant_model or drafter, **arguments)


def run(name: str, trial: Trial, value) -> tuple[str, str]:
    """The verdict, "works", "no effect", "refused" or that both fail, and the reason if there is one.

    Raises:
        AssertionError: it is none of them, but a bug.
    """
    usual = {**batch(), "max_new_tokens": NEW_TOKENS} | (dict(DICTIONARY) if trial.drafting else {})
    without = {key: usual[key] for key in usual if key not in trial.unset} | trial.along
    given = without | {name: value}
    here = f"{name}={label_of(value)}"

    # The network first: what is refused is refused whatever drafts, and plain generate() need not be able to do it.
    drafter = None if trial.drafter == "none" else network()
    ours = observe(speculate(drafter, name), given)
    if ours.error is not None and is_own_refusal(ours.error):
        spy = Spy()
        again = observe(speculate(drafter, name), given | {"logits_processor": [spy]})
        assert same_error(again.error, ours.error) and not spy.calls, f"{here} is refused after the first token"
        said = {"inputs": "input_ids", "assistant_model": "assistant"}.get(name, name)
        assert said in str(ours.error), f"the refusal of {here} does not name it: {ours.error}"
        return "refused", str(ours.error)

    known_to_plain = {key: item for key, item in without.items() if key != "prompt_lookup_num_tokens"}
    plain = observe(target().generate, known_to_plain if trial.drafting else given)
    if ours.error is not None:
        assert same_error(ours.error, plain.error), f"{here}: {ours.error!r}; in plain generate() {plain.error!r}"
        return "fails as in plain `generate()`", f"{type(ours.error).__name__}: {ours.error}"
    assert plain.error is None, f"{here} works, where plain generate() raises {plain.error!r}"
    assert not (names := ours.differences(plain)), f"{here}: not as in plain generate(): {', '.join(names)}"
    if trial.drafting:
        before = observe(speculate(drafter, name), without)
        by_itself = before.error is not None or name == "custom_generate"  # there is no drafting without it
        has_effect = sum(ours.drafted[1]) > 0 if by_itself else ours.drafted != before.drafted
    else:
        prompt = value_of(given.get("input_ids", given.get("inputs")))
        oracle = Oracle(torch.tensor(plain.sequences), 1 if prompt is None else prompt.shape[1], "sometimes")
        informed = observe(speculate(oracle, name), given | {"num_assistant_tokens": 3})
        assert not (names := informed.differences(plain)), f"{here}: not as in plain generate(): {', '.join(names)}"
        baseline = observe(target().generate, without)
        has_effect = baseline.error is not None or bool(plain.differences(baseline))
    return ("works" if has_effect else "no effect"), ""


@functools.cache
def rows(name: str) -> tuple[str, ...]:
    """The table's rows about one argument: one for each of its outcomes."""
    outcomes: dict[str, list[str]] = {}
    for value in trials()[name].values:
        verdict, reason = run(name, trials()[name], value)
        if isinstance(value, str):
            reason = reason.replace(repr(value), "...")  # so that several values share a row
        outcomes.setdefault(f"{verdict}: {shortened(reason)}" if reason else verdict, []).append(label_of(value))
    return tuple(
        f"| `{name}` | {', '.join(labels)} | {outcome} |".replace("\n", " ") for outcome, labels in outcomes.items()
    )


def shortened(reason: str) -> str:
    """The first sentences of a reason, as many as fit; names of files and classes stay whole."""
    text = reason.replace("|", "\\|").replace("`", "")
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > LONGEST_REASON:
            break
        kept += f" {sentence}"
    return kept


def page(names: list[str]) -> str:
    version = f"Made with transformers {transformers.__version__}."
    head = "| argument | tried | outcome |\n|---|---|---|"
    return "\n".join([INTRODUCTION, "", version, "", head, *(row for name in names for row in rows(name))]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(list(trials())))
