"""The notebook runs from top to bottom, with a tiny target and drafter in place of the real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from test_callers import tiny_tokenizer
from tiny import llama

from specformer import SpecFormerConfig, SpecFormerModel

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "specformer.ipynb"


def cells(kind: str) -> list[dict]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_it_is_kept_without_outputs():
    assert len(cells("code")) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
    assert NOTEBOOK.stat().st_size < 20_000


def test_it_is_for_colab():
    text = "".join("".join(cell["source"]) for cell in cells("code"))
    assert "%pip install" in text and 'TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"' in text


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    target = llama(torch.float32, max_position_embeddings=512)
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    torch.manual_seed(0)
    config = SpecFormerConfig.from_target_config(target.config, initializer_range=0.3)
    SpecFormerModel(config).save_pretrained(tmp_path / "drafter")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "target"))
        cell.source = cell.source.replace("specformer.__path__[0]", repr(str(tmp_path / "drafter")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT.parent)]))
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert printed.count("identical") == 3 and "times plain generate" in printed and "1, row 0" in printed
    assert (tmp_path / "my-drafter" / "model.safetensors").exists()
