"""The mathematics of sampling and accepting: pure functions of tensors.

N rows, q positions each, vocabulary V. `drafts` holds `NO_TOKEN` where nothing was drafted.
"""

from __future__ import annotations

import math

import torch

from .proposal import NO_TOKEN

MOST_IN_BLOCK = 256


def sample_with_noise(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The token that `torch.multinomial(scores.softmax(-1), 1)` takes when it draws `noise`: (..., V) -> (...).

    `NO_TOKEN` where it would raise, because some score is NaN or infinite or none is left above -inf.
    """
    tokens = places_of_best(scores.softmax(dim=-1) / noise)
    return torch.where(scores.amax(dim=-1).isfinite(), tokens, NO_TOKEN)


def best_tokens(logits: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
    """The token of the highest logit: (..., C) -> (...). The logits are of `token_ids`, which broadcast to them, or of
    the vocabulary in its order."""
    best = places_of_best(logits)
    return best if token_ids is None else token_ids.expand(logits.shape).gather(-1, best[..., None])[..., 0]


def places_of_best(values: torch.Tensor) -> torch.Tensor:
    """`values.argmax(dim=-1)`, ties and NaN included: (..., V) -> (...).

    On a CPU torch looks for the greatest value with vector instructions and for its place without, which takes six
    times as long. So first the block of the vocabulary that has it is found, and then its place in there.
    """
    block = math.gcd(values.shape[-1], MOST_IN_BLOCK)
    if values.device.type != "cpu" or block < 32:
        return values.argmax(dim=-1)
    blocks = values.unflatten(-1, (-1, block))  # (..., V / block, block)
    best = blocks.amax(dim=-1).argmax(dim=-1)[..., None]
    inside = blocks.take_along_dim(best[..., None], dim=-2)[..., 0, :].argmax(dim=-1)
    return best[..., 0] * block + inside


def with_confidence(chances: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """Logarithms of chances (..., C) where the best one is as likely as `confidence` (...) says. The others share what
    that leaves, and none of them overtakes it: where it is less likely than it was, all are, by as much."""
    best = places_of_best(chances)[..., None]
    before, confidence = chances.gather(-1, best), confidence.to(chances)[..., None].clamp(1e-4, 1 - 1e-4)
    less, rest = confidence.log() - before, torch.log1p(-confidence) - torch.log1p(-before.exp().clamp(max=1 - 1e-4))
    told = confidence.log().masked_fill(before.isneginf(), -torch.inf)
    return (chances + torch.minimum(less, rest)).scatter(-1, best, told)


def count_accepted(accepted: torch.Tensor) -> torch.Tensor:
    """How many leading positions were accepted: bool (N, q) -> (N,) from 0 to q."""
    return accepted.long().cumprod(dim=1).sum(dim=1)


def reject_and_resample(
    scores: torch.Tensor,
    drafts: torch.Tensor,
    proposals: torch.Tensor,
    uniform: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling of each row's drafts (Leviathan et al. 2023, algorithm 1; Chen et al. 2023).

    A draft x is accepted with probability min(1, p(x) / q(x)); the first one that is not is replaced by a sample of
    the residual (p - q)+, normalised. What comes out is distributed as p, whatever q is.

    Args:
        scores: the target's processed scores, (N, q, V); p is their softmax.
        drafts: (N, q).
        proposals: the distributions that the drafts were sampled from, (N, q, V); zero where nothing was drafted.
        uniform: numbers from [0, 1), (N, q).
        noise: numbers from Exp(1), (N, V).

    Returns:
        Tokens (N, q), those after a row's first rejection meaning nothing, and which drafts were accepted (N, q).
    """
    rows = torch.arange(len(drafts), device=drafts.device)
    p = scores.softmax(dim=-1)
    chosen = drafts.clamp(min=0)[..., None]
    p_of_draft, q_of_draft = (distribution.gather(-1, chosen)[..., 0] for distribution in (p, proposals))
    accepted = (drafts >= 0) & (uniform * q_of_draft < p_of_draft)
    first = count_accepted(accepted).clamp(max=drafts.shape[1] - 1)  # rejection; the last position if there is none
    p, q = p[rows, first], proposals[rows, first]
    residual = (p - q).clamp(min=0)
    # p = q up to rounding leaves nothing, and then a rejection has no probability either
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p)
    sampled = torch.where(scores[rows, first].amax(dim=-1).isfinite(), places_of_best(residual / noise), NO_TOKEN)
    tokens = drafts.clone()
    tokens[rows, first] = torch.where(accepted[rows, first], drafts[rows, first], sampled)
    return tokens, accepted
