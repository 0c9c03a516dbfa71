"""Other libraries beside this one, on the same prompts, in turn: prompt lookup, an assistant, and a drafter.

    python -m venv economize && economize/bin/pip install torch transformers==5.23.0 economize==0.3.2
    python -m benchmarks.rivals --economize economize/bin/python --prompts prompts.jsonl --output rivals.json

Each library generates in a process of its own environment (`rivals_worker`), and only one of them at a time. A turn is
one batch of other prompts, and every way to generate once, the library that began last time second. Speeds are times
plain generate() of the same environment, within a turn. Targets, dtypes, kinds of prompts and numbers of rows add up in
one file; turns that are there already are kept, and a run that is stopped is gone on with by the same command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.workers import Worker
from specformer.scripts.benchmark import make_batches, save
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.provenance import provenance

PLAIN = "plain generate"
WORKER = Path(__file__).with_name("rivals_worker.py")
ALONE = ("transformers, prompt lookup", "transformers, assistant")
"""Take one row only."""


class Library(Worker):
    """A process that generates with one library, in the environment of `python`."""

    def __init__(self, name: str, python: str, *arguments: str):
        self.name = name
        super().__init__([python, str(WORKER), name, *arguments])


def measure_turn(workers: list[Library], batch: dict, new_tokens: int) -> dict[str, dict[str, dict]]:
    """Seconds of every way, by library, and how many rows have the text of plain generate() of the same library."""
    task = {name: part.tolist() for name, part in batch.items()} | {"max_new_tokens": new_tokens}
    ways = {worker.name: [way for way in worker.about["ways"] if usable(way, batch)] for worker in workers}
    figures: dict[str, dict[str, dict]] = {}
    for worker in workers:
        texts = figures[worker.name] = {}
        for way in ways[worker.name]:
            texts[way] = worker.ask(way=way, **task)
        expected = texts[PLAIN]["text"]
        for answer in texts.values():
            pairs = zip(answer.pop("text"), expected, strict=True)
            answer["identical"] = sum(own == other for own, other in pairs)
    return figures


def usable(way: str, batch: dict) -> bool:
    return way not in ALONE or len(batch["input_ids"]) == 1


def main(arguments: argparse.Namespace) -> None:
    folder, identity = find_target(arguments.target)
    target, kind = Path(identity).name, Path(arguments.prompts).stem
    regime = {"max_new_tokens": arguments.max_new_tokens}
    result = {**provenance("benchmarks.rivals"), "regime": regime, "environments": {}, "turns": []}
    if arguments.output.exists():
        there = json.loads(arguments.output.read_text(encoding="utf-8"))
        if there["regime"] != regime:
            raise ValueError(f"{arguments.output} holds {there['regime']}, and {regime} was asked for.")
        result["turns"] = there["turns"]
    place = {"target": target, "dtype": arguments.dtype, "prompts": kind}
    places = [{**place, "batch_size": size} for size in arguments.batch_sizes]
    done = [{name: turn[name] for name in (*places[0], "turn")} for turn in result["turns"]]
    tokenizer, prompts = AutoTokenizer.from_pretrained(folder), read_prompts(arguments.prompts)
    with ExitStack() as stack:
        own = [arguments.drafter or "", find_target(arguments.assistant)[0] if arguments.assistant else ""]
        pythons = {"specformer": (sys.executable, own), "economize": (arguments.economize, ["", ""])}
        workers = [
            stack.enter_context(Library(library, python, folder, arguments.dtype, *drafters))
            for library, (python, drafters) in pythons.items()
            if python
        ]
        result["environments"] = {worker.name: worker.about["versions"] for worker in workers}
        for place in places:
            batches = make_batches(tokenizer, prompts, place["batch_size"], arguments.turns, None, "cpu")
            measure_turn(workers, batches[0], arguments.max_new_tokens)  # not counted
            for turn, batch in enumerate(tqdm(batches, unit="turn")):
                if {**place, "turn": turn} in done:
                    continue
                workers.reverse()
                figures = measure_turn(workers, batch, arguments.max_new_tokens)
                result["turns"].append({**place, "turn": turn, "figures": figures})
                save(arguments.output, result)
    print("\n".join(table(result)))


def groups_of(result: dict) -> dict[tuple, list[dict]]:
    """Figures of the turns, by target, dtype, prompts and number of rows."""
    groups: dict[tuple, list[dict]] = {}
    for turn in result["turns"]:
        place = turn["target"], turn["dtype"], turn["prompts"], turn["batch_size"]
        groups.setdefault(place, []).append(turn["figures"])
    return groups


def ways_of(result: dict) -> list[tuple[str, str]]:
    """(library, way) of all that is compared with plain generate(), this package's own first."""
    every = {(library, way) for turn in result["turns"] for library, ways in turn["figures"].items() for way in ways}
    theirs = {("economize", way) for way in ALONE}  # transformers' own, in the other environment
    return sorted((pair for pair in every - theirs if pair[1] != PLAIN), key=order_of)


def speed(turns: list[dict], library: str, way: str) -> float | None:
    """Median over the turns of the speed in times of plain generate() of the same environment."""
    own = [turn[library] for turn in turns if way in turn[library]]
    return statistics.median(ways[PLAIN]["seconds"] / ways[way]["seconds"] for ways in own) if own else None


def table(result: dict) -> list[str]:
    """Markdown: one line per target, kind of prompts and number of rows."""
    columns = ways_of(result)
    lines = [
        f"| target | prompts | batch | {' | '.join(way for _, way in columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for (target, dtype, prompts, batch_size), turns in groups_of(result).items():
        speeds = [speed(turns, *pair) for pair in columns]
        cells = ["" if found is None else f"{found:.2f}" for found in speeds]
        lines.append(f"| {target}, {dtype} | {prompts} | {batch_size} | {' | '.join(cells)} |")
    return lines


def order_of(pair: tuple[str, str]) -> tuple[bool, str, str]:
    """This package's own ways first."""
    return not pair[1].startswith("specformer"), *pair


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--economize", help="Python of the environment that has economize; default: without it")
    parser.add_argument("--target", help="folder or Hub id; default: the one of `specformer fetch`")
    parser.add_argument("--drafter", help="SpecFormer drafter of the target: folder or Hub id")
    parser.add_argument(
        "--assistant", help="a smaller causal LM, for this package and for transformers: folder or Hub id"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
