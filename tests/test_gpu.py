"""On CUDA: the same checks as on the CPU, and half precision beside its own base rate."""

from __future__ import annotations

import itertools
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from exactness import Recorder, choose_eos
from oracles import Oracle
from test_cuda_graphs import network_of
from test_exactness import NEW_TOKENS, SAMPLING, meaningful_target
from tiny import PRESETS

from specformer import generate
from specformer.generation import backend_graphs as cuda_graphs
from specformer.generation.backend_recordable import Watch, waits_of_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


class CudaOracle(Oracle):
    def __init__(self, answer, *args):
        super().__init__(answer.cpu(), *args)

    def begin(self, prompts) -> None:
        super().begin(replace(prompts, first_tokens=prompts.first_tokens.cpu()))

    def drafts(self, num_tokens) -> torch.Tensor:
        return super().drafts(num_tokens).cuda()

    def update(self, verified) -> None:
        super().update(replace(verified, counts=verified.counts.cpu()))

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
        for kind, recorded in itertools.product(("sometimes", "adversarial"), (False, True)):
            drafter = CudaOracle(reference, batch["input_ids"].shape[1], kind, arguments["eos_token_id"])
            streamer = Recorder()
            torch.manual_seed(3)
            settings = dict(arguments, num_assistant_tokens=4, streamer=streamer, cuda_graphs=recorded)
            output = generate(target, drafter, **batch, **settings)
            assert output.tolist() == reference.tolist()
            assert streamer.calls == streamed
            assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("preset", PRESETS)
def test_recorded_drafters_on_cuda(preset: str, sampling: dict):
    """Texts, and acceptance, which is that of the passes as they are written."""
    target, batch, eos = meaningful_target("llama")
    network = network_of(target, preset).cuda()
    target, batch = target.cuda(), {key: value.cuda() for key, value in batch.items()}
    arguments = dict(batch, **sampling, max_new_tokens=NEW_TOKENS, eos_token_id=eos)
    torch.manual_seed(3)
    expected = target.generate(**arguments)
    arguments |= dict(num_assistant_tokens=4, return_dict_in_generate=True, prompt_lookup_num_tokens=0)
    outputs = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without CUDA graphs.*")
        for recorded in (False, True):
            torch.manual_seed(3)
            outputs.append(generate(target, network, **arguments, cuda_graphs=recorded))
    assert outputs[1].sequences.tolist() == outputs[0].sequences.tolist() == expected.tolist()
    assert outputs[1].statistics.accepted_per_slot == outputs[0].statistics.accepted_per_slot


@pytest.mark.parametrize("is_seen", [True, False])
def test_sampling_goes_on_behind_what_cannot_be_recorded(is_seen: bool, monkeypatch):
    """torch's generator can be used again, also where a recording was begun and failed."""
    if not is_seen:
        monkeypatch.setattr(Watch, "OBSTACLES", {})
        monkeypatch.setattr(cuda_graphs, "waits_of_gpu", lambda: nullcontext(lambda: None))
    target, batch, eos = meaningful_target("llama")
    target, batch = target.cuda(), {key: value.cuda() for key, value in batch.items()}
    target.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * float(output.sum() < 1e9))
    arguments = dict(batch, **SAMPLING, max_new_tokens=NEW_TOKENS, eos_token_id=eos)
    torch.manual_seed(3)
    expected = target.generate(**arguments)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="goes on without CUDA graphs"):
        output = generate(target, target, **arguments, num_assistant_tokens=3, cuda_graphs=True)
    assert output.tolist() == expected.tolist()
    torch.cuda.empty_cache()
    torch.rand(1, device="cuda")


def test_a_wait_inside_a_kernel_is_noticed():
    values = torch.ones(4, device="cuda")
    with waits_of_gpu() as waits:
        values.sum()
    assert waits() is None
    with waits_of_gpu() as waits:
        values.sum().item()
    assert "synchronizing" in waits()


def test_memory_of_calls_is_used_again():
    target, batch, _ = meaningful_target("llama")
    network = network_of(target, "all of it").cuda()
    target, batch = target.cuda(), {key: value.cuda() for key, value in batch.items()}
    reserved = []
    for _ in range(6):
        generate(target, network, **batch, max_new_tokens=NEW_TOKENS, num_assistant_tokens=4, cuda_graphs=True)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[2]
