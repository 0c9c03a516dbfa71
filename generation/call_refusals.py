"""Calls that cannot be answered losslessly are refused here, before the first token, with the reason.

Targets are refused in `target_refusals`.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation import GenerationMode

from .argument import whole_number
from .backend_versions import CACHE_NAMES, numbers_positions_by_itself
from .call_settings import CallSettings
from .prompt import PromptLayout
from .target_refusals import refuse, rope_settings
from .target_trials import changes_nothing, forgets_at

KNOWN_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    "use_cache",
    "logits_to_keep",
    "cache_position",
}
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""By which processors of multimodal models tell images (and other things) from text, which is 0."""
NO_TEXT = ("pixel_values", "image", "video", "audio", "input_features")
"""How inputs begin that are of images or sound."""
EXACT_CACHES = (None, "dynamic", "dynamic_full", "static", "hybrid")
"""Cache implementations that give the text of the default one, as the ragged cache does."""

UNSET = (None, False, 1)
OTHER_STRATEGIES = (
    "num_beams",
    "num_beam_groups",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "assistant_early_exit",
    "speculation_type",
)
"""Options that choose a strategy of their own."""


def check_arguments(
    assistant_model, inputs, synced_gpus, tokenizer, assistant_tokenizer, custom_generate, settings: CallSettings
) -> None:
    """Refuse arguments of generate() that drafting cannot start from, or that would be ignored on the way.

    Raises:
        ValueError: with what was given and what was expected.
    """
    if custom_generate is not None:
        raise ValueError(
            "custom_generate was given to a function that is a generation strategy itself. Leave it unset, or call "
            "model.generate(..., custom_generate=<string>)."
        )
    if isinstance(assistant_model, torch.Tensor):
        raise ValueError(
            "assistant_model is a tensor. Call specformer.generate(target, drafter, **inputs), or "
            "target.generate(**inputs, assistant_model=drafter, custom_generate=<folder or Hub id of the drafter>, "
            "trust_remote_code=True); as custom_generate=<function> this function cannot see the drafter."
        )
    if settings.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not supported: drafting needs the tokens of the prompt. Pass input_ids.")
    if given := sorted(
        name for name, value in settings.kwargs.items() if value is not None and name.startswith(NO_TEXT)
    ):
        raise ValueError(  # before they are encoded
            f"The inputs {given} are not supported: speculative decoding is for text alone. Pass input_ids and a mask, "
            "or call generate() without custom_generate."
        )
    if given := [name for name in CACHE_NAMES if settings.get(name) is not None]:
        raise ValueError(
            f"{given[0]} was passed; speculative decoding keeps its own cache and would leave nothing in yours. "
            "Leave it unset."
        )
    if (kind := settings.get("cache_implementation")) not in EXACT_CACHES:
        raise ValueError(f"cache_implementation is {kind!r}; speculative decoding keeps its own cache. Leave it unset.")
    if (chunk_size := settings.get("prefill_chunk_size")) is not None:
        number = whole_number(chunk_size)
        if number is None or number < 1:
            raise ValueError(f"prefill_chunk_size is {chunk_size!r}; expected a positive number of tokens, or None.")
        if type(chunk_size) is not int:  # of NumPy, for example
            settings.kwargs["prefill_chunk_size"] = number
    if settings.get("token_healing"):
        raise ValueError("token_healing is not supported; leave it unset.")
    if synced_gpus:
        raise ValueError("synced_gpus=True (FSDP, ZeRO-3) is not supported: rows of one process would wait for others.")
    if tokenizer and assistant_tokenizer and tokenizer.get_vocab() != assistant_tokenizer.get_vocab():
        raise ValueError(
            "assistant_tokenizer has another vocabulary than tokenizer, and tokens are not translated. Pass an "
            "assistant_model with the target's own tokenizer."
        )
    input_ids = settings.get("input_ids") if inputs is None else inputs
    if input_ids is None:
        return  # generate() starts from the BOS token
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        is_tensor = isinstance(input_ids, torch.Tensor)
        given = f"has shape {tuple(input_ids.shape)}" if is_tensor else f"is a {type(input_ids).__name__}"
        raise ValueError(f"input_ids {given}; expected a tensor of token ids, (batch, tokens).")
    for name in ("attention_mask", "position_ids"):
        value = settings.get(name)
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor, (batch, tokens).")
        if value is not None and value.ndim <= 2 and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and input_ids {tuple(input_ids.shape)}; expected one entry for "
                "every token of the prompts."
            )
    mask = settings.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask holds other values than 0 (padding) and 1 (tokens).")
    if not input_ids.numel():
        raise ValueError(f"The batch is empty: input_ids has shape {tuple(input_ids.shape)}. Pass at least one prompt.")


def check_call(model, layout: PromptLayout, generation_config: GenerationConfig, model_kwargs: dict, max_length: int):
    """Refuse what a call asks for and the loop cannot do, and drop token types that tell the model nothing from
    `model_kwargs`. `max_length` counts columns, as generate() does.

    Raises:
        UnsupportedTargetError: a RoPE that changes with the length, and would change during this call.
        ValueError: beam search and other strategies, inputs or outputs that are not supported.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        given = {name: getattr(generation_config, name, None) for name in OTHER_STRATEGIES}
        given = ", ".join(f"{name}={value}" for name, value in given.items() if value is True or value not in UNSET)
        raise ValueError(
            f"The settings ask for {mode.value.replace('_', ' ')} ({given}), and speculation is lossless for greedy "
            "search and sampling only. Set num_beams=1 and leave options of other strategies unset."
        )
    if outputs := [name for name in ("output_attentions", "output_hidden_states") if getattr(generation_config, name)]:
        raise ValueError(f"{', '.join(outputs)} cannot be returned by speculative decoding; leave it unset.")
    drop_types_of_text(model, model_kwargs)
    given = {key: value for key, value in model_kwargs.items() if value is not None and not is_empty(value)}
    if extra := sorted(given.keys() - KNOWN_MODEL_KWARGS):
        raise ValueError(f"The inputs {extra} are not supported by speculative decoding; pass input_ids and a mask.")
    positions = positions_of_text(model, model_kwargs)
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
            or getattr(config, "max_position_embeddings", None)
            or 0
        )
        starts_above = kind == "longrope" and min(layout.host_lengths) > limit
        if kind in ("dynamic", "longrope") and longest_text > limit and not starts_above:
            advice = f" A text of at most {limit} tokens, prompt included, works." if layout.longest < limit else ""
            refuse(
                model,
                f"its {kind} rotary embedding changes at {limit} positions, and this call starts at "
                f"{min(layout.host_lengths)} and may reach {longest_text}.{advice}",
            )
    switch = getattr(config, "original_max_position_embeddings", None)
    if isinstance(switch, int) and min(layout.host_lengths) <= switch < longest_text and forgets_at(model, switch):
        refuse(
            model,
            f"where a text passes {switch} tokens its plain generate() drops the cache, goes on from the last token "
            f"alone, and this call may reach {longest_text}.",
        )


def drop_types_of_text(model, model_kwargs: dict) -> None:
    """Take token types out of `model_kwargs` that are 0 everywhere, where the model does not tell that from none.

    Raises:
        ValueError: they are not.
    """
    for name in TOKEN_TYPES:
        types = model_kwargs.get(name)
        if not isinstance(types, torch.Tensor):
            continue
        if types.any():
            raise ValueError(
                f"{name} is not 0 everywhere: it marks tokens of another kind, such as images. Speculative decoding is "
                "for text alone; leave the others out, or call generate() without custom_generate."
            )
        if changes_nothing(model, name):
            del model_kwargs[name]


def positions_of_text(model, model_kwargs: dict) -> torch.Tensor | None:
    """The position ids of a call, (batch, tokens), also where the model prepared several axes of them, which are alike
    for text: one is left in `model_kwargs` then.

    Raises:
        UnsupportedTargetError: they are not alike, as with images.
    """
    positions = model_kwargs.get("position_ids")
    if positions is None or positions.ndim == 2:
        return positions
    if positions.ndim != 3 or not numbers_positions_by_itself(model):
        refuse(model, f"position_ids have {positions.ndim} axes; expected (batch, tokens).")
    if not bool((positions == positions[:1]).all()):
        refuse(model, "its positions differ by axis, as they do where a prompt has images; text alone is supported.")
    model_kwargs["position_ids"] = positions[0]
    return positions[0]


def is_empty(value) -> bool:
    """Composite models are given an empty dictionary of images with a prompt of text alone."""
    return isinstance(value, dict) and not value
