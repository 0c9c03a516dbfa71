"""Mixers: the modules of a target that keep a state of the text, recurrent or convolutional, and how they read several
tokens in one pass.

After a pass each row goes on from the state after the tokens that it took, so the states in between are needed. A mixer
gives but the last one, and for several tokens at once it often takes another algorithm than for one, which rounds in
another way, or begins anew. So it is called token by token, as in plain decoding, and its states are kept after each.
What takes the time in that would be reading its weights once per token. So linear layers that do not depend on the
state are given all tokens at once: those at a mixer's beginning, and the one at its end.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .backend_compiled import is_compiled, uncompiled
from .backend_process import shared
from .backend_shared_products import SharedProducts
from .cache_ragged import RaggedCache
from .cache_states import MiniMaxNames, StateName

_takes_any_cache: WeakKeyDictionary = WeakKeyDictionary()  # by the class of a model


def keeps_states(model) -> bool:
    """Whether some layers of `model` keep a state in its cache."""
    layers = DynamicCache(config=model.config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def takes_any_cache(model) -> bool:
    """Whether `model` takes caches of any class under `use_cache`. MiniMax's code wants one of its own class there, and
    what it asks of that one, the caches here have as well (`MiniMaxNames`)."""
    kind = type(model)
    if kind not in _takes_any_cache:  # each pass asks
        modules = filter(None, (sys.modules.get(base.__module__) for base in kind.__mro__))
        values = chain.from_iterable(vars(module).values() for module in modules)
        own = any(isinstance(value, type) and hasattr(value, "set_linear_cache") for value in values)
        _takes_any_cache[kind] = not own
    return _takes_any_cache[kind]


def prompt_cache(model) -> DynamicCache:
    """An empty cache for a pass of `model` over prompts."""
    return WatchedCache(config=model.config) if keeps_states(model) else DynamicCache(config=model.config)


def as_written(cache: DynamicCache, model):
    """A context in which a compiled `model` runs as it is written, so that its mixers can be told apart."""
    return uncompiled() if isinstance(cache, WatchedCache) and is_compiled(model) else nullcontext()


class WatchedCache(MiniMaxNames, DynamicCache):
    """The cache of a pass over prompts, which sees which modules keep states in it.

    Attributes:
        states_of: by module, its layer and the states there.
    """

    def __init__(self, config):
        super().__init__(config=config)
        self.states_of: defaultdict[nn.Module, tuple[int, set[StateName]]] = defaultdict(lambda: (-1, set()))

    def update_conv_state(self, conv_states, layer_idx, state_idx=0, **kwargs):
        self._note("conv_states", layer_idx, state_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states, layer_idx, state_idx=0, **kwargs):
        self._note("recurrent_states", layer_idx, state_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def _note(self, kind: str, layer: int, number: int) -> None:
        module = running_module()
        names = self.states_of[module][1] | {(kind, number)}
        self.states_of[module] = layer, names


def running_module() -> nn.Module:
    """The innermost module that this thread runs."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            return module
        frame = frame.f_back
    raise RuntimeError("no module is running")


class Mixers:
    """How the mixers of a model read the tokens of a pass.

    Args:
        model: whose mixers they are.
        states_of: by mixer, its layer and the states there.
    """

    def __init__(self, model: nn.Module, states_of: dict[nn.Module, tuple[int, set[StateName]]]):
        self.states_of, self.are_compiled = dict(states_of), is_compiled(model)
        self.last_weights: dict[nn.Module, torch.Tensor | None] = {}  # of the linear layer that ends a mixer

    def __call__(self, cache: RaggedCache, mixer: nn.Module, forward, args: tuple, kwargs: dict):
        """What `forward(*args, **kwargs)` of `mixer` gives for all tokens of the pass, one after the other."""
        number, names = self.states_of[mixer]
        layer, (inputs, structure) = cache.state_layers[number], tree_flatten((args, kwargs))
        width = cache.width
        layer.recall(names)
        if width == 1:
            output = forward(*args, **kwargs)
            layer.remember(names, 1)
            return output
        outputs, products = [], SharedProducts(width, self.last_weights.get(mixer))
        for token in range(width):
            args, kwargs = tree_unflatten([products.part(value, token) for value in inputs], structure)
            with products:
                outputs.append(forward(*args, **kwargs))
            layer.remember(names, token + 1)
        if mixer not in self.last_weights:
            self.last_weights[mixer] = products.weight_behind(outputs[0])
        return products.joined(outputs)


def new_registration() -> SimpleNamespace:
    """All copies of this code share one: of the mixers inside, how often, what they run there and had before."""
    return SimpleNamespace(lock=threading.Lock(), inside={})


_registration = shared("mixers_by_token", new_registration)


@contextmanager
def mixers_by_token(cache: RaggedCache):
    """Mixers that are called with `cache` read its tokens one by one, in what this thread runs inside. Calls with other
    caches, and all calls afterwards, are untouched."""
    mixers, inside = () if cache.mixers is None else cache.mixers.states_of, _registration.inside
    in_compiled_code = cache.mixers is not None and cache.mixers.are_compiled
    with _registration.lock:
        for mixer in mixers:
            count, ours, before = inside.get(mixer, (0, None, vars(mixer).get("forward")))
            if not count:
                ours = vars(mixer)["forward"] = partial(by_token, mixer, mixer.forward)  # setattr would be slow
            inside[mixer] = count + 1, ours, before
    try:
        with uncompiled() if in_compiled_code else nullcontext():
            yield
    finally:
        with _registration.lock:
            for mixer in mixers:
                count, ours, before = inside.pop(mixer)
                if count > 1:
                    inside[mixer] = count - 1, ours, before
                elif vars(mixer).get("forward") is ours:  # not what others put there meanwhile
                    del vars(mixer)["forward"]
                    if before is not None:
                        vars(mixer)["forward"] = before


def by_token(mixer: nn.Module, forward, *args, **kwargs):
    """The forward of a mixer, which may be called with a ragged cache of any copy of this code, or without one."""
    for value in (*args, *kwargs.values()):
        if (mixers := getattr(value, "mixers", None)) is not None:
            return mixers(value, mixer, forward, args, kwargs)
    return forward(*args, **kwargs)
