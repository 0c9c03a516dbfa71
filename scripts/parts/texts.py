"""Texts as token ids, from files of any kind that has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


def read_texts(source: Path) -> Iterator[list[int]]:
    """The texts of a folder that `distill` wrote, prompts in front of answers; of a JSON-lines file of such rows, of
    {"input_ids": [...]} or of lists of ids; or the one text of a NumPy file (.npy) of one dimension.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: what holds no token ids; the message has file and line.
    """
    paths = sorted(source.glob("answers-*.jsonl")) if source.is_dir() else [source]
    if not paths:
        raise FileNotFoundError(f"{source} holds no answers-*.jsonl; make them with `specformer distill`.")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; expected a folder of `specformer distill`, or a file.")
        if path.suffix == ".npy":
            yield read_array(path)
            continue
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield ids_of(line, f"{path}, line {number}")


def read_array(path: Path) -> list[int]:
    import numpy

    try:
        ids = numpy.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no NumPy file, or damaged ({error}).") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (len(ids) and ids.min() < 0):
        raise ValueError(f"{path} holds {ids.dtype} of shape {ids.shape}; expected one dimension of token ids.")
    return ids.tolist()


def ids_of(line: str, place: str) -> list[int]:
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            row = row["input_ids"] if "input_ids" in row else [*row["prompt_ids"], *row["response_ids"]]
        if not isinstance(row, list) or not all(type(token) is int and token >= 0 for token in row):
            raise TypeError("token ids are lists of integers from 0 on")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place}: expected {{'prompt_ids': [...], 'response_ids': [...]}}, {{'input_ids': [...]}} or [...], got "
            f"{line[:80]!r} ({type(error).__name__}: {error})."
        ) from error
    return row
