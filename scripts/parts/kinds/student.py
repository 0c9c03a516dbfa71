"""What training and evaluation ask of a network that learns to draft for a target, whatever its kind.

Slot j at position n of a text drafts token n + 2 + j: the target has read the tokens up to n, and n + 1 is known. What
is accepted is a prefix, so that the drafts of all positions can be made at once, with the true tokens in front of each
slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from specformer.generation.target_states import HiddenStates, stacked
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.losses import IGNORED, Head, Verifiers


class Drafts(NamedTuple):
    """Teacher-forced drafts of N positions.

    Attributes:
        states: from which tokens are chosen, corrected by the tokens in front of them where the drafter does that,
            (N, D, d).
        labels: (N, D), IGNORED past the end.
        first_states: before the correction, (N, D, d).
        verifiers: of the slots, where the drafter reads the target's last hidden states.
    """

    states: torch.Tensor
    labels: torch.Tensor
    first_states: torch.Tensor
    verifiers: Verifiers | None = None


class Student:
    """A network and the target for which it learns to draft. A kind of drafter is a subclass, in a file of its own.

    Args:
        network: in float32 where it is trained.
        target: frozen.
        num_draft_tokens: slots, D.

    Attributes:
        kind: what `--drafter` calls it.
        title: what people call it, and `about`, what it is, in words.
        means: options of `train` that mean something for this kind, beside those that do for all.
        layer_ids: which of the target's hidden states it reads, ascending: i is what enters layer i.
        head: makes logits of its states.
        head_weights: those of the head that learn.
        rows: a layer that the head passes, for `fast_linears`.
        has_confidence: whether it estimates how likely each draft is accepted.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    means: ClassVar[tuple[str, ...]] = ()
    layer_ids: Sequence[int] = ()
    head: Head
    head_weights: Sequence[nn.Parameter] = ()
    rows: nn.Module | None = None
    has_confidence: bool = False

    def __init__(self, network: nn.Module, target, num_draft_tokens: int):
        self.network, self.target, self.num_draft_tokens = network, target, num_draft_tokens
        self.text_config = target.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    # ---- made, kept and read again

    @classmethod
    def make_config(cls, arguments, target_config) -> Any:
        """What a new network is to be, by the options of `train`.

        Raises:
            ValueError: they do not go together. Nothing has been written yet.
        """
        raise NotImplementedError

    @classmethod
    def check_loss(cls, arguments, config) -> None:
        """
        Raises:
            ValueError: a loss that cannot be. Nothing has been written yet.
        """

    @classmethod
    def make(cls, config, target, answers: Answers, arguments) -> Student:
        """A new network, or one that goes on from the weights of another.

        Raises:
            ValueError: what the other one has does not fit.
        """
        raise NotImplementedError

    def of_checkpoint(self, folder: Path) -> Student:
        """With the weights of a checkpoint of this training."""
        raise NotImplementedError

    def calibrate(self, answers, batch_size: int) -> None:
        """What is left to do with the best weights, on held-out `answers`."""

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what `assistant_model=<folder>` takes."""
        raise NotImplementedError

    # ---- drafts and what becomes of them

    def drafts(self, model: nn.Module, batch: dict[str, torch.Tensor], position_share: float = 1.0) -> Drafts:
        """Drafts of the positions of `batch` that have something to draft, row by row, or of a random share of them.

        Args:
            model: the network, or what accelerate has wrapped it in.
        """
        raise NotImplementedError

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, torch.Tensor],
        of_slots: Callable,
        position_share: float,
        step: int,
        num_steps: int,
    ) -> torch.Tensor:
        """The loss of a training step.

        Args:
            of_slots: `drafter_loss` with what it was asked for.
            step: how many of the `num_steps` are done.
        """
        drafts = self.drafts(model, batch, position_share)
        return of_slots(drafts.states, labels=drafts.labels, borrowed=self.head, weights=self.head_weights)

    @torch.no_grad()
    def right(self, drafts: Drafts) -> torch.Tensor:
        """Which slots greedy decoding gets right once the tokens in front of them are, bool (N, D)."""
        kept = drafts.labels != IGNORED
        places = [self.head.draft_logits(part).argmax(dim=-1) for part in drafts.states[kept].split(1024)]
        right = torch.zeros_like(kept)
        right[kept] = torch.cat([*places, drafts.labels.new_empty(0)]) == self.head.draft_labels(drafts.labels[kept])
        return right

    def confidences(self, drafts: Drafts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where `has_confidence`: logits of the confidences, which slots are right, and the labels, (N, D) each."""
        raise NotImplementedError


class ReadTarget(Protocol):
    """A target of which some hidden states are read."""

    @property
    def target(self) -> Any: ...
    @property
    def layer_ids(self) -> Sequence[int]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def text_config(self) -> Any: ...


@torch.no_grad()
def target_states(read: ReadTarget, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a drafter reads of the target over whole texts: (B, T, len(layer_ids), d)."""
    with HiddenStates(read.target, read.layer_ids) as hidden:
        read.target.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return stacked(read.target, read.layer_ids, hidden.seen, read.device)


def with_something_to_draft(labels: torch.Tensor, position_share: float = 1.0) -> torch.Tensor:
    """The positions any of whose slots has a label, or a random share of them: labels (B, T, D) -> bool (B, T)."""
    wanted = (labels != IGNORED).any(dim=2)
    if position_share < 1:
        wanted = wanted & (torch.rand(wanted.shape, device=wanted.device) < position_share)
    return wanted
