"""Processes that share a target: a hundred calls of each kind of drafter, and what comes of a process that is lost.

    python tests/ranks.py --ranks 2 --calls 100 --output benchmarks/results/ranks.json
    python tests/ranks.py --ranks 3 --target SmolLM2 --minutes 20 --output benchmarks/results/ranks.json
    python tests/ranks.py --ranks 2 --torchrun --output benchmarks/results/ranks.json
    python tests/ranks.py --ranks 2 --lost 5 --output benchmarks/results/ranks.json

Every text of every process is compared with what plain generate() writes in one process, see world.py. What the file
has already is kept and not run again, so that a long run may be made in parts. The exit status is 1 where a text
differs, or a process did not end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import specformer
from specformer.scripts.parts.provenance import provenance

WORLD = Path(__file__).with_name("world.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
LATEST = 900
"""Seconds that the models, and the calls of a kind that was begun, may take besides."""


def environment() -> dict[str, str]:
    """Of a process that imports this very package, on one thread."""
    parent = str(Path(specformer.__file__).parents[1])
    paths = os.pathsep.join([parent, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


class StillThere(Exception):
    """Processes did not end; what they wrote."""


def world(scenario: str, size: int, folder: Path, patience: float, torchrun: bool = False, **options) -> list[dict]:
    """What each process found.

    Raises:
        StillThere: they did not end in `patience` seconds.
        RuntimeError: a process ended without a word, or torchrun saw one fail.
    """
    launcher = (*TORCHRUN, str(size)) if torchrun else ()
    process = subprocess.Popen(
        [sys.executable, *launcher, str(WORLD), scenario, str(size), str(folder), json.dumps(options)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    files = [folder / f"rank{rank}.json" for rank in range(size)]
    try:
        if scenario == "stopped":  # the other rank is there for ever
            process.wait(patience)
            until = time.monotonic() + 30
            while time.monotonic() < until and not all(file.exists() for file in files):  # of the others
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=patience)  # until the last rank has closed it
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise StillThere(f"the ranks did not end:\n{output[-4000:]}") from error
    if (torchrun and process.returncode) or not all(file.exists() for file in files):
        raise RuntimeError(output[-4000:])
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if any("failed" in each for each in found):  # what a process wrote that gloo ended stands nowhere else
        print(output, file=sys.stderr, flush=True)
    return found


def calls_of_each_kind(arguments: argparse.Namespace, run: dict) -> None:
    """Add to `run` what was found of each kind that it does not know, or that differed.

    Raises:
        RuntimeError: a process failed. What was found before is there.
    """
    wanted = arguments.calls
    known = [name for name, kind in run["kinds"].items() if kind["calls"] >= wanted and not kind["differences"]]
    seconds = 60.0 * arguments.minutes
    options: dict = {name: getattr(arguments, name) for name in ("target", "new_tokens", "calls")}
    options |= {"seconds": seconds, "skipped": known}
    with tempfile.TemporaryDirectory() as folder:
        found = world("many calls", arguments.ranks, Path(folder), seconds + LATEST, arguments.torchrun, **options)
    failures = [each.pop("failed") for each in found if "failed" in each]
    for name in set.intersection(*map(set, found)):
        differences = [f"rank {rank}: {each[name]}" for rank, each in enumerate(found) if each[name] != "same"]
        run["kinds"][name] = {"calls": arguments.calls, "tokens": arguments.new_tokens, "differences": differences}
    if failures:
        raise RuntimeError(failures[0])


def lose(arguments: argparse.Namespace, run: dict) -> None:
    """Kill and stop a process, so many times each, and add to `run` what the first one raised, and when."""
    for how in ("killed", "stopped") * arguments.lost:
        number = random.randint(1, 7)
        with tempfile.TemporaryDirectory() as folder:
            first, *_, last = world(how, arguments.ranks, Path(folder), 180, number=number)
        told = [line for line in first["raised"].splitlines() if "Raised in rank 0" in line]
        run["lost"].append({"how": how, "when": last["lost"], "seconds": round(first["seconds"], 1), "raised": told})
        print(f"  {how} {last['lost']}: raised after {first['seconds']:.1f} s: {told}", flush=True)


def main(arguments: argparse.Namespace) -> int:
    facts = provenance("tests/ranks.py")
    facts["command"] = facts["command"].replace(" -m ", " ", 1)
    result: dict = {"runs": []}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text(encoding="utf-8"))
    about = {
        "target": arguments.target,
        "ranks": arguments.ranks,
        "started_by": "torchrun" if arguments.torchrun else "fork",
    }
    run = next((run for run in result["runs"] if run.items() >= about.items()), None)
    if run is None:
        run = {**about, **facts, "kinds": {}, "lost": []}
        result["runs"].append(run)
    if run["versions"] != facts["versions"]:
        raise ValueError(f"{arguments.output} has this run with {run['versions']}; expected another file.")
    try:
        (lose if arguments.lost else calls_of_each_kind)(arguments, run)
    finally:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    differences = {name: kind["differences"] for name, kind in run["kinds"].items() if kind["differences"]}
    silent = [each for each in run["lost"] if not each["raised"]]
    calls = sum(kind["calls"] for kind in run["kinds"].values())
    print(
        f"{len(run['kinds'])} kinds, {calls} calls, {len(run['lost'])} lost processes; {differences or 'no difference'}"
    )
    return int(bool(differences or silent))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--target", choices=["tiny", "MTP", "SmolLM2"], default="tiny")
    parser.add_argument("--torchrun", action="store_true", help="starts the processes, in place of fork")
    parser.add_argument("--calls", type=int, default=100, help="of each kind")
    parser.add_argument("--new-tokens", type=int, default=8, help="of each text")
    parser.add_argument("--minutes", type=float, default=1000, help="after which no further kind is begun")
    parser.add_argument(
        "--lost", type=int, default=0, metavar="TIMES", help="kill and stop a process, in place of calls"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file, which is gone on with")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
