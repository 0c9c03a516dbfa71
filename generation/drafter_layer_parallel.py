"""Layer-parallel drafting (EasySpec, arXiv 2502.02493): an ordinary causal LM whose attention layers read, in groups,
the same input, so that those of a group need not wait for one another.

With what enters a group as h, the attention of each of its layers reads norm(h), as if the layers in front of it had
changed nothing, and what it gives is added where it always is; MLPs read what they always do. The first and the last
layer are exact, and so is the pass over what the target took, from which the first draft of a round comes and in which
keys and values of the text are computed: those of drafts are dropped each round.

Here one device computes the attention of a group layer by layer, so that nothing is faster by it: drafts are those that
several devices would propose, at the time of an ordinary assistant and of what it reads again.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationMixin

from .argument import name_of, whole_number
from .backend_compiled import is_compiled, uncompiled
from .backend_graphs import run_pass
from .cache_masks import attention_masks
from .drafter import Drafter
from .drafter_assistant import AssistantDrafter
from .drafter_system import DraftingSystem, Parts
from .proposal import Proposal
from .target import read_block
from .target_mixers import keeps_states
from .target_refusals import input_device
from .target_states import find_decoder


class LayerParallel(DraftingSystem):
    """An assistant that drafts with several attention layers at once.

    Args:
        assistant: a causal LM with the target's tokenizer.
        group_size: layers whose attention goes from the same input; 1: the ordinary assistant.

    Raises:
        ValueError: what is no causal LM or no number, or a model whose layers are not built in a way that is known.
    """

    def __init__(self, assistant, group_size: int = 4):
        if not isinstance(assistant, GenerationMixin):
            raise ValueError(
                f"assistant is a {name_of(assistant)}; expected a causal LM, loaded with AutoModelForCausalLM."
            )
        if (whole_number(group_size) or 0) < 1:
            raise ValueError(f"group_size is {group_size!r}; expected a positive integer: layers of a group.")
        self.assistant, self.group_size = assistant, int(group_size)
        self.groups = groups_of(assistant, self.group_size)

    def drafter_for(self, target, parts: Parts) -> Drafter:
        return LayerParallelDrafter(self.assistant, target, self.groups)


class Follower(NamedTuple):
    """A layer of a group that is not the first one.

    Attributes:
        attention: its attention module.
        norm: the module in front of that, `None` where it reads what enters the layer.
    """

    attention: nn.Module
    norm: nn.Module | None


class Group(NamedTuple):
    """
    Attributes:
        first: the layer that what enters the group enters.
        others: the layers after it.
    """

    first: nn.Module
    others: list[Follower]


class LayerParallelDrafter(AssistantDrafter):
    """
    Args:
        assistant, target: the models.
        groups: of the layers of `assistant`.
    """

    def __init__(self, assistant, target, groups: list[Group]):
        super().__init__(assistant, target)
        self.groups = groups

    def propose(self, num_tokens, choose) -> Proposal:
        proposal = super().propose(num_tokens, choose)
        if self.groups and self.read is not None:
            self.read = self.read[:, :0]  # all of it is read again, but for the newest token of each text
        return proposal

    def read_draft(self, token: torch.Tensor) -> torch.Tensor:
        if not self.groups:
            return super().read_draft(token)

        def one_pass(token: torch.Tensor) -> tuple[torch.Tensor]:
            position_ids = self.cache.prepare(1)
            masks = attention_masks(self.assistant.config, self.cache, position_ids, self.assistant.dtype)
            with in_parallel(self.assistant, self.groups):
                return (read_block(self.assistant, self.cache, token, position_ids, masks)[0],)

        return run_pass(self.cache, 1, ("layer-parallel",), one_pass, token)[0]


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
            for follower in group.others:
                hook = follower.attention.register_forward_pre_hook(self._replace(follower), with_kwargs=True)
                self.callback(hook.remove)
        return self

    def _enter(self, module, args, kwargs=None) -> None:
        if threading.get_ident() == self.thread:
            self.entering = entering(args, kwargs)

    def _replace(self, follower: Follower):
        # where this thread removes its hooks during a pass of another one, that pass may call them without kwargs
        def hook(module, args, kwargs=None):
            if threading.get_ident() != self.thread:
                return None
            states = self.entering if follower.norm is None else follower.norm(self.entering)
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        return hook


def in_parallel(assistant, groups: list[Group]) -> ExitStack:
    """A context in which `assistant` computes `groups`; compiled code, which calls no new hooks, runs as written."""
    with ExitStack() as stack:
        stack.enter_context(uncompiled() if is_compiled(assistant) else nullcontext())
        stack.enter_context(SameInput(groups))
        return stack.pop_all()


def entering(args: tuple, kwargs: dict | None):
    """What a layer, or a module in it, reads of the text."""
    return args[0] if args else (kwargs or {}).get("hidden_states")


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
    followers = followers_of(assistant, layers)
    inner = range(1, len(layers) - 1)
    groups = [inner[start : start + group_size] for start in range(0, len(inner), group_size)]
    return [Group(layers[group[0]], [followers[at] for at in group[1:]]) for group in groups if len(group) > 1]


@torch.no_grad()
def followers_of(assistant, layers: list[nn.Module]) -> list[Follower]:
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
    followers = []
    for layer in layers:
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
        followers.append(Follower(found[0], None if reads is enters else norms[0]))
    return followers
