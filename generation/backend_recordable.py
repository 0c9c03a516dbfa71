"""What can be recorded as a CUDA graph: on which machine, of which models, and which passes of theirs."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .backend_compiled import is_compiled
from .ranks import ranks_of


def can_record(device: torch.device) -> bool:
    """Weights that autocast casts are kept for the passes that follow, and would be lost with the graph's memory."""
    return device.type == "cuda" and not torch.is_autocast_enabled(device.type)


def check_recordable(*models) -> None:
    """
    Raises:
        ValueError: the target, the first of `models`, is not on one GPU, or one of them is compiled.
    """
    if ranks_of(models[0]) is not None:
        raise ValueError(
            "cuda_graphs=True was given and several processes share the target's weights, so that its passes wait for "
            "one another; expected all of it on one CUDA GPU. Leave cuda_graphs out."
        )
    devices = {parameter.device for parameter in models[0].parameters()}
    if len(devices) != 1 or not can_record(next(iter(devices))):
        raise ValueError(
            f"cuda_graphs=True was given and the target is on {', '.join(sorted(map(str, devices)))}; expected all of "
            "it on one CUDA GPU, and no torch.autocast around the call. Leave cuda_graphs out."
        )
    if any(isinstance(model, torch.nn.Module) and is_compiled(model) for model in models):
        raise ValueError(
            "cuda_graphs=True was given together with a model that torch.compile was applied to; expected one of the "
            "two. Leave cuda_graphs out, or load the model again."
        )


class Watch(TorchDispatchMode):
    """Looks for what cannot be recorded: where the host waits for a value, and random numbers, of which a replay would
    draw others. To try and fail instead costs torch's generator and memory.

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
        kwargs = kwargs or {}
        with self:  # in inference mode what consists of other operations comes as a whole
            if (output := func.decompose(*args, **kwargs)) is not NotImplemented:
                return output
        output, name = func(*args, **kwargs), func.name()
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


@contextmanager
def waits_of_gpu():
    """Yields a function that says, in words, whether the host waited for a GPU inside: kernels of other libraries may
    let it, which `Watch` does not see."""
    if not torch.cuda.is_available():
        yield lambda: None
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: next((f"{warning.message}." for warning in caught if is_wait(warning)), None)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if not is_wait(warning) and "debug mode" not in str(warning.message):  # torch calls that a prototype
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def is_wait(warning) -> bool:
    return "synchronizing CUDA operation" in str(warning.message)


COMPARED = 4096
"""Numbers of each position that are compared: copies of all logits would take much memory."""


def agree(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    """Whether numbers are the same up to rounding, and most token ids, of which some may be those of near ties."""
    if ours is None or theirs is None:
        return ours is theirs
    if not ours.is_floating_point():
        return ours is theirs or bool((ours == theirs).float().mean() >= 0.5)
    ours, theirs = ours[..., :COMPARED], theirs[..., :COMPARED]
    precision = torch.finfo(ours.dtype).eps ** 0.5
    usual = theirs.abs() < 1e4  # logits of some tokens are as low as can be
    spread = float(theirs[usual].float().std(correction=0)) if usual.any() else 0.0
    return torch.allclose(ours, theirs, rtol=precision, atol=precision * spread, equal_nan=True)
