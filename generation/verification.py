"""Acceptance rules: pure functions of tensors. R running rows, k drafted tokens each, vocabulary V."""

from __future__ import annotations

import torch


def sample_with_noise(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The token that `torch.multinomial(scores.softmax(-1), 1)` takes when it draws `noise`: (..., V) -> (...)."""
    return (scores.softmax(dim=-1) / noise).argmax(dim=-1)


def count_matches(drafts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How many leading drafts (R, k) equal the target's own tokens (R, k + 1): (R,) from 0 to k.

    The row's new text is then tokens[:, : matches + 1], since the accepted drafts are the target's tokens, and the
    token behind them is the target's too.
    """
    return (drafts == tokens[:, : drafts.shape[1]]).long().cumprod(dim=1).sum(dim=1)
