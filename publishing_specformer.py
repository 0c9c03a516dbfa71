"""A drafter's folder as a complete Hub repository: what `save_pretrained` adds to weights and config, and the push.

transformers copies the files that config.json's `auto_map` names. A drafter is of no use without its generation
strategy (`custom_generate/`), and a repository without a model card is hard to find.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.dynamic_module_utils import get_cached_module_file, get_relative_import_files
from transformers.utils import HF_MODULES_CACHE, cached_file

from .configuration_specformer import SpecFormerConfig

STRATEGY = "custom_generate"
REQUIREMENTS = "requirements.txt"
"""Of the strategy: transformers compares it with what is installed before it runs generate.py."""
CARD = "README.md"
WRITTEN = "<!-- written by specformer -->"
"""A card without this line was written by a person, and is left alone."""
TAGS = (STRATEGY, "speculative-decoding", "specformer")
HERE = "<this repository>"
"""What a card calls a repository that has no name yet. A push fills it in."""
PUBLISHED = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*_specformer.py",
    f"{STRATEGY}/*.py",
    f"{STRATEGY}/{REQUIREMENTS}",
    "training.json",
)
"""What a push sends, and the card. Nothing else that lies in a folder leaves the machine."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
COMMIT = re.compile("[0-9a-f]{40}")
ADVICE: dict[int | None, str] = {
    401: "The Hub does not know this token, or there is none: run `hf auth login`, or set HF_TOKEN.",
    403: "The token must not write there: give it write access, or name a repository of your own.",
}


def hub_id(name: str | None) -> str | None:
    """`name` if it can be the id of a repository. A folder of this machine is nobody else's business, and the Hub
    refuses a card that calls one its base model."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def card_head(target_name_or_path: str | None, license: str | None = None, tags: tuple[str, ...] = TAGS) -> str:
    """The metadata that the Hub reads, between its dashes."""
    lines = ["---", "library_name: transformers"]
    lines += [f"license: {license}"] if license else []
    if target := hub_id(target_name_or_path):
        lines += [f"base_model: {target}", "base_model_relation: adapter"]
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags:", *(f"  - {tag}" for tag in tags), "---"])


def short_card(config: SpecFormerConfig) -> str:
    """README.md of a drafter that nothing is known of but its config."""
    target = hub_id(config.target_name_or_path) or "its target"
    return f"""{card_head(config.target_name_or_path)}
{WRITTEN}

# SpecFormer drafter for {target}

Drafts tokens for `generate` of {target}, which verifies them: the text does not change. How it was trained, and how
many of its drafts are accepted, is not documented.

```python
drafter = AutoModel.from_pretrained("{HERE}", trust_remote_code=True)
output = target.generate(
    **inputs, assistant_model=drafter, custom_generate=drafter.name_or_path, trust_remote_code=True
)
```
"""


def strategy_files(drafter, token: bool | str | None = None) -> list[Path]:
    """The files of the generation strategy that belong to this code: of the installed package, or of the repository
    that `drafter` was loaded from as remote code, which is read with `token`.

    Raises:
        OSError: that repository cannot be read.
    """
    code = Path(__file__).parent
    if (code / "generation" / "generate.py").exists():
        return [*modules_of(code / "generation"), code / "generation" / REQUIREMENTS]
    # transformers keeps the code of a Hub repository in a folder named after its commit: the strategy must be of the
    # same one, whatever the repository holds by now
    commit = code.name if COMMIT.fullmatch(code.name) else None
    repository = drafter.name_or_path
    try:
        file = get_cached_module_file(repository, f"{STRATEGY}/generate.py", revision=commit, token=token)
        # drafters of before it was written have none
        requirements = cached_file(
            repository,
            f"{STRATEGY}/{REQUIREMENTS}",
            _raise_exceptions_for_missing_entries=False,
            revision=commit,
            token=token,
        )
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"This drafter was loaded from {repository!r}, whose {STRATEGY}/ cannot be read ({error}). Without it the "
            "saved folder could not generate. Save where that repository can be read, or install specformer."
        ) from error
    modules = (Path(HF_MODULES_CACHE) / file).parent.glob("*.py")
    files = sorted(path for path in modules if path.name != "__init__.py")
    return [*files, Path(requirements)] if requirements else files


def modules_of(strategy: Path) -> list[Path]:
    """The files that a strategy's generate.py imports, however far, and itself: those that transformers copies out of a
    repository. What else lies there is for those who have the package."""
    entry = strategy / "generate.py"
    return sorted({entry, *(strategy / Path(file).name for file in get_relative_import_files(str(entry)))})


def complete_repository(drafter, folder: Path, token: bool | str | None = None) -> None:
    """Add the strategy, and a card where there is none."""
    strategy = folder / STRATEGY
    sources = strategy_files(drafter, token)
    strategy.mkdir(exist_ok=True)
    for source in sources:
        if source.resolve() != (strategy / source.name).resolve():
            shutil.copyfile(source, strategy / source.name)
    card = folder / CARD
    if not card.exists():
        card.write_text(short_card(drafter.config), encoding="utf-8")


def push(drafter, repo_id: str, *, max_shard_size: int | str = "50GB", token: bool | str | None = None, **arguments):
    """Send what `drafter.save_pretrained` writes. See `push_folder` for the other arguments."""
    with tempfile.TemporaryDirectory() as folder:
        drafter.save_pretrained(folder, max_shard_size=max_shard_size, token=token)
        return push_folder(folder, repo_id, token=token, **arguments)


def files_to_send(folder: Path) -> dict[str, Path]:
    """The files of `folder` that a push sends, its card among them, by their names in the repository.

    Raises:
        ValueError: one of them is no file, or a link to one elsewhere, which is nobody else's business; the code of
            this package is not meant.
    """
    files = {
        path.relative_to(folder).as_posix(): path for pattern in (*PUBLISHED, CARD) for path in folder.glob(pattern)
    }
    blobs = folder.resolve().parent.parent / "blobs"  # huggingface_hub's cache holds links to files there
    code = Path(__file__).resolve().parent  # to which drafters in a checkout link, so that theirs is never another
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"{path} is no file, or cannot be read; remove it.")
        place = path.resolve()
        own_code = [code / path.name] if path.parent == folder else [code / "generation" / path.name]
        if place not in own_code and not any(place.is_relative_to(home) for home in (folder.resolve(), blobs)):
            raise ValueError(f"{path} is a link to a file outside of the drafter; remove it, or put a copy there.")
    if (folder / STRATEGY / "generate.py").is_file():
        modules = modules_of(folder / STRATEGY)
        beside = [path for path in (folder / STRATEGY).glob("*.py") if path not in modules]
        files = {name: path for name, path in files.items() if path not in beside}
    return files


def read_card(file: Path) -> str:
    """Raises:
    OSError: `file` cannot be read.
    ValueError: it is not in UTF-8.
    """
    if file.exists() and not file.is_file():  # a pipe would be read for ever
        raise OSError(f"The model card {file} is no file.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The model card {file} is no UTF-8 text ({error}); save it as UTF-8.") from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    card: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
):
    """Send the files of `folder` that make a repository (`PUBLISHED`) in one commit: all of it arrives, or nothing.

    Pushing the same again makes no commit. Weights that are there and of which `folder` has none, such as shards of
    another number, go in the same commit: transformers would prefer some of them to those that are sent.

    Args:
        repo_id: where to; made if it does not exist.
        card: text of README.md; default: the one that is there stays, and where there is none, that of `folder`.
        private: of a repository that is made.
        revision: branch; made if it does not exist.
        create_pr: open a pull request against the main branch.

    Returns:
        What huggingface_hub says of the commit.

    Raises:
        ValueError: no such id can be, both a branch and a pull request were asked for, or a file cannot be sent.
        RuntimeError: the Hub refused, or could not be reached to the end.
    """
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("A pull request is opened against the main branch: give `revision` or `create_pr`, not both.")
    folder = Path(folder)
    files = files_to_send(folder)
    card_file = files.pop(CARD, None)
    own_card = read_card(card_file) if card is None and card_file is not None else None
    contents: dict[str, Path | bytes] = {**files}
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        if card is None and CARD not in there:
            card = own_card
        if card is not None:
            contents[CARD] = card.replace(HERE, repo_id).encode()
        stale = [path for path in there if WEIGHTS.fullmatch(path) and path not in contents]
        # not upload_folder, which makes several commits of many files
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
            + [CommitOperationDelete(path) for path in stale],
            commit_message=commit_message or "Upload SpecFormer drafter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except Exception as error:  # of huggingface_hub, or of its HTTP library, which is not the same in every version
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = ADVICE.get(status, "Push again when the reason is gone; what has arrived is not sent twice.")
        raise RuntimeError(
            f"The drafter could not be pushed to {repo_id} ({type(error).__name__}: {' '.join(str(error).split())}). "
            f"{advice} A push is one commit: either all of it is there, or nothing."
        ) from error
