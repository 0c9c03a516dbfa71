"""What all processes that share a target must have been given alike, compared before the first token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import nn

from .argument import name_of
from .ranks import shared_ranks

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes of a number; int64 above


def check_agreement(prompts: list[torch.Tensor | None], settings: list, drafts) -> None:
    """Compare what a call was given over the processes that share its target, if there are such. All of them raise.

    Args:
        prompts: token ids and mask, (B, P) each.
        settings: of the call. Of objects that JSON cannot say, nor they themselves as a dictionary, the class counts.
        drafts: the call's `DraftSettings`.

    Raises:
        ValueError: something differs; the message says what, and where.
    """
    ranks = shared_ranks()
    if ranks is None:
        return
    numbers = dict(vars(drafts))
    drafting = numbers.pop("assistant_model")
    parts = {
        "other prompts": [None if prompt is None else prompt.tolist() for prompt in prompts],
        "other settings": [*settings, numbers],
        f"another drafter, or other weights in it ({name_of(drafting)}),": [name_of(drafting), *weights_of(drafting)],
    }
    ours = torch.tensor([fingerprint(part) for part in parts.values()], device=ranks.device)
    differs = ours != ranks.broadcast(ours.clone())
    table = torch.zeros(ranks.size, len(parts), dtype=torch.long, device=ranks.device)
    table[ranks.rank] = differs
    found = ranks.largest(table).tolist()
    for part, name in enumerate(parts):
        if others := [str(rank) for rank, row in enumerate(found) if row[part]]:
            where = f"rank{'s' * (len(others) > 1)} {', '.join(others)}"
            raise ValueError(
                f"The target's weights are shared by several processes, and {where} had {name} than the first one. "
                "Its passes are made by all of them together: expected the same call in each, with the same prompts, "
                "settings and drafter. (A drafter that is made without a checkpoint is random: load it from one.)"
            )


def fingerprint(part) -> int:
    """64 bits of what `part` is in JSON."""

    def as_json(thing):
        return thing.to_dict() if hasattr(thing, "to_dict") else name_of(thing)

    text = json.dumps(part, skipkeys=True, default=as_json)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def weights_of(drafting) -> list:
    """Of every weight in `drafting` that is whole here its name, shape and dtype, and the sum of its bits."""
    return [
        [name, list(weight.shape), str(weight.dtype), sum_of_bits(weight)]
        for module in modules_in(drafting)
        for name, weight in (*module.named_parameters(), *module.named_buffers())
        if type(weight.data) is torch.Tensor and not weight.is_meta  # of a model that is shared as well each has a part
    ]


def sum_of_bits(weight: torch.Tensor) -> int:
    numbers = weight.detach().flatten().view(INTEGERS.get(weight.element_size(), torch.int64))
    return int(numbers.sum(dtype=torch.int64))


def modules_in(thing, depth: int = 3) -> Iterator[nn.Module]:
    """The models that `thing` is, or keeps: what drafts may be made of several."""
    if isinstance(thing, nn.Module):
        yield thing
    elif depth and not isinstance(thing, type):
        for value in vars(thing).values() if hasattr(thing, "__dict__") else ():
            yield from modules_in(value, depth - 1)
