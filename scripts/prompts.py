"""Read prompts from any jsonl file or `datasets` id, and encode them as left-padded chat batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

FIELDS = ("prompt", "turns", "instruction", "question", "text")


def prompt_of(row: dict) -> str:
    """The prompt of one row: the first of `FIELDS` that it has; of several turns the first."""
    for field in FIELDS:
        if value := row.get(field):
            return value if isinstance(value, str) else value[0]
    raise ValueError(f"expected one of the fields {', '.join(FIELDS)}, found {', '.join(row) or 'none'}")


def task_of(row: dict) -> str:
    """What kind of prompt it is, where the row says so."""
    return row.get("task") or row.get("category") or "all"


def read_prompts(source: str, limit: int | None = None) -> list[str]:
    """Prompts of a jsonl file, or of the train split of a `datasets` id. See `read`."""
    return read(source, prompt_of, limit)


def read(source: str, read_row: Callable[[dict], str], limit: int | None = None) -> list[str]:
    """What `read_row` makes of the rows of a jsonl file, or of the train split of a `datasets` id.

    Raises:
        ValueError: a line that is no JSON object with a prompt; the message has file and line.
        FileNotFoundError: `source` ends in .jsonl or .json and does not exist.
    """
    values: list[str] = []
    path = Path(source)
    if path.exists() or path.suffix in (".jsonl", ".json"):
        with open(path) as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(values) == limit:
                    break
                try:
                    values.append(read_row(json.loads(line)))
                except (ValueError, AttributeError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
        return values
    from datasets import load_dataset

    for row in load_dataset(source, split="train", streaming=True):
        if limit is not None and len(values) == limit:
            break
        values.append(read_row(row))
    return values


def encode(tokenizer, prompts: list[str]):
    """Chat-templated (where the tokenizer has a template), left-padded tensors: input_ids and attention_mask."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        return tokenizer(prompts, padding=True, return_tensors="pt")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
