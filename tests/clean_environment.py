"""Hides every installed package but torch, transformers and what these two require.

A program that begins with the text of this file sees what a virtual environment of these two alone would show it:
other packages can neither be imported nor found. `HIDDEN` are the names of their modules.
"""

import re
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.metadata import (
    DistributionFinder,
    MetadataPathFinder,
    PackageNotFoundError,
    packages_distributions,
    requires,
)

from packaging.requirements import Requirement


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def required_by(*names: str) -> set[str]:
    """The distributions `names`, and those that they require here, without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = normal(waiting.pop())
        if name in found:
            continue
        try:
            requirements = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
        found.add(name)
        waiting += [each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


KEPT = required_by("torch", "transformers")
HIDDEN = {module for module, names in packages_distributions().items() if not KEPT & {normal(name) for name in names}}


class Hiding:
    """Finds what Python finds on sys.path, if it is not hidden."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(context=DistributionFinder.Context()):  # noqa: B008
        return (found for found in MetadataPathFinder.find_distributions(context) if normal(found.name) in KEPT)

    invalidate_caches = PathFinder.invalidate_caches


if __name__ == "__main__":  # not where a test only asks what is required
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Hiding]  # those of editable installs too are gone
