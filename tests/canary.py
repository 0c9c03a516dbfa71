"""Tests on the newest of everything, in the environment of `make canary`.

    python tests/canary.py -m pytest ...          # those of `FILES`, by `python -m pytest ...`
    python tests/canary.py --all -m pytest ...    # all of them

Says first what is newer than in constraints.txt, and last whether the tests passed with it. Where nothing is newer,
nothing is tested.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CONSTRAINTS = TESTS.parent / "constraints.txt"
FILES = {
    "test_exactness.py": "every family's text is plain generate()'s, greedy and sampled",
    "test_real_model.py": "a checkpoint and a tokenizer of the Hub",
    "test_targets.py": "targets as people load them: offloaded, quantised, with adapters, compiled",
    "test_multimodal.py": "models that also read images",
    "test_target_config.py": "configs of all causal LMs",
    "test_arguments.py": "every argument of generate()",
    "test_processors.py": "every logits processor",
    "test_outputs.py": "what generate() returns",
    "test_drafters.py": "assistants and prompt lookup",
    "test_entry_points.py": "custom_generate, which runs as remote code",
    "test_loading.py": "from_pretrained",
    "test_hub.py": "to the Hub and back",
    "test_demo.py": "what `make demo` runs",
    "test_versions.py": "warnings about names that will go",
    "test_datasets.py": "how `datasets` tells functions apart",
    "test_cli.py": "typer, accelerate and the Trainer: from prompts to a drafter that is evaluated",
}
"""What depends on what others release, and how. All else computes with torch alone or is prose; in a few minutes this
tells what is worth a look, and `make canary ALL=yes` looks at everything."""


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
    if command[0] == "--all":
        _, *command = command
    else:
        command = [*command, *(str(TESTS / name) for name in FILES)]
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
