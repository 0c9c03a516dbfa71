"""Whether each row of a batch should have its own number of drafts verified, and what one number for all rows loses.

    python -m benchmarks.packed_widths --prompts mt_bench.jsonl --output packed_widths.json

What is drafted at every position of answers is written down once, with confidences (`draft_length_replay.record`).
These answers are then decoded in simulated batches, whose rounds take as long as passes were measured to take on a
quiet machine. Each round verifies what its confidences promise the most tokens per second of: the same number for all
rows, as a pass over (rows, width) does, or any number for each row, as a pass over all their tokens in one line would,
in which nothing is padding. Neither has to learn anything, and drafting takes no time: what is compared is the shape.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from benchmarks.draft_length_replay import COPIED, NEW_TOKENS, ROOT, Position, between, record
from specformer.scripts.benchmark import make_batches
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.provenance import provenance

MILLISECONDS = {1: 56, 5: 56, 8: 66, 16: 79, 24: 99, 32: 124, 40: 162, 64: 223}
"""Of a pass over so many tokens: Qwen2.5-Coder-0.5B, bfloat16, packed weights, AMD EPYC (verifying_pass_cpu.json)."""


def chances(position: Position) -> list[float]:
    """That each draft is accepted, and all in front of it."""
    return list(accumulate(position.confidences[: position.drafted], mul)) if position.drafted else []


def milliseconds(tokens: int) -> float:
    return between(MILLISECONDS, tokens)


def same_width(here: list[Position]) -> list[int]:
    """One number for all rows: that of the most expected tokens a second."""
    sure = [chances(position) for position in here]

    def speed(width: int) -> float:
        return (len(here) + sum(sum(own[:width]) for own in sure)) / milliseconds(len(here) * (1 + width))

    return [max(range(max(map(len, sure)) + 1), key=speed)] * len(here)


def own_widths(here: list[Position]) -> list[int]:
    """A number for each row: the likeliest drafts of all rows, as many as give the most expected tokens a second."""
    likeliest = sorted(((chance, row) for row, own in enumerate(map(chances, here)) for chance in own), reverse=True)
    expected = list(accumulate((chance for chance, _ in likeliest), initial=float(len(here))))
    best = max(range(len(expected)), key=lambda count: expected[count] / milliseconds(len(here) + count))
    taken = [row for _, row in likeliest[:best]]
    return [taken.count(row) for row in range(len(here))]


def seconds(texts: list[list[Position]], widths: Callable[[list[Position]], list[int]], is_padded: bool) -> float:
    """Of a batch of `texts`, until each has its tokens."""
    written, spent = [1] * len(texts), 0.0
    while running := [row for row, count in enumerate(written) if count < NEW_TOKENS]:
        here = [texts[row][written[row] - 1] for row in running]
        wanted = widths(here)
        carried = len(running) * (1 + max(wanted)) if is_padded else len(running) + sum(wanted)
        spent += milliseconds(carried) / 1000
        for row, position, width in zip(running, here, wanted, strict=True):
            written[row] += min(min(position.right, position.drafted, width) + 1, NEW_TOKENS - written[row])
    return spent


def speeds(texts: list[list[Position]], batch_size: int, calls: int) -> dict[str, float]:
    """In times of plain decoding, of as many batches."""
    chance, spent = random.Random(0), [0.0, 0.0, 0.0]
    for _ in range(calls):
        batch = chance.sample(texts, batch_size)
        plain = seconds(batch, lambda here: [0] * len(here), is_padded=True)
        found = plain, seconds(batch, same_width, is_padded=True), seconds(batch, own_widths, is_padded=False)
        spent = [before + more for before, more in zip(spent, found, strict=True)]
    return {"one width": spent[0] / spent[1], "own widths": spent[0] / spent[2]}


def main(arguments: argparse.Namespace) -> None:
    prompts, (folder, identity) = read_prompts(arguments.prompts), find_target(arguments.target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    drafter = None if arguments.target else AutoModel.from_pretrained(ROOT)
    batches = make_batches(tokenizer, prompts, 8, arguments.batches, None, target.device)
    most = COPIED if drafter is None else 8
    texts = [text for batch in tqdm(batches) for text in record(target, drafter, batch, most)]
    drafts = "copies" if drafter is None else "default drafter and copies"
    result = {"table": []}
    if arguments.output and arguments.output.exists():  # of another target or other prompts
        result = json.loads(arguments.output.read_text(encoding="utf-8"))
    for batch_size in arguments.batch_sizes:
        place = {"target": Path(identity).name, "prompts": Path(arguments.prompts).stem, "drafts": drafts}
        found = speeds(texts, batch_size, arguments.calls)
        result["table"].append({**place, "texts": len(texts), "batch_size": batch_size, "speed": found})
        print(place, batch_size, {name: round(speed, 3) for name, speed in found.items()})
    if arguments.output:
        result |= provenance("benchmarks.packed_widths")
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--output", type=Path, help="JSON file for the figures; more of them are added to it")
    parser.add_argument("--target", help="folder or Hub id, with copies alone; default: SmolLM2 with its drafter")
    parser.add_argument("--batches", type=int, default=4, help="of eight prompts, whose answers are written down")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--calls", type=int, default=40, help="simulated batches")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
