"""Targets whose positions come from a table, which ends: learned embeddings, or sines computed once."""

from __future__ import annotations

from torch import nn

OFFSETS = (0, 1, 2)
"""Entries that some families keep in front of the first position (OPT: two)."""


def positions_in_table(model) -> int | None:
    """How many positions `model` can tell, where it looks them up in a table; `None` where it computes them.

    Plain generate() fails at the end of a table, and not before a text gets there: drafts must not reach past it.
    """
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "max_position_embeddings", None)
    if not isinstance(count, int):
        return None
    sizes = {count + offset for offset in OFFSETS}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():
            if module.num_embeddings in sizes:
                return count
        elif any(buffer.ndim > 1 and sizes & {*buffer.shape} for buffer in module.buffers(recurse=False)):
            return count
    return None
