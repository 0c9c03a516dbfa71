"""Linear layers on a CPU, through oneDNN where that is the faster library.

torch multiplies float32 matrices on a CPU with the library that it was built with, MKL as a rule, and carries oneDNN
besides. On AMD processors MKL takes more than twice the time, above all for the few rows of a verifying pass: two
tokens cost it twice what one does. Which of them is faster here is measured once in a process. Each adds up in an order
of its own: results differ as much as those of two batch shapes do.
"""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

FEW_ROWS = 32
"""Up to here a product waits for the weights to come from memory, and behind it for the arithmetic."""
PADDED = 256
"""Up to here numbers of rows are rounded up."""
LEAST_GAIN = 1.3
"""How many times faster oneDNN has to be. Machines are far from it, on one side or the other, so that two processes on
one machine come to the same answer."""


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`functional.linear`: states (..., in), weight (out, in) and bias (out,) -> (..., out)."""
    rows = states.numel() // max(1, states.shape[-1])
    if not (is_plain(states) and is_plain(weight) and rows) or torch.is_autocast_enabled("cpu"):
        return functional.linear(states, weight, bias)
    if not onednn_is_faster(rows <= FEW_ROWS, torch.get_num_threads()):
        return functional.linear(states, weight, bias)
    flat = states.reshape(rows, -1)
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (states, weight, bias))
    return (OneDNNLinear.apply if wanted else product)(flat, weight, bias).reshape(*states.shape[:-1], -1)


@contextmanager
def fast_linears(*models: nn.Module | None):
    """Every plain linear layer of `models` computes what `linear` does, for all threads.

    Layers with a forward of their own (adapters, quantised or offloaded weights) stay as they are, and so does all of a
    model of which a part is compiled, as that would be compiled again.
    """
    plain = [module for model in models if model is not None for module in plain_linears(model)]
    try:
        for module in plain:
            vars(module)["forward"] = functools.partial(_forward, module)  # setattr would search submodules first
        yield
    finally:
        for module in plain:
            vars(module).pop("forward", None)


def plain_linears(model: nn.Module) -> list[nn.Linear]:
    """The layers of `model` that `fast_linears` may change."""
    modules = list(model.modules())
    if any(module._compiled_call_impl or hasattr(module.forward, "_torchdynamo_orig_callable") for module in modules):
        return []
    return [
        module
        for module in modules
        if type(module) is nn.Linear and "forward" not in vars(module) and is_plain(module.weight)
    ]


def _forward(module: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return linear(states, module.weight, module.bias)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is of the kind that oneDNN may be faster for."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and type(tensor.data) is torch.Tensor


class OneDNNLinear(torch.autograd.Function):
    """`product` with its gradients, which are products as well."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return product(states, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        states, weight = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad
        if of_weight:  # rows of zeros change no sum over the rows
            states, padded = with_rows(states), with_rows(gradient)
        return (
            product(gradient, weight.t()) if of_states else None,
            product(padded.t(), states.t()) if of_weight else None,
            gradient.sum(dim=0) if of_bias else None,
        )


def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`functional.linear` of states (rows, in), by oneDNN."""
    padded = with_rows(states)
    return torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")[: len(states)]


def with_rows(states: torch.Tensor) -> torch.Tensor:
    """Rows of zeros behind `states` (rows, in), up to a number with few binary digits.

    oneDNN generates code for every number of rows that it sees, in some milliseconds each, and keeps a limited number
    of them; a ragged batch and a draft length that varies lead to any number. Larger products take longer than that.
    """
    rows = len(states)
    step = 1 << max(0, rows.bit_length() - 4)  # 1 to 15, 16, 18, ... 30, 32, 36, ...: at most an eighth more
    missing = -rows % step if rows < PADDED else 0
    return functional.pad(states, (0, 0, 0, missing)) if missing else states


@functools.cache
def onednn_is_faster(few_rows: bool, num_threads: int) -> bool:
    """Whether oneDNN is at hand and multiplies float32 matrices faster than torch does by itself. It takes about a
    tenth of a second to find out, once in a process."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    with torch.inference_mode(), torch.device("cpu"):
        # more than caches hold between two uses of one of them, as a model's weights are
        weights = torch.full((8, 1024, 1024), 0.5, dtype=torch.float32)
        states = torch.full((4 if few_rows else 4 * FEW_ROWS, 1024), 0.5, dtype=torch.float32)
        seconds = {product: [], functional.linear: []}
        for _ in range(4):
            for multiply, times in seconds.items():
                started = time.perf_counter()
                for weight in weights:
                    multiply(states, weight)
                times.append(time.perf_counter() - started)
    return LEAST_GAIN * min(seconds[product]) < min(seconds[functional.linear])
