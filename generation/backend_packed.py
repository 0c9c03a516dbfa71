"""Weights of linear layers once more, in the order in which oneDNN reads them.

A pass over a few tokens takes as long as its weights take to be read, and rearranging them on the way, as every product
with a weight that lies in rows does, takes about as long again. Milliseconds for the layers of a pass of
Qwen2.5-Coder-0.5B over five tokens, one row, AMD EPYC with avx512_bf16, two threads: 96 as they lie, 60 packed.

A packed weight takes as much memory as the weight itself, lives as long as its layer, and is found again by the calls
that follow. What it was made of can change in between, also in ways that torch does not count (`weight.data += ...`,
fused optimizers), so its sums are taken again at the beginning of a call, which costs about as much as one pass. Where
memory is short, or nothing tells how much of it is free, no weight of a model is packed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from .backend_process import shared

ROWS = 64
"""Rows that the order is made for. It differs little from that for other numbers: one order serves them all."""
KEPT_FREE = 2 * 2**30
"""Bytes that packing leaves to everybody else."""
MEMORY = "/proc/meminfo"
CONTAINERS = [  # what a container may use, and what it does, with the name of that in there
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "total_rss"),
]

_packed = shared(
    "packed weights", weakref.WeakKeyDictionary
)  # layer -> state and row sums of its weight, and it packed
_lock = shared("lock of packed weights", threading.Lock)


def packed_weights(layers: Iterable[nn.Linear]) -> dict[nn.Linear, tuple[tuple[int, int], torch.Tensor]]:
    """Of each layer: the state of its weight (see `state_of`), and that weight packed. For all of them, or for none."""
    sums = {layer: row_sums(layer.weight) for layer in layers}
    with _lock:  # whoever comes while another thread packs the same wants its result
        missing = [layer for layer in sums if not is_packed(layer, sums[layer])]
        for layer in missing:
            _packed.pop(layer, None)
        if missing and sum(layer.weight.nbytes for layer in missing) > free_memory() - KEPT_FREE:
            return {}
        for layer in missing:
            weight = layer.weight.detach()
            _packed[layer] = state_of(weight), sums[layer], pack(weight)
        found = {layer: _packed[layer] for layer in sums}
    return {layer: (state, packed) for layer, (state, _, packed) in found.items()}


def is_packed(layer: nn.Linear, sums: torch.Tensor) -> bool:
    """Whether what is kept of `layer` is its weight of now, whose row sums are `sums`."""
    known = _packed.get(layer)
    return known is not None and known[0] == state_of(layer.weight) and torch.equal(known[1], sums)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (out, in) in oneDNN's order, to be multiplied with as the one it was made of."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether its numbers lie side by side, and torch counts its changes."""
    return weight.is_contiguous() and not weight.is_inference()


def state_of(weight: torch.Tensor) -> tuple[int, int]:
    """What most changes of a weight change as well, and costs nothing to look at."""
    return weight.data_ptr(), weight._version


def row_sums(weight: torch.Tensor) -> torch.Tensor:
    """The bits of each row of `weight` (out, in), added up as whole numbers: (out,), int64."""
    for whole in (torch.int64, torch.int32, torch.int16):
        if weight.shape[1] * weight.itemsize % whole.itemsize == 0 == weight.data_ptr() % whole.itemsize:
            return weight.detach().view(whole).sum(-1)
    raise TypeError(f"A weight of {weight.dtype} was given; expected numbers of two bytes or more.")


def free_memory() -> int:
    """Bytes that this process may still take; 0 where nothing tells, as outside of Linux."""
    try:
        free = 1024 * numbers_in(MEMORY)["MemAvailable:"]
    except (KeyError, OSError):
        return 0
    for limit, statistics, name in CONTAINERS:
        try:
            free = min(free, int(Path(limit).read_text(encoding="utf-8")) - numbers_in(statistics)[name])
        except (KeyError, OSError, ValueError):  # no such limit, or "max"
            continue
    return free


def numbers_in(path: str) -> dict[str, int]:
    """The first number of each line of a file, by the line's first word."""
    lines = (line.split() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
