"""Kinds of drafters that can be trained and evaluated, by their names, and which of them a network is."""

from __future__ import annotations

from typing import Any

from specformer.generation.drafter_dflash_network import DFlashNetwork
from specformer.generation.drafter_eagle_network import EagleNetwork
from specformer.generation.drafter_falcon_network import FalconNetwork
from specformer.generation.drafter_parallelspec_network import ParallelSpecNetwork
from specformer.scripts.parts.kinds.dflash import DFlashStudent
from specformer.scripts.parts.kinds.eagle3 import EagleStudent
from specformer.scripts.parts.kinds.falcon import FalconStudent
from specformer.scripts.parts.kinds.parallelspec import ParallelSpecStudent
from specformer.scripts.parts.kinds.pard import PardStudent
from specformer.scripts.parts.kinds.specformer import SpecFormerStudent
from specformer.scripts.parts.kinds.student import Student

KINDS: dict[str, type[Student]] = {
    kind.kind: kind
    for kind in (SpecFormerStudent, DFlashStudent, EagleStudent, FalconStudent, PardStudent, ParallelSpecStudent)
}


def kind_of_student(network) -> type[Student] | None:
    """Of which kind `network` is; `None`: of none whose drafts depend on the text alone."""
    if getattr(getattr(network, "config", None), "model_type", None) == "specformer":  # of a repository's own code too
        return SpecFormerStudent
    if isinstance(network, DFlashNetwork):
        return DFlashStudent
    if isinstance(network, ParallelSpecNetwork):
        return ParallelSpecStudent
    if isinstance(network, FalconNetwork):
        return FalconStudent
    if isinstance(network, EagleNetwork):
        return EagleStudent
    if getattr(getattr(network, "config", None), "pard_token", None) is not None:
        return PardStudent
    return None


def student_of(network, target, num_draft_tokens: int | None = None) -> Student:
    """`network`, loaded for `target`, with its kind.

    Args:
        num_draft_tokens: to evaluate; it has a meaning where the network has no number of its own, and is 4 by default.

    Raises:
        ValueError: it is of another kind, whose drafts depend on more than the text; or the drafter of another model.
    """
    kind: Any = kind_of_student(network)
    if kind is None:
        raise ValueError(
            f"--answers is for drafters of the kinds {', '.join(KINDS)}, and this one is a {type(network).__name__}. "
            "Leave it out: prompts are decoded then."
        )
    has_own_number = kind in (SpecFormerStudent, DFlashStudent)
    return kind(network, target) if has_own_number else kind(network, target, num_draft_tokens or 4)
