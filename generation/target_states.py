"""What a target's layers compute in one pass, as results of that pass.

State i is what enters layer i; the last one, L, is what the head reads, behind the final norm. Hooks take them, which
are there for the pass alone, and see the passes of their own thread only.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn


class HiddenStates:
    """The states of one pass that `model` runs inside.

    Args:
        layers: which, ascending; `None` for none.
    """

    def __init__(self, model, layers: Sequence[int] | None):
        self.layers = layers
        self.seen: dict[int, torch.Tensor] = {}
        self.parts = None if layers is None else find_decoder(model)
        self.model, self.attached = model, ExitStack()

    def __enter__(self) -> HiddenStates:
        if self.layers is None:
            return self
        owner = threading.get_ident()

        # Where this thread removes its hooks during a pass of another one, that pass may call them without kwargs.
        def before_layer(number: int):
            def hook(module, args, kwargs=None):
                if threading.get_ident() == owner:
                    self.seen[number] = args[0] if args else kwargs["hidden_states"]

            return hook

        def after_decoder(module, args, *kwargs_and_output):
            if threading.get_ident() == owner:
                self.seen[len(layers)] = kwargs_and_output[-1][0]

        decoder, layers = self.parts
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
        if self.layers is None:
            return None
        if missing := [number for number in self.layers if number not in self.seen]:
            raise RuntimeError(f"The pass of {type(self.model).__name__} did not go through its layers {missing}.")
        return torch.stack([self.seen[number].to(device) for number in self.layers], dim=2)


def find_decoder(model) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder layers and the final norm, and its list of layers."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    # get_decoder() may return something else that is called `decoder`, such as the head
    for module in (*model.get_decoder().modules(), *model.modules()):
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise ValueError(
        f"{type(model).__name__} has no nn.ModuleList of {count} decoder layers to read hidden states from."
    )
