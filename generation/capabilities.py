"""What cannot be done losslessly is refused here, before the first token, with the reason.

Targets are judged by what they can do, not by a list of names: by the cache layers that they need, the arguments that
their forward takes, and a probe that decodes a few tokens both ways.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from contextlib import contextmanager
from typing import NoReturn

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode

from .prompt import PromptLayout
from .target import prefill, verify

KNOWN_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
}
OTHER_STRATEGIES = (
    "num_beams",
    "num_beam_groups",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "assistant_early_exit",
    "use_mtp",
    "speculation_type",
)
"""Options that choose a strategy of their own."""

USABLE_ATTENTION = ("sdpa", "eager")


class UnsupportedTargetError(ValueError):
    """This target or this call cannot be decoded speculatively without risking another text."""


def refuse(model, reason: str) -> NoReturn:
    raise UnsupportedTargetError(
        f"{type(model).__name__} cannot be decoded speculatively: {reason} Call generate() without custom_generate and "
        "assistant_model instead."
    )


def check_target(model) -> None:
    """Refuse architectures whose cached state cannot be kept per row.

    Raises:
        UnsupportedTargetError: encoder-decoder, state-space or hybrid layers, ALiBi, multimodal positions.
    """
    if not model.can_generate():
        refuse(model, "it has no LM head. Load it with AutoModelForCausalLM.")
    if model.config.is_encoder_decoder:
        refuse(model, "it is an encoder-decoder, and only decoder-only models are supported.")
    config = model.config.get_text_config(decoder=True)
    if getattr(model, "_is_stateful", False):
        refuse(model, "it keeps a recurrent state, from which rejected tokens cannot be taken back.")
    arguments = inspect.signature(model.forward).parameters
    missing = [name for name in ("attention_mask", "position_ids", "past_key_values") if name not in arguments]
    if missing:
        refuse(
            model,
            f"its forward does not take {', '.join(missing)}, so rows of different lengths cannot be told apart "
            "(ALiBi and state-space models are like that).",
        )
    if getattr(config, "alibi", False):
        refuse(model, "it uses ALiBi, whose biases follow the padded columns and not each row's own positions.")
    strange = {
        type(layer).__name__
        for layer in DynamicCache(config=model.config).layers
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    if strange:
        refuse(model, f"it needs cache layers that cannot take back tokens ({', '.join(sorted(strange))}).")
    if any("mrope_section" in rope for rope in rope_settings(config)):
        refuse(model, "its rotary positions have several axes (a multimodal model).")


def check_call(model, layout: PromptLayout, generation_config: GenerationConfig, model_kwargs: dict, max_length: int):
    """Refuse what a call asks for and the loop cannot do. `max_length` counts columns, as generate() does.

    Raises:
        UnsupportedTargetError: a RoPE that changes with the length, and would change during this call.
        ValueError: beam search and other strategies, inputs or outputs that are not supported.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        given = {name: getattr(generation_config, name, None) for name in OTHER_STRATEGIES}
        given = ", ".join(f"{name}={value}" for name, value in given.items() if value not in (None, False, 1))
        raise ValueError(
            f"The settings ask for {mode.value.replace('_', ' ')} ({given}), and speculation is lossless for greedy "
            "search and sampling only. Set num_beams=1 and leave options of other strategies unset."
        )
    if outputs := [name for name in ("output_attentions", "output_hidden_states") if getattr(generation_config, name)]:
        raise ValueError(f"{', '.join(outputs)} cannot be returned by speculative decoding; leave it unset.")
    if extra := sorted(
        key for key, value in model_kwargs.items() if key not in KNOWN_MODEL_KWARGS and value is not None
    ):
        raise ValueError(f"The inputs {extra} are not supported by speculative decoding; pass input_ids and a mask.")
    if (positions := model_kwargs.get("position_ids")) is not None and positions.ndim != 2:
        refuse(model, f"its position ids have {positions.ndim} axes (a multimodal model).")
    if positions is not None and not layout.numbers_rows_from_zero(positions):
        raise ValueError("position_ids do not count each row's tokens from 0; leave them unset.")

    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers
    if layout.has_holes and any(type(layer) is DynamicSlidingWindowLayer for layer in layers):
        refuse(model, "its sliding windows count padding inside a prompt (attention_mask has zeros between ones).")
    longest_text = layout.longest + max_length - layout.columns.shape[1]
    for rope in rope_settings(config):
        kind = rope.get("rope_type", rope.get("type"))
        limit = (
            rope.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or config.max_position_embeddings
        )
        starts_above = kind == "longrope" and min(layout.host_lengths) > limit
        if kind in ("dynamic", "longrope") and longest_text > limit and not starts_above:
            advice = f" A text of at most {limit} tokens, prompt included, works." if layout.longest < limit else ""
            refuse(
                model,
                f"its {kind} rotary embedding changes at {limit} positions, and this call starts at "
                f"{min(layout.host_lengths)} and may reach {longest_text}.{advice}",
            )


def rope_settings(config) -> list[dict]:
    """All rotary settings of a config: one, or one per layer type."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


# ---- attention implementations

_switches: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> [calls inside, implementation before]
_switches_lock = threading.Lock()


@contextmanager
def usable_attention(model):
    """Switch a target with flash or flex attention, which take no mask per row, to sdpa while calls are inside.

    Where the family has no sdpa, to eager. Several threads may be inside with one target.
    """
    with _switches_lock:
        switch = model in _switches or attention_of(model) not in USABLE_ATTENTION
        if switch and model not in _switches:
            _switches[model] = [0, attention_of(model)]
            try:
                model.set_attn_implementation("sdpa")
            except ValueError:
                model.set_attn_implementation("eager")
            warnings.warn(
                f"This target was loaded with attn_implementation={_switches[model][1]!r}, which cannot mask each row "
                f"of a batch on its own. It runs with {attention_of(model)!r} during speculative decoding.",
                stacklevel=4,
            )
        if switch:
            _switches[model][0] += 1
    try:
        yield
    finally:
        if switch:
            with _switches_lock:
                _switches[model][0] -= 1
                if _switches[model][0] == 0:
                    model.set_attn_implementation(_switches.pop(model)[1])


def attention_of(model) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


# ---- probe

_probed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> attention implementations that passed


@torch.no_grad()
def probe_target(model) -> None:
    """Once per model and attention: verify three tokens of two rows that have got apart, beside plain forwards.

    The tolerance is what the model's own cached decoding differs by, which is much in half precision. Windows and
    chunks longer than the probe's eleven tokens are not seen.

    Raises:
        UnsupportedTargetError: the logits differ. The reason is unknown: code of the model reads padding, positions,
            masks or the cache in a way of its own.
    """
    config = model.config.get_text_config(decoder=True)
    passed = _probed.setdefault(model, set())
    if attention_of(model) in passed:
        return
    device = model.get_input_embeddings().weight.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
    width, block = 5, 3
    # In float64, eager attention (softmax in float32) is NaN wherever a row is padded, in plain generate() as well.
    padding = 0 if (attention_of(model), model.dtype) == ("eager", torch.float64) else 2
    tokens = (torch.arange(2 * (width + 2 * block), device=device).view(2, -1) * 7919 + 11) % config.vocab_size
    prompt, first, second = tokens.split([width, block, block], dim=1)
    mask = torch.ones_like(prompt)
    mask[1, :padding] = 0
    kept = [block, 1]  # of the first block, so that the second one stands at another position in each row
    try:
        layout = PromptLayout.from_mask(mask, prompt)
        kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        _, cache = prefill(model, prompt, layout, width + 2 * block + 1, block, kwargs)
        verify(model, cache, first)
        cache.advance(torch.tensor(kept, device=device), width + max(kept))
        ours = verify(model, cache, second).double()
        for row, count in enumerate(kept):
            context = torch.cat([prompt[row][mask[row].bool()], first[row, :count]])[None]
            text = torch.cat([context, second[row : row + 1]], dim=1)
            whole = model(input_ids=text, use_cache=False).logits[0, -block:].double()
            own_cache = DynamicCache(config=model.config)
            model(input_ids=context, past_key_values=own_cache, use_cache=True)
            cached = model(input_ids=second[row : row + 1], past_key_values=own_cache, use_cache=True).logits[0]
            own_error = (cached.double() - whole).abs().median()
            allowed = 8 * own_error + torch.finfo(dtype).eps ** 0.5 * whole.std()
            error = (ours[row] - whole).abs().median()
            if not error <= allowed:  # also when it is NaN
                raise ValueError(f"logits differ by {error:.2g} from plain decoding, where {allowed:.2g} is usual")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsupportedTargetError(
            f"{type(model).__name__} cannot be decoded speculatively: a trial with two rows of different length did "
            f"not agree with plain decoding ({type(error).__name__}: {error}). Call generate() without custom_generate "
            "and assistant_model instead."
        ) from error
    passed.add(attention_of(model))
