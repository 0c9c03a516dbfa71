"""What is sampled from the few scores that top_k leaves is what is sampled from all of them, bit by bit."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specformer.generation import accept_top_k as top_k
from specformer.generation.accept_noise import HashedNoise, StepNoise
from specformer.generation.accept_processors import Processors
from specformer.generation.accept_rules import Match
from specformer.generation.accept_sampling import sample_with_noise
from specformer.generation.accept_top_k import FewScores, TopK, rounding, sample_surely
from specformer.generation.proposal import NO_TOKEN
from specformer.generation.text_positions import Positions

ROWS, WIDTH = 4, 5
CHAINS = {
    "top_k": [TopKLogitsWarper(7)],
    "top_k 1": [TopKLogitsWarper(1)],
    "temperature, top_k": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)],
    "temperature, top_k, top_p": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(50), TopPLogitsWarper(0.9)],
    "top_k, temperature, top_p": [TopKLogitsWarper(20), TemperatureLogitsWarper(3.0), TopPLogitsWarper(0.5)],
    "at least three": [TopKLogitsWarper(9), TopPLogitsWarper(0.01, min_tokens_to_keep=3)],
}


def normal(vocab_size: int) -> torch.Tensor:
    return 3 * torch.randn(ROWS, WIDTH, vocab_size)


def with_ties(vocab_size: int) -> torch.Tensor:
    return normal(vocab_size).round()


def half_precision(vocab_size: int) -> torch.Tensor:
    return normal(vocab_size).bfloat16().float()


def on_the_threshold(vocab_size: int) -> torch.Tensor:
    """Powers of two as probabilities, whose sums are among top_p's thresholds, or beside them by a rounding."""
    logits = torch.full((ROWS, WIDTH, vocab_size), -50.0)
    places = torch.rand(ROWS, WIDTH, vocab_size).argsort(dim=-1)[..., :8]
    return logits.scatter_(-1, places, -(0.5 * torch.arange(8)).exp2().log().expand(ROWS, WIDTH, 8))


def mostly_impossible(vocab_size: int) -> torch.Tensor:
    return normal(vocab_size).masked_fill(torch.rand(ROWS, WIDTH, vocab_size) < 0.97, -torch.inf)


def not_numbers(vocab_size: int) -> torch.Tensor:
    logits = normal(vocab_size)
    logits[0, 0, 3] = torch.nan
    logits[1] = torch.nan
    logits[2, 2, 5] = torch.inf
    logits[3, :3] = -torch.inf
    return logits


SURE = {normal: 0.9, half_precision: 0.5, mostly_impossible: 0.9}
"""Of so many positions at least the few scores are enough."""
KINDS = [normal, with_ties, half_precision, on_the_threshold, mostly_impossible, not_numbers]


def both_samples(
    logits: torch.Tensor, processors: Processors, rule: Match
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens from the few scores and from all of them, and where the former are sure."""
    vocab_size, drafts = logits.shape[-1], torch.full((ROWS, WIDTH), NO_TOKEN)
    positions = Positions(*torch.meshgrid(torch.arange(ROWS), torch.arange(WIDTH), indexing="ij"))
    few = processors.leave_few(logits)
    from_few, sure = rule.take_few(few, positions, vocab_size)
    from_all, _ = rule.take(
        processors.prefix_free(None, logits.flatten(0, 1)).view(logits.shape), drafts, None, positions
    )
    return from_few, from_all, sure


@pytest.mark.parametrize("noise", ["match", "coupled"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("chain", CHAINS)
def test_few_scores_and_all_of_them_give_one_sample(chain: str, kind, noise: str):
    processors, shares = Processors(LogitsProcessorList(CHAINS[chain])), []
    for seed in range(10):
        torch.manual_seed(seed)
        device = torch.device("cpu")
        rule = Match(StepNoise(ROWS, device) if noise == "match" else HashedNoise(list(range(ROWS)), device))
        logits = kind(100 if seed % 2 else 1000)
        from_few, from_all, sure = both_samples(logits, processors, rule)
        assert torch.equal(from_few[sure], from_all[sure])
        shares.append(sure.float().mean().item())
    assert sum(shares) / len(shares) >= SURE.get(kind, 0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("chain", CHAINS)
def test_processed_scores_are_as_from_the_processors_themselves(chain: str, kind):
    processors = Processors(LogitsProcessorList(CHAINS[chain]))
    for seed in range(10):
        torch.manual_seed(seed)
        logits = kind(100 if seed % 2 else 1000)
        expected = processors.prefix_free(None, logits.flatten(0, 1)).view(logits.shape)
        torch.testing.assert_close(processors.warp(logits), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [with_ties, not_numbers], ids=lambda kind: kind.__name__)
def test_without_doubt_scores_are_others(kind, monkeypatch):
    """Where few scores are taken for sure everywhere, the tests above do fail."""
    leave = TopK.leave

    def leave_surely(self, logits):
        few = leave(self, logits)
        return FewScores(few.scores, few.token_ids, torch.ones_like(few.sure))

    monkeypatch.setattr(TopK, "leave", leave_surely)
    with pytest.raises(AssertionError):
        test_processed_scores_are_as_from_the_processors_themselves("temperature, top_k, top_p", kind)


def test_thresholds_of_top_p_leave_it_to_all_scores():
    """A sum of probabilities that is the threshold, or beside it by a rounding, is on either side of it for some."""
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().repeat(1, 1, 1)
    logits = torch.cat([logits, torch.full((1, 1, 96), -torch.inf)], dim=-1)
    for top_p, sure in ((0.75, False), (0.75 + 1e-6, False), (0.75 - 1e-6, False), (0.7, True)):
        chain = LogitsProcessorList([TopKLogitsWarper(4), TopPLogitsWarper(top_p)])
        assert TopK.among(chain).leave(logits).sure.item() is sure


def test_a_token_that_wins_by_a_hair_is_not_sure():
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    few = FewScores(probabilities.log(), torch.tensor([[4, 9, 17]]), torch.tensor([True]))
    for shift, sure in ((0.0, False), (rounding(3) / 4, False), (-rounding(3) / 4, False), (0.01, True), (-0.01, True)):
        noise = probabilities.clone()  # all odds are 1
        noise[0, 2] = 1.0
        noise[0, 0] *= 1 - shift
        tokens, is_sure = sample_surely(few, noise)
        assert is_sure.item() is sure
        if sure:
            assert tokens.item() == (4 if shift > 0 else 9)


def test_what_is_said_of_rounding():
    """Sums of the same probabilities, alone and among impossible tokens, differ by less than is allowed for."""
    torch.manual_seed(0)
    for width in (2, 51, 257):
        scores = 3 * torch.randn(200, width)
        among = torch.cat([scores, torch.full((200, 5000), -torch.inf)], dim=-1)[:, torch.randperm(width + 5000)]
        alone, beside = scores.softmax(dim=-1).amax(dim=-1), among.softmax(dim=-1).amax(dim=-1)
        assert ((alone - beside).abs() / beside).max() < rounding(width) / 4
        exact = scores.double().softmax(dim=-1).amax(dim=-1)
        assert ((alone - exact).abs() / exact).max() < rounding(width) / 4


@pytest.mark.parametrize(
    "chain",
    [
        [],
        [TemperatureLogitsWarper(0.7)],
        [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)],
        [TopPLogitsWarper(0.9), TopKLogitsWarper(5)],
        [TopKLogitsWarper(5), TopKLogitsWarper(3)],
        [TopKLogitsWarper(5), MinPLogitsWarper(0.1)],
        [TopKLogitsWarper(5, filter_value=-100.0)],
        [TopKLogitsWarper(5), TopPLogitsWarper(0.9, filter_value=-100.0)],
        [TopKLogitsWarper(top_k.LARGEST_K + 1)],
    ],
    ids=lambda chain: ", ".join(type(processor).__name__ for processor in chain) or "none",
)
def test_other_processors_see_all_scores(chain: list):
    assert TopK.among(LogitsProcessorList(chain)) is None


def test_a_vocabulary_of_hardly_more_than_k_tokens_is_seen_whole():
    chain = TopK.among(LogitsProcessorList([TopKLogitsWarper(20)]))
    assert chain.leave(torch.randn(2, 3, 20)) is None
    assert chain.leave(torch.randn(2, 3, 20 + top_k.MORE)) is None
    assert chain.leave(torch.randn(2, 3, 21 + top_k.MORE)) is not None


def test_nothing_is_sampled_where_nothing_can_be():
    noise = torch.ones(1, 8)
    for score in (torch.nan, -torch.inf):
        few = FewScores(torch.full((1, 8), score), torch.arange(8)[None], torch.tensor([True]))
        assert not sample_surely(few, noise)[1].item()
        assert sample_with_noise(few.scores, noise).item() == NO_TOKEN
