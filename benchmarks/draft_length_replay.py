"""Draft lengths replayed on the drafts of real texts, with the times of machines that are known.

    python -m benchmarks.draft_length_replay --prompts mt_bench.jsonl --output draft_length_replay.json

What is drafted at every position of answers is written down once, with confidences, and how much of it is right. Rules
then decode these answers in simulated batches: accepted drafts are real ones, and the time of a round follows from a
table of passes, as measured on a quiet machine, with noise of 8 %. So rules can be compared where timing them would
take a quiet machine for hours.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from specformer.generation import draft_length_auto
from specformer.generation import generate as entry
from specformer.generation.draft_length import DraftLength, round_draft_length
from specformer.generation.draft_length_auto import AutoDraftLength, Experience
from specformer.generation.proposal import NO_TOKEN
from specformer.scripts.benchmark import make_batches
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
NEW_TOKENS, COPIED, NOISE = 64, 10, 0.08
CALLS = {1: 60, 2: 30, 4: 24, 8: 16, 16: 10, 32: 7}
"""Of each batch size, the first two of which are there to learn of and are not counted."""
PASSES = {
    "AMD EPYC, bfloat16": {
        1: {0: 75, 1: 79, 2: 78, 3: 88, 4: 90, 7: 94},
        4: {0: 96, 1: 111, 2: 124, 3: 134, 4: 147, 7: 163},
    },
    "AMD EPYC, float32": {1: {0: 56, 1: 92, 2: 110, 3: 75, 4: 64, 7: 68}},
    "Intel Xeon, float32": {
        1: {0: 34, 1: 40, 2: 41, 3: 43, 4: 47},
        8: {0: 50, 1: 54, 2: 61, 3: 69, 4: 73},
        32: {0: 77, 1: 107, 2: 130, 3: 153, 4: 177},
    },
    "a GPU, assumed": {1: {0: 20.02, 10: 20.22}, 64: {0: 21.28, 10: 34.08}},
}
"""Milliseconds of a pass, by rows and by how many drafts of each it verifies; in straight lines between and behind. The
first are those of Qwen2.5-Coder-0.5B, the others of SmolLM2-135M; where one row was measured, it alone is replayed."""


@dataclass
class Position:
    """What is drafted behind a position of a text.

    Attributes:
        drafted: how many tokens.
        right: how many of them, up to the first wrong one.
        confidences: of each, if the drafter tells.
    """

    drafted: int
    right: int
    confidences: list[float] | None


class Look(DraftLength):
    """Drafts everywhere, and verifies nothing."""

    def __init__(self, most: int):
        super().__init__(most)
        self.seen: list[tuple[list, list | None]] = []

    def keep(self, drafts, confidences, idle, started) -> int:
        self.seen.append((drafts.tolist(), None if confidences is None else confidences.tolist()))
        return 0


def record(target, drafter, batch: dict, most: int) -> list[list[Position]]:
    """The positions of every row's answer."""
    look, choose = Look(most), entry.choose_draft_length
    copies = {"prompt_lookup_num_tokens": most, "num_assistant_tokens": "auto"} if drafter is None else {}
    settings = dict(max_new_tokens=NEW_TOKENS + most + 1, eos_token_id=None, do_sample=False)
    try:
        entry.choose_draft_length = lambda *_: look
        output = entry.generate(target, drafter, **batch, **settings, **copies)
    finally:
        entry.choose_draft_length = choose
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    texts = [[] for _ in answers]
    for number, (drafts, confidences) in enumerate(look.seen[:NEW_TOKENS]):
        for row, (tokens, text) in enumerate(
            zip(drafts, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True)
        ):
            follow = text[number + 1 : number + 1 + len(tokens)]
            right = [token == other for token, other in zip(tokens, follow, strict=False)]
            drafted = sum(token != NO_TOKEN for token in tokens)
            sure = None if confidences is None else confidences[row]
            texts[row].append(Position(drafted, [*right, False].index(False), sure))
    return texts


def between(points: dict[int, float], place: int) -> float:
    """On the straight lines through `points`, the last of which goes on; level in front of the first."""
    places = sorted(points)
    right = next((at for at in places if at >= place), places[-1])
    left = max((at for at in places if at < right), default=right)
    share = (place - left) / (right - left) if right != left else 0.0
    return points[left] + share * (points[right] - points[left])


def pass_seconds(machine: str, num_rows: int, verified: int) -> float:
    table = PASSES[machine]
    milliseconds = {rows: between(times, verified) for rows, times in table.items()}
    return between(milliseconds, num_rows) / 1000


def drafting_seconds(num_rows: int, drafted: int, is_free: bool) -> float:
    milliseconds = 0.4 if is_free else (3.5 + 0.6 * min(drafted, 4)) * (1 + num_rows / 16)
    return milliseconds / 1000 if drafted else 0.0


class Replay:
    """Decodes batches of `texts` on a machine. `is_wrong`: no draft is right, and nobody tells."""

    def __init__(self, texts: list[list[Position]], machine: str, is_free: bool, is_wrong: bool):
        self.texts, self.machine, self.is_free, self.is_wrong = texts, machine, is_free, is_wrong
        self.clock = 0.0

    def seconds(self, rule: DraftLength, rows: list[int], chance: random.Random) -> float:
        """Of a batch of the texts of these numbers."""
        written, spent = dict.fromkeys(range(len(rows)), 1), 0.0
        while running := [row for row, count in written.items() if count < NEW_TOKENS]:
            k = round_draft_length(rule.next(len(running)), min(written[row] for row in running), NEW_TOKENS)
            here = [self.texts[rows[row]][written[row] - 1] for row in running]
            slowness = chance.lognormvariate(0, NOISE)
            drafting = slowness * drafting_seconds(len(running), k, self.is_free)
            verified = self.verified(rule, here, k, drafting) if k else 0
            seconds = drafting + slowness * pass_seconds(self.machine, len(running), verified)
            outcome = []
            for row, position in zip(running, here, strict=True):
                accepted = 0 if self.is_wrong else min(position.right, position.drafted, verified)
                outcome.append((accepted, min(accepted + 1, NEW_TOKENS - written[row])))
                written[row] += outcome[-1][1]
            rule.record(len(running), verified, outcome, seconds)
            spent += seconds
        return spent

    def verified(self, rule: DraftLength, here: list[Position], k: int, drafting: float) -> int:
        width = k if self.is_wrong or any(position.drafted for position in here) else 0
        confidences = None
        if not self.is_wrong and here[0].confidences is not None:
            confidences = torch.tensor([position.confidences[:width] for position in here])
        self.clock = drafting
        return rule.keep(torch.zeros(len(here), width), confidences, torch.zeros(len(here), dtype=torch.bool), 0.0)

    def calls(self, make: Callable[[], DraftLength], batch_size: int, seed: int) -> float:
        """Seconds of all calls but the first two."""
        chance, before = random.Random(seed), draft_length_auto.perf_counter
        try:
            draft_length_auto.perf_counter = lambda: self.clock
            places = range(len(self.texts))
            times = [self.seconds(make(), chance.sample(places, batch_size), chance) for _ in range(CALLS[batch_size])]
        finally:
            draft_length_auto.perf_counter = before
        return sum(times[2:])


def speeds(replay: Replay, most: int, start: int, batch_size: int, fixed: list[int], seeds: int) -> dict[str, float]:
    """In times of plain decoding, means over the seeds."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        plain, experience = replay.calls(lambda: DraftLength(0), batch_size, seed), Experience()
        rules = {"auto": lambda: AutoDraftLength(most, start, experience)}  # noqa: B023
        rules |= {f"k = {k}": lambda k=k: DraftLength(k) for k in fixed}
        for name, make in rules.items():
            found.setdefault(name, []).append(plain / replay.calls(make, batch_size, seed))
    return {name: statistics.mean(values) for name, values in found.items()}


def main(arguments: argparse.Namespace) -> None:
    prompts, (folder, identity) = read_prompts(arguments.prompts), find_target(arguments.target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    drafter = None if arguments.target else AutoModel.from_pretrained(ROOT)
    most, start, fixed = (COPIED, COPIED, [2, 4, COPIED]) if drafter is None else (8, 2, [2, 4])
    batches = make_batches(tokenizer, prompts, 8, arguments.batches, None, target.device)
    texts = [text for batch in tqdm(batches) for text in record(target, drafter, batch, most)]
    table = []
    for is_wrong in (False, True):
        for machine in PASSES:
            replay = Replay(texts, machine, drafter is None or is_wrong, is_wrong)
            for batch_size in arguments.batch_sizes if len(PASSES[machine]) > 1 else [1]:
                found = speeds(replay, most, start, batch_size, [] if is_wrong else fixed, arguments.seeds)
                drafts = "always wrong" if is_wrong else "copies" if drafter is None else "default drafter"
                table.append({"drafts": drafts, "machine": machine, "batch_size": batch_size, "speed": found})
                print(drafts, machine, batch_size, {name: round(value, 3) for name, value in found.items()}, flush=True)
    name = arguments.name or identity
    before = json.loads(arguments.output.read_text(encoding="utf-8"))["targets"] if arguments.output.exists() else {}
    result = {**provenance("benchmarks.draft_length_replay"), "texts": len(texts), "targets": {**before, name: table}}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument(
        "--target", help="folder or Hub id, with copies alone; default: the one of `specformer fetch` with its drafter"
    )
    parser.add_argument("--name", help="what to call the target, where it is a folder")
    parser.add_argument("--batches", type=int, default=8, help="of eight prompts each, whose answers are decoded")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
