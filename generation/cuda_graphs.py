"""Passes as CUDA graphs: recorded where their shape comes up first, replayed from then on.

A pass of a small model is hundreds of kernels, which a GPU is through with before the host can ask for the next one. A
graph asks for all of them at once. It holds addresses, not values: what differs from round to round (tokens, lengths of
the rows) is copied to where it was when the graph was recorded, and keys and values stay in the cache's buffers.

Graphs live as long as a call of generate(), so that nothing in them can be out of date: weights, adapters, buffers.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .ragged_cache import RaggedCache

MOST_RECORDED = 64
"""Graphs of one call, which each take some memory. What comes up later runs as it is written."""

_recording = threading.Lock()  # torch's generator takes part in one recording at a time
_here = threading.local()  # `graphs` of the call that this thread is in


@contextmanager
def recorded_passes(wanted: bool, borrowed=None):
    """Record and replay what `run_pass` runs in this thread, if that is `wanted`.

    Args:
        borrowed: the target as a drafter watches it, by hooks, which a replayed pass does not call.
    """
    outer, _here.graphs = getattr(_here, "graphs", None), Graphs(borrowed) if wanted else None
    try:
        yield
    finally:
        _here.graphs = outer


def run_pass(cache: RaggedCache, width: int, name: tuple, function: Callable[..., tuple], *inputs) -> tuple:
    """`function(*inputs)`, which may be replayed.

    Args:
        cache: the one that the pass reads and writes.
        width: tokens that it writes.
        name: of the function, and whatever else it depends on that is not a tensor.
        function: returns a tuple of tensors and `None`. It computes with `inputs`, which are tensors, with `cache` and
            with weights, and leaves nothing else behind.
    """
    graphs = getattr(_here, "graphs", None)
    if graphs is None or not can_record(inputs[0].device):
        return function(*inputs)
    cache.is_recorded = True
    cache.reserve(width)
    return graphs.run(cache, name, function, inputs)


def can_record(device: torch.device) -> bool:
    """Weights that autocast casts are kept for the passes that follow, and would be lost with the graph's memory."""
    return device.type == "cuda" and not torch.is_autocast_enabled(device.type)


def check_recordable(model) -> None:
    """
    Raises:
        ValueError: the target is not on one GPU.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or not can_record(next(iter(devices))):
        raise ValueError(
            f"cuda_graphs=True was given and the target is on {', '.join(sorted(map(str, devices)))}; expected all of "
            "it on one CUDA GPU, and no torch.autocast around the call. Leave cuda_graphs out."
        )


class Graphs:
    """The recorded passes of one call."""

    def __init__(self, borrowed=None):
        self.borrowed = borrowed
        self.of_caches: dict[RaggedCache, tuple[int, dict[tuple, RecordedPass]]] = {}
        self.pool = self.stream = None
        self.given_up = False

    def run(self, cache: RaggedCache, name: tuple, function, inputs: tuple[torch.Tensor, ...]) -> tuple:
        moves, recorded = self.of_caches.get(cache, (0, {}))
        if moves != cache.moves:  # its buffers are elsewhere now
            recorded = {}
        self.of_caches[cache] = cache.moves, recorded
        key = name, cache.kv_length, *((part.shape, part.dtype) for part in inputs)
        if key in recorded:
            return recorded[key].replay(inputs)
        if self.given_up or sum(len(passes) for _, passes in self.of_caches.values()) >= MOST_RECORDED:
            return function(*inputs)
        with Watch() as watch:  # the first time also loads what kernels need, which cannot be recorded
            outputs = function(*inputs)
        try:
            if watch.obstacle is not None:
                raise RuntimeError(watch.obstacle)
            recorded[key] = self.record(cache, function, inputs, outputs)
        except RuntimeError as error:
            self.given_up = True
            warnings.warn(f"This call goes on without CUDA graphs: {error}", stacklevel=2)
        return outputs

    def record(self, cache: RaggedCache, function, inputs, outputs) -> RecordedPass:
        """
        Raises:
            RuntimeError: it cannot be recorded, or computes something else than the `outputs` of `function(*inputs)`.
        """
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(inputs[0].device)
        recorded = RecordedPass(cache, function, inputs, self.borrowed, self.pool, self.stream)
        with aside(self.borrowed):
            again = recorded.replay(inputs)
        if not all(agree(ours, theirs) for ours, theirs in zip(again, outputs, strict=True)):
            raise RuntimeError("a pass computed something else when it was replayed.")
        return recorded


class RecordedPass:
    """One function at one shape. Its outputs are copied, since all passes that are recorded share their memory."""

    def __init__(self, cache: RaggedCache, function, inputs, borrowed, pool, stream):
        self.cache, self.borrowed, self.graph = cache, borrowed, torch.cuda.CUDAGraph()
        self.inputs, self.lengths = [part.clone() for part in inputs], cache.lengths.clone()
        lengths, cache.lengths = cache.lengths, self.lengths
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        try:
            # torch.cuda.graph() does the same, but frees all memory that is kept for later, each time.
            with _recording, torch.cuda.stream(stream), aside(borrowed) as self.left:
                self.graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    self.outputs = function(*self.inputs)
                finally:
                    self.graph.capture_end()
        finally:
            cache.lengths = lengths
        torch.cuda.current_stream(stream.device).wait_stream(stream)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> tuple:
        self.lengths.copy_(self.cache.lengths)
        for place, values in zip(self.inputs, inputs, strict=True):
            place.copy_(values)
        self.graph.replay()
        if self.left:
            self.borrowed.leave({layer: [states.clone() for states in passes] for layer, passes in self.left.items()})
        return tuple(None if output is None else output.clone() for output in self.outputs)


def aside(borrowed):
    """What passes inside leave for the drafter does not reach it; it is what this yields."""
    return nullcontext({}) if borrowed is None else borrowed.aside()


class Watch(TorchDispatchMode):
    """Looks for what cannot be recorded: where the host waits for a value, and random numbers, of which a replay would
    draw others. To try and fail instead would leave torch's generator unusable.

    Attributes:
        obstacle: the last one that was met, in words.
    """

    OBSTACLES = {
        torch.Tag.data_dependent_output: "lets the host wait for a value",
        torch.Tag.dynamic_output_shape: "has a result whose shape depends on values",
        torch.Tag.nondeterministic_seeded: "draws random numbers",
    }
    COPIES = ("aten::_to_copy", "aten::copy_")
    INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::index_put_")

    def __init__(self):
        super().__init__()
        self.obstacle: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output, name = func(*args, **(kwargs or {})), func.name()
        obstacles = [words for tag, words in self.OBSTACLES.items() if tag in func.tags]
        if "scaled_dot_product" in name:  # random only where there is dropout
            obstacles = []
        elif name in self.COPIES:
            devices = {part.device for part in (*args, output) if isinstance(part, torch.Tensor)}
            obstacles = ["copies between devices"] * (len(devices) > 1)
        elif name in self.INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            obstacles = ["has a mask as an index"] * bool(masks)
        if obstacles:
            self.obstacle = f"{name} {obstacles[0]}, which cannot be recorded."
        return output


def agree(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    """Whether numbers are the same up to rounding. Of token ids nothing is asked: they may be those of near ties."""
    if ours is None or not ours.is_floating_point():
        return True
    precision = torch.finfo(ours.dtype).eps ** 0.5
    spread = float(theirs.float().nan_to_num(0.0, 0.0, 0.0).std(correction=0))
    return torch.allclose(ours, theirs, rtol=precision, atol=precision * spread, equal_nan=True)
