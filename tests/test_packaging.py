"""What is declared and what is imported, the wheel in an environment of its own, and the commands around the tests."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import canary
import pytest
import torch
from canary import FILES, TESTS, differences, normal, pinned
from clean_environment import required_by
from packaging.requirements import Requirement
from packaging.version import Version
from test_callers import tiny_tokenizer
from tiny import llama, ragged_batch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from specformer import SpecFormerConfig, SpecFormerModel, registration
from specformer.generation.backend_versions import NEWEST_TESTED
from specformer.scripts import tables

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
SCRIPT_FOLDERS = sorted({file.parent for file in (ROOT / "scripts").rglob("*.py")})
INDIRECT = {
    "gguf": "transformers reads the default target with it, as PyPI has it",
    "mypy": "a command",
    "ruff": "a command",
    "pytest-xdist": "an option of pytest",
    "mkdocs-material": "a theme of mkdocs",
    "mkdocstrings": "a plugin of mkdocs",
}


def declared(section: str, key: str) -> dict[str, Requirement]:
    requirements = map(Requirement, CONFIG[section][key].strip().splitlines())
    return {normal(requirement.name): requirement for requirement in requirements}


CORE = declared("options", "install_requires")
SCRIPTS, TEST, PAGE, DOCS, TEST_PAGES = (
    declared("options.extras_require", extra) for extra in ("scripts", "test", "space", "docs", "test-pages")
)
TEST_PAGES |= declared("options.extras_require", "test-browser")
SPACE = ROOT / "spaces" / "specformer"


# ---- what is declared


def imported(*folders: Path) -> set[str]:
    """The distributions that the files of `folders` import, by their normal names."""
    names = set()
    for file in (file for folder in folders for file in folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    own = {file.stem for folder in (ROOT / "tests", SPACE) for file in folder.glob("*.py")}
    own |= {"specformer", "benchmarks"}
    distributions = packages_distributions()  # yaml is of pyyaml
    return {normal(distributions.get(name, [name])[0]) for name in names - own - set(sys.stdlib_module_names)}


def test_what_is_imported_is_declared():
    """The package and its strategy, then the commands, then the tests: each of them declares what those before it do
    not, and nothing that it does not need."""
    core = imported(ROOT, ROOT / "generation")
    assert core == CORE.keys()
    assert imported(*SCRIPT_FOLDERS) - CORE.keys() == SCRIPTS.keys() - INDIRECT.keys()
    assert imported(SPACE) - CORE.keys() == PAGE.keys()
    tests = imported(ROOT / "tests", ROOT / "benchmarks") - CORE.keys() - SCRIPTS.keys()
    texts = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("*.py"))
    skipped_without = {normal(name) for name in re.findall(r'importorskip\("(\w+)', texts)}
    assert tests - skipped_without <= TEST.keys() <= tests | skipped_without | INDIRECT.keys()
    assert {"accelerate", "evaluate"} <= SCRIPTS.keys()
    assert TEST_PAGES.keys() <= skipped_without and DOCS.keys() <= skipped_without | INDIRECT.keys()


def test_every_version_is_pinned():
    """All that is installed here of what the package and its tools need, and each of them by "==" alone."""
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pins = pinned()
    assert len(pins) == len(lines)
    missing = required_by(*CORE, *SCRIPTS, *TEST) - pins.keys()
    assert not missing, "constraints.txt has no version of these"
    tools = CORE | SCRIPTS | TEST
    assert all(requirement.specifier.contains(pins[name]) for name, requirement in tools.items())


def test_the_versions_that_are_tested_are_named_alike():
    oldest = str(CORE["transformers"].specifier).removeprefix(">=")
    assert pinned()["transformers"] == NEWEST_TESTED
    assert f"transformers=={oldest}.0/" in (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = (ROOT / "custom_generate" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert f"transformers>={oldest}" in wanted
    # transformers reads one comparison a line, and ignores what follows it without a word
    assert all(re.fullmatch(r"transformers(>=|!=)[0-9]+(\.[0-9]+)+", line) for line in wanted)


# ---- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of this checkout, without what git ignores."""
    folder = tmp_path_factory.mktemp("wheel")
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", ".", "./source"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_what_is_in_the_wheel(wheel: Path):
    """The package, its commands, and the default drafter as a complete repository; no tests."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    assert {name.split("/")[0] for name in names} == {
        "specformer",
        wheel.name[: -len("-py3-none-any.whl")] + ".dist-info",
    }
    folders = ROOT, ROOT / "generation", ROOT / "custom_generate", *SCRIPT_FOLDERS
    code = {file.relative_to(ROOT).as_posix() for folder in folders for file in folder.glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {f"specformer/{name}" for name in code}
    data = {name for name in names if name.startswith("specformer/") and not name.endswith(".py")}
    requirements = {f"specformer/{folder}/requirements.txt" for folder in ("generation", "custom_generate")}
    recipes = {f"specformer/recipes/{file.name}" for file in (ROOT / "recipes").iterdir()}
    assert data == {"specformer/config.json", "specformer/model.safetensors", *requirements, *recipes}
    description = metadata.partition("\n\n")[2]
    assert description.startswith("# SpecFormer\n")


INSTALLED = (
    (ROOT / "tests" / "clean_environment.py").read_text(encoding="utf-8")
    + """
import json, re
site, target_folder, drafter_folder, page, rows = json.loads(sys.argv[1])
sys.path.insert(0, site)
HIDDEN.remove("specformer")
import specformer
assert specformer.__file__.startswith(site), specformer.__file__
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float64)
assert type(target).__module__.startswith("transformers."), "a model of transformers' own"
batch = dict({name: torch.tensor(ids) for name, ids in rows.items()}, max_new_tokens=12)
expected = target.generate(**batch).tolist()
assert specformer.generate(target, prompt_lookup_num_tokens=3, **batch).tolist() == expected

# no remote code is needed, and none is run
specformer.SpecFormerModel(specformer.SpecFormerConfig.from_target_config(target.config)).save_pretrained(drafter_folder)
assert type(AutoConfig.from_pretrained(drafter_folder)) is specformer.SpecFormerConfig
drafter = AutoModel.from_pretrained(drafter_folder)
assert type(drafter) is specformer.SpecFormerModel
output = specformer.generate(target, drafter, **batch, return_dict_in_generate=True)
assert output.sequences.tolist() == expected
assert output.statistics.rounds > 0
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]

# the default drafter, and the folder of the package as a repository
default = AutoModel.from_pretrained(specformer.__path__[0])
assert type(default) is specformer.SpecFormerModel and default.config.target_name_or_path
repository = dict(custom_generate=specformer.__path__[0], trust_remote_code=True)
assert target.generate(**batch, assistant_model=drafter, **repository).tolist() == expected
assert [name for name in sys.modules if name.endswith("custom_generate.generate")]
assert not HIDDEN & sys.modules.keys(), HIDDEN & sys.modules.keys()

# what the package index shows, with the models of this test
code = re.search("```python\\n(.*?)```", page, flags=re.S)[1]
code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", target_folder)
names = {}
exec(code.replace("specformer.__path__[0]", repr(drafter_folder)), names)
assert names["output"].tolist() == names["target"].generate(**names["inputs"], max_new_tokens=32).tolist()
print("done")
"""
)


def run(program: str, *given, home: Path, **environment: str) -> str:
    """What `program` prints, in a process that has nothing of this one's environment."""
    environment = dict(PATH="/usr/bin:/bin", HOME=str(home), HF_HOME=str(home / "hf"), HF_HUB_OFFLINE="1") | environment
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(given)],
        env=dict(environment, HF_MODULES_CACHE=str(home / "modules"), OMP_NUM_THREADS="1"),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_works_with_nothing_else(wheel: Path, tmp_path: Path):
    """Beside torch, transformers and what they require, which is all that the package declares."""
    assert CORE.keys() <= required_by("torch", "transformers")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    llama(torch.float64).save_pretrained(tmp_path / "target")
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "target")
    rows = {name: ids.tolist() for name, ids in ragged_batch().items()}
    page = (ROOT / "docs" / "pypi.md").read_text(encoding="utf-8")
    folders = [str(tmp_path / name) for name in ("site", "target", "drafter")]
    assert run(INSTALLED, *folders, page, rows, home=tmp_path).splitlines()[-1] == "done"


def test_what_needs_a_checkout_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "benchmarks")
    with pytest.raises(SystemExit, match="checkout of SpecFormer"):
        tables.main()


# ---- what the auto classes know


@pytest.fixture
def drafter_folder(tmp_path: Path) -> Path:
    SpecFormerModel(SpecFormerConfig.from_target_config(llama().config)).save_pretrained(tmp_path / "drafter")
    return tmp_path / "drafter"


def kinds(folder: Path, **trust) -> list[str]:
    """The modules of config and network as the auto classes load them, as far as they are not of one repository."""
    loaded = AutoConfig.from_pretrained(folder, **trust), AutoModel.from_pretrained(folder, **trust)
    return [type(each).__module__.partition(".")[0] for each in (*loaded, loaded[1].config)]


@pytest.mark.parametrize("times", [0, 1, 2])
def test_auto_classes_need_no_trust_and_keep_to_it(times: int, drafter_folder: Path):
    for _ in range(times):
        registration.register()
    assert kinds(drafter_folder) == ["specformer"] * 3
    assert kinds(drafter_folder, trust_remote_code=False) == ["specformer"] * 3
    assert kinds(drafter_folder, trust_remote_code=True) == ["transformers_modules"] * 3
    assert kinds(drafter_folder) == ["specformer"] * 3
    config = AutoConfig.for_model("specformer", num_draft_tokens=5)
    assert type(config) is SpecFormerConfig and config.num_draft_tokens == 5
    assert type(AutoModel.from_config(SpecFormerConfig.from_target_config(llama().config))) is SpecFormerModel


def test_other_models_load_as_before(tmp_path: Path):
    llama().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(llama().config)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(llama())
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "llama"


def test_two_installs(drafter_folder: Path, tmp_path: Path):
    """Another copy of the package in the same process, as after a reinstall in a notebook: the last one counts."""
    shutil.copytree(
        ROOT, tmp_path / "other" / "specformer", ignore=shutil.ignore_patterns(".*", "*.safetensors", "tests")
    )
    program = """
import importlib, json, sys
folder, other = json.loads(sys.argv[1])
import specformer
first = specformer.SpecFormerModel
importlib.reload(specformer)
assert specformer.SpecFormerModel is first
for name in [name for name in sys.modules if name.partition(".")[0] == "specformer"]:
    del sys.modules[name]
sys.path.insert(0, other)
import specformer
from transformers import AutoModel
assert specformer.__file__.startswith(other) and specformer.SpecFormerModel is not first
assert type(AutoModel.from_pretrained(folder)) is specformer.SpecFormerModel
"""
    run(program, str(drafter_folder), str(tmp_path / "other"), home=tmp_path)


def test_only_the_package_registers(drafter_folder: Path, tmp_path: Path):
    """Not the file where a folder has another name, and not remote code."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(ROOT / "__init__.py", tmp_path / "elsewhere")
    program = """
import json, sys
(folder,) = json.loads(sys.argv[1])
sys.path.insert(0, ".")
import elsewhere
assert not {"specformer", "torch", "transformers"} & sys.modules.keys()
from transformers import AutoConfig, AutoModel, dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # otherwise it asks the terminal
for trust in ({}, dict(trust_remote_code=False)):
    try:
        AutoModel.from_pretrained(folder, **trust)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("loaded without trust")
AutoModel.from_pretrained(folder, trust_remote_code=True)
assert "specformer" not in CONFIG_MAPPING and "specformer" not in sys.modules
"""
    run(program, str(drafter_folder), home=tmp_path)


# ---- commands


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.one_version
def test_gpu_tests_fail_without_a_gpu():
    done = make("test-gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "has no torch that finds a CUDA GPU. Nothing was tested." in done.stderr
    assert "passed" not in done.stdout and "skipped" not in done.stdout


@pytest.mark.one_version
def test_canary_tells_what_is_newer():
    pins = {"torch": "2.13.0", "a-b": "1.0"}
    assert differences({"torch": "2.13.0+cpu", "a-b": "1.0"}, pins) == []
    assert differences({"torch": "2.14.0+cpu", "a-b": "1.1", "c": "2"}, pins) == [
        "a-b 1.1 (pinned: 1.0)",
        "c 2 (not pinned)",
        "torch 2.14.0+cpu (pinned: 2.13.0)",
    ]
    assert Version(pinned()["transformers"]) >= Version("5.24")


@pytest.mark.one_version
def test_canary_runs_what_depends_on_others(monkeypatch):
    """Files that are there, and that the oldest versions are tried with as well; and all of them if asked."""
    for name in FILES:
        assert "\npytestmark = pytest.mark.one_version\n" not in (TESTS / name).read_text(encoding="utf-8"), name
    commands = []
    monkeypatch.setattr(canary, "differences", lambda *_: ["torch 99"])
    monkeypatch.setattr(
        subprocess, "run", lambda command: commands.append(command[1:]) or SimpleNamespace(returncode=3)
    )
    assert canary.main(["-m", "pytest"]) == canary.main(["--all", "-m", "pytest"]) == 3
    assert commands == [["-m", "pytest", *(str(TESTS / name) for name in FILES)], ["-m", "pytest"]]


@pytest.mark.one_version
def test_versions_of_the_pages_are_pinned():
    lines = (ROOT / "constraints-pages.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pins = pinned() | {normal(name): version for name, version in (line.split("==") for line in lines)}
    assert not {*PAGE, *DOCS, *TEST_PAGES} - pins.keys()
    assert not {normal(line.split("==")[0]) for line in lines} & pinned().keys()


@pytest.mark.one_version
@pytest.mark.parametrize(
    "failing, status, closing",
    [
        ("", 0, "made canary"),
        ("canary", 0, "canary: FAILED"),
        ("test-browser", 2, "made test-oldest"),
        ("test-oldest", 2, "made test"),
        ("test", 2, ""),
    ],
)
def test_ci_reports_the_canary_and_is_not_blocked_by_it(failing: str, status: int, closing: str, tmp_path: Path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    fake = tmp_path / "bin" / "make"
    fake.write_text(f'#!/bin/sh\n[ "$1" != "{failing}" ] || exit 2\necho "made $1"\n', encoding="utf-8")
    fake.chmod(0o755)
    environment = dict(os.environ, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == status
    assert (done.stdout.splitlines() or [""])[-1].startswith(closing)
