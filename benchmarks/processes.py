"""A file of prompts answered by one process and by several, each on one thread: how fast, and that no answer is lost.

    python -m benchmarks.processes --prompts prompts.jsonl --limit 1000 --max-new-tokens 16 \\
        --output benchmarks/results/processes.json

Each run is one command, `accelerate launch -m specformer.scripts.generate`, which writes a folder of its own; numbers
of processes take turns. Seconds are those in which answers were written, of the slowest process, models loaded; and
those of the whole command. No run may lose an answer or double one, and all of them must have the same tokens:
otherwise the exit status is 1. Drafts follow what pays, so that runs of one number of processes differ in their passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from specformer.scripts.parts.provenance import provenance


def launch(processes: int) -> list[str]:
    """Without GPUs accelerate starts several processes only if it is told that there are some."""
    several = ["--multi_gpu", "--num_machines", "1", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    common = ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *several, *common]


def answer(processes: int, arguments: argparse.Namespace, folder: Path) -> dict:
    """One run into `folder`.

    Raises:
        CalledProcessError: it failed.
    """
    command = [*launch(processes), "-m", "specformer.scripts.generate", "--prompts", arguments.prompts]
    command += ["--output", str(folder), "--max-new-tokens", str(arguments.max_new_tokens), "--dtype", arguments.dtype]
    command += ["--batch-size", str(arguments.batch_size), *arguments.more]
    for name in ("target", "limit", "drafter"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True)
    whole = time.perf_counter() - began
    card = (folder / "README.md").read_text(encoding="utf-8")
    measured = json.loads(card.split("```json\n")[1].split("```")[0])["measured"]
    return {"processes": processes, "seconds_of_the_command": round(whole, 1), **measured}


def answers_in(folder: Path) -> list[tuple[int, tuple[int, ...]]]:
    """Place of the prompt and tokens of each answer, by place."""
    lines = [line for file in folder.glob("answers-*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted((row["id"], tuple(row["response_ids"])) for row in map(json.loads, lines))


def main(arguments: argparse.Namespace) -> int:
    runs, texts, differences = list[dict](), None, list[str]()
    for turn in range(arguments.turns):
        for processes in arguments.processes:
            with tempfile.TemporaryDirectory() as parent:
                folder = Path(parent) / "answers"
                runs.append(answer(processes, arguments, folder))
                answers = answers_in(folder)
            places = [place for place, _ in answers]
            if len(places) != runs[-1]["answers"] or len(set(places)) != len(places):
                differences.append(f"turn {turn}, {processes} processes: answers are lost or doubled")
            texts = texts or answers
            if others := len(set(texts) - set(answers)):
                differences.append(f"turn {turn}, {processes} processes: {others} answers are not the first run's")
            print(json.dumps(runs[-1]), flush=True)
    speeds = {
        processes: median(run["tokens_per_second"] for run in runs if run["processes"] == processes)
        for processes in arguments.processes
    }
    first = arguments.processes[0]
    summary = {
        "prompts": len(texts or ()),
        "tokens_per_second": {str(processes): round(speed, 1) for processes, speed in speeds.items()},
        "speed_up": {str(processes): round(speed / speeds[first], 2) for processes, speed in speeds.items()},
        "differences": differences,
    }
    print(json.dumps(summary))
    regime = {name: getattr(arguments, name) for name in ("target", "dtype", "max_new_tokens", "batch_size")}
    about = {"threads_per_process": 1, "regime": regime}
    result = {**provenance("benchmarks.processes"), **about, **summary, "runs": runs}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(bool(differences))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--limit", type=int, default=1000, help="only the first so many")
    parser.add_argument("--target", help="folder or Hub id; default: the one of `specformer fetch`")
    parser.add_argument("--drafter", help="as that of `specformer generate`")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers that take turns")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("more", nargs="*", metavar="-- ...", help="further options of `specformer generate`")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
