"""The network of an EAGLE-3 drafter (arXiv 2503.01840), by the tensor names that checkpoints of speculators have.

    at each position, three of the target's hidden states, (S * d_t)      -> fc -> d
    with the embedding of the token that comes next                       -> norms -> 2 d
        -> one decoder layer, causal over the text                        -> d
        -> norm, and an LM head of its own for the tokens of a draft vocabulary

What the layer gives at a position stands for the target's states at the one after it, where a token has been drafted
and the target has read nothing: so it drafts one token after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional
from transformers import Cache, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from .drafter_foreign_network import (
    LARGEST,
    ForeignNetwork,
    kinds_of_layers,
    layers_config,
    rotated,
    widths_of_heads,
)

SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@dataclass
class EagleConfig:
    """What a checkpoint's config says, of speculators' format or of SafeAILab's.

    Args:
        layer: sizes of the layer.
        target_states: which of the target's hidden states are read: i is what enters layer i. `None`: SafeAILab's, by
            the number of the target's layers.
        draft_vocab_size: tokens that it can draft.
        has_own_embeddings: whether they were trained, or are the target's.
        has_head_norms: whether queries and keys are normed, as Qwen 3's are.
        target_hidden_size: d_t.
        norm_before_residual: whether what goes around the attention is normed.
        norm_before_fc: whether the target's states are normed together, and `fc_norm`, each on its own.
        norm_output: whether what stands for the target's states is the normed state.
    """

    layer: Qwen3Config
    target_states: list[int] | None
    draft_vocab_size: int
    has_own_embeddings: bool = False
    has_head_norms: bool = False
    target_hidden_size: int = 0
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    scales_embeddings: ClassVar[bool] = False

    @property
    def num_states(self) -> int:
        return 3 if self.target_states is None else len(self.target_states)

    @classmethod
    def from_dict(cls, config: dict, where: str) -> EagleConfig:
        """
        Raises:
            ValueError: a field that is needed is missing, or its value is of no use.
        """
        fields = config.get("transformer_layer_config", config)
        try:
            layer, states = layers_config(fields), config.get("eagle_aux_hidden_state_layer_ids")
            after = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
            if states is None and after is not None:  # there, layers after which states are read
                states = [layer + 1 for layer in after]
            parsed = cls(
                layer=layer,
                target_states=states,
                draft_vocab_size=config.get("draft_vocab_size") or layer.vocab_size,
                has_head_norms=fields.get("model_type") == "qwen3",
                target_hidden_size=config.get("target_hidden_size") or layer.hidden_size,
                has_own_embeddings=bool(config.get("embed_requires_grad")),
                **{name: bool(config.get(name, False)) for name in SWITCHES},
            )
        except (KeyError, StrictDataclassError, TypeError) as error:
            raise ValueError(f"{where} is not that of an EAGLE-3 drafter ({type(error).__name__}: {error}).") from error
        if layer.num_hidden_layers != 1:
            raise ValueError(f"{where}: num_hidden_layers is {layer.num_hidden_layers}; expected 1, as EAGLE-3 has.")
        if "sliding_attention" in kinds_of_layers(layer):
            raise ValueError(f"{where}: its layer has a sliding window, which is not built for EAGLE-3 drafters.")
        for name, size in (("draft_vocab_size", parsed.draft_vocab_size), ("hidden_size", layer.hidden_size)):
            if type(size) is not int or not 0 < size <= LARGEST:
                raise ValueError(f"{where}: {name} is {size!r}; expected a whole number from 1 to {LARGEST:,}.")
        if states is not None and (not states or any(type(state) is not int or state < 0 for state in states)):
            raise ValueError(f"{where}: the layers whose states it reads are {states!r}; expected a list of layers.")
        return parsed


class EagleAttention(nn.Module):
    """Causal attention over the text, whose keys and values are in a cache."""

    def __init__(self, config: EagleConfig):
        super().__init__()
        layer, bias = config.layer, bool(config.layer.attention_bias)
        self.head_dim = layer.head_dim
        queries, keys = widths_of_heads(layer)
        self.q_proj = nn.Linear(2 * layer.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(2 * layer.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(2 * layer.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, layer.hidden_size, bias=bias)
        self.q_norm = self.k_norm = None
        if config.has_head_norms:
            self.q_norm, self.k_norm = (Qwen3RMSNorm(layer.head_dim, eps=layer.rms_norm_eps) for _ in range(2))

    def forward(self, states: torch.Tensor, rotations, mask: torch.Tensor | None, cache: Cache) -> torch.Tensor:
        """States (B, T, 2 d) -> (B, T, d)."""
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (rotated(part.transpose(1, 2), rotations) for part in (query, key))
        key, value = cache.update(key, value.transpose(1, 2), 0)
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class EagleLayer(nn.Module):
    def __init__(self, config: EagleConfig):
        super().__init__()
        size, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        self.self_attn = EagleAttention(config)
        self.mlp = Qwen3MLP(config.layer)
        self.hidden_norm, self.input_layernorm, self.post_attention_layernorm = (
            Qwen3RMSNorm(size, eps=eps) for _ in range(3)
        )
        self.norm_before_residual = config.norm_before_residual

    def forward(self, states: torch.Tensor, embeds: torch.Tensor, *attention) -> torch.Tensor:
        normed = self.hidden_norm(states)
        around = normed if self.norm_before_residual else states
        states = around + self.self_attn(torch.cat([self.input_layernorm(embeds), normed], dim=-1), *attention)
        return states + self.mlp(self.post_attention_layernorm(states))


class EagleNetwork(ForeignNetwork):
    """See the module.

    Attributes:
        window: of the layer's attention; `None`: it sees the whole text.
    """

    kind = "EAGLE-3"
    window: int | None = None

    def __init__(self, config: EagleConfig):
        layer, size = config.layer, config.layer.hidden_size
        super().__init__(layer, None if config.draft_vocab_size == layer.vocab_size else config.draft_vocab_size)
        self.config = config
        self.fc = nn.Linear(config.num_states * config.target_hidden_size, size, bias=False)
        self.input_norm = self.fc_norm = self.embed_tokens = None
        if config.norm_before_fc:
            self.input_norm = Qwen3RMSNorm(self.fc.in_features, eps=layer.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                Qwen3RMSNorm(config.target_hidden_size, eps=layer.rms_norm_eps) for _ in range(config.num_states)
            )
        if config.has_own_embeddings or config.target_hidden_size != size:  # the target's are of another width
            self.embed_tokens = nn.Embedding(layer.vocab_size, size)
        self.layers = nn.ModuleList([EagleLayer(config)])
        self.norm = Qwen3RMSNorm(size, eps=layer.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """The target's states (B, T, S, d_t) -> (B, T, d)."""
        if self.fc_norm is not None:
            states = torch.stack([norm(states[:, :, place]) for place, norm in enumerate(self.fc_norm)], dim=2)
        states = states.flatten(2)
        return self.fc(states if self.input_norm is None else self.input_norm(states))

    def forward(
        self,
        states: torch.Tensor,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            states: fused, or what this gave for the position before, (B, T, d).
            embeds: of the tokens that come next, (B, T, d).
            positions: (B, T).
            mask: bool (B, 1, T, K); `None`: causal, with nothing in the cache.

        Returns:
            (B, T, d), of which `norm` and `lm_head` make the logits of the tokens after next.
        """
        return self.layers[0](states, embeds, self.rotations(embeds, positions), mask, cache)
