"""The training loss: cross-entropy of every draft slot, without ever holding all of its logits."""

from __future__ import annotations

import torch
from specformer.modeling_specformer import BorrowedTarget
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
    draft_hidden_states: torch.Tensor, labels: torch.Tensor, borrowed: BorrowedTarget, chunk_size: int = 1024
) -> torch.Tensor:
    """Mean cross-entropy over all labelled slots. `draft_hidden_states` (B, T, D, d), `labels` (B, T, D)."""
    kept = labels != IGNORED
    count = kept.sum().clamp(min=1)
    dtype = borrowed.target.dtype

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        return borrowed.logits(states.to(dtype))

    return HeadCrossEntropy.apply(draft_hidden_states[kept], labels[kept], logits_of, chunk_size) / count
