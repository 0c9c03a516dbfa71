"""Train a drafter for a causal LM on the target's own answers.

    python -m specformer.scripts.train --data answers.jsonl --output runs/drafter

Each line of --data is {"prompt_ids": [...], "response_ids": [...]}, tokens of the target: what it answered, not what
somebody else wrote. The target stays frozen and its hidden states are computed on the fly. The loss is the paper's:
cross-entropy of every slot at every response position (arXiv 2511.20340, section 3).

A first, simple trainer on accelerate: one run from start to end, saved after every epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from specformer.configuration_specformer import SpecFormerConfig
from specformer.modeling_specformer import BorrowedTarget, SpecFormerModel
from specformer.scripts.provenance import provenance
from torch import nn
from torch.nn import functional

IGNORED = -100


class HeadCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies through a frozen LM head, whose logits are never held for more than one chunk.

    The gradient with respect to the states is taken while each chunk's logits exist, so that plain `loss.backward()`
    needs neither the logits nor a second pass through the head.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, labels: torch.Tensor, logits_of, chunk_size: int) -> torch.Tensor:
        precise = torch.promote_types(states.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=states.device)
        gradients = torch.empty_like(states)
        for start in range(0, len(states), chunk_size):
            with torch.enable_grad():
                chunk = states[start : start + chunk_size].detach().requires_grad_()
                logits = logits_of(chunk).to(precise)
                loss = functional.cross_entropy(logits, labels[start : start + chunk_size], reduction="sum")
            gradients[start : start + chunk_size] = torch.autograd.grad(loss, chunk)[0]
            total += loss.detach()
        ctx.save_for_backward(gradients)
        return total

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        (gradients,) = ctx.saved_tensors
        return gradients * upstream, None, None, None


def slot_labels(labels: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Label of slot j at position n is token n + 2 + j: (B, T) -> (B, T, D), IGNORED past the end."""
    padded = functional.pad(labels, (0, num_slots + 1), value=IGNORED)
    return torch.stack([padded[:, 2 + j : 2 + j + labels.shape[1]] for j in range(num_slots)], dim=2)


def drafter_loss(
    draft_hidden_states: torch.Tensor, labels: torch.Tensor, borrowed: BorrowedTarget, chunk_size: int = 512
) -> torch.Tensor:
    """Mean cross-entropy over all labelled slots. `draft_hidden_states` (B, T, D, d), `labels` (B, T, D)."""
    kept = labels != IGNORED
    count = kept.sum().clamp(min=1)
    return HeadCrossEntropy.apply(draft_hidden_states[kept], labels[kept], borrowed.logits, chunk_size) / count


class Answers(torch.utils.data.Dataset):
    """Prompts and answers as token ids; the labels cover the answers only."""

    def __init__(self, path: Path, max_length: int):
        self.rows = []
        with open(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    prompt, response = row["prompt_ids"], row["response_ids"]
                    if not all(
                        isinstance(ids, list) and all(type(i) is int for i in ids) for ids in (prompt, response)
                    ):
                        raise TypeError("token ids are lists of integers")
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number}: expected {{'prompt_ids': [...], 'response_ids': [...]}}, got "
                        f"{line[:80]!r} ({type(error).__name__}: {error})."
                    ) from error
                if response:
                    tokens, labels = prompt + response, [IGNORED] * len(prompt) + response
                    self.rows.append((tokens[:max_length], labels[:max_length]))
        if not self.rows:
            raise ValueError(f"{path} holds no answers.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index]

    @staticmethod
    def collate(rows) -> dict[str, torch.Tensor]:
        """Right-pad to the longest row: causal attention never lets padding reach a real position."""
        width = max(len(tokens) for tokens, _ in rows)

        def stack(lists, fill):
            return torch.tensor([[*values, *[fill] * (width - len(values))] for values in lists])

        return {
            "input_ids": stack([tokens for tokens, _ in rows], 0),
            "labels": stack([labels for _, labels in rows], IGNORED),
            "attention_mask": stack([[1] * len(tokens) for tokens, _ in rows], 0),
        }


def teacher_forced_states(drafter: nn.Module, borrowed: BorrowedTarget, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Drafts of every position from one pass of the target over whole texts: (B, T, D, d)."""
    with torch.no_grad(), borrowed:
        borrowed.target.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        hidden_states = borrowed.take_hidden_states()
    anchors = None
    if drafter_config(drafter).use_anchor_token:
        with torch.no_grad():
            anchors = borrowed.embed(functional.pad(batch["input_ids"][:, 1:], (0, 1)))
    return drafter(hidden_states, anchors).draft_hidden_states


def drafter_config(drafter: nn.Module) -> SpecFormerConfig:
    return getattr(drafter, "module", drafter).config


@torch.no_grad()
def slot_accuracy(drafter: nn.Module, borrowed: BorrowedTarget, loader) -> tuple[float, list[float]]:
    """Mean loss, and the share of positions at which each slot's first choice is the label, over `loader`."""
    slots = drafter_config(drafter).num_draft_tokens
    hits, counts, loss, batches = torch.zeros(slots), torch.zeros(slots), 0.0, 0
    for batch in loader:
        states, labels = teacher_forced_states(drafter, borrowed, batch), slot_labels(batch["labels"], slots)
        loss, batches = loss + float(drafter_loss(states, labels, borrowed)), batches + 1
        for slot in range(slots):
            kept = labels[..., slot] != IGNORED
            choices = borrowed.logits(states[..., slot, :][kept]).argmax(-1)
            hits[slot] += (choices == labels[..., slot][kept]).sum().cpu()
            counts[slot] += kept.sum().cpu()
    return loss / batches, (hits / counts.clamp(min=1)).tolist()


def main(arguments: argparse.Namespace) -> None:
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from specformer.scripts.fetch_target import fetch_target
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    if arguments.output.exists() and not (arguments.output / "training.json").exists():
        raise FileExistsError(
            f"{arguments.output} exists and is not a drafter that this script made; name another folder."
        )
    set_seed(arguments.seed)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    name = arguments.target or str(fetch_target())
    target = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
    target.to(accelerator.device)

    # ---- the drafter
    overrides = {
        key: getattr(arguments, key)
        for key in ("num_draft_tokens", "intermediate_size", "default_num_assistant_tokens")
        if getattr(arguments, key) is not None
    }
    overrides["target_name_or_path"] = arguments.target_id or name
    make = SpecFormerConfig.paper if arguments.paper else SpecFormerConfig.from_target_config
    drafter = SpecFormerModel(make(target.config, **overrides))
    drafter.init_from_target(target)
    borrowed = drafter.borrow(target)

    # ---- data: the last rows are held out
    answers = Answers(arguments.data, arguments.max_length)
    held_out = min(arguments.held_out, len(answers) // 5)
    train_set = torch.utils.data.Subset(answers, range(len(answers) - held_out))
    eval_set = torch.utils.data.Subset(answers, range(len(answers) - held_out, len(answers)))
    train_loader = torch.utils.data.DataLoader(
        train_set, batch_size=arguments.batch_size, shuffle=True, collate_fn=Answers.collate
    )
    eval_loader = torch.utils.data.DataLoader(eval_set, batch_size=arguments.batch_size, collate_fn=Answers.collate)

    # ---- optimisation
    decayed = [parameter for parameter in drafter.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in drafter.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
    )
    steps = arguments.epochs * math.ceil(len(train_set) / arguments.batch_size / accelerator.num_processes)
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 25), steps)
    drafter, optimizer, train_loader, eval_loader = accelerator.prepare(drafter, optimizer, train_loader, eval_loader)

    log = {
        **provenance("specformer.scripts.train"),
        "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
        "answer_tokens": sum(sum(label != IGNORED for label in labels) for _, labels in train_set),
        "epochs": [],
    }
    started = time.monotonic()
    progress = tqdm(total=steps, disable=not accelerator.is_local_main_process, unit="step")
    for epoch in range(arguments.epochs):
        drafter.train()
        running = None
        for batch in train_loader:
            states = teacher_forced_states(drafter, borrowed, batch)
            labels = slot_labels(batch["labels"], drafter_config(drafter).num_draft_tokens)
            loss = drafter_loss(states, labels, borrowed)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(drafter.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            value = float(loss.detach())
            running = value if running is None else 0.95 * running + 0.05 * value
            progress.set_postfix(loss=f"{running:.3f}", refresh=False)
            progress.update()
        drafter.eval()
        eval_loss, accuracy = slot_accuracy(drafter, borrowed, eval_loader) if held_out else (None, None)
        log["epochs"].append(
            {
                "epoch": epoch + 1,
                "train_loss": running,
                "held_out_loss": eval_loss,
                "held_out_accuracy_per_slot": accuracy,
                "minutes": (time.monotonic() - started) / 60,
            }
        )
        if accelerator.is_main_process:
            progress.write(json.dumps(log["epochs"][-1]))
            save(accelerator.unwrap_model(drafter), arguments.output, arguments.save_dtype, log)
    progress.close()


def save(drafter: SpecFormerModel, folder: Path, dtype: str, log: dict) -> None:
    """Write a loadable folder; the one of the last epoch is there until the new one is whole."""
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    stored = SpecFormerModel(drafter.config).to(getattr(torch, dtype))
    stored.load_state_dict(drafter.state_dict())
    stored.save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps(log, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="jsonl of prompt_ids and response_ids")
    parser.add_argument("--output", type=Path, required=True, help="folder for the drafter; replaced")
    parser.add_argument("--target", help="folder or Hub id of the target; default: the one of fetch_target")
    parser.add_argument("--target-id", help="name of the target to record, where --target is a folder")
    parser.add_argument("--paper", action="store_true", help="the paper's inputs: no anchor token")
    parser.add_argument("--num-draft-tokens", type=int)
    parser.add_argument("--default-num-assistant-tokens", type=int)
    parser.add_argument("--intermediate-size", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4, help="texts per step and process")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=32, help="texts kept for evaluation")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--save-dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
