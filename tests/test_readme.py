"""Code on the pages runs as written, their figures are those of the result files, and their links lead somewhere.

What a reader fills in is filled in here: a model, files of prompts, and the name of a repository, for which a tiny
model, a few prompts and a stand-in of the Hub serve.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hub import Hub
from test_callers import tiny_tokenizer
from test_cli import called
from tiny import llama

from specformer import SpecFormerModel
from specformer.generation import drafter as contract
from specformer.scripts import speed_tables, tables, train
from specformer.scripts.tables import SECTIONS, render

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
MADE_BY_TESTS = ("docs/arguments.md", "docs/compatibility.md", "docs/pypi.md")
"""Pages with a test of their own."""
PROMPTS = ["the other note", "and in the end", "is it?", "one, two", "a hen on the hill", "so it is"]
REPOSITORY = "user/a-drafter"


def blocks(page: str, kind: str) -> list[str]:
    """The code blocks of one kind, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.M | re.S)
    return [text for language, text in found if language == kind]


def block(page: str, kind: str, part: str) -> str:
    """The one block in which `part` stands."""
    (found,) = [text for text in blocks(page, kind) if part in text]
    return found


def commands(page: str, part: str) -> list[str]:
    """The lines of the one bash block in which `part` stands."""
    return block(page, "bash", part).splitlines()


MAKE = commands("README.md", "make demo")
TRAIN = commands("README.md", "specformer train")
REPRODUCE = commands("docs/training.md", "specformer reproduce")


@pytest.mark.one_version
def test_every_block_is_run():
    """A block that comes to a page comes to this file as well."""
    lines = [line for page in PAGES for text in blocks(page, "bash") for line in text.splitlines()]
    assert set(lines) == {*MAKE, *TRAIN, *REPRODUCE}
    languages = {language for text in PAGES.values() for language in re.findall(r"^```(\w+)$", text, flags=re.M)}
    assert languages == {"bash", "python", "bibtex", "mermaid"}


@pytest.mark.one_version
@pytest.mark.parametrize("page", SECTIONS)
def test_figures_come_from_the_result_files(page: str):
    assert render(page) == PAGES[page], "run python -m specformer.scripts.tables"


@pytest.mark.one_version
def test_one_number_a_cell():
    """In what is generated, so that a table is read at a glance; "12 of 15" and "42 to 402" are one."""
    for page in SECTIONS:
        for text in re.findall(r"^<!-- [^/].*?<!-- /", PAGES[page], flags=re.M | re.S):
            cells = [cell.strip() for line in re.findall(r"^\|.*\|$", text, flags=re.M) for cell in line.split("|")]
            for cell in cells:
                assert not re.search(r"\d.*(/|;|\().*\d|%.*%", cell), f"{page}: {cell}"


@pytest.mark.one_version
def test_half_precision(tmp_path: Path, monkeypatch):
    """A table where it was measured, nothing where it was not."""
    for module in (tables, speed_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert tables.half_precision_section() == ""
    regime = dict(target="a model", decoding="greedy", prompts=80, batch_size=8, max_new_tokens=96)
    made = dict(date="2026-11-29", versions=dict(torch="2.13", transformers="5.24"))
    made["machine"] = dict(device="CPU", cpu="x", torch_threads=2)
    equal = {
        "bfloat16": {"every row alone": 41, "SpecFormer": 43},
        "float32": {"every row alone": 80, "SpecFormer": 80},
    }
    (tmp_path / "half_precision.json").write_text(json.dumps(dict(made, regime=regime, equal=equal)))
    section = tables.half_precision_section()
    assert "| bfloat16 | float32 |" in section and "| SpecFormer | 43 | 80 |" in section
    assert "Identical texts of 80: a model, greedy, 96 new tokens, batches of 8; 2 threads of CPU (x)" in section


@pytest.mark.one_version
def test_the_readme_is_short():
    text = re.sub(r"\A---\n.*?\n---\n", "", PAGES["README.md"], flags=re.S)
    assert len(re.sub(r"^\|.*$", "", text, flags=re.M).split()) <= 1250


# ---- links


def anchors(page: Path) -> set[str]:
    """What GitHub and the Hub make of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.one_version
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.one_version
@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str):
    for name in re.findall(r"`((?:generation|scripts|tests|docs|benchmarks|recipes)/[\w./*]+)`", PAGES[page]):
        assert list(ROOT.glob(name)), f"{page}: {name}"
    for name in re.findall(r"(?:python|accelerate launch) -m ((?:specformer|benchmarks)(?:\.\w+)*)", PAGES[page]):
        assert find_spec(name), f"{page}: {name}"


@cache
def help_of(command: str) -> str:
    """What `specformer <command> --help` prints."""
    return called(command, "--help").stdout


@pytest.mark.one_version
@pytest.mark.parametrize("page", [page for page in PAGES if page not in MADE_BY_TESTS])
def test_commands_and_their_options_exist(page: str):
    shown = re.findall(r"^specformer [^\n]*$|`specformer [^`]*`", PAGES[page], flags=re.M)
    for line in shown:
        command, *options = re.findall(r"(?<=specformer )[\w-]+|--[\w-]+", line)
        assert all(option in help_of(command) for option in options), f"{page}: {line}"


# ---- Python


def python_blocks(page: str) -> list[str]:
    """Those that need no repository on the Hub, one process, and not TRL, with which test_rollouts.py runs them."""
    found = [text for text in blocks(page, "python") if "<user>" not in text.replace('"."  # or <user>/<name>', "")]
    return [text for text in found if "from trl" not in text and "torchrun" not in text]


PYTHON = {page: python_blocks(page) for page in PAGES if page not in MADE_BY_TESTS and python_blocks(page)}


def own_names(text: str) -> str:
    """What a block defines for those behind it, without the texts that it makes and what it shows of them."""
    made = ("output", "result")
    statements = [
        each
        for each in ast.parse(text).body
        if not isinstance(each, ast.Expr)
        and not (isinstance(each, ast.Assign) and getattr(each.targets[0], "id", None) in made)
    ]
    return ast.unparse(ast.Module(statements, []))


@pytest.fixture(scope="module")
def reader(real_target) -> dict:
    """What the blocks of the README define, and what plain generate() writes for its inputs."""
    namespace: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for text in PYTHON["README.md"]:
            exec(own_names(with_target(text, real_target)), namespace)
    return namespace | {"plain": namespace["target"].generate(**namespace["inputs"], max_new_tokens=32).tolist()}


def with_target(text: str, folder: Path) -> str:
    """The Hub's name of the target stands for the folder that it was fetched to."""
    return text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder))


@pytest.mark.real
@pytest.mark.parametrize(("page", "number"), [(page, at) for page in PYTHON for at in range(len(PYTHON[page]))])
def test_python_blocks(page: str, number: int, reader, real_target, tmp_path, monkeypatch, capsys):
    """Each goes on from those before it on its page, and pages under docs/ from the README. Every text that is made is
    that of plain generate()."""
    monkeypatch.chdir(ROOT)
    names = {} if page == "README.md" and not number else dict(reader)
    *before, text = (
        with_target(text, real_target).replace('AnswerStore("store"', f"AnswerStore({str(tmp_path / 'store')!r}")
        for text in PYTHON[page][: number + 1]
    )
    for each in before:
        exec(own_names(each), names)
    exec(compile(text, page, "exec"), names)
    if "output" in names:
        assert names["output"].tolist() == reader["plain"], text
    if page == "README.md" and not number:
        assert "capital of Portugal" in capsys.readouterr().out


@pytest.mark.one_version
def test_every_page_with_python_is_run():
    assert {page: len(texts) for page, texts in PYTHON.items()} == {
        "README.md": 4,
        "docs/drafters.md": 12,
        "docs/how_it_works.md": 1,
        "docs/training.md": 2,
    }


@pytest.mark.one_version
def test_own_drafter_is_that_of_the_contract():
    shown = contract.__doc__.partition("    class ")[2].partition("    specformer.generate(")[0]
    assert textwrap.dedent("    class " + shown).strip() in block("README.md", "python", "class ")


# ---- commands


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader works: a model with its tokenizer, and prompts."""
    llama(torch.float32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("prompts", "other", "mt_bench"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (tmp_path / "bin").mkdir()
    specformer = tmp_path / "bin" / "specformer"  # of this checkout, whatever is installed
    specformer.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m specformer "$@"\n')
    specformer.chmod(0o755)
    return tmp_path


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What `command` prints."""
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_bash(lines: list[str], folder: Path, **environment: str) -> str:
    text = "\n".join(lines).replace("<your model>", "model").replace("<user>/<name>", REPOSITORY)
    assert "<" not in text, "all that a reader fills in is filled in"
    return run(["bash", "-euo", "pipefail", "-c", text], folder, **environment)


@pytest.mark.one_version
def test_make():
    """The targets are there; to make them takes minutes."""
    for line in MAKE:
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


@pytest.mark.one_version
def test_from_a_model_to_a_published_drafter(folder: Path):
    """The commands that train and publish, and the code that uses what was published, where nothing but torch and
    transformers is installed."""
    *make, publish = TRAIN
    printed = run_bash(make, folder)
    figures = json.loads(printed[printed.index("{\n") :])
    assert figures["identical"] == figures["prompts"] == len(PROMPTS)
    drafter = SpecFormerModel.from_pretrained(folder / "my-drafter")
    with Hub() as hub:
        reach = dict(HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0")
        printed = run_bash([publish], folder, **reach)
        repository = hub.repositories[REPOSITORY]
        assert printed.strip() == f"{hub.url}/{REPOSITORY}/commit/{repository.branches['main']}"
        assert repository.private
        assert "training.json" in repository.files()
        assert f'from_pretrained("{REPOSITORY}"' in repository.files()["README.md"].decode()
        code = block("docs/publishing.md", "python", "<user>/<name>").replace("<user>/<name>", REPOSITORY)
        program = (ROOT / "tests" / "clean_environment.py").read_text() + USE.replace("{block}", code)
        own = dict(HF_HOME=str(folder / "hf"), HF_MODULES_CACHE=str(folder / "modules"))
        ours, plain = json.loads(run([sys.executable, "-c", program], folder, **reach, **own).splitlines()[-1])
    assert ours == plain
    assert len(ours[0]) > 15
    assert drafter.config.target_embeddings is not None


@pytest.mark.slow
def test_reproduce(folder: Path):
    """With a tiny model in place of the default one."""
    (line,) = REPRODUCE
    run_bash([f"{line} --target model --recipe default"], folder)
    SpecFormerModel.from_pretrained(folder / "runs" / "default" / "drafter")
    assert "| all |" in (folder / "runs" / "default" / "drafter" / "README.md").read_text()


def test_options_of_train(monkeypatch):
    """With the values that the page gives them."""
    options = re.findall(r"^\| `(--[^`]*)`", PAGES["docs/training.md"], flags=re.M)
    assert len(options) >= 5
    for option in options:
        monkeypatch.setattr(sys, "argv", ["train", "--data", "a", "--output", "b", *shlex.split(option)])
        train.parse()
