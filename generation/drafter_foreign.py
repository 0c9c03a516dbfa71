"""What drafters of other projects that read the target's hidden states have in common, whatever their networks are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .backend_linear import fast_linears
from .cache_ragged import RaggedCache
from .drafter import Drafter, Prompts, Verified
from .drafter_dtype import in_dtype
from .drafter_foreign_network import ForeignNetwork
from .drafter_states import UnreadStates
from .target import FIRST_CAPACITY
from .target_head import embed_tokens
from .target_refusals import input_device


class ForeignDrafter(Drafter):
    """
    Args:
        network: moved to the target's device; where its dtype is another one, a copy in the target's is used.
        target: the model that it drafts for.
        states: which of the target's hidden states it reads, in its order.

    Attributes:
        of_rows: names of what it keeps of each row besides its cache.

    Raises:
        ValueError: it is the drafter of another model.
    """

    proposes_known_tokens = can_rewind = True
    of_rows: tuple[str, ...] = ()
    sources = ("network",)

    def __init__(self, network: ForeignNetwork, target, states: Sequence[int]):
        check_fit(network, target, states)
        self.target, self.device = target, input_device(target)
        with torch.inference_mode(False):  # weights that move inside it could not be trained any more
            self.network = in_dtype(network.to(self.device), target.dtype)
        self.network.rotate_on(self.device)
        self.hidden_state_layers = sorted(set(states))
        self.order = [self.hidden_state_layers.index(layer) for layer in states]
        self.draft_token_ids = self.network.draft_token_ids

    def __enter__(self):
        self._attached = fast_linears(self.network)
        self._attached.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._attached.__exit__(*exception)

    def begin_cache(self, prompts: Prompts, num_layers: int, more_slots: int = 0) -> None:
        """Make room for the keys and values of the prompts, and of what will be read; `more_slots` as in
        `RaggedCache`."""
        layout = prompts.layout.to(self.device)
        limit = prompts.max_length - prompts.input_ids.shape[1] + layout.longest
        capacity = min(layout.longest + FIRST_CAPACITY, limit)
        self.cache = RaggedCache(num_layers, layout.lengths, layout.longest, capacity, limit, more_slots=more_slots)
        self.longest, self.unread = layout.longest, UnreadStates(self.device)

    def update(self, verified: Verified) -> None:
        self.longest = verified.longest
        self.unread.add(verified)
        if self.unread.is_full:
            self.read()

    @torch.no_grad()
    def read(self) -> None:
        """Read what the target has read since the last proposal."""
        if self.unread:
            states, tokens, counts = self.unread.take()
            self.read_round(states[:, :, self.order], tokens, counts, self.cache.prepare(tokens.shape[1]))
            self.cache.advance(counts, self.longest)

    def read_round(
        self, states: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Write keys and values of the target's states (R, q, S, d_t) at `positions` (R, q), which the `tokens` (R, q)
        come after. Of each row the first `counts` (R,) count."""
        raise NotImplementedError

    def select_rows(self, index, longest) -> None:
        index = index.to(self.device)
        self.unread.select_rows(index)
        self.cache.select_rows(index, longest)
        self.longest = longest

    def mark(self):
        self.read()
        return (
            self.cache.lengths,
            self.cache.longest,
            self.longest,
            {name: getattr(self, name) for name in self.of_rows},
        )

    def rewind(self, mark) -> None:
        self.cache.lengths, self.cache.longest, self.longest, of_rows = mark
        vars(self).update(of_rows)
        self.unread = UnreadStates(self.device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of `tokens` (R, n), (R, n, d), as the network has learnt to read them."""
        embeddings = self.network.embed_tokens or self.target.get_input_embeddings()
        return embed_tokens(embeddings, tokens, self.network.config.scales_embeddings).to(self.device)


def check_fit(network: ForeignNetwork, target, states: Sequence[int]) -> None:
    """
    Raises:
        ValueError: `network` reads states, or knows tokens, that `target` does not have.
    """
    config, theirs, problems = network.config, target.config.get_text_config(decoder=True), []
    if config.target_hidden_size != theirs.hidden_size:
        problems.append(f"hidden_size is {theirs.hidden_size} there and {config.target_hidden_size} here")
    if max(states) > theirs.num_hidden_layers:
        problems.append(f"it has {theirs.num_hidden_layers} layers, and state {max(states)} is read")
    mask = getattr(config, "mask_token_id", 0)
    if network.embed_tokens is None and mask >= len(target.get_input_embeddings().weight):
        problems.append(f"it has no embedding of the mask token {mask}")
    ids = network.draft_token_ids
    last = (config.draft_vocab_size or 1) - 1 if ids is None else int(ids.max())
    if last >= theirs.vocab_size:
        problems.append(f"it has {theirs.vocab_size} tokens, and token {last} is drafted")
    if problems:
        raise ValueError(
            f"This {network.kind} drafter does not fit {target.name_or_path or type(target).__name__}: "
            f"{'; '.join(problems)}. Pass the drafter of this target."
        )
