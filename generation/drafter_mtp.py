"""The target's own layer for multi-token prediction (MTP) as a drafter: what checkpoints such as GLM-4.5 and
DeepSeek-V3 hold beside the model (arXiv 2412.19437, section 2.2).

    at each position, the target's state after its last norm      -> norm, d
    beside it the embedding of the token that comes next          -> norm, d
        -> eh_proj                                                -> d
        -> one layer of the target's own kind, causal over the text, and a norm
        -> the target's LM head

What the layer gives at a position stands for the target's state at the one after it, as in EAGLE. So it drafts as many
tokens as are asked for, one after the other, though most checkpoints trained it for the first.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import MtpModel

from .backend_versions import cache_argument
from .cache_masks import SLIDING
from .drafter_eagle import EagleDrafter
from .drafter_foreign import ForeignDrafter
from .drafter_foreign_network import ForeignNetwork
from .target_head import logits_of_head
from .target_refusals import input_device

_loaded: WeakKeyDictionary = WeakKeyDictionary()
"""target -> its MTP layers, as `use_mtp=True` loaded them."""
_lock = threading.Lock()


@dataclass
class MtpConfig:
    """What `check_fit` and `EagleDrafter` ask of a network."""

    target_hidden_size: int
    draft_vocab_size: int
    scales_embeddings: ClassVar[bool] = True
    norm_output: ClassVar[bool] = False


class MtpNetwork(ForeignNetwork):
    """The layer as an EAGLE network: the same calls. Its weights are those of `model` themselves, and it holds none of
    the target's.

    Args:
        model: transformers' class of the layers.
        target: the model that they belong to.

    Raises:
        ValueError: there are more of them than one, or it keeps states, or is of another dtype than the target.
    """

    kind = "MTP"
    layers: Any
    fc: Any = None
    embed_tokens = None

    def __init__(self, model: MtpModel, target):
        nn.Module.__init__(self)
        self.register_buffer("d2t", None)
        text = model.config.get_text_config(decoder=True)
        self.config: Any = MtpConfig(text.hidden_size, text.vocab_size)
        self.layers, self.text = model.layers, text
        if len(self.layers) != 1:
            raise ValueError(
                f"{type(target).__name__} has {len(self.layers)} MTP layers; one is drafted with, and more are not "
                "built. Pass another drafter."
            )
        kinds = {type(layer) for layer in DynamicCache(config=text).layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer} or self.layers[0].post_norm is None:
            raise ValueError(
                f"The MTP layer of {type(target).__name__} does not keep keys and values of all tokens, or has no norm "
                "of its own, which is not built. Pass another drafter."
            )
        self.window = text.sliding_window if text_kind(text) in SLIDING else None
        self.norm = nn.Identity()  # the layer ends with its own
        rotary = model.rotary_emb  # the target's: some of them change with the positions that they have seen
        self._target, self._rotary = [target], [None if rotary is None else copy.deepcopy(rotary)]
        by_kind = getattr(model, "has_per_layer_rope", False)
        self.rotates = {"layer_type": text.layer_types[0]} if by_kind else {}
        if self.dtype != target.dtype:
            raise ValueError(
                f"The MTP layer is in {self.dtype} and {type(target).__name__} in {target.dtype}; call .to("
                f"{target.dtype}) of the layers, or pass use_mtp=True in place of assistant_model."
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].eh_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].eh_proj.weight.device

    def rotate_on(self, device: torch.device) -> None:
        if self._rotary[0] is not None:
            self._rotary[0].to(device)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """The target's last state (B, T, 1, d) -> (B, T, d)."""
        return states[:, :, 0]

    def lm_head(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, V)."""
        return logits_of_head(self._target[0], states)

    def forward(self, states, embeds, positions, cache, mask=None) -> torch.Tensor:
        """See `EagleNetwork.forward`."""
        if mask is None:
            place = torch.arange(embeds.shape[1], device=embeds.device)
            behind = place[:, None] - place
            mask = (behind >= 0 if self.window is None else (behind >= 0) & (behind < self.window))[None, None]
        if (attention := self._target[0].config.get_text_config(decoder=True)._attn_implementation) != "sdpa":
            zeros = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device)
            mask = zeros.masked_fill(~mask, torch.finfo(embeds.dtype).min)
        self.text._attn_implementation = attention
        positions = positions + 1  # those of the tokens whose embeddings are read
        rotary = self._rotary[0]
        rotations = None if rotary is None else rotary(embeds, position_ids=positions, **self.rotates)
        layer = self.layers[0]
        return layer(
            embeds,
            states,
            position_embeddings=rotations,
            attention_mask=mask,
            position_ids=positions,
            **cache_argument(layer, cache),
        )


class MtpDrafter(EagleDrafter):
    """
    Args:
        model: the layers, of the target itself.
        target: the model that they belong to.
    """

    network: Any  # an MtpNetwork
    default_num_assistant_tokens = 1

    def __init__(self, model: MtpModel, target):
        last = target.config.get_text_config(decoder=True).num_hidden_layers
        ForeignDrafter.__init__(self, MtpNetwork(model, target), target, [last])


def text_kind(text) -> str | None:
    """The kind of the MTP layer."""
    layer_types = getattr(text, "layer_types", None)
    return layer_types[0] if layer_types else None


def mtp_layers(target) -> MtpModel:
    """The MTP layers of the checkpoint that `target` was loaded from, which are kept with it.

    Raises:
        ValueError: it has none, or they cannot be loaded.
    """
    config = target.config.get_text_config(decoder=True)
    if not getattr(config, "num_mtp_layers", None):
        raise ValueError(
            f"use_mtp is True, and {type(target).__name__} has no MTP layers that transformers knows (num_mtp_layers "
            "in its config). Leave it unset, and pass a drafter as assistant_model, or prompt_lookup_num_tokens."
        )
    with _lock, torch.inference_mode(False):  # weights that are made inside it could not be moved any more
        if target not in _loaded:
            try:
                _loaded[target] = MtpModel.from_pretrained(target).eval()
            except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"The MTP layers of {type(target).__name__} could not be loaded from "
                    f"{target.name_or_path or 'where it is from'} ({type(error).__name__}: {error}). Leave use_mtp "
                    "unset, or load the target from a checkpoint that holds them."
                ) from error
        layers = _loaded[target].layers
        layers.to(input_device(target), target.dtype)
        return _loaded[target]
