"""A real vLLM, which drafts with an exported drafter what is drafted here. It takes an environment of its own."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from benchmarks import serve_vllm

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("SPECFORMER_VLLM", ROOT / ".venv-vllm"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (VENV / serve_vllm.READY).exists(),
    reason="no environment with vLLM: python -m benchmarks.serve_vllm makes one, SPECFORMER_VLLM names its folder",
)
def test_vllm_drafts_the_same_and_writes_the_same(tmp_path: Path):
    asked = dict(venv=VENV, output=tmp_path / "result.json", drafter=None, target=None, max_new_tokens=40)
    assert serve_vllm.main(argparse.Namespace(**asked)) == 0
    drafters = json.loads(asked["output"].read_text(encoding="utf-8"))["drafters"]
    assert len(drafters) == 8
    for figures in drafters.values():
        assert figures["texts_are_those_without_drafter"] and figures["texts_are_those_of_specformer"]
        assert figures["vllm_num_drafts"] == figures["specformer_num_drafts"]
        assert figures["vllm_accepted_per_slot"] == figures["specformer_accepted_per_slot"]
        assert 0 < figures["vllm_accepted_per_slot"][0] < figures["vllm_num_drafts"]  # they could differ


def test_an_environment_is_made_nowhere_else(tmp_path: Path):
    (tmp_path / "mine").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError, match="exists and is no environment"):
        serve_vllm.vllm_python(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
