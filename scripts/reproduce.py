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
from specformer.scripts.prompts import read_prompts

RECIPES = {
    "gpu": {
        "distill": ["--batch-size", "768", "--max-new-tokens", "256"],
        "prompts": [(0, None)],
        "train": [
            [
                *("--epochs", "4", "--batch-size", "64", "--learning-rate", "1e-3", "--max-length", "768"),
                *("--num-draft-tokens", "8", "--default-num-assistant-tokens", "4", "--mixed-precision", "bf16"),
                *("--draft-vocab-size", "16384", "--acceptance-weights", "0.5", "--base-loss", "1"),
                *("--config", "previous_token_rank=256", "confidence_head=true"),
                *("--held-out", "512", "--evaluations", "12", "--logging-steps", "50"),
            ]
        ],
        "evaluate": ["--batch-size", "40", "--dtype", "bfloat16", "--max-new-tokens", "256"],
    },
    "cpu": {
        "distill": ["--batch-size", "96", "--max-new-tokens", "160", "--max-prompt-tokens", "128"],
        "prompts": [(0, 4000), (4000, 8500), (8500, 14000), (14000, 19500)],
        "train": [
            [
                *("--epochs", "5", "--batch-size", "8", "--learning-rate", "1.5e-3", "--max-length", "512"),
                *("--num-draft-tokens", "4", "--default-num-assistant-tokens", "2"),
                *("--draft-vocab-size", "8192", "--slot-decay", "0.8", "--store-hidden-states"),
                *("--held-out", "64", "--evaluations", "5"),
            ],
            [
                *("--epochs", "2", "--batch-size", "8", "--learning-rate", "1e-3", "--max-length", "512"),
                *("--config", "previous_token_rank=256", "confidence_head=true", "--acceptance-weights", "0.5"),
                *("--store-hidden-states", "--held-out", "64", "--evaluations", "4"),
            ],
            [
                *("--epochs", "2", "--batch-size", "8", "--learning-rate", "1e-3", "--max-length", "512"),
                *("--acceptance-weights", "0.5", "--store-hidden-states", "--held-out", "64", "--evaluations", "4"),
            ],
            [
                *("--epochs", "1", "--batch-size", "8", "--learning-rate", "1e-3", "--max-length", "512"),
                *("--acceptance-weights", "0.5", "--held-out", "64", "--evaluations", "2"),
            ],
        ],
        "evaluate": ["--batch-size", "8", "--max-new-tokens", "64"],
    },
}
"""Options of the steps. Each training has the answers to prompts of its own, and begins with the drafter of the one
before; it is left out where there are no such prompts."""
# glibc gives the memory of large tensors back to the system, which clears it before it hands it out again: half of the
# time of distilling on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "10000000000", "MALLOC_TOP_PAD_": "200000000"}
OUT_OF_TIME = 75
"""Exit status after --minutes: run the same command again."""


def commands(arguments: argparse.Namespace) -> list[list[str]]:
    """The steps, each a module of specformer.scripts and its arguments."""
    recipe = RECIPES[arguments.recipe]
    target = ["--target", arguments.target] if arguments.target else []
    target += ["--trust-remote-code"] if arguments.trust_remote_code else []
    template = ["--chat-template-kwargs", arguments.chat_template_kwargs] if arguments.chat_template_kwargs else []
    name = ["--target-id", arguments.target_id] if arguments.target_id else []
    count = len(read_prompts(arguments.prompts, recipe["prompts"][-1][1]))
    stages = [each for each in zip(recipe["prompts"], recipe["train"], strict=True) if each[0][0] < count]
    drafter, begin, steps = str(arguments.output / "drafter"), [], []
    for number, ((first, end), train) in enumerate(stages, 1):
        answers = str(arguments.output / f"answers-{number}")
        part = [*(["--skip", str(first)] if first else []), *(["--limit", str(end)] if end else [])]
        prompts = ["--prompts", arguments.prompts, *part, *template]
        steps.append(["distill", *prompts, "--output", answers, *target, *recipe["distill"]])
        folder = drafter if number == len(stages) else str(arguments.output / f"drafter-{number}")
        steps.append(["train", "--data", answers, "--output", folder, *target, *name, *begin, *train])
        begin = ["--start-from", folder]
    for prompts in arguments.evaluate:
        for k in ("4", "7"):
            result = arguments.output / f"{Path(prompts).stem}_k{k}.json"
            options = ["--drafter", drafter, "--num-assistant-tokens", k, "--output", str(result)]
            steps.append(["evaluate_drafter", "--prompts", prompts, *options, *target, *template, *recipe["evaluate"]])
    return steps


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
    parser.add_argument("--target", help="folder or Hub id; default: the one of fetch_target")
    parser.add_argument("--target-id", help="name of the target to record, where --target is a folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the target's own code")
    parser.add_argument("--chat-template-kwargs", metavar="JSON", help="arguments of the target's chat template")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes, with status 75")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
