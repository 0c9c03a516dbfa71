"""A few of a model's weights, to know it by."""

from __future__ import annotations

import hashlib

import torch

STORED = torch.bfloat16
"""In which they are compared, and hidden states are kept: a model loaded in another precision is still the same."""


def some_weights(model: torch.nn.Module) -> bytes:
    """Up to 64 or so values of each parameter, spread over it."""
    values = (
        parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].to(STORED).double().cpu()
        for parameter in model.parameters()
    )
    return b"".join(each.numpy().tobytes() for each in values)


def digest_of_weights(model: torch.nn.Module) -> str:
    """A training step changes it, or another checkpoint in the same folder."""
    return hashlib.sha256(some_weights(model)).hexdigest()[:16]
