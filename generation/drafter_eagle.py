"""An EAGLE-3 network as a drafter: one token after the other, each from the network's own state at the one before; or
several at each place, as a tree (EAGLE-2, arXiv 2406.16858, section 4)."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from .drafter import Prompts
from .drafter_eagle_network import EagleNetwork
from .drafter_foreign import ForeignDrafter
from .drafter_states import read_prompts
from .drafter_tree import best_first
from .proposal import Proposal

CANDIDATES = 16
"""Tokens after each that come into question for a tree."""
CONTINUED = 8
"""Tokens of a slot that are continued there, the likeliest."""


class EagleDrafter(ForeignDrafter):
    """The arguments are those of `ForeignDrafter`, but for the states: the config names them, or they are those that
    SafeAILab's drafters read.

    Attributes:
        block_size: tokens that a step drafts, s.
        state: of each row, what the network gives at the last s tokens that the target has read, (R, s, d).
    """

    network: EagleNetwork
    max_draft_tokens = 16
    proposes_trees = True
    block_size = 1
    of_rows = ("state",)

    def __init__(self, network: EagleNetwork, target):
        super().__init__(network, target, states_read(network, target))

    @torch.no_grad()
    def begin(self, prompts: Prompts) -> None:
        self.begin_cache(prompts, 1, more_slots=CONTINUED * self.max_draft_tokens)
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

    @torch.no_grad()
    def propose_tree(self, num_tokens, tree_size, chances) -> Proposal:
        """Step by step: the likeliest paths through what a step drafted are each continued by the next one, all in one
        pass, whose keys and values stay for the steps after it."""
        self.read()
        rows, size, width = len(self.state), self.block_size, min(CONTINUED, tree_size)
        states = self.state[:, None]  # of the last step's blocks (R, b, s, d)
        block = self.cache.lengths.new_zeros(rows, 1)  # by which each token was drafted, (R, w)
        paths = block.new_empty(rows, 1, 0)  # of each token through its block, (R, w, up to s)
        depths, seen = (
            paths[:, 0],
            paths.bool(),
        )  # of all that was read (R, n), and what each block sees of it (R, b, n)

        def candidates(slot: int, tokens: torch.Tensor, follows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal states, block, paths, depths, seen
            device = self.device
            if slot:
                tokens, follows = tokens.to(device), follows.to(device)
                block = block.gather(1, follows)
                paths = torch.cat([of_rows(paths, follows), tokens[..., None]], dim=2)
            if slot and slot % size == 0:
                count = tokens.shape[1]
                own = torch.eye(count, dtype=torch.bool, device=device).repeat_interleave(size, dim=1)
                seen = torch.cat([of_rows(seen, block), own.expand(rows, -1, -1)], dim=2)
                depth = torch.arange(slot - size, slot, device=device).repeat(count)
                depths = torch.cat([depths, depth.expand(rows, -1)], dim=1)
                before = of_rows(states.flatten(2), block).view(rows, count * size, -1)
                given = self.step(before, paths.flatten(1), depths, seen.repeat_interleave(size, dim=1))
                states = given.unflatten(1, (count, size))
                block = torch.arange(count, device=device).expand(rows, -1)
                paths = paths[..., :0]
            here = of_rows(states[:, :, slot % size], block)
            logits = self.network.lm_head(self.network.norm(here))
            best, places = logits.topk(min(CANDIDATES, logits.shape[-1]))
            ids = places if self.draft_token_ids is None else self.draft_token_ids[places]
            return ids, chances(best, slot, ids)

        return best_first(self.cache.lengths[:, None], num_tokens, tree_size, candidates, width)

    def step(
        self, states: torch.Tensor, tokens: torch.Tensor, depths: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """What the network gives (R, q, d) at drafted `tokens` (R, q), from what it gave before each of them. `depths`
        and `seen` as in `RaggedCache.prepare`: the tokens are the last of those that were drafted."""
        positions = self.cache.prepare(tokens.shape[1], depths, seen)
        before = self.network.norm(states) if self.network.config.norm_output else states
        return self.network(before, self.embed(tokens), positions, self.cache, self.cache.mask(positions))

    def read_round(self, states, tokens, counts, positions) -> None:
        fused, mask = self.network.fuse(states), self.cache.mask(positions, self.network.window)
        given = self.network(fused, self.embed(tokens), positions, self.cache, mask)
        newest = given.gather(1, (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, given.shape[2]))
        self.state = torch.where(counts[:, None, None] > 0, newest, self.state)

    def select_rows(self, index, longest) -> None:
        super().select_rows(index, longest)
        self.state = self.state[index.to(self.device)]


def of_rows(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What each row has at its `places` (R, w): (R, n, d) -> (R, w, d)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))


def states_read(network: EagleNetwork, target) -> list[int]:
    """Which of the target's hidden states it reads."""
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    return network.config.target_states or [min(2, layers), layers // 2, max(layers - 3, 0)]
