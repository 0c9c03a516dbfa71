"""One target in several processes (ranks), which meet in each of its passes: what depends on a clock, a measurement or
a random number is decided by the first of them, and told to the others.

Under tensor or expert parallelism and FSDP2 every rank has to bring the same tokens to the same passes. Plain
generate() does that by itself; how much is drafted, and which drafts, would be each rank's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ranks: ContextVar[Ranks | None] = ContextVar("ranks", default=None)  # of the call that this thread is in


@contextmanager
def among_ranks(model):
    """Inside, `decided` and `told` are for the processes that share the weights of `model`, if it is in several."""
    ranks = ranks_of(model)
    outer = _ranks.set(ranks)
    try:
        yield
    except Exception as error:
        if ranks is not None:
            error.add_note(ranks.sentence)
        raise
    finally:
        _ranks.reset(outer)


def shared_ranks() -> Ranks | None:
    """The processes of the call that this thread is in; `None` where it is alone."""
    return _ranks.get()


def is_first() -> bool:
    """Whether this process is alone, or the one that decides."""
    ranks = _ranks.get()
    return ranks is None or ranks.is_first


def decided(decide: Callable[..., int], *arguments) -> int:
    """What `decide(*arguments)` is, a number or a truth value, in the first process, the only one to ask."""
    return decided_numbers(1, lambda: [decide(*arguments)])[0]


def decided_numbers(count: int, decide: Callable[[], list[int]]) -> list[int]:
    """The same of `count` numbers."""
    ranks = _ranks.get()
    if ranks is None:
        return decide()
    numbers = torch.tensor(decide() if ranks.is_first else [0] * count, dtype=torch.long, device=ranks.device)
    return ranks.broadcast(numbers).tolist()


def agreed(willing: bool) -> bool:
    """Whether every process is `willing`."""
    ranks = _ranks.get()
    if ranks is None:
        return willing
    return not ranks.largest(torch.tensor([int(not willing)], device=ranks.device)).item()


def follow_first(tensors: Iterable[torch.Tensor]) -> None:
    """Give `tensors`, of any dtype, the first process's numbers, in place."""
    ranks = _ranks.get()
    if ranks is None:
        return
    for tensor in tensors:
        tensor.copy_(ranks.broadcast(tensor.to(ranks.device, copy=True)))


def told(*tensors):
    """The first process's `tensors`, which hold integers and have one shape in all processes. What is `None` stays."""
    ranks, given = _ranks.get(), [tensor for tensor in tensors if tensor is not None]
    if ranks is None or not given:
        return tensors
    packed = ranks.broadcast(torch.cat([tensor.flatten().to(ranks.device, torch.long) for tensor in given]))
    parts = iter(packed.split([tensor.numel() for tensor in given]))
    return tuple(None if tensor is None else next(parts).view(tensor.shape).to(tensor) for tensor in tensors)


class Ranks:
    """The processes that share a target.

    Args:
        groups: process groups in which its passes communicate, one for each axis of its mesh.
        device_type: of the mesh.

    Attributes:
        rank, size: this process among all, and how many these are.
        is_first: whether it is the one that decides: at the beginning of all axes.
        share, share_of: the place of this process among those of the largest group, which divide work among them, and
            how many these are.
    """

    def __init__(self, groups: Sequence, device_type: str):
        import torch.distributed as distributed

        self.groups, self.device = groups, torch.device(device_type)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.is_first = all(distributed.get_rank(group) == 0 for group in groups)
        self.largest_group = max(groups, key=distributed.get_world_size)
        self.share = distributed.get_rank(self.largest_group)
        self.share_of = distributed.get_world_size(self.largest_group)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as the first process has it, in place."""
        import torch.distributed as distributed

        for group in self.groups:  # along one axis after the other
            distributed.broadcast(tensor, src=distributed.get_global_rank(group, 0), group=group)
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of all processes' numbers, in place."""
        import torch.distributed as distributed

        for group in self.groups:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=group)
        return tensor

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the largest group, in place."""
        import torch.distributed as distributed

        distributed.all_reduce(tensor, group=self.largest_group)
        return tensor

    @property
    def sentence(self) -> str:
        return (
            f"Raised in rank {self.rank}. The target's weights are shared by several processes, which wait for one "
            "another in every pass: where one has failed, has ended or makes another call, the others fail or wait, at "
            "most for the timeout of torch.distributed.init_process_group(timeout=...). The error of the process that "
            "failed first says why."
        )


def is_synchronized(model) -> bool:
    """Whether several processes gather the weights of `model` for each pass in a way that shows nothing of a mesh:
    DeepSpeed ZeRO-3, or FSDP in its first form."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    if distributed.get_world_size() == 1:
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") and not parameter.numel()  # empty until it is gathered
        for parameter in model.parameters()
    )


def ranks_of(model) -> Ranks | None:
    """The processes that share the weights of `model`; `None` where torch.distributed is off, or it is in one."""
    distributed = sys.modules.get("torch.distributed")  # whoever started processes has imported it
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    from torch.distributed.tensor import DTensor

    mesh = getattr(model, "_device_mesh", None)  # quantised weights may show nothing else of it
    axes: dict[tuple, None] = {} if mesh is None else {(mesh, axis): None for axis in range(mesh.ndim)}
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            spread = (axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate())
            axes.update({(parameter.device_mesh, axis): None for axis in spread})
    groups: dict[tuple, tuple] = {}  # by their ranks: one, and the kind of device that it is for
    for of_weights, axis in axes:
        if of_weights.size(axis) > 1:
            group = of_weights.get_group(axis)
            groups.setdefault(tuple(distributed.get_process_group_ranks(group)), (group, of_weights.device_type))
    if not groups:
        return None
    found, (device_type, *_) = zip(*groups.values(), strict=True)
    return Ranks(found, device_type)
