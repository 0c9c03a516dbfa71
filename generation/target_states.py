"""What a target's layers compute in one pass, as results of that pass.

State i is what enters layer i; the last one, L, is what the head reads, after the final norm. Hooks take them, which
are there for the pass alone, and see the passes of their own thread only. Compiled code does not call hooks that it was
not compiled with. A target that is compiled as a whole captures the states itself, as transformers has it with
`output_hidden_states`, if a trial shows that it can; others run as they are written in passes whose states are read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from itertools import chain
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from .backend_compiled import compiled_parts, uncompiled
from .target_refusals import input_device

_captures: WeakKeyDictionary = WeakKeyDictionary()
"""model -> by the layers whose states were asked for, whether it captures them: what a trial has shown."""


class Outputs(Protocol):
    """What is read of a model's outputs, whatever their class, besides states and a cache where they have them."""

    logits: torch.Tensor


class StateReader:
    """Passes of `model` whose results are its outputs and the states of `layers`.

    Args:
        layers: which, ascending; `None` for none.
    """

    def __init__(self, model, layers: Sequence[int] | None):
        self.model, self.layers = model, layers
        compiled = [] if layers is None else list(compiled_parts(model))
        self.captures = layers is not None and compiled == [model] and captures(model, layers)
        self.runs_eagerly = bool(compiled) and not self.captures

    def __call__(self, **inputs) -> tuple[Outputs, torch.Tensor | None]:
        """The outputs of the model's forward for `inputs`, and the states (B, T, S, d) on the device of the logits.

        Raises:
            RuntimeError: the pass did not go through some of the layers.
        """
        if self.layers is not None and self.captures:
            outputs = self.model(**inputs, output_hidden_states=list(self.layers), return_dict=True)
            return outputs, stacked(self.model, self.layers, captured(outputs), outputs.logits.device)
        with uncompiled() if self.runs_eagerly else nullcontext(), HiddenStates(self.model, self.layers) as hidden:
            outputs = self.model(**inputs, return_dict=True)
        return outputs, hidden.result(outputs.logits.device)


@torch.no_grad()
def captures(model, layers: Sequence[int]) -> bool:
    """Whether the forward of `model` gives the states of `layers` where it is asked for them, in a trial on a few
    tokens. For that, transformers installs hooks, which stay."""
    known = _captures.setdefault(model, {})
    if (asked := tuple(layers)) not in known:
        tokens = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
        try:
            with uncompiled(), HiddenStates(model, layers) as hidden:
                theirs = captured(
                    model(input_ids=tokens, use_cache=False, output_hidden_states=list(layers), return_dict=True)
                )
        except (AttributeError, IndexError, TypeError, ValueError):  # it takes no list, or nothing of that kind
            theirs = {}
        known[asked] = all(number in theirs and torch.equal(theirs[number], hidden.seen[number]) for number in layers)
    return known[asked]


def captured(outputs: Outputs) -> dict[int, torch.Tensor]:
    """The states that a model's outputs hold."""
    states = getattr(outputs, "hidden_states", None) or ()
    return {number: state for number, state in enumerate(states) if state is not None}


def stacked(model, layers: Sequence[int], states: dict[int, torch.Tensor], device: torch.device) -> torch.Tensor:
    """`states` of `layers` as one tensor, (B, T, S, d).

    Raises:
        RuntimeError: some are missing.
    """
    if missing := [number for number in layers if number not in states]:
        raise RuntimeError(
            f"The pass of {type(model).__name__} did not go through its layers {missing}, whose states are read: some "
            "models leave out layers for images where there are none. Take a drafter of other target_layer_ids."
        )
    return torch.stack([states[number].to(device) for number in layers], dim=2)


class HiddenStates:
    """The states of one pass that `model` runs inside, by hooks.

    Args:
        layers: which, ascending; `None` for none.
    """

    def __init__(self, model, layers: Sequence[int] | None):
        self.layers = layers
        self.seen: dict[int, torch.Tensor] = {}
        self.model, self.attached = model, ExitStack()

    def __enter__(self) -> HiddenStates:
        if self.layers is None:
            return self
        owner = threading.get_ident()
        decoder, layers = find_decoder(self.model)

        # Where this thread removes its hooks during a pass of another one, that pass may call them without kwargs.
        def before_layer(number: int):
            def hook(module, args, kwargs=None):
                if threading.get_ident() == owner:
                    self.seen[number] = args[0] if args else kwargs["hidden_states"]

            return hook

        def after_decoder(module, args, *kwargs_and_output):
            if threading.get_ident() == owner:
                self.seen[len(layers)] = kwargs_and_output[-1][0]

        with ExitStack() as stack:
            for number in self.layers:
                if number < len(layers):
                    hook = layers[number].register_forward_pre_hook(before_layer(number), with_kwargs=True)
                else:
                    hook = decoder.register_forward_hook(after_decoder, with_kwargs=True)
                stack.callback(hook.remove)
            self.attached = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self.attached.close()

    def result(self, device: torch.device) -> torch.Tensor | None:
        """The states of the pass, (B, T, S, d); `None` where none were asked for."""
        return None if self.layers is None else stacked(self.model, self.layers, self.seen, device)


def find_decoder(model) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder layers and the final norm, and its list of layers."""
    text = model.config.get_text_config(decoder=True)
    # get_decoder() may return something else that is called `decoder`, such as the head
    for module in chain(text_modules(model.get_decoder(), model), text_modules(model, model)):  # mostly the first one
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == text.num_hidden_layers:
                return module, child
    raise ValueError(
        f"{type(model).__name__} has no nn.ModuleList of {text.num_hidden_layers} decoder layers to read hidden states "
        "from."
    )


def text_modules(module: nn.Module, model) -> Iterator[nn.Module]:
    """`module` and what is in it, but for towers that read images or sound: models whose config is of another kind than
    that of `model` and of its text."""
    yield module
    kinds = type(model.config), type(model.config.get_text_config(decoder=True))
    for child in module.children():
        if not isinstance(child, PreTrainedModel) or isinstance(child.config, kinds):
            yield from text_modules(child, model)
