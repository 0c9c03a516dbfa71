"""Single questions that a target answers by a trial."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from .backend_versions import cache_of, prepared_inputs
from .target_mixers import prompt_cache
from .target_refusals import input_device


class CacheOf(DynamicCache):
    """Seems to hold `length` tokens."""

    length = 0

    def get_seq_length(self, *args, **kwargs) -> int:
        return self.length

    def __len__(self) -> int:
        return 1


def forgets_at(model, length: int) -> bool:
    """Whether plain generate() drops the cache of `length` tokens when it goes on, and reads the last token alone."""
    cache = CacheOf()
    cache.length = length
    tokens = torch.zeros(1, length + 1, dtype=torch.long, device=input_device(model))
    try:
        inputs = prepared_inputs(model, tokens, cache, next_sequence_length=1, use_cache=True)
    except (AttributeError, TypeError, ValueError):  # it wants more than that
        return False
    return cache_of(inputs) is None and inputs["input_ids"].shape[1] == 1


def numbers_anew(model) -> bool:
    """Whether plain generate() hands a forward other positions than the tokens of a prompt have, as PaliGemma's does,
    which counts from 1 in each step: passes over drafts would not."""
    tokens = torch.zeros(2, 3, dtype=torch.long, device=input_device(model))
    places = torch.arange(3, device=tokens.device).expand(2, -1)
    try:
        inputs = prepared_inputs(
            model,
            tokens,
            prompt_cache(model),
            attention_mask=torch.ones_like(tokens),
            position_ids=places,
            is_first_iteration=True,
            use_cache=True,
        )
    except (AttributeError, IndexError, TypeError, ValueError):  # it wants more than that
        return False
    prepared = inputs.get("position_ids")
    return prepared is not None and not bool((prepared == places).all())


@torch.no_grad()
def changes_nothing(model, name: str) -> bool:
    """Whether zeros as the input `name` are the same to `model` as none, in a trial on a few tokens. They are not
    where they have an embedding that is added (GPT-2)."""
    tokens = torch.arange(8, device=input_device(model))[None] % model.config.get_text_config(decoder=True).vocab_size
    without, given = (
        model(input_ids=tokens, use_cache=False, **types).logits[0].cpu().double()
        for types in ({}, {name: torch.zeros_like(tokens)})
    )
    rounding = max(torch.finfo(model.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    errors = (given - without).abs().median(dim=-1).values  # of each position
    return bool((errors <= rounding * without.std()).all())
