"""A folder of answers that several processes write to and go on with after an interruption: none is lost or made twice.

Each process appends whole lines to a file of its own, answers-00000.jsonl and so on, which it has locked as long as it
lives. Whatever ended a run before, what is there is read first, and a last line that was broken off is cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock, Timeout

from specformer.publishing_specformer import hub_id
from specformer.scripts.parts.answering import Answer
from specformer.scripts.parts.provenance import provenance
from specformer.scripts.parts.runs import begin_or_go_on

PATIENCE = 10
"""Seconds for which processes of a run that was killed may still be ending."""
WEIGHTS = "weights"
"""The setting that tells targets of one name apart; older folders do not have it."""


class AnswerFolder:
    """
    Args:
        path: begun already, or not.
        process: of accelerate, where several write.
    """

    def __init__(self, path: Path, process: PartialState | None = None):
        self.path = path
        self.is_main = process is None or process.is_main_process
        self.number: int = 0 if process is None else process.process_index
        self.count: int = 1 if process is None else process.num_processes
        self.wait: Callable[[], None] = (lambda: None) if process is None else process.wait_for_everyone

    @property
    def file(self) -> Path:
        """Where this process writes."""
        return self.path / f"answers-{self.number:05d}.jsonl"

    @contextmanager
    def missing(
        self, settings: dict, prompts: Iterable[int], prepare: Callable[[], None] = lambda: None
    ) -> Iterator[list[int]]:
        """Begin the folder or go on with it. Of `prompts`, by their ids, those without an answer that this process is
        to answer; nobody else may write its file inside.

        Args:
            settings: that decide about the answers.
            prepare: what else one process does with the folder first.

        Raises:
            ValueError: the folder was begun with other settings.
            FileExistsError: the folder holds something else.
            RuntimeError: another run is still writing to it.
        """
        there: set[int] = set()
        if self.is_main:
            begin_or_go_on(self.path, settings, where_noted=(WEIGHTS,))
            prepare()
            for lock in sorted(self.path.glob("*.lock")):
                with self._locked(lock):
                    pass
            there = self.there()
        self.wait()
        with self._locked(self.file.with_suffix(".lock")):
            there = there or self.there()
            self.wait()  # nobody writes before everybody has read
            yield [number for number in prompts if number not in there][self.number :: self.count]

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        try:
            with FileLock(path, timeout=PATIENCE):
                yield
        except Timeout as error:
            raise RuntimeError(
                f"{self.path} is written to by another run, whose lock is {path.name}. Wait until it has ended, or end "
                "it, and run the same command again."
            ) from error

    def there(self) -> set[int]:
        """Ids of the answers that are there. What an interruption left of a last line is cut off."""
        done: set[int] = set()
        for path in sorted(self.path.glob("answers-*.jsonl")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                with open(path, "r+b") as file:
                    file.truncate(len(whole))
            done.update(json.loads(line)["id"] for line in whole.splitlines())
        return done

    def write(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Write `answers` as they come, and pass each on once it is safe.

        Raises:
            RuntimeError: the disk is full, or the like; what to do.
        """
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                for answer in answers:
                    file.write(answer.to_json() + "\n")
                    file.flush()
                    yield answer
        except OSError as error:
            raise RuntimeError(
                f"{self.file} could not be written ({error}). The answers so far are safe; free some space and run the "
                "same command again."
            ) from error

    def write_card(self, module: str, facts: dict) -> None:
        """README.md: what `datasets` needs to know, and where the answers come from.

        Args:
            module: the script, as `python -m` takes it.
            facts: its settings, and what it measured.
        """
        answers = tokens = ended = 0
        for path in sorted(self.path.glob("answers-*.jsonl")):
            with open(path, encoding="utf-8") as file:
                for row in map(json.loads, file):
                    answers, tokens, ended = answers + 1, tokens + len(row["response_ids"]), ended + row["finished"]
        target = hub_id(facts["target"])
        lines = [
            "---",
            "configs:",
            "- config_name: default",
            '  data_files: "answers-*.jsonl"',
            "task_categories:",
            "- text-generation",
            "tags:",
            "- specformer",
            "- speculative-decoding",
            "---",
            f"# Answers of {f'[{target}](https://huggingface.co/{target})' if target else 'a target'}",
            "",
            f"{answers} answers, {tokens} tokens, {ended / max(1, answers):.1%} of them ended by the target itself. "
            "They are token ids, to train a drafter for speculative decoding of that model: `specformer train --data "
            "<this folder>`. The prompts have licences of their own.",
            "",
            "```json",
            json.dumps({**facts, **provenance(module)}, indent=2),
            "```",
        ]
        (self.path / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
