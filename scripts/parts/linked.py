"""What belongs to a published drafter: a Space that shows it, and the data set that it was trained on. Each names the
others on its card, and the Hub lists them on each other's pages.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, RepoCard, constants
from huggingface_hub.utils import validate_repo_id

from specformer.publishing_specformer import HERE, hub_id

SPACE = Path(__file__).resolve().parents[2] / "spaces" / "specformer"
SPACE_FILES = ("README.md", "requirements.txt", "*.py")
ANSWER_FILES = ("README.md", "answers-*.jsonl")
"""What is sent of a folder of answers. Stored hidden states are not: they are large, and can be computed again."""
LINKS = re.compile(r"\n*<!-- links -->.*<!-- /links -->\n", flags=re.S)
WHAT = {
    "model": "the drafter",
    "dataset": "the answers that it was trained on",
    "space": "a page that shows it at work",
}


def check_linked(folder: Path, space: str | None, dataset: str | None, answers: Path | None) -> None:
    """Before anything is sent, for the drafter in `folder`.

    Raises:
        ValueError: a name that cannot be one, answers without a name, or a target that is not on the Hub.
        FileNotFoundError: what is to be sent is not there.
    """
    for name in filter(None, (space, dataset)):
        validate_repo_id(name)
    if answers is not None:
        if dataset is None:
            raise ValueError("--answers are sent to a data set of the Hub: name it with --dataset user/name.")
        if not list(answers.glob("answers-*.jsonl")) or not (answers / "README.md").is_file():
            raise FileNotFoundError(f"{answers} holds no answers of `specformer distill` with their README.md.")
    if space is not None:
        target_of(folder)
        if not SPACE.is_dir():
            raise FileNotFoundError("The Space is no part of the installed package: call --space in a checkout of it.")


def target_of(folder: Path) -> str:
    """Hub id of the target of the drafter in `folder`.

    Raises:
        ValueError: it is not there.
    """
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("target_name_or_path")
    if (target := hub_id(name)) is None:
        raise ValueError(
            f"A Space loads the target from the Hub, and this drafter's is {name!r}: set target_name_or_path in "
            f"{folder / 'config.json'} to the target's Hub id."
        )
    return target


def push_space(space: str, drafter: str, target: str, private: bool | None) -> None:
    """Make or renew the Space that shows `drafter` with `target`, all of them Hub ids."""
    api = HfApi()
    api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for pattern in SPACE_FILES:
            for file in SPACE.glob(pattern):
                shutil.copy(file, folder)
        readme = Path(folder) / "README.md"
        readme.write_text(space_card(readme.read_text(encoding="utf-8"), drafter, target), encoding="utf-8")
        api.upload_folder(
            repo_id=space, repo_type="space", folder_path=folder, delete_patterns="*.py", commit_message="Upload Space"
        )


def space_card(text: str, drafter: str, target: str) -> str:
    """README.md of the Space, with the repositories that it shows."""
    models = f"models:\n  - {target}\n  - {drafter}\n"
    return re.sub(rf"^models:\n  - .*\n  - {HERE}\n", lambda _: models, text, flags=re.M)


def push_answers(folder: Path, dataset: str, private: bool | None) -> None:
    api = HfApi()
    api.create_repo(dataset, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=dataset,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=list(ANSWER_FILES),
        commit_message="Upload answers",
    )


def link(drafter: str, space: str | None, dataset: str | None) -> None:
    """Let the cards of these repositories name each other. Cards that do already stay as they are."""
    there = {"model": drafter, **({"dataset": dataset} if dataset else {}), **({"space": space} if space else {})}
    for kind, name in there.items():
        card = RepoCard.load(name, repo_type=kind, ignore_metadata_errors=True)
        before = str(card)
        if kind == "model" and dataset:
            card.data["datasets"] = sorted({*(card.data.get("datasets") or []), dataset})
        if kind == "space" and dataset:
            card.data["datasets"] = [dataset]
        others = [f"[{WHAT[other]}]({address(other, there[other])})" for other in there if other != kind]
        links = f"<!-- links -->\nSee {' and '.join(others)}.\n<!-- /links -->"
        card.text = LINKS.sub("", card.text).rstrip("\n") + f"\n\n{links}\n"
        if str(card) != before:
            HfApi().upload_file(
                path_or_fileobj=str(card).encode(),
                path_in_repo="README.md",
                repo_id=name,
                repo_type=kind,
                commit_message="Link what belongs together",
            )


def address(kind: str, name: str) -> str:
    folder = "" if kind == "model" else f"{kind}s/"
    return f"{constants.ENDPOINT}/{folder}{name}"
