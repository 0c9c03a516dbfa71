"""The few scores that top_k leaves: sampling from them, without the rest of the vocabulary.

Behind top_k all but k tokens are impossible, but top_p still sorts the whole vocabulary, and softmax and noise run over
all of it. Over the best tokens alone the same processors and the same sampling come to the same result, up to the order
in which probabilities are summed, which their last bits depend on. Where those bits could decide (whether a sum is at
most top_p's threshold, which token wins by a hair), and where equal scores leave open who is among the best, a position
is not `sure`, and is computed from all scores as before. So what is sampled is the same, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

LARGEST_K = 256
"""What is summed up is short, and rounding with it."""
MORE = 16
"""Tokens besides the best k: scores of half precision are often equal to the k-th, and top_k keeps all that are."""


def rounding(width: int) -> float:
    """Twice as far as two ways of summing up probabilities of `width` tokens in float32 can differ, relatively: a
    rounding for each token in either sum, and those of exponentials, which vector instructions get less exact."""
    return 4 * (width + 64) * torch.finfo(torch.float32).eps


@dataclass
class FewScores:
    """Processed scores (..., C) of `token_ids` (..., C); those of all other tokens are -inf. Where they are not `sure`
    (...), bool, the processors may have let other ones through. Drafts need not be exact, and may ignore that."""

    scores: torch.Tensor
    token_ids: torch.Tensor
    sure: torch.Tensor


class TopK:
    """A call's processors, if they are top_k, with or without temperature, and top_p after it."""

    def __init__(self, processors: LogitsProcessorList, k: int):
        self.processors, self.k = processors, k

    @classmethod
    def among(cls, processors: LogitsProcessorList) -> TopK | None:
        """`None` where they are other ones, or in another order."""
        filters = [processor for processor in processors if type(processor) is not TemperatureLogitsWarper]
        kinds = [type(processor) for processor in filters]
        if kinds not in ([TopKLogitsWarper], [TopKLogitsWarper, TopPLogitsWarper]):
            return None
        if filters[0].top_k > LARGEST_K or any(processor.filter_value != -torch.inf for processor in filters):
            return None
        return cls(processors, filters[0].top_k)

    def leave(self, logits: torch.Tensor) -> FewScores | None:
        """What is left of logits (..., V); `None` if there is hardly anything to leave out."""
        width = self.k + MORE
        if width >= logits.shape[-1]:
            return None
        token_ids = logits.topk(width, sorted=False).indices  # which temperature does not change
        scores = logits.gather(-1, token_ids)
        sure = torch.ones_like(scores[..., 0], dtype=torch.bool)
        for processor in self.processors:
            before, scores = scores, processor(None, scores.flatten(0, -2)).view(scores.shape)
            if isinstance(processor, TopKLogitsWarper):
                sure &= scores.isneginf().any(dim=-1)  # if the least of them goes, all others do
            elif isinstance(processor, TopPLogitsWarper):
                sure &= top_p_is_sure(processor, before, scores)
        return FewScores(scores, token_ids, sure)


def top_p_is_sure(processor: TopPLogitsWarper, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Whether it makes the same scores `after` of those `before`, (..., C), among impossible ones: bool (...)."""
    sums = before.sort(dim=-1).values.softmax(dim=-1).cumsum(dim=-1)[..., : -processor.min_tokens_to_keep]
    clear = ((sums - (1 - processor.top_p)).abs() > rounding(before.shape[-1]) * sums).all(dim=-1)
    gone = after.isneginf()
    # which one of equal scores goes is up to the sort
    return clear & (before.where(gone, -torch.inf).amax(dim=-1) < before.where(~gone, torch.inf).amin(dim=-1))


def sample_surely(few: FewScores, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `sample_with_noise` takes from all scores, with the noise (..., C) of the few, (...); and where that is
    sure, bool (...)."""
    best = (few.scores.softmax(dim=-1) / noise).topk(2, dim=-1)
    tokens = few.token_ids.gather(-1, best.indices[..., :1])[..., 0]
    clear = best.values[..., 1] < best.values[..., 0] * (1 - rounding(few.scores.shape[-1]))
    return tokens, few.sure & clear
