"""How many tokens to draft."""

from __future__ import annotations


def requested_draft_length(requested, generation_configs: list) -> int | None:
    """Draft tokens a round: the caller's number, else the first generation config that has one, else `None`.

    Raises:
        ValueError: a negative number, or none at all.
    """
    candidates = (requested, *(getattr(config, "num_assistant_tokens", None) for config in generation_configs))
    value = next((candidate for candidate in candidates if candidate is not None), None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(
            f"num_assistant_tokens is {value!r}; expected an integer: 0 for plain decoding, otherwise how many tokens "
            "to draft each round."
        )
    return value


def round_draft_length(num_assistant_tokens: int, shortest: int, max_new_tokens: int) -> int:
    """Draft tokens of one round: none that even the `shortest` running row has no room for."""
    return max(0, min(num_assistant_tokens, max_new_tokens - shortest - 1))
