"""What "auto" makes of the draft length, beside fixed numbers: on the same prompts, in turn, in one process.

    python -m benchmarks.draft_length_rules --prompts mt_bench.jsonl --output draft_length_rules.json

What drafts is the default drafter with copies, or copies alone where another target is given; and a drafter that is
always wrong and costs nothing. Each turn has other prompts and runs every contender once, in an order that moves on.
The first calls of all, in which "auto" begins to know the machine, are not timed; what it knows stays from call to
call, as it does for a user. A stopped run goes on where it was when the same command is given again, and one of another
target or dtype adds to the same file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from specformer.scripts.benchmark import make_batches, save, timed
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.contenders import PLAIN, KnownText, Way, our_way, plain_way
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
COPIED = 10
"""Tokens that are copied where copies are all that drafts."""


def contenders(target, drafter, wrong: KnownText) -> dict[str, Way]:
    every = {PLAIN: plain_way(target), "always wrong, auto": our_way(target, wrong, "auto")}
    if drafter is None:
        lengths = {"auto": "auto", f"k = {COPIED}": None}
        copies = {name: our_way(target, None, k, prompt_lookup_num_tokens=COPIED) for name, k in lengths.items()}
        return every | {f"copies, {name}": way for name, way in copies.items()}
    lengths = {"auto": "auto", "k = 2": 2, "k = 4": 4}
    return every | {f"default, {name}": our_way(target, drafter, k) for name, k in lengths.items()}


def figures_of(seconds: float, counts, identical: int) -> dict:
    """Of one call. `decoding`: seconds behind the prompts' pass."""
    if counts is None:
        return {"seconds": seconds, "identical": identical}
    decoding = sum(spent for part, spent in counts.seconds.items() if part != "prefill")
    rounds = {str(length): count for length, count in sorted(counts.rounds_per_length.items())}
    passes = {"tokens_per_pass": counts.tokens_per_pass, "rounds": rounds}
    return {"seconds": seconds, "decoding": decoding, **passes, "identical": identical}


def run_turn(batch: dict, ways: dict[str, Way], wrong: KnownText, first: int) -> dict[str, dict]:
    """Every contender once, from the one at place `first` on."""
    expected = ways[PLAIN].call(**batch)[0]
    answer = expected[:, batch["input_ids"].shape[1] :]
    wrong.know(answer, torch.zeros_like(answer, dtype=torch.bool))
    names, figures = list(ways), {}
    for place in range(len(names)):
        name = names[(first + place) % len(names)]
        sequences, counts, seconds = timed(expected.device, ways[name], batch)
        figures[name] = figures_of(seconds, counts, int((sequences == expected).all(dim=1).sum()))
    return figures


def summary(turns: list[dict[str, dict]]) -> dict[str, dict]:
    """Per contender, medians over the turns; `speed` is in times of plain generate(), of the same turn."""
    table = {}
    for name in turns[0]:
        own = [turn[name] for turn in turns]
        speeds = [turn[PLAIN]["seconds"] / turn[name]["seconds"] for turn in turns]
        table[name] = {
            "seconds": statistics.median(one["seconds"] for one in own),
            "speed": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "identical": sum(one["identical"] for one in own),
        }
        for figure in ("decoding", "tokens_per_pass"):
            if figure in own[0]:
                table[name][figure] = statistics.median(one[figure] for one in own)
    return table


def main(arguments: argparse.Namespace) -> None:
    prompts, (folder, identity) = read_prompts(arguments.prompts), find_target(arguments.target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype)).eval()
    drafter = None if arguments.target else AutoModel.from_pretrained(ROOT)
    slots = COPIED if drafter is None else drafter.config.num_draft_tokens
    path, contests = arguments.output, []
    if path.exists():
        contests = json.loads(path.read_text(encoding="utf-8"))["contests"]
    result = {**provenance("benchmarks.draft_length_rules"), "contests": contests}
    for batch_size in arguments.batch_sizes:
        regime = {
            "target": arguments.name or identity,
            "dtype": arguments.dtype,
            "batch_size": batch_size,
            "max_new_tokens": arguments.max_new_tokens,
        }
        contest = next((one for one in contests if one["regime"] == regime), None)
        if contest is None:
            contest = {"regime": regime, "summary": {}, "turns": []}
            contests.append(contest)
        done = len(contest["turns"])
        if done >= arguments.turns:
            continue
        wrong = KnownText(slots)
        ways = contenders(target, drafter, wrong)
        batches = make_batches(tokenizer, prompts, batch_size, arguments.turns + 1, None, target.device)
        settings = dict(do_sample=False, max_new_tokens=arguments.max_new_tokens, eos_token_id=None)
        run_turn({**batches[-1], **settings}, ways, wrong, first=0)
        for turn in range(done, arguments.turns):
            contest["turns"].append(run_turn({**batches[turn], **settings}, ways, wrong, first=turn + 1))
            contest["summary"] = summary(contest["turns"])
            save(path, result)
        for name, row in contest["summary"].items():
            print(batch_size, name, {figure: round(value, 3) for figure, value in row.items()}, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument(
        "--target", help="folder or Hub id, with copies alone; default: the one of `specformer fetch` with its drafter"
    )
    parser.add_argument("--name", help="what to call the target, where it is a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
