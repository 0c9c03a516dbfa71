"""A trial on the target itself: what no look at its config or signature can tell.

Code of a model may read padding, positions, masks or the cache in a way of its own. So, once per model, a few tokens
are decoded both ways.

The trial's texts are short, and windows, chunks and thresholds of real models are long. But code that computes from the
number of keys, or from the length of the cache, instead of each token's own position, shows that with a short text as
well, once it is shown many more slots: they are masked, so they must not matter.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional

from .backend_graphs import recorded_passes
from .backend_versions import cache_argument, untested
from .cache_layers import RaggedLayer
from .cache_masks import attention_masks
from .cache_ragged import KV_LENGTH_STEP, RaggedCache
from .prompt import PromptLayout
from .target import prefill, prompt_arguments, read_block, verify
from .target_attention import attention_of
from .target_mixers import keeps_states, prompt_cache, takes_any_cache
from .target_refusals import UnsupportedTargetError, input_device, refuse
from .target_trials import numbers_anew

_probed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> attention implementations that passed
_verifying_trees: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> by attention, what is in the way

MOST_SLOTS = 4096
"""That are shown in addition to those in use: more than any number of the config up to here."""
MOST_TOKENS = 2**24
BY_NUMBER_OF_KEYS = "its attention goes by the number of keys, masked ones included, and not by each token's position"


@contextmanager
def stretched(layers: list[RaggedLayer], slots: int, tokens: int):
    """These layers of a ragged cache seem to hold more inside: `slots` of zeros after their own, `tokens` in all."""

    def update(layer: RaggedLayer, *states: torch.Tensor, **kwargs):
        seen = type(layer).update(layer, *states)
        return tuple(functional.pad(part, (0, 0, 0, slots)) for part in seen)

    try:
        for layer in layers:
            vars(layer).update(
                update=partial(update, layer),
                get_seq_length=lambda layer=layer: type(layer).get_seq_length(layer) + tokens,
                get_mask_sizes=lambda query_length, layer=layer: (layer.kv_length + slots, 0),
            )
        yield
    finally:
        for layer in layers:
            for name in ("update", "get_seq_length", "get_mask_sizes"):
                vars(layer).pop(name, None)


def verify_among_many_slots(model, cache: RaggedCache, tokens: torch.Tensor) -> torch.Tensor:
    """What `verify` computes, where the cache seems to be longer than any number of the config."""
    numbers = list(numbers_of(model.config.get_text_config(decoder=True).to_dict()))
    slots = max((number for number in numbers if number <= MOST_SLOTS), default=0) + KV_LENGTH_STEP
    longest = max((number for number in numbers if number <= MOST_TOKENS), default=0) + KV_LENGTH_STEP
    position_ids = cache.prepare(tokens.shape[1])
    masks = attention_masks(model.config, cache, position_ids, model.dtype)
    hidden = False if attention_of(model) == "sdpa" else torch.finfo(model.dtype).min

    def wider(mask: torch.Tensor | None) -> torch.Tensor | None:
        return None if mask is None else functional.pad(mask, (0, slots), value=hidden)

    masks = {kind: wider(mask) for kind, mask in masks.items()} if isinstance(masks, dict) else wider(masks)
    with stretched(cache.ragged_layers, slots, longest):
        try:
            return read_block(model, cache, tokens, position_ids, masks)[0]
        except RuntimeError as error:  # shapes, as a rule
            raise ValueError(f"{BY_NUMBER_OF_KEYS} ({error})") from error


def numbers_of(value) -> Iterator[int]:
    """The whole numbers in a config, at any depth."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_of(part)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


@torch.no_grad()
@recorded_passes(False)
def probe_target(model) -> None:
    """Once per model and attention: verify three tokens of two rows of different lengths, against plain forwards.

    The tolerance is what the model's own cached decoding differs by, which is much in half precision, and never less
    than float32's: families compute their routing or rotary embeddings in it, in float64 as well.

    Raises:
        UnsupportedTargetError: the logits differ. The reason is unknown: code of the model reads padding, positions,
            masks or the cache in a way of its own.
    """
    config = model.config.get_text_config(decoder=True)
    passed = _probed.setdefault(model, set())
    if attention_of(model) in passed:
        return
    device, precision = input_device(model), usual_error(model)
    width, block = 5, 3
    # In float64, eager attention (softmax in float32) is NaN wherever a row is padded, in plain generate() as well.
    padding = 0 if (attention_of(model), model.dtype) == ("eager", torch.float64) else 2
    tokens = (torch.arange(2 * (width + 2 * block), device=device).view(2, -1) * 7919 + 11) % config.vocab_size
    prompt, first, second = tokens.split([width, block, block], dim=1)
    mask = torch.ones_like(prompt)
    mask[1, :padding] = 0
    # what reads several tokens after a state may begin anew, and plain decoding does not do that
    step = 1 if keeps_states(model) else block
    takes_places = "position_ids" in inspect.signature(model.forward).parameters

    def run(tokens: torch.Tensor, places: torch.Tensor, **arguments) -> torch.Tensor:
        if takes_places:
            arguments["position_ids"] = places
        return model(input_ids=tokens, **arguments).logits

    if takes_places and numbers_anew(model):
        refuse(model, "its generate() does not number a prompt's positions from 0, one by one.")
    kept = [block, 1]  # of the first block, so that the second one stands at another position in each row
    try:
        layout = PromptLayout.from_mask(mask, prompt)
        _, cache, _ = prefill(model, prompt, layout, width + 2 * block + 1, block, prompt_arguments(model, layout))
        verify(model, cache, first)
        cache.advance(torch.tensor(kept, device=device), width + max(kept))
        ours = verify(model, cache, second)[0].cpu().double()
        among_many = verify_among_many_slots(model, cache, second).cpu().double()
        for row, count in enumerate(kept):
            context = torch.cat([prompt[row][mask[row].bool()], first[row, :count]])[None]
            text = torch.cat([context, second[row : row + 1]], dim=1)
            # as plain generate() numbers them: some families would begin elsewhere by themselves
            places = torch.arange(text.shape[1], device=device)[None]
            whole = run(text, places, use_cache=False)[0, -block:].cpu().double()
            own_cache = cache_argument(model, prompt_cache(model)) | {"use_cache": takes_any_cache(model)}
            cached = [run(context, places[:, :-block], **own_cache)]
            for read in range(0, block, step):
                columns = slice(text.shape[1] - block + read, text.shape[1] - block + read + step)
                cached.append(run(text[:, columns], places[:, columns], **own_cache))
            last = torch.cat(cached[1:], dim=1)[0].cpu().double()
            own_error = (last - whole).abs().median()
            allowed = 8 * own_error + precision * whole.std()
            plain = last if step == 1 else whole  # in some families what keeps states computes something else by steps
            error = (ours[row] - plain).abs().median()
            if not error <= allowed:  # also when it is NaN
                raise ValueError(f"logits differ by {error:.2g} from plain decoding, where {allowed:.2g} is usual")
            error = (among_many[row] - plain).abs().median()
            if not error <= allowed:
                raise ValueError(f"{BY_NUMBER_OF_KEYS} (logits differ by {error:.2g})")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsupportedTargetError(
            f"{type(model).__name__} cannot be decoded speculatively: a trial with two rows of different length did "
            f"not agree with plain decoding ({type(error).__name__}: {error}). Call generate() without custom_generate "
            "and assistant_model instead." + untested()
        ) from error
    passed.add(attention_of(model))


def usual_error(model) -> float:
    """By how much of their spread logits of the same text may differ."""
    device = input_device(model)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


@torch.no_grad()
@recorded_passes(False)
def tree_obstacle(model) -> str | None:
    """Why `model` cannot verify trees, `None` where it can. Once per model and attention two rows verify a tree of two
    branches, against passes over each branch alone, which `probe_target` has shown to be right: code of a model might
    not take a token's position, or what it sees, from what it is told.
    """
    if keeps_states(model):
        return f"{type(model).__name__} cannot verify trees: it keeps states, which follow one text, not branches."
    found = _verifying_trees.setdefault(model, {})
    if attention_of(model) not in found:
        try:
            compare_tree_with_chains(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            found[attention_of(model)] = (
                f"{type(model).__name__} cannot verify trees: a trial did not agree with passes over chains "
                f"({type(error).__name__}: {error})." + untested()
            )
        else:
            found[attention_of(model)] = None
    return found[attention_of(model)]


def compare_tree_with_chains(model) -> None:
    """
    Raises:
        ValueError: the logits differ by more than rounding.
    """
    device, vocab_size = input_device(model), model.config.get_text_config(decoder=True).vocab_size
    width, branches = 5, ([0, 1, 3, 5], [0, 2, 4])  # places of a block of six
    tokens = (torch.arange(2 * (width + 6), device=device).view(2, -1) * 7919 + 11) % vocab_size
    prompt, block = tokens.split([width, 6], dim=1)
    mask = torch.ones_like(prompt)
    if (attention_of(model), model.dtype) != ("eager", torch.float64):  # see `probe_target`
        mask[1, :2] = 0
    depths, seen = torch.zeros(6, dtype=torch.long, device=device), torch.eye(6, dtype=torch.bool, device=device)
    for places in branches:
        depths[places] = torch.arange(len(places), device=device)
        seen[torch.tensor(places)[:, None], torch.tensor(places)] |= depths[places, None] >= depths[places]
    layout = PromptLayout.from_mask(mask, prompt)
    _, cache, _ = prefill(model, prompt, layout, width + 6, 6, prompt_arguments(model, layout), more_slots=6)
    ours = verify(model, cache, block, branches=(depths.expand(2, -1), seen.expand(2, -1, -1)))[0].double()
    for places in branches:
        alone = verify(model, cache, block[:, places])[0].double()
        error, allowed = (ours[:, places] - alone).abs().median(), usual_error(model) * alone.std()
        if not error <= allowed:  # also when it is NaN
            raise ValueError(f"logits differ by {error:.2g} from those of a chain, where {allowed:.2g} is usual")
