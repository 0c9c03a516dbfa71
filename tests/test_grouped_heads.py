"""Folding query heads computes the same attention, in verify passes and nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch
from exactness import check, plain
from test_alignment import make_network
from tiny import llama, ragged_batch
from transformers import AttentionInterface

from specformer import generate
from specformer.generation import backend_heads as grouped_heads
from specformer.generation.backend_heads import folded_heads


class Module(torch.nn.Module):
    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


def sdpa(*args, **kwargs):
    return AttentionInterface()["sdpa"](*args, **kwargs)


def inputs(groups: int = 3, width: int = 5, value_size: int = 8, kind: str = "bool"):
    torch.manual_seed(0)
    query = torch.randn(4, 2 * groups, width, 8, dtype=torch.float64)
    key, value = (torch.randn(4, 2, 20, size, dtype=torch.float64) for size in (8, value_size))
    mask = torch.rand(4, 1, width, 20) < 0.6
    mask[..., 0] = True
    if kind == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    return Module(groups), query, key, value, mask


@pytest.fixture
def folds(monkeypatch) -> list[bool]:
    """What became of every attention call while heads may be folded."""
    seen, can_fold = [], grouped_heads.can_fold
    monkeypatch.setattr(grouped_heads, "can_fold", lambda *args: seen.append(can_fold(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(("groups", "width", "value_size"), [(1, 5, 8), (2, 1, 8), (3, 5, 8), (4, 3, 6)])
def test_same_attention(groups: int, width: int, value_size: int, kind: str, folds):
    arguments = inputs(groups, width, value_size, kind)
    expected, _ = sdpa(*arguments, scaling=0.3)
    with folded_heads():
        found, weights = sdpa(*arguments, scaling=0.3, dropout=0.0, position_ids=torch.zeros(1))
    assert weights is None and found.is_contiguous() and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert folds == [groups > 1]


@pytest.mark.one_version
def test_the_comparison_can_fail(monkeypatch):
    arguments = inputs()
    expected, _ = sdpa(*arguments)
    with folded_heads():
        module, query, *others = arguments
        found, _ = sdpa(module, query.roll(1, dims=1), *others)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "extra", [dict(dropout=0.5), dict(position_bias=torch.zeros(4, 6, 5, 20, dtype=torch.float64)), dict(mask=None)]
)
def test_what_it_does_not_understand_is_left_to_transformers(extra: dict, folds):
    *arguments, mask = inputs()
    mask = extra.pop("mask", mask)
    with folded_heads():
        sdpa(*arguments, mask, **extra)
    assert folds == [False]


def test_nothing_is_left_behind_not_even_by_an_error():
    before = AttentionInterface()["sdpa"]
    with pytest.raises(KeyError), folded_heads(), folded_heads():
        assert AttentionInterface()["sdpa"] is not before
        raise KeyError
    assert AttentionInterface()["sdpa"] is before


def test_other_threads_are_left_alone(folds):
    arguments = inputs()
    with folded_heads():
        thread = threading.Thread(target=sdpa, args=arguments)
        thread.start()
        thread.join()
    assert folds == [False]


@pytest.mark.parametrize("k", [0, 3])
def test_verify_passes_fold_and_no_others(k: int, folds):
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, max_new_tokens=12)
    assert not folds
    network = make_network("anchor", target)
    generate(target, network, **batch, max_new_tokens=2, num_assistant_tokens=k)  # the probe
    folds.clear()
    statistics = check(target, batch, reference, network, k, max_new_tokens=12)
    assert folds == [True] * statistics.rounds * target.config.num_hidden_layers
