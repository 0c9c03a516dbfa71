"""What made a result: command, versions, machine. Every file under benchmarks/results carries it."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def provenance(module: str) -> dict:
    """`module` is the script as `python -m` takes it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    arguments = [os.path.basename(value) if value.startswith(("/", "~", "..")) else value for value in sys.argv[1:]]
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "specformer")},
        },
        "machine": {"device": device, "cpu": processor_name(), "torch_threads": torch.get_num_threads()},
    }
