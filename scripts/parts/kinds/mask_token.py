"""Which token of a target's vocabulary stands for those that are not known yet."""

from __future__ import annotations

import torch

from specformer.scripts.parts.answers import Answers


@torch.no_grad()
def unused_token(target, answers: Answers) -> int:
    """The padding token if no text has it, else the last token that no text has, else the rarest; of those whose
    embedding is not zero."""
    table = target.get_input_embeddings().weight
    config = target.config.get_text_config(decoder=True)
    count = min(len(table), config.vocab_size)
    counts = torch.cat([tokens for tokens, _ in answers.rows]).bincount(minlength=count)[:count]
    counts = counts.masked_fill(table[:count].abs().amax(dim=1).cpu() == 0, torch.iinfo(torch.long).max)
    pad = getattr(config, "pad_token_id", None)
    if type(pad) is int and 0 <= pad < count and counts[pad] == 0:
        return pad
    return count - 1 - int(counts.flip(0).argmin())
