"""The layers of a SpecFormer drafter."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache
from transformers.activations import ACT2FN

from .configuration_specformer import CONFIDENCE_WIDTH, SpecFormerConfig
from .context_specformer import SeenContext


class SpecFormerRMSNorm(nn.Module):
    """RMSNorm over the last axis. With `groups`, the second last axis has one scale vector per entry."""

    def __init__(self, hidden_size: int, eps: float, groups: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((hidden_size,) if groups is None else (groups, hidden_size)))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps) * self.weight


def rotate(states: torch.Tensor, position_ids: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary position embedding of `states` (B, heads, T, head_dim) at `position_ids` (B or 1, T)."""
    half = states.shape[-1] // 2
    exponents = torch.arange(half, device=states.device, dtype=torch.float32) / half
    angles = position_ids[:, None, :, None].float() * float(theta) ** -exponents  # (B, 1, T, head_dim / 2)
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SpecFormerAttention(nn.Module):
    """Pre-normed grouped-query attention with rotary embeddings and a residual connection."""

    def __init__(self, config: SpecFormerConfig):
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.norm = SpecFormerRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, d)
        position_ids: torch.Tensor,  # (B or 1, T)
        attention_mask: torch.Tensor | None = None,  # bool, broadcasts to (B, heads, T, keys); True is visible
        is_causal: bool = False,
        past_key_values: Cache | None = None,
        context: SeenContext | None = None,  # seen besides, where each of the B is the slots of one position
    ) -> torch.Tensor:
        normed = self.norm(hidden_states)
        query, key, value = (
            projection(normed).unflatten(2, (projection.out_features // self.head_dim, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotate(states, position_ids, self.rope_theta) for states in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        if context is not None:
            attended = context.attend(query, key, value, is_causal)
        else:
            attended = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attention_mask,
                is_causal=is_causal,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return hidden_states + self.o_proj(attended.transpose(1, 2).flatten(2))


class SpecFormerMLP(nn.Module):
    """Pre-normed SwiGLU with a residual connection."""

    def __init__(self, config: SpecFormerConfig):
        super().__init__()
        self.norm = SpecFormerRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states)
        return hidden_states + self.down_proj(self.activation(self.gate_proj(normed)) * self.up_proj(normed))


class DraftLayer(nn.Module):
    """A draft layer after the first: attention over the slots of one position, and SwiGLU."""

    def __init__(self, config: SpecFormerConfig):
        super().__init__()
        self.attention = SpecFormerAttention(config)
        self.mlp = SpecFormerMLP(config)


class AnchorSlot(nn.Module):
    """The token that follows the position drafted from, as a slot in front of the draft slots: its embedding, normed
    and projected, (..., d) -> (..., d)."""

    def __init__(self, config: SpecFormerConfig):
        super().__init__()
        self.norm = SpecFormerRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, anchor_embeds: torch.Tensor) -> torch.Tensor:
        return self.proj(self.norm(anchor_embeds))


class PreviousTokenCorrection(nn.Module):
    """What a slot's state gains from the token in front of it: a small network that reads both, with a residual
    connection. Slots are drafted at once and know nothing of one another's tokens; this comes after them, where their
    tokens are chosen one after the other."""

    def __init__(self, config: SpecFormerConfig, rank: int):
        super().__init__()
        size = config.hidden_size
        self.norm = SpecFormerRMSNorm(size, config.rms_norm_eps)
        self.token_proj = nn.Linear(size, rank, bias=False)
        self.state_proj = nn.Linear(size, rank, bias=False)
        self.up_proj = nn.Linear(rank, size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: torch.Tensor, previous_embeds: torch.Tensor) -> torch.Tensor:
        """States and the embeddings of the tokens in front of their positions, both (..., d) -> (..., d)."""
        hidden = self.token_proj(self.norm(previous_embeds)) + self.state_proj(states)
        return states + self.up_proj(self.activation(hidden))


class ConfidenceHead(nn.Module):
    """How likely a slot's best token is accepted once those in front of it are, as a logit: by how much its candidates
    differ, and by the slot's state.

    `scale` and `shift` of every slot are fitted to held-out answers when everything else has been learnt.
    """

    def __init__(self, config: SpecFormerConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, CONFIDENCE_WIDTH)
        self.out_proj = nn.Linear(CONFIDENCE_WIDTH, 1)
        self.activation = ACT2FN[config.hidden_act]
        self.scale = nn.Parameter(torch.ones(config.num_draft_tokens))
        self.shift = nn.Parameter(torch.zeros(config.num_draft_tokens))

    def forward(self, states: torch.Tensor, logits: torch.Tensor, slot: int | None = None) -> torch.Tensor:
        """States (..., k, d) of the first k slots and logits (..., k, C) of their candidates -> (..., k). With `slot`,
        all k are of this one."""
        odds = torch.logit(logits.float().softmax(dim=-1).amax(dim=-1), eps=1e-4).to(states.dtype)
        odds = odds + self.out_proj(self.activation(self.in_proj(states)))[..., 0]
        slots = slice(states.shape[-2]) if slot is None else slot
        return odds * self.scale[slots] + self.shift[slots]
