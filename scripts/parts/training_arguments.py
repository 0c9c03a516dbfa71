"""The arguments of `specformer train`: those of transformers' Trainer, and what belongs to drafters."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from specformer.scripts.parts.recipes import options_of, read_recipe

RENAMED = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
}
"""Arguments that options and settings know by shorter names."""
OF_THIS_CALL = ("output_dir", "report_to", "run_name", "disable_tqdm", "use_cpu", "local_rank", "debug")
OF_THIS_CALL_PREFIXES = ("log", "trackio_", "dataloader_", "ddp_", "include_")
"""What may change when a run is gone on with."""


def option(help: str, **more) -> Any:
    """A field with what its option says; `more` is of `dataclasses.field`, or of `add_argument`."""
    given = {name: more.pop(name) for name in ("default", "default_factory") if name in more}
    return field(metadata={"help": help, **more}, **given)


def decided(value: Any) -> Any:
    """A field that `DrafterTrainer` depends on, and that is no option."""
    return field(init=False, default=value)


OF_SOME_KINDS = (
    *("paper", "default_num_assistant_tokens", "draft_vocab_size", "distance_loss", "base_loss", "slot_share"),
    *("glancing", "store_hidden_states", "gradient_checkpointing", "activation_checkpointing", "fsdp", "deepspeed"),
)
"""Options that do not mean something for every kind of drafter. Newer versions of transformers call gradient
checkpointing activation checkpointing."""
UNREAD = (
    *("label_smoothing_factor", "neftune_noise_alpha", "use_liger_kernel", "liger_kernel_config", "use_cache"),
    *("eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "prediction_loss_only"),
    *("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "train_sampling_strategy", "length_column_name"),
    *("do_train", "do_eval", "do_predict", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo"),
    *("hub_strategy", "hub_always_push", "hub_revision"),
)
"""Arguments of the Trainer that would change nothing here, or break the choice of a checkpoint."""
OTHERS = """All others of transformers' TrainingArguments are options as well, as far as they have a meaning here:
--deepspeed, --fsdp, --torch-compile, --optim and so on. An underscore is as good as a hyphen."""
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", string_to_bool: "true|false"}


@dataclass(kw_only=True)
class DrafterTrainingArguments(TrainingArguments):
    """`TrainingArguments` of a drafter, with its defaults.

    Raises:
        ValueError: there is no evaluation, by which the best checkpoint is chosen; or an argument of the Trainer was
            given that would change nothing.
    """

    data: Path = field(metadata={"help": "folder of `specformer distill`, or a jsonl file"})
    output_dir: str = option("folder for the drafter; begun or gone on with", aliases=["--output"])
    target: str | None = option("folder or Hub id of the target; default: the one of `specformer fetch`", default=None)
    target_id: str | None = option("name of the target to record, where --target is a folder", default=None)
    trust_remote_code: bool = option("run the target's own code", default=False)
    drafter: Literal["specformer", "dflash", "eagle3", "falcon", "pard", "parallelspec"] = option(
        "kind of the drafter; see docs/drafters.md", default="specformer"
    )
    start_from: str | None = option(
        "folder or Hub id of a drafter of that kind whose weights to begin with; of pard, of a causal LM", default=None
    )

    paper: bool = option("the paper's inputs: no anchor token", default=False)
    num_draft_tokens: int | None = option("slots of the drafter", default=None)
    default_num_assistant_tokens: int | None = option("how many tokens to draft unless asked", default=None)
    draft_vocab_size: int | None = option(
        "draft only so many tokens at most, the most frequent of --data", default=None
    )
    config: list[str] = field(
        default_factory=list,
        metadata={"help": "fields of the drafter's config, as JSON", "metavar": "FIELD=VALUE"},
    )

    slot_decay: float = option("slot j weighs slot_decay**j in the loss", default=1.0)
    acceptance_weights: float | None = option(
        "weigh slots by what they contribute to accepted drafts instead (D-PACE; 0.5 is its authors' smoothing)",
        default=None,
        metavar="SMOOTHING",
    )
    distance_loss: float | None = option(
        "share of each slot's loss that is the distance from the target's distribution, half the sum of |p - q| "
        "(0.9 is DSpark's), not the cross-entropy",
        default=None,
        metavar="SHARE",
    )
    base_loss: float | None = option(
        "with previous_token_rank: share of the loss that is of drafts before they are corrected, falling to 0 over "
        "the first half of the steps (Domino's curriculum, from 1)",
        default=None,
        metavar="SHARE",
    )

    position_share: float | None = option(
        "learn from a random share of each text's positions in every step, for less time", default=None, metavar="SHARE"
    )
    slot_share: float | None = option(
        "of pard: share of the positions whose second slot is learnt, of which the same share has a third one, and so "
        "on, never less than 0.2 (default: 0.7)",
        default=None,
        metavar="SHARE",
    )
    glancing: float | None = option(
        "of falcon: the true tokens that are shown to it in the first step, as a share of those that it got wrong, "
        "falling to none in the last (default: 0.4; 0: it learns behind true tokens alone, as eagle3 does)",
        default=None,
        metavar="SHARE",
    )
    max_length: int = option("tokens of a text; what is longer is cut", default=1024)
    held_out: int = option("texts kept for evaluation, a fifth of all at most", default=64)
    held_out_data: Path | None = field(
        default=None,
        metadata={
            "help": "other answers to evaluate on, in place of some of --data; those of --data to the same prompts are "
            "not learnt",
            "metavar": "DATA",
        },
    )
    evaluations: int = option("evaluations and checkpoints, evenly over the run", default=10)
    save_dtype: Literal["float32", "bfloat16"] = option("of the drafter's weights in the end", default="bfloat16")
    store_hidden_states: str | None = option(
        "read every answer with the target once and keep that in a file, for small runs on a CPU: in --output until "
        "the run ends, or in FOLDER for other runs too",
        default=None,
        nargs="?",
        const="",
        metavar="FOLDER",
    )

    num_train_epochs: float = option("passes over the texts", default=3.0, aliases=["--epochs"])
    per_device_train_batch_size: int = option("texts per step and process", default=8, aliases=["--batch-size"])
    per_device_eval_batch_size: int = option("as many as in training by default", default=None)
    gradient_accumulation_steps: int = option("micro-batches per step", default=1, aliases=["--accumulation"])
    learning_rate: float = option("the highest, after the warm-up", default=1e-3)
    lr_scheduler_type: str = option("how it falls", default="cosine")
    warmup_steps: float = option("steps in which it rises, or below 1 their share", default=0.04)
    weight_decay: float = option("of AdamW", default=0.01)
    adam_beta2: float = option("of AdamW", default=0.95)
    max_grad_norm: float = option("longer gradients are cut to this", default=1.0)
    bf16: bool = option("mixed precision, with the target in bfloat16", default=False)
    seed: int = option("of the weights, of their order, and of what is held out", default=0)
    logging_steps: float = option("steps between two logged losses", default=10)
    report_to: str | None = option("tracker of the Trainer: tensorboard, wandb, ...", default="none")

    save_strategy: str = decided("steps")
    save_steps: float = decided(0.0)  # by `evaluations`
    save_only_model: bool = decided(False)
    save_total_limit: int | None = decided(None)
    eval_strategy: str = decided("no")  # with every checkpoint, see EvaluateCheckpoints
    metric_for_best_model: str = decided("eval_tokens_per_pass")
    greater_is_better: bool = decided(True)
    load_best_model_at_end: bool = decided(False)
    resume_from_checkpoint: str | None = decided(None)
    remove_unused_columns: bool = decided(False)
    label_names: list[str] | None = field(init=False, default=None)
    ddp_find_unused_parameters: bool = decided(False)  # the confidence head is used, but after the forward pass

    def __post_init__(self):
        if self.evaluations < 1:
            raise ValueError(f"--evaluations is {self.evaluations}; at least 1 is needed, to choose a checkpoint.")
        given = self._given()
        if unread := [name for name in UNREAD if name in given]:
            raise ValueError(
                f"{', '.join(unread)}: expected none of these, which change nothing in the training of a drafter. Its "
                "loss, its evaluation and its data are those that `specformer train --help` tells of."
            )
        self.given = {*given, *(["store_hidden_states"] if self.store_hidden_states is not None else [])}
        named = (*self.own_names(), "bf16", "fp16", *OF_THIS_CALL)
        free = [name for name in given if name in named or name.startswith(OF_THIS_CALL_PREFIXES)]
        self.others = {name: value for name, value in given.items() if name not in free}
        self.save_steps = min(1 / self.evaluations, 1 - 1e-9)  # a share of all steps; 1 would mean every step
        self.label_names = ["labels"]
        # unsaid, several processes would not know of each other on a CPU
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        super().__post_init__()

    def _given(self) -> dict[str, Any]:
        """Arguments that are not as they are by default."""
        values = {each.name: (getattr(self, each.name), each.default) for each in dataclasses.fields(self) if each.init}
        return {name: value for name, (value, default) in values.items() if (value or None) != (default or None)}

    @classmethod
    def own_names(cls) -> list[str]:
        """Arguments that settings name one by one."""
        inherited = {each.name for each in dataclasses.fields(TrainingArguments)} - {"learning_rate", "seed"}
        own = [each.name for each in dataclasses.fields(cls) if each.name not in inherited]
        return [*own, *RENAMED]

    def settings(self) -> dict[str, Any]:
        """What decides about the run, for `begin_or_go_on`. Other arguments of the Trainer stand together, as None
        where there are none."""
        settings = {RENAMED.get(name, name): getattr(self, name) for name in self.own_names()}
        settings["mixed_precision"] = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        settings["drafter"] = None if self.drafter == "specformer" else self.drafter
        settings["trust_remote_code"] = self.trust_remote_code or None
        settings["store_hidden_states"] = self.store_hidden_states is not None
        return {**settings, "other_arguments": self.others or None}


def make_parser(description: str) -> HfArgumentParser:
    """Shows the arguments of `DrafterTrainingArguments` alone, and takes all others of `TrainingArguments` as well."""
    parser = HfArgumentParser(
        DrafterTrainingArguments,  # type: ignore[arg-type]  # annotated as a class that does not exist
        usage="%(prog)s [RECIPE.yaml] --data DATA --output OUTPUT [options]",
        description=description,
        epilog=OTHERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    shown = ["help", *DrafterTrainingArguments.__annotations__]
    for action in parser._actions:
        if action.dest not in shown:
            action.help = argparse.SUPPRESS
        elif action.dest != "help":
            action.option_strings = [name for name in action.option_strings if "_" not in name]
            action.metavar = action.metavar or METAVARS.get(action.type)
            if action.default not in (None, False, []) and not action.required:
                action.help = f"{action.help} (default: {action.default})"
    parser._optionals._group_actions.sort(key=lambda action: action.dest in shown and shown.index(action.dest))
    return parser


def parse_arguments(description: str) -> DrafterTrainingArguments:
    """Those of the command line, after those of the recipe that it begins with."""
    parser, given = make_parser(description), sys.argv[1:]
    if sum(word.partition("=")[0] == "--config" for word in given) > 1:  # only the last one would count
        parser.error("--config was given more than once; name all fields behind one: --config FIELD=VALUE FIELD=VALUE")
    if given and given[0].endswith((".yaml", ".yml")):
        try:
            recipe = read_recipe(Path(given.pop(0)))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        given = [*options_of(recipe), *given]
    arguments, unknown = parser.parse_args_into_dataclasses(
        given, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments
