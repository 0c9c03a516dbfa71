"""CUDA graphs without a GPU: a tape of operations, as strict as a graph is.

Recording leaves nothing behind but the tape: what was computed is garbage, and what was written is as it was before.
Where the host would have to wait for a value, or a random number is drawn, recording fails. A replay repeats the
operations on the tensors that they were recorded with, whatever is in them, and spoils what all other tapes hold, since
graphs share their memory.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specformer.generation import backend_graphs as cuda_graphs
from specformer.generation import backend_recordable as recordable

WAITS = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}


def must_wait(func, args: tuple) -> bool:
    if func.name().startswith("aten::index"):
        return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1]))
    return bool(WAITS & set(func.tags)) and "scaled_dot_product" not in func.name()


class Tape(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph."""

    tapes: WeakSet[Tape] = WeakSet()
    recorded = replayed = failed = most_at_once = 0

    def __init__(self):
        super().__init__()
        self.operations: list[tuple] = []
        self.own: list[torch.Tensor] = []  # computed, with memory of its own
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def capture_begin(self, pool, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"  # other threads may do what they like
        if pool.was_used and not any(tape.pool is pool for tape in Tape.tapes):
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")  # as torch says of memory without a graph
        pool.was_used, self.pool, self.is_valid = True, pool, True
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        for tensor, values in reversed(self.before):
            tensor.copy_(values)
        if not self.is_valid:
            Tape.failed += 1
            raise RuntimeError("the recording is invalid")
        Tape.recorded += 1
        Tape.tapes.add(self)
        Tape.most_at_once = max(Tape.most_at_once, len(Tape.tapes))
        self.spoil()

    def replay(self) -> None:
        Tape.replayed += 1
        for tape in Tape.tapes - {self}:
            if tape.pool is self.pool:
                tape.spoil()
        for function, args, kwargs, outputs, are_new in self.operations:
            again = tree_leaves(function(*args, **kwargs))
            for output, values, is_new in zip(outputs, again, are_new, strict=True):
                if is_new:
                    output.copy_(values)

    def spoil(self) -> None:
        for tensor in self.own:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            if (output := func.decompose(*args, **kwargs)) is not NotImplemented:
                return output
        inputs = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        if must_wait(func, args):
            self.is_valid = False
            raise RuntimeError("not permitted while a stream is being recorded")
        for part, argument in zip(args, func._schema.arguments, strict=False):
            if argument.is_write:
                self.before.append((part, part.clone()))
        returned = func(*args, **kwargs)
        outputs = tree_leaves(returned)
        storages = {part.untyped_storage().data_ptr() for part in inputs}
        are_new = [
            isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in storages
            for output in outputs
        ]
        self.own += [output for output, is_new in zip(outputs, are_new, strict=True) if is_new]
        self.operations.append((func, args, kwargs, outputs, are_new))
        return returned


def use_tapes(monkeypatch) -> type[Tape]:
    """Let this package take the CPU for a GPU whose graphs are tapes."""
    stream = SimpleNamespace(device=torch.device("cpu"), wait_stream=lambda other: None)
    for module in (cuda_graphs, recordable):
        monkeypatch.setattr(module, "can_record", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: SimpleNamespace(was_used=False))
    monkeypatch.setattr(cuda_graphs, "_free", defaultdict(list))
    monkeypatch.setattr(cuda_graphs, "_broken", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    Tape.recorded = Tape.replayed = Tape.failed = Tape.most_at_once = 0
    Tape.tapes.clear()
    return Tape
