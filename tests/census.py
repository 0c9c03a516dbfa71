"""Which causal LM classes of transformers decode exactly as plain generate() does, with which drafter, and which
classes that also read images do so with text alone.

    python tests/census.py --output docs/compatibility.md --result benchmarks/results/compatibility.json

runs every class and writes both files; with --only it runs some, and keeps what the file says of the others. A target
is tiny and random (`shrunken`), and is tried with one row and with a ragged batch, greedily and sampling, on texts that
go past all of its windows, chunks and thresholds.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import hybrids
import torch
import transformers
from exactness import Recorder, Reference, plain
from shrunken import STDS, class_names, image_text_names, make_target, model_types
from tiny import EOS, PAD, VOCAB
from transformers import PreTrainedModel

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation import prompt_groups
from specformer.generation.target_refusals import UnsupportedTargetError
from specformer.scripts.parts.kinds.specformer import drafts_of_text
from specformer.scripts.parts.losses import drafter_loss
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULT = ROOT / "docs" / "compatibility.md", ROOT / "benchmarks" / "results" / "compatibility.json"

LENGTHS = (30, 9, 18, 3)
NEW_TOKENS = 24
BATCHES = {"one long row": LENGTHS[:1], "one short row": LENGTHS[1:2], "a ragged batch": LENGTHS}
DECODING = {"greedy": {}, "sampling": dict(do_sample=True, temperature=1.3, top_k=20, top_p=0.95)}
DRAFTED = 4
SEED = 3
SEEDS_OF_A_TARGET = 3
LEAST_GAP = 1e-4
"""Between the two best logits of each step: rounding does not decide which token is taken."""
NOISE = 0.07
"""In the weights of the assistant, by their own standard deviation: some of its drafts are wrong, and some right."""

EXACT, ONE_ROW, REFUSED, NOT_BUILT, DIFFERENT, FAILED = (
    "exact",
    "exact for one row",
    "refused",
    "not built",
    "different",
    "failed",
)
WRONG = (DIFFERENT, FAILED)
COLUMNS = {
    "copies": "copies",
    "assistant": "assistant",
    "config": "SpecFormer: config",
    "training": "SpecFormer: a training step",
    "specformer": "SpecFormer: decoding",
}
"""What is tried of a class, and how the page calls it."""


@dataclass
class Outcome:
    """What came of a trial: its kind, and the sentence of a refusal, or what went wrong."""

    kind: str
    why: str = ""


@dataclass
class Case:
    """A target, and what plain generate() writes with it.

    Attributes:
        trivial: what is wrong with its texts, if they could not show an error.
        padding_matters: whether plain generate() writes something else with more or less padding in front.
        references: by batch and way of decoding.
    """

    target: PreTrainedModel
    trivial: str = ""
    padding_matters: bool = False
    references: dict[tuple[str, str], Reference] = field(default_factory=dict)

    @property
    def flaws(self) -> tuple[bool, bool]:
        return bool(self.trivial), self.padding_matters

    def reference(self, name: str, way: str) -> Reference:
        if (name, way) not in self.references:
            arguments = dict(DECODING[way], max_new_tokens=NEW_TOKENS)
            self.references[name, way] = plain(self.target, prompts(BATCHES[name]), SEED, **arguments)
        return self.references[name, way]


class NotBuilt(Exception):
    """No tiny model of this class writes a text with plain generate()."""


# ---- targets


def prompts(lengths: tuple[int, ...], more_padding: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded prompts of these lengths, the same ones whatever is added to their padding."""
    width, generator = max(lengths) + more_padding, torch.Generator().manual_seed(1)
    input_ids = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        input_ids[row, width - length :] = torch.randint(EOS + 1, VOCAB, (length,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


def plain_texts(target: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[list[list[int]], float]:
    """What plain generate() adds to each row, and the smallest gap between two best logits."""
    output = target.generate(**batch, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True)
    logits = torch.stack(output.logits)
    if logits.isnan().any():
        raise ArithmeticError("its logits are NaN")
    best = logits.topk(2).values
    return output.sequences[:, batch["input_ids"].shape[1] :].tolist(), float((best[..., 0] - best[..., 1]).min())


def padding_matters(target: PreTrainedModel, texts: list[list[int]]) -> bool:
    """Whether plain generate() writes something else than `texts` where the ragged batch has more padding, or none."""
    if plain_texts(target, prompts(LENGTHS, more_padding=3))[0] != texts:
        return True
    batch = prompts(LENGTHS)
    for row, length in enumerate(LENGTHS):
        alone = {name: values[row : row + 1, -length:] for name, values in batch.items()}
        if plain_texts(target, alone)[0] != texts[row : row + 1]:
            return True
    return False


def triviality(texts: list[list[int]], gap: float) -> str:
    """Why these texts could not show an error; nothing if they vary, differ from row to row, and have no near ties."""
    distinct = [len(set(text)) for text in texts]
    if sum(distinct) < 4 * len(texts) or len({tuple(text) for text in texts}) < len(texts):
        return "its tiny random models repeat a few tokens for ever"
    return "" if gap >= LEAST_GAP else "two tokens are almost tied in all of its tiny random models"


def find_case(class_name: str) -> Case:
    """The first tiny target whose plain texts are worth comparing and do not depend on padding, in float64 if that
    works and else in float32; if there is none, the one that comes nearest.

    Raises:
        NotBuilt: plain generate() writes no text at all.
    """
    reason, best = None, None
    for dtype in (torch.float64, torch.float32):
        for std, seed in product(STDS, range(SEEDS_OF_A_TARGET)):
            try:
                target = make_target(class_name, dtype, seed, std)
                texts, gap = plain_texts(target, prompts(LENGTHS))
                case = Case(target, triviality(texts, gap))
                case.padding_matters = not case.trivial and padding_matters(target, texts)
            except Exception as error:
                reason = error
                break
            if best is None or case.flaws < best.flaws:
                best = case
            if not case.trivial:
                break
        if best is not None and not any(best.flaws):
            return best
    if best is None:
        raise NotBuilt(f"it writes no text with plain generate(): {one_line(reason)}") from reason
    return best


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---- trials


def is_refusal(error: Exception) -> bool:
    """Whether our own code raised it for people to read, and not transformers on the way."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = frame.f_globals["__name__"].startswith("specformer.")
    return isinstance(error, UnsupportedTargetError) or (isinstance(error, ValueError) and ours)


def attempt(trial: Callable[[], object]) -> Outcome:
    try:
        trial()
    except Exception as error:
        if is_refusal(error):
            return Outcome(REFUSED, str(error))
        return Outcome(FAILED, one_line(error))
    return Outcome(EXACT)


@dataclass
class Counts:
    drafted: int = 0
    accepted: int = 0


def compare(case: Case, name: str, way: str, drafter, counts: Counts, **arguments) -> Outcome:
    """One call of ours beside plain generate(): tokens, streamer calls and the final state of torch's generator."""
    reference, batch, streamer = case.reference(name, way), prompts(BATCHES[name]), Recorder()
    width, output = batch["input_ids"].shape[1], None

    def call() -> None:
        nonlocal output
        torch.manual_seed(SEED)
        output = generate(
            case.target,
            drafter,
            **batch,
            **DECODING[way],
            **arguments,
            max_new_tokens=NEW_TOKENS,
            num_assistant_tokens=DRAFTED,
            streamer=streamer,
            return_dict_in_generate=True,
        )

    outcome = attempt(call)
    if outcome.kind == REFUSED and len(streamer.calls) > 1:  # the prompt is the first
        return Outcome(FAILED, f"refused after the first token: {outcome.why}")
    if output is None:
        return outcome
    counts.drafted += sum(output.statistics.drafted_per_slot)
    counts.accepted += sum(output.statistics.accepted_per_slot)
    ours, theirs = output.sequences, reference.sequences
    if ours.tolist() != theirs.tolist():
        shared = min(ours.shape[1], theirs.shape[1])
        columns = (ours[:, :shared] != theirs[:, :shared]).any(dim=0).nonzero().flatten().tolist()
        first = (columns[0] if columns else shared) - width
        return Outcome(DIFFERENT, f"{name}, {way}: another text from new token {first} on")
    if streamer.calls != reference.streamed:
        return Outcome(DIFFERENT, f"{name}, {way}: other streamer calls")
    if not torch.equal(torch.get_rng_state(), reference.generator_state):
        return Outcome(DIFFERENT, f"{name}, {way}: another final state of torch's generator")
    return outcome


def decoding(case: Case, drafter, needs_both: bool, **arguments) -> Outcome:
    """All calls with one drafter: the worst that came of them.

    Args:
        needs_both: whether it is an error if no draft was right, or none wrong, since little was tried then.
    """
    counts, outcomes = Counts(), []
    for name, lengths in BATCHES.items():
        if case.padding_matters and len(lengths) > 1:
            continue
        outcomes += [compare(case, name, way, drafter, counts, **arguments) for way in DECODING]
    for kind in (FAILED, DIFFERENT, REFUSED):
        if found := [outcome for outcome in outcomes if outcome.kind == kind]:
            return found[0]
    if needs_both and not 0 < counts.accepted < counts.drafted:
        return Outcome(FAILED, f"{counts.accepted} of {counts.drafted} drafts were right, so that little was tried")
    return Outcome(ONE_ROW if case.padding_matters else EXACT)


def noisy_copy(target: PreTrainedModel) -> PreTrainedModel:
    """The target with errors: an assistant."""
    torch.manual_seed(SEED)
    assistant = copy.deepcopy(target)
    with torch.no_grad():
        for parameter in assistant.parameters():
            if parameter.numel() > 1:
                parameter.add_(NOISE * parameter.std() * torch.randn_like(parameter))
    return assistant


def train_one_step(drafter: SpecFormerModel, target: PreTrainedModel) -> None:
    """Forward, loss and backward on texts of random tokens."""
    batch = prompts((16, 16))
    borrowed = drafter.borrow(target)
    drafts = drafts_of_text(drafter, borrowed, dict(batch, labels=batch["input_ids"]))
    drafter_loss(drafts.states, drafts.labels, borrowed).backward()
    for name, parameter in drafter.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any():
            raise ArithmeticError(f"the gradient of {name} is missing, zero or not finite")
    drafter.zero_grad()


def with_copies(case: Case) -> Outcome:
    """What comes of a target with copies, which need no other model."""
    copies = decoding(case, None, True, prompt_lookup_num_tokens=DRAFTED, max_matching_ngram_size=1)
    return Outcome(NOT_BUILT, case.trivial) if case.trivial and copies.kind != REFUSED else copies


def outcomes_of(case: Case) -> dict[str, Outcome]:
    """What comes of a target, by column."""
    copies = with_copies(case)
    if copies.kind in (REFUSED, NOT_BUILT):  # whatever drafts
        return dict.fromkeys(COLUMNS, copies)
    found = {"copies": copies, "assistant": decoding(case, noisy_copy(case.target), True)}
    drafter: SpecFormerModel | None = None

    def make_drafter() -> None:
        nonlocal drafter
        config = SpecFormerConfig.from_target_config(case.target.config, num_draft_tokens=DRAFTED)
        drafter = SpecFormerModel(config).to(case.target.dtype)

    found["config"] = attempt(make_drafter)
    if drafter is None:
        return found | dict.fromkeys(("training", "specformer"), found["config"])
    found["training"] = attempt(partial(train_one_step, drafter, case.target))
    found["specformer"] = decoding(case, drafter, False)
    return found


def entry_of(class_name: str) -> dict:
    """What the result says of a class; of one that also reads images what comes of text alone, with copies."""
    is_of_text = class_name in class_names()
    try:
        case = find_case(class_name)
        outcomes = outcomes_of(case) if is_of_text else {"copies": with_copies(case)}
        dtype = str(case.target.dtype).removeprefix("torch.")
    except NotBuilt as error:
        outcomes, dtype = dict.fromkeys(COLUMNS if is_of_text else ("copies",), Outcome(NOT_BUILT, str(error))), None
    tried = {column: asdict(outcome) for column, outcome in outcomes.items()}
    return {"model_types": model_types(class_name), "dtype": dtype, **tried}


def wrong_in(entry: dict) -> list[str]:
    """What may never happen: another text than plain generate()'s, or an error that is no refusal."""
    return [
        f"{column}: {entry[column]['why']}" for column in COLUMNS if column in entry and entry[column]["kind"] in WRONG
    ]


# ---- the page


def reason_of(sentence: str) -> str:
    """A refusal without what differs from class to class, to see which are alike."""
    sentence = re.sub(r"^\w+ cannot be decoded speculatively: |\.? Call generate\(\) without.*$", "", sentence)
    details = re.compile(r" \((?!\w+Error)[^()]*\)")
    while details.search(sentence):
        sentence = details.sub("", sentence)
    sentence = re.sub(r"^\w+(?= has )", "the target", sentence)
    return re.sub(r"\d[\d.e+-]*(?<![.-])", "…", sentence).rstrip(".")


def by_reason(entries: dict[str, dict], kinds: tuple[str, ...]) -> dict[str, list[str]]:
    """The classes behind every reason for outcomes of these kinds, the most frequent reason first."""
    reasons: dict[str, list[str]] = {}
    for name, entry in entries.items():
        sentences = [entry[key]["why"] for key in COLUMNS if key in entry and entry[key]["kind"] in kinds]
        for why in dict.fromkeys(map(reason_of, sentences) if REFUSED in kinds else sentences):
            reasons.setdefault(why, []).append(name)
    return dict(sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])))


def listed(reasons: dict[str, list[str]]) -> list[str]:
    return [f"{number}. {why} ({', '.join(names)})" for number, (why, names) in enumerate(reasons.items(), 1)]


def count(entries: dict[str, dict], column: str, *kinds: str) -> int:
    return sum(entry[column]["kind"] in kinds for entry in entries.values())


def page_of(result: dict) -> str:
    """docs/compatibility.md."""
    entries, images, versions = result["classes"], result["with_text_alone"], result["versions"]
    refused, wrong = (by_reason(entries | images, kinds) for kinds in ((REFUSED,), WRONG))
    not_built = by_reason(entries, (NOT_BUILT,))

    def cell(outcome: dict) -> str:
        if outcome["kind"] == REFUSED:
            return f"refused ({list(refused).index(reason_of(outcome['why'])) + 1})"
        return f"**{outcome['kind']}**" if outcome["kind"] in WRONG else outcome["kind"]

    table = [
        f"| {', '.join(f'`{kind}`' for kind in entry['model_types'])} | {name} | "
        + " | ".join(cell(entry[column]) for column in COLUMNS)
        + f" | {entry['dtype'] or ''} |"
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["model_types"])
    ]
    counts = [
        f"| {heading} | " + " | ".join(str(count(entries, column, *kinds)) for column in COLUMNS) + " |"
        for heading, kinds in (
            ("exact", (EXACT,)),
            ("exact for one row", (ONE_ROW,)),
            ("refused", (REFUSED,)),
            ("not built", (NOT_BUILT,)),
            ("different or failed", WRONG),
        )
    ]
    of_images = [
        f"| {', '.join(f'`{kind}`' for kind in entry['model_types'])} | {name} | {cell(entry['copies'])} |"
        for name, entry in sorted(images.items(), key=lambda item: item[1]["model_types"])
        if entry["copies"]["kind"] != NOT_BUILT
    ]
    with_states = [name for name in hybrids.WEIGHTS if entries[name]["copies"]["kind"] == EXACT]
    elsewhere = [
        name
        for name, entry in entries.items()
        if entry["copies"]["kind"] == REFUSED
        and re.search(r"state of its own|keeps its states", entry["copies"]["why"])
    ]
    without = [name for name, entry in images.items() if entry["copies"]["kind"] == NOT_BUILT]
    titles, line = " | ".join(COLUMNS.values()), "|---" * len(COLUMNS)
    return "\n".join(
        [
            INTRODUCTION.format(
                number=len(entries),
                transformers=versions["transformers"],
                torch=versions["torch"],
                tokens=NEW_TOKENS,
                rows=len(LENGTHS),
                short=LENGTHS[1],
                shortest=min(LENGTHS),
                longest=max(LENGTHS),
            ),
            f"|  | {titles} |",
            f"|---{line}|",
            *counts,
            "",
            *(["## Different or failed", "", *listed(wrong), ""] if wrong else []),
            "## Every model",
            "",
            f"| `model_type` | class | {titles} | compared in |",
            f"|---|---{line}|---|",
            *table,
            "",
            "## Models that keep states",
            "",
            STATES.format(
                number=len(with_states),
                exact=count(entries, "copies", EXACT),
                others=count(entries, "copies", EXACT) - len(with_states),
                names=", ".join(with_states),
                elsewhere=", ".join(elsewhere),
            ),
            "## Models that also read images, with text alone",
            "",
            IMAGES.format(
                number=len(images),
                exact=count(images, "copies", EXACT),
                refused=count(images, "copies", REFUSED),
                without=len(without),
            ),
            "| `model_type` | class | text alone |",
            "|---|---|---|",
            *of_images,
            "",
            f"Not built: {', '.join(without)}.",
            "",
            "## Why some are refused",
            "",
            *listed(refused),
            "",
            "## Which could not be tried",
            "",
            *listed(not_built),
            "",
            f"Made with `{result['command']}` on {result['date']}, {result['machine']['cpu']}.",
            "",
        ]
    )


INTRODUCTION = """\
# Does it work with my model?

Look up the `model_type` of your model's config.json in the long table. Every class that `AutoModelForCausalLM` of
transformers {transformers} makes was tried, {number} of them, with torch {torch}. A tiny model of random weights, with
layers of every kind that the real one has and short windows, chunks and thresholds, reads a prompt of {longest} tokens,
one of {short}, and a left-padded batch of {rows} with {shortest} to {longest}. It writes {tokens} tokens, past all of
those, greedily and sampling with a seed.

- **exact**: the tokens, streamer calls and final state of torch's random generator are those of plain `generate()`.
- **exact for one row**: the same for one prompt. In batches, what plain `generate()` itself writes depends on padding.
- **refused**: an error before the first token says why (the number is that of the reason below). No other text is
  written.
- **not built**: it could not be tried, for a reason given at the end.

"copies": drafts are copied from the text (`prompt_lookup_num_tokens`). "assistant": a causal LM drafts, here the
target with noise in its weights. SpecFormer: whether `SpecFormerConfig.from_target_config` knows the model, a drafter
for it can be trained, and decoding with that drafter is exact.

Models that keep recurrent or convolutional states are among them: those of LFM2, Qwen3-Next, Qwen3.5, Mamba and others
are exact ([which](#models-that-keep-states)). Models that read images as well have a
[table of their own](#models-that-also-read-images-with-text-alone).

How the real model's half precision rounds is another matter: see [lossless.md](lossless.md#rounding).
"""


IMAGES = """\
What `AutoModelForImageTextToText` makes, and not `AutoModelForCausalLM`: {number} classes, of which {exact} are exact
and {refused} refused with text alone, drafts being copies; {without} were not built so small. A call with images is
refused before they are encoded. `tests/test_multimodal.py` tries some of them with other drafters and a SpecFormer
network. Some need `timm`, which was not there; one is Gemma3n, whose text model, Gemma3nForCausalLM, is refused.
"""
STATES = """\
Recurrent or convolutional ones, in all layers or in some. {number} of the {exact} exact classes have them; without
them it would be {others}:

{names}.

`tests/test_hybrid.py` has each of them with drafters that are never, always, sometimes and adversarially right, 1 to 8
drafts, greedily and sampling, with EOS tokens and stop strings, in float64 and float32, and shows that states after one
token too many or too few, of another row, or of an old window are found. How a pass reads them:
[lossless.md](lossless.md#targets); what that costs: [benchmarks.md](benchmarks.md#targets-that-keep-states).

Refused are those that keep them elsewhere than in a cache of transformers: {elsewhere}.
"""


# ---- the command


def run(names: list[str], entries: dict[str, dict]) -> None:
    """Add what comes of these classes."""
    for name in names:
        started = time.perf_counter()
        entries[name] = entry_of(name)
        kinds = [f"{column} {entries[name][column]['kind']}" for column in COLUMNS if column in entries[name]]
        print(f"{name}: {', '.join(kinds)} ({time.perf_counter() - started:.1f} s)", file=sys.stderr)


def measure(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run the classes that are asked for, and write the result."""
    names = [
        name
        for name in [*class_names(), *image_text_names()]
        if arguments.only is None or any(part.lower() in name.lower() for part in arguments.only)
    ]
    if not names:
        parser.error(f"no class of transformers {transformers.__version__} is called like {arguments.only}")
    entries: dict[str, dict] = {}
    if arguments.only and arguments.result.exists():
        before = json.loads(arguments.result.read_text(encoding="utf-8"))
        if before["versions"]["transformers"] != transformers.__version__:
            parser.error(
                f"{arguments.result} was made with transformers {before['versions']['transformers']}, and this is "
                f"{transformers.__version__}: run all classes, or name another --result and --output."
            )
        entries = before["classes"] | before["with_text_alone"]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    prompt_groups.PASS_ON_CPU = 3  # short prompts are read in several groups, as long ones are
    run(names, entries)
    facts = provenance("tests/census.py")
    facts["command"] = facts["command"].replace(" -m ", " ", 1)
    groups = {"classes": class_names(), "with_text_alone": image_text_names()}
    found = {group: {name: entries[name] for name in names if name in entries} for group, names in groups.items()}
    result = {**facts, **found}
    arguments.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=PAGE, help="the page (default: docs/compatibility.md)")
    parser.add_argument("--result", type=Path, default=RESULT, help="what the page is made of")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="classes, or parts of their names")
    parser.add_argument("--page-only", action="store_true", help="run none, and write the page from the result")
    arguments = parser.parse_args()
    if not arguments.page_only:
        measure(arguments, parser)
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    arguments.output.write_text(page_of(result), encoding="utf-8")
    wrong = {
        name: found
        for name, entry in (result["classes"] | result["with_text_alone"]).items()
        if (found := wrong_in(entry))
    }
    for name, found in wrong.items():
        print(f"WRONG {name}: {'; '.join(found)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
