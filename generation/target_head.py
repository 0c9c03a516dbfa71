"""The target's logits of states that resemble its last ones."""

from __future__ import annotations

import torch


def logits_of_head(target, states: torch.Tensor) -> torch.Tensor:
    """What the LM head makes of `states` (..., d), with the family's scale and soft cap: (..., V)."""
    config = target.config.get_text_config(decoder=True)
    logits = target.get_output_embeddings()(states)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits
