"""The SpecFormer network as a drafter."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache

from .accept_tokens import BestDrafts
from .backend_graphs import run_pass
from .backend_linear import fast_linears
from .backend_packed import row_sums
from .cache_ragged import RaggedCache
from .drafter import Drafter, Prompts, Verified
from .proposal import Proposal
from .target import FIRST_CAPACITY

MOST_UNREAD = 32
"""Positions of a row, of rounds without a proposal, after which the target's hidden states are read anyway, since they
take memory."""


_converted: WeakKeyDictionary = WeakKeyDictionary()
"""network -> its copy in another dtype, and the weights that it was made of, as far as `marks_of` tells them."""
_converted_lock = threading.Lock()


def in_dtype(network, dtype: torch.dtype):
    """`network` itself, or its copy in `dtype`, which is kept for the next call."""
    if network.dtype == dtype:
        return network
    made_of = dtype, network.device, marks_of(network.state_dict().values())
    with _converted_lock:
        kept, of = _converted.get(network, (None, None))
        if of != made_of:
            kept = copy.deepcopy(network).to(dtype)
            _converted[network] = kept, made_of
    return kept


def marks_of(parts: Iterable[torch.Tensor]) -> list[int]:
    """The bits of each tensor, added up as whole numbers: they change with its values. Torch's own count of changes
    (`_version`) misses those of fused optimizers."""
    return torch.stack([row_sums(part.reshape(1, -1)).sum() for part in parts]).tolist()


class SpecFormerDrafter(Drafter):
    """A SpecFormer network on one target: context states of all read tokens, drafts from each row's last one only.

    Args:
        network: a SpecFormerModel. It is moved to the device of the target's LM head; where its dtype is another one
            than the target's, a copy in that dtype is used.
        target: the model it drafts for.
    """

    proposes_known_tokens = True

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
        layout, input_ids = prompts.layout.to(device), prompts.input_ids.to(device)
        newest = prompts.first_tokens.to(device)  # (B, 1)
        limit = prompts.max_length - input_ids.shape[1] + layout.longest
        capacity = min(layout.longest + FIRST_CAPACITY, limit)
        cache = RaggedCache(1, layout.lengths, layout.longest, capacity, limit)
        groups = layout.groups
        contexts = []
        assert prompts.hidden_states is not None  # of `hidden_state_layers`
        for group, hidden_states in zip(groups, prompts.hidden_states, strict=True):
            ids, lengths = input_ids[group.rows, -group.width :], group.layout.lengths
            # Real tokens go to the front, so that plain causal attention keeps padding out.
            hidden_states, ids = (
                group.layout.compact(part)[:, : group.layout.longest] for part in (hidden_states.to(device), ids)
            )
            next_tokens = ids.roll(-1, dims=1).scatter(1, lengths[:, None] - 1, newest[group.rows])  # (N, T)
            prompt_cache = DynamicCache()
            states = self.network.encode_context(
                hidden_states, self._anchors(next_tokens), past_key_values=prompt_cache
            )
            columns = torch.arange(group.layout.longest, device=device).expand(len(ids), -1)
            cache.load(group.rows, prompt_cache, columns)
            contexts.append(states[torch.arange(len(ids), device=device), lengths - 1])
        context = torch.cat(contexts)[torch.cat([group.rows for group in groups]).argsort()]  # (B, d)
        self.begin_behind(cache, context, newest)

    def begin_behind(self, cache: RaggedCache, context: torch.Tensor, newest: torch.Tensor) -> None:
        """Begin with what was read already: the context layer's cache of B rows, their context states (B, d), and the
        tokens after (B, 1)."""
        self.cache, self.context, self.newest = cache, context, newest
        self.rows = torch.arange(len(newest), device=newest.device)
        self.longest = cache.longest
        self.unread: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # per round, as `_take_unread`

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
        # Read when there is a proposal to make: rounds without one cost nothing, and are caught up with in one pass.
        assert verified.hidden_states is not None  # of `hidden_state_layers`
        parts = (verified.hidden_states, verified.tokens, verified.counts)
        hidden_states, tokens, counts = (part.to(self.borrowed.device) for part in parts)
        self.newest = verified.newest(self.newest)
        self.unread.append((hidden_states, tokens, counts))
        self.longest = verified.longest
        if sum(tokens.shape[1] for _, tokens, _ in self.unread) >= MOST_UNREAD:
            self._read()

    def select_rows(self, index, longest) -> None:
        index = index.to(self.context.device)
        self.unread = [(states[index], tokens[index], counts[index]) for states, tokens, counts in self.unread]
        self.cache.select_rows(index, longest)
        self.longest = longest
        self.context, self.newest, self.rows = self.context[index], self.newest[index], self.rows[: len(index)]

    def _read(self) -> None:
        """Context states of the tokens that the target has read since the last proposal."""
        if not self.unread:
            return
        of_one_round = len(self.unread) == 1
        hidden_states, tokens, counts = self._take_unread()
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

    def _take_unread(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states (R, q, S, d), the tokens after them (R, q), and how many of each row count (R,): the first."""
        blocks, self.unread = self.unread, []
        if len(blocks) == 1:
            return blocks[0]
        hidden_states, tokens = (torch.cat(parts, dim=1) for parts in list(zip(*blocks, strict=True))[:2])
        counted = [torch.arange(block.shape[1], device=count.device) < count[:, None] for _, block, count in blocks]
        counted = torch.cat(counted, dim=1)
        order = (~counted).long().argsort(dim=1, stable=True)
        hidden_states = hidden_states.gather(1, order[:, :, None, None].expand_as(hidden_states))
        return hidden_states, tokens.gather(1, order), counted.sum(dim=1)

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


def embed(borrowed, tokens: torch.Tensor) -> torch.Tensor:
    return borrowed.embed(tokens.clamp(min=0))  # after a wrong draft there may be no token
