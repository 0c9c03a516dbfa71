"""Prompts that ask for a piece of code again with a small change, of this package's own files: a task full of copies.

    python -m benchmarks.edit_prompts --output edit.jsonl

A function or class of each file of generation/, to be given back with another name.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES, MOST_CHARACTERS = range(18, 41), 1500
"""Of a piece: a function or class."""


def first_piece(path: Path) -> tuple[str, str] | None:
    """Name and text of the first function or class of a file that is neither short nor long."""
    source = path.read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
            piece = "\n".join(lines)
            if len(lines) in LINES and len(piece) <= MOST_CHARACTERS:
                return node.name, piece
    return None


def prompts() -> list[str]:
    found = []
    for name, piece in filter(None, map(first_piece, sorted((ROOT / "generation").glob("*.py")))):
        new = f"compute_{name}" if name[0].islower() else f"My{name}"
        found.append(
            f"Rename `{name}` to `{new}` in this Python code, and give back all of it, otherwise unchanged:\n\n"
            f"```python\n{piece}\n```"
        )
    return found


def main(arguments: argparse.Namespace) -> None:
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts()]
    arguments.output.write_text("".join(rows), encoding="utf-8")
    print(f"{len(rows)} prompts in {arguments.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="jsonl file")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
