"""Linear layers on a CPU, through oneDNN where that is faster than what torch takes by itself.

Two things are gained, and whether a machine gains them is measured once in a process:

- In any precision, weights that are packed beforehand, see backend_packed.py.
- In float32 torch takes the library that it was built with, MKL as a rule, though it carries oneDNN besides. MKL reads
  a large weight several times beside the few rows of a verifying pass. Milliseconds for a head of 49,152 tokens and
  576 channels, two threads, where nothing is packed:

  | rows                   |   2 |   3 |  4 |  5 |   8 |  10 | 15 | 16 |
  |---|---|---|---|---|---|---|---|---|
  | AMD EPYC, MKL          |  23 |  35 | 17 | 17 |  18 |  25 | 20 | 20 |
  | AMD EPYC, oneDNN       | 6.4 | 6.8 |  7 |  7 |   8 | 8.5 | 10 | 10 |
  | Intel Xeon, MKL        | 5.5 |     | 11 | 12 |  18 |  24 | 31 | 12 |
  | Intel Xeon, oneDNN     | 8.6 |     |  9 |  9 |   9 |  10 | 11 | 11 |

  On the first, oneDNN is faster at any number of rows and for small weights too; on the second only between 4 and 15
  rows of large weights.

Sums are added up in another order: results differ as much as those of two batch shapes do.

To switch it off: `torch.backends.mkldnn.enabled = False`, or `with torch.backends.mkldnn.flags(enabled=False):` around
a call.
"""

from __future__ import annotations

import functools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from .backend_compiled import is_compiled
from .backend_packed import can_pack, pack, packed_weights, state_of
from .ranks import shared_ranks

ANY = range(1, sys.maxsize)
NONE = range(0)
FEW = range(4, 16)
LARGE = 2**21
"""Numbers in a weight that is large: more than a core keeps to itself."""
LEAST_GAIN = 1.5
"""How many times faster oneDNN has to be. Both machines are far from it, on one side or the other: processes on one of
them decide alike."""
LEAST_GAIN_PACKED = 1.2
"""The same of packed weights beside a few rows; beside a single one they have to be about as fast."""
FILLED = 5
"""Rows that fewer are filled up to beside a large packed weight, where that takes no longer: oneDNN reads a weight
faster for five or six of them than for one or two. Milliseconds for a head of 151,936 tokens and 1,536 channels in
bfloat16, AMD EPYC, two threads, 1 to 6 rows: 18.7, 20.6, 18.2, 16.4, 15.1, 15.4."""

_lock = threading.Lock()


@contextmanager
def fast_linears(*models: nn.Module | None, in_training: bool = False):
    """Plain linear layers of `models` go through oneDNN where that is faster, in what this thread runs inside.

    Layers with a forward of their own (adapters, quantised or offloaded weights) stay as they are, and so does all of a
    model of which a part is compiled, as that would be compiled again. Where several processes share a target, nothing
    is changed: each would measure for itself, and what they all compute must be the same to the last bit.

    Args:
        in_training: whether weights change inside, so that none is packed: an optimizer's steps are not all counted.

    Yields:
        the forwards that the layers concerned have inside, whose `rows` are the numbers of rows concerned.
    """
    thread, entered = threading.get_ident(), []
    wanted = [model for model in models if model is not None and shared_ranks() is None]
    layers = [layer for model in wanted for layer in plain_linears(model)]
    forwards = fast_forwards(dict.fromkeys(layer for layer in layers if not is_inside(layer, thread)), in_training)
    try:
        for layer in layers:
            with _lock:
                forward = vars(layer).get("forward")
                if layer in forwards:
                    forward = vars(layer).setdefault("forward", forwards[layer])  # setattr would be slow
                if isinstance(forward, FastForward):
                    if layer in forwards:
                        forward.packed = forwards[layer].packed  # another thread's may be out of date
                    forward.threads.append(thread)
                    entered.append(forward)
        yield entered
    finally:
        for forward in entered:
            forward.leave(thread)


class FastForward:
    """The forward of a linear layer while some thread is inside `fast_linears` with it.

    Args:
        layer: the layer.
        packed: its weight's state, and the weight as oneDNN reads it fastest; None if there is none.
        unpacked_rows: numbers of rows beside which oneDNN is faster with the weight as it is.
        filled: fewer rows are filled up to so many beside the packed weight.
    """

    def __init__(
        self,
        layer: nn.Linear,
        packed: tuple[tuple[int, int], torch.Tensor] | None,
        unpacked_rows: range,
        filled: int = 1,
    ):
        self.layer, self.packed, self.unpacked_rows, self.filled = layer, packed, unpacked_rows, filled
        self.threads: list[int] = []  # those inside, as often as they have entered

    @property
    def rows(self) -> range:
        return self.unpacked_rows if self.packed is None else ANY

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        is_faster = (
            threading.get_ident() in self.threads
            and is_plain(input)
            and input.dtype == weight.dtype
            and input.shape[-1:] == weight.shape[1:]
            and not torch.is_autocast_enabled("cpu")
        )
        if is_faster and self.packed is not None and not torch.is_grad_enabled():
            state, packed = self.packed
            if state == state_of(weight):
                return filled_linear(input, packed, bias, self.filled)
        if is_faster and input.shape[:-1].numel() in self.unpacked_rows:
            return (OneDNNLinear.apply if torch.is_grad_enabled() else onednn_linear)(input, weight, bias)
        return functional.linear(input, weight, bias)

    def leave(self, thread: int) -> None:
        with _lock:
            self.threads.remove(thread)
            if not self.threads and vars(self.layer).get("forward") is self:  # not what others put there meanwhile
                del vars(self.layer)["forward"]


def fast_forwards(layers: Iterable[nn.Linear], in_training: bool) -> dict[nn.Linear, FastForward]:
    """Forwards for those of `layers` that are faster with one."""
    num_threads = torch.get_num_threads()
    packed = packed_weights(
        layer
        for layer in layers
        if not in_training and can_pack(layer.weight) and packing_pays(layer.weight.dtype, num_threads)
    )
    forwards = {}
    for layer in layers:
        rows = faster_rows(layer.weight, num_threads)
        if layer in packed or rows:
            filled = filled_rows(layer.weight, num_threads) if layer in packed else 1
            forwards[layer] = FastForward(layer, packed.get(layer), rows, filled)
    return forwards


def is_inside(layer: nn.Linear, thread: int) -> bool:
    forward = vars(layer).get("forward")
    return isinstance(forward, FastForward) and thread in forward.threads


def plain_linears(model: nn.Module) -> list[nn.Linear]:
    """The layers of `model` that `fast_linears` may change, unless they have a forward of their own."""
    return [
        module
        for module in ([] if is_compiled(model) else model.modules())
        if type(module) is nn.Linear and is_plain(module.weight) and is_plain_bias(module.bias, module.weight)
    ]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether oneDNN takes it, and torch may take something else."""
    return (
        tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.numel() > 0
    )


def is_plain_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """The same of the bias beside `weight`. oneDNN does not look at its strides."""
    return bias is None or (
        is_plain(bias) and bias.dtype == weight.dtype and bias.shape == weight.shape[:1] and bias.is_contiguous()
    )


def onednn_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`functional.linear` without gradients: states (..., in), weight (out, in), bias (out,) -> (..., out)."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def filled_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, least: int) -> torch.Tensor:
    """The same, with states of fewer than `least` rows filled up to so many."""
    rows = states.shape[:-1].numel()
    if rows >= least:
        return onednn_linear(states, weight, bias)
    filled = states.new_zeros(least, states.shape[-1])
    filled[:rows] = states.reshape(rows, -1)
    return onednn_linear(filled, weight, bias)[:rows].reshape(*states.shape[:-1], -1)


class OneDNNLinear(torch.autograd.Function):
    """The same with its gradients, which are products as well."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        of_states, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(states if of_weight else None, weight if of_states else None)
        return onednn_linear(states, weight, bias).clone()  # a view could not be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        states, weight = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            onednn_linear(gradient, weight.t()) if of_states else None,
            onednn_linear(flat.t(), states.reshape(-1, states.shape[-1]).t()) if of_weight else None,
            flat.sum(dim=0) if of_bias else None,
        )


def faster_rows(weight: torch.Tensor, num_threads: int) -> range:
    """Numbers of rows beside which oneDNN is faster with `weight` as it is."""
    if weight.dtype != torch.float32 or not torch.backends.mkldnn.enabled:  # torch takes it by itself
        return NONE
    if gain(3, num_threads) >= LEAST_GAIN:
        return ANY
    return FEW if weight.numel() >= LARGE and gain(10, num_threads) >= LEAST_GAIN else NONE


def packing_pays(dtype: torch.dtype, num_threads: int) -> bool:
    """Whether oneDNN is faster with packed weights of `dtype`."""
    return (
        bool(torch.backends.mkldnn.enabled)
        and gain(5, num_threads, dtype, packed=True) >= LEAST_GAIN_PACKED
        and gain(1, num_threads, dtype, packed=True) >= 1 / LEAST_GAIN_PACKED
    )


def filled_rows(weight: torch.Tensor, num_threads: int) -> int:
    """The rows that fewer are filled up to beside `weight`, packed."""
    return FILLED if weight.numel() >= LARGE and filling_gain(num_threads, weight.dtype) >= 1 else 1


@functools.cache
def gain(rows: int, num_threads: int, dtype: torch.dtype = torch.float32, packed: bool = False) -> float:
    """How many times faster oneDNN multiplies so many rows with a large weight; 0 where it cannot."""
    return times_faster(
        lambda states, weight, ours: onednn_linear(states, ours),
        lambda states, weight, ours: functional.linear(states, weight),
        rows,
        dtype,
        packed,
    )


@functools.cache
def filling_gain(num_threads: int, dtype: torch.dtype) -> float:
    """How many times faster oneDNN multiplies one row, and two, with a large packed weight when they are filled up."""
    gains = [
        times_faster(
            lambda states, weight, ours: filled_linear(states, ours, None, FILLED),
            lambda states, weight, ours: onednn_linear(states, ours),
            rows,
            dtype,
            packed=True,
        )
        for rows in (1, 2)
    ]
    return statistics.geometric_mean(gains) if all(gains) else 0.0


def times_faster(multiply: Callable, other: Callable, rows: int, dtype: torch.dtype, packed: bool) -> float:
    """How many times faster `multiply` takes states (rows, in), a large weight (out, in), and that weight packed or as
    it is, than `other` does; 0 where one cannot. It takes a fifth of a second or two to find out, and for a moment 256
    MiB or 512, far more than a processor keeps to itself."""
    with torch.inference_mode(), torch.device("cpu"):
        try:
            states, weight = (torch.ones(number, 2048, dtype=dtype) for number in (rows, 32768))
            ours = pack(weight) if packed else weight
            seconds: dict[Callable, list[float]] = {multiply: [], other: []}
            for _ in range(4):
                for product, taken in seconds.items():
                    started = time.perf_counter()
                    product(states, weight, ours)
                    taken.append(time.perf_counter() - started)
        except (AttributeError, NotImplementedError, RuntimeError):  # this torch lacks the op, or memory is short
            return 0.0
    return min(seconds[other]) / max(min(seconds[multiply]), 1e-9)
