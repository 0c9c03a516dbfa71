"""What a caller passed: as a number, and by its name, in messages."""

from __future__ import annotations

import operator


def whole_number(value) -> int | None:
    """`value` as a Python integer, `None` where it is none: NumPy's and torch's are, booleans and floats are not."""
    value = getattr(value, "tolist", lambda: value)()  # a boolean of torch would pass for an integer
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def name_of(thing) -> str:
    """Of a function, a class, or an object's class: with its module."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
