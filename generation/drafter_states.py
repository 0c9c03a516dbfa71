"""The target's hidden states as a drafter reads them: those of the prompts, and those of the rounds since.

It may leave rounds without a proposal for later, so that they cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .drafter import Prompts, Verified

MOST_UNREAD = 32
"""Positions of a row after which they are read anyway, since states take memory."""


class ReadPrompts(NamedTuple):
    """Prompts of similar length, each from column 0 on, so that a token's column is its position.

    Attributes:
        rows: their places in the batch, (N,).
        lengths: (N,).
        states: of the layers that the drafter reads, (N, T, S, d).
        next_tokens: the token after each, (N, T).
        columns: (N, T).
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    states: torch.Tensor
    next_tokens: torch.Tensor
    columns: torch.Tensor


def read_prompts(prompts: Prompts, device: torch.device) -> Iterator[ReadPrompts]:
    """What the target has read before the first round, in the groups in which it did."""
    layout, input_ids = prompts.layout.to(device), prompts.input_ids.to(device)
    newest = prompts.first_tokens.to(device)  # (B, 1)
    assert prompts.hidden_states is not None  # of `hidden_state_layers`
    for group, states in zip(layout.groups, prompts.hidden_states, strict=True):
        ids, longest = input_ids[group.rows, -group.width :], group.layout.longest
        states, ids = (group.layout.compact(part)[:, :longest] for part in (states.to(device), ids))
        lengths = group.layout.lengths
        next_tokens = ids.roll(-1, dims=1).scatter(1, lengths[:, None] - 1, newest[group.rows])
        columns = torch.arange(longest, device=device).expand(len(ids), -1)
        yield ReadPrompts(group.rows, lengths, states, next_tokens, columns)


class UnreadStates:
    """The target's states of some rounds, with the tokens after them.

    Attributes:
        rounds: of each states (R, q, S, d), tokens (R, q), and how many of each row count (R,): the first.
        device: where they are wanted.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rounds: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self.rounds)

    @property
    def is_full(self) -> bool:
        return sum(tokens.shape[1] for _, tokens, _ in self.rounds) >= MOST_UNREAD

    def add(self, verified: Verified) -> None:
        assert verified.hidden_states is not None  # of the drafter's `hidden_state_layers`
        states, tokens, counts = (
            part.to(self.device) for part in (verified.hidden_states, verified.tokens, verified.counts)
        )
        self.rounds.append((states, tokens, counts))

    def select_rows(self, index: torch.Tensor) -> None:
        self.rounds = [(states[index], tokens[index], counts[index]) for states, tokens, counts in self.rounds]

    def take(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All rounds as one, which is forgotten here."""
        rounds, self.rounds = self.rounds, []
        if len(rounds) == 1:
            return rounds[0]
        states, tokens = (torch.cat(parts, dim=1) for parts in list(zip(*rounds, strict=True))[:2])
        counted = [torch.arange(block.shape[1], device=count.device) < count[:, None] for _, block, count in rounds]
        counted = torch.cat(counted, dim=1)
        order = (~counted).long().argsort(dim=1, stable=True)
        states = states.gather(1, order[:, :, None, None].expand_as(states))
        return states, tokens.gather(1, order), counted.sum(dim=1)
