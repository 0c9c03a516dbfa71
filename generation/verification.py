"""Acceptance rules: pure functions of tensors.

R rows carried by a pass (running, or finished since rows last left), k drafted tokens each, vocabulary V.
"""

from __future__ import annotations

import torch

NO_TOKEN = -1


def sample_with_noise(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The token that `torch.multinomial(scores.softmax(-1), 1)` takes when it draws `noise`: (..., V) -> (...).

    `NO_TOKEN` where it would raise, because some score is NaN or infinite or none is left above -inf.
    """
    tokens = (scores.softmax(dim=-1) / noise).argmax(dim=-1)
    return torch.where(scores.amax(dim=-1).isfinite(), tokens, NO_TOKEN)


def count_matches(drafts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How many leading drafts (R, k) equal the target's own tokens (R, k + 1): (R,) from 0 to k.

    The row's new text is then tokens[:, : matches + 1], since the accepted drafts are the target's tokens, and the
    token behind them is the target's too.
    """
    return (drafts == tokens[:, : drafts.shape[1]]).long().cumprod(dim=1).sum(dim=1)
