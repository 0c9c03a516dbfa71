"""Whether the rows of a batch have to advance together, one token a round, as they do in plain generate().

Processors and stopping criteria of the caller's own are called on text that plain generate() would show them. Those
that keep state between calls, or give one answer for the whole batch, need more: to be called once a step, with all
rows at one length. Then nothing is drafted, and every round is a step. A single row has its steps in order however much
is drafted for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager

from .argument import name_of
from .text_own_state import Opaque, state_of


class InStep:
    """
    Args:
        batch_size: rows of the batch.

    Attributes:
        reason: why rows must advance together, or `None`.
    """

    def __init__(self, batch_size: int):
        self.is_batch = batch_size > 1
        self.reason: str | None = None
        self.called: set[int] = set()  # ids of what was called before
        self.unsettled: set[int] = set()  # of what its first call changed: it may have prepared itself, or keep state
        self.got_apart = False

    def may_draft(self) -> bool:
        """Whether rows may get apart in the next round."""
        free = self.reason is None and not self.unsettled
        self.got_apart |= free and self.is_batch
        return free

    def require(self, reason: str) -> None:
        """Keep the rows in step from now on.

        Raises:
            RuntimeError: they have got apart.
        """
        if not self.is_batch or self.reason is not None:
            return
        if self.got_apart:
            raise RuntimeError(
                f"{reason} That showed only when the rows of the batch had different lengths, so the text cannot be "
                "that of plain generate() any more. Pass num_assistant_tokens=0, or one prompt a call."
            )
        self.reason = reason
        warnings.warn(
            f"{reason} The rows of this batch advance together, one token a pass: nothing is drafted. One prompt a "
            "call is drafted for.",
            stacklevel=2,
        )

    @contextmanager
    def watch(self, callables: Iterable[Callable]):
        """Look at what `callables` remember before and after they are called inside."""
        watched = list(callables) if self.is_batch and self.reason is None else []
        before = [self._state_of(each) for each in watched]
        yield
        for each, state in zip(watched, before, strict=True):
            self.unsettled.discard(id(each))
            if state != self._state_of(each):
                if id(each) in self.called:
                    self.require(f"{name_of(each)} keeps state between its calls.")
                else:
                    self.unsettled.add(id(each))
            self.called.add(id(each))

    def _state_of(self, callable: Callable):
        try:
            return state_of(callable)
        except Opaque as obstacle:
            self.require(f"{name_of(callable)} may keep state between its calls ({obstacle}).")
