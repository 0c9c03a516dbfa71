"""Exp(1) noise of any row at any step, as often as it is asked for.

`torch.multinomial(p, 1)` is `argmax(p / noise)`, so whoever fixes the noise of a position fixes the token sampled
there. `StepNoise` gives the noise that plain generate() would draw, `HashedNoise` one that depends on nothing but a
row's own seed and position.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch

from .backend_process import shared
from .ranks import shared_ranks, told
from .text_positions import Positions

KEPT_BYTES = 512 * 2**20


def default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    index = device.index if device.index is not None else torch.accelerator.current_device_index()
    return getattr(torch, device.type).default_generators[index]


def share_generators(device: torch.device) -> None:
    """Where several processes share a target, all go on from the random numbers of the first one."""
    if shared_ranks() is None:
        return
    for generator in {id(each): each for each in (torch.default_generator, default_generator(device))}.values():
        (state,) = told(generator.get_state())
        generator.set_state(state)


_replayed: set[torch.device] = shared("replayed", set)  # devices whose default generator some call is replaying
_replayed_lock = shared("replayed_lock", threading.Lock)


class StepNoise:
    """The noise (B, V) that plain generate() would draw at every sampling step.

    torch.multinomial draws for the whole batch: bit for bit this noise, and with the same generator state afterwards.
    So drawing step t's noise once, in step order, and using row b's part of it whenever row b gets to step t, samples
    the text that plain generate() samples for the same torch seed, whatever was drafted.

    Rows advance at their own pace, so steps are asked for again. What is kept for that is one generator state per
    step and, while they fit into `KEPT_BYTES`, the draws themselves.

    As a context manager it claims the device's default generator, which only moves on at the end. A second call that
    starts meanwhile, in another thread, would draw the same numbers again: it gets a stream of its own, and is as
    little reproducible as two threads of plain generate() are.
    """

    def __init__(self, batch_size: int, device: torch.device):
        self.batch_size, self.device = batch_size, device
        self.source = default_generator(device)
        self.generator = torch.Generator(device)
        self.claimed = False
        self.states = {0: self.source.get_state()}  # before drawing the step
        self.drawn = 0  # steps whose successor's state is known
        self.kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def __enter__(self):
        with _replayed_lock:
            self.claimed = self.device not in _replayed
            _replayed.add(self.device)
            if not self.claimed:
                self.source = self.generator
                self.source.seed()  # from the operating system
            self.states = {0: self.source.get_state()}
        return self

    def __exit__(self, *exception) -> None:
        if self.claimed:
            with _replayed_lock:
                _replayed.discard(self.device)

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

    def gather(self, positions: Positions, vocab_size: int, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Noise of N rows, q positions each: (N, q, V), or of the tokens `token_ids` (N, q, C)."""
        width = vocab_size if token_ids is None else token_ids.shape[-1]
        rows, steps = positions.rows.flatten(), positions.steps.flatten()
        order = steps.argsort(stable=True)
        of_step, parts = steps[order].unique_consecutive(return_counts=True)
        # one copy to the device, not two a step
        both = torch.stack([order, rows[order]]).to(self.device)
        noise = torch.empty(len(rows), width, dtype=torch.float32, device=self.device)
        places, chosen = (numbers.split(parts.tolist()) for numbers in both)
        tokens = None if token_ids is None else token_ids.flatten(0, -2)
        for step, here, there in zip(of_step.tolist(), places, chosen, strict=True):
            drawn = self.step(step, vocab_size)
            noise[here] = drawn[there] if tokens is None else drawn[there[:, None], tokens[here]]
        return noise.view(*positions.rows.shape, width)

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


class HashedNoise:
    """Noise that is a function of (row seed, step, token id) and of nothing else.

    A row then samples the same text alone, at any place of any batch, and however much is drafted. Where plain
    generate() would use torch's generator, this leaves it alone.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        """`seeds`: one integer per row of the batch."""
        self.device = device
        # Any Python integer will do: it enters by its lowest 64 bits.
        self.seeds = torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds], device=device)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def gather(self, positions: Positions, vocab_size: int, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Noise of N rows, q positions each: (N, q, V), or of the tokens `token_ids` (N, q, C)."""
        rows, steps = positions.rows.to(self.device), positions.steps.to(self.device)
        position = mix(mix(self.seeds[rows]) + steps)  # (N, q)
        if token_ids is None:
            token_ids = torch.arange(vocab_size, device=self.device)
        bits = mix(position[..., None] + token_ids * GOLDEN_GAMMA) & (2**63 - 1)
        # The smallest numbers decide which token is taken: floats are as exact there as anywhere, so -log(1 - u).
        uniform = (bits.float() * 2.0**-63).clamp(min=2.0**-64, max=1 - 2.0**-24)
        return -torch.log1p(-uniform)

    def forget_before(self, step: int) -> None:
        pass

    def leave_after(self, step: int, vocab_size: int) -> None:
        pass


GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64


def mix(numbers: torch.Tensor) -> torch.Tensor:
    """Scramble int64 numbers: one step of SplitMix64 (Steele, Lea, Flood 2014), a bijection."""
    numbers = numbers + GOLDEN_GAMMA
    numbers = (numbers ^ shift_right(numbers, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    numbers = (numbers ^ shift_right(numbers, 27)) * (0x94D049BB133111EB - 2**64)
    return numbers ^ shift_right(numbers, 31)


def shift_right(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own copies the sign."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)
