"""What is kept of weights from call to call is that of the weights of now, however these were changed."""

from __future__ import annotations

import pytest
import torch
from tiny import llama

from specformer import SpecFormerConfig, SpecFormerModel
from specformer.generation.drafter_specformer import in_dtype
from specformer.target_specformer import kept_rows


def step(parameters) -> None:
    """Of the optimizer that transformers' Trainer takes, which torch's count of changes does not see."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter._version for parameter in parameters]
    torch.optim.AdamW(parameters, fused=True).step()
    assert [parameter._version for parameter in parameters] == before


def through_data(parameters) -> None:
    for parameter in parameters:
        parameter.data += 0.01


def in_place(parameters) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01)


CHANGES = [step, through_data, in_place]


@pytest.mark.parametrize("change", CHANGES)
def test_the_copy_of_a_drafter_in_another_dtype(change):
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(llama().config, draft_vocab_size=7)).float()
    kept = in_dtype(drafter, torch.bfloat16)
    assert in_dtype(drafter, torch.bfloat16) is kept
    change(drafter.parameters())
    now = in_dtype(drafter, torch.bfloat16)
    for ours, theirs in zip(now.parameters(), drafter.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())
    assert now is not kept and in_dtype(drafter, torch.bfloat16) is now
    drafter.choose_draft_tokens(torch.arange(drafter.config.vocab_size))
    assert torch.equal(in_dtype(drafter, torch.bfloat16).draft_token_ids, drafter.draft_token_ids)
    assert in_dtype(drafter, torch.float16).dtype == torch.float16
    assert in_dtype(drafter, torch.float32) is drafter


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_a_head(change, bias: bool):
    head, rows = torch.nn.Linear(6, 20, bias=bias), torch.tensor([2, 3, 11])
    kept = kept_rows(head, rows)
    assert kept_rows(head, rows.clone()) is kept
    change(head.parameters())
    now = kept_rows(head, rows)
    for ours, theirs in zip(now.parameters(), head.parameters(), strict=True):
        assert torch.equal(ours, theirs[rows])
    assert now is not kept and kept_rows(head, rows) is now
    assert torch.equal(kept_rows(head, rows + 1).weight, head.weight[rows + 1])
    assert torch.equal(kept_rows(head.double(), rows).weight, head.weight[rows])
    assert kept_rows(head, None) is head
