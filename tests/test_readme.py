"""The README's code runs as written, and its figures are those of the result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from specformer.scripts.tables import SECTIONS, render

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", SECTIONS)
def test_figures_come_from_the_result_files(page: str):
    assert render(page) == (ROOT / page).read_text(), "run python -m specformer.scripts.tables"


@pytest.mark.real
def test_code_blocks_run(real_target, monkeypatch, capsys):
    """In order, in one namespace; the Hub's name of the target stands for the folder that it was fetched to."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 5
    namespace: dict = {}
    for block in blocks:
        exec(
            compile(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(real_target)), "README", "exec"), namespace
        )
    assert "capital of Portugal" in capsys.readouterr().out
    target, inputs, output = (namespace[name] for name in ("target", "inputs", "output"))
    assert output.tolist() == target.generate(**inputs, max_new_tokens=32).tolist()
