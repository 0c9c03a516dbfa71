"""Tiny random targets that keep states, one of each family."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from exactness import choose_eos
from shrunken import make_target
from tiny import ragged_batch

NEW_TOKENS = 24

# class -> standard deviation and seed of weights whose greedy text is varied, free of near ties, and another one where
# its states are wrong
WEIGHTS = {
    # short convolutions
    "Lfm2ForCausalLM": (0.15, 0),
    "Lfm2MoeForCausalLM": (0.15, 0),
    "Lfm3ForCausalLM": (0.15, 0),
    # delta rules
    "Qwen3NextForCausalLM": (0.15, 0),
    "Qwen3_5ForCausalLM": (0.15, 1),
    "Qwen3_5MoeForCausalLM": (0.15, 0),
    "OlmoHybridForCausalLM": (0.15, 0),
    "KimiLinearForCausalLM": (0.15, 0),
    "BailingHybridForCausalLM": (0.15, 0),
    "LaraMiniForCausalLM": (0.15, 0),
    # lightning attention
    "MiniMaxForCausalLM": (0.15, 0),
    # Mamba-2
    "BambaForCausalLM": (0.3, 0),
    "FalconH1ForCausalLM": (0.3, 0),  # in the same layers as attention
    "GraniteMoeHybridForCausalLM": (0.15, 0),
    "NemotronHForCausalLM": (0.15, 0),
    "Zamba2ForCausalLM": (0.15, 2),
    "Mamba2ForCausalLM": (0.15, 0),  # alone
    # Mamba
    "MambaForCausalLM": (0.15, 0),  # alone
    "FalconMambaForCausalLM": (0.15, 0),  # alone
    "JambaForCausalLM": (0.15, 0),
    "ZambaForCausalLM": (0.15, 0),
    # convolutions and shifted values inside of attention
    "ZayaForCausalLM": (0.3, 0),
}
INSTALLED = [name for name in WEIGHTS if hasattr(transformers, name)]


@cache
def hybrid(name: str):
    """A target in float64, a ragged batch, and a token that ends its rows' greedy texts at different places."""
    std, seed = WEIGHTS[name]
    target, batch = make_target(name, torch.float64, seed, std), ragged_batch()
    output = target.generate(**batch, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True)
    width = batch["input_ids"].shape[1]
    texts = output.sequences[:, width:].tolist()
    best = torch.stack(output.logits).topk(2).values
    assert sum(len(set(text)) for text in texts) > 4 * len(texts), f"degenerate texts: {texts}"
    assert (best[..., 0] - best[..., 1]).min() > 1e-4
    return target, batch, choose_eos(output.sequences, width)
