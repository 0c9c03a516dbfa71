"""Training of an EAGLE-3 network (arXiv 2503.01840): the steps of drafting, one after the other, behind many positions
of a text, each from the network's own state of the step before (training-time test). Saved in speculators' format.

The tokens in front of a slot are the true ones, in training as in the evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from specformer.generation.drafter_eagle import EagleDrafter, states_read
from specformer.generation.drafter_eagle_network import EagleNetwork
from specformer.scripts.parts.kinds.foreign import ForeignStudent
from specformer.scripts.parts.kinds.groups import Groups
from specformer.scripts.parts.kinds.speculators import (
    SWITCHES,
    speculative_tokens,
    speculators_fields,
    with_speculative_tokens,
)
from specformer.scripts.parts.kinds.student import Drafts, with_something_to_draft
from specformer.scripts.parts.losses import slot_labels


class EagleStudent(ForeignStudent):
    """See the module."""

    kind, name, title = "eagle3", "Eagle3Speculator", "EAGLE-3"
    about = "an EAGLE-3 drafter in speculators' format"
    algorithm = "eagle3"
    switches = SWITCHES
    most_draft_tokens = EagleDrafter.max_draft_tokens
    slots_side_by_side = 1
    """Of a group, in one pass."""
    network: EagleNetwork

    def __init__(self, network: EagleNetwork, target, num_draft_tokens: int, fields: dict | None = None):
        super().__init__(network, target, num_draft_tokens, states_read(network, target), fields)

    @classmethod
    def make_fields(cls, layers, drafted, states, num_draft_tokens, target, switches) -> dict[str, Any]:
        if wrong := [name for name in SWITCHES & switches.keys() if type(switches[name]) is not bool]:
            raise ValueError(f"--config {wrong[0]} is {switches[wrong[0]]!r}; expected true or false.")
        if switches.get("norm_before_fc") and switches.get("fc_norm"):
            raise ValueError("--config norm_before_fc and fc_norm were both given; the format has one of them at most.")
        fields = speculators_fields(cls.algorithm, cls.name, layers, drafted, states, num_draft_tokens, target)
        return {**fields, **switches}

    @classmethod
    def gone_on_with(cls, fields, num_draft_tokens) -> dict[str, Any]:
        return with_speculative_tokens(fields, num_draft_tokens)

    @classmethod
    def slots_of(cls, fields) -> int:
        return min(speculative_tokens(fields, 4), cls.most_draft_tokens)

    def drafts(self, model, batch, position_share=1.0) -> Drafts:
        states = self.read_states(batch)
        labels = slot_labels(batch["labels"], self.num_draft_tokens)
        wanted = with_something_to_draft(labels, position_share)
        groups = Groups.at(wanted, self.slots_side_by_side)
        cache = DynamicCache()
        next_tokens = functional.pad(batch["input_ids"][:, 1:], (0, 1))
        positions = torch.arange(states.shape[1], device=states.device)[None]
        given = model(self.network.fuse(states), self.embed(next_tokens), positions, cache)  # (B, T, d)
        of_rows = DynamicCache()
        of_texts: Any = cache.layers[0]
        of_rows.update(of_texts.keys[groups.texts], of_texts.values[groups.texts], 0)
        first = groups.of_texts(given, groups.starts)  # (R, G, d)
        drafted = self.network.norm(self.behind(groups, first, next_tokens, of_rows, states.shape[1]))
        return Drafts(drafted, labels[wanted], drafted)

    def behind(
        self, groups: Groups, first: torch.Tensor, next_tokens: torch.Tensor, cache: DynamicCache, length: int
    ) -> torch.Tensor:
        """What the network gives for all slots of the groups, (N, D, d).

        Args:
            first: for the first slot, (R, G, d).
            next_tokens: the token after each of the texts, (B, T).
            cache: keys and values of the `length` tokens of each row's text.
        """
        state, steps = first, [groups.taken(first)]
        seen, own = groups.visible(1, length), groups.own(1, causal=True)
        for step in range(1, self.num_draft_tokens):
            seen = torch.cat([seen, own.expand(len(seen), 1, -1, -1)], dim=-1)  # its group's slot of each step
            places = groups.places(1, step)
            before = self.network.norm(state) if self.network.config.norm_output else state
            embeds = self.embed(groups.of_texts(next_tokens, places))
            state = self.network(before, embeds, places, cache, seen)
            steps.append(groups.taken(state))
        return torch.cat(steps, dim=1)
