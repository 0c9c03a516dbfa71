"""Targets that several processes share: every rank writes what one process writes by plain generate()."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

import specformer
from specformer.generation.ranks import among_ranks, decided, is_first, is_synchronized, ranks_of, shared_ranks, told
from specformer.generation.ranks_agreement import fingerprint, weights_of

WORLD = Path(__file__).with_name("world.py")


def world(scenario: str, size: int, folder: Path, seconds: float) -> list[dict]:
    """What each rank found."""
    parent = str(Path(specformer.__file__).parents[1])
    paths = os.pathsep.join([parent, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, str(WORLD), scenario, str(size), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        if scenario == "stopped":  # the other rank is there for ever
            process.wait(seconds)
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=seconds)  # until the last rank has closed it
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"the ranks did not end:\n{output[-4000:]}")
    files = [folder / f"rank{rank}.json" for rank in range(size)]
    assert all(file.exists() for file in files), output[-4000:]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def assert_same(found: dict, kinds: int) -> None:
    assert "failed" not in found, found["failed"]
    assert set(found.values()) == {"same"}, {name: each for name, each in found.items() if each != "same"}
    assert len(found) == kinds


RAISED = {
    "other weights": "and rank 1 had another drafter, or other weights in it (specformer.modeling_specformer."
    "SpecFormerModel), than the first one.",
    "other prompts": "and rank 1 had other prompts than the first one.",
    "other settings": "and rank 1 had other settings than the first one.",
    "cuda_graphs": "ValueError: cuda_graphs=True was given and several processes share the target's weights",
    "shared middle model": "ValueError: The weights of the middle model",
    "pipeline": "its layers are in several processes, some in each (pipeline parallel)",
    "ZeRO-3": "rows of one would wait for others. Shard it with FSDP2",
}


def test_two_ranks(tmp_path: Path):
    for found in world("quick", 2, tmp_path, 300):
        untold = found.pop("nothing told", None)
        raised = {name: found.pop(name, None) for name in RAISED}
        assert_same(found, kinds=17)
        for name, sentence in RAISED.items():
            assert sentence in raised[name]
        assert untold != "same"


def test_alone_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(torch.distributed, "broadcast", None)
    tensors = torch.ones(2), None
    assert ranks_of(object()) is None  # which has no parameters to look at
    assert not is_synchronized(object())
    with among_ranks(object()):
        assert shared_ranks() is None
        assert told(*tensors) == tensors
        assert decided(max, 3, 4) == 4
        assert is_first()


def test_the_first_fsdp_is_found(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its own needs a GPU
    torch.nn.Module.__init__(wrapper)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert not is_synchronized(model)
    model.append(wrapper)
    assert is_synchronized(model)


def test_weights_differ_by_a_bit_a_shape_and_a_name():
    layer = torch.nn.Linear(3, 2)
    known = fingerprint(weights_of(layer))
    assert known == fingerprint(weights_of(layer))
    with torch.no_grad():
        layer.weight[1, 2] = torch.nextafter(layer.weight[1, 2], torch.tensor(9.0))
    assert fingerprint(weights_of(layer)) != known
    with torch.no_grad():
        layer.weight[1, 2] = torch.nextafter(layer.weight[1, 2], torch.tensor(-9.0))
    assert fingerprint(weights_of(layer)) == known
    layer.weight = torch.nn.Parameter(layer.weight.detach().t())
    assert fingerprint(weights_of(layer)) != known


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_hundred_calls_of_each_kind_beside_a_slow_rank(size: int, tmp_path: Path):
    for found in world("many calls", size, tmp_path, 4 * 3600):
        assert_same(found, kinds=19)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_that_is_lost_ends_the_others_with_a_sentence(how: str, tmp_path: Path):
    first, last = world(how, 2, tmp_path, 180)
    assert last["lost"] == "in round 5"
    assert "Raised in rank 0. The target's weights are shared by several processes" in first["raised"]
    assert first["seconds"] < 30  # of which 10 are the timeout of these processes
