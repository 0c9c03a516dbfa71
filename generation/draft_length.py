"""How many tokens to draft each round. The text does not depend on it, but under "rejection"."""

from __future__ import annotations

import torch

from .argument import whole_number
from .proposal import Proposal

AUTO = "auto"


class DraftLength:
    """The same number every round.

    Attributes:
        most: tokens that a round drafts at most one after the other.
        tree_size: most tokens of a round where these are a tree, `most` being how deep it may be; 0: they are a chain.
    """

    def __init__(self, most: int, tree_size: int = 0):
        self.most, self.tree_size = most, tree_size

    @property
    def widest(self) -> int:
        """Tokens that a round drafts at most."""
        return max(self.most, self.tree_size)

    def next(self, num_rows: int) -> int:
        """Tokens to draft in the next round, whose pass carries `num_rows` rows."""
        return self.tree_size or self.most

    def amounts(self, num_rows: int) -> list[int]:
        """The same, and `tree_size`, which may be another one in each round."""
        return [self.next(num_rows), self.tree_size]

    def keep(self, proposal: Proposal, idle: torch.Tensor, started: float) -> int:
        """How many of the drafts (R, k) to verify.

        Args:
            idle: rows that are only carried along, bool (R,).
            started: when the round began, as `perf_counter` tells.
        """
        return proposal.tokens.shape[1]

    def record(
        self,
        num_rows: int,
        drafted: int,
        outcome: list[tuple[int, int]],
        seconds: float,
        path: torch.Tensor | None = None,
    ) -> None:
        """What became of a round that verified `drafted` tokens: per row (drafts accepted, tokens added), and how long
        it took. Of trees also the places of the block that the target's tokens were asked for at, (R, depth + 1)."""


def checked_draft_length(value) -> int | str | None:
    """`num_assistant_tokens` as a Python integer, or "auto", or `None` if not given.

    Raises:
        ValueError: a negative number, or none at all.
    """
    if isinstance(value, str) and value == AUTO:
        return AUTO
    return checked_count(value, "num_assistant_tokens", f", or {AUTO!r}")


def checked_count(value, name: str, otherwise: str = "") -> int | None:
    """`value`, the argument `name`, as a Python integer, or `None` if not given.

    Args:
        otherwise: what it may be besides, for the message.

    Raises:
        ValueError: a negative number, or none at all.
    """
    if value is None:
        return None
    number = whole_number(value)
    if number is None or number < 0:
        raise ValueError(
            f"{name} is {value!r}; expected an integer: 0 for plain decoding, otherwise how many tokens to draft each "
            f"round{otherwise}."
        )
    return number


def round_draft_length(num_assistant_tokens: int, shortest: int, limit: int) -> int:
    """Draft tokens of one round: none that even the `shortest` running row has no room for below `limit`."""
    return max(0, min(num_assistant_tokens, limit - shortest - 1))
