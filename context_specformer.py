"""What draft slots see of the context (`draft_attends_context`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

POSITIONS_AT_ONCE = 16
"""Positions of one text whose slots share an attention call. More of them are fewer calls, but each also scores the
slots of the others, for nothing."""


class SeenContext(NamedTuple):
    """Keys and values of the context layer, as the slots drafted from N positions of B rows see them.

    Attributes:
        keys: rotated to their positions, (B, kv heads, K, head_dim).
        values: (B, kv heads, K, head_dim).
        visible: the keys of its row that each position sees, bool (N, heads or 1, K).
        positions_per_row: how many of the N positions each row has, in the order of the rows; `None` means one each.
    """

    keys: torch.Tensor
    values: torch.Tensor
    visible: torch.Tensor
    positions_per_row: list[int] | None = None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
        """Attention of each position's S slots over its context and one another, in one softmax.

        Many positions of a row are taken `POSITIONS_AT_ONCE` at a time and computed again in the backward pass, so
        that training holds the scores, the mask and a copy of the keys for one such block only, whatever the kernel:
        at most heads x POSITIONS_AT_ONCE x S x (K + POSITIONS_AT_ONCE x S) numbers.

        Args:
            query: (N, heads, S, head_dim).
            key, value: (N, kv heads, S, head_dim).
            is_causal: whether a slot sees only itself and the slots before it.

        Returns:
            (N, heads, S, head_dim).
        """
        if self.positions_per_row is None:
            query, key, value, visible = (states[:, None] for states in (query, key, value, self.visible))
            return attend(query, key, value, visible, self.keys, self.values, is_causal)[:, 0]
        blocks = []
        of_rows = zip(*(part.split(self.positions_per_row) for part in (query, key, value, self.visible)), strict=True)
        for row, of_row in enumerate(of_rows):
            keys, values = self.keys[row : row + 1], self.values[row : row + 1]
            for block in zip(*(part[None].split(POSITIONS_AT_ONCE, dim=1) for part in of_row), strict=True):
                blocks.append(checkpoint(attend, *block, keys, values, is_causal, use_reentrant=False)[0])
        return torch.cat(blocks) if blocks else query


def attend(
    query: torch.Tensor,  # (R, q, heads, S, head_dim): S slots from each of q positions in R rows
    key: torch.Tensor,  # (R, q, kv heads, S, head_dim)
    value: torch.Tensor,  # (R, q, kv heads, S, head_dim)
    visible: torch.Tensor,  # (R, q, heads or 1, K)
    context_key: torch.Tensor,  # (R, kv heads, K, head_dim)
    context_value: torch.Tensor,  # (R, kv heads, K, head_dim)
    is_causal: bool,
) -> torch.Tensor:  # (R, q, heads, S, head_dim)
    positions, slots = query.shape[1], query.shape[3]
    query, key, value = (part.transpose(1, 2).flatten(2, 3) for part in (query, key, value))  # (R, heads, q * S, ...)
    owner = torch.arange(positions, device=query.device).repeat_interleave(slots)
    own = owner[:, None] == owner  # (q * S, q * S)
    if is_causal:
        own = own.tril()
    context = visible.transpose(1, 2).repeat_interleave(slots, dim=2)  # (R, heads or 1, q * S, K)
    attended = functional.scaled_dot_product_attention(
        query,
        torch.cat([context_key, key], dim=2),
        torch.cat([context_value, value], dim=2),
        attn_mask=torch.cat([context, own.expand(*context.shape[:3], -1)], dim=3),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.unflatten(2, (positions, slots)).transpose(1, 2)
