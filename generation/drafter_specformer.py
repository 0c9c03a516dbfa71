"""The SpecFormer network as a drafter."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from .accept_tokens import BestDrafts
from .backend_graphs import run_pass
from .backend_linear import fast_linears
from .cache_ragged import RaggedCache
from .drafter import Drafter, Prompts, Verified
from .drafter_dtype import in_dtype
from .drafter_states import UnreadStates, read_prompts
from .drafter_tree import best_first
from .proposal import Proposal
from .target import FIRST_CAPACITY


class SpecFormerDrafter(Drafter):
    """A SpecFormer network on one target: context states of all read tokens, drafts from each row's last one only.

    Args:
        network: a SpecFormerModel. It is moved to the device of the target's LM head; where its dtype is another one
            than the target's, a copy in that dtype is used.
        target: the model it drafts for.
    """

    proposes_known_tokens = proposes_trees = can_rewind = True
    sources = ("network",)

    def __init__(self, network, target):
        self.borrowed = network.borrow(target)
        with torch.inference_mode(False):  # weights that move inside it could not be trained any more
            self.network = in_dtype(network.to(self.borrowed.device), target.dtype)
        self.max_draft_tokens = network.config.num_draft_tokens
        self.default_num_assistant_tokens = network.config.default_num_assistant_tokens
        self.hidden_state_layers = network.config.target_layer_ids

    def __enter__(self):
        self._attached = fast_linears(self.network, self.borrowed.rows)
        self._attached.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._attached.__exit__(*exception)

    def begin(self, prompts: Prompts) -> None:
        device = self.borrowed.device
        layout, newest = prompts.layout.to(device), prompts.first_tokens.to(device)  # (B, 1)
        limit = prompts.max_length - prompts.input_ids.shape[1] + layout.longest
        capacity = min(layout.longest + FIRST_CAPACITY, limit)
        cache = RaggedCache(1, layout.lengths, layout.longest, capacity, limit)
        contexts, order = [], []
        for read in read_prompts(prompts, device):
            prompt_cache = DynamicCache()
            # plain causal attention keeps the padding, which comes after the text, out
            states = self.network.encode_context(
                read.states, self._anchors(read.next_tokens), past_key_values=prompt_cache
            )
            cache.load(read.rows, prompt_cache, read.columns)
            contexts.append(states[torch.arange(len(states), device=device), read.lengths - 1])
            order.append(read.rows)
        context = torch.cat(contexts)[torch.cat(order).argsort()]  # (B, d)
        self.begin_behind(cache, context, newest)

    def begin_behind(self, cache: RaggedCache, context: torch.Tensor, newest: torch.Tensor) -> None:
        """Begin with what was read already: the context layer's cache of B rows, their context states (B, d), and the
        tokens after (B, 1)."""
        self.cache, self.context, self.newest = cache, context, newest
        self.rows = torch.arange(len(newest), device=newest.device)
        self.longest = cache.longest
        self.unread = UnreadStates(self.borrowed.device)

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        self._read()

        def slots(context: torch.Tensor, newest: torch.Tensor) -> tuple[torch.Tensor]:
            # torch multiplies what lies apart row by row, with the head's weights copied for each of them
            return (self._draft(context, newest)[:, :num_tokens].contiguous(),)  # (R, k, d)

        def drafts(context: torch.Tensor, newest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return choose_drafts(self.network, self.borrowed, slots(context, newest)[0], newest, choose)

        inputs = self.context, self.newest
        if isinstance(choose, BestDrafts):  # nothing but tensors, so that one pass can be made of it all
            return Proposal(*run_pass(self.cache, 0, ("drafts", num_tokens), drafts, *inputs))
        (states,) = run_pass(self.cache, 0, ("slots", num_tokens), slots, *inputs)
        return Proposal(*choose_drafts(self.network, self.borrowed, states, self.newest, choose))

    @torch.no_grad()
    def propose_tree(self, num_tokens, tree_size, chances) -> Proposal:
        self._read()

        def slots(context: torch.Tensor, newest: torch.Tensor) -> tuple[torch.Tensor]:
            return (self._draft(context, newest)[:, :num_tokens].contiguous(),)

        (states,) = run_pass(self.cache, 0, ("slots", num_tokens), slots, self.context, self.newest)
        config = self.network.config
        places = self.borrowed.candidates(states, config.num_candidates)  # (R, k, C)

        def candidates(slot: int, tokens: torch.Tensor, _) -> tuple[torch.Tensor, torch.Tensor]:
            state, place = states[:, slot, None].expand(-1, tokens.shape[1], -1), places[:, slot, None]
            if config.previous_token_rank is not None:
                state = self.network.previous_token_correction(state, embed(self.borrowed, tokens))
            logits = self.borrowed.candidate_logits(state, place)  # (R, w, C)
            ids = self.borrowed.tokens_at(place).expand(logits.shape)
            return ids, chances(logits, slot, ids, confidence_after(self.network, slot, state, logits))

        return best_first(self.newest, num_tokens, tree_size, candidates)

    def _draft(self, context: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
        """States of all slots of every row, (R, D, d), from context states (R, d) and the `newest` tokens (R, 1)."""
        config, seen = self.network.config, {}
        anchors = embed(self.borrowed, newest)[:, 0] if config.anchor_slot else None
        if config.draft_attends_context:
            positions = self.cache.lengths[:, None] - 1  # (R, 1), of the context states
            mask = self.cache.mask(positions)
            seen = dict(position_ids=positions, attention_mask=mask, past_key_values=self.cache)
        return self.network.draft(context, anchors, **seen)

    def update(self, verified: Verified) -> None:
        # Read when there is a proposal to make, in one pass.
        self.newest, self.longest = verified.newest(self.newest), verified.longest
        self.unread.add(verified)
        if self.unread.is_full:
            self._read()

    def select_rows(self, index, longest) -> None:
        index = index.to(self.context.device)
        self.unread.select_rows(index)
        self.cache.select_rows(index, longest)
        self.longest = longest
        self.context, self.newest, self.rows = self.context[index], self.newest[index], self.rows[: len(index)]

    def mark(self):
        self._read()
        return self.cache.lengths, self.cache.longest, self.context, self.newest, self.longest

    def rewind(self, mark) -> None:
        self.cache.lengths, self.cache.longest, self.context, self.newest, self.longest = mark
        self.unread = UnreadStates(self.borrowed.device)

    def _read(self) -> None:
        """Context states of the tokens that the target has read since the last proposal."""
        if not self.unread:
            return
        of_one_round = len(self.unread.rounds) == 1
        hidden_states, tokens, counts = self.unread.take()
        width = tokens.shape[1]

        def read(hidden_states, tokens, counts, context) -> tuple[torch.Tensor]:
            positions = self.cache.prepare(width)
            states = self.network.encode_context(
                hidden_states, self._anchors(tokens), positions, self.cache.mask(positions), self.cache
            )
            newest = states[self.rows, (counts - 1).clamp(min=0)]  # (R, d)
            return (torch.where(counts[:, None] > 0, newest, context),)

        inputs = hidden_states, tokens, counts, self.context
        if of_one_round:
            (self.context,) = run_pass(self.cache, width, ("read",), read, *inputs)
        else:  # of any width, which may never come up again
            (self.context,) = read(*inputs)
        self.cache.advance(counts, self.longest)

    def _anchors(self, next_tokens: torch.Tensor) -> torch.Tensor | None:
        return embed(self.borrowed, next_tokens) if self.network.config.use_anchor_token else None


def choose_drafts(
    network, borrowed, states: torch.Tensor, newest: torch.Tensor, choose
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draft tokens (R, k) for the states (R, k, d) of the slots after the `newest` tokens (R, 1), and how likely each
    is accepted once those in front of it are (R, k), where the network has a head for it.

    With `previous_token_rank` slot by slot: the best candidates of each are scored again, knowing the token in front.
    """
    config = network.config
    if config.previous_token_rank is None:
        logits = borrowed.draft_logits(states)
        tokens = choose(logits, token_ids=borrowed.draft_token_ids)
        if config.confidence_head:
            logits = logits.topk(min(config.num_candidates, logits.shape[-1])).values  # (R, k, C)
    else:
        places = borrowed.candidates(states, config.num_candidates)  # (R, k, C)
        tokens, corrected, scored = [newest], [], []
        for slot, (state, place) in enumerate(zip(states.split(1, dim=1), places.split(1, dim=1), strict=True)):
            corrected.append(network.previous_token_correction(state, embed(borrowed, tokens[-1])))
            scored.append(borrowed.candidate_logits(corrected[-1], place))  # (R, 1, C)
            tokens.append(choose(scored[-1], ahead=slot, token_ids=borrowed.tokens_at(place)))
        tokens, states, logits = (torch.cat(parts, dim=1) for parts in (tokens[1:], corrected, scored))
    confidences = None
    if config.confidence_head:
        confidences = network.confidence_head(states, logits).float().sigmoid()
    return tokens, confidences


def confidence_after(network, slot: int, states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
    """How likely the best candidate of a slot is the target's best token, after each of w beginnings that are right:
    (R, w), by the slot's states (R, w, d) after each, and logits (R, w, C); `None` where the network has no head for
    it. The head has learnt this of the likeliest beginnings."""
    if not network.config.confidence_head:
        return None
    return network.confidence_head(states, logits, slot).float().sigmoid()


def embed(borrowed, tokens: torch.Tensor) -> torch.Tensor:
    return borrowed.embed(tokens.clamp(min=0))  # after a wrong draft there may be no token
