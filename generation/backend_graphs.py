"""Passes as CUDA graphs: recorded where their shape comes up first, replayed from then on.

A pass of a small model is hundreds of kernels, which a GPU is through with before the host can ask for the next one. A
graph asks for all of them at once. It holds addresses, not values: what differs from round to round (tokens, lengths of
the rows) is copied to where it was when the graph was recorded, and keys and values stay in the cache's buffers.

Graphs live as long as a call of generate(), so that nothing in them can be out of date: weights, adapters, buffers.
"""

from __future__ import annotations

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress

import torch

from .backend_process import shared
from .backend_recordable import Watch, agree, can_record, waits_of_gpu
from .cache_ragged import KV_LENGTH_STEP_RECORDED, RaggedCache

MOST_RECORDED = 64
"""Graphs of one call, which each take some memory. What comes up later runs as it is written."""

_here = threading.local()  # `graphs` of the call that this thread is in


@contextmanager
def recorded_passes(wanted: bool):
    """Record and replay what `run_pass` runs in this thread, if that is `wanted`."""
    outer, graphs = getattr(_here, "graphs", None), Graphs() if wanted else None
    _here.graphs = graphs
    try:
        yield
    finally:
        _here.graphs = outer
        if graphs is not None:
            graphs.close()


def run_pass(cache: RaggedCache, width: int, name: tuple, function: Callable[..., tuple], *inputs) -> tuple:
    """`function(*inputs)`, which may be replayed.

    Args:
        cache: the one that the pass reads and writes.
        width: tokens that it writes.
        name: of the function, and whatever else it depends on that is not a tensor.
        function: returns a tuple of tensors and `None`. It computes with `inputs`, which are tensors, with `cache` and
            with weights, and leaves nothing else behind.
    """
    graphs, device = getattr(_here, "graphs", None), inputs[0].device
    if graphs is None or device in _broken or not can_record(device):
        return function(*inputs)
    cache.is_recorded = True
    cache.reserve(width)
    return graphs.run(cache, name, function, inputs)


class Graphs:
    """The recorded passes of one call.

    Attributes:
        of_caches: by cache, how often its buffers had moved when its passes were recorded, and these by their shape.
        memory: what passes are recorded with, by GPU.
        unrecordable: caches and names of passes that run as they are written.
        watched: the same of passes in which nothing was seen that cannot be recorded.
    """

    def __init__(self):
        self.of_caches: dict[RaggedCache, tuple[int, dict[tuple, RecordedPass]]] = {}
        self.memory: dict[torch.device, GraphMemory] = {}
        self.unrecordable, self.watched = set(), set()

    def run(self, cache: RaggedCache, name: tuple, function, inputs: tuple[torch.Tensor, ...]) -> tuple:
        moves, recorded = self.of_caches.get(cache, (0, {}))
        if moves != cache.moves:  # its buffers are elsewhere now
            recorded = {}
        key = cache.kv_length, name, *((part.shape, part.dtype) for part in inputs)
        if key in recorded:
            return recorded[key].replay(inputs)
        # texts grow: what saw fewer slots is not needed again, but where a drafter goes back a few tokens
        least = cache.kv_length - KV_LENGTH_STEP_RECORDED
        recorded = {shape: one for shape, one in recorded.items() if shape[0] >= least}
        self.of_caches[cache] = cache.moves, recorded
        count = sum(len(passes) for _, passes in self.of_caches.values())
        kind = cache, name[0]
        if kind in self.unrecordable or count >= MOST_RECORDED:
            return function(*inputs)
        try:
            outputs = self.run_watched(kind, function, inputs)
            recorded[key] = self.record(cache, function, inputs, outputs)
        except Unrecordable as obstacle:
            outputs = obstacle.outputs
            self.unrecordable.add(kind)
            warnings.warn(f"A pass ({name[0]}) goes on without CUDA graphs: {obstacle}", stacklevel=2)
        return outputs

    def run_watched(self, kind: tuple, function, inputs) -> tuple:
        """`function(*inputs)` as it is written, which also loads what kernels need, since that cannot be recorded. The
        first one of its kind is watched.

        Raises:
            Unrecordable: with these outputs.
        """
        if kind in self.watched:
            return function(*inputs)
        with _recording, Watch() as watch, waits_of_gpu() as waits:
            outputs = function(*inputs)
        if (obstacle := watch.obstacle or waits()) is not None:
            raise Unrecordable(obstacle, outputs)
        self.watched.add(kind)
        return outputs

    def record(self, cache: RaggedCache, function, inputs, outputs) -> RecordedPass:
        """
        Raises:
            Unrecordable: it cannot be recorded, or computes something else than `function(*inputs)`, `outputs`.
        """
        device = inputs[0].device
        try:
            if device not in self.memory:
                self.memory[device] = take_memory(device)
            recorded = RecordedPass(cache, function, inputs, self.memory[device])
            recorded.spoil()
            again = recorded.replay(inputs)
            if all(agree(ours, theirs) for ours, theirs in zip(again, outputs, strict=True)):
                return recorded
            reason = "it computed something else when it was replayed."
        except RuntimeError as error:  # of torch or of CUDA
            reason = f"{type(error).__name__}: {error}"
        # what a wrong replay has written to the cache is written again
        raise Unrecordable(reason, function(*inputs))

    def close(self) -> None:
        with _recording:
            self.of_caches.clear()
            for device, memory in self.memory.items():
                _free[device].append(memory)
            self.memory.clear()


class Unrecordable(Exception):
    """For `Graphs.run`, which goes on with the outputs of the pass as it is written."""

    def __init__(self, reason: str, outputs: tuple):
        super().__init__(reason)
        self.outputs = outputs


class RecordedPass:
    """One function at one shape.

    What one graph puts out may lie where another one computes. So outputs are copied after each replay, and then graphs
    may be replayed in any order.
    """

    def __init__(self, cache: RaggedCache, function, inputs, memory: GraphMemory):
        self.cache = cache
        self.inputs, self.lengths = [part.clone() for part in inputs], cache.lengths.clone()
        lengths, cache.lengths = cache.lengths, self.lengths
        try:
            self.graph, self.outputs = memory.record(lambda: function(*self.inputs))
        finally:
            cache.lengths = lengths

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> tuple:
        self.lengths.copy_(self.cache.lengths)
        for place, values in zip(self.inputs, inputs, strict=True):
            place.copy_(values)
        with _recording:
            self.graph.replay()
        return tuple(None if output is None else output.clone() for output in self.outputs)

    def spoil(self) -> None:
        """Leave nothing where the first replay has to put something."""
        for output in self.outputs:
            if output is not None:
                output.fill_(torch.nan if output.is_floating_point() else -1)


class GraphMemory:
    """The stream and the memory with which graphs are recorded on one GPU, which outlive them: torch does not record
    again in memory of which no graph is left, and does not give it back to others by itself."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        with torch.inference_mode(False):  # the state of torch's generator is made here, for calls outside of it too
            self.anchor = self.record(lambda: torch.zeros(1, device=device))

    def record(self, function: Callable):
        """The graph of `function()`, and what it returned: nothing yet."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        # torch.cuda.graph() does the same, but frees all memory that is kept for later, each time.
        with _recording, torch.cuda.stream(self.stream):
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                outputs = function()
            except BaseException:
                self._end(graph, failed=True)
                raise
            self._end(graph)
        current.wait_stream(self.stream)
        return graph, outputs

    def _end(self, graph, failed: bool = False) -> None:
        """
        Raises:
            RuntimeError: what was recorded cannot be a graph, unless it is known to have `failed` already.
        """
        try:
            graph.capture_end()
        except RuntimeError:
            # torch before 2.13 takes memory from the pool, and its generator for one that is recorded, until a
            # recording ends well; and it must not see another graph in this one's place
            if self.device not in _broken:
                _broken[self.device] = graph
                with suppress(RuntimeError):
                    GraphMemory(self.device)
            if not failed:
                raise


_recording = shared("recording", threading.RLock)  # torch's generator takes part in one recording at a time
_free: defaultdict[torch.device, list[GraphMemory]] = defaultdict(list)  # of calls that are over
_broken: dict[torch.device, object] = {}  # where a recording was not even ended well: nothing is recorded there again


def take_memory(device: torch.device) -> GraphMemory:
    """For one call: what two record at once must not be in one place."""
    with _recording:
        if _free[device]:
            return _free[device].pop()
    return GraphMemory(device)


def free_memory() -> None:
    """Give back what calls with `cuda_graphs=True` keep for the next one: the memory of the largest of them."""
    with _recording:
        _free.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
