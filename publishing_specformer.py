"""A drafter's folder as a complete Hub repository: what `save_pretrained` adds to weights and config, and the push.

transformers copies the files that config.json's `auto_map` names. A drafter is of no use without its generation
strategy (`custom_generate/`), and a repository without a model card is found by nobody.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers.dynamic_module_utils import get_cached_module_file
from transformers.utils import HF_MODULES_CACHE

from .configuration_specformer import SpecFormerConfig

STRATEGY = "custom_generate"
WRITTEN = "<!-- written by specformer -->"
"""A card without this line was written by a person, and is left alone."""
PUBLISHED = [
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "*.py",
    f"{STRATEGY}/*.py",
    "training.json",
]
"""What a push sends, and the card. Nothing else that lies in a folder leaves the machine."""


def card_head(config: SpecFormerConfig, license: str | None = None) -> str:
    """The metadata that the Hub reads, between its dashes."""
    lines = ["---", "library_name: transformers"]
    lines += [f"license: {license}"] if license else []
    if config.target_name_or_path:
        lines += [f"base_model: {config.target_name_or_path}", "base_model_relation: adapter"]
    tags = (STRATEGY, "speculative-decoding", "specformer")
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags:", *(f"  - {tag}" for tag in tags), "---"])


def short_card(config: SpecFormerConfig) -> str:
    """README.md of a drafter that nothing is known of but its config."""
    target = config.target_name_or_path or "its target"
    return f"""{card_head(config)}
{WRITTEN}

# SpecFormer drafter for {target}

Drafts tokens for `generate` of {target}, which verifies them: the text does not change. How it was trained and what it
comes to has not been written down.

```python
drafter = AutoModel.from_pretrained("<this repository>", trust_remote_code=True)
output = target.generate(
    **inputs, assistant_model=drafter, custom_generate=drafter.name_or_path, trust_remote_code=True
)
```
"""


def strategy_files(drafter) -> list[Path]:
    """The files of the generation strategy that belong to this code: of the installed package, or of the repository
    that `drafter` was loaded from as remote code."""
    package = Path(__file__).parent / "generation"
    if (package / "generate.py").exists():
        return sorted(package.glob("*.py"))
    repository, revision = drafter.name_or_path, getattr(drafter.config, "_commit_hash", None)
    try:
        file = get_cached_module_file(repository, f"{STRATEGY}/generate.py", revision=revision)
    except OSError as error:
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


def push(
    drafter,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    card: str | None = None,
):
    """Send a complete repository in one commit: all of it arrives, or nothing.

    A README.md that is there stays, unless `card` is given. Pushing the same again makes no commit.

    Args:
        repo_id: where to; made if it does not exist.
        revision: branch; made if it does not exist.
        card: text of README.md.

    Returns:
        What huggingface_hub says of the commit.

    Raises:
        RuntimeError: the Hub could not be reached to the end. The repository is as it was.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        has_card = api.file_exists(repo_id, "README.md", revision=revision)
        with tempfile.TemporaryDirectory() as folder:
            drafter.save_pretrained(folder, max_shard_size=max_shard_size)
            if card is not None:
                Path(folder, "README.md").write_text(card)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=PUBLISHED + (["README.md"] if card is not None or not has_card else []),
                commit_message=commit_message or "Upload SpecFormer drafter",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
    except (HfHubHTTPError, ConnectionError, OSError) as error:
        raise RuntimeError(
            f"The drafter could not be pushed to {repo_id} ({type(error).__name__}: {error}). Nothing of it is there, "
            "since a push is one commit. Check the token and the connection, and push again."
        ) from error
