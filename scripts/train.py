"""Train a drafter for a causal LM on the target's own answers.

    specformer train --data answers --output runs/drafter
    specformer train recipe.yaml --learning-rate 3e-4
    accelerate launch -m specformer.scripts.train --data answers --output runs/drafter --bf16

--data is what `specformer distill` wrote: what the target answered, not what somebody else wrote. The target
stays frozen and its hidden states are computed on the fly. The loss is the paper's, cross-entropy of every slot at
every response position (arXiv 2511.20340, section 3), unless options say otherwise. Run the same command again after
an interruption: it goes on from the last whole checkpoint, with the losses of a run that was left alone. The best
checkpoint by tokens per target pass on held-out answers ends up in --output, ready for AutoModel.from_pretrained.
"""

from __future__ import annotations

import inspect
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

from specformer.configuration_specformer import SpecFormerConfig
from specformer.generation.backend_linear import fast_linears
from specformer.modeling_specformer import SpecFormerModel
from specformer.scripts.model_card import write_model_card
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.confidence import calibrate, confidence_loss
from specformer.scripts.parts.losses import acceptance_weights, base_share, decaying_weights, drafter_loss
from specformer.scripts.parts.offline import confidences, drafter_config, drafts_of_text, evaluate_offline, summarise
from specformer.scripts.parts.provenance import provenance
from specformer.scripts.parts.runs import SETTINGS, begin_or_go_on, writing
from specformer.scripts.parts.stored_states import StoredStates, shared_file
from specformer.scripts.parts.training_arguments import DrafterTrainingArguments, parse_arguments
from specformer.target_specformer import BorrowedTarget

WHOLE = "whole"
"""Marks a checkpoint that was written to its end."""
CHECKPOINTS = "checkpoint-[0-9]*"
STATES_FILE = "hidden_states.bin"
CONFIDENCE_EVERY = 4
"""Positions, of which one teaches the confidence head, which is small. Each takes another pass of the LM head."""


class DrafterTrainer(Trainer):
    """The Trainer on a drafter; the frozen target stays outside of it.

    Args:
        borrowed: the target.
        draft_lengths: numbers of drafted tokens to evaluate; the last one decides which checkpoint is the best.
        loss: `drafter_loss` with what it is asked for.
        base_loss: see `base_share`.
    """

    def __init__(
        self, *args, borrowed: BorrowedTarget, draft_lengths: list[int], loss: Callable, base_loss: float, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.args: Any  # DrafterTrainingArguments
        self.borrowed, self.draft_lengths, self.loss, self.base_loss = borrowed, draft_lengths, loss, base_loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean over each micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        drafts = drafts_of_text(model, self.borrowed, inputs, self.args.position_share or 1.0)
        loss_of = partial(self.loss, labels=drafts.labels, borrowed=self.borrowed, verifiers=drafts.verifiers)
        loss = loss_of(drafts.states)
        # of the Trainer's own count of steps, which goes on where it was
        if share := base_share(self.base_loss, self.state.global_step, self.state.max_steps):
            loss = (1 - share) * loss + share * loss_of(drafts.first_states)
        if drafter_config(model).confidence_head:
            loss = loss + confidence_loss(*confidences(model, drafts, self.borrowed, CONFIDENCE_EVERY))
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Offline figures over the held-out answers, each process taking its share."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        assert self.model is not None
        share = torch.utils.data.Subset(
            dataset, range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        )
        loader = torch.utils.data.DataLoader(share, self.args.per_device_eval_batch_size, collate_fn=Answers.collate)
        self.model.eval()
        sums = evaluate_offline(self.model, self.borrowed, loader, self.draft_lengths)
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


def make_config(arguments: DrafterTrainingArguments) -> SpecFormerConfig:
    """The config of a new drafter; its errors come before anything is written."""
    overrides = {
        key: getattr(arguments, key)
        for key in ("num_draft_tokens", "default_num_assistant_tokens", "draft_vocab_size")
        if getattr(arguments, key) is not None
    }
    assert arguments.target is not None  # it has been looked for
    target_config = AutoConfig.from_pretrained(arguments.target, trust_remote_code=arguments.trust_remote_code or None)
    if (arguments.draft_vocab_size or 0) >= target_config.get_text_config(decoder=True).vocab_size:
        del overrides["draft_vocab_size"]  # all of them are drafted: a recipe suits small vocabularies too
    for setting in arguments.config:
        field, _, value = setting.partition("=")
        if field not in inspect.signature(SpecFormerConfig).parameters or field == "kwargs":
            raise ValueError(f"--config {setting}: {field!r} is no field of SpecFormerConfig.")
        try:
            overrides[field] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--config {setting}: expected FIELD=VALUE with a JSON value, as in a=3 b=true."
            ) from error
    overrides["target_name_or_path"] = arguments.target_id or arguments.target
    if arguments.start_from:
        if arguments.paper:
            raise ValueError("--paper and --start-from were both given; the fields of --start-from stay what they are.")
        fields, _ = SpecFormerConfig.get_config_dict(arguments.start_from)
        fields.pop("dtype", None)  # of its file
        return SpecFormerConfig(**{**fields, **overrides})
    make = SpecFormerConfig.paper if arguments.paper else SpecFormerConfig.from_target_config
    return make(target_config, **overrides)


def make_loss(arguments: DrafterTrainingArguments, config: SpecFormerConfig) -> Callable:
    """`drafter_loss` as the arguments want it; their errors come before anything is written."""
    smoothing, decay = arguments.acceptance_weights, arguments.slot_decay
    if smoothing is not None and (not 0 <= smoothing <= 1 or decay != 1):
        raise ValueError(
            f"--acceptance-weights is {smoothing} and --slot-decay {decay}; expected a number from 0 to 1, and no "
            "--slot-decay as well."
        )
    for option, share in {"--distance-loss": arguments.distance_loss, "--base-loss": arguments.base_loss}.items():
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{option} is {share}; expected a number from 0 to 1.")
    if arguments.distance_loss and not config.reads_last_states:
        raise ValueError(
            f"--distance-loss is {arguments.distance_loss} and target_layer_ids {config.target_layer_ids}; expected "
            f"{config.target_num_hidden_layers} among these, the states that the target's distribution comes from."
        )
    if arguments.base_loss and config.previous_token_rank is None:
        raise ValueError(
            f"--base-loss is {arguments.base_loss} and previous_token_rank null; expected --config "
            "previous_token_rank=256 or the like as well: the base is what that corrects."
        )
    if arguments.position_share is not None and not 0 < arguments.position_share <= 1:
        raise ValueError(f"--position-share is {arguments.position_share}; expected a share above 0, at most 1.")
    weigh = partial(decaying_weights, decay=decay)
    if smoothing is not None:
        weigh = partial(acceptance_weights, smoothing=smoothing)
    return partial(drafter_loss, weigh=weigh, distance_share=arguments.distance_loss or 0.0)


def make_drafter(config: SpecFormerConfig, target, answers: Answers, start_from: str | None = None) -> SpecFormerModel:
    """A new drafter with the target's final norm, which drafts the most frequent tokens of the answers; or one that
    goes on from the weights of another, and where it has more than that one, begins there as a new one.

    Raises:
        ValueError: what the other one has does not fit.
    """
    drafter = SpecFormerModel(config)
    drafter.init_from_target(target)
    if start_from:
        other = SpecFormerModel.from_pretrained(start_from, dtype=torch.float32)
        other.borrow(target)  # refuses the drafter of another target
        own, learnt = drafter.state_dict(), other.state_dict()
        if misfits := [name for name in learnt if name not in own or own[name].shape != learnt[name].shape]:
            raise ValueError(
                f"--start-from {start_from}: {', '.join(misfits)} do not fit the drafter that is asked for. Leave out "
                "the options that change these, or --start-from."
            )
        drafter.load_state_dict(learnt, strict=False)
        if "draft_token_ids" in learnt:
            return drafter
    if drafter.draft_token_ids is not None:
        drafter.choose_draft_tokens(answers.token_counts(drafter.config.vocab_size))
    return drafter


@torch.no_grad()
def calibrate_drafter(drafter: SpecFormerModel, borrowed: BorrowedTarget, answers, batch_size: int) -> None:
    """Fit the drafter's confidences to what it gets right on `answers`."""
    outcomes = []
    for batch in torch.utils.data.DataLoader(answers, batch_size, collate_fn=Answers.collate):
        batch = {name: values.to(borrowed.device) for name, values in batch.items()}
        drafts = drafts_of_text(drafter, borrowed, batch)
        outcomes.append(confidences(drafter, drafts, borrowed))
    calibrate(drafter.confidence_head, outcomes)


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
    held_out = max(1, min(arguments.held_out, len(answers) // 5))
    if len(answers) < 2:
        raise ValueError(f"{arguments.data} holds {len(answers)} answer; at least 2 are needed, one to evaluate on.")
    set_seed(arguments.seed)
    dtype = "bfloat16" if arguments.bf16 else "float32"
    target = AutoModelForCausalLM.from_pretrained(
        arguments.target, dtype=getattr(torch, dtype), trust_remote_code=arguments.trust_remote_code or None
    )
    target = target.eval().requires_grad_(False).to(arguments.device)
    drafter = make_drafter(config, target, answers, arguments.start_from)
    borrowed = drafter.borrow(target)
    with arguments.main_process_first(local=False):
        settings = arguments.settings()
        settings.update(answers=len(answers), answer_tokens=answers.num_answer_tokens, processes=arguments.world_size)
        begin_or_go_on(output, json.loads(json.dumps(settings, default=str)))
        resume_from = last_whole_checkpoint(output)
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    stored, shared = None, arguments.store_hidden_states
    if shared is not None:
        path = shared_file(Path(shared), answers, borrowed) if shared else output / STATES_FILE
        stored = StoredStates(answers, borrowed, path)
    slots = drafter.config.num_draft_tokens
    trainer = DrafterTrainer(
        model=drafter,
        args=arguments,
        data_collator=Answers.collate,
        train_dataset=torch.utils.data.Subset(answers if stored is None else stored, order[held_out:]),
        eval_dataset=torch.utils.data.Subset(answers, order[:held_out]),
        callbacks=[EvaluateCheckpoints()],
        borrowed=borrowed,
        draft_lengths=sorted({min(4, slots), min(7, slots), slots}),
        loss=loss,
        base_loss=arguments.base_loss or 0.0,
    )
    if resume_from:
        trainer.state = TrainerState.load_from_json(str(resume_from / "trainer_state.json"))
    if not resume_from or trainer.state.global_step < trainer.state.max_steps:
        with fast_linears(target, borrowed.rows), fast_linears(drafter, in_training=True):
            if stored is not None:
                stored.fill(order[held_out:], arguments.process_index, arguments.world_size)
                PartialState().wait_for_everyone()
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    if trainer.is_world_process_zero():
        state = trainer.state
        names = {"data": arguments.data.name, "start_from": arguments.start_from and Path(arguments.start_from).name}
        memory, last = peak_memory(), last_whole_checkpoint(output)
        assert last is not None  # training ends with one
        log = {
            **provenance("specformer.scripts.train"),
            "settings": {**settings, **names, "target": config.target_name_or_path},
            "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
            "answers": len(answers) - held_out,
            "answer_tokens": answers.num_answer_tokens,
            "held_out_answers": held_out,
            "steps": state.global_step,
            "minutes": minutes_between(output / SETTINGS, last / WHOLE),
            "peak_memory_gib": None if memory is None else memory / 2**30,
            "best": {"step": state.best_global_step, "tokens_per_pass": state.best_metric},
            "before": training_of(arguments.start_from),
            "history": [entry for entry in state.log_history if "train_runtime" not in entry],  # of one session only
        }
        best = SpecFormerModel.from_pretrained(output / f"checkpoint-{state.best_global_step}", dtype=torch.float32)
        if config.confidence_head:
            with fast_linears(target, best.to(arguments.device), borrowed.rows):
                calibrate_drafter(best, borrowed, trainer.eval_dataset, arguments.per_device_eval_batch_size)
        with writing(output):
            best.to(getattr(torch, arguments.save_dtype)).save_pretrained(output)
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
