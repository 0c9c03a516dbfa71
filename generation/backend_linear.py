"""Linear layers on a CPU, through oneDNN where that is the faster library.

torch multiplies float32 matrices on a CPU with the library that it was built with, MKL as a rule, and carries oneDNN
besides. On AMD processors MKL takes more than twice the time, above all for the few rows of a verifying pass: two
tokens cost it twice what one does. On Intel processors it is the faster one, but for the large weights beside few rows,
which it reads again and again: ten rows cost it twice what sixteen do. What is faster here is measured once in a
process. Each adds up in an order of its own: results differ as much as those of two batch shapes do.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from .backend_compiled import is_compiled

PADDED = 256
"""Up to here numbers of rows are rounded up."""
LEAST_GAIN = 1.3
"""How many times faster oneDNN has to be. Machines are far from it, on one side or the other, so that two processes on
one machine come to the same answer."""
FEW = range(4, 16)
"""Rows beside which MKL reads a large weight several times."""
LARGE = 2**21
"""Numbers in a weight that is large: more than a core keeps to itself."""

_here = threading.local()  # `inside`: whether this thread is
_lock = threading.Lock()
_users: WeakKeyDictionary[nn.Linear, int] = WeakKeyDictionary()  # calls of all threads that have changed a layer


@contextmanager
def fast_linears(*models: nn.Module | None):
    """Every plain linear layer of `models` computes what `linear` does in what this thread runs inside, where that is
    the faster way.

    Layers with a forward of their own (adapters, quantised or offloaded weights) stay as they are, and so does all of a
    model of which a part is compiled, as that would be compiled again.
    """
    rows_of = faster_layers([layer for model in models if model is not None for layer in plain_linears(model)])
    entered, outer = [], getattr(_here, "inside", False)
    try:
        for layer, rows in rows_of.items():
            entered.append(layer)
            _use(layer, rows)
        _here.inside = True
        yield
    finally:
        _here.inside = outer
        for layer in entered:
            _leave(layer)


def faster_layers(layers: list[nn.Linear]) -> dict[nn.Linear, range | None]:
    """Those of `layers` that are faster through oneDNN, and for how many rows: `None` for any number."""
    threads = torch.get_num_threads()
    if not layers or not torch.backends.mkldnn.enabled:
        return {}
    if onednn_is_faster(threads):
        return dict.fromkeys(layers)
    large = [layer for layer in layers if layer.weight.numel() >= LARGE]
    return dict.fromkeys(large, FEW) if large and onednn_is_faster_for_few_rows(threads) else {}


def _use(layer: nn.Linear, rows: range | None) -> None:
    with _lock:
        _users[layer] = _users.get(layer, 0) + 1
        vars(layer).setdefault("forward", FastForward(layer, rows))  # setattr would search its submodules first


def _leave(layer: nn.Linear) -> None:
    with _lock:
        _users[layer] = _users.get(layer, 1) - 1
        if _users[layer] <= 0:
            del _users[layer]
            if isinstance(vars(layer).get("forward"), FastForward):  # and not what somebody else put there meanwhile
                del vars(layer)["forward"]


class FastForward:
    """The forward of a plain linear layer that some thread is using. Threads that share a layer share what the first of
    them found to be faster.

    Args:
        rows: how many rows are multiplied by oneDNN; `None`: any number.
    """

    def __init__(self, layer: nn.Linear, rows: range | None):
        self.layer, self.rows = layer, rows

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        is_faster = self.rows is None or input.numel() // max(1, input.shape[-1]) in self.rows
        multiply = linear if is_faster and getattr(_here, "inside", False) else functional.linear
        return multiply(input, self.layer.weight, self.layer.bias)


def plain_linears(model: nn.Module) -> list[nn.Linear]:
    """The layers of `model` that `fast_linears` may change."""
    if is_compiled(model):
        return []
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and ("forward" not in vars(module) or isinstance(module.forward, FastForward))
        and is_plain(module.weight)
    ]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is of the kind that oneDNN may be faster for."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and type(tensor) in (torch.Tensor, nn.Parameter)
    )


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`functional.linear`, by oneDNN where it can: states (..., in), weight (out, in), bias (out,) -> (..., out)."""
    plain_bias = bias is None or (is_plain(bias) and bias.shape == weight.shape[:1])
    if not (is_plain(states) and is_plain(weight) and plain_bias and states.numel()):
        return functional.linear(states, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        return functional.linear(states, weight, bias)
    flat = states.reshape(-1, states.shape[-1])
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (states, weight, bias))
    return (OneDNNLinear.apply if wanted else product)(flat, weight, bias).reshape(*states.shape[:-1], -1)


class OneDNNLinear(torch.autograd.Function):
    """`product` with its gradients, which are products as well."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        of_states, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(states if of_weight else None, weight if of_states else None)
        return product(states, weight, bias).clone()  # a part of the padded one could not be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        states, weight = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.t()) if of_states else None,
            # rows of zeros change no sum over the rows
            product(with_rows(gradient).t(), with_rows(states).t()) if of_weight else None,
            gradient.sum(dim=0) if of_bias else None,
        )


def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`functional.linear` of states (rows, in), by oneDNN."""
    bias = None if bias is None else bias.contiguous()  # it does not look at the bias's strides
    return torch.ops.mkldnn._linear_pointwise(with_rows(states), weight, bias, "none", [], "")[: len(states)]


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
def onednn_is_faster(num_threads: int) -> bool:
    """Whether oneDNN is at hand and multiplies any float32 matrices faster than torch does by itself.

    Many rows are multiplied: their time is that of arithmetic, and hardly depends on what else uses the memory.
    """
    return _gain(rows=128, num_weights=4, num_channels=1024) >= LEAST_GAIN


@functools.cache
def onednn_is_faster_for_few_rows(num_threads: int) -> bool:
    """The same of `FEW` rows and large weights. What is multiplied takes 128 MiB for a moment: more than a processor
    keeps to itself."""
    return _gain(rows=10, num_weights=1, num_channels=32768) >= LEAST_GAIN


def _gain(rows: int, num_weights: int, num_channels: int) -> float:
    """How many times faster oneDNN multiplies states (rows, 1024) with so many weights (num_channels, 1024). 0 where
    it cannot, or is wrong. It takes one or two tenths of a second to find out."""
    with torch.inference_mode(), torch.device("cpu"):
        seconds: dict[Callable, list[float]] = {product: [], functional.linear: []}
        try:
            weights = torch.full((num_weights, num_channels, 1024), 0.5, dtype=torch.float32)
            states = torch.full((rows, 1024), 0.5, dtype=torch.float32)
            for _ in range(5):
                for multiply, times in seconds.items():
                    started = time.perf_counter()
                    results = [multiply(states, weight) for weight in weights]
                    times.append(time.perf_counter() - started)
                    if not all(result.eq(256.0).all() for result in results):
                        return 0.0
        except (AttributeError, NotImplementedError, RuntimeError):  # this torch lacks the op, or memory is short
            return 0.0
    return min(seconds[functional.linear]) / max(min(seconds[product]), 1e-9)
