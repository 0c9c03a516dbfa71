"""What the decode loop asks of a drafter, and the SpecFormer network behind it.

A drafter is begun with the prompts, proposes, and is told what became of the proposal. Adding another kind of drafter
means another class with these methods, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from .prompt import PromptLayout
from .ragged_cache import RaggedCache
from .target import FIRST_CAPACITY


class Drafter(Protocol):
    """As a context manager a drafter may watch the target's passes; whatever it attached is gone on exit."""

    max_draft_tokens: int

    def __enter__(self): ...

    def __exit__(self, *exception) -> None: ...

    def begin(self, input_ids: torch.Tensor, layout: PromptLayout, first_tokens: torch.Tensor, max_length: int) -> None:
        """The target has read the prompts `input_ids` (B, P) and taken `first_tokens` (B, 1)."""

    def propose(self, num_tokens: int, choose: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Draft tokens (R, num_tokens); `choose` turns logits (R, num_tokens, V) into tokens."""

    def update(self, tokens: torch.Tensor, counts: torch.Tensor, longest: int) -> None:
        """The target has read the last token and the drafts, and row r's text goes on with tokens[r, : counts[r]].

        `tokens` is (R, q); `longest` is the number of tokens of the longest row that the target has read. Rows with
        count 0 have finished.
        """

    def select_rows(self, index: torch.Tensor, longest: int) -> None:
        """Only the rows of `index` (R',) go on."""


class NoDrafter:
    """Plain decoding through the same loop."""

    max_draft_tokens = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def begin(self, input_ids, layout, first_tokens, max_length) -> None:
        pass

    def propose(self, num_tokens, choose) -> torch.Tensor:
        raise ValueError(f"{num_tokens} draft tokens were asked for, but there is no drafter.")

    def update(self, tokens, counts, longest) -> None:
        pass

    def select_rows(self, index, longest) -> None:
        pass


class SpecFormerDrafter:
    """A SpecFormer network on one target: context states of all read tokens, drafts from each row's last one only.

    Args:
        network: a SpecFormerModel. It is moved to the target's dtype and to the device of its LM head.
        target: the model it drafts for.
    """

    def __init__(self, network, target):
        self.borrowed = network.borrow(target)
        self.network = network.to(device=self.borrowed.device, dtype=target.dtype)
        self.max_draft_tokens = network.config.num_draft_tokens

    def __enter__(self):
        self.borrowed.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.borrowed.__exit__(*exception)

    def begin(self, input_ids, layout, first_tokens, max_length) -> None:
        device = self.borrowed.device
        self.rows = torch.arange(len(input_ids), device=device)
        lengths, first_tokens = layout.lengths.to(device), first_tokens.to(device)
        # Real tokens go to the front, so that plain causal attention keeps padding out.
        hidden_states = layout.compact(self.borrowed.take_hidden_states())[:, : layout.longest]  # (B, T, S, d)
        next_tokens = layout.compact(input_ids.to(device))[:, 1 : layout.longest + 1]
        next_tokens = torch.cat([next_tokens, next_tokens.new_zeros(len(input_ids), 1)], dim=1)[:, : layout.longest]
        next_tokens = next_tokens.scatter(1, lengths[:, None] - 1, first_tokens)  # (B, T)
        limit = max_length - input_ids.shape[1] + layout.longest
        capacity = min(layout.longest + FIRST_CAPACITY, limit)
        self.cache = RaggedCache(1, torch.zeros_like(lengths), 0, capacity, limit)
        positions = self.cache.prepare(layout.longest)
        self.cache.kv_length = layout.longest  # plain causal attention wants exactly as many keys as queries
        states = self.network.encode_context(
            hidden_states, self._anchors(next_tokens), positions, past_key_values=self.cache
        )
        self.cache.advance(lengths, layout.longest)
        self.context = states[self.rows, lengths - 1]  # (B, d)

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> torch.Tensor:
        states = self.network.draft(self.context)[:, :num_tokens]  # (R, k, d)
        return choose(self.borrowed.logits(states))

    def update(self, tokens, counts, longest) -> None:
        counts = counts.to(self.context.device)
        positions = self.cache.prepare(tokens.shape[1])
        states = self.network.encode_context(
            self.borrowed.take_hidden_states(),
            self._anchors(tokens.to(counts.device)),
            positions,
            self.cache.mask(positions),
            self.cache,
        )
        self.cache.advance(counts, longest)
        self.context = states[self.rows, (counts - 1).clamp(min=0)]  # (R, d)

    def select_rows(self, index, longest) -> None:
        index = index.to(self.context.device)
        self.cache.select_rows(index, longest)
        self.context, self.rows = self.context[index], self.rows[: len(index)]

    def _anchors(self, next_tokens: torch.Tensor) -> torch.Tensor | None:
        if not self.network.config.use_anchor_token:
            return None
        return self.borrowed.embed(next_tokens.clamp(min=0))  # behind a wrong draft there may be no token
