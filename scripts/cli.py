"""The command line: `specformer train ...`, and `python -m specformer train ...` the same.

Each command is a module of this folder, with `parse`, which reads the command line and shows --help, and `main`.
`python -m specformer.scripts.train ...` runs it as well, and is what launchers of several processes take. A module is
imported when its command is called, and only then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import typer

USE, MAKE, SHARE = "See it work", "Make a drafter for your model", "Measure and share it"
EXAMPLES = """A drafter of your own, in four commands:\n\n\b
specformer distill --target MODEL --prompts some.jsonl --output answers
  specformer train --target MODEL --data answers --output drafter
  specformer evaluate --target MODEL --drafter drafter --prompts other.jsonl
  specformer publish drafter USER/NAME
"""


class Command(NamedTuple):
    """A module of this folder, what it is called, and what it does in one line."""

    module: str
    panel: str
    help: str


COMMANDS = {
    "demo": Command("demo", USE, "Eight prompts as one batch, with the default drafter and with plain generate()."),
    "space": Command("space", USE, "The same as a page in a browser: who drafted which token, for prompts of yours."),
    "generate": Command("generate", USE, "Answer a file of prompts, drafted, with one process or several."),
    "fetch": Command("fetch_target", USE, "Bring a target to this machine: SmolLM2-135M-Instruct, or a Qwen2.5-Coder."),
    "distill": Command("distill", MAKE, "Let the target answer prompts: the training data."),
    "train": Command("train", MAKE, "Train a drafter on these answers."),
    "store": Command("store", MAKE, "Keep texts where drafters look up how a text goes on."),
    "reproduce": Command("reproduce", MAKE, "All of it by a recipe: from prompts to a drafter with its model card."),
    "evaluate": Command("evaluate_drafter", SHARE, "Tokens per target pass on real prompts, and whether texts agree."),
    "bench": Command("benchmark", SHARE, "Tokens per second, compared with plain generate() in the same process."),
    "export-card": Command("model_card", SHARE, "Write the model card from what training and evaluations left."),
    "export": Command(
        "export", SHARE, "Write a DFlash, DSpark or EAGLE-3 drafter as vLLM, SGLang or llama.cpp read it."
    ),
    "publish": Command("publish", SHARE, "Push a drafter to the Hub."),
}

app = typer.Typer(
    help="Lossless batched speculative decoding: make, measure and publish drafters. COMMAND --help has the options.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def caller_of(name: str, module: str) -> Callable[[typer.Context], None]:
    """What the command `name` does: run the module with the rest of the command line."""

    def call(context: typer.Context) -> None:
        command = import_module(f"specformer.scripts.{module}")
        sys.argv = [f"specformer {name}", *context.args]
        raise typer.Exit(command.main(command.parse()) or 0)

    return call


for name, (module, panel, text) in COMMANDS.items():
    handed_on = {"allow_extra_args": True, "ignore_unknown_options": True}  # to the module's own parser, --help too
    make = app.command(name, help=text, rich_help_panel=panel, add_help_option=False, context_settings=handed_on)
    make(caller_of(name, module))
