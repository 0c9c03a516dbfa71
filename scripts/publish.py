"""Push the folder of a trained drafter to the Hub.

    specformer publish runs/drafter user/name --private
    specformer publish runs/drafter user/name --replace-card --message "Figures on an H200"
    specformer publish runs/drafter user/name --space user/demo --dataset user/answers --answers runs/answers

One commit of weights, config, code, training.json and the model card; nothing else that lies in the folder is sent,
and nothing at all where all of it is there already. A README.md that is there stays unless another one is asked for.
The token is that of `hf auth login`, or HF_TOKEN. Prints where to see the commit.

--space makes a Space that shows the drafter, --dataset names the answers that it was trained on, which --answers sends.
Then the cards of all of them name each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from specformer.configuration_specformer import SpecFormerConfig
from specformer.publishing_specformer import STRATEGY, WEIGHTS, push_folder, read_card
from specformer.scripts.parts.linked import address, check_linked, link, push_answers, push_space, target_of


def check_drafter(folder: Path) -> None:
    """Raises:
    FileNotFoundError: there is no such folder, or something is missing in it.
    ValueError: it holds another model.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    needed = ["config.json", "modeling_specformer.py", f"{STRATEGY}/generate.py"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if not any(WEIGHTS.fullmatch(path.name) for path in folder.iterdir()):
        missing.append("model.safetensors")
    if missing:
        raise FileNotFoundError(
            f"{folder} is no whole drafter: {', '.join(missing)} is missing. Name the folder that training wrote, or "
            "one of drafter.save_pretrained(...)."
        )
    try:
        kind = dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))).get("model_type")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'} is no config of a drafter ({error}).") from error
    if kind != SpecFormerConfig.model_type:
        raise ValueError(f"{folder} holds no drafter but a model of type {kind!r}.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path, help="folder of `specformer train` or of save_pretrained()")
    parser.add_argument("repository", help="user/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--revision", help="branch; made if it does not exist")
    where.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", help="of the commit")
    cards = parser.add_mutually_exclusive_group()
    cards.add_argument("--card", type=Path, help="Markdown file to send as README.md, in place of one that is there")
    cards.add_argument("--replace-card", action="store_true", help="send the folder's README.md, as --card does")
    parser.add_argument("--space", help="user/name of a Space that shows the drafter; made or renewed")
    parser.add_argument("--dataset", help="user/name of the answers that it was trained on")
    parser.add_argument("--answers", type=Path, help="folder of `specformer distill`, to send to --dataset")
    arguments = parser.parse_args()
    if (arguments.space or arguments.dataset) and (arguments.create_pr or arguments.revision):
        parser.error("--space and --dataset are of a drafter on the main branch: leave --revision and --create-pr out")
    return arguments


def main(arguments: argparse.Namespace) -> None:
    try:
        check_drafter(arguments.drafter)
        check_linked(arguments.drafter, arguments.space, arguments.dataset, arguments.answers)
        card = arguments.drafter / "README.md" if arguments.replace_card else arguments.card
        commit = push_folder(
            arguments.drafter,
            arguments.repository,
            card=card and read_card(card),
            commit_message=arguments.message,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
        )
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"Not published. {error}")
    print(commit.pr_url or commit.commit_url)
    if arguments.space or arguments.dataset:
        publish_linked(arguments)


def publish_linked(arguments: argparse.Namespace) -> None:
    """The Space and the answers of a drafter that is there already."""
    drafter, space, dataset, private = (arguments.repository, arguments.space, arguments.dataset, arguments.private)
    try:
        if arguments.answers:
            push_answers(arguments.answers, dataset, private)
        if space:
            push_space(space, drafter, target_of(arguments.drafter), private)
        link(drafter, space, dataset)
    except Exception as error:  # of huggingface_hub, or of its HTTP library
        sys.exit(f"The drafter is published; what belongs to it is not, or not all of it. {error} Run it again.")
    for kind, name in (("dataset", dataset), ("space", space)):
        if name:
            print(address(kind, name))


if __name__ == "__main__":
    main(parse())
