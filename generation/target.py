"""The two passes of the target: the prompt, and a block of drafted tokens after it."""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from .backend_graphs import run_pass
from .backend_heads import folded_heads
from .backend_versions import CACHE_NAMES, cache_argument, cache_of, prepared_inputs, untested
from .cache_masks import attention_masks, sliding_layers
from .cache_ragged import RaggedCache
from .prompt import PromptLayout
from .prompt_groups import tokens_of_a_pass
from .ranks import decided
from .target_mixers import (
    Mixers,
    WatchedCache,
    as_written,
    keeps_states,
    mixers_by_token,
    prompt_cache,
    takes_any_cache,
)
from .target_states import StateReader

FIRST_CAPACITY = 256
"""New tokens that the cache has room for at first. Not max_length: few texts get there."""


def prompt_layout(model, attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> PromptLayout:
    """Where the tokens of prompts (B, P) are, and which rows `model` reads together.

    States may depend on the padding before them, so what keeps them reads all rows as plain generate() does.

    Raises:
        ValueError: a row is empty or padded on the right.
    """
    pass_tokens = None if keeps_states(model) else decided(tokens_of_a_pass, model)
    return PromptLayout.from_mask(attention_mask, input_ids, pass_tokens)


def prompt_arguments(model, layout: PromptLayout) -> dict:
    """What generate() would prepare for the prompt pass of a model: a mask, position ids, and no more logits than
    needed."""
    mask, taken = layout.mask(), inspect.signature(model.forward).parameters
    arguments: dict[str, torch.Tensor | int] = {"attention_mask": mask}
    if "position_ids" in taken:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in taken:
        arguments["logits_to_keep"] = 1
    return arguments


def prefill(
    model,
    input_ids: torch.Tensor,
    layout: PromptLayout,
    max_length: int,
    block_size: int | None,
    model_kwargs: dict,
    chunk_size: int | None = None,
    states_of: StateReader | None = None,
    more_slots: int = 0,
) -> tuple[torch.Tensor, RaggedCache, list[torch.Tensor] | None]:
    """Read the prompts (B, P), those of similar length together, and keep their keys and values in a ragged cache.

    Args:
        max_length: tokens, padding included, at which generate() stops.
        block_size: most tokens that are written before it is known which of them are kept; `None` if any number may be.
        model_kwargs: what generate() prepared: attention_mask, position_ids, logits_to_keep.
        chunk_size: tokens of one pass (`prefill_chunk_size`); default all.
        states_of: passes of `model` that give states as well, if they are wanted.
        more_slots: see `RaggedCache`.

    Returns:
        Logits of the last prompt position (B, 1, V), the cache, and the states of each group, (N, width, S, d).
    """
    run = states_of or StateReader(model, None)
    # Rows are counted without their padding, so the longest ends max_length - (P - longest) tokens on.
    longest_text = layout.longest + max_length - input_ids.shape[1]
    logits: list[torch.Tensor] = []
    order: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    for group in layout.groups:
        of_group = dict(model_kwargs)
        for name in ("attention_mask", "position_ids"):
            if (value := model_kwargs.get(name)) is not None:
                of_group[name] = value.expand(len(input_ids), -1)[group.rows.to(value.device), -group.width :]
        last, prompts_read, states_of_group = read_prompts(
            model, input_ids[group.rows, -group.width :], of_group, chunk_size, run
        )
        if not logits:  # the first pass tells how many layers there are
            num_layers = len(prompts_read.layers)
            capacity = min(layout.longest + FIRST_CAPACITY + (block_size or 1), longest_text)
            window, sliding = sliding_layers(model.config, num_layers)
            ring = longest_text if window is None or not sliding or not block_size else window - 1 + block_size
            if ring >= longest_text:  # where no text grows out of the window, slots are those of full attention
                ring, sliding = None, []
            cache = RaggedCache(
                num_layers,
                layout.lengths,
                layout.longest,
                capacity,
                longest_text,
                ring,
                sliding,
                more_slots,
                like=prompts_read.layers,
                states=(block_size or 1) + 1,
            )
            if isinstance(prompts_read, WatchedCache):
                cache.mixers = Mixers(model, prompts_read.states_of)
        cache.load(group.rows, prompts_read, group.layout.columns[:, : group.layout.longest])
        logits.append(last)
        if states_of_group is not None:
            states.append(states_of_group)
        order.append(group.rows)
    places = torch.cat(order).argsort().to(last.device)
    return torch.cat(logits)[places], cache, None if run.layers is None else states


def read_prompts(
    model,
    input_ids: torch.Tensor,
    model_kwargs: dict,
    chunk_size: int | None,
    run: StateReader,
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor | None]:
    """Run prompts (N, P) the way plain generate() does: logits of the last position (N, 1, V), the cache, and the
    states that `run` reads (N, P, S, d)."""
    width = input_ids.shape[1]
    cut = ("attention_mask", "position_ids", *CACHE_NAMES)
    kwargs = {key: value for key, value in model_kwargs.items() if key not in cut}
    kwargs["use_cache"] = takes_any_cache(model)
    cache = own = prompt_cache(model)
    states: list[torch.Tensor] = []
    mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    for start in range(0, width, chunk_size or width):
        end = min(start + (chunk_size or width), width)
        inputs = prepared_inputs(
            model,
            input_ids[:, start:end],
            cache,
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if position_ids is None else position_ids[:, start:end],
            is_first_iteration=start == 0,
            **kwargs,
        )
        with as_written(cache, model):
            outputs, of_chunk = run(**inputs)
        if of_chunk is not None:
            states.append(of_chunk)
        # Not the cache that went in: some families start a new one for long prompts.
        cache = cache_of(outputs)
    if isinstance(own, WatchedCache) and not own.states_of:
        raise RuntimeError(
            f"{type(model).__name__} keeps its states elsewhere than in its cache, from where rejected tokens cannot "
            "be taken back."
        )
    if not isinstance(cache, DynamicCache) or tokens_in(cache) not in (width, None):
        raise RuntimeError(
            f"{type(model).__name__} did not fill its cache with the {width} tokens of the prompt. If it is training "
            "with gradient checkpointing, which may switch the cache off, call model.eval() first." + untested()
        )
    return outputs.logits[:, -1:], cache, None if run.layers is None else torch.cat(states, dim=1)


def tokens_in(cache: DynamicCache) -> int | None:
    """The tokens that a cache holds; `None` where all of its layers keep states, and one of them does."""
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return cache.get_seq_length()
    return None if cache.has_previous_state() else 0


def verify(
    model,
    cache: RaggedCache,
    tokens: torch.Tensor,
    states_of: StateReader | None = None,
    branches: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One pass over `tokens` (B, q), which follow what the cache holds of each row, one after the other, or as
    `branches` have it, the depths and ancestors of a `DraftTree`: logits (B, q, V), and the states that `states_of`
    reads (B, q, S, d)."""

    def one_pass(tokens: torch.Tensor, *branches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        position_ids = cache.prepare(tokens.shape[1], *branches)
        masks = attention_masks(model.config, cache, position_ids, model.dtype)
        return read_block(model, cache, tokens, position_ids, masks, states_of)

    return run_pass(cache, tokens.shape[1], ("verify", len(branches)), one_pass, tokens, *branches)


def read_block(
    model, cache, tokens: torch.Tensor, position_ids: torch.Tensor, masks, states_of: StateReader | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (B, q, V) and states (B, q, S, d) of `tokens` at `position_ids`, both (B, q), which see what `masks` let
    them see."""
    run = states_of or StateReader(model, None)
    places = {"position_ids": position_ids} if "position_ids" in inspect.signature(model.forward).parameters else {}
    with folded_heads(), mixers_by_token(cache):
        outputs, states = run(
            input_ids=tokens,
            attention_mask=masks,
            **places,
            **cache_argument(model, cache),
            use_cache=takes_any_cache(model),
        )
    return outputs.logits, states
