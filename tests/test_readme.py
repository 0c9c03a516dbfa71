"""The README's code runs as written, and its figures are those of the result files.

What a reader fills in is filled in here: a model, files of prompts, and the name of a repository, for which a tiny
model, a few prompts and a stand-in of the Hub serve.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import Hub
from specformer import SpecFormerModel
from specformer.scripts import train
from specformer.scripts.tables import SECTIONS, render
from test_callers import tiny_tokenizer
from tiny import llama

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
PROMPTS = ["the other note", "and in the end", "is it?", "one, two", "a hen on the hill", "so it is"]
REPOSITORY = "user/a-drafter"


def block(kind: str, part: str) -> str:
    """The one block of this kind in which `part` stands."""
    (found,) = [text for language, text in BLOCKS if language == kind and part in text]
    return found


def test_every_block_is_run():
    """A block that comes to the README comes to this file as well."""
    parts = ["make demo", ".scripts.train", ".scripts.reproduce", ".scripts.publish"]
    assert [text for language, text in BLOCKS if language == "bash"] == [block("bash", part) for part in parts]
    assert [language for language, _ in BLOCKS if language not in ("bash", "python")] == [""]
    assert "custom_generate -> generation" in block("", "scripts/")  # a list of files


@pytest.mark.parametrize("page", SECTIONS)
def test_figures_come_from_the_result_files(page: str):
    assert render(page) == (ROOT / page).read_text(), "run python -m specformer.scripts.tables"


@pytest.mark.real
def test_python_blocks(real_target, monkeypatch, capsys):
    """In order, in one namespace; the Hub's name of the target stands for the folder that it was fetched to."""
    monkeypatch.chdir(ROOT)
    blocks = [text for language, text in BLOCKS if language == "python" and "<user>" not in text]
    assert len(blocks) == 5
    namespace: dict = {}
    for text in blocks:
        text = text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(real_target))
        exec(compile(text, "README", "exec"), namespace)
    assert "capital of Portugal" in capsys.readouterr().out
    target, inputs, output = (namespace[name] for name in ("target", "inputs", "output"))
    assert output.tolist() == target.generate(**inputs, max_new_tokens=32).tolist()


# ---- commands


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader works: a model with its tokenizer, and prompts."""
    llama(torch.float32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("prompts", "other", "mt_bench"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What `command` prints."""
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_bash(text: str, folder: Path, **environment: str) -> str:
    text = text.replace("<your model>", "model").replace("<user>/<name>", REPOSITORY)
    assert "<" not in text, "all that a reader fills in is filled in"
    return run(["bash", "-euo", "pipefail", "-c", text], folder, **environment)


def test_make():
    """The targets are there; to make them takes minutes."""
    for line in block("bash", "make demo").splitlines():
        subprocess.run(["make", "--dry-run", *shlex.split(line, comments=True)[1:]], cwd=ROOT, check=True)


USE = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
target = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float64)
tokenizer = AutoTokenizer.from_pretrained("model")
inputs = tokenizer(["the other note", "so it is"], padding=True, return_tensors="pt", return_token_type_ids=False)
{block}
assert type(drafter).__module__.startswith("transformers_modules.")
assert not HIDDEN & sys.modules.keys()
print(json.dumps([output.tolist(), target.generate(**inputs).tolist()]))
"""


def test_from_a_model_to_a_published_drafter(folder: Path):
    """The blocks that train and publish, and the one that uses what was published, where nothing but torch and
    transformers is installed."""
    printed = run_bash(block("bash", ".scripts.train"), folder)
    figures = json.loads(printed[printed.index("{\n") :])
    assert figures["identical"] == figures["prompts"] == len(PROMPTS)
    drafter = SpecFormerModel.from_pretrained(folder / "my-drafter")
    with Hub() as hub:
        reach = dict(HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0")
        printed = run_bash(block("bash", ".scripts.publish"), folder, **reach)
        repository = hub.repositories[REPOSITORY]
        assert printed.strip() == f"{hub.url}/{REPOSITORY}/commit/{repository.branches['main']}"
        assert repository.private
        assert "training.json" in repository.files()
        assert f'from_pretrained("{REPOSITORY}"' in repository.files()["README.md"].decode()
        program = USE.replace("{block}", block("python", "<user>/<name>").replace("<user>/<name>", REPOSITORY))
        program = (ROOT / "tests" / "clean_environment.py").read_text() + program
        own = dict(HF_HOME=str(folder / "hf"), HF_MODULES_CACHE=str(folder / "modules"))
        ours, plain = json.loads(run([sys.executable, "-c", program], folder, **reach, **own).splitlines()[-1])
    assert ours == plain
    assert len(ours[0]) > 15
    assert drafter.config.target_embeddings is not None


@pytest.mark.slow
def test_reproduce(folder: Path):
    """With a tiny model in place of the default one."""
    line = block("bash", ".scripts.reproduce").strip()
    run_bash(f"{line} --target model --recipe cpu", folder)
    SpecFormerModel.from_pretrained(folder / "runs" / "default" / "drafter")
    assert "| all |" in (folder / "runs" / "default" / "drafter" / "README.md").read_text()


def test_options_of_train(monkeypatch):
    options = re.findall(r"`(--[^`]*)`", "".join(re.findall(r"^\| `--.*$", README, flags=re.M)))
    assert len(options) >= 5
    for option in options:
        monkeypatch.setattr(sys, "argv", ["train", "--data", "a", "--output", "b", *shlex.split(option)])
        train.parse()
