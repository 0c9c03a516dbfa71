"""Masks of a pass over a ragged cache, by the kinds of layers that a config tells apart."""

from __future__ import annotations

import torch

from .cache_ragged import RaggedCache

SLIDING = ("sliding_attention", "hybrid_sliding")
WITHOUT_KEYS = ("conv", "linear_attention", "moe", "mlp")
"""Kinds of layers that attend to nothing. They take a mask of padding, of which a pass after the prompt has none."""


def sliding_layers(config, num_layers: int) -> tuple[int | None, list[int]]:
    """The window of a model's sliding layers, and their indices."""
    config = config.get_text_config(decoder=True)
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if layer_types is None:
        return window, [] if window is None else list(range(num_layers))
    return window, [layer for layer in range(num_layers) if layer_types[layer] in SLIDING]


def attention_masks(config, cache: RaggedCache, position_ids: torch.Tensor, dtype: torch.dtype):
    """The `attention_mask` argument of one pass: a 4-D mask, one per layer type where the config tells types apart, or
    none where no layer attends to tokens.

    Bool for sdpa; for eager attention, which adds its mask, floats of `dtype`.
    """
    if not cache.ragged_layers:
        return None
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)

    def for_layers(layer_type: str):
        if layer_type in WITHOUT_KEYS:
            return None
        visible = cache.mask(
            position_ids,
            window=window if layer_type in SLIDING else None,
            chunk=config.attention_chunk_size if layer_type == "chunked_attention" else None,
        )
        if config._attn_implementation == "sdpa":
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    if (layer_types := getattr(config, "layer_types", None)) is not None:
        kinds = {*layer_types}
        if cache.state_layers:  # models ask for the masks of both parts of a hybrid layer
            kinds |= {"full_attention", *WITHOUT_KEYS} | ({"sliding_attention"} if window else set())
        return {layer_type: for_layers(layer_type) for layer_type in kinds}
    return for_layers("full_attention" if window is None else "sliding_attention")
