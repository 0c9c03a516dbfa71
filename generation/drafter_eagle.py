"""An EAGLE-3 network as a drafter: one token after the other, each from the network's own state at the one before."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from .backend_linear import fast_linears
from .cache_ragged import RaggedCache
from .drafter import Drafter, Prompts, Verified
from .drafter_dtype import in_dtype
from .drafter_eagle_network import EagleNetwork
from .drafter_states import UnreadStates, read_prompts
from .proposal import Proposal
from .target import FIRST_CAPACITY
from .target_head import embed_tokens
from .target_refusals import input_device


class EagleDrafter(Drafter):
    """
    Args:
        network: moved to the target's device; where its dtype is another one, a copy in the target's is used.
        target: the model that it drafts for.

    Attributes:
        state: of each row, what the network gives at the last token that the target has read, (R, 1, d).

    Raises:
        ValueError: it is the drafter of another model.
    """

    proposes_known_tokens = True
    max_draft_tokens = 16

    def __init__(self, network: EagleNetwork, target):
        theirs = target.config.get_text_config(decoder=True)
        layers = theirs.num_hidden_layers
        wanted = network.config.target_states or [min(2, layers), layers // 2, max(layers - 3, 0)]
        check_fit(network, target, wanted)
        self.target, self.device = target, input_device(target)
        with torch.inference_mode(False):  # weights that move inside it could not be trained any more
            self.network = in_dtype(network.to(self.device), target.dtype)
        self.network.rotate_on(self.device)
        self.hidden_state_layers = sorted(set(wanted))
        self.order = [self.hidden_state_layers.index(layer) for layer in wanted]
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
        self.cache = RaggedCache(1, layout.lengths, layout.longest, capacity, limit)
        states, order = [], []
        for read in read_prompts(prompts, self.device):
            prompt_cache = DynamicCache()
            fused = self.network.fuse(read.states[:, :, self.order])
            given = self.network(fused, self._embed(read.next_tokens), read.columns, prompt_cache)
            self.cache.load(read.rows, prompt_cache, read.columns)
            states.append(given[torch.arange(len(given), device=self.device), read.lengths - 1])
            order.append(read.rows)
        self.state = torch.cat(states)[torch.cat(order).argsort()][:, None]
        self.unread, self.longest = UnreadStates(self.device), self.cache.longest

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        self._read()
        lengths, longest, state, drafts = self.cache.lengths, self.cache.longest, self.state, []
        for ahead in range(num_tokens):
            normed = self.network.norm(state)
            logits = self.network.lm_head(normed)
            drafts.append(choose(logits, ahead=ahead, token_ids=self.draft_token_ids))  # (R, 1)
            if ahead + 1 < num_tokens:
                positions = self.cache.prepare(1)
                mask = self.cache.mask(positions)
                before = normed if self.network.config.norm_output else state
                state = self.network(before, self._embed(drafts[-1]), positions, self.cache, mask)
                self.cache.advance(torch.ones_like(lengths), self.cache.longest + 1)
        self.cache.advance(lengths - self.cache.lengths, longest)
        return Proposal(torch.cat(drafts, dim=1))

    def update(self, verified: Verified) -> None:
        self.longest = verified.longest
        self.unread.add(verified)
        if self.unread.is_full:
            self._read()

    @torch.no_grad()
    def _read(self) -> None:
        """What the target has read since the last proposal, in the place of what was drafted."""
        if not self.unread:
            return
        states, tokens, counts = self.unread.take()
        positions = self.cache.prepare(tokens.shape[1])
        given = self.network(
            self.network.fuse(states[:, :, self.order]),
            self._embed(tokens),
            positions,
            self.cache,
            self.cache.mask(positions),
        )
        newest = given.gather(1, (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, given.shape[2]))
        self.state = torch.where(counts[:, None, None] > 0, newest, self.state)
        self.cache.advance(counts, self.longest)

    def select_rows(self, index, longest) -> None:
        index = index.to(self.device)
        self.unread.select_rows(index)
        self.cache.select_rows(index, longest)
        self.state, self.longest = self.state[index], longest

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embeddings = self.network.embed_tokens or self.target.get_input_embeddings()
        return embed_tokens(embeddings, tokens, scaled=False).to(self.device)


def check_fit(network: EagleNetwork, target, wanted: list[int]) -> None:
    """
    Raises:
        ValueError: `network` reads states, or knows tokens, that `target` does not have.
    """
    theirs, problems = target.config.get_text_config(decoder=True), []
    if network.config.target_hidden_size != theirs.hidden_size:
        problems.append(f"hidden_size is {theirs.hidden_size} there and {network.config.target_hidden_size} here")
    if max(wanted) > theirs.num_hidden_layers:
        problems.append(f"it has {theirs.num_hidden_layers} layers, and state {max(wanted)} is read")
    ids = network.draft_token_ids
    last = network.config.draft_vocab_size - 1 if ids is None else int(ids.max())
    if last >= theirs.vocab_size or (ids is not None and int(ids.min()) < 0):
        problems.append(f"it has {theirs.vocab_size} tokens, and token {last} is drafted")
    if problems:
        raise ValueError(
            f"This EAGLE-3 drafter does not fit {target.name_or_path or type(target).__name__}: {'; '.join(problems)}. "
            "Pass the drafter of this target."
        )
