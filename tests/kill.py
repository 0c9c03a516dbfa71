"""Kill distillation, generation and training at random moments: nothing is lost or doubled, and the result is the same.

    python tests/kill.py --kills 10 --seed 0 --output benchmarks/results/kills.json

A run on a tiny model is left alone and measured. The same command is then started, killed with SIGKILL together with
all of its process group, started again and killed again, and at last left to its end. The moments are random within
stages that the first run has measured: start-up, reading what is there, work, the writing of a checkpoint, and what
comes behind the last of the work. The exit status is 1 where a result differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, groupby, islice
from pathlib import Path

import psutil
import torch
from test_callers import tiny_tokenizer
from test_training import SELDOM, arguments_of, prepare, run_differences
from tiny import llama

from specformer import SpecFormerConfig, SpecFormerModel
from specformer.scripts.parts.provenance import provenance
from specformer.scripts.train import CHECKPOINTS, WHOLE

POLL = 0.002
"""Seconds between two looks at a running process."""


class Job:
    """A command that goes on where it was stopped.

    Args:
        folder: a new one, for what the command reads and what it writes.
        options: further ones of the command.
        launcher: what python runs, in place of the script; for planted faults.
    """

    stages: tuple[str, ...]
    module: str

    def __init__(self, folder: Path, options: tuple[str, ...] = (), launcher: tuple[str, ...] = ()):
        self.folder, self.options, self.launcher = folder, options, launcher or ("-m", self.module)

    def arguments(self, output: str) -> list[str]:
        raise NotImplementedError

    def units(self, output: str) -> int:
        """How much of the work is safe."""
        raise NotImplementedError

    def is_writing(self, output: str) -> bool:
        """Whether something is there in part."""
        return False

    def there(self, output: str) -> str:
        """What there is, in words."""
        raise NotImplementedError

    def differences(self, output: str, calm: str) -> list[str]:
        """What the folder `output` has in another way than `calm`. Litter counts."""
        ours, theirs = (
            {str(path.relative_to(self.folder / name)) for path in (self.folder / name).rglob("*")}
            for name in (output, calm)
        )
        missing = [f"{path} is missing" for path in sorted(theirs - ours)]
        return missing + [f"{path} is too much" for path in sorted(ours - theirs)]


class Distillation(Job):
    """200 sampled answers."""

    stages = ("working", "reading", "starting", "ending")  # a line is written at once
    module = "specformer.scripts.distill"

    def arguments(self, output: str) -> list[str]:
        prompts, target = self.folder / "prompts.jsonl", self.folder / "target"
        if not prompts.exists():
            llama(torch.float32).save_pretrained(target)
            tiny_tokenizer().save_pretrained(target)
            texts = [
                " ".join(chr(97 + (7 * number + step) % 26) for step in range(1 + number % 9)) for number in range(200)
            ]
            prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        places = ("--prompts", prompts, "--target", target, "--output", self.folder / output)
        return [*map(str, places), "--batch-size", "4", "--max-new-tokens", "24", "--temperature", "1.1", *self.options]

    def lines(self, output: str) -> list[bytes]:
        files = sorted((self.folder / output).glob("answers-*.jsonl"))
        return [line for path in files for line in path.read_bytes().splitlines(keepends=True)]

    def units(self, output: str) -> int:
        return sum(line.endswith(b"\n") for line in self.lines(output))

    def there(self, output: str) -> str:
        card = (self.folder / output / "README.md").exists()
        return f"{self.units(output)} answers" + ", card" * card

    def differences(self, output: str, calm: str) -> list[str]:
        ours, theirs = Counter(self.lines(output)), Counter(self.lines(calm))
        found = [f"lost or changed: {line[:80]}" for line in theirs - ours]
        found += [f"doubled or changed: {line[:80]}" for line in ours - theirs]
        return super().differences(output, calm) + found


class Generation(Distillation):
    """The same answers, drafted: those of each prompt must not depend on the rows beside it, which a kill changes."""

    module = "specformer.scripts.generate"

    def arguments(self, output: str) -> list[str]:
        arguments, drafter = super().arguments(output), self.folder / "drafter"
        if not drafter.exists():
            SpecFormerModel(SpecFormerConfig.from_target_config(llama().config)).save_pretrained(drafter)
        return [*arguments, "--drafter", str(drafter), "--dtype", "float32"]  # half precision has ties


class Training(Job):
    """120 steps with 24 checkpoints."""

    stages = ("working", "writing", "reading", "starting", "ending")
    module = "specformer.scripts.train"

    def arguments(self, output: str) -> list[str]:
        if not (self.folder / "answers.jsonl").exists():
            prepare(self.folder)
        return arguments_of(self.folder, output, *SELDOM, "--epochs", "24", "--evaluations", "24", *self.options)

    def checkpoints(self, output: str) -> dict[int, bool]:
        """Steps of the checkpoints, and whether each is whole."""
        folders = (self.folder / output).glob(CHECKPOINTS)
        return {int(folder.name.split("-")[1]): (folder / WHOLE).exists() for folder in folders}

    def units(self, output: str) -> int:
        return max((step for step, whole in self.checkpoints(output).items() if whole), default=0)

    def is_writing(self, output: str) -> bool:
        checkpoints = self.checkpoints(output)
        return bool(checkpoints) and not checkpoints[max(checkpoints)]

    def there(self, output: str) -> str:
        checkpoints = sorted(self.checkpoints(output).items())
        words = [f"checkpoint-{step} {'whole' if whole else 'in part'}" for step, whole in checkpoints]
        words += ["result"] * (self.folder / output / "training.json").exists()
        return ", ".join(words) or "no checkpoint"

    def differences(self, output: str, calm: str) -> list[str]:
        return super().differences(output, calm) + run_differences(self.folder / output, self.folder / calm)


JOBS = {
    "distillation": Distillation,
    "generation": Generation,
    "training": Training,
    "training on stored states": partial(Training, options=("--store-hidden-states",)),
}


@contextmanager
def running(job: Job, output: str) -> Iterator[subprocess.Popen]:
    """The command in a process group of its own, of which nothing is alive behind the block.

    Raises:
        RuntimeError: the command failed by itself.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    log = job.folder / f"{output}.log"
    with open(log, "w") as file:
        command = [sys.executable, *job.launcher, *job.arguments(output)]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            yield process
        finally:
            if process.returncode is None:  # not waited for yet, so that the number is still its own
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"The command ended with status {process.returncode}:\n{log.read_text()[-4000:]}")


def work_of(process: subprocess.Popen) -> float:
    """Seconds of the processor so far: the same work takes as many of them on a busy machine."""
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


@dataclass
class Pace:
    """How a run that was left alone went: the units it made, and how long it and its stages took.

    The first two stages are in seconds of the processor, as nothing is seen from outside that tells how far they are.
    """

    units: int
    seconds: float
    starting: float
    reading: float
    working: float
    writing: float
    ending: float


def left_alone(job: Job, output: str) -> Pace:
    begin, looks = time.monotonic(), []
    with running(job, output) as process:
        while process.poll() is None:
            begun, units = (job.folder / output / "settings.json").exists(), job.units(output)
            looks.append((time.monotonic() - begin, work_of(process), begun, units, job.is_writing(output)))
            time.sleep(POLL)
    seconds, units = time.monotonic() - begin, job.units(output)
    starting = next(work for _, work, begun, *_ in looks if begun)
    first, reading = next((second, work - starting) for second, work, _, made, _ in looks if made)
    last = next((second for second, _, _, made, _ in looks if made == units), seconds)
    working = (last - first) / len({made for _, _, _, made, _ in looks})
    spans = [[look[0] for look in group] for writing, group in groupby(looks, lambda look: look[-1]) if writing]
    writing = statistics.median([span[-1] - span[0] for span in spans] or [0.0])
    return Pace(units, seconds, starting, reading, working, writing, ending=seconds - last)


def kill(job: Job, output: str, stage: str, wanted: int, share: float, pace: Pace) -> float | None:
    """Start the command and kill it within a stage.

    Args:
        wanted: how many units must be safe, where the stage is "working" or "writing".
        share: how far into the stage.

    Returns:
        The seconds it ran, or None where it was done before.
    """
    begin, before = time.monotonic(), job.units(output)

    def has_worked(seconds: float) -> bool:
        # New units say that the stages before them took less than they did in the run that was left alone.
        return work_of(process) >= seconds or job.units(output) > before

    # When to kill it, and how many seconds later.
    has_come, delay = {
        "starting": (lambda: has_worked(share * pace.starting), 0),
        "reading": (lambda: has_worked(pace.starting + share * pace.reading), 0),
        "working": (lambda: job.units(output) >= wanted, share * pace.working),
        "writing": (lambda: job.units(output) >= wanted and job.is_writing(output), share * pace.writing),
        "ending": (lambda: job.units(output) == pace.units and has_worked(pace.starting), share * pace.ending),
    }[stage]
    with running(job, output) as process:
        while process.poll() is None and not has_come():
            time.sleep(POLL)
        if process.returncode is None:
            time.sleep(delay)
    return time.monotonic() - begin if process.returncode else None


def check(job: Job, kills: int, seed: int) -> dict:
    """Run the job alone and with so many kills. What differs between the two is in "differences"."""
    generator, pace = random.Random(seed), left_alone(job, "calm")
    print(f"  left alone: {pace.seconds:.1f} s, {job.there('calm')}", flush=True)
    stages = list(islice(cycle(job.stages), kills))
    generator.shuffle(stages)
    stages.sort(key=lambda stage: stage == "ending")  # it takes all of the work that is left
    done, fallbacks = [], []
    while len(done) < kills:
        stage, before = stages[len(done)], job.units("killed")
        wanted = before + max(1, int(generator.random() * pace.units / (kills + 1)))
        seconds = kill(job, "killed", stage, min(wanted, pace.units), generator.random(), pace)
        if seconds is None:
            stages[len(done)] = "ending"  # it is all there: what is killed now has nothing left to do
            continue
        if job.units("killed") < before:
            fallbacks.append(f"kill {len(done) + 1} lost work that had been safe")
        done.append({"stage": stage, "seconds": round(seconds, 2), "there": job.there("killed")})
        print(f"  kill {len(done)}, {stage}, after {seconds:.1f} s: {done[-1]['there']}", flush=True)
    with running(job, "killed") as process:
        process.wait()
    differences = fallbacks + job.differences("killed", "calm")
    end = f"  at the end: {job.there('killed')}, {len(differences)} differences"
    print(end, *differences, sep="\n    ", flush=True)
    calm = {name: round(value, 3) for name, value in vars(pace).items()}
    return {"calm": calm, "kills": done, "result": job.there("killed"), "differences": differences}


def main(arguments: argparse.Namespace) -> int:
    facts = provenance("tests/kill.py")
    result = {**facts, "command": facts["command"].replace(" -m ", " ", 1), "jobs": {}}
    for name, make in JOBS.items():
        print(name)
        with tempfile.TemporaryDirectory() as folder:
            result["jobs"][name] = check(make(Path(folder)), arguments.kills, arguments.seed)
    different = [name for name, found in result["jobs"].items() if found["differences"]]
    kills = sum(len(found["kills"]) for found in result["jobs"].values())
    print(f"{kills} kills: {'differences in ' + ', '.join(different) if different else 'the same results'}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(different))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each job")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
