"""Training of a DFlash network (arXiv 2602.06036): blocks of [the known token, mask, mask, ...] behind many positions
of a text in one pass. Saved in z-lab's format."""

from __future__ import annotations

from typing import Any

import torch

from specformer.generation.drafter_dflash_network import DFlashNetwork
from specformer.generation.drafter_foreign_network import kinds_of_layers
from specformer.scripts.parts.kinds.foreign import ForeignStudent
from specformer.scripts.parts.kinds.groups import Groups
from specformer.scripts.parts.kinds.student import Drafts, with_something_to_draft
from specformer.scripts.parts.losses import slot_labels


class DFlashStudent(ForeignStudent):
    """See the module.

    Raises:
        ValueError: its drafts depend on more than the text (DSpark's Markov head), or its layers have a window.
    """

    kind, name, title = "dflash", "DFlashDraftModel", "DFlash"
    about = "a DFlash drafter in z-lab's format"
    switches = frozenset({"mask_token_id"})
    network: DFlashNetwork

    def __init__(self, network: DFlashNetwork, target, fields: dict | None = None):
        config = network.config
        super().__init__(network, target, config.num_draft_tokens, config.target_states, fields)
        if network.markov_head is not None or "sliding_attention" in kinds_of_layers(config.layers):
            raise ValueError(
                "This drafter has a Markov head or layers with a window, which decoding takes and training and "
                "--answers do not."
            )

    @classmethod
    def make_fields(cls, layers, drafted, states, num_draft_tokens, target, switches) -> dict[str, Any]:
        own = {} if drafted == layers["vocab_size"] else {"draft_vocab_size": drafted}
        return {
            "architectures": [cls.name],
            "model_type": "qwen3",
            **layers,
            **own,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "num_target_layers": target["num_hidden_layers"],
            "block_size": num_draft_tokens + 1,
            "dflash_config": {"target_layer_ids": [state - 1 for state in states], **switches},
        }

    @classmethod
    def gone_on_with(cls, fields, num_draft_tokens) -> dict[str, Any]:
        if num_draft_tokens is None:
            return fields
        config = cls.build_config(fields)
        return {**fields, "block_size": num_draft_tokens + config.block_size - config.num_draft_tokens}

    @classmethod
    def slots_of(cls, fields) -> int:
        return cls.build_config(fields).num_draft_tokens

    @classmethod
    def with_mask(cls, fields, token) -> dict[str, Any]:
        return {**fields, "dflash_config": {"mask_token_id": token, **fields["dflash_config"]}}

    @classmethod
    def of_fields(cls, network, target, fields) -> DFlashStudent:
        return cls(network, target, fields)

    def drafts(self, model, batch, position_share=1.0) -> Drafts:
        states, config = self.read_states(batch), self.network.config
        labels = slot_labels(batch["labels"], self.num_draft_tokens)
        wanted = with_something_to_draft(labels, position_share)
        groups, size = Groups.at(wanted, config.block_size), config.block_size
        length = states.shape[1]
        text = [
            (keys[groups.texts], values[groups.texts])
            for keys, values in self.network.read(states, torch.arange(length, device=states.device)[None])
        ]
        known = groups.of_texts(batch["input_ids"], groups.starts + 1)[..., None]  # (R, G, 1)
        masks = known.new_full((*known.shape[:2], size - 1), config.mask_token_id)
        tokens = torch.cat([known, masks], dim=2).flatten(1)
        given = model(
            self.embed(tokens), groups.places(size, 1), text, groups.visible(size, length), groups.own(size, False)
        )
        drafted = groups.taken(given)[:, size - self.num_draft_tokens :]
        return Drafts(drafted, labels[wanted], drafted)
