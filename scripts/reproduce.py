"""Make the default drafter, from prompts to model.safetensors.

    specformer reproduce --prompts train_prompts.jsonl --evaluate mt_bench.jsonl --output runs/default

Answers of the target, training, and an evaluation at 4 and 7 drafted tokens, one after the other. With a GPU this is
the recipe of the default drafter; without one a reduced form that takes hours and gives a weaker drafter. Every step
goes on where it was, so the command may be stopped at any moment and run again; --minutes stops it by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from specformer.scripts.model_card import write_model_card
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.recipes import options_of, read_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""YAML files: options of `distill` and of `evaluate`, and of each training, which has the answers to prompts of its own
(from the first of `prompts` to the last), begins with the drafter of the one before, and is left out where there are no
such prompts."""
# glibc gives the memory of large tensors back to the system, which clears it before it hands it out again: half of the
# time of distilling on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "10000000000", "MALLOC_TOP_PAD_": "200000000"}
EVERY = 0, None
OUT_OF_TIME = 75
"""Exit status after --minutes: run the same command again."""


def commands(arguments: argparse.Namespace) -> list[list[str]]:
    """The steps, each a module of specformer.scripts and its arguments."""
    recipe = arguments.recipe
    target = ["--target", arguments.target] if arguments.target else []
    target += ["--trust-remote-code"] if arguments.trust_remote_code else []
    template = ["--chat-template-kwargs", arguments.chat_template_kwargs] if arguments.chat_template_kwargs else []
    name = ["--target-id", arguments.target_id] if arguments.target_id else []
    count = len(read_prompts(arguments.prompts, recipe["train"][-1].get("prompts", EVERY)[1]))
    stages = [each for each in recipe["train"] if each.get("prompts", EVERY)[0] < count]
    measuring = options_of(recipe["evaluate"])
    drafter = str(arguments.output / "drafter")
    begin: list[str] = []
    steps: list[list[str]] = []
    for number, training in enumerate(stages, 1):
        first, end = training.get("prompts", EVERY)
        train = options_of({name: value for name, value in training.items() if name != "prompts"})
        answers = str(arguments.output / f"answers-{number}")
        part = [*(["--skip", str(first)] if first else []), *(["--limit", str(end)] if end else [])]
        prompts = ["--prompts", arguments.prompts, *part, *template]
        steps.append(["distill", *prompts, "--output", answers, *target, *options_of(recipe["distill"])])
        folder = drafter if number == len(stages) else str(arguments.output / f"drafter-{number}")
        steps.append(["train", "--data", answers, "--output", folder, *target, *name, *begin, *train])
        begin = ["--start-from", folder]
    for prompts in arguments.evaluate:
        for k in ("4", "7"):
            result = arguments.output / f"{Path(prompts).stem}_k{k}.json"
            options = ["--drafter", drafter, "--num-assistant-tokens", k, "--output", str(result)]
            steps.append(["evaluate_drafter", "--prompts", prompts, *options, *target, *template, *measuring])
    return steps


def recipe_of(name: str) -> dict:
    """The recipe that comes with the package under this name, or stands in this file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    try:
        recipe = read_recipe(path)
        sections = {name: type(section) for name, section in recipe.items()}
        trainings = recipe.get("train") or [None]
        if sections != {"distill": dict, "train": list, "evaluate": dict} or {*map(type, trainings)} != {dict}:
            raise ValueError(
                f"{path}: expected options under distill and evaluate, and a list of trainings under train."
            )
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return recipe


def is_done(step: list[str]) -> bool:
    """Whether a step has left what it leaves at its very end."""
    output = Path(step[step.index("--output") + 1])
    return {"distill": output / "README.md", "train": output / "training.json"}.get(step[0], output).exists()


def main(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    steps = commands(arguments)
    for step in steps:
        if is_done(step):
            continue
        print("specformer.scripts." + " ".join(step), flush=True)
        command = [sys.executable, "-m", f"specformer.scripts.{step[0]}", *step[1:]]
        process = subprocess.Popen(command, env={**KEEP_MEMORY, **os.environ})
        try:
            status = process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # every step is safe to kill
            process.wait()
            print("Time is up; run the same command again to go on.")
            return OUT_OF_TIME
        if status:
            return status
    measured = [step for step in steps if step[0] == "evaluate_drafter"]
    results = [json.loads(Path(step[step.index("--output") + 1]).read_text(encoding="utf-8")) for step in measured]
    write_model_card(arguments.output / "drafter", results)
    print(f"The drafter is in {arguments.output / 'drafter'}, with its model card.")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything; begun or gone on with")
    parser.add_argument("--evaluate", nargs="*", default=[], help="prompt files to evaluate on; never train on them")
    parser.add_argument("--target", help="folder or Hub id; default: the one of `specformer fetch`")
    parser.add_argument("--target-id", help="name of the target to record, where --target is a folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the target's own code")
    parser.add_argument("--chat-template-kwargs", metavar="JSON", help="arguments of the target's chat template")
    parser.add_argument(
        "--recipe",
        type=recipe_of,
        default="gpu" if torch.cuda.is_available() else "default",
        metavar="RECIPE",
        help="a YAML file, or one of those that come with the package: default, and gpu, which is the default on a GPU",
    )
    parser.add_argument("--minutes", type=float, help="stop after so many minutes, with status 75")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
