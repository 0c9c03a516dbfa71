"""The training loss: cross-entropy of every draft slot, without ever holding all of its logits."""

from __future__ import annotations

import torch
from specformer.target_specformer import BorrowedTarget
from torch.nn import functional

IGNORED = -100


class HeadCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies through a frozen LM head, whose logits are never held for more than one chunk.

    The gradient with respect to the states is taken while each chunk's logits exist, so that plain `loss.backward()`
    needs neither the logits nor a second pass through the head.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, logits_of, chunk_size: int):
        precise = torch.promote_types(states.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=states.device)
        gradients = torch.empty_like(states)
        for start in range(0, len(states), chunk_size):
            chunk = slice(start, start + chunk_size)
            with torch.enable_grad():
                leaf = states[chunk].detach().requires_grad_()
                logits = logits_of(leaf).to(precise)
                loss = functional.cross_entropy(logits, labels[chunk], reduction="none") @ weights[chunk].to(precise)
            gradients[chunk] = torch.autograd.grad(loss, leaf)[0]
            total += loss.detach()
        ctx.save_for_backward(gradients)
        return total

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        (gradients,) = ctx.saved_tensors
        return gradients * upstream, None, None, None, None


def slot_labels(labels: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Label of slot j at position n is token n + 2 + j: (B, T) -> (B, T, D), IGNORED past the end."""
    padded = functional.pad(labels, (0, num_slots + 1), value=IGNORED)
    return torch.stack([padded[:, 2 + j : 2 + j + labels.shape[1]] for j in range(num_slots)], dim=2)


def drafter_loss(
    draft_hidden_states: torch.Tensor,
    labels: torch.Tensor,
    borrowed: BorrowedTarget,
    slot_decay: float = 1.0,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Mean cross-entropy over all labelled slots.

    Args:
        draft_hidden_states: (..., D, d).
        labels: (..., D); IGNORED ones do not count, nor tokens that are never drafted.
        slot_decay: slot j weighs slot_decay**j. 1 is the paper's loss. Less makes the first slots better, without which
            later ones are of no use.
        chunk_size: rows of logits that are held at once.
    """
    labels = borrowed.draft_labels(labels)
    kept = labels != IGNORED
    slots = torch.arange(labels.shape[-1], device=labels.device)
    weights = (slot_decay**slots).expand(labels.shape)[kept]
    dtype = borrowed.target.dtype

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        return borrowed.draft_logits(states.to(dtype))

    total = HeadCrossEntropy.apply(draft_hidden_states[kept], labels[kept], weights, logits_of, chunk_size)
    return total / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
