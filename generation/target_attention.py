"""Targets with flash or flex attention, which take no mask per row, run with another implementation during a call."""

from __future__ import annotations

import threading
import warnings
import weakref
from contextlib import contextmanager

from .backend_process import shared

USABLE_ATTENTION = ("sdpa", "eager")

_switches = shared("switches", weakref.WeakKeyDictionary)  # model -> [calls inside, implementations before]
_switches_lock = shared("switches_lock", threading.Lock)


@contextmanager
def usable_attention(model):
    """Switch a target with flash or flex attention, which take no mask per row, to sdpa while calls are inside.

    Where the family has no sdpa, to eager. Several threads may be inside with one target.
    """
    with _switches_lock:
        switch = model in _switches or attention_of(model) not in USABLE_ATTENTION
        if switch:
            if model not in _switches:
                _switches[model] = [0, switch_attention(model)]
            _switches[model][0] += 1
    try:
        yield
    finally:
        if switch:
            with _switches_lock:
                _switches[model][0] -= 1
                if _switches[model][0] == 0:
                    model.set_attn_implementation(_switches.pop(model)[1])


def switch_attention(model) -> dict[str, str]:
    """Switch and warn; returns what was there, of the model and of each of its parts."""
    parts = {name: getattr(model.config, name) for name in getattr(model.config, "sub_configs", {})}
    before = {"": model.config._attn_implementation}
    before |= {name: part._attn_implementation for name, part in parts.items() if part is not None}
    loaded_with = attention_of(model)
    try:
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:
            model.set_attn_implementation("eager")
        warnings.warn(
            f"This target was loaded with attn_implementation={loaded_with!r}, which cannot mask each row of a batch "
            f"on its own. It runs with {attention_of(model)!r} during speculative decoding.",
            stacklevel=5,
        )
    except BaseException:
        model.set_attn_implementation(before)
        raise
    return before


def attention_of(model) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation
