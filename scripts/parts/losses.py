"""The training loss: cross-entropy of every draft slot, and if asked for its distance from the target's distribution,
without ever holding the logits of all slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional

IGNORED = -100


class Head(Protocol):
    """What makes logits of a drafter's states, such as a `BorrowedTarget`.

    Attributes:
        draft_token_ids: the only tokens that are drafted, ascending; `None` means all.
    """

    target: Any
    draft_token_ids: torch.Tensor | None

    def draft_labels(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Where `draft_logits` has the tokens `token_ids`: IGNORED if they are never drafted."""
        ...

    def draft_logits(self, draft_hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V')."""
        ...

    def target_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The target's logits of all tokens, of its last hidden states: (..., d) -> (..., V)."""
        ...


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


def distances(logits: torch.Tensor, target_chances: torch.Tensor) -> torch.Tensor:
    """Total variation between the drafter's distribution q and the target's p: sum over the whole vocabulary of
    |p - q| / 2, where q is 0 for tokens that are never drafted. Both sum to 1 there, so that it equals 1 - sum over the
    drafted tokens of min(p, q): the chance that speculative sampling at temperature 1 rejects the draft.

    Args:
        logits: of the drafted tokens, (M, V').
        target_chances: p of the same tokens, (M, V').
    """
    return 1 - torch.minimum(logits.softmax(dim=-1), target_chances).sum(dim=-1)


class Verifiers(NamedTuple):
    """The target where it verifies drafts: slot j at position n is verified at position n + 1 + j.

    Attributes:
        states: the target's last hidden states, which its head reads, (P, d).
        places: which of them verifies each slot, (..., D); of no meaning where there is no label.
    """

    states: torch.Tensor
    places: torch.Tensor


class ChunkedLoss(torch.autograd.Function):
    """Weighted sum of the losses of slots, and the sum of the weights, computed chunk by chunk: what `losses_of` makes
    of states, such as logits, is never held for more than one chunk.

    The gradient with respect to the states, and to weights of the head that learn, is taken while each chunk's logits
    exist, so that plain `loss.backward()` needs neither the logits nor a second pass through the head. What slots weigh
    is taken as constant.

    Args:
        states: (N, D, d).
        kept: which slots count, (N, D).
        weigh: from cross-entropies (n, D) of some positions, infinite where a slot does not count, to weights (n, D).
        losses_of: from states (M, d) of some slots and their index in (N, D) to cross-entropies and losses, (M,) each.
        chunk_size: slots that are computed at once.
        learning: weights of the head that `losses_of` passes and that learn.
    """

    @staticmethod
    def forward(
        ctx,
        states: torch.Tensor,
        kept: torch.Tensor,
        weigh: Callable,
        losses_of: Callable,
        chunk_size: int,
        *learning: nn.Parameter,
    ):
        precise = torch.promote_types(states.dtype, torch.float32)
        total, weight = (torch.zeros((), dtype=precise, device=states.device) for _ in range(2))
        gradients, of_learning = torch.zeros_like(states), [torch.zeros_like(weight) for weight in learning]
        step = max(1, chunk_size // kept.shape[1])
        for start in range(0, len(states), step):
            chunk = kept[start : start + step]
            rows, columns = chunk.nonzero(as_tuple=True)
            slots = start + rows, columns
            with torch.enable_grad():
                leaf = states[slots].detach().requires_grad_()  # (M, d)
                entropies, losses = losses_of(leaf, slots)
                table = entropies.new_full(chunk.shape, torch.inf).masked_scatter(chunk, entropies.detach())
                weights = weigh(table)[chunk]
                loss = losses @ weights
            gradients[slots], *others = torch.autograd.grad(loss, [leaf, *learning])
            for gradient, more in zip(of_learning, others, strict=True):
                gradient += more
            total += loss.detach()
            weight += weights.sum()
        ctx.save_for_backward(gradients, *of_learning)
        ctx.mark_non_differentiable(weight)
        return total, weight

    @staticmethod
    def backward(ctx, upstream: torch.Tensor, _):
        gradients, *of_learning = ctx.saved_tensors
        return gradients * upstream, None, None, None, None, *(gradient * upstream for gradient in of_learning)


def slot_labels(labels: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Label of slot j at position n is token n + 2 + j: (B, T) -> (B, T, D), IGNORED past the end."""
    padded = functional.pad(labels, (0, num_slots + 1), value=IGNORED)
    return torch.stack([padded[:, 2 + j : 2 + j + labels.shape[1]] for j in range(num_slots)], dim=2)


def drafter_loss(
    draft_hidden_states: torch.Tensor,
    labels: torch.Tensor,
    borrowed: Head,
    weigh: Callable[[torch.Tensor], torch.Tensor] = decaying_weights,
    chunk_size: int = 1024,
    distance_share: float = 0.0,
    verifiers: Verifiers | None = None,
    weights: Sequence[nn.Parameter] = (),
) -> torch.Tensor:
    """Weighted mean of the losses of all labelled slots: (1 - distance_share) * cross-entropy + distance_share *
    distance from the target's own distribution (see `distances`). DSpark (arXiv 2607.05147) has a share of 0.9.

    Args:
        draft_hidden_states: (..., D, d).
        labels: (..., D); IGNORED ones do not count, nor tokens that are never drafted.
        weigh: from cross-entropies to what slots weigh, such as `decaying_weights`, which is the paper's, or
            `acceptance_weights`.
        chunk_size: rows of logits that are held at once.
        distance_share: from 0, the paper's loss, to 1.
        verifiers: of the slots; needed for the distance alone.
        weights: those of the head that learn, if any do.
    """
    dtype, precise = borrowed.target.dtype, torch.promote_types(draft_hidden_states.dtype, torch.float32)
    states, labels = draft_hidden_states.flatten(0, -3), borrowed.draft_labels(labels).flatten(0, -2)

    def target_chances(verifiers: Verifiers, slots: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What the target gives the drafted tokens in some slots: (M, V')."""
        # up to D slots of a chunk have the same place
        places, back = verifiers.places.flatten(0, -2)[slots].unique(return_inverse=True)
        chances = borrowed.target_logits(verifiers.states[places].to(dtype)).to(precise).softmax(dim=-1)
        return (chances if borrowed.draft_token_ids is None else chances[:, borrowed.draft_token_ids])[back]

    def losses_of(states: torch.Tensor, slots: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = borrowed.draft_logits(states.to(dtype)).to(precise)
        entropies = functional.cross_entropy(logits, labels[slots], reduction="none")
        if not distance_share:
            return entropies, entropies
        assert verifiers is not None  # needed for the distance
        with torch.no_grad():
            chances = target_chances(verifiers, slots)
        return entropies, (1 - distance_share) * entropies + distance_share * distances(logits, chances)

    total, weight = ChunkedLoss.apply(states, labels != IGNORED, weigh, losses_of, chunk_size, *weights)
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)


def base_share(share: float, step: int, num_steps: int) -> float:
    """How much the loss of uncorrected states counts at a step: `share` at first, then less and less, and nothing from
    half of the steps on (the base-loss curriculum of Domino, arXiv 2605.29707)."""
    return share * max(0.0, 1 - 2 * step / num_steps)
