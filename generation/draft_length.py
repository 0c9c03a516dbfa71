"""How many tokens to draft."""

from __future__ import annotations


def check_draft_length(value, name: str = "num_assistant_tokens") -> None:
    """
    Raises:
        ValueError: a negative number, or none at all. `None` is well: nobody asked.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(
            f"{name} is {value!r}; expected an integer: 0 for plain decoding, otherwise how many tokens to draft each "
            "round."
        )


def round_draft_length(num_assistant_tokens: int, shortest: int, limit: int) -> int:
    """Draft tokens of one round: none that even the `shortest` running row has no room for below `limit`."""
    return max(0, min(num_assistant_tokens, limit - shortest - 1))
