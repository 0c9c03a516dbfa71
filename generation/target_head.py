"""The target's LM head and embeddings, as drafters of other projects use them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def embed_tokens(embeddings: nn.Module, token_ids: torch.Tensor, scaled: bool) -> torch.Tensor:
    """Input embeddings of `token_ids` (B, T), (B, T, d): with the factor that some families' module has, if `scaled`,
    but without the norm that one has; or as they are in its table. After a wrong draft there may be no token, and
    a drafter may know fewer than its target."""
    table = embeddings.get_parameter("weight")
    token_ids = token_ids.clamp(min=0, max=len(table) - 1)
    is_plain = type(embeddings).forward is nn.Embedding.forward  # FSDP2 puts a class of its own in front
    if is_plain or (scaled and not hasattr(embeddings, "embed_norm")):
        return embeddings(token_ids)
    if hasattr(table, "full_tensor"):  # of which each process has a part
        table = table.full_tensor()
    return functional.embedding(token_ids, table)


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
