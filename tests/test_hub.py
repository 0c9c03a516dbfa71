"""A drafter's life on the Hub: save, push, load by id, pin, go offline, save again. Against a stand-in on the loopback.

What a stranger does with the repository happens in a process of its own, where nothing but torch, transformers and what
they require can be imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hub import File, Hub
from huggingface_hub import constants
from safetensors.torch import load
from tiny import llama, ragged_batch
from transformers import AutoModel

from specformer import SpecFormerConfig, SpecFormerModel
from specformer.publishing_specformer import files_to_send, modules_of, push_folder
from specformer.scripts import publish

ROOT = Path(__file__).resolve().parents[1]
ID = "user/tiny-drafter"
PARTS = ("configuration", "context", "layers", "loading", "modeling", "publishing", "target")
CODE = {f"{part}_specformer.py" for part in PARTS}
CODE |= {f"custom_generate/{file.name}" for file in modules_of(ROOT / "generation")}
REQUIREMENTS = "custom_generate/requirements.txt"
CODE.add(REQUIREMENTS)
REPOSITORY = {"config.json", "model.safetensors", "README.md", *CODE}
SECRETS = ["secrets.txt", ".env", "optimizer.pt", "training_args.bin", "setup.py", "model.safetensors.bak"]
SECRETS += ["requirements.txt", "custom_generate/notes.txt"]
SECRETS += ["__pycache__/modeling_specformer.cpython-311.pyc", "custom_generate/notes/mine.py", "data/config.json"]
BY_HAND = "# My own card\n"


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch):
    """huggingface_hub waits for seconds between its attempts."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@contextmanager
def at_the_hub() -> Iterator[Hub]:
    """This process talks to a stand-in, as its owner. huggingface_hub has read the environment already."""
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
        patch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with at_the_hub() as hub:
        yield hub


def make_drafter(seed: int = 0, **overrides) -> SpecFormerModel:
    config = SpecFormerConfig.from_target_config(llama(torch.float32).config, **overrides)
    torch.manual_seed(seed)  # llama() has set another one
    return SpecFormerModel(config).eval()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sent(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    """What has been pushed; .gitattributes is the Hub's own."""
    files = hub.repositories[ID].files(revision)
    del files[".gitattributes"]
    return files


# ---- save


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_saved_folder_is_complete_and_safe(shard: str | None, tmp_path: Path):
    """Code, strategy and card beside the weights, no pickle anywhere, and the same weights again."""
    drafter = make_drafter()
    drafter.save_pretrained(tmp_path, **(dict(max_shard_size=shard) if shard else {}))
    files = files_of(tmp_path)
    weights = {name for name in files if name.endswith(".safetensors")}
    extra = {"model.safetensors.index.json"} if shard else set()
    assert set(files) - weights == REPOSITORY - {"model.safetensors"} | extra
    assert (len(weights) > 2) if shard else weights == {"model.safetensors"}
    assert {Path(name).suffix for name in files} == {".json", ".md", ".py", ".safetensors", ".txt"}
    assert all(load(files[name]) for name in weights)
    again = SpecFormerModel.from_pretrained(tmp_path).state_dict()
    assert again.keys() == drafter.state_dict().keys()
    assert all(torch.equal(again[name], weight) for name, weight in drafter.state_dict().items())


def test_save_keeps_a_card(tmp_path: Path):
    (tmp_path / "README.md").write_text(BY_HAND)
    make_drafter().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == BY_HAND


@pytest.mark.parametrize("target", ["user/target", "folder", None])
def test_card_names_targets_of_the_hub_alone(target: str | None, hub: Hub, tmp_path: Path):
    """The Hub refuses a card whose base model is a folder of somebody's machine."""
    name = str(tmp_path) if target == "folder" else target
    make_drafter(target_name_or_path=name).push_to_hub(ID)
    card = sent(hub)["README.md"].decode()
    assert ("base_model: user/target\n" in card) == (target == "user/target")
    assert str(tmp_path) not in card
    assert f'from_pretrained("{ID}"' in card


def test_save_does_not_push():
    with pytest.raises(ValueError, match=r"call drafter.push_to_hub\(repo_id\) instead"):
        make_drafter().save_pretrained("nowhere", push_to_hub=True)
    assert not Path("nowhere").exists()


# ---- push


@pytest.mark.parametrize("private", [None, True])
def test_push_is_one_commit_of_all_that_is_needed(private: bool | None, hub: Hub, tmp_path: Path):
    drafter = make_drafter()
    commit = drafter.push_to_hub(ID, private=private, commit_message="First")
    drafter.save_pretrained(tmp_path)
    assert hub.repositories[ID].titles() == ["First", "initial commit"]
    assert hub.heads() == {ID: {"main": commit.oid}}
    assert hub.repositories[ID].private == bool(private)
    pushed = sent(hub)
    assert set(pushed) == REPOSITORY
    assert {name: content for name, content in files_of(tmp_path).items() if pushed[name] != content}.keys() == {
        "README.md"
    }
    asked = [token for request, token in zip(hub.requests, hub.tokens, strict=True) if "/lfs/" not in request]
    assert asked and set(asked) == {hub.token}


def test_same_push_makes_no_commit(hub: Hub):
    first = make_drafter().push_to_hub(ID)
    hub.requests.clear()
    again = make_drafter().push_to_hub(ID)
    assert again.oid == first.oid
    assert hub.heads() == {ID: {"main": first.oid}}
    assert not [request for request in hub.requests if "/commit/" in request or request.startswith("PUT")]


def test_card_of_the_remote_stays_unless_another_is_given(hub: Hub):
    make_drafter().push_to_hub(ID)
    hub.repositories[ID].commit("main", "by hand", {"README.md": File(BY_HAND.encode(), False)})
    make_drafter(seed=1).push_to_hub(ID)
    assert sent(hub)["README.md"] == BY_HAND.encode()
    make_drafter(seed=1).push_to_hub(ID, card="# New\n")
    assert sent(hub)["README.md"] == b"# New\n"
    assert len(hub.repositories[ID].titles()) == 5


def test_only_known_files_are_sent(hub: Hub, tmp_path: Path):
    make_drafter().save_pretrained(tmp_path)
    (tmp_path / "training.json").write_text("{}")
    for name in SECRETS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("secret")
    push_folder(tmp_path, ID)
    assert set(sent(hub)) == REPOSITORY | {"training.json"}
    assert b"secret" not in sent(hub).values()


def test_branch_and_pull_request_leave_main_alone(hub: Hub):
    make_drafter().push_to_hub(ID)
    main = hub.heads()[ID]["main"]
    branch = make_drafter(seed=1).push_to_hub(ID, revision="next/one")
    request = make_drafter(seed=2).push_to_hub(ID, create_pr=True)
    assert hub.heads()[ID] == {"main": main, "next/one": branch.oid, "refs/pr/1": request.oid}
    assert request.pr_url.endswith("/discussions/1")
    weights = {revision: sent(hub, revision)["model.safetensors"] for revision in hub.heads()[ID]}
    assert len(set(weights.values())) == 3
    with pytest.raises(ValueError, match="not both"):
        make_drafter().push_to_hub(ID, revision="next/one", create_pr=True)


def test_other_shards_replace_those_that_are_there(hub: Hub, tmp_path: Path):
    """transformers prefers model.safetensors to shards: an old one left beside new shards would be loaded."""
    hub_files = {"adapter.safetensors": File(b"kept", True)}
    make_drafter().push_to_hub(ID)
    hub.repositories[ID].commit("main", "an adapter", hub_files)
    for size, seed in (("20KB", 1), ("50GB", 2), ("20KB", 3), ("30KB", 4)):
        drafter = make_drafter(seed)
        drafter.push_to_hub(ID, max_shard_size=size)
        folder = tmp_path / str(seed)
        for name, content in sent(hub).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        assert (folder / "adapter.safetensors").read_bytes() == b"kept"
        (folder / "adapter.safetensors").unlink()
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert {path.name for path in folder.glob("*.safetensors")} == shards
        loaded = SpecFormerModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], weight) for name, weight in drafter.state_dict().items())
    assert len(hub.repositories[ID].titles()) == 7


# ---- connections that break


@pytest.mark.parametrize("cut_after", [0, 100, "all"])
def test_broken_connection_leaves_all_or_nothing(cut_after: int | str, hub: Hub):
    """For every request of a push: the connection breaks there, for good."""
    make_drafter().push_to_hub(ID)
    before = hub.heads()
    drafter = make_drafter(seed=1)
    for number in range(20):
        hub.large.clear()
        hub.cut_from, hub.cut_after = len(hub.requests) + number, cut_after
        try:
            drafter.push_to_hub(ID)
        except RuntimeError as error:
            assert ID in str(error)
            assert "all of it is there, or nothing" in str(error)
            cut = hub.requests[hub.cut_from]
        else:
            break
        if cut_after == "all" and "/commit/" in cut:
            break  # it arrived, and the answer was lost
        assert hub.heads() == before, cut
    hub.cut_from = None
    head = drafter.push_to_hub(ID).oid
    assert 5 <= number < 19, "the request that uploads, and the one that commits, were among them"
    assert hub.heads() == {ID: {"main": head}}
    assert len(hub.repositories[ID].titles()) == 3
    assert set(sent(hub)) == REPOSITORY


def test_broken_first_push_leaves_no_file(hub: Hub):
    hub.cut_from = 1
    with pytest.raises(RuntimeError, match="could not be pushed"):
        make_drafter().push_to_hub(ID)
    assert sent(hub) == {}


@pytest.mark.parametrize("reset", [False, True], ids=["ended", "reset"])
@pytest.mark.parametrize("cut_after", [0, 100, 20_000])
@pytest.mark.parametrize("loader", [SpecFormerModel, AutoModel], ids=lambda loader: loader.__name__)
def test_broken_download_can_be_tried_again(loader: type, cut_after: int, reset: bool, hub: Hub, tmp_path: Path):
    """For every request of a first load: the connection breaks there, and is back for the second try."""
    drafter = make_drafter()
    drafter.push_to_hub(ID)
    hub.cut_after, hub.reset, broken = cut_after, reset, []
    for number in range(20):
        where = dict(cache_dir=tmp_path / str(number), trust_remote_code=True)
        hub.requests.clear()
        hub.cut_from = number
        try:
            loader.from_pretrained(ID, **where)
        except Exception as error:  # of transformers or its HTTP library, where our code has not arrived yet
            cut = hub.requests[number]
            if loader is SpecFormerModel or "/lfs/" in cut:
                assert isinstance(error, OSError | ValueError)
                assert ID in str(error) and "ry again" in str(error)
            if "/lfs/" in cut:
                assert isinstance(error, OSError)
                assert "model.safetensors of" in str(error) and "could not be downloaded" in str(error)
            broken.append(cut)
        hub.cut_from, first = None, hub.requests.copy()
        hub.requests.clear()
        loaded = loader.from_pretrained(ID, **where).state_dict()
        assert all(torch.equal(loaded[name], weight) for name, weight in drafter.state_dict().items())
        if len(first) <= number:
            break
    assert number < 19, "every request was among them"
    assert any("/lfs/" in cut for cut in broken)
    assert cut_after == 20_000 or any("config.json" in cut for cut in broken)
    assert not any(("GET" in request and "resolve" in request) or "/lfs/" in request for request in hub.requests)


# ---- what the Hub refuses


@pytest.mark.parametrize(
    "name, token, message",
    [
        (ID, None, "hf auth login"),
        (ID, "hf_of_nobody", "hf auth login"),
        ("other/drafter", "hf_of_user", "write access"),
        ("user/tiny/drafter", "hf_of_user", "Repo id must be"),
    ],
    ids=["no token", "wrong token", "not mine", "bad id"],
)
def test_refusals_say_what_to_do(name: str, token: str | None, message: str, hub: Hub, tmp_path: Path, monkeypatch):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises((RuntimeError, ValueError), match=message):
        make_drafter().push_to_hub(name)
    make_drafter().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=message):
        script(monkeypatch, tmp_path, name)
    assert hub.heads() == {}


# ---- the script


def script(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["publish", *map(str, arguments)])
    publish.main(publish.parse())


def test_script_publishes_a_folder(hub: Hub, tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "drafter"
    make_drafter().save_pretrained(folder)
    (folder / "README.md").write_text("# Trained: <this repository>\n")
    (folder / "training.json").write_text("{}")
    script(monkeypatch, folder, ID, "--private", "--message", "Trained")
    assert capsys.readouterr().out == f"{hub.url}/{ID}/commit/{hub.heads()[ID]['main']}\n"
    assert hub.repositories[ID].private
    assert hub.repositories[ID].titles() == ["Trained", "initial commit"]
    assert sent(hub)["README.md"].decode() == f"# Trained: {ID}\n"
    assert set(sent(hub)) == REPOSITORY | {"training.json"}

    (folder / "README.md").write_text("# Measured\n")
    script(monkeypatch, folder, ID)
    assert len(hub.repositories[ID].titles()) == 2
    script(monkeypatch, folder, ID, "--replace-card", "--revision", "measured")
    assert sent(hub, "measured")["README.md"] == b"# Measured\n"
    card = tmp_path / "card.md"
    card.write_text(BY_HAND)
    capsys.readouterr()
    script(monkeypatch, folder, ID, "--card", card, "--create-pr")
    assert capsys.readouterr().out == f"{hub.url}/{ID}/discussions/1\n"
    assert sent(hub, "refs/pr/1")["README.md"] == BY_HAND.encode()
    assert sent(hub)["README.md"].decode() == f"# Trained: {ID}\n"


@pytest.mark.parametrize(
    "fault, message",
    [
        ("gone", "There is no folder"),
        ("empty", "config.json, modeling_specformer.py, custom_generate/generate.py, model.safetensors is missing"),
        ("strategy", "custom_generate/generate.py is missing"),
        ("other", "no drafter but a model of type 'llama'"),
        ("card", "no-card.md"),
    ],
)
def test_script_says_what_is_wrong_with_a_folder(fault: str, message: str, hub: Hub, tmp_path: Path, monkeypatch):
    folder = tmp_path / "drafter"
    if fault == "empty":
        folder.mkdir()
    elif fault != "gone":
        make_drafter().save_pretrained(folder)
    if fault == "strategy":
        (folder / "custom_generate" / "generate.py").unlink()
    if fault == "other":
        llama(torch.float32).config.save_pretrained(folder)
    with pytest.raises(SystemExit, match=message):
        script(monkeypatch, folder, ID, *(["--card", tmp_path / "no-card.md"] if fault == "card" else []))
    assert hub.requests == []


def test_links_to_this_package_s_own_code_are_sent(tmp_path: Path):
    """As a drafter in a checkout has them; those to other files of it are not, nor those under another name."""
    folder = tmp_path / "drafter"
    make_drafter().save_pretrained(folder)
    shutil.rmtree(folder / "custom_generate")
    (folder / "custom_generate").symlink_to(ROOT / "generation")
    for file in ROOT.glob("*_specformer.py"):
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file)
    assert set(files_to_send(folder)) == REPOSITORY
    (folder / "layers_specformer.py").unlink()
    (folder / "layers_specformer.py").symlink_to(ROOT / "modeling_specformer.py")
    with pytest.raises(ValueError, match=r"layers_specformer\.py is a link to a file outside"):
        files_to_send(folder)


def link_to(place: Path):
    return lambda file: file.symlink_to(place)


NOT_SENT = {
    "card of bytes": ("README.md", lambda file: file.write_bytes(b"# Card \xff\n"), "README.md is no UTF-8 text"),
    "card of pieces": ("README.md", lambda file: file.mkdir(), "README.md is no file"),
    "card of a pipe": ("README.md", os.mkfifo, "README.md is no file"),
    "config of a list": ("config.json", lambda file: file.write_text("[1]"), "config.json is no config of a drafter"),
    "no config": ("config.json", lambda file: file.write_text(""), "config.json is no config of a drafter"),
    "deep config": ("config.json", lambda file: file.write_text("[" * 10**6), "config.json is no config of a drafter"),
    "bytes": ("config.json", lambda file: file.write_bytes(b"\xff{"), "config.json is no config of a drafter"),
    "loop": ("custom_generate/x.py", lambda file: file.symlink_to(file), "x.py is no file"),
    "folder": ("custom_generate/x.py", lambda file: file.mkdir(), "x.py is no file"),
    "pipe": ("custom_generate/x.py", os.mkfifo, "x.py is no file"),
    "link": ("custom_generate/x.py", link_to(ROOT / "setup.cfg"), "x.py is a link to a file outside"),
    "linked card": ("README.md", link_to(ROOT / "setup.cfg"), "README.md is a link to a file outside"),
}


@pytest.mark.parametrize("case", NOT_SENT)
@pytest.mark.parametrize("options", [[], ["--replace-card"]], ids=["", "replace card"])
def test_what_cannot_be_sent(case: str, options: list[str], hub: Hub, tmp_path: Path, monkeypatch):
    """Told before the Hub hears of it."""
    name, spoil, message = NOT_SENT[case]
    folder = tmp_path / "drafter"
    make_drafter().save_pretrained(folder)
    (folder / name).unlink(missing_ok=True)
    spoil(folder / name)
    with pytest.raises(SystemExit, match=f"^Not published. .*{message}"):
        script(monkeypatch, folder, ID, *options)
    assert hub.requests == []


def test_links_within_the_cache_are_sent(hub: Hub, tmp_path: Path):
    """A folder of huggingface_hub's cache holds links to the blobs beside it."""
    make_drafter().save_pretrained(tmp_path / "drafter")
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    for number, (name, content) in enumerate(files_of(tmp_path / "drafter").items()):
        (blobs / str(number)).write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    push_folder(snapshot, ID)
    assert set(sent(hub)) == REPOSITORY


# ---- what a stranger does with it

STRANGER = (
    (ROOT / "tests" / "clean_environment.py").read_text()
    + """
import json
import torch
from transformers import AutoModel, AutoModelForCausalLM
given = json.loads(sys.argv[1])
target = AutoModelForCausalLM.from_pretrained(given["target"], dtype=torch.float64)
prompts = {name: torch.tensor(rows) for name, rows in given["batch"].items()}

def generated(**arguments):
    "The text and the state of torch's generator behind it."
    torch.manual_seed(5)
    output = target.generate(**prompts, max_new_tokens=12, return_dict_in_generate=True, **arguments)
    return output.sequences, torch.get_rng_state(), output

SETTINGS = [dict(do_sample=False), dict(do_sample=True, temperature=1.3, top_k=20)]
plain = [generated(**settings) for settings in SETTINGS]

def drafter_of(name, **where):
    drafter = AutoModel.from_pretrained(name, trust_remote_code=True, **where)
    assert type(drafter).__module__.startswith("transformers_modules."), type(drafter).__module__
    return drafter

def use(name, **where):
    "Load a drafter and generate with it: its weights, the code's own version, and whether the text is the target's."
    drafter = drafter_of(name, **where)
    arguments = dict(assistant_model=drafter, custom_generate=str(name), trust_remote_code=True, **where)
    lossless = True
    for settings, (text, state, _) in zip(SETTINGS, plain):
        ours, our_state, output = generated(**settings, **arguments)
        lossless &= torch.equal(ours, text) and torch.equal(our_state, state) and output.statistics.rounds > 0
    generate = [module for key, module in sys.modules.items() if key.endswith("custom_generate.generate")][-1]
    return [drafter.input_proj.weight.sum().item(), getattr(generate, "VERSION", 1), lossless]

result = {}
"""
)

ONLINE = """
try:
    AutoModel.from_pretrained(given["id"], trust_remote_code=True, token=False)
    result["stranger"] = "loaded"
except OSError as error:
    result["stranger"] = "refused"
try:
    drafter_of(given["id"], revision=given["commit"]).save_pretrained(given["pinned_copy"], token=False)
    result["saved by a stranger"] = "saved"
except OSError as error:
    result["saved by a stranger"] = str(error)
drafter_of(given["id"], revision=given["commit"]).save_pretrained(given["pinned_copy"])  # before its strategy is here
result["main"] = use(given["id"])
result["commit"] = use(given["id"], revision=given["commit"])
result["branch"] = use(given["id"], revision="stable")
result["past"] = use(given["id"], revision="past")
try:
    result["future"] = use(given["id"], revision="future")
except ImportError as error:
    result["future"] = str(error)
drafter_of(given["id"], revision="past").save_pretrained(given["past_copy"])
drafter_of(given["id"]).save_pretrained(given["copy"])
drafter_of(given["copy"]).save_pretrained(given["copy"])  # over itself
drafter_of(given["copy"]).save_pretrained(given["copy_of_copy"])
for name in ("pinned_copy", "copy", "copy_of_copy", "package"):
    result[name] = use(given[name])
result["hidden"] = sorted(HIDDEN & sys.modules.keys())
print(json.dumps(result))
"""

OFFLINE = """
result["main"] = use(given["id"])
result["commit"] = use(given["id"], revision=given["commit"])
result["branch"] = use(given["id"], revision="stable")
drafter_of(given["id"]).save_pretrained(given["offline_copy"])
drafter_of(given["id"], revision="past").save_pretrained(given["past_offline_copy"])
result["offline_copy"] = use(given["offline_copy"])
result["hidden"] = sorted(HIDDEN & sys.modules.keys())
print(json.dumps(result))
"""


def run(program: str, given: dict, home: Path, **environment: str) -> dict:
    environment |= dict(PATH="/usr/bin:/bin", HOME=str(home), HF_HOME=str(home / "hf"), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER + program, json.dumps(given)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.pop("hidden") == []
    return result


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> SimpleNamespace:
    """A private repository whose second version has other weights and another strategy, loaded in every way."""
    folder = tmp_path_factory.mktemp("story")
    target = llama(torch.float32)
    target.save_pretrained(folder / "target")
    names = ["target", "package", "pinned_copy", "copy", "copy_of_copy", "past_copy"]
    names += ["offline_copy", "past_offline_copy"]
    given = {name: str(folder / name) for name in names}
    given |= dict(id=ID, batch={name: rows.tolist() for name, rows in ragged_batch().items()})
    versions = [make_drafter(seed=seed) for seed in (1, 2)]
    versions[0].save_pretrained(given["package"])
    with at_the_hub() as hub:
        given["commit"] = versions[0].push_to_hub(ID, private=True).oid
        for branch in ("stable", "past", "future"):
            versions[0].push_to_hub(ID, revision=branch)
        hub.repositories[ID].commit("past", "as before there were requirements", {REQUIREMENTS: None})
        hub.repositories[ID].commit("future", "needs more", {REQUIREMENTS: File(b"transformers>=99", False)})
        versions[1].push_to_hub(ID)
        strategy = "custom_generate/generate.py"
        newer = sent(hub)[strategy] + b"\nVERSION = 2\n"
        hub.repositories[ID].commit("main", "newer strategy", {strategy: File(newer, False)})
        reach = dict(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_TOKEN=hub.token)
        online = run(ONLINE, given, folder, **reach)
        files = {name: sent(hub, given.get(name, name)) for name in ("main", "commit", "past")}
    sums = [drafter.input_proj.weight.sum().item() for drafter in versions]
    offline = run(OFFLINE, given, folder, **reach, HF_HUB_OFFLINE="1")
    return SimpleNamespace(
        folder=folder,
        online=online,
        offline=offline,
        files=files,
        first=[pytest.approx(sums[0]), 1, True],
        second=[pytest.approx(sums[1]), 2, True],
    )


def test_loaded_by_id(story):
    """Weights, code and strategy of the main branch, without the package; the text is the target's own."""
    assert story.online["main"] == story.second


def test_private_repository_wants_the_token(story):
    assert story.online["stranger"] == "refused"
    assert "custom_generate/ cannot be read" in story.online["saved by a stranger"]  # save_pretrained(token=False)


@pytest.mark.parametrize("pin", ["commit", "branch"])
def test_pinned(story, pin: str):
    assert story.online[pin] == story.first


def test_offline_from_the_cache(story):
    expected = dict(main=story.second, commit=story.first, branch=story.first, offline_copy=story.second)
    assert story.offline == expected


def test_saved_from_the_package_loads_without_it(story):
    assert story.online["package"] == story.first


def test_other_versions_of_transformers_are_refused_in_words(story):
    """What a repository says that it needs, transformers compares before it runs anything of it."""
    assert f"Missing requirements in your local environment for `{ID}`" in story.online["future"]
    assert f"transformers>=99 (installed: {transformers.__version__})" in story.online["future"]


def test_repositories_without_requirements(story):
    """Those of before there were any: they work, and what is saved of them is what they are."""
    assert story.online["past"] == story.first
    assert REQUIREMENTS not in story.files["past"]
    for copy in ("past_copy", "past_offline_copy"):
        assert files_of(story.folder / copy).keys() == story.files["past"].keys()


@pytest.mark.parametrize("copy, version", [("copy", "main"), ("pinned_copy", "commit"), ("copy_of_copy", "main")])
def test_remote_code_saves_a_complete_folder(story, copy: str, version: str):
    """What was loaded from the Hub and saved is what was pushed, its own version of the strategy included."""
    saved, pushed = files_of(story.folder / copy), dict(story.files[version])
    assert saved.keys() == pushed.keys()
    different = {name for name in saved if saved[name] != pushed[name]}
    assert different <= {"README.md", "config.json"}  # the card has another name; transformers orders the fields anew
    configs = [json.loads(files["config.json"]) for files in (saved, pushed)]
    assert configs[0] == configs[1]
    assert story.online[copy] == (story.second if version == "main" else story.first)


def test_drafters_that_need_the_package_stay_at_home():
    """What generate.py imports travels, and all of that; what is made by hand and passed to it does not."""
    names = {file.name for file in modules_of(ROOT / "generation")}
    assert {"generate.py", "call_drafter.py", "drafter_specformer.py", "proposal_tree.py"} <= names
    assert "drafter_reader.py" not in names and (ROOT / "generation" / "drafter_reader.py").exists()
    assert not {name for name in names if not (ROOT / "generation" / name).exists()}


# ---- this checkout


def test_checkout_is_a_repository_without_copies():
    """What the Hub would serve of this checkout: all that the drafter needs, and no code twice."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run([*git, "--cached", "--others", "--exclude-standard"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    names = set(listed.stdout.decode().split("\0")) - {""}
    if "pyproject.toml" not in names:
        pytest.skip("the checkout is part of another one")
    staged = subprocess.run([*git, "--stage"], capture_output=True, check=True).stdout.decode().split("\0")
    assert [line.split()[0] for line in staged if line.endswith("\tcustom_generate")] == ["120000"]
    assert os.readlink(ROOT / "custom_generate") == "generation"
    assert {"config.json", "model.safetensors"} <= names
    assert {name.replace("custom_generate/", "generation/") for name in CODE} <= names
    files = [ROOT / name for name in names if name.endswith(".py")]
    code = [file for file in files if file.stat().st_size and not file.is_symlink()]  # the drafters' own are links
    contents = {file.read_bytes() for file in code}
    assert len(contents) == len(code)
    config = json.loads((ROOT / "config.json").read_text())
    assert {reference.split(".")[0] + ".py" for reference in config["auto_map"].values()} <= names
    assert load((ROOT / "model.safetensors").read_bytes())
