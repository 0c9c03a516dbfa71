"""The plan of generation/: its rooms, what is in them, and which imports which.

`python tests/house.py` writes docs/house.md from the files themselves.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATION = ROOT / "generation"
PAGE = ROOT / "docs" / "house.md"
ROOMS = {
    "generate": "the entry: what a call does, from top to bottom",
    "decoding": "the loop, on one screen: draft, verify, accept, commit",
    "call": "what a call says: its settings, what is refused, the drafter that it means, its statistics",
    "drafter": "the contract of drafters, and those that are there",
    "draft_length": "how many tokens a round drafts",
    "accept": "which tokens are taken: rules, sampling, processors",
    "text": "what is written, and where rows stop",
    "proposal": "what a drafter proposes",
    "target": "the target's passes, and what is found out about it",
    "prompt": "where the tokens of padded prompts are, and which rows read theirs together",
    "backend": "what belongs to torch, transformers, the machine and the process",
    "cache": "keys, values and states of rows that have lengths of their own",
    "ranks": "one target in several processes: what the first of them decides, and tells the others",
    "argument": "what a caller passed, in messages",
}
"""From the entry down. A room is the beginning of its files' names; none imports from one that is above it, in the
picture."""


def room_of(name: str) -> str:
    """The longest room that `name`, a module's, begins with.

    Raises:
        KeyError: there is none.
    """
    rooms = [room for room in ROOMS if name == room or name.startswith(room + "_")]
    if not rooms:
        raise KeyError(f"generation/{name}.py is in no room: its name should begin with one of {', '.join(ROOMS)}.")
    return max(rooms, key=len)


def imports() -> dict[str, set[str]]:
    """Module -> the modules of generation/ that it imports."""
    return {
        file.stem: {
            node.module
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        }
        for file in sorted(GENERATION.glob("*.py"))
    }


def between_rooms() -> dict[str, set[str]]:
    """Room -> the other rooms that its modules import from."""
    rooms: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, imported in imports().items():
        rooms[room_of(module)] |= {room_of(other) for other in imported}
    return {room: others - {room} for room, others in rooms.items()}


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Some nodes of `graph` of which each leads to the next, and the last one to the first; `None`: there are none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return None
        for other in sorted(graph[node]):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in graph if (found := visit(node, []))), None)


def needed(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows of a graph without circles, but those that go without saying, because a longer way leads there."""

    def reached(node: str) -> set[str]:
        return graph[node].union(*map(reached, graph[node]))

    return [
        (node, other)
        for node, others in graph.items()
        for other in sorted(others)
        if not any(other in reached(between) for between in others)
    ]


def first_sentence(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.sub(r"\s+", " ", text.partition("\n\n")[0]).strip()


def page() -> str:
    lines = [
        "# The house: what is where in `generation/`",
        "",
        "Written by `python tests/house.py`. A file's name begins with its room; one concept is in a file.",
        "",
        "Which rooms import from which, with arrows left out that a longer way replaces:",
        "",
        "```mermaid",
        "graph TD",
        *(f"    {node} --> {other}" for node, other in needed(between_rooms())),
        "```",
        "",
    ]
    files = sorted(GENERATION.glob("*.py"))
    for room, what in ROOMS.items():
        lines += [f"**{room}**: {what}", ""]
        for file in files:
            if room_of(file.stem) == room:
                lines.append(f"- [{file.name}](../generation/{file.name}): {first_sentence(file)}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
