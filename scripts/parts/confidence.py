"""A drafter's confidence in its drafts: learnt beside them, calibrated slot by slot, and how good it is.

What a confidence is about is whether the best token of a slot is right once those in front of it are, which is what
greedy decoding accepts. Slots behind a wrong one do not count.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional

from specformer.layers_specformer import ConfidenceHead
from specformer.scripts.parts.losses import IGNORED

BINS = 20
"""Of confidences from 0 to 1, in which predicted and true shares are compared."""


def reached(right: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The labelled slots whose predecessors are all right: bool (N, D) and (N, D) -> bool (N, D)."""
    before = functional.pad(right.long().cumprod(dim=1)[:, :-1], (1, 0), value=1)
    return before.bool() & (labels != IGNORED)


def confidence_loss(logits: torch.Tensor, right: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the confidences of the slots that are reached; all are (N, D)."""
    at = reached(right, labels)
    losses = functional.binary_cross_entropy_with_logits(logits.float(), right.float(), reduction="none")
    return (losses * at).sum() / at.sum().clamp(min=1)


@torch.no_grad()
def calibrate(head: ConfidenceHead, outcomes: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Fit `scale` and `shift` of every slot of a confidence head, one after the other (Platt scaling).

    A slot that was never or always right, or hardly ever reached, keeps what it learnt.

    Args:
        outcomes: logits (N, D), whether the slots are right (N, D), and their labels (N, D), of held-out answers.
    """
    logits, right, labels = (torch.cat(parts).cpu() for parts in zip(*outcomes, strict=True))
    at = reached(right, labels)
    for slot in range(logits.shape[1]):
        chosen, hits = logits[at[:, slot], slot].double(), right[at[:, slot], slot].double()
        if not 10 <= hits.sum() <= len(hits) - 10:
            continue
        weights = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def closure(weights=weights, optimizer=optimizer, chosen=chosen, hits=hits):
            with torch.enable_grad():
                optimizer.zero_grad()
                fitted = chosen * weights[0] + weights[1]
                loss = functional.binary_cross_entropy_with_logits(fitted, hits)
                loss.backward()
            return loss

        optimizer.step(closure)
        scale, shift = weights.tolist()
        head.shift[slot] = head.shift[slot] * scale + shift
        head.scale[slot] *= scale


def count_by_confidence(logits: torch.Tensor, right: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many reached slots fall into each bin of confidence, the sum of their confidences, and how many of them are
    right: (D, BINS, 3), to be added up and read by `calibration`."""
    at, chances = reached(right, labels), logits.double().sigmoid()
    bins = (chances * BINS).long().clamp(max=BINS - 1) + BINS * torch.arange(logits.shape[1], device=logits.device)
    values = torch.stack([torch.ones_like(chances), chances, right.double()], dim=-1)  # (N, D, 3)
    counts = values.new_zeros(logits.shape[1] * BINS, 3)
    return counts.index_add_(0, bins[at], values[at]).view(logits.shape[1], BINS, 3).cpu()


def calibration(counts: torch.Tensor) -> dict[str, float]:
    """Of every slot its expected calibration error, and the chance that a right draft has a higher confidence than a
    wrong one (AUC, by bins), from `count_by_confidence`."""
    figures = {}
    for slot, of_slot in enumerate(counts):
        number, predicted, right = of_slot.unbind(dim=1)
        wrong = number - right
        above = right.flip(0).cumsum(0).flip(0) - right / 2  # right ones of higher bins, and half of those in the same
        figures[f"confidence_error_slot_{slot}"] = float((predicted - right).abs().sum() / number.sum().clamp(min=1))
        figures[f"confidence_auc_slot_{slot}"] = float((wrong * above).sum() / (wrong.sum() * right.sum()).clamp(min=1))
    return figures
