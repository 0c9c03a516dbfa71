"""Models to which torch.compile was applied, wholly or in part."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .backend_process import shared

_stances: list = shared("stances", list)  # one entry per call inside; the first knows the stance to go back to
_stances_lock = shared("stances_lock", threading.Lock)


@contextmanager
def uncompiled():
    """Run compiled modules as they are written while any thread is inside. Code that was compiled before a hook was
    registered does not call it, and is not compiled again for it."""
    with _stances_lock:
        _stances.append(None if _stances else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _stances_lock:
            if (stance := _stances.pop()) is not None:
                stance.__exit__(None, None, None)


def compiled_parts(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`model` itself and the modules in it, those of them to which torch.compile was applied."""
    for module in model.modules():
        if module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable"):
            yield module


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether torch.compile was applied to `model` or to a part of it."""
    return any(True for _ in compiled_parts(model))
