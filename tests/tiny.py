"""Tiny random targets and batches. Weights have a standard deviation of 0.15: with the default one the logits are so
flat that every model writes one token for ever, and no test of exactness could fail."""

from __future__ import annotations

from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specformer import SpecFormerConfig

VOCAB = 64
PAD, BOS, EOS = 0, 1, 5


PRESETS = {
    "anchor": SpecFormerConfig.from_target_config,
    "paper": SpecFormerConfig.paper,
    "causal slots": partial(SpecFormerConfig.from_target_config, causal_draft_attention=True),
    "slot embeddings": partial(SpecFormerConfig.from_target_config, use_positional_ffn=False),
    "some tokens": partial(SpecFormerConfig.from_target_config, draft_vocab_size=24),
    "previous token": partial(SpecFormerConfig.from_target_config, previous_token_rank=8, num_candidates=5),
    "context": partial(SpecFormerConfig.from_target_config, draft_attends_context=True),
    "anchor slot": partial(SpecFormerConfig.paper, anchor_slot=True),
    "two layers": partial(SpecFormerConfig.from_target_config, num_draft_layers=2),
    "confidence": partial(SpecFormerConfig.from_target_config, confidence_head=True),
    "all of it": partial(
        SpecFormerConfig.from_target_config,
        anchor_slot=True,
        draft_attends_context=True,
        draft_vocab_size=24,
        previous_token_rank=8,
        num_candidates=5,
        num_draft_layers=2,
        confidence_head=True,
    ),
}
"""Makers of drafter configs: the default, the paper's, one for each field that changes the network, and several."""


def llama_config(**overrides) -> LlamaConfig:
    fields = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaConfig(**{**fields, **overrides})


def llama(dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**overrides)).to(dtype).eval()


def ragged_batch(padding=(0, 3, 5, 1, 8), width: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths, as a tokenizer returns them."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(EOS + 1, VOCAB, (len(padding), width), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, count in enumerate(padding):
        input_ids[row, :count], attention_mask[row, :count] = PAD, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def all_logits(borrowed, states: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of drafter states (..., d); -inf where a token is never drafted."""
    return over_vocabulary(borrowed.draft_logits(states), borrowed.draft_token_ids)


def over_vocabulary(logits: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
    """Logits (..., C) of `token_ids`, where the vocabulary (..., V) has them; -inf elsewhere."""
    if token_ids is None:
        return logits
    everywhere = logits.new_full((*logits.shape[:-1], VOCAB), -torch.inf)
    return everywhere.scatter(-1, token_ids.expand(logits.shape), logits)
