"""The fast tests on the newest of everything, in the environment of `make canary`.

    python tests/canary.py -m pytest ...    # `python -m pytest ...`, where anything is newer than in constraints.txt

Says first what is newer, and last whether the tests passed with it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def pinned(file: Path = CONSTRAINTS) -> dict[str, str]:
    """The version of every package in a file of constraints, by its normal name."""
    pins = (line.split("==") for line in file.read_text(encoding="utf-8").split() if "==" in line)
    return {normal(name): version for name, version in pins}


def differences(installed: dict[str, str], pins: dict[str, str]) -> list[str]:
    """What of `installed` is not as it is pinned, in words. "2.13.0+cpu" is 2.13.0."""
    return [
        f"{name} {version} ({f'pinned: {pins[name]}' if name in pins else 'not pinned'})"
        for name, version in sorted(installed.items())
        if version.split("+")[0] != pins.get(name)
    ]


def main(command: list[str]) -> int:
    installed = {normal(each.name): each.version for each in distributions()}
    others = differences({name: installed[name] for name in installed.keys() - {"pip", "specformer"}}, pinned())
    if not others:
        print("canary: nothing is newer than in constraints.txt, so there is nothing to test.")
        return 0
    print("canary: testing with", ", ".join(others), "and all else as in constraints.txt", flush=True)
    status = subprocess.run([sys.executable, *command]).returncode
    print("canary:", "FAILED" if status else "passed", "with", ", ".join(others))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
