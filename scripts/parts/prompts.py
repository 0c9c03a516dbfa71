"""Read prompts from any jsonl file or `datasets` id, and encode them as left-padded chat batches."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from reprlib import repr as shown
from typing import TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from specformer.scripts.parts.prompt_rows import Prompt, prompt_of

Value = TypeVar("Value")

OUR_ARGUMENTS = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
OUR_ARGUMENTS -= {"tools", "documents"}
"""Those of a chat template that are not for the user to choose."""


# ---- reading


def read_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """Prompts of a jsonl file, or of the train split of a `datasets` id. See `read`."""
    return read(source, prompt_of, limit)


def read(source: str, read_row: Callable[[dict], Value], limit: int | None = None) -> list[Value]:
    """What `read_row` makes of the rows of a jsonl file, or of the train split of a `datasets` id or folder.

    Args:
        limit: read no more rows.

    Raises:
        ValueError: a row that is none, with its place, or no row at all.
        FileNotFoundError: `source` ends in .jsonl or .json and does not exist.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"The limit is {limit}; expected 1 or more, or none.")
    values = []
    for number, row in enumerate(islice(rows_of(source), limit)):
        try:
            values.append(read_row(object_of(row)))
        except ValueError as error:
            raise ValueError(f"{place(source, number)}: {error}") from None
    if not values:
        raise ValueError(f"{source} holds no prompts; expected at least one row.")
    return values


def is_file(source: str) -> bool:
    return Path(source).is_file() or Path(source).suffix in (".jsonl", ".json")


def rows_of(source: str) -> Iterable[bytes | dict]:
    """Lines of a file, up to the last that is not empty, or rows of a data set."""
    if is_file(source):
        return Path(source).read_bytes().rstrip().splitlines()
    from datasets import load_dataset

    return load_dataset(source, split="train", streaming=True)


def place(source: str, number: int) -> str:
    """Where prompt `number` stands, counted from 0. Lines are counted from 1, as editors do."""
    return f"{source}, line {number + 1}" if is_file(source) else f"{source}, row {number}"


def object_of(row: bytes | dict) -> dict:
    """The object that a line holds."""
    if isinstance(row, bytes):
        found = shown(row.decode(errors="replace")) if row.strip() else "an empty line"
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f'found {found}; expected a line of JSON such as {{"prompt": "Why is the sky blue?"}} '
                f"({getattr(error, 'msg', error)})."
            ) from None
    if not isinstance(row, dict):
        raise ValueError(f"found {shown(row)} ({type(row).__name__}); expected an object, {{...}}, on each line.")
    return row


# ---- encoding


def template_arguments(text: str) -> dict:
    """Arguments of a chat template, as an option of a command has them: a JSON object."""
    try:
        arguments = json.loads(text)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        example = '{"enable_thinking": false}'
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{example}', got {text!r}")
    if ours := OUR_ARGUMENTS & arguments.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(ours))} cannot be given: the command sets it by itself")
    return arguments


def encode(tokenizer, prompts: Sequence[Prompt], arguments: dict | None = None):
    """Chat-templated (where the tokenizer has a template), left-padded tensors: input_ids and attention_mask.

    Args:
        arguments: of the template.

    Raises:
        ValueError: a conversation that the template refuses, or that there is no template for.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        if several := [len(prompt) for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(
                f"found a conversation of {several[0]} messages, and the tokenizer has no chat template to write it "
                "with; expected one user message."
            )
        return tokenizer(prompts, padding=True, return_tensors="pt")
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    try:
        return tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True, **(arguments or {})
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"found what the tokenizer's chat template refuses ({error}).") from error


def encode_each(tokenizer, prompts: list[Prompt], source: str, arguments: dict | None = None) -> list[list[int]]:
    """Token ids of every prompt of `source`, without padding. Whatever `encode` might refuse later is refused here.

    Raises:
        ValueError: see `encode`, with the prompt's place; or an argument that the template does not read.
    """
    from tqdm import tqdm

    arguments = arguments or {}
    template = tokenizer.get_chat_template(tools=arguments.get("tools")) if tokenizer.chat_template else ""
    if unread := [name for name in arguments if not re.search(rf"\b{re.escape(name)}\b", template)]:
        raise ValueError(f"The tokenizer's chat template does not read {', '.join(unread)}; leave it out.")
    encoded = []
    for number, prompt in enumerate(tqdm(prompts, desc="tokenize")):
        try:
            encoded.append(encode(tokenizer, [prompt], arguments)["input_ids"][0].tolist())
            if not encoded[-1]:
                raise ValueError(f"found {shown(prompt)}, of which no tokens are left; expected some text.")
        except ValueError as error:
            raise ValueError(f"{place(source, number)}: {error}") from None
    return encoded
