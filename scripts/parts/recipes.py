"""Recipes: options of commands in a YAML file."""

from __future__ import annotations

import json
from pathlib import Path

import yaml


def read_recipe(path: Path) -> dict:
    """Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no YAML, or no mapping from options to values.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise ValueError(f"{path}: found {type(recipe).__name__}; expected lines such as `learning_rate: 1.0e-3`.")
    return recipe


def options_of(recipe: dict) -> list[str]:
    """The options as they stand on a command line. `true` is the option alone, a list its values one after the other,
    a mapping one value in JSON; what is null is left out."""
    options = []
    for name, value in recipe.items():
        if value is None:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        texts = [each if isinstance(each, str) else json.dumps(each) for each in values]
        options += [f"--{name.replace('_', '-')}", *texts]
    return options
