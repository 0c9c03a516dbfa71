"""A drafter's Space and the data set of its answers, pushed to a stand-in for the Hub: their cards name each other."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest
from hub import File
from huggingface_hub import RepoCard
from test_hub import BY_HAND, ID, fast_retries, hub, make_drafter

from specformer.scripts import publish, space
from specformer.scripts.parts import linked
from specformer.scripts.parts.answer_folder import AnswerFolder

__all__ = ["fast_retries", "hub"]  # fixtures

DEMO, ANSWERS, TARGET = "user/demo", "user/answers", "someone/a-target"
ALL = {"model": ID, "space": f"spaces/{DEMO}", "dataset": f"datasets/{ANSWERS}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_drafter(target_name_or_path=TARGET).save_pretrained(tmp_path / "drafter")
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "answers-00000.jsonl").write_text(
        '{"id": 0, "prompt_ids": [6], "response_ids": [7], "finished": true}\n'
    )
    (answers / "answers-00000.states").write_bytes(bytes(100))
    AnswerFolder(answers).write_card("specformer.scripts.distill", {"target": TARGET})
    return tmp_path


def call(monkeypatch, *options) -> None:
    monkeypatch.setattr(sys, "argv", ["publish", *map(str, options)])
    publish.main(publish.parse())


def published(hub, kind: str) -> dict[str, str]:
    files = hub.repositories[ALL[kind]].files()
    return {
        name: content.decode() for name, content in files.items() if name.endswith((".md", ".txt", ".py", ".jsonl"))
    }


def test_all_of_it(hub, folder: Path, monkeypatch, capsys):
    options = [
        folder / "drafter",
        ID,
        "--space",
        DEMO,
        "--dataset",
        ANSWERS,
        "--answers",
        folder / "answers",
        "--private",
    ]
    call(monkeypatch, *options)
    assert capsys.readouterr().out.splitlines()[1:] == [f"{hub.url}/datasets/{ANSWERS}", f"{hub.url}/spaces/{DEMO}"]
    assert hub.repositories.keys() == set(ALL.values())
    assert all(repository.private for repository in hub.repositories.values())

    cards = {kind: RepoCard(published(hub, kind)["README.md"]) for kind in ALL}
    pages = {kind: f"{hub.url}/{name}" for kind, name in ALL.items()}
    for kind, card in cards.items():
        assert [f"]({page})" in card.text for page in pages.values()] == [other != kind for other in ALL]
        assert linked.HERE not in str(card)
    assert cards["space"].data["models"] == [TARGET, ID]
    assert cards["model"].data["datasets"] == cards["space"].data["datasets"] == [ANSWERS]
    assert cards["model"].data["base_model"] == TARGET
    assert f"https://huggingface.co/{TARGET}" in cards["dataset"].text
    assert cards["dataset"].data["configs"][0]["data_files"] == "answers-*.jsonl"

    sent = set(hub.repositories[ALL["space"]].files()) - {".gitattributes"}
    assert sent == {file.name for file in linked.SPACE.iterdir() if file.is_file()}
    assert published(hub, "space")["app.py"] == (linked.SPACE / "app.py").read_text(encoding="utf-8")
    assert set(hub.repositories[ALL["dataset"]].files()) == {".gitattributes", "README.md", "answers-00000.jsonl"}

    heads = hub.heads()
    call(monkeypatch, *options[:6])
    assert {name: head for name, head in hub.heads().items() if name != ALL["space"]} == {
        name: head for name, head in heads.items() if name != ALL["space"]
    }
    assert RepoCard(published(hub, "space")["README.md"]).text == cards["space"].text


def test_a_card_by_hand_keeps_its_text(hub, folder: Path, monkeypatch):
    call(monkeypatch, folder / "drafter", ID)
    hub.repositories[ID].commit("main", "by hand", {"README.md": File(BY_HAND.encode(), False)})
    call(monkeypatch, folder / "drafter", ID, "--space", DEMO)
    card = published(hub, "model")["README.md"]
    assert BY_HAND in card and f"]({hub.url}/spaces/{DEMO})" in card
    call(monkeypatch, folder / "drafter", ID, "--space", "user/other")
    card = published(hub, "model")["README.md"]
    assert BY_HAND in card and card.count("<!-- links -->") == 1 and "user/other" in card


def test_what_is_old_in_a_space_goes(hub, folder: Path, monkeypatch):
    options = [folder / "drafter", ID, "--space", DEMO]
    call(monkeypatch, *options)
    hub.repositories[ALL["space"]].commit(
        "main", "old", {"old.py": File(b"1\n", False), "mine.txt": File(b"2\n", False)}
    )
    call(monkeypatch, *options)
    assert "old.py" not in hub.repositories[ALL["space"]].files() and "mine.txt" in published(hub, "space")


BAD = {
    "name it with --dataset": ["--answers", "answers"],
    "holds no answers of": ["--answers", "drafter", "--dataset", ANSWERS],
    "Repo id must": ["--space", "no/such/name"],
}


@pytest.mark.parametrize("said", BAD)
def test_nothing_is_sent_where_something_does_not_fit(said: str, hub, folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=f"Not published. .*{said}"):
        call(monkeypatch, "drafter", ID, *BAD[said])
    assert not hub.repositories


def test_a_target_that_is_not_on_the_hub(hub, folder: Path, tmp_path: Path, monkeypatch):
    make_drafter(target_name_or_path=str(tmp_path)).save_pretrained(folder / "local")
    with pytest.raises(SystemExit, match="A Space loads the target from the Hub, and this drafter's is"):
        call(monkeypatch, folder / "local", ID, "--space", DEMO)
    assert not hub.repositories


def test_a_hub_that_refuses_says_what_is_there(hub, folder: Path, monkeypatch):
    with pytest.raises(SystemExit, match="The drafter is published; what belongs to it is not"):
        call(monkeypatch, folder / "drafter", ID, "--space", "somebody/else")
    assert hub.repositories.keys() == {ID}


def test_branches_have_no_space(folder: Path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, folder / "drafter", ID, "--space", DEMO, "--create-pr")
    assert "leave --revision and --create-pr out" in capsys.readouterr().err


# ---- the Space on this machine


def test_the_command_starts_the_page_of_this_checkout(monkeypatch):
    monkeypatch.setattr(
        space, "find_target", lambda given: ("a/folder", "a model") if given is None else (given, given)
    )
    monkeypatch.setattr(sys, "argv", ["space", "--port", "7861"])
    given = space.options(space.parse())
    root = str(space.ROOT)
    assert dict(zip(given[::2], given[1::2], strict=True)) == {
        "--target": "a/folder",
        "--name": "a model",
        "--drafter": root,
        "--repository": root,
        "--dtype": "float32",
        "--port": "7861",
    }
    monkeypatch.setattr(sys, "argv", ["space", "--target", "mine"])
    assert "--drafter" not in space.options(space.parse())


def test_what_is_missing_is_said(monkeypatch, tmp_path: Path):
    arguments = argparse.Namespace()
    monkeypatch.setattr(space, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=re.escape('pip install "specformer[space]"')):
        space.main(arguments)
    monkeypatch.setattr(space, "SPACE", tmp_path / "spaces")
    with pytest.raises(SystemExit, match="in a checkout of SpecFormer"):
        space.main(arguments)
    monkeypatch.setattr(linked, "SPACE", tmp_path / "spaces")
    (tmp_path / "config.json").write_text('{"target_name_or_path": "someone/a-target"}')
    with pytest.raises(FileNotFoundError, match="in a checkout of it"):
        linked.check_linked(tmp_path, "user/demo", None, None)
