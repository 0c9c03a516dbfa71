"""A Falcon network as a drafter: k tokens a step, from the network's own states at the k before."""

from __future__ import annotations

import torch

from .drafter import Prompts
from .drafter_eagle import EagleDrafter, of_rows
from .drafter_falcon_network import FalconNetwork
from .drafter_states import read_prompts
from .proposal import Proposal


class FalconDrafter(EagleDrafter):
    """It reads the target's states as an EAGLE-3 drafter does; the arguments are the same.

    A block ends at the last token that the target has read, wherever that is. The tokens of a text's blocks see one
    another, but keys and values of one layer do not depend on that: so those of the text stay as they are, and a round
    begins with a pass over its last k tokens, which writes nothing that stays.

    Attributes:
        last: the target's fused states at these tokens (R, k, d), and the tokens after each of them (R, k); the first
            token again where a text has fewer.
    """

    network: FalconNetwork

    def __init__(self, network: FalconNetwork, target):
        super().__init__(network, target)
        self.block_size = network.config.block_size

    @torch.no_grad()
    def begin(self, prompts: Prompts) -> None:
        super().begin(prompts)
        states, tokens, order = [], [], []
        for read in read_prompts(prompts, self.device):
            place = (read.lengths[:, None] - self.block_size + self.in_block()).clamp(min=0)
            rows = torch.arange(len(place), device=self.device)[:, None]
            states.append(self.network.fuse(read.states[:, :, self.order][rows, place]))
            tokens.append(read.next_tokens[rows, place])
            order.append(read.rows)
        back = torch.cat(order).argsort()
        self.last = torch.cat(states)[back], torch.cat(tokens)[back]
        self.is_new = True  # whether the block has to be read

    def in_block(self) -> torch.Tensor:
        return torch.arange(self.block_size, device=self.device)

    @torch.no_grad()
    def read(self) -> None:
        super().read()
        if not self.is_new:
            return
        (states, tokens), rows = self.last, len(self.last[1])
        depths = (self.in_block() - self.block_size).expand(rows, -1)
        seen = torch.zeros(rows, self.block_size, self.block_size, dtype=torch.bool, device=self.device)
        positions = self.cache.prepare(self.block_size, depths, seen)  # of the text alone, which has these tokens
        mask = self.cache.mask(positions)
        self.state = self.network(states, self.embed(tokens), positions.clamp(min=0), self.cache, mask)
        self.is_new = False

    def read_round(self, states, tokens, counts, positions) -> None:
        fused = self.network.fuse(states)
        self.network(fused, self.embed(tokens), positions, self.cache, self.cache.mask(positions))
        place = counts[:, None] + self.in_block()
        self.last = (
            of_rows(torch.cat([self.last[0], fused], dim=1), place),
            torch.cat([self.last[1], tokens], dim=1).gather(1, place),
        )
        self.is_new = True

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        self.read()
        states, size = self.state, self.block_size
        drafts: list[torch.Tensor] = []
        for ahead in range(0, num_tokens, size):
            if ahead:
                depths = torch.arange(ahead, device=self.device).expand(len(states), -1)
                seen = torch.ones(len(states), size, ahead, dtype=torch.bool, device=self.device)
                states = self.step(states, drafts[-1].to(self.device), depths, seen)
            logits = self.network.lm_head(self.network.norm(states[:, : num_tokens - ahead]))
            drafts.append(choose(logits, ahead=ahead, token_ids=self.draft_token_ids))  # (R, k)
        return Proposal(torch.cat(drafts, dim=1))

    def select_rows(self, index, longest) -> None:
        super().select_rows(index, longest)
        index = index.to(self.device)
        self.last = self.last[0][index], self.last[1][index]
