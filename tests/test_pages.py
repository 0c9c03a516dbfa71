"""The documentation as pages: it builds without a warning, and has every public name and every command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import pytest

import specformer
from specformer.scripts.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "*.safetensors", "build", "tests", "runs", "__pycache__")


def build(checkout: Path, output: Path) -> subprocess.CompletedProcess:
    """`make docs` of a checkout, without making the environment."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(name) is None:
            pytest.skip(f'{name} is not installed: pip install ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(output)]
    environment = dict(os.environ, NO_MKDOCS_2_WARNING="1")
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)


def sections(page: Path) -> dict[str, str]:
    """HTML of the second-level sections, by heading."""
    text = re.sub(r"<a [^>]*headerlink[^>]*>.*?</a>", "", page.read_text(encoding="utf-8"))
    parts = re.split(r"<h2[^>]*>(.*?)</h2>", text, flags=re.S)[1:]
    # a heading's first line: after it comes what else it is, such as "dataclass"
    names = [unescape(re.sub(r"<[^>]*>", "", heading)).strip().split("\n")[0] for heading in parts[::2]]
    return dict(zip(names, parts[1::2], strict=True))


@pytest.mark.slow
def test_the_pages(tmp_path: Path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not re.search("WARNING|ERROR", done.stdout + done.stderr), done.stderr
    named = sections(tmp_path / "reference" / "python.html")
    assert {f"specformer.{name}" for name in specformer.__all__} <= named.keys()
    assert {name.rpartition(".")[2] for name in named} >= {"GenerationStatistics", "UnsupportedTargetError", "Verified"}
    assert [name for name, section in named.items() if "Source code in" not in section] == []
    assert "generation/drafter_store.py" in named["specformer.AnswerStore"]
    row_round = named["specformer.RowRound"]  # a dataclass
    assert "token ids that the target" in row_round and "generation/call_rounds.py" in row_round
    assert list(sections(tmp_path / "reference" / "commands.html")) == [f"specformer {name}" for name in COMMANDS]
    pages = {page.relative_to(ROOT).with_suffix(".html").as_posix() for page in (ROOT / "docs").glob("*.md")}
    assert {page for page in pages if not (tmp_path / page).exists()} == {"docs/pypi.html"}
    assert (tmp_path / "docs" / "round.svg").exists() and (tmp_path / "benchmarks/results/acceptance.png").exists()


FAULTS = {
    "a link to a file": ("docs/drafters.md", "\n[nothing](nowhere.md)\n", "nowhere.md"),
    "a link to a heading": ("docs/drafters.md", "\n[nothing](lossless.md#nowhere)\n", "nowhere"),
    "a page without a place": ("docs/another.md", "# Another\n", "another.md"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_build_finds_faults(fault: str, tmp_path: Path):
    name, text, said = FAULTS[fault]
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=LEFT_OUT)
    with open(tmp_path / "checkout" / name, "a", encoding="utf-8") as file:
        file.write(text)
    done = build(tmp_path / "checkout", tmp_path / "site")
    assert done.returncode != 0 and said in done.stderr
