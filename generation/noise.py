"""The random numbers that plain generate() would draw, at any step and for any row.

`torch.multinomial(p, 1)` is `argmax(p / q)` with q ~ Exp(1) drawn for the whole batch (B, V): bit for bit, and with the
same generator state afterwards. So drawing step t's noise once, in step order, and using row b's part of it whenever
row b gets to step t, samples the text that plain generate() samples for the same seed, whatever was drafted.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

KEPT_BYTES = 512 * 2**20


def default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = device.index if device.index is not None else torch.accelerator.current_device_index()
    return getattr(torch, device.type).default_generators[index]


class StepNoise:
    """Exponential noise (B, V) of every sampling step.

    Rows advance at their own pace, so steps are asked for again. What is kept for that is one generator state per
    step and, while they fit into `KEPT_BYTES`, the draws themselves.
    """

    def __init__(self, batch_size: int, device: torch.device):
        self.batch_size, self.device = batch_size, device
        self.source = default_generator(device)
        self.generator = torch.Generator(device)
        self.states = {0: self.source.get_state()}  # before drawing the step
        self.drawn = 0  # steps whose successor's state is known
        self.kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def step(self, step: int, vocab_size: int) -> torch.Tensor:
        """Noise of one step, (B, V)."""
        if step in self.kept:
            return self.kept[step]
        for current in range(min(step, self.drawn), step + 1):
            self.generator.set_state(self.states[current])
            noise = torch.empty(self.batch_size, vocab_size, dtype=torch.float32, device=self.device)
            noise.exponential_(1, generator=self.generator)
            self.kept[current] = noise
            if current == self.drawn:
                self.drawn += 1
                self.states[self.drawn] = self.generator.get_state()
        while len(self.kept) > 1 and len(self.kept) * noise.nbytes > KEPT_BYTES:
            self.kept.popitem(last=False)
        return noise

    def gather(self, rows: list[int], steps: list[int], vocab_size: int) -> torch.Tensor:
        """Noise of (row, step) pairs, (len(rows), V)."""
        noise = torch.empty(len(rows), vocab_size, dtype=torch.float32, device=self.device)
        for step in sorted(set(steps)):
            places = [place for place, other in enumerate(steps) if other == step]
            noise[places] = self.step(step, vocab_size)[[rows[place] for place in places]]
        return noise

    def forget_before(self, step: int) -> None:
        """No row will ask for a step before `step` again."""
        for old in [other for other in self.kept if other < step]:
            del self.kept[old]
        for old in [other for other in self.states if other < step]:
            del self.states[old]

    def leave_after(self, step: int, vocab_size: int) -> None:
        """Leave torch's generator where plain generate() leaves it after `step` steps."""
        if step not in self.states:
            self.step(step - 1, vocab_size)
        self.source.set_state(self.states[step])
