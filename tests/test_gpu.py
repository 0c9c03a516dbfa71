"""On CUDA: the same checks as on the CPU, and half precision beside its own base rate."""

from __future__ import annotations

import pytest
import torch
from exactness import Recorder, choose_eos
from oracles import Oracle
from specformer import generate
from test_exactness import NEW_TOKENS, SAMPLING, meaningful_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


class CudaOracle(Oracle):
    def __init__(self, answer, *args):
        super().__init__(answer.cpu(), *args)

    def begin(self, input_ids, layout, first_tokens, max_length) -> None:
        super().begin(input_ids, layout, first_tokens.cpu(), max_length)

    def propose(self, num_tokens, choose) -> torch.Tensor:
        return super().propose(num_tokens, choose).cuda()

    def update(self, tokens, counts, longest) -> None:
        super().update(tokens, counts.cpu(), longest)

    def select_rows(self, index, longest) -> None:
        super().select_rows(index.cpu(), longest)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral-sliding"])
def test_exact_on_cuda(name: str):
    target, batch, _ = meaningful_target(name)
    target, batch = target.cuda(), {key: value.cuda() for key, value in batch.items()}
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, max_new_tokens=NEW_TOKENS)
        arguments["eos_token_id"] = choose_eos(
            target.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None), batch["input_ids"].shape[1]
        )
        streamer = Recorder()
        torch.manual_seed(3)
        reference = target.generate(**batch, **arguments, streamer=streamer)
        state, streamed = torch.cuda.get_rng_state(), streamer.calls
        for kind in ("sometimes", "adversarial"):
            drafter = CudaOracle(reference, batch["input_ids"].shape[1], kind, arguments["eos_token_id"])
            streamer = Recorder()
            torch.manual_seed(3)
            output = generate(target, drafter, **batch, **arguments, num_assistant_tokens=4, streamer=streamer)
            assert output.tolist() == reference.tolist()
            assert streamer.calls == streamed
            assert torch.equal(torch.cuda.get_rng_state(), state)
