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

TELLING_FLAGS = ("amx_bf16", "avx512_bf16", "avx512_fp16", "avx512f", "avx2", "asimd", "bf16", "sve")
"""Instructions of a processor that matrix products depend on."""


def processor() -> dict[str, str | list[str]]:
    """Its name, and those of its flags that times depend on, as far as the system tells."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {"cpu": name, "cpu_flags": [flag for flag in TELLING_FLAGS if flag in flags]}


def has_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16: without, these are slower than in float32."""
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(processor()["cpu_flags"])


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
        "machine": {"device": device, **processor(), "torch_threads": torch.get_num_threads()},
    }
