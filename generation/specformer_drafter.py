"""The SpecFormer network as a drafter."""

from __future__ import annotations

import copy

import torch

from .ragged_cache import RaggedCache
from .target import FIRST_CAPACITY


class SpecFormerDrafter:
    """A SpecFormer network on one target: context states of all read tokens, drafts from each row's last one only.

    Args:
        network: a SpecFormerModel. It is moved to the device of the target's LM head; where its dtype is another one
            than the target's, a copy in that dtype is used.
        target: the model it drafts for.
    """

    def __init__(self, network, target):
        self.borrowed = network.borrow(target)
        with torch.inference_mode(False):  # weights that move inside it could not be trained any more
            self.network = network.to(self.borrowed.device)
            if network.dtype != target.dtype:
                self.network = copy.deepcopy(network).to(target.dtype)
        self.max_draft_tokens = network.config.num_draft_tokens
        self.default_num_assistant_tokens = network.config.default_num_assistant_tokens

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
        hidden_states = self.borrowed.take_hidden_states(input_ids.shape[1])  # (B, P, S, d)
        hidden_states = layout.compact(hidden_states)[:, : layout.longest]
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
            self.borrowed.take_hidden_states(tokens.shape[1]),
            self._anchors(tokens.to(counts.device)),
            positions,
            self.cache.mask(positions),
            self.cache,
        )
        self.cache.advance(counts, longest)
        newest = states[self.rows, (counts - 1).clamp(min=0)]  # (R, d)
        self.context = torch.where(counts[:, None] > 0, newest, self.context)

    def select_rows(self, index, longest) -> None:
        index = index.to(self.context.device)
        self.cache.select_rows(index, longest)
        self.context, self.rows = self.context[index], self.rows[: len(index)]

    def _anchors(self, next_tokens: torch.Tensor) -> torch.Tensor | None:
        if not self.network.config.use_anchor_token:
            return None
        return self.borrowed.embed(next_tokens.clamp(min=0))  # behind a wrong draft there may be no token
