"""A DFlash or DSpark network as a drafter: all slots of a block in one pass, which sees the target's states of the text
as keys and values of its own layers."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from .backend_graphs import run_pass
from .drafter import Prompts, Verified
from .drafter_dflash_network import DFlashNetwork
from .drafter_foreign import ForeignDrafter
from .drafter_states import read_prompts
from .drafter_tree import best_first
from .proposal import Proposal
from .target_head import embed_tokens, logits_of_head

CANDIDATES = 16
"""Tokens after each that come into question for a tree."""


class DFlashDrafter(ForeignDrafter):
    """The arguments are those of `ForeignDrafter`, but for the states: the config names them."""

    network: DFlashNetwork
    proposes_trees = True
    of_rows = ("newest",)

    def __init__(self, network: DFlashNetwork, target):
        super().__init__(network, target, network.config.target_states)
        self.max_draft_tokens = network.config.num_draft_tokens
        self.default_num_assistant_tokens = min(4, self.max_draft_tokens)

    @torch.no_grad()
    def begin(self, prompts: Prompts) -> None:
        self.begin_cache(prompts, len(self.network.layers))
        for read in read_prompts(prompts, self.device):
            prompt_cache = DynamicCache()
            for number, (keys, values) in enumerate(self.network.read(read.states[:, :, self.order], read.columns)):
                prompt_cache.update(keys, values, number)
            self.cache.load(read.rows, prompt_cache, read.columns)
        self.newest = prompts.first_tokens.to(self.device)

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        self.read()
        (states,) = run_pass(self.cache, 0, ("slots", num_tokens), self._slots(num_tokens), self.newest)
        if self.network.markov_head is None:
            tokens = choose(self._logits(states), token_ids=self.draft_token_ids)
            return Proposal(tokens, self._confidences(states, None))
        return self._one_by_one(states, choose)

    @torch.no_grad()
    def propose_tree(self, num_tokens, tree_size, chances) -> Proposal:
        self.read()
        (states,) = run_pass(self.cache, 0, ("slots", num_tokens), self._slots(num_tokens), self.newest)
        every, head = self._logits(states), self.network.markov_head

        def candidates(slot: int, tokens: torch.Tensor, _) -> tuple[torch.Tensor, torch.Tensor]:
            logits = every[:, slot, None].expand(-1, tokens.shape[1], -1)  # (R, w, V')
            if head is not None:
                previous = embed_tokens(head.markov_w1, tokens.clamp(min=0), scaled=False)
                bias = head(states[:, slot, None].expand(-1, tokens.shape[1], -1), previous)
                logits = logits[..., : bias.shape[-1]] + bias
            best, places = logits.topk(min(CANDIDATES, logits.shape[-1]))
            ids = places if self.draft_token_ids is None else self.draft_token_ids[places]
            return ids, chances(best, slot, ids)

        return best_first(self.newest, num_tokens, tree_size, candidates)

    def _slots(self, num_tokens: int):
        """A pass over the block after the `newest` tokens (R, 1), whose result are states (R, num_tokens, d)."""

        def slots(newest: torch.Tensor) -> tuple[torch.Tensor]:
            config, lengths = self.network.config, self.cache.lengths[:, None]
            masks = newest.new_full((len(newest), config.block_size - 1), config.mask_token_id)
            positions = lengths + torch.arange(config.block_size, device=self.device)
            text = [
                (layer.keys[:, :, : layer.kv_length], layer.values[:, :, : layer.kv_length])
                for layer in self.cache.ragged_layers
            ]
            visible = self.cache.mask(lengths - 1)
            states = self.network(self.embed(torch.cat([newest, masks], dim=1)), positions, text, visible)
            first = config.block_size - config.num_draft_tokens
            return (states[:, first : first + num_tokens].contiguous(),)

        return slots

    def _one_by_one(self, states: torch.Tensor, choose) -> Proposal:
        """Each slot's token with the bias of the one in front of it."""
        head, tokens, confidences = self.network.markov_head, [self.newest], []
        assert head is not None
        for slot, (state, logits) in enumerate(
            zip(states.split(1, dim=1), self._logits(states).split(1, dim=1), strict=True)
        ):
            previous = embed_tokens(head.markov_w1, tokens[-1], scaled=False)
            confidences.append(self._confidences(state, previous))
            bias = head(state, previous)
            logits = logits[..., : bias.shape[-1]]  # the target may have tokens that were added to it
            tokens.append(choose(logits + bias, ahead=slot, token_ids=self.draft_token_ids))
        told = [part for part in confidences if part is not None]
        return Proposal(torch.cat(tokens[1:], dim=1), torch.cat(told, dim=1) if told else None)

    # A tree is not ordered by these: they are learnt as the overlap of two distributions, which sampled drafts live by,
    # and say nothing of one candidate beside another.
    def _confidences(self, states: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor | None:
        """How likely each draft is accepted, (R, k), by states (R, k, d) and the embeddings of the tokens in front."""
        if self.network.confidence_head is None:
            return None
        if self.network.config.confidence_reads_token and previous is not None:
            states = torch.cat([states, previous], dim=-1)
        return self.network.confidence_head.proj(states)[..., 0].float().sigmoid()

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        head = self.network.lm_head
        return (logits_of_head(self.target, states) if head is None else head(states)).to(self.device)

    def update(self, verified: Verified) -> None:
        self.newest = verified.newest(self.newest)
        super().update(verified)

    def read_round(self, states, tokens, counts, positions) -> None:
        of_layers = zip(self.cache.ragged_layers, self.network.read(states, positions), strict=True)
        for layer, (keys, values) in of_layers:
            layer.update(keys, values)

    def select_rows(self, index, longest) -> None:
        super().select_rows(index, longest)
        self.newest = self.newest[index.to(self.device)]
