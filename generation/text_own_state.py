"""What an object of the caller's remembers: a value that is another one once that has changed."""

from __future__ import annotations

import functools
import logging
import random
import re
import threading
import types
import weakref
from collections import deque
from enum import Enum

import torch
from transformers import PreTrainedTokenizerBase

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, Enum, re.Pattern, torch.dtype, torch.device)
CONSTANT = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.nn.Module,
    PreTrainedTokenizerBase,
    logging.Logger,
    weakref.ref,
    type(threading.Lock()),
    type(threading.RLock()),
)
"""What a processor may hold and does not change: only whether it is another one is looked at."""
MOST = 20_000
"""Things to look at. A processor that holds more is not looked through."""


class Opaque(Exception):
    """What an object remembers cannot be told: it holds an iterator, a generator of random numbers or what is not
    Python's."""


def state_of(thing: object) -> tuple:
    """What `thing`, and all that it refers to, remembers.

    Raises:
        Opaque: that cannot be told.
    """
    return _state_of(thing, {})


def _state_of(thing, seen: dict[int, object]) -> tuple:
    if isinstance(thing, PLAIN):
        return type(thing), thing
    if id(thing) in seen:
        return (id(thing),)
    seen[id(thing)] = thing  # alive, so that no other one gets its id
    if len(seen) > MOST:
        raise Opaque(f"it holds more than {MOST:,} objects")
    if isinstance(thing, CONSTANT):
        return (id(thing),)
    if isinstance(thing, torch.Tensor):
        # tensors of inference mode do not count how often they were written to
        version = thing.cpu().numpy().tobytes() if thing.is_inference() else thing._version
        return id(thing), version
    if hasattr(thing, "tobytes") and hasattr(thing, "dtype"):  # of NumPy
        return type(thing), thing.tobytes()
    if isinstance(thing, random.Random):
        return (thing.getstate(),)
    if isinstance(thing, functools.partial):
        parts = [thing.func, thing.args, thing.keywords]
    elif isinstance(thing, types.MethodType):
        parts = [thing.__self__, thing.__func__]
    elif isinstance(thing, functools._lru_cache_wrapper):
        parts = [thing.__wrapped__]
    elif isinstance(thing, types.FunctionType):
        parts = [thing.__defaults__, thing.__kwdefaults__, vars(thing), global_data(thing)]
        parts += [cell_contents(cell) for cell in thing.__closure__ or ()]
    elif isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values(), *vars_of(thing)]
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        parts = [*thing, *vars_of(thing)]
    elif parts := vars_of(thing):
        pass
    elif hasattr(thing, "__dict__"):  # it may come to have attributes, and has none yet
        parts = []
    else:
        raise Opaque(f"it holds a {type(thing).__name__}")
    return type(thing), *(_state_of(part, seen) for part in parts)


def vars_of(thing) -> list:
    """Names and values of the attributes that `thing` has of its own."""
    slots = {name for kind in type(thing).__mro__ for name in slots_of(kind) if hasattr(thing, name)}
    attributes = {name: getattr(thing, name) for name in sorted(slots)} | getattr(thing, "__dict__", {})
    return [part for pair in attributes.items() for part in pair]


def slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in slots if name not in ("__dict__", "__weakref__"))


def cell_contents(cell: types.CellType):
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def global_data(function: types.FunctionType) -> dict:
    """The global variables that `function` names and that are data, such as a counter."""
    there = function.__globals__
    kinds = (*PLAIN, list, dict, set, deque, tuple, random.Random)
    return {
        name: there[name] for name in function.__code__.co_names if name in there and isinstance(there[name], kinds)
    }
