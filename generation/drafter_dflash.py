"""A DFlash or DSpark network as a drafter: all slots of a block in one pass, which sees the target's states of the text
as keys and values of its own layers."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from .backend_graphs import run_pass
from .backend_linear import fast_linears
from .cache_ragged import RaggedCache
from .drafter import Drafter, Prompts, Verified
from .drafter_dflash_network import DFlashNetwork
from .drafter_dtype import in_dtype
from .drafter_states import UnreadStates, read_prompts
from .proposal import Proposal
from .target import FIRST_CAPACITY
from .target_head import embed_tokens, logits_of_head
from .target_refusals import input_device


class DFlashDrafter(Drafter):
    """
    Args:
        network: moved to the target's device; where its dtype is another one, a copy in the target's is used.
        target: the model that it drafts for.

    Raises:
        ValueError: it is the drafter of another model.
    """

    proposes_known_tokens = True

    def __init__(self, network: DFlashNetwork, target):
        check_fit(network, target)
        self.target, self.device = target, input_device(target)
        with torch.inference_mode(False):  # weights that move inside it could not be trained any more
            self.network = in_dtype(network.to(self.device), target.dtype)
        self.network.rotate_on(self.device)
        config = network.config
        self.max_draft_tokens = config.num_draft_tokens
        self.default_num_assistant_tokens = min(4, config.num_draft_tokens)
        self.hidden_state_layers = sorted(set(config.target_states))
        self.order = [self.hidden_state_layers.index(layer) for layer in config.target_states]
        self.draft_token_ids = self.network.draft_token_ids

    def __enter__(self):
        self._attached = fast_linears(self.network)
        self._attached.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._attached.__exit__(*exception)

    @torch.no_grad()
    def begin(self, prompts: Prompts) -> None:
        layout = prompts.layout.to(self.device)
        limit = prompts.max_length - prompts.input_ids.shape[1] + layout.longest
        capacity = min(layout.longest + FIRST_CAPACITY, limit)
        self.cache = RaggedCache(len(self.network.layers), layout.lengths, layout.longest, capacity, limit)
        for read in read_prompts(prompts, self.device):
            prompt_cache = DynamicCache()
            for number, (keys, values) in enumerate(self.network.read(read.states[:, :, self.order], read.columns)):
                prompt_cache.update(keys, values, number)
            self.cache.load(read.rows, prompt_cache, read.columns)
        self.newest, self.longest = prompts.first_tokens.to(self.device), self.cache.longest
        self.unread = UnreadStates(self.device)

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        self._read()
        (states,) = run_pass(self.cache, 0, ("slots", num_tokens), self._slots(num_tokens), self.newest)
        if self.network.markov_head is None:
            tokens = choose(self._logits(states), token_ids=self.draft_token_ids)
            return Proposal(tokens, self._confidences(states, None))
        return self._one_by_one(states, choose)

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
            states = self.network(self._embed(torch.cat([newest, masks], dim=1)), positions, text, visible)
            return (states[:, :num_tokens].contiguous(),)

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

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embeddings = self.network.embed_tokens or self.target.get_input_embeddings()
        return embed_tokens(embeddings, tokens, self.network.config.scales_embeddings).to(self.device)

    def update(self, verified: Verified) -> None:
        self.newest, self.longest = verified.newest(self.newest), verified.longest
        self.unread.add(verified)
        if self.unread.is_full:
            self._read()

    @torch.no_grad()
    def _read(self) -> None:
        """Keys and values of the tokens that the target has read since the last proposal."""
        if not self.unread:
            return
        states, tokens, counts = self.unread.take()
        positions = self.cache.prepare(tokens.shape[1])
        for layer, (keys, values) in zip(
            self.cache.ragged_layers, self.network.read(states[:, :, self.order], positions), strict=True
        ):
            layer.update(keys, values)
        self.cache.advance(counts, self.longest)

    def select_rows(self, index, longest) -> None:
        index = index.to(self.device)
        self.unread.select_rows(index)
        self.cache.select_rows(index, longest)
        self.newest, self.longest = self.newest[index], longest


def check_fit(network: DFlashNetwork, target) -> None:
    """
    Raises:
        ValueError: `network` reads states, or knows tokens, that `target` does not have.
    """
    config, theirs = network.config, target.config.get_text_config(decoder=True)
    name, problems = target.name_or_path or type(target).__name__, []
    if config.target_hidden_size != theirs.hidden_size:
        problems.append(f"hidden_size is {theirs.hidden_size} there and {config.target_hidden_size} here")
    if max(config.target_states) > theirs.num_hidden_layers:
        problems.append(f"it has {theirs.num_hidden_layers} layers, and state {max(config.target_states)} is read")
    if config.mask_token_id >= target.get_input_embeddings().weight.shape[0] and network.embed_tokens is None:
        problems.append(f"it has no embedding of the mask token {config.mask_token_id}")
    ids = network.draft_token_ids
    if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < theirs.vocab_size:
        problems.append(f"it has {theirs.vocab_size} tokens, and token {int(ids.max())} is drafted")
    if problems:
        raise ValueError(
            f"This DFlash drafter does not fit {name}: {'; '.join(problems)}. Pass the drafter of this target."
        )
