"""Output folders of long runs: begun once, gone on with after an interruption, never mixed up."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

SETTINGS = "settings.json"
"""Written when a run begins, and never again."""


def begin_or_go_on(folder: Path, settings: dict, where_noted: Collection[str] = ()) -> bool:
    """Note the settings that decide about a run, or compare them with those that began the folder. One that was not
    known then was None, but for those of `where_noted`, which are compared only where they were noted.

    Returns:
        Whether the folder had been begun before.

    Raises:
        ValueError: the settings differ.
        FileExistsError: the folder holds something else.
    """
    path = folder / SETTINGS
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        different = "; ".join(
            f"{name}: {before.get(name)!r} there, {value!r} now"
            for name, value in json.loads(json.dumps(settings)).items()
            if before.get(name) != value and (name in before or name not in where_noted)
        )
        if different:
            raise ValueError(
                f"{folder} was begun with other settings ({different}). Name another folder, or repeat the settings to "
                "go on."
            )
        return True
    temporary = folder / ".settings.json"
    if folder.exists() and any(path != temporary for path in folder.iterdir()):
        raise FileExistsError(f"{folder} exists and was not made by this script; name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do when `path` cannot be written. torch and safetensors report a full disk each in its own way."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"{path} could not be written ({error}). What was there before is safe; free some space and run the same "
            "command again."
        ) from error
