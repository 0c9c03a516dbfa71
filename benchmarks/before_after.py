"""Tokens a second of two versions of this package, on the same prompts, in turn.

    python -m benchmarks.before_after --before <folder of the older checkout> --prompts prompts.jsonl \\
        --output benchmarks/results/before_after.json --minutes 4

Each version generates in a process of its own (`before_after_worker`), and only one of them at a time. A turn is one
batch of other prompts: every way to generate, by both versions, the one that began last time second. What is compared
are the ratios within turns; plain generate(), which runs no code of this package, shows how far they can be trusted. A
run that is stopped, or ends after --minutes, is gone on with by the same command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.before_after_worker import PLAIN, WAYS
from benchmarks.workers import Worker
from specformer.scripts.benchmark import make_batches
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("before", "after")


class Side(Worker):
    """A process that generates with the package in `checkout`."""

    def __init__(self, checkout: Path, *arguments: str):
        self.parent = tempfile.TemporaryDirectory()
        (Path(self.parent.name) / "specformer").symlink_to(checkout.resolve())
        script = str(ROOT / "benchmarks" / "before_after_worker.py")
        super().__init__([sys.executable, script, *arguments], {"PYTHONPATH": self.parent.name})
        if (found := self.about["package"]) != str(Path(self.parent.name) / "specformer"):
            raise RuntimeError(f"the worker of {checkout} imported specformer from {found}.")

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.parent.cleanup()


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def measure_turn(workers: dict[str, Worker], batch: dict, turn: int, new_tokens: int) -> dict[str, dict[str, dict]]:
    """What both sides answer for one batch, by the way to generate."""
    order = SIDES if turn % 2 else SIDES[::-1]
    task = {name: part.tolist() for name, part in batch.items()} | {"max_new_tokens": new_tokens}
    return {way: {side: workers[side].ask(way=way, **task) for side in order} for way in WAYS}


def main(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    folder, target = find_target(arguments.target)
    checkouts = {"before": arguments.before, "after": arguments.after}
    drafter = [arguments.drafter] if arguments.drafter else []
    regime = {
        "target": target,
        "commits": {side: commit_of(checkout) for side, checkout in checkouts.items()},
        "max_new_tokens": arguments.max_new_tokens,
        "turns": arguments.turns,
    }
    result = {**provenance("benchmarks.before_after"), "regime": regime, "turns": []}
    if arguments.output.exists():
        there = json.loads(arguments.output.read_text(encoding="utf-8"))
        if there["regime"] != regime:
            raise ValueError(f"{arguments.output} holds {there['regime']}, and {regime} was asked for.")
        result["turns"] = there["turns"]
    done = {(each["dtype"], each["batch_size"], each["turn"]) for each in result["turns"]}
    tokenizer, prompts = AutoTokenizer.from_pretrained(folder), read_prompts(arguments.prompts)
    wanted = [(size, turn) for size in arguments.batch_sizes for turn in range(arguments.turns)]
    wanted = [place for place in wanted if (arguments.dtype, *place) not in done]
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Side(checkout, folder, arguments.dtype, *drafter))
            for side, checkout in checkouts.items()
        }
        warm = None
        for size, turn in tqdm(wanted, unit="turn"):
            if time.monotonic() - began > 60 * arguments.minutes:
                break
            batch = make_batches(tokenizer, prompts, size, arguments.turns, None, "cpu")[turn]
            if warm != size:  # what is faster here is found out, and code is generated, in calls that do not count
                measure_turn(workers, batch, turn, 8)
                warm = size
            answers = measure_turn(workers, batch, turn, arguments.max_new_tokens)
            result["turns"].append({"dtype": arguments.dtype, "batch_size": size, "turn": turn, "answers": answers})
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(result)))


def table(result: dict) -> list[str]:
    """Markdown: medians of the turns' ratios, how many times as fast the newer one is, by dtype and batch size."""
    drafting = [way for way in WAYS if way != PLAIN]
    titles = ["dtype", "batch", "turns", *drafting, "same texts", PLAIN, "lowest turn", "highest turn"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    groups: dict[tuple, list[dict]] = {}
    for turn in result["turns"]:
        groups.setdefault((turn["dtype"], turn["batch_size"]), []).append(turn["answers"])
    for (dtype, batch_size), turns in sorted(groups.items(), key=lambda group: (group[0][0] != "float32", group[0][1])):
        ratios = {
            way: [turn[way]["before"]["seconds"] / turn[way]["after"]["seconds"] for turn in turns] for way in WAYS
        }
        same = [turn[way]["before"]["text"] == turn[way]["after"]["text"] for turn in turns for way in drafting]
        medians = [f"{statistics.median(ratios[way]):.2f}" for way in drafting]
        plain = [f"{kind(ratios[PLAIN]):.2f}" for kind in (statistics.median, min, max)]
        cells = [dtype, str(batch_size), str(len(turns)), *medians, f"{sum(same)} of {len(same)}", *plain]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the older version")
    parser.add_argument("--after", type=Path, default=ROOT, help="checkout of the newer one; default: this one")
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--target", help="folder or Hub id; default: the one of `specformer fetch`")
    parser.add_argument("--drafter", help="SpecFormer folder; default: that of each checkout")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5, help="batches of each size")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no turn after so long")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
