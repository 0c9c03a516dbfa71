"""A drafter's network in the dtype of its target."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch

from .backend_packed import row_sums

_converted: WeakKeyDictionary = WeakKeyDictionary()
"""network -> its copy in another dtype, and the weights that it was made of, as far as `marks_of` tells them."""
_converted_lock = threading.Lock()


def in_dtype(network, dtype: torch.dtype):
    """`network` itself, or its copy in `dtype`, which is kept for the next call."""
    if network.dtype == dtype:
        return network
    made_of = dtype, network.device, marks_of(network.state_dict().values())
    with _converted_lock:
        kept, of = _converted.get(network, (None, None))
        if of != made_of:
            kept = copy.deepcopy(network).to(dtype)
            _converted[network] = kept, made_of
    return kept


def marks_of(parts: Iterable[torch.Tensor]) -> list[int]:
    """The bits of each tensor, added up as whole numbers: they change with its values. Torch's own count of changes
    (`_version`) misses those of fused optimizers."""
    return torch.stack([row_sums(part.reshape(1, -1)).sum() for part in parts]).tolist()
