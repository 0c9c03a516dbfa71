"""How many tokens to draft."""

from __future__ import annotations


def requested_draft_length(requested, generation_configs: list, default: int, most: int) -> int:
    """Draft tokens a round: the caller's number, else the first generation config that has one, else the drafter's
    default; at most as many as the drafter can.

    Raises:
        ValueError: a negative number, or none at all.
    """
    for value in (requested, *(getattr(config, "num_assistant_tokens", None) for config in generation_configs)):
        if value is not None:
            break
    else:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"num_assistant_tokens is {value!r}; expected an integer: 0 for plain decoding, otherwise how many tokens "
            f"to draft each round (this drafter can draft {most})."
        )
    return min(value, most)


def round_draft_length(num_assistant_tokens: int, shortest: int, max_new_tokens: int) -> int:
    """Draft tokens of one round: none that even the `shortest` running row has no room for."""
    return max(0, min(num_assistant_tokens, max_new_tokens - shortest - 1))
