"""Train a drafter for a causal LM on the target's own answers.

    specformer train --data answers --output runs/drafter
    specformer train recipe.yaml --learning-rate 3e-4
    accelerate launch -m specformer.scripts.train --data answers --output runs/drafter --bf16

--drafter says of which kind it is; scripts/parts/kinds/ has a file for each. --data is what `specformer distill`
wrote: what the target answered, not what somebody else wrote. The target stays frozen and its hidden states are
computed on the fly. The loss is the paper's, cross-entropy of every slot at every response position (arXiv 2511.20340,
section 3), unless options say otherwise. Run the same command again after an interruption: it goes on from the last
whole checkpoint, with the losses of a run that was left alone. The best checkpoint by tokens per target pass on
held-out answers ends up in --output, ready to be passed as assistant_model.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from specformer.generation.backend_linear import fast_linears
from specformer.scripts.model_card import write_model_card
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.kinds.all import KINDS
from specformer.scripts.parts.kinds.student import Student
from specformer.scripts.parts.losses import acceptance_weights, decaying_weights, drafter_loss
from specformer.scripts.parts.offline import evaluate_offline, summarise
from specformer.scripts.parts.provenance import provenance
from specformer.scripts.parts.runs import SETTINGS, begin_or_go_on, writing
from specformer.scripts.parts.stored_states import StoredStates, shared_file
from specformer.scripts.parts.training_arguments import OF_SOME_KINDS, DrafterTrainingArguments, parse_arguments

WHOLE = "whole"
"""Marks a checkpoint that was written to its end."""
CHECKPOINTS = "checkpoint-[0-9]*"
STATES_FILE = "hidden_states.bin"


class DrafterTrainer(Trainer):
    """The Trainer on a drafter; the frozen target stays outside of it.

    Args:
        student: the drafter's network, and how it learns.
        draft_lengths: numbers of drafted tokens to evaluate; the last one decides which checkpoint is the best.
        loss: `drafter_loss` with what it is asked for.
    """

    def __init__(self, *, student: Student, draft_lengths: list[int], loss: Callable, **kwargs):
        super().__init__(model=student.network, **kwargs)
        self.args: Any  # DrafterTrainingArguments
        self.student, self.draft_lengths, self.loss = student, draft_lengths, loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean over each micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        share, steps = self.args.position_share or 1.0, (self.state.global_step, self.state.max_steps)
        return self.student.loss(model, inputs, self.loss, share, *steps)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Offline figures over the held-out answers, each process taking its share."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        assert self.model is not None
        share = torch.utils.data.Subset(
            dataset, range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        )
        loader = torch.utils.data.DataLoader(share, self.args.per_device_eval_batch_size, collate_fn=Answers.collate)
        self.model.eval()
        sums = evaluate_offline(self.student, loader, self.draft_lengths)
        self.model.train()
        sums = self.accelerator.reduce(sums.float().to(self.args.device))
        figures = summarise(sums, self.draft_lengths)
        figures["tokens_per_pass"] = figures[f"tokens_per_pass_k{self.draft_lengths[-1]}"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model, trial):
        """Mark the checkpoint when all of it is there, and only then remove those that are neither it nor the best."""
        folder, newest = Path(self.args.output_dir or "."), f"checkpoint-{self.state.global_step}"
        with writing(folder / newest):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                (folder / newest / WHOLE).touch()
        if self.is_world_process_zero():
            for checkpoint in folder.glob(CHECKPOINTS):
                if checkpoint.name not in (newest, f"checkpoint-{self.state.best_global_step}"):
                    (checkpoint / WHOLE).unlink()
                    shutil.rmtree(checkpoint)


class EvaluateCheckpoints(TrainerCallback):
    """Every checkpoint is evaluated, the last one too, and no logged loss spans one."""

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            control.should_log = control.should_evaluate = True


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; the remains of others are removed."""
    whole = []
    for checkpoint in folder.glob(CHECKPOINTS):
        if (checkpoint / WHOLE).exists():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def minutes_between(first: Path, last: Path) -> float:
    """From the writing of one file to that of another; of an interrupted run with the pauses."""
    return (last.stat().st_mtime - first.stat().st_mtime) / 60


def peak_memory() -> int | None:
    """Most bytes that this process held, on the GPU where it has one; `None` where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make_config(arguments: DrafterTrainingArguments) -> Any:
    """The config of a new drafter; its errors come before anything is written."""
    assert arguments.target is not None  # it has been looked for
    kind = KINDS[arguments.drafter]
    for option in OF_SOME_KINDS:
        if option in arguments.given and option not in kind.means:
            able = [name for name, other in KINDS.items() if option in other.means]
            raise ValueError(
                f"--{option.replace('_', '-')} was given, which means nothing for --drafter {arguments.drafter}: it is "
                f"for {', '.join(able)}. Leave it out."
            )
    if arguments.num_draft_tokens is not None and arguments.num_draft_tokens < 1:
        raise ValueError(f"--num-draft-tokens is {arguments.num_draft_tokens}; expected at least 1.")
    target_config = AutoConfig.from_pretrained(arguments.target, trust_remote_code=arguments.trust_remote_code or None)
    return kind.make_config(arguments, target_config)


def divide(
    answers: Answers, arguments: DrafterTrainingArguments
) -> tuple[list[int], Answers | torch.utils.data.Subset]:
    """Which rows of `answers` to learn from, and what to evaluate on.

    Raises:
        ValueError: nothing would be left to learn from.
    """
    if arguments.held_out_data is not None:
        other = Answers(arguments.held_out_data, arguments.max_length)
        learnt = answers.to_other_prompts(other)
        if not learnt:
            raise ValueError(
                f"--held-out-data {arguments.held_out_data} answers all prompts that {arguments.data} answers, so that "
                "nothing is left to learn from. Expected answers to other prompts."
            )
        return learnt, other
    if len(answers) < 2:
        raise ValueError(f"{arguments.data} holds {len(answers)} answer; at least 2 are needed, one to evaluate on.")
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    held_out = max(1, min(arguments.held_out, len(answers) // 5))
    return order[held_out:], torch.utils.data.Subset(answers, order[:held_out])


def make_loss(arguments: DrafterTrainingArguments, config) -> Callable:
    """`drafter_loss` as the arguments want it; their errors come before anything is written."""
    smoothing, decay = arguments.acceptance_weights, arguments.slot_decay
    if smoothing is not None and (not 0 <= smoothing <= 1 or decay != 1):
        raise ValueError(
            f"--acceptance-weights is {smoothing} and --slot-decay {decay}; expected a number from 0 to 1, and no "
            "--slot-decay as well."
        )
    for option in ("distance_loss", "base_loss", "slot_share", "glancing"):
        share = getattr(arguments, option)
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"--{option.replace('_', '-')} is {share}; expected a number from 0 to 1.")
    KINDS[arguments.drafter].check_loss(arguments, config)
    if arguments.position_share is not None and not 0 < arguments.position_share <= 1:
        raise ValueError(f"--position-share is {arguments.position_share}; expected a share above 0, at most 1.")
    weigh = partial(decaying_weights, decay=decay)
    if smoothing is not None:
        weigh = partial(acceptance_weights, smoothing=smoothing)
    return partial(drafter_loss, weigh=weigh, distance_share=arguments.distance_loss or 0.0)


def training_of(drafter: str | None) -> dict | None:
    """How the drafter in a folder was trained, as far as it is known; without the history."""
    path = Path(drafter or "") / "training.json"
    if not drafter or not path.exists():
        return None
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != "history"}


def main(arguments: DrafterTrainingArguments) -> None:
    from specformer.scripts.fetch_target import find_target

    place, identity = find_target(arguments.target)
    if place != arguments.target:
        arguments.target, arguments.target_id = place, arguments.target_id or identity
    config, output = make_config(arguments), Path(arguments.output_dir)
    loss = make_loss(arguments, config)
    answers = Answers(arguments.data, arguments.max_length)
    learnt, held_out = divide(answers, arguments)
    set_seed(arguments.seed)
    dtype = "bfloat16" if arguments.bf16 else "float32"
    target = AutoModelForCausalLM.from_pretrained(
        arguments.target, dtype=getattr(torch, dtype), trust_remote_code=arguments.trust_remote_code or None
    )
    target = target.eval().requires_grad_(False).to(arguments.device)
    student = KINDS[arguments.drafter].make(config, target, answers, arguments)
    with arguments.main_process_first(local=False):
        settings = arguments.settings()
        settings.update(answers=len(answers), answer_tokens=answers.num_answer_tokens, processes=arguments.world_size)
        begin_or_go_on(output, json.loads(json.dumps(settings, default=str)))
        resume_from = last_whole_checkpoint(output)
    stored, shared = None, arguments.store_hidden_states
    if shared is not None:
        path = shared_file(Path(shared), answers, student) if shared else output / STATES_FILE
        stored = StoredStates(answers, student, path)
        of_same = [] if isinstance(held_out, Answers) else list(held_out.indices)
        with fast_linears(target, student.rows):
            stored.fill([*learnt, *of_same], arguments.process_index, arguments.world_size)
        PartialState().wait_for_everyone()
        held_out = torch.utils.data.Subset(stored, of_same) if of_same else held_out
    slots = student.num_draft_tokens
    trainer = DrafterTrainer(
        args=arguments,
        data_collator=Answers.collate,
        train_dataset=torch.utils.data.Subset(answers if stored is None else stored, learnt),
        eval_dataset=held_out,
        callbacks=[EvaluateCheckpoints()],
        student=student,
        draft_lengths=sorted({min(4, slots), min(7, slots), slots}),
        loss=loss,
    )
    if resume_from:
        trainer.state = TrainerState.load_from_json(str(resume_from / "trainer_state.json"))
    if not resume_from or trainer.state.global_step < trainer.state.max_steps:
        with fast_linears(target, student.rows), fast_linears(student.network, in_training=True):
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    if trainer.is_world_process_zero():
        state = trainer.state
        paths = {name: getattr(arguments, name) for name in ("data", "held_out_data", "start_from")}
        names = {name: path and Path(path).name for name, path in paths.items()}
        memory, last = peak_memory(), last_whole_checkpoint(output)
        assert last is not None  # training ends with one
        log = {
            **provenance("specformer.scripts.train"),
            "settings": {**settings, **names, "target": arguments.target_id or arguments.target},
            "parameters": sum(parameter.numel() for parameter in student.network.parameters()),
            "answers": len(learnt),
            "answer_tokens": answers.num_answer_tokens,
            "held_out_answers": len(held_out),
            "num_draft_tokens": slots,
            "steps": state.global_step,
            "minutes": minutes_between(output / SETTINGS, last / WHOLE),
            "peak_memory_gib": None if memory is None else memory / 2**30,
            "best": {"step": state.best_global_step, "tokens_per_pass": state.best_metric},
            "before": training_of(arguments.start_from),
            "history": [entry for entry in state.log_history if "train_runtime" not in entry],  # of one session only
        }
        best = student.of_checkpoint(output / f"checkpoint-{state.best_global_step}")
        best.calibrate(trainer.eval_dataset, arguments.per_device_eval_batch_size)
        with writing(output):
            best.save(output, getattr(torch, arguments.save_dtype))
            (output / "training.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
            with suppress(FileExistsError):  # a card of one's own stays
                write_model_card(output, [])
        for path in output.glob(f"{STATES_FILE}*"):
            path.unlink()
        print(f"The drafter is in {output}: {state.best_metric:.3f} tokens per target pass on held-out answers.")


def parse() -> DrafterTrainingArguments:
    return parse_arguments(__doc__)


if __name__ == "__main__":
    main(parse())
