"""Targets that several processes share: every rank writes what one process writes by plain generate()."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dflash import random_weights, raw_config
from foreign import save
from ranks import TORCHRUN, environment, world
from test_callers import tiny_tokenizer
from tiny import llama
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from specformer.generation.ranks import among_ranks, decided, is_first, is_synchronized, ranks_of, shared_ranks, told
from specformer.generation.ranks_agreement import fingerprint, weights_of

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ROOT / "docs" / "devices.md"


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
    "nothing followed": "and rank 1 had another drafter, or other weights in it "
    "(specformer.generation.drafter_online.OnlineDistillation), than the first one.",
    "shared learner": "LlamaForCausalLM, which is to learn, are shared by several processes",
    "pipeline": "its layers are in several processes, some in each (pipeline parallel)",
    "ZeRO-3": "rows of one would wait for others. Shard it with FSDP2",
}


def test_two_ranks(tmp_path: Path):
    learned = []
    for found in world("quick", 2, tmp_path, 300):
        learned.append(found.pop("learned", None))
        untold = found.pop("nothing told", None)
        raised = {name: found.pop(name, None) for name in RAISED}
        turned = found.pop("drafts, layers turned", None)
        assert_same(found, kinds=29)
        for name, sentence in RAISED.items():
            assert sentence in raised[name]
        assert untold != "same"
        assert turned == "other drafts"  # so that those of a group could differ, and no text does
    (steps, weights), other = learned
    assert steps == 4 and other == [steps, weights]  # of the first rank, although the other one learns faster


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
def test_many_calls_of_each_kind_beside_a_slow_rank(size: int, tmp_path: Path):
    """As many as there are settings; `python tests/ranks.py` makes a hundred."""
    kinds = 80 + 4 * (size == 4 and hasattr(DistributedConfig, "dp_replicate_size"))
    for found in world("many calls", size, tmp_path, 3600, calls=4):
        assert_same(found, kinds)


@pytest.mark.slow
def test_the_targets_own_layer(tmp_path: Path):
    for found in world("many calls", 2, tmp_path, 600, target="MTP", calls=4):
        assert_same(found, kinds=2)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("size", [2, 3])
def test_a_real_target(size: int, real_target, tmp_path: Path):
    """Sharded in two, and tensor parallel in three, since it has three key and value heads."""
    for found in world("many calls", size, tmp_path, 3600, target="SmolLM2", calls=4):
        assert_same(found, kinds=16)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_that_is_lost_ends_the_others_with_a_sentence(how: str, tmp_path: Path):
    first, last = world(how, 2, tmp_path, 180)
    assert last["lost"] == "in round 5"
    assert "Raised in rank 0. The target's weights are shared by several processes" in first["raised"]
    assert first["seconds"] < 30  # of which 10 are the timeout of these processes


@pytest.mark.slow
def test_torchrun_ends_all_where_one_is_killed(tmp_path: Path):
    with pytest.raises(RuntimeError, match="SIGKILL"):
        world("killed", 2, tmp_path, 180, torchrun=True)
    assert json.loads((tmp_path / "rank1.json").read_text(encoding="utf-8"))["lost"] == "in round 5"


# ---- torchrun, and the example of the documentation


def example(**names: object) -> str:
    """That of docs/devices.md, with other names and numbers in it, and in which each rank keeps its text."""
    page = DEVICES.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(# generate\.py.*?)^```$", page, flags=re.M | re.S)
    for there, here in names.items():
        assert there in code
        code = code.replace(there, str(here))
    return code + 'torch.save(output, f"rank{torch.distributed.get_rank()}.pt")\n'


def run_example(target: Path, drafter: Path, sizes: str, size: int, folder: Path, new_tokens: int = 24) -> None:
    """torchrun: each rank has the text of plain generate(), and the first one prints it."""
    names = {"Qwen/Qwen3-8B": target, "z-lab/Qwen3-8B-DFlash-b16": drafter, "tp_size=4": sizes}
    names |= {'dtype="auto"': "dtype=torch.float64", "max_new_tokens=200": f"max_new_tokens={new_tokens}"}
    (folder / "generate.py").write_text(example(**names), encoding="utf-8")
    command = [sys.executable, *TORCHRUN, str(size), "generate.py"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-4000:]
    tokenizer = AutoTokenizer.from_pretrained(target, padding_side="left")
    inputs = tokenizer(["Why is the sky blue?", "Count to ten."], return_tensors="pt", padding=True)
    whole = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64)
    expected = whole.generate(**inputs, max_new_tokens=new_tokens)
    for rank in range(size):
        assert torch.load(folder / f"rank{rank}.pt").tolist() == expected.tolist()
    assert str(tokenizer.batch_decode(expected, skip_special_tokens=True)) in done.stdout


@pytest.mark.slow
def test_torchrun_runs_the_example(tmp_path: Path):
    target = llama()
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    save(tmp_path / "drafter", raw_config(target), random_weights(target))
    run_example(tmp_path / "target", tmp_path / "drafter", "tp_size=2", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("sizes", "size"), [("fsdp_size=2", 2), ("tp_size=3", 3)])
def test_torchrun_runs_the_example_with_a_real_target(sizes: str, size: int, real_target: Path, tmp_path: Path):
    run_example(real_target, ROOT, sizes, size, tmp_path)
