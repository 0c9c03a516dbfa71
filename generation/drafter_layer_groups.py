"""Which layers of a causal LM read the same input in a layer-parallel pass, and the hooks by which they do."""

from __future__ import annotations

import threading
from contextlib import ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from .backend_compiled import is_compiled, uncompiled
from .target_mixers import keeps_states
from .target_refusals import input_device
from .target_states import find_decoder


class Member(NamedTuple):
    """A layer of a group.

    Attributes:
        attention: its attention module.
        norm: the module in front of that, `None` where it reads what enters the layer.
        gives: how many things its attention gives, 0 where that is a tensor alone.
        kind: of layer, where the config tells kinds apart: each has a mask of its own.
    """

    attention: nn.Module
    norm: nn.Module | None
    gives: int
    kind: str | None

    def of_input(self, states: torch.Tensor) -> torch.Tensor:
        """What its attention reads where `states` enter the layer."""
        return states if self.norm is None else self.norm(states)

    def as_given(self, attended: torch.Tensor) -> tuple | torch.Tensor:
        """What its attention gives with `attended`, of which layers read no more."""
        return (attended, *[None] * (self.gives - 1)) if self.gives else attended


class Group(NamedTuple):
    """
    Attributes:
        first: the layer that what enters the group enters.
        members: it, and the layers after it.
    """

    first: nn.Module
    members: list[Member]


class SameInput(ExitStack):
    """The attention of the layers in `groups` reads what enters its group, in passes of this thread inside.

    Hooks do that, which are there for the pass alone.
    """

    def __init__(self, groups: list[Group]):
        super().__init__()
        self.groups, self.thread = groups, threading.get_ident()
        self.entering: torch.Tensor | None = None  # the group that is computed

    def __enter__(self) -> SameInput:
        super().__enter__()
        for group in self.groups:
            hook = group.first.register_forward_pre_hook(self._enter, with_kwargs=True)
            self.callback(hook.remove)
            for follower in group.members[1:]:
                hook = follower.attention.register_forward_pre_hook(self._replace(follower), with_kwargs=True)
                self.callback(hook.remove)
        return self

    def _enter(self, module, args, kwargs=None) -> None:
        if threading.get_ident() == self.thread:
            self.entering = entering(args, kwargs)

    def _replace(self, follower: Member):
        # where this thread removes its hooks during a pass of another one, that pass may call them without kwargs
        def hook(module, args, kwargs=None):
            if threading.get_ident() != self.thread or self.entering is None:
                return None
            return reading(follower.of_input(self.entering), args, kwargs or {})

        return hook


def entering(args: tuple, kwargs: dict | None):
    """What a layer, or a module in it, reads of the text."""
    return args[0] if args else (kwargs or {}).get("hidden_states")


def reading(states: torch.Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A call of attention as `args` and `kwargs` have it, which reads `states` of the text."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def groups_of(assistant, group_size: int) -> list[Group]:
    """Groups of `group_size` layers, or fewer at the end, of those between the first and the last one; none where all
    would have a single layer.

    Raises:
        ValueError: there is a layer of which it cannot be told what its attention reads.
    """
    if group_size == 1:
        return []
    if keeps_states(assistant):
        raise ValueError(
            f"The assistant {type(assistant).__name__} has layers that keep states in place of attending to the text; "
            "expected one with attention in each layer, or group_size=1."
        )
    layers = list(find_decoder(assistant)[1])
    members = members_of(assistant, layers)
    inner = range(1, len(layers) - 1)
    groups = [inner[start : start + group_size] for start in range(0, len(inner), group_size)]
    return [Group(layers[group[0]], [members[at] for at in group]) for group in groups if len(group) > 1]


@torch.no_grad()
def members_of(assistant, layers: list[nn.Module]) -> list[Member]:
    """Of each layer its attention, and the module between that and what enters the layer: by a pass over two tokens, in
    which it is seen who reads whose results."""
    seen: dict[nn.Module, tuple] = {}  # by module, what it read and gave
    thread = threading.get_ident()

    def note(module, args, *kwargs_and_output) -> None:
        if threading.get_ident() == thread:
            kwargs = kwargs_and_output[0] if len(kwargs_and_output) > 1 else None
            seen[module] = entering(args, kwargs), kwargs_and_output[-1]

    with ExitStack() as stack:
        stack.enter_context(uncompiled() if is_compiled(assistant) else nullcontext())
        for layer in layers:
            for module in (layer, *layer.children()):
                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        assistant(input_ids=torch.zeros(1, 2, dtype=torch.long, device=input_device(assistant)), use_cache=False)
    kinds = dict(enumerate(getattr(assistant.config.get_text_config(decoder=True), "layer_types", None) or ()))
    members = []
    for number, layer in enumerate(layers):
        found = [
            child
            for name, child in layer.named_children()
            if ("attn" in name or "attention" in name) and any(True for _ in child.children())  # which no norm has
        ]
        enters = seen[layer][0] if layer in seen else None
        reads = seen[found[0]][0] if len(found) == 1 and found[0] in seen else None
        norms = [
            child
            for child in layer.children()
            if child in seen and seen[child][0] is enters and seen[child][1] is reads
        ]
        if enters is None or reads is None or not (reads is enters or len(norms) == 1):
            raise ValueError(
                f"The layers of the assistant {type(assistant).__name__} are built in a way in which it cannot be told "
                "what their attention reads; expected a norm in front of it, or nothing. Pass group_size=1, or another "
                "assistant."
            )
        given = seen[found[0]][1]
        gives = len(given) if isinstance(given, tuple) else 0
        members.append(Member(found[0], None if reads is enters else norms[0], gives, kinds.get(number)))
    return members
