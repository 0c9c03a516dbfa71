"""The target's answers as training data."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from specformer.scripts.parts.losses import IGNORED


class Answers(torch.utils.data.Dataset):
    """Prompts and answers as token ids; the labels cover the answers only.

    Args:
        source: a JSON-lines file of {"prompt_ids": [...], "response_ids": [...]}, or a folder with `answers-*.jsonl`,
            as `distill` writes it.
        max_length: tokens of one text; what is longer is cut.

    Attributes:
        prompt_ids: which prompt each row answers, where the file says so.
        states_at: the file of each row's hidden states and its first token's place there, `None` where there are none.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: a line that is none of that, or no answer at all; the message has file and line.
    """

    def __init__(self, source: Path, max_length: int):
        self.source = source
        self.rows: list[tuple[torch.Tensor, int]] = []  # tokens, and how many of them are the prompt
        self.prompt_ids: list[int | str | None] = []
        self.states_at: list[tuple[Path, int | None]] = []
        paths = sorted(source.glob("answers-*.jsonl")) if source.is_dir() else [source]
        if not paths:
            raise FileNotFoundError(f"{source} holds no answers-*.jsonl; make them with `specformer distill`.")
        for path in paths:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    row = parse(line, f"{path}, line {number}")
                    prompt, response = row["prompt_ids"], row["response_ids"]
                    if response and len(prompt) < max_length:
                        self.rows.append((torch.tensor((prompt + response)[:max_length]), len(prompt)))
                        self.prompt_ids.append(row.get("id"))
                        self.states_at.append((states_file(path), row.get("states_at")))
        if not self.rows:
            raise ValueError(f"{source} holds no answers.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels, (T,) each."""
        tokens, prompt_length = self.rows[index]
        labels = tokens.clone()
        labels[:prompt_length] = IGNORED
        return tokens, labels

    @property
    def num_answer_tokens(self) -> int:
        return sum(len(tokens) - prompt_length for tokens, prompt_length in self.rows)

    def those_answered(self, values: list) -> list:
        """Of what belongs to all prompts, what belongs to the prompt of each answer.

        Raises:
            ValueError: the answers are those of other prompts.
        """
        unknown = [name for name in self.prompt_ids if type(name) is not int or not 0 <= name < len(values)]
        if unknown:
            raise ValueError(
                f"{self.source} answers prompts {unknown[:3]}, and the prompts that were given are 0 to "
                f"{len(values) - 1}. Were the answers made by `specformer distill` from these prompts?"
            )
        return [values[index] for index in self.prompt_ids if isinstance(index, int)]

    def to_other_prompts(self, other: Answers) -> list[int]:
        """Which rows answer no prompt that `other` answers."""
        prompts = {tuple(tokens[:length].tolist()) for tokens, length in other.rows}
        return [row for row, (tokens, length) in enumerate(self.rows) if tuple(tokens[:length].tolist()) not in prompts]

    def token_counts(self, vocab_size: int) -> torch.Tensor:
        """How often each token occurs in the answers, (vocab_size,)."""
        return torch.cat([tokens[prompt:] for tokens, prompt in self.rows]).bincount(minlength=vocab_size)

    @staticmethod
    def collate(rows) -> dict[str, torch.Tensor]:
        """Right-pad to the longest row: causal attention never lets padding reach a real position.

        Rows are tokens, labels and, where they are stored, hidden states.
        """
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        tokens, labels, *hidden_states = zip(*rows, strict=True)
        return {
            "input_ids": pad(list(tokens)),
            "labels": pad(list(labels), padding_value=IGNORED),
            "attention_mask": pad([torch.ones_like(row) for row in tokens]),
            **({"hidden_states": pad(list(hidden_states[0]))} if hidden_states else {}),
        }


def states_file(answers: Path) -> Path:
    """Where the hidden states of a file of answers are, if `distill` kept them."""
    return answers.with_name(answers.stem.replace("answers-", "states-") + ".bin")


def parse(line: str, place: str) -> dict:
    """The row of a line.

    Raises:
        ValueError: it has no prompt or no answer of token ids.
    """
    try:
        row = json.loads(line)
        prompt, response = row["prompt_ids"], row["response_ids"]
        if not all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in (prompt, response)):
            raise TypeError("token ids are lists of integers")
        if not prompt:
            raise ValueError("a prompt has at least one token")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place}: expected {{'prompt_ids': [...], 'response_ids': [...]}}, got {line[:80]!r} "
            f"({type(error).__name__}: {error})."
        ) from error
    return row
