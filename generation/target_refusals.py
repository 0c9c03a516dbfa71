"""Targets that cannot be decoded losslessly are refused before the first token, with the reason.

They are judged by what they can do, not by a list of names: by the cache layers that they need and the arguments that
their forward takes; what that cannot tell is left to the `target_probe`.
"""

from __future__ import annotations

import inspect
from typing import NoReturn

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .backend_versions import CACHE_NAMES, STATE_LAYERS, cache_name, is_pipelined, keeps_recurrent_state, untested
from .ranks import is_synchronized
from .target_mixers import keeps_states, takes_any_cache


class UnsupportedTargetError(ValueError):
    """This target or this call cannot be decoded speculatively without risking another text."""


def refuse(model, reason: str) -> NoReturn:
    raise UnsupportedTargetError(
        f"{type(model).__name__} cannot be decoded speculatively: {reason} Call generate() without custom_generate and "
        f"assistant_model instead.{untested()}"
    )


def unwrapped(model):
    """The transformers model inside what torch.compile(model) or PEFT put around it. Adapters are in its layers."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        check_adapters(model, model)
        return unwrapped(model.get_base_model())
    return model


def check_adapters(model, peft_model) -> None:
    """Refuse PEFT adapters that are more than weights in the layers.

    Raises:
        UnsupportedTargetError: see the messages.
    """
    if getattr(getattr(peft_model, "active_peft_config", None), "is_prompt_learning", False):
        refuse(model, "its PEFT adapter puts virtual tokens before each prompt (prompt or prefix tuning).")
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if "adapter_names" in (getattr(hook, "keywords", None) or {}):
                refuse(model, "its rows have adapters of their own (adapter_names), and rows leave the batch.")


def input_device(model) -> torch.device:
    """Where `model` takes its tokens: at its first weights that are not offloaded, or anywhere."""
    return next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))


def check_target(model) -> None:
    """Refuse architectures whose cached state cannot be kept per row.

    Raises:
        UnsupportedTargetError: layers in several processes, encoder-decoder, layers whose state cannot be taken back,
            ALiBi.
    """
    if is_pipelined(model):
        refuse(
            model,
            "its layers are in several processes, some in each (pipeline parallel), and drafters need the states of "
            "all layers. Load it with DistributedConfig(tp_size=...) or device_map instead.",
        )
    if is_synchronized(model):
        refuse(
            model,
            "DeepSpeed ZeRO-3 or FSDP (the first) gathers its weights for every pass, so that all processes have to "
            "make the same number of passes, and rows of one would wait for others. Shard it with FSDP2 or "
            "DistributedConfig(tp_size=...), or gather the weights first.",
        )
    if not model.can_generate():
        refuse(model, "it has no LM head. Load it with AutoModelForCausalLM.")
    # While PEFT generates, this method of the inner model is one of the PEFT model.
    check_adapters(model, getattr(model.prepare_inputs_for_generation, "__self__", None))
    if model.config.is_encoder_decoder:
        refuse(model, "it is an encoder-decoder, and only decoder-only models are supported.")
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers
    with_states = keeps_states(model)
    if keeps_recurrent_state(model) and not with_states:
        refuse(model, "it keeps a recurrent state of its own, from which rejected tokens cannot be taken back.")
    arguments = inspect.signature(model.forward).parameters
    missing = [name for name in ("attention_mask", "position_ids") if name not in arguments]
    if with_states:  # which may be all that tells positions apart
        missing = [name for name in missing if name != "position_ids"]
    if cache_name(model.forward) is None:
        missing.append(" or ".join(CACHE_NAMES[:2]))
    if missing:
        refuse(
            model,
            f"its forward does not take {', '.join(missing)}, so rows of different lengths cannot be told apart "
            "(ALiBi and state-space models are like that).",
        )
    if getattr(config, "alibi", False):
        refuse(model, "it uses ALiBi, whose biases follow the padded columns and not each row's own positions.")
    if not takes_any_cache(model) and getattr(config, "sliding_window", None):
        refuse(model, "it has a sliding window in layers that its config calls full attention.")
    strange = {
        type(layer).__name__
        for layer in layers
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
        and not (with_states and type(layer).__name__ in STATE_LAYERS)
    }
    if strange:
        refuse(model, f"it needs cache layers that cannot take back tokens ({', '.join(sorted(strange))}).")


def rope_settings(config) -> list[dict]:
    """All rotary settings of a config: one, or one per layer type."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]
