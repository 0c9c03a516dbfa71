"""Online speculative decoding (OSD, arXiv 2310.07177): a drafter that learns from what the target verifies while it
serves.

What is learned from is in `drafter_online_texts`, and the loss in `drafter_online_loss`. Weights never change under a
call: each call drafts with the copy that it began with, so no text depends on learning, but under "rejection", whose
text depends on who drafts.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from .argument import name_of, whole_number
from .backend_linear import FastForward
from .drafter import Drafter
from .drafter_online_loss import loss_for
from .drafter_online_state import read_state, write_state
from .drafter_online_statistics import AdaptationStatistics
from .drafter_online_texts import LearningDrafter, VerifiedText
from .drafter_system import DraftingSystem, Parts
from .ranks import agreed, among_ranks, decided, follow_first, is_first, ranks_of, shared_ranks


class OnlineDistillation(DraftingSystem):
    """A drafter that learns between calls.

    One object serves any number of calls and threads, for one target. Processes that share the target learn at the same
    calls, and have the first one's weights afterwards. What it holds besides the drafter's weights:
    these in float32, what the optimizer keeps, and up to `max_tokens` tokens of texts, with the states that the drafter
    reads and the target's likeliest tokens at each.

    Args:
        drafter: a loaded SpecFormer network, or a causal LM. It is not changed: what learns is a copy.
        every: finished texts after which it learns, at the end of a call; `None`: only where `learn()` is called.
        learning_rate: of AdamW without weight decay.
        max_tokens: of the texts that a step learns from, prompts included; each call in progress also holds so many.
            Prompts take half of them at most, and of longer texts the beginning is learned from.
        max_time_share: of the time that calls take, how much learning may take; it waits otherwise.
        optimizer: makes another one of a list of parameters: those of the drafter that require gradients.
        frozen: whether it learns nothing; may be set at any time.

    Attributes:
        network: the drafter as it is now, a model like the one that was given, which can be saved and loaded as such.
        statistics: what it did, and whether its acceptance drifts. Also while it is frozen.

    Raises:
        ValueError: what is no drafter that can learn, or no number.
    """

    CLIPPED = 1.0  # norm of the gradient

    def __init__(
        self,
        drafter,
        every: int | None = 8,
        learning_rate: float = 1e-4,
        max_tokens: int = 4096,
        max_time_share: float = 0.25,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        frozen: bool = False,
    ):
        self._loss_of = loss_for(drafter)
        for name, value in (("every", every), ("max_tokens", max_tokens)):
            if (value is not None or name != "every") and (whole_number(value) or 0) < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive integer.")
        for name, number in (("learning_rate", learning_rate), ("max_time_share", max_time_share)):
            if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
                raise ValueError(f"{name} is {number!r}; expected a number above 0.")
        if optimizer is not None and not callable(optimizer):
            raise ValueError(f"optimizer is a {name_of(optimizer)}; expected a function of a list of parameters.")
        self.network, self.every, self.frozen = drafter, every, frozen
        self.max_tokens, self.max_time_share = int(max_tokens), float(max_time_share)
        self._make_optimizer = optimizer or (lambda some: torch.optim.AdamW(some, lr=learning_rate, weight_decay=0.0))
        self.statistics = AdaptationStatistics()
        self._learner: tuple[nn.Module, torch.optim.Optimizer] | None = None
        self._target: weakref.ref | None = None
        self._texts: deque[VerifiedText] = deque()
        self._unlearned = 0  # texts since the last step
        self._lock = threading.Lock()  # of what calls and steps exchange
        self._learning = threading.Lock()  # one step at a time

    def drafter_for(self, target, parts: Parts) -> Drafter:
        if ranks_of(self.network) is not None:
            raise ValueError(
                f"The weights of {name_of(self.network)}, which is to learn, are shared by several processes, and what "
                "learns is a copy in one. Load it whole in each of them, or pass the drafter as it is."
            )
        with self._lock:
            known = None if self._target is None else self._target()
            if known is not None and known is not target:
                raise ValueError(
                    "This OnlineDistillation has learned from another target; expected the same object in each call. "
                    "Make one for each target."
                )
            self._target = weakref.ref(target)
            network = self.network
        return LearningDrafter(parts.drafter(network, target), self, None if self.frozen else self.max_tokens)

    def take(self, texts: list[VerifiedText], reached: int, right: int, seconds: float) -> None:
        """A call is over: its texts, how many drafts were looked at and right, and how long it took."""
        with self._lock:
            self.statistics.count(reached, right, seconds)
            for text in texts:
                self._texts.append(text)
                while sum(len(each.tokens) for each in self._texts) > self.max_tokens:
                    self._texts.popleft()
            self._unlearned += len(texts)

    def finished(self, texts: list[list[int]]) -> None:
        if not agreed(self._is_willing()):
            return
        try:
            self.learn(wait=shared_ranks() is not None)  # where one process learns, the others do
        except Exception as error:  # the text is written, and must not be lost
            self.frozen = True
            warnings.warn(
                f"OnlineDistillation could not learn and is frozen now; texts are not concerned "
                f"({type(error).__name__}: {error}). Set frozen = False to try again.",
                stacklevel=2,
            )

    def _is_willing(self) -> bool:
        """To learn now. Of several processes the first one knows what the time allows."""
        if self.frozen or self.every is None or self._unlearned < self.every:
            return False
        allowed = self.max_time_share * self.statistics.serving_seconds
        return not is_first() or self.statistics.learning_seconds <= allowed

    def learn(self, wait: bool = True) -> bool:
        """One step of the optimizer over the texts that calls have left since the last one, in place of waiting for
        `every` of them: for when there is time. Calls may go on meanwhile; processes that share the target have to make
        this one all of them, and it alone.

        Args:
            wait: for a step of another thread.

        Returns:
            Whether there was anything to learn from, and its gradient finite.
        """
        if not self._learning.acquire(blocking=wait):
            return False
        try:
            target = None if self._target is None else self._target()
            if target is None:
                return False
            with among_ranks(target):
                return self._step(target)
        finally:
            self._learning.release()

    def save(self, path: str | Path) -> None:
        """Keep what was learned, the optimizer's state among it, in a file, in one step. The drafter alone, to publish
        it, is `network.save_pretrained(folder)`.

        Raises:
            OSError: it cannot be written. What was there before is safe.
        """
        with self._learning:
            network, optimizer = self._make_learner()
            with self._lock:
                about = self.statistics.to_dict()
            write_state(Path(path), network, optimizer, about)

    def restore(self, path: str | Path) -> None:
        """Go on from what `save` left of a drafter of the same sizes.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or of another drafter or optimizer. Nothing is changed then.
        """
        with self._learning:
            network, optimizer = self._make_learner()
            statistics = read_state(Path(path), network, optimizer, AdaptationStatistics.from_dict)
            with self._lock:
                self.statistics = statistics
                self._texts.clear()
                self._unlearned = 0
            self._publish(network)

    def _make_learner(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The copy that learns, and its optimizer."""
        if self._learner is None:
            with torch.inference_mode(False), torch.no_grad():
                network = copy.deepcopy(self.network)
                network.to(torch.promote_types(network.dtype, torch.float32)).eval()
                for module in network.modules():
                    if isinstance(vars(module).get("forward"), FastForward):  # of a call in another thread
                        del vars(module)["forward"]
                some = [parameter for parameter in network.parameters() if parameter.requires_grad]
                if not some:
                    raise ValueError("None of the drafter's parameters requires gradients: there is nothing to learn.")
                self._learner = network, self._make_optimizer(some)
        return self._learner

    def _step(self, target) -> bool:
        with self._lock:
            texts, self._unlearned = list(self._texts), 0
            self._texts.clear()
        if not agreed(bool(texts)):
            return False
        started = perf_counter()
        network, optimizer = self._make_learner()
        follow(network, optimizer, self.network.device)
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        with torch.inference_mode(False), torch.enable_grad():
            try:
                loss = gradients_of(self._loss_of, network, target, texts, parameters)
                norm = float(nn.utils.clip_grad_norm_(parameters, self.CLIPPED))
                is_finite = bool(decided(lambda: math.isfinite(norm) and math.isfinite(loss)))
                if is_finite:
                    optimizer.step()
                    with torch.no_grad():  # sums may be rounded otherwise elsewhere
                        follow_first(parameters)
            finally:
                optimizer.zero_grad()
        if is_finite:
            self._publish(network)
        with self._lock:
            self.statistics.count_step(len(texts), loss, is_finite, perf_counter() - started)
        return is_finite

    def _publish(self, network: nn.Module) -> None:
        """What was learned, for the calls that begin from now on."""
        with torch.inference_mode(False), torch.no_grad():
            served = copy.deepcopy(network).to(self.network.dtype)
        with self._lock:
            self.network = served


def follow(network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move what learns to where the drafter is."""
    if network.device == device:
        return
    network.to(device)
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim:  # a count of steps stays on the host
                state[key] = value.to(device)


def gradients_of(loss_of: Callable, network, target, texts: list[VerifiedText], parameters: list) -> float:
    """The mean loss of the drafts in `texts`, whose gradient is added to the `grad` of `parameters`. Nothing else gets
    one: the target's head, through which it comes, does not learn."""
    total, count = 0.0, 0
    for text in texts:
        loss, drafts = loss_of(network, target, text.usable())
        if not drafts:
            continue
        for parameter, more in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if more is not None:
                parameter.grad = more if parameter.grad is None else parameter.grad + more
        total, count = total + float(loss.detach()), count + drafts
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= max(count, 1)
    return total / max(count, 1)
