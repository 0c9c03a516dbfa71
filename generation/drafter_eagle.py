"""An EAGLE-3 network as a drafter: one token after the other, each from the network's own state at the one before."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from .drafter import Prompts
from .drafter_eagle_network import EagleNetwork
from .drafter_foreign import ForeignDrafter
from .drafter_states import read_prompts
from .proposal import Proposal


class EagleDrafter(ForeignDrafter):
    """The arguments are those of `ForeignDrafter`, but for the states: the config names them, or they are those that
    SafeAILab's drafters read.

    Attributes:
        state: of each row, what the network gives at the last token that the target has read, (R, 1, d).
    """

    network: EagleNetwork
    max_draft_tokens = 16
    of_rows = ("state",)

    def __init__(self, network: EagleNetwork, target):
        super().__init__(network, target, states_read(network, target))

    @torch.no_grad()
    def begin(self, prompts: Prompts) -> None:
        self.begin_cache(prompts, 1)
        states, order = [], []
        for read in read_prompts(prompts, self.device):
            prompt_cache = DynamicCache()
            fused = self.network.fuse(read.states[:, :, self.order])
            given = self.network(fused, self.embed(read.next_tokens), read.columns, prompt_cache)
            self.cache.load(read.rows, prompt_cache, read.columns)
            states.append(given[torch.arange(len(given), device=self.device), read.lengths - 1])
            order.append(read.rows)
        self.state = torch.cat(states)[torch.cat(order).argsort()][:, None]

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        self.read()
        lengths, longest, state, drafts = self.cache.lengths, self.cache.longest, self.state, []
        for ahead in range(num_tokens):
            normed = self.network.norm(state)
            logits = self.network.lm_head(normed)
            drafts.append(choose(logits, ahead=ahead, token_ids=self.draft_token_ids))  # (R, 1)
            if ahead + 1 < num_tokens:
                positions = self.cache.prepare(1)
                mask = self.cache.mask(positions, self.network.window)
                before = normed if self.network.config.norm_output else state
                state = self.network(before, self.embed(drafts[-1]), positions, self.cache, mask)
                self.cache.advance(torch.ones_like(lengths), self.cache.longest + 1)
        self.cache.advance(lengths - self.cache.lengths, longest)
        return Proposal(torch.cat(drafts, dim=1))

    def read_round(self, states, tokens, counts, positions) -> None:
        fused, mask = self.network.fuse(states), self.cache.mask(positions, self.network.window)
        given = self.network(fused, self.embed(tokens), positions, self.cache, mask)
        newest = given.gather(1, (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, given.shape[2]))
        self.state = torch.where(counts[:, None, None] > 0, newest, self.state)

    def select_rows(self, index, longest) -> None:
        super().select_rows(index, longest)
        self.state = self.state[index.to(self.device)]


def states_read(network: EagleNetwork, target) -> list[int]:
    """Which of the target's hidden states it reads."""
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    return network.config.target_states or [min(2, layers), layers // 2, max(layers - 3, 0)]
