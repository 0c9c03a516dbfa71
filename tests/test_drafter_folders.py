"""The drafters in drafters/: repositories of their own, whose code is this checkout's, and small enough for git."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_hub import REPOSITORY, ROOT

from specformer import SpecFormerModel
from specformer.publishing_specformer import files_to_send

FOLDERS = sorted(path for path in (ROOT / "drafters").iterdir() if path.is_dir())
MOST_BYTES = 40_000_000
USE = """
import torch
from transformers import AutoModel
drafter = AutoModel.from_pretrained({folder!r}, trust_remote_code=True)
assert type(drafter).__module__.startswith("transformers_modules"), type(drafter)
print(drafter.config.target_name_or_path)
"""


def test_there_are_some():
    assert FOLDERS


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def test_their_code_is_that_of_the_checkout(folder: Path):
    places = {file.name: ROOT / file.name for file in ROOT.glob("*_specformer.py")}
    places["custom_generate"] = ROOT / "generation"
    links = {path.name: path for path in folder.iterdir() if path.is_symlink()}
    assert {name: link.resolve() for name, link in links.items()} == places
    assert not any(os.path.isabs(os.readlink(link)) for link in links.values())


def test_all_of_it_would_be_published(folder: Path):
    assert set(files_to_send(folder)) == REPOSITORY | {"training.json"}


def test_it_is_small_and_says_where_it_comes_from(folder: Path):
    assert (folder / "model.safetensors").stat().st_size <= MOST_BYTES
    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{log['answer_tokens']:,}" in card
    assert log["settings"]["target"] in card and "/" in log["settings"]["target"]  # an id, no folder
    assert "license: " in card


def test_it_loads_and_drafts(folder: Path):
    drafter = SpecFormerModel.from_pretrained(folder, dtype=torch.float32)
    config = drafter.config
    states = torch.randn(1, 6, len(config.target_layer_ids), config.hidden_size)
    anchors = torch.randn(1, 6, config.hidden_size) if config.reads_anchor_token else None
    with torch.no_grad():
        slots = drafter(states, anchors).draft_hidden_states
    assert slots.shape == (1, 6, config.num_draft_tokens, config.hidden_size)
    assert slots.isfinite().all()


def test_it_loads_without_this_package(folder: Path, tmp_path: Path):
    program = (ROOT / "tests" / "clean_environment.py").read_text(encoding="utf-8") + USE.format(folder=str(folder))
    environment = dict(os.environ, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = json.loads((folder / "config.json").read_text(encoding="utf-8"))["target_name_or_path"]
    assert done.stdout.split()[-1] == expected
