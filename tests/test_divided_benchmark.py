"""benchmarks/divided.py on tiny models: a drafter whole in two processes and shared, and plain generate() texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import TORCHRUN, environment
from test_callers import tiny_tokenizer
from test_copying import network_of
from tiny import llama


@pytest.mark.slow
@pytest.mark.one_version
def test_a_drafter_whole_and_shared(tmp_path: Path):
    model = llama(torch.float32)
    for name, each in (("target", model), ("assistant", llama(torch.float32, seed=4))):
        each.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    network_of(model).float().save_pretrained(tmp_path / "drafter")
    lines = [json.dumps({"prompt": text}) + "\n" for text in ("the other note", "and in the end", "is it?", "one, two")]
    (tmp_path / "prompts").write_text("".join(lines), encoding="utf-8")
    given = [word for name in ("target", "assistant", "drafter", "prompts") for word in (f"--{name}", tmp_path / name)]
    given += ["--dtype", "float32", "--repeats", "2", "--batch-size", "2", "--max-new-tokens", "12"]
    output = tmp_path / "divided.json"
    command = [sys.executable, *TORCHRUN, "2", "-m", "benchmarks.divided", *given, "--output", output]
    root = Path(__file__).parents[1]
    subprocess.run(list(map(str, command)), check=True, cwd=root, env=environment(), timeout=300)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["processes"] == 2 and list(found["summary"]) == [
        "plain generate",
        "assistant, whole",
        "assistant, shared",
        "SpecFormer, whole",
    ]
    assert all(way["identical_turns"] == 2 and way["seconds"] > 0 for way in found["summary"].values())
    whole, shared = (found["summary"][f"assistant, {how}"]["tokens_per_pass"] for how in ("whole", "shared"))
    assert whole == shared >= 1
