"""What the networks of other projects' drafters have in common: layers in the manner of Qwen 3, whose sizes a config
says, and tokens of their own, which are named by how far they are from their places."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

LARGEST = 2**24
"""No size of a drafter comes near. Beyond it a config is damaged or hostile."""
MOST_LAYERS = 64
LAYER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
OTHER_LAYER_FIELDS = (
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "sliding_window",
    "layer_types",
)


def layers_config(fields: dict[str, Any]) -> Qwen3Config:
    """The sizes of layers by the names that transformers has for them.

    Raises:
        KeyError, TypeError: one is missing, or no size.
    """
    known = {name: fields[name] for name in (*LAYER_FIELDS, *OTHER_LAYER_FIELDS) if fields.get(name) is not None}
    for name in LAYER_FIELDS:  # before anything is made of so many
        most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
        if name in known and (type(known[name]) is not int or not 0 < known[name] <= most):
            raise TypeError(f"{name} is {known[name]!r}; expected a whole number from 1 to {most:,}")
    if unknown := set(known.get("layer_types", ())) - {"full_attention", "sliding_attention"}:
        raise TypeError(f"layer_types has {', '.join(map(repr, unknown))}; expected full or sliding attention")
    if "head_dim" not in known:
        known["head_dim"] = known["hidden_size"] // known["num_attention_heads"]
    known.setdefault("vocab_size", LARGEST)
    # without the switch, which only Qwen's own configs have, the window would be dropped
    return Qwen3Config(**known, use_sliding_window="sliding_attention" in known.get("layer_types", ()))


def widths_of_heads(config: Qwen3Config) -> tuple[int, int]:
    """Of all queries, and of all keys or values."""
    keys = config.num_key_value_heads
    assert keys is not None  # the config fills it in
    return config.num_attention_heads * config.head_dim, keys * config.head_dim


def kinds_of_layers(config: Qwen3Config) -> list[str]:
    assert config.layer_types is not None  # the config fills it in
    return config.layer_types


def rotated(states: torch.Tensor, rotations: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of (B, heads, T, head_dim)."""
    cos, sin = (part[:, None].to(states.dtype) for part in rotations)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


class ForeignNetwork(nn.Module):
    """
    Args:
        layers: sizes of the layers.
        draft_vocab_size: tokens that it can draft; `None` means all, in their order.

    Attributes:
        kind: what people call such drafters.
        embed_tokens: its own embeddings; `None`: the target's.
    """

    kind: ClassVar[str]
    config: Any
    fc: nn.Linear
    embed_tokens: nn.Embedding | None

    def __init__(self, layers: Qwen3Config, draft_vocab_size: int | None):
        super().__init__()
        offsets = None if draft_vocab_size is None else torch.zeros(draft_vocab_size, dtype=torch.long)
        self.register_buffer("d2t", offsets)
        with torch.device("cpu"):
            # in no attribute that torch looks into: it has no weights, and its numbers stay precise in any dtype
            self._rotations = [Qwen3RotaryEmbedding(layers)]

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def draft_token_ids(self) -> torch.Tensor | None:
        """The tokens that its logits are of, (V',); `None`: all, in their order."""
        offsets: torch.Tensor | None = getattr(self, "d2t")  # noqa: B009, which torch's own annotation does not know
        return None if offsets is None else offsets + torch.arange(len(offsets), device=offsets.device)

    def rotate_on(self, device: torch.device) -> None:
        """Have the angles of rotations on `device`, in float32 whatever the weights are."""
        self._rotations[0].to(device)

    def rotations(self, states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (B or 1, T, head_dim) of `positions` (B or 1, T), in the dtype of `states`."""
        return self._rotations[0](states, positions)
