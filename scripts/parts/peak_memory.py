"""The most memory that a call takes beside what was there before."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """From the moment it is made. On a GPU what torch allocates, on a CPU what Linux keeps resident for the process,
    once what it had freed before is given back.

    Args:
        device: of the call.
    """

    def __init__(self, device: torch.device):
        self.device, self.before = device, None
        if device.type == "cpu":
            with suppress(OSError, AttributeError, TypeError):  # another system than Linux with glibc, or no right to
                ctypes.CDLL(None).malloc_trim(0)
                FORGET.write_text("5", encoding="utf-8")  # the peak so far
                self.before = resident("VmRSS")
        else:
            torch.accelerator.reset_peak_memory_stats(device)
            self.before = torch.accelerator.memory_allocated(device)

    def gib(self) -> float | None:
        """Up to now, in GiB; `None` where it cannot be told."""
        if self.before is None:
            return None
        if self.device.type == "cpu":
            return max(resident("VmHWM") - self.before, 0) / 2**30
        return (torch.accelerator.max_memory_allocated(self.device) - self.before) / 2**30


def resident(field: str) -> int:
    """Bytes of this process that are resident now (VmRSS), or were at the peak (VmHWM)."""
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
