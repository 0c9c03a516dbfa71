"""The network of a DFlash or DSpark drafter, by the tensor names that checkpoints of z-lab and of speculators have.

    target hidden states after some layers (B, T, S * d_t)
        -> fc, hidden_norm                                            what every layer sees of the text, (B, T, d)
    embeddings of [the newest token, mask, mask, ...], one block
        -> layers: attention of the block over [keys and values of the text, its own], both ways; SwiGLU
        -> norm, and the target's LM head, or one of its own for the tokens of a draft vocabulary

With a Markov head (DSpark) the token in front of a slot, once it is chosen, adds a bias to its logits.

DFlash: arXiv 2602.06036; DSpark: arXiv 2607.05147.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from .drafter_foreign_network import (
    LARGEST,
    LAYER_FIELDS,
    ForeignNetwork,
    kinds_of_layers,
    layers_config,
    rotated,
    widths_of_heads,
)


@dataclass
class DFlashConfig:
    """What a checkpoint's config says, whichever format it is of.

    Args:
        layers: sizes of the layers.
        target_states: which of the target's hidden states are read: i is what enters layer i.
        block_size: tokens of a block, the newest token among them.
        mask_token_id: whose embedding stands in each slot.
        draft_vocab_size: tokens that it can draft; `None` means the target's vocabulary.
        target_hidden_size: d_t.
        scales_embeddings: whether the block's embeddings are what the target's module gives, with the factor that some
            families have; otherwise they are rows of its table.
        sample_from_anchor: whether the slot of the newest token drafts as well; otherwise slots draft the token at
            their own place.
        window_is_of_the_block: whether the window of a sliding layer is counted from the newest token, and the block is
            seen whole; otherwise it is counted from each slot, to both sides.
        sliding_block_is_causal: whether a slot of a sliding layer sees no slot after it.
        markov_rank: of the Markov head; 0: there is none.
        confidence_head: whether it says how likely each draft is accepted, from the slot's state and, with
            `confidence_reads_token`, from the token in front.
    """

    layers: Qwen3Config
    target_states: list[int]
    block_size: int
    mask_token_id: int
    draft_vocab_size: int | None = None
    target_hidden_size: int = 0
    scales_embeddings: bool = True
    sample_from_anchor: bool = False
    window_is_of_the_block: bool = False
    sliding_block_is_causal: bool = False
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    confidence_head: bool = False
    confidence_reads_token: bool = False
    where: str = field(default="config.json", repr=False)

    def __post_init__(self):
        sizes = {name: getattr(self.layers, name) for name in LAYER_FIELDS}
        sizes |= {"block_size": self.block_size, "draft_vocab_size": self.draft_vocab_size or 1}
        for name, size in sizes.items():
            if type(size) is not int or not 0 < size <= LARGEST:
                raise ValueError(f"{self.where}: {name} is {size!r}; expected a whole number from 1 to {LARGEST:,}.")
        self.target_hidden_size = self.target_hidden_size or self.layers.hidden_size
        if self.num_draft_tokens < 1:
            raise ValueError(f"{self.where}: block_size is {self.block_size}, in which nothing is drafted.")
        if type(self.mask_token_id) is not int or not 0 <= self.mask_token_id < self.layers.vocab_size:
            raise ValueError(
                f"{self.where}: mask_token_id is {self.mask_token_id!r}; expected a token of the "
                f"{self.layers.vocab_size:,} that there are."
            )
        if not self.target_states or any(type(state) is not int or state < 0 for state in self.target_states):
            raise ValueError(
                f"{self.where}: the layers whose states it reads are {self.target_states!r}; expected a list of layers."
            )
        if self.markov_head_type not in ("vanilla", "gated"):
            raise ValueError(
                f"{self.where}: markov_head_type is {self.markov_head_type!r}; expected 'vanilla' or 'gated'. "
                "The other kinds of DSpark's head are not built."
            )

    @property
    def num_states(self) -> int:
        return len(self.target_states)

    @property
    def num_draft_tokens(self) -> int:
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @classmethod
    def from_dict(cls, config: dict, where: str) -> DFlashConfig:
        """Of z-lab's format, of speculators', or of transformers' own classes of that kind.

        Raises:
            ValueError: a field that is needed is missing, or its value is of no use.
        """
        try:
            if "speculators_model_type" in config:
                layers, drafted = layers_config(config["transformer_layer_config"]), config.get("draft_vocab_size")
                return cls(
                    layers=layers,
                    target_states=config["aux_hidden_state_layer_ids"],
                    block_size=config["block_size"],
                    mask_token_id=config["mask_token_id"],
                    draft_vocab_size=None if drafted == layers.vocab_size else drafted,
                    target_hidden_size=config.get("target_hidden_size") or 0,
                    scales_embeddings=False,
                    sample_from_anchor=config.get("sample_from_anchor", config["speculators_model_type"] == "dspark"),
                    window_is_of_the_block=True,
                    sliding_block_is_causal=not config.get("sliding_window_non_causal", False),
                    markov_rank=config.get("markov_rank", 0),
                    markov_head_type=config.get("markov_head_type", "vanilla"),
                    confidence_head=config.get("enable_confidence_head", False),
                    confidence_reads_token=config.get("confidence_head_with_markov", False),
                    where=where,
                )
            more = config.get("dflash_config") or config
            layers = layers_config(config)
            after = more.get("target_layer_ids")
            if after is None:
                after = spread_layers(config["num_target_layers"], layers.num_hidden_layers)
            return cls(
                layers=layers,
                target_states=[layer + 1 for layer in after],
                block_size=config.get("block_size") or more["block_size"],
                mask_token_id=more["mask_token_id"],
                draft_vocab_size=config.get("draft_vocab_size"),
                where=where,
            )
        except (KeyError, StrictDataclassError, TypeError) as error:
            raise ValueError(f"{where} is not that of a DFlash drafter ({type(error).__name__}: {error}).") from error


def spread_layers(num_target_layers: int, num_draft_layers: int) -> list[int]:
    """The layers after which DFlash reads states where its config names none: from the second to the third last."""
    if num_draft_layers == 1:
        return [num_target_layers // 2]
    return [round(1 + layer * (num_target_layers - 4) / (num_draft_layers - 1)) for layer in range(num_draft_layers)]


class DFlashAttention(nn.Module):
    """Attention of a block over the text and itself, with a norm for queries and for keys."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.head_dim, bias = config.head_dim, bool(config.attention_bias)
        queries, keys = widths_of_heads(config)
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)
        self.q_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * head_dim) -> (B, T, heads, head_dim)."""
        return projected.unflatten(-1, (-1, self.head_dim))

    def keys_and_values(self, states: torch.Tensor, rotations) -> tuple[torch.Tensor, torch.Tensor]:
        """Of states (B, T, d), (B, kv heads, T, head_dim) each."""
        keys = rotated(self.k_norm(self.heads(self.k_proj(states))).transpose(1, 2), rotations)
        return keys, self.heads(self.v_proj(states)).transpose(1, 2)

    def forward(
        self,
        block: torch.Tensor,  # (B, q, d)
        rotations: tuple[torch.Tensor, torch.Tensor],  # of its positions
        keys: torch.Tensor,  # of the text, (B, kv heads, K, head_dim)
        values: torch.Tensor,
        mask: torch.Tensor,  # bool (B, 1, q, K + q)
    ) -> torch.Tensor:
        query = rotated(self.q_norm(self.heads(self.q_proj(block))).transpose(1, 2), rotations)
        own_keys, own_values = self.keys_and_values(block, rotations)
        keys, values = torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2)
        attended = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=query.shape[1] != keys.shape[1]
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class DFlashLayer(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.self_attn = DFlashAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, block: torch.Tensor, *attention) -> torch.Tensor:
        block = block + self.self_attn(self.input_layernorm(block), *attention)
        return block + self.mlp(self.post_attention_layernorm(block))


class MarkovHead(nn.Module):
    """A bias of a slot's logits by the token in front of it, of low rank; DSpark's."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        vocab_size, rank = config.layers.vocab_size, config.markov_rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size or vocab_size, bias=False)
        is_gated = config.markov_head_type == "gated"
        self.gate_proj = nn.Linear(config.layers.hidden_size + rank, rank) if is_gated else None

    def forward(self, states: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """States (..., d) of slots and embeddings (..., rank) of the tokens in front -> (..., V')."""
        if self.gate_proj is not None:
            previous = previous * self.gate_proj(torch.cat([states, previous], dim=-1)).sigmoid()
        return self.markov_w2(previous)


class ConfidenceHead(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.proj = nn.Linear(size, 1)


class DFlashNetwork(ForeignNetwork):
    """See the module.

    Shapes: B rows, T tokens of a text, S states of the target, each of width d_t, d channels, q tokens of a block.
    """

    kind = "DFlash"

    def __init__(self, config: DFlashConfig):
        super().__init__(config.layers, config.draft_vocab_size)
        layers, size = config.layers, config.layers.hidden_size
        self.config = config
        self.fc = nn.Linear(len(config.target_states) * config.target_hidden_size, size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(size, eps=layers.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(layers) for _ in range(layers.num_hidden_layers))
        self.norm = Qwen3RMSNorm(size, eps=layers.rms_norm_eps)
        self.embed_tokens = self.lm_head = self.markov_head = self.confidence_head = None
        if config.target_hidden_size != size:  # the target's are of another width
            self.embed_tokens = nn.Embedding(layers.vocab_size, size)
        vocab_size = config.draft_vocab_size
        if vocab_size is not None or self.embed_tokens is not None:
            self.lm_head = nn.Linear(size, vocab_size or layers.vocab_size, bias=False)
        if config.markov_rank:
            self.markov_head = MarkovHead(config)
        if config.confidence_head:
            self.confidence_head = ConfidenceHead(size + config.markov_rank * config.confidence_reads_token)

    def read(self, states: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (B, kv heads, T, head_dim) of each layer for the target's states (B, T, S, d_t) at
        `positions` (B or 1, T)."""
        context = self.hidden_norm(self.fc(states.flatten(2)))
        rotations = self.rotations(context, positions)
        return [cast("DFlashLayer", layer).self_attn.keys_and_values(context, rotations) for layer in self.layers]

    def forward(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        text: list[tuple[torch.Tensor, torch.Tensor]],
        visible: torch.Tensor,
        of_block: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normed states of a block, or of several blocks side by side.

        Args:
            embeds: of the block, (B, q, d).
            positions: of the block, (B, q).
            text: of each layer keys and values of the text, (B, kv heads, K, head_dim).
            visible: which of them each slot may see, bool (B, 1, 1 or q, K): key j is that of position j.
            of_block: which slots are one block, bool (q, q); `None`: all. For layers without a window.

        Returns:
            (B, q, d). The last `num_draft_tokens` of a block draft.
        """
        rotations, masks = self.rotations(embeds, positions), self._masks(positions, visible, of_block)
        for layer, of_layer, kind in zip(self.layers, text, kinds_of_layers(self.config.layers), strict=True):
            embeds = layer(embeds, rotations, *of_layer, masks[kind])
        return self.norm(embeds)

    def _masks(
        self, positions: torch.Tensor, visible: torch.Tensor, of_block: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What the slots of each kind of layer see, bool (B, 1, q, K + q)."""
        rows, slots = positions.shape
        of_block = visible.new_ones(slots, slots) if of_block is None else of_block
        masks = {"full_attention": joined(visible.expand(rows, 1, slots, -1), of_block)}
        if "sliding_attention" in kinds_of_layers(self.config.layers):
            window = self.config.layers.sliding_window
            assert window is not None  # the config fills it in
            keys = torch.arange(visible.shape[-1], device=positions.device)
            slot = torch.arange(slots, device=positions.device)
            distance = slot[:, None] - slot
            if self.config.window_is_of_the_block:
                positions, of_block = positions[:, :1].expand(-1, slots), distance == distance
            else:
                of_block = distance.abs() <= window
            if self.config.sliding_block_is_causal:
                of_block = of_block & (distance >= 0)
            near = positions[:, None, :, None] - keys <= window  # (B, 1, q, K)
            masks["sliding_attention"] = joined(visible & near, of_block)
        return masks


def joined(of_text: torch.Tensor, of_block: torch.Tensor) -> torch.Tensor:
    """(B, 1, q, K) and (q, q) -> (B, 1, q, K + q)."""
    return torch.cat([of_text, of_block.expand(len(of_text), 1, -1, -1)], dim=-1)
