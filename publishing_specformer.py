"""A drafter's folder as a complete Hub repository: what `save_pretrained` adds to weights and config, what loading
refuses, and the push.

transformers copies the files that config.json's `auto_map` names. A drafter is of no use without its generation
strategy (`custom_generate/`), and a repository without a model card is found by nobody.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.dynamic_module_utils import get_cached_module_file
from transformers.utils import HF_MODULES_CACHE, cached_file

from .configuration_specformer import SpecFormerConfig

STRATEGY = "custom_generate"
WRITTEN = "<!-- written by specformer -->"
"""A card without this line was written by a person, and is left alone."""
HERE = "<this repository>"
"""What a card calls a repository that has no name yet. A push fills it in."""
PUBLISHED = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*_specformer.py",
    f"{STRATEGY}/*.py",
    "training.json",
)
"""What a push sends, and the card. Nothing else that lies in a folder leaves the machine."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
COMMIT = re.compile("[0-9a-f]{40}")
ADVICE = {
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


def card_head(config: SpecFormerConfig, license: str | None = None) -> str:
    """The metadata that the Hub reads, between its dashes."""
    lines = ["---", "library_name: transformers"]
    lines += [f"license: {license}"] if license else []
    if target := hub_id(config.target_name_or_path):
        lines += [f"base_model: {target}", "base_model_relation: adapter"]
    tags = (STRATEGY, "speculative-decoding", "specformer")
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags:", *(f"  - {tag}" for tag in tags), "---"])


def short_card(config: SpecFormerConfig) -> str:
    """README.md of a drafter that nothing is known of but its config."""
    target = hub_id(config.target_name_or_path) or "its target"
    return f"""{card_head(config)}
{WRITTEN}

# SpecFormer drafter for {target}

Drafts tokens for `generate` of {target}, which verifies them: the text does not change. How it was trained and what it
comes to has not been written down.

```python
drafter = AutoModel.from_pretrained("{HERE}", trust_remote_code=True)
output = target.generate(
    **inputs, assistant_model=drafter, custom_generate=drafter.name_or_path, trust_remote_code=True
)
```
"""


def check_repository(name, subfolder: str = "", variant: str | None = None, **kwargs) -> None:
    """Refuse what leads transformers away from a drafter's own safetensors: adapters, and shards of other names."""
    names = ("cache_dir", "local_files_only", "proxies", "revision", "token")
    hub = {key: kwargs[key] for key in names if key in kwargs}

    def find(file: str) -> str | None:
        return cached_file(
            name,
            file,
            subfolder=subfolder,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )

    if os.path.isfile(os.path.join(subfolder, name)):
        raise ValueError(f"{str(name)!r} is a file; give the folder of a drafter, or its Hub id.")
    if kwargs.get("config") is None and cached_file(name, "config.json", subfolder=subfolder, **hub) is None:
        # transformers would go on with a default config
        raise OSError(f"{str(name)!r} holds no config.json; it is not the folder or repository of a drafter.")
    if find("adapter_config.json") or (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path"):
        raise ValueError(
            f"{str(name)!r} holds an adapter_config.json, by which transformers would load other weights. A drafter "
            "has no adapters; remove the file."
        )
    index = find(f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json")
    if index is None:
        return
    try:
        shards = set(json.loads(Path(index).read_text())["weight_map"].values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} names no shards ({error}). Download the drafter again, or save it again.") from error
    if not all(isinstance(shard, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", shard) for shard in shards):
        raise ValueError(f"{index} names files that are not safetensors beside it. Do not use this drafter.")


def strategy_files(drafter) -> list[Path]:
    """The files of the generation strategy that belong to this code: of the installed package, or of the repository
    that `drafter` was loaded from as remote code.

    Raises:
        OSError: that repository cannot be read.
    """
    code = Path(__file__).parent
    if (code / "generation" / "generate.py").exists():
        return sorted((code / "generation").glob("*.py"))
    # transformers keeps the code of a Hub repository in a folder named after its commit: the strategy must be of the
    # same one, whatever the repository holds by now
    commit = code.name if COMMIT.fullmatch(code.name) else None
    repository = drafter.name_or_path
    try:
        file = get_cached_module_file(repository, f"{STRATEGY}/generate.py", revision=commit)
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"This drafter was loaded from {repository!r}, whose {STRATEGY}/ cannot be read ({error}). Without it the "
            "saved folder could not generate. Save where that repository can be read, or install specformer."
        ) from error
    return sorted(path for path in (Path(HF_MODULES_CACHE) / file).parent.glob("*.py") if path.name != "__init__.py")


def complete_repository(drafter, folder: Path) -> None:
    """Add the strategy, and a card where there is none."""
    strategy = folder / STRATEGY
    sources = strategy_files(drafter)
    if strategy.resolve() != sources[0].parent.resolve():
        strategy.mkdir(exist_ok=True)
        for source in sources:
            shutil.copyfile(source, strategy / source.name)
    card = folder / "README.md"
    if not card.exists():
        card.write_text(short_card(drafter.config))


def push(drafter, repo_id: str, *, max_shard_size: int | str = "50GB", **arguments):
    """Send what `drafter.save_pretrained` writes. See `push_folder` for the other arguments."""
    with tempfile.TemporaryDirectory() as folder:
        drafter.save_pretrained(folder, max_shard_size=max_shard_size)
        return push_folder(folder, repo_id, **arguments)


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
        ValueError: no such id can be, or both a branch and a pull request were asked for.
        RuntimeError: the Hub refused, or could not be reached to the end.
    """
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("A pull request is opened against the main branch: give `revision` or `create_pr`, not both.")
    folder = Path(folder)
    contents: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for pattern in PUBLISHED for path in folder.glob(pattern)
    }
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        if card is None and "README.md" not in there and (folder / "README.md").exists():
            card = (folder / "README.md").read_text()
        if card is not None:
            contents["README.md"] = card.replace(HERE, repo_id).encode()
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
