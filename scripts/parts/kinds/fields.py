"""Fields of a new drafter's config, as `--config` gives them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from typing import Any


def given_fields(settings: list[str], known: type | Collection[str]) -> dict[str, Any]:
    """The fields of `--config FIELD=VALUE ...`. `known`: the class of the config, or the names of its fields.

    Raises:
        ValueError: there is no such field, or a value is no JSON.
    """
    names = inspect.signature(known).parameters.keys() - {"kwargs"} if isinstance(known, type) else known
    fields = {}
    for setting in settings:
        field, _, value = setting.partition("=")
        if field not in names:
            what = f"field of {known.__name__}" if isinstance(known, type) else f"one of {', '.join(sorted(known))}"
            raise ValueError(f"--config {setting}: {field!r} is no {what}.")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--config {setting}: expected FIELD=VALUE with a JSON value, as in a=3 b=true."
            ) from error
    return fields
