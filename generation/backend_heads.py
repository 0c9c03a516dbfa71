"""Attention of the verify passes: query heads that share keys and values are folded into one.

transformers copies keys and values for every query head where there are a mask and several queries, in every layer
and pass. With a long text that costs more than all else. Here the heads of a group become further queries of one head,
so that nothing is copied: the same sums, in another shape.
"""

from __future__ import annotations

import inspect
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.nn import functional
from transformers import AttentionInterface

from .backend_process import shared
from .backend_versions import sdpa_attention

NAME = "sdpa"
UNDERSTOOD = {"module", "query", "key", "value", "attention_mask", "scaling", "is_causal", "kwargs"}
ONLY_SDPA = set(inspect.signature(sdpa_attention).parameters) - UNDERSTOOD | {"softcap"}
"""Arguments that only transformers' own function can honour."""


def new_registration() -> SimpleNamespace:
    """All copies of this code share one: `passes` of all threads that are inside, what was `registered` for them, and,
    for each thread, `here.masks` while it is inside: folded masks by the id of the given one, and group."""
    return SimpleNamespace(lock=threading.Lock(), passes=0, registered=None, here=threading.local())


_registration = shared("folded_heads", new_registration)
_here = _registration.here


@contextmanager
def folded_heads():
    """Fold heads in what this thread runs inside. Other threads' passes, and all passes afterwards, are untouched.

    Where somebody put a function of their own in the place of transformers', nothing is folded.
    """
    with _registration.lock:
        _registration.passes += 1
        if AttentionInterface()[NAME] is sdpa_attention:
            _registration.registered = folded_attention
            AttentionInterface.register(NAME, folded_attention)
    outer, _here.masks = getattr(_here, "masks", None), {}
    try:
        yield
    finally:
        _here.masks = outer
        with _registration.lock:
            _registration.passes -= 1
            if _registration.passes == 0 and AttentionInterface()[NAME] is _registration.registered:
                AttentionInterface.register(NAME, sdpa_attention)


def folded_attention(module, query, key, value, attention_mask, **kwargs):
    """What transformers' sdpa attention computes.

    Args:
        query: (B, heads, q, head_dim).
        key, value: (B, kv heads, keys, head_dim).
        attention_mask: (B, 1, q, keys), bool or additive.

    Returns:
        (B, q, heads, head_dim), and no weights.
    """
    if not can_fold(query, key, attention_mask, kwargs):
        return sdpa_attention(module, query, key, value, attention_mask, **kwargs)
    batch_size, heads, width, _ = query.shape
    group = heads // key.shape[1]
    attended = functional.scaled_dot_product_attention(
        query.reshape(batch_size, key.shape[1], group * width, -1),
        key,
        value,
        attn_mask=fold_mask(attention_mask, group, query.dtype),
        scale=kwargs.get("scaling"),
    )
    return attended.view(batch_size, heads, width, -1).transpose(1, 2).contiguous(), None


def fold_mask(mask: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask (B, 1, q, keys) for `group` heads as one, additive: (B, 1, group * q, keys). All layers that share it
    share the result."""
    name = id(mask), group
    if name not in _here.masks:
        folded = mask
        if mask.dtype == torch.bool:
            folded = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        # with the given mask, so that it lives and no other one gets its id
        _here.masks[name] = mask, folded.expand(-1, group, -1, -1).flatten(1, 2)[:, None]
    return _here.masks[name][1]


def can_fold(query, key, attention_mask, kwargs: dict) -> bool:
    """Whether this thread wants it, several heads share keys, all of them one mask, and nothing else is asked for."""
    if torch.compiler.is_compiling() or getattr(_here, "masks", None) is None:
        return False
    special = [kwargs[name] for name in ONLY_SDPA if kwargs.get(name) is not None]
    return (
        query.shape[1] > key.shape[1]
        and attention_mask is not None
        and attention_mask.shape[1] == 1
        and attention_mask.shape[-1] == key.shape[2]
        and all(isinstance(value, float) and value == 0 for value in special)  # no dropout
    )
