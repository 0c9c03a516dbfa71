"""Hidden states that the target had while it answered, kept beside its answers.

Training needs them, and to read the answers once more takes most of the time that it took to write them. Beside
answers-00000.jsonl there is states-00000.bin: 2 * S * d bytes a token (S states of width d, in bfloat16), and a row of
the former says with `states_at` where its tokens begin in the latter, counted in tokens.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from specformer.scripts.parts.answering import Answer
from specformer.scripts.parts.answers import Answers, states_file
from specformer.scripts.parts.kinds.student import ReadTarget
from specformer.scripts.parts.some_weights import STORED, some_weights

OF_WHAT = "states.json"
"""Beside them: the target and the layers whose states they are."""
OF_DTYPE_AND_PLACE = ("dtype", "torch_dtype", "_name_or_path", "transformers_version")
"""Fields of a config that may differ where the states are the same."""


def digest_of_target(target, layer_ids: Sequence[int]) -> str:
    """What tells the states of one target's layers from those of others: its config and some of its weights."""
    config = json.loads(target.config.to_json_string(use_diff=False), object_hook=without_dtype_and_place)
    digest = hashlib.sha256(json.dumps([list(layer_ids), config], sort_keys=True).encode())
    digest.update(some_weights(target))
    return digest.hexdigest()[:16]


def without_dtype_and_place(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name not in OF_DTYPE_AND_PLACE}


def begin_states(folder: Path, target, layer_ids: list[int]) -> None:
    """Note in a folder of answers whose states are kept there, or compare that with what was noted before.

    Raises:
        ValueError: the states that are there are those of others.
    """
    path, now = folder / OF_WHAT, {"target": digest_of_target(target, layer_ids), "target_layer_ids": layer_ids}
    if path.exists() and (there := json.loads(path.read_text(encoding="utf-8"))) != now:
        raise ValueError(
            f"{folder} holds hidden states of another target or of other layers ({there} there, {now} now). Name "
            "another folder, or leave out --store-hidden-states."
        )
    path.write_text(json.dumps(now) + "\n", encoding="utf-8")


class StatesWriter:
    """Appends the states of answers to a file. What an interruption left there without its answer stays unused.

    Args:
        answers: the file of the answers.
        size: values of one token, S * d.

    Raises:
        ValueError: states of answers that are there were lost: new ones would come to lie in their place.
    """

    def __init__(self, answers: Path, size: int):
        self.token = size * STORED.itemsize
        path, needed = states_file(answers), 0
        for line in answers.read_bytes().splitlines() if answers.exists() else ():
            if (at := (row := json.loads(line)).get("states_at")) is not None:
                needed = max(needed, at + len(row["prompt_ids"]) + len(row["response_ids"]))
        kept = path.stat().st_size // self.token if path.exists() else 0
        if kept < needed:
            raise ValueError(
                f"{path} holds states of {kept:,} tokens, and those of {needed:,} were written there: some were lost. "
                "Put the file back, name another folder, or leave out --store-hidden-states."
            )
        self.file = open(path, "ab")  # noqa: SIM115, closed by `close`
        self.file.truncate(self.file.tell() // self.token * self.token)
        self.at = self.file.seek(0, 2) // self.token

    def append(self, answer: Answer) -> Answer:
        """Write the states of `answer`, zeros for its last token, which the target has not read, and note where."""
        states = torch.cat([part.to(STORED) for part in answer.states])
        states = torch.cat([states, states.new_zeros(1, *states.shape[1:])])
        assert len(states) == len(answer.prompt_ids) + len(answer.response_ids)
        self.file.write(states.view(torch.uint8).numpy().tobytes())
        self.file.flush()
        answer.states_at, answer.states = self.at, []
        self.at += len(states)
        return answer

    def close(self) -> None:
        self.file.close()


class DistilledStates:
    """The states that lie beside `answers`, if they are of the layers and the target that `borrowed` has."""

    def __init__(self, answers: Answers, borrowed: ReadTarget):
        self.answers = answers
        self.files: dict[Path, torch.Tensor] = {}
        self.shape = len(borrowed.layer_ids), borrowed.text_config.hidden_size
        states_at = getattr(answers, "states_at", [])  # several answers that were put together have none
        self.usable = any(at is not None for _, at in states_at)
        if self.usable:
            path = (answers.source if answers.source.is_dir() else answers.source.parent) / OF_WHAT
            kept = json.loads(path.read_text(encoding="utf-8"))["target"] if path.exists() else None
            self.usable = kept == digest_of_target(borrowed.target, borrowed.layer_ids)
            if not self.usable:
                warnings.warn(
                    f"The hidden states in {answers.source} are those of another target or of other layers than "
                    f"{borrowed.layer_ids}, which this drafter reads: the answers are read anew.",
                    stacklevel=2,
                )

    def get(self, index: int) -> torch.Tensor | None:
        """States (T, S, d) of the text `index`; `None` where they were not kept."""
        path, at = self.answers.states_at[index] if self.usable else (None, None)
        if path is None or at is None:
            return None
        if path not in self.files:
            size = self.shape[0] * self.shape[1]
            count = path.stat().st_size // (STORED.itemsize * size) if path.exists() else 0  # whole tokens
            numbers = (
                torch.from_file(str(path), shared=False, size=count * size, dtype=STORED) if count else torch.empty(0)
            )
            self.files[path] = numbers.view(count, *self.shape)
        length = len(self.answers.rows[index][0])
        states = self.files[path][at : at + length]
        return states if len(states) == length else None
