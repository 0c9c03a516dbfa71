"""A drafter that learns, in a file: its weights in the precision that it learns in, and what its optimizer keeps."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

FORMAT = "specformer adaptation 1"


def write_state(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, about: dict) -> None:
    """Write all of it in one step, with `about`, which JSON can hold.

    Raises:
        OSError: it cannot be written. What was there before is safe.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, int | float] = {}
    for name, parameter in network.named_parameters():
        tensors[f"weights.{name}"] = parameter.detach().cpu().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().clone()
            elif value is not None:
                numbers[f"{key}.{name}"] = value
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": FORMAT,
            "optimizer": type(optimizer).__name__,
            "numbers": json.dumps(numbers),
            "statistics": json.dumps(about),
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    except Exception as error:  # safetensors has errors of its own for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); what was there before is safe.") from error


def read_state(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, parse: Callable[[dict], Any]) -> Any:
    """Fill `network` and `optimizer` with what `write_state` left of them, and return what `parse` makes of `about`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another drafter or optimizer. Nothing is changed then.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected what `save` of an OnlineDistillation has left.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about, numbers = parse(json.loads(metadata["statistics"])), json.loads(metadata["numbers"])
        if metadata["optimizer"] != type(optimizer).__name__:
            raise ValueError(f"its optimizer is {metadata['optimizer']}, and here it is {type(optimizer).__name__}")
        named = dict(network.named_parameters())
        shapes = {f"weights.{name}": parameter.shape for name, parameter in named.items()}
        theirs = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("weights.")}
        if wrong := sorted(name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name)):
            raise ValueError(f"{', '.join(wrong[:3])} are of another drafter, or damaged")
        if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
            raise ValueError(f"{', '.join(broken[:3])} are not finite")
        kept: dict[nn.Parameter, dict] = {}
        states = [(name.removeprefix("optimizer."), part) for name, part in tensors.items() if name not in shapes]
        for name, value in [*states, *numbers.items()]:
            key, _, of = name.partition(".")
            kept.setdefault(named[of], {})[key] = value
    except Exception as error:
        raise ValueError(f"{path} does not hold this drafter as it learns ({error}). Nothing was changed.") from error
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"weights.{name}"])
    optimizer.state.clear()
    for parameter, state in kept.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:  # a count of steps stays on the host
                state[key] = value.to(parameter)
        optimizer.state[parameter] = state
    return about
