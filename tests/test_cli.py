"""The command line: what it shows, and that each command is its module."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_callers import tiny_tokenizer
from tiny import llama
from typer.testing import CliRunner, Result

from specformer import SpecFormerModel
from specformer.scripts.cli import COMMANDS, app

ROOT = Path(__file__).resolve().parents[1]
GIVEN = {
    "demo": ["--output", "demo.json"],
    "space": ["--target", "a", "--port", "7861", "--dtype", "bfloat16"],
    "generate": [
        "--prompts",
        "p.jsonl",
        "--output",
        "answers",
        "--num-assistant-tokens",
        "auto",
        "--measure-plain",
        "9",
    ],
    "fetch": ["--folder", "here", "--source", "hub"],
    "distill": ["--prompts", "p.jsonl", "--output", "answers", "--max-new-tokens", "9"],
    "train": ["--data", "answers", "--output", "drafter", "--base-loss", "-0.1", "--config", "a=1", "b=true"],
    "store": ["--data", "answers", "--output", "table", "--trigrams", "--add", "--max-tokens", "99"],
    "reproduce": ["--prompts", "p.jsonl", "--output", "run", "--evaluate", "a.jsonl", "b.jsonl"],
    "evaluate": ["--prompts", "p.jsonl", "--prompt-lookup", "4", "--chat-template-kwargs", '{"a": "b c"}'],
    "bench": ["--prompts", "p.jsonl", "--batch-sizes", "1", "2", "--contenders", "default, ", "always right, k"],
    "export-card": ["drafter", "one.json", "two.json", "--license", "mit"],
    "export": ["drafter", "--target", "model", "--format", "gguf-ready", "--output", "served"],
    "publish": ["drafter", "user/name", "--private", "--message", "Figures on an H200"],
}


def called(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def values_of(arguments) -> dict:
    return {name: value for name, value in vars(arguments).items() if name != "distributed_state"}


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    """`python -m specformer`, in a process that begins with the code `before`."""
    code = f"import runpy, sys\n{before}\nrunpy.run_module('specformer', run_name='__main__', alter_sys=True)"
    how = ["-c", code] if before else ["-m", "specformer"]
    environment = dict(os.environ, COLUMNS="120")
    return subprocess.run([sys.executable, *how, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.one_version
def test_help_names_every_command():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout).split())
    for name, (_, panel, text) in COMMANDS.items():
        assert f" {name} {text} " in f"{shown} ", shown
        assert panel in shown
    assert "specformer train --target MODEL --data answers --output drafter" in shown
    assert called().output.count("publish") >= 2  # without a command, the same


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str):
    """What its own parser says: what it is for, an example, and every option that is used here."""
    done = called(name, "--help")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"usage: specformer {name} ")
    docstring = import_module(f"specformer.scripts.{COMMANDS[name].module}").__doc__
    assert docstring.strip() in done.stdout
    assert name == "export-card" or f"    specformer {name}" in docstring
    for option in (value for value in GIVEN[name] if value.startswith("--")):
        assert option in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_its_module(name: str, monkeypatch):
    """It is given the same arguments, and ends with the status of the module."""
    module, calls = import_module(f"specformer.scripts.{COMMANDS[name].module}"), []
    monkeypatch.setattr(module, "main", lambda arguments: calls.append((arguments, sys.argv[1:])) or len(calls) - 1)
    monkeypatch.setattr(sys, "argv", [name, *GIVEN[name]])
    expected = values_of(module.parse())
    assert called(name, *GIVEN[name]).exit_code == 0
    assert called(name, *GIVEN[name]).exit_code == 1
    for arguments, noted in calls:  # noted in results as they were given
        assert values_of(arguments) == expected
        assert noted == GIVEN[name]


def test_what_is_no_command_or_option():
    done = called("trian")
    assert done.exit_code == 2
    assert "No such command 'trian'. Did you mean 'train'?" in done.stderr
    done = called("publish", "drafter", "user/name", "--pirvate")
    assert done.exit_code == 2
    assert "specformer publish: error: unrecognized arguments: --pirvate" in done.stderr


@pytest.mark.one_version
@pytest.mark.parametrize(("missing", "arguments"), [("typer", ["--help"]), ("accelerate", ["train", "--help"])])
def test_without_the_extra(missing: str, arguments: list[str]):
    """A sentence says what to install."""
    done = run(*arguments, before=f"sys.modules[{missing!r}] = None")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "pip install" in line and "kernels" not in line]
    assert line == f'This command needs {missing}, which is not installed: pip install "specformer[scripts]"'
    assert "Traceback" not in done.stderr


@pytest.mark.one_version
def test_what_the_package_itself_lacks_is_a_fault():
    done = run("publish", "--help", before="sys.modules['specformer.publishing_specformer'] = None")
    assert "Traceback" in done.stderr and "pip install" not in done.stderr.splitlines()[-1]


@pytest.mark.one_version
def test_the_script_that_is_installed():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    (line,) = config["options.entry_points"]["console_scripts"].strip().splitlines()
    assert line == "specformer = specformer.__main__:main"
    assert callable(import_module("specformer.__main__").main)


def test_from_prompts_to_a_drafter_that_is_evaluated(tmp_path: Path):
    target, prompts, answers, drafter = (tmp_path / name for name in ("target", "prompts.jsonl", "answers", "drafter"))
    llama(torch.float32).save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    texts = ["the other note", "and in the end", "is it?", "one, two"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    asked = ("--prompts", prompts, "--target", target, "--max-new-tokens", 8)
    assert called("distill", *asked, "--output", answers).exit_code == 0
    options = ("--num-draft-tokens", 3, "--epochs", 1, "--evaluations", 1)
    assert called("train", "--data", answers, "--target", target, "--output", drafter, *options).exit_code == 0
    assert SpecFormerModel.from_pretrained(drafter).config.num_draft_tokens == 3
    result = tmp_path / "result.json"
    assert called("evaluate", *asked, "--drafter", drafter, "--output", result).exit_code == 0
    assert json.loads(result.read_text(encoding="utf-8"))["identical"] == len(texts)
