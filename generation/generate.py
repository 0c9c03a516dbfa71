"""The custom generation strategy: what `target.generate(..., custom_generate=<this repository>)` calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from .capabilities import check_call, check_target, probe_target, usable_attention
from .decoding import decode
from .draft_length import requested_draft_length
from .drafter import Drafter, NoDrafter, SpecFormerDrafter
from .processors import PrefixFunctionForWantedRows, Processors
from .prompt import PromptLayout
from .statistics import GenerationStatistics
from .stopping import StoppingRules

HUB_ARGUMENTS = {
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
}
"""generate(custom_generate=<string>) hands these on after it has used them to find this file."""

EXACT_CACHES = (None, "dynamic", "dynamic_full", "static", "hybrid")
"""Cache implementations that give the text of the default one, as the ragged cache does."""


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What generate() returns with `return_dict_in_generate=True`; `statistics` is a `GenerationStatistics`."""

    statistics: GenerationStatistics | None = None


def generate(
    model,
    assistant_model=None,
    inputs: torch.Tensor | None = None,
    generation_config=None,
    logits_processor=None,
    stopping_criteria=None,
    prefix_allowed_tokens_fn=None,
    synced_gpus: bool | None = None,
    streamer=None,
    tokenizer=None,
    num_assistant_tokens: int | None = None,
    acceptance: str = "match",
    **kwargs,
):
    """Generate what `model.generate(...)` generates, with tokens drafted by `assistant_model`.

    Args:
        model: the target, any decoder-only causal LM that keeps keys and values of all tokens.
        assistant_model: the SpecFormer drafter of that target. It is moved to the target's dtype and device.
        num_assistant_tokens: tokens to draft each round. `None` takes the generation config's, else the drafter's
            default; more than the drafter has slots is cut to them; 0 decodes plainly.
        acceptance: "match", the only rule so far: greedy decoding gives the same tokens as plain generate(), sampling
            gives the same tokens as plain generate() with the same torch seed.
        tokenizer: needed for `stop_strings`.

    The other arguments are those of transformers' `generate()`.

    Returns:
        Token ids (batch, prompt + new tokens); with `return_dict_in_generate=True` an output with `sequences` and
        `statistics`.

    Raises:
        UnsupportedTargetError: this target cannot be decoded speculatively without risking another text.
        ValueError: an argument that does not fit; the message says what was expected.
    """
    for name in HUB_ARGUMENTS:
        kwargs.pop(name, None)
    if acceptance != "match":
        raise ValueError(f"acceptance is {acceptance!r}; expected 'match'.")
    if synced_gpus:
        raise ValueError("synced_gpus=True (FSDP, ZeRO-3) is not supported: rows of one process would wait for others.")
    check_inputs(inputs if inputs is not None else kwargs.get("input_ids"), kwargs)
    check_target(model)
    configs = [config for config in (generation_config, model.generation_config) if config is not None]
    drafter, num_assistant_tokens = bind_drafter(
        model, assistant_model, requested_draft_length(num_assistant_tokens, configs)
    )
    caches = (kwargs.get("cache_implementation"), *(config.cache_implementation for config in configs))
    if (kind := next((name for name in caches if name is not None), None)) not in EXACT_CACHES:
        raise ValueError(f"cache_implementation is {kind!r}; speculative decoding keeps its own cache. Leave it unset.")
    prefix_function = None
    if prefix_allowed_tokens_fn is not None:
        prefix_function = PrefixFunctionForWantedRows(prefix_allowed_tokens_fn)

    # generate() drops the tokenizer before a callable strategy can see it, so stop strings become a criterion here.
    stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
    stop_strings = (
        kwargs.pop("stop_strings")
        if "stop_strings" in kwargs
        else next((config.stop_strings for config in configs if config.stop_strings), None)
    )
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError(f"stop_strings is {stop_strings!r}; pass tokenizer=... as well, to find them in the text.")
        stopping_criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
    kwargs["stop_strings"] = None

    def strategy(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        processors = Processors(logits_processor)
        rules = StoppingRules(stopping_criteria, generation_config.max_length, input_ids.shape[1])
        layout = PromptLayout.from_mask(model_kwargs.get("attention_mask"), input_ids)
        check_call(model, layout, generation_config, model_kwargs, rules.max_length)
        probe_target(model)
        sequences, statistics = decode(
            model,
            drafter,
            input_ids,
            layout,
            processors,
            rules,
            generation_config,
            model_kwargs,
            num_assistant_tokens,
            streamer,
            prefix_function,
        )
        if not generation_config.return_dict_in_generate:
            return sequences
        return SpeculativeOutput(sequences=sequences, statistics=statistics)

    with usable_attention(model):
        # GenerationMixin's, since the model's own generate may be this very strategy, or another repository's.
        return GenerationMixin.generate(
            model,
            inputs,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_function,
            streamer=streamer,
            custom_generate=strategy,
            **kwargs,
        )


def check_inputs(input_ids, kwargs: dict) -> None:
    """Refuse inputs that drafting cannot start from.

    Raises:
        ValueError: with what was given and what was expected.
    """
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not supported: drafting needs the tokens of the prompt. Pass input_ids.")
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values was passed; speculative decoding keeps its own cache and would leave nothing in yours. "
            "Leave it unset."
        )
    if kwargs.get("token_healing"):
        raise ValueError("token_healing is not supported; leave it unset.")
    if input_ids is None:
        return  # generate() starts from the BOS token
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        is_tensor = isinstance(input_ids, torch.Tensor)
        given = f"has shape {tuple(input_ids.shape)}" if is_tensor else f"is a {type(input_ids).__name__}"
        raise ValueError(f"input_ids {given}; expected a tensor of token ids, (batch, tokens).")
    if not input_ids.numel():
        raise ValueError(f"The batch is empty: input_ids has shape {tuple(input_ids.shape)}. Pass at least one prompt.")


def bind_drafter(model, assistant_model, num_assistant_tokens: int | None) -> tuple[Drafter, int]:
    """The drafter behind `assistant_model`, and how many tokens it drafts each round.

    `assistant_model` is a SpecFormer network, or an object that is a `Drafter` already.

    Raises:
        ValueError: neither of them, or the drafter of another target.
    """
    if assistant_model is None:
        if num_assistant_tokens != 0:
            raise ValueError(
                "No drafter was passed: give assistant_model=AutoModel.from_pretrained(<drafter>, "
                "trust_remote_code=True), or num_assistant_tokens=0 for plain decoding."
            )
        return NoDrafter(), 0
    if hasattr(assistant_model, "propose"):
        drafter, default = assistant_model, assistant_model.max_draft_tokens
    elif hasattr(assistant_model, "borrow"):
        drafter = SpecFormerDrafter(assistant_model, model)
        default = assistant_model.config.default_num_assistant_tokens
    else:
        raise ValueError(
            f"assistant_model is a {type(assistant_model).__name__}; expected a SpecFormer drafter, loaded with "
            "AutoModel.from_pretrained(<drafter>, trust_remote_code=True)."
        )
    if num_assistant_tokens is None:
        num_assistant_tokens = default
    if num_assistant_tokens == 0:
        return NoDrafter(), 0
    return drafter, min(num_assistant_tokens, drafter.max_draft_tokens)
