"""The network of a Falcon drafter (arXiv 2412.12639), in a format of its own: EAGLE-3's, with a block size.

    at each of the last k positions, as in an EAGLE-3 network, the target's states and the token that comes next
        -> one decoder layer, causal over the text, in which the positions of a block see one another
        -> at each of them the state k positions further, and of that the logits of the token after it

So a step drafts k tokens from the k before, and what it gives is what the next step reads. With k = 1 it is an EAGLE-3
network. The paper's has an LSTM in front of the layer, this one has none, and its target states are EAGLE-3's.
"""

from __future__ import annotations

from dataclasses import dataclass

from .drafter_eagle_network import EagleConfig, EagleNetwork

MOST_IN_BLOCK = 16


@dataclass
class FalconConfig(EagleConfig):
    """As `EagleConfig`, and `block_size`: tokens that a step drafts."""

    block_size: int = 2

    @classmethod
    def from_dict(cls, config: dict, where: str) -> FalconConfig:
        """
        Raises:
            ValueError: a field that is needed is missing, or its value is of no use.
        """
        parsed = super().from_dict(config, where)
        assert isinstance(parsed, cls)
        size = config.get("block_size")
        if type(size) is not int or not 0 < size <= MOST_IN_BLOCK:
            raise ValueError(f"{where}: block_size is {size!r}; expected a whole number from 1 to {MOST_IN_BLOCK}.")
        parsed.block_size = size
        return parsed


class FalconNetwork(EagleNetwork):
    """See the module."""

    kind = "Falcon"
    config: FalconConfig
