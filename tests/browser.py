"""The browser in which the Space is tested: one that is installed, or Debian's, which this installs.

    python tests/browser.py     # says which it is, and ends with 0 in any case

Where none can be had this says so, and the browser's tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
SECONDS = 120
"""For an installation. On a machine that can reach a mirror it takes a fraction of that."""
APT = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet=2"]
COMMANDS = [[*APT, "update"], [*APT, "install", "--yes", "--no-install-recommends", "chromium-headless-shell"]]


def find() -> str | None:
    """The program of the browser that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def install() -> str | None:
    """The browser that is there afterwards, if there is one: as root, or where sudo asks for no password."""
    until = time.monotonic() + SECONDS
    for command in COMMANDS:
        command = command if os.geteuid() == 0 else ["sudo", "--non-interactive", *command]
        try:
            left = max(1.0, until - time.monotonic())
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
        else:
            said = (done.stderr or done.stdout).strip() if done.returncode else ""
        if said:
            print(f"browser: {' '.join(command)} did not work: {said.splitlines()[-1]}", file=sys.stderr)
            break
    return find()


if __name__ == "__main__":
    print(f"browser: {find() or install() or 'none can be had, so the tests of the Space in a browser are skipped'}")
