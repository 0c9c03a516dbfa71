"""Compiled targets run as they are written while a drafter watches them by hooks.

Code that torch.compile made before a hook was registered does not call it, and is not made again for it.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch

from .backend_process import shared

_stances: list = shared("stances", list)  # one entry per call inside; the first knows the stance to go back to
_stances_lock = shared("stances_lock", threading.Lock)


@contextmanager
def uncompiled():
    """Run compiled modules as they are written while any thread is inside."""
    with _stances_lock:
        _stances.append(None if _stances else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _stances_lock:
            if (stance := _stances.pop()) is not None:
                stance.__exit__(None, None, None)
