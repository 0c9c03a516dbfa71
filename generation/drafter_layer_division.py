"""The layers of a group of `LayerParallel` divided among the processes that share the target, as EasySpec divides them
among devices (arXiv 2502.02493): each computes the attention of its own ones, and they are exchanged in one message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .drafter_layer_groups import Group, Member, SameInput, reading
from .ranks import Ranks

_lock = threading.Lock()


class DividedGroups(SameInput):
    """In passes of this thread inside, each process computes the attention of its own layers of a group, all of them
    where the group begins, and the others' are added to it, of which each is nothing but in one process.

    So a process keeps keys and values of drafts for its own layers alone, and reads no others. What is not called as
    the first layer's attention is, with another mask for example, is computed by all of them when its turn comes.
    """

    def __init__(self, groups: list[Group], ranks: Ranks):
        super().__init__(groups)
        self.ranks = ranks
        self.given: tuple[tuple, dict] = ((), {})  # to the attention of the group that is computed
        self.attended: dict[Member, tuple | torch.Tensor] = {}  # of that group

    def __enter__(self) -> DividedGroups:
        super().__enter__()
        for group in self.groups:
            for member in group.members:
                self.enter_context(replaced_forward(member.attention, partial(self._attend, group, member)))
        return self

    def _attend(self, group: Group, member: Member, forward: Callable, args: tuple, kwargs: dict):
        if member is group.members[0]:
            self.given, self.attended = (args, kwargs), self._exchange(group, args, kwargs)
        if member not in self.attended or not is_same_call(self.given, (args, kwargs)):
            return forward(*args, **kwargs)
        return self.attended[member]

    def _exchange(self, group: Group, args: tuple, kwargs: dict) -> dict[Member, tuple | torch.Tensor]:
        """What the attention of a group's layers gives, for those that are of the first one's kind."""
        assert self.entering is not None  # the layer was entered
        members = [member for member in group.members if member.kind == group.members[0].kind]
        together = self.entering.new_zeros(len(members), *self.entering.shape)  # (layers, R, 1, d)
        for place, member in enumerate(members):
            if place % self.ranks.share_of == self.ranks.share:
                args, kwargs = reading(member.of_input(self.entering), args, kwargs)
                given = vars(member.attention)["forward"].own(*args, **kwargs)
                together[place] = given if isinstance(given, torch.Tensor) else given[0]
        parts = self.ranks.total(together.to(self.ranks.device)).to(together.device).unbind()
        return {member: member.as_given(part) for member, part in zip(members, parts, strict=True)}


def is_same_call(one: tuple[tuple, dict], other: tuple[tuple, dict]) -> bool:
    """Whether two calls of attention differ in nothing but what is read of the text."""
    (positional, named), (others, also) = one, other
    return (
        len(positional) == len(others)
        and named.keys() == also.keys()
        and all(ours is theirs for ours, theirs in zip(positional[1:], others[1:], strict=True))
        and all(named[name] is also[name] for name in named if name != "hidden_states")
    )


class ReplacedForward:
    """The forward of a module while it is another one in some threads.

    Attributes:
        own: the module's.
        others: by thread, what is called with that, and with what it would be called with.
    """

    def __init__(self, module: nn.Module):
        self.own, self.before = module.forward, vars(module).get("forward")
        self.others: dict[int, Callable] = {}

    def __call__(self, *args, **kwargs):
        other = self.others.get(threading.get_ident())
        return self.own(*args, **kwargs) if other is None else other(self.own, args, kwargs)


@contextmanager
def replaced_forward(module: nn.Module, other: Callable):
    """In this thread `module` computes `other(forward, args, kwargs)` inside."""
    thread = threading.get_ident()
    with _lock:
        there = vars(module).get("forward")
        forward = there if isinstance(there, ReplacedForward) else ReplacedForward(module)
        vars(module)["forward"] = forward
        forward.others[thread] = other
    try:
        yield
    finally:
        with _lock:
            del forward.others[thread]
            if not forward.others and vars(module).get("forward") is forward:  # not what was put there meanwhile
                del vars(module)["forward"]
                if forward.before is not None:
                    vars(module)["forward"] = forward.before
