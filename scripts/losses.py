"""The training loss: cross-entropy of every draft slot, without ever holding all of its logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from specformer.target_specformer import BorrowedTarget
from torch.nn import functional

IGNORED = -100


def decaying_weights(losses: torch.Tensor, decay: float = 1.0) -> torch.Tensor:
    """Slot j weighs decay**j: 1 is the paper's loss, and less makes the first slots better, without which later ones
    are of no use. Losses (N, D) -> weights (N, D)."""
    return (decay ** torch.arange(losses.shape[1], device=losses.device, dtype=losses.dtype)).expand(losses.shape)


def acceptance_weights(losses: torch.Tensor, smoothing: float = 0.5) -> torch.Tensor:
    """What a slot contributes to the expected number of accepted drafts (D-PACE, arXiv 2605.18810): the chance that all
    slots up to some slot from this one on are right, summed over these slots.

    Args:
        losses: (N, D), infinite where nothing can be right.
        smoothing: from 0 to 1, how far chances are taken to be higher than they are, without which nothing behind a
            slot that is mostly wrong would be learnt. 1 weighs by how many slots follow.
    """
    chances = smoothing + (1 - smoothing) * (-losses).exp()
    reached = chances.cumprod(dim=1).masked_fill(losses.isinf(), 0)
    return reached.flip(1).cumsum(dim=1).flip(1)


class HeadCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies through a frozen LM head, and the sum of the weights. The logits are never held
    for more than one chunk.

    The gradient with respect to the states is taken while each chunk's logits exist, so that plain `loss.backward()`
    needs neither the logits nor a second pass through the head. Weights are taken as constants.

    Args:
        states: (N, D, d).
        labels: (N, D); IGNORED ones have an infinite loss and no weight.
        weigh: from losses (n, D) of some positions to weights (n, D).
        logits_of: the head.
        chunk_size: slots whose logits are held at once.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, labels: torch.Tensor, weigh: Callable, logits_of: Callable, chunk_size: int):
        precise = torch.promote_types(states.dtype, torch.float32)
        total, weight = (torch.zeros((), dtype=precise, device=states.device) for _ in range(2))
        gradients = torch.zeros_like(states)
        step = max(1, chunk_size // labels.shape[1])
        for start in range(0, len(states), step):
            chunk = slice(start, start + step)
            kept = labels[chunk] != IGNORED
            with torch.enable_grad():
                leaf = states[chunk][kept].detach().requires_grad_()  # (M, d)
                losses = functional.cross_entropy(logits_of(leaf).to(precise), labels[chunk][kept], reduction="none")
                table = losses.new_full(kept.shape, torch.inf).masked_scatter(kept, losses.detach())
                weights = weigh(table)[kept]
                loss = losses @ weights
            gradients[chunk][kept] = torch.autograd.grad(loss, leaf)[0]
            total += loss.detach()
            weight += weights.sum()
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(weight)
        return total, weight

    @staticmethod
    def backward(ctx, upstream: torch.Tensor, _):
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
    weigh: Callable[[torch.Tensor], torch.Tensor] = decaying_weights,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Weighted mean of the cross-entropies of all labelled slots.

    Args:
        draft_hidden_states: (..., D, d).
        labels: (..., D); IGNORED ones do not count, nor tokens that are never drafted.
        weigh: what a slot weighs, such as `decaying_weights`, which is the paper's, or `acceptance_weights`.
        chunk_size: rows of logits that are held at once.
    """
    dtype = borrowed.target.dtype

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        return borrowed.draft_logits(states.to(dtype))

    states, labels = draft_hidden_states.flatten(0, -3), borrowed.draft_labels(labels).flatten(0, -2)
    total, weight = HeadCrossEntropy.apply(states, labels, weigh, logits_of, chunk_size)
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)
