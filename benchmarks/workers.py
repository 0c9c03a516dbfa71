"""Processes that generate what they are asked for: one JSON object a line, in and out."""

from __future__ import annotations

import json
import os
import subprocess


class Worker:
    """A process of `command`, with `environment` besides that of this one. The first line that it writes says what it
    is: `about`.

    Raises:
        RuntimeError: it ended.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None):
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.about = self.read()

    def ask(self, **task) -> dict:
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self.process.wait()}; see what it printed above.")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
