"""Everything here that depends on the version of transformers, told by what is there and not by its number.

transformers 5.24 renamed `past_key_values` to `cache`, in what models take, give back and prepare.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable

import transformers
from transformers import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention  # noqa: F401

NEWEST_TESTED = "5.24.0"
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # since 5.24, and before, where states alone are kept last


STATE_LAYERS = (
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
"""Layers of a cache that keep states, alone or beside keys and values, or nothing. Some versions lack some of them."""


def cache_name(function: Callable) -> str | None:
    """What `function` calls the cache that it takes; `None` where it takes none under either name."""
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_argument(model, cache) -> dict:
    """The keyword argument that hands `cache` to the forward of `model`."""
    return {cache_name(model.forward): cache}


def prepared_inputs(model, input_ids, cache, **kwargs) -> dict:
    """What generate() would hand to the forward of `model` for `input_ids` after what `cache` holds."""
    wanted = cache_name(model.forward)
    cached: dict = {cache_name(model.prepare_inputs_for_generation) or wanted: cache}
    inputs = model.prepare_inputs_for_generation(input_ids, **cached, **kwargs)
    # remote code may name the cache in one way here and in the other there
    return {wanted if name in CACHE_NAMES else name: value for name, value in inputs.items()}


def cache_of(outputs):
    """The cache in a model's outputs."""
    return next((outputs[name] for name in CACHE_NAMES if name in outputs), None)


def pad_token_id(generation_config) -> int | None:
    """The token that generate() fills with, as it prepared it for this call."""
    pad_token = generation_config._pad_token_tensor
    return None if pad_token is None else int(pad_token)


def rows_of_a_prompt(prefix_processor) -> int:
    """Rows to which the processor of `prefix_allowed_tokens_fn` applies one rule together: since 5.24 all that are
    returned for one prompt, and a row whose only allowed token is banned gets it where that is so in all of them."""
    return getattr(prefix_processor, "_num_beams", 1)


def keeps_recurrent_state(model) -> bool:
    return bool(getattr(model, "_is_stateful", False))


def is_pipelined(model) -> bool:
    """Whether transformers has put the layers of `model` into several processes, some into each."""
    return getattr(model, "_pp_stage", None) is not None


def numbers_positions_by_itself(model) -> bool:
    """Whether its class numbers a prompt's positions in a way of its own, such as along several axes."""
    name = "_prepare_position_ids_for_generation"
    return getattr(type(model), name, None) is not getattr(GenerationMixin, name, None)


def untested() -> str:
    """A sentence for the end of messages where transformers is newer than what this was tested with, else nothing."""
    here = transformers.__version__
    if numbers(here) <= numbers(NEWEST_TESTED):
        return ""
    return (
        f" (transformers {here} is newer than {NEWEST_TESTED}, the newest that this code was tested with, and that may "
        "be the reason. Try that one, or update specformer and the drafter.)"
    )


def numbers(version: str) -> list[int]:
    """5.24.0.dev0 -> [5, 24, 0]."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


@functools.cache
def warn_if_untested() -> None:
    """Once in a process, where transformers is newer than what this was tested with."""
    if sentence := untested():
        warnings.warn(f"SpecFormer:{sentence}", stacklevel=2)
