"""The custom generation strategy: what `target.generate(..., custom_generate=<this repository>)` calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from .acceptance import acceptance_rule, check_acceptance
from .assistant_drafter import AssistantDrafter
from .attention import usable_attention
from .capabilities import check_call, check_target, unwrapped
from .decoding import decode
from .draft_length import check_draft_length
from .drafter import Drafter, NoDrafter
from .probe import probe_target
from .processors import PrefixFunctionForWantedRows, Processors
from .prompt import PromptLayout
from .prompt_lookup_drafter import PromptLookupDrafter
from .settings import CallSettings
from .specformer_drafter import SpecFormerDrafter
from .statistics import GenerationStatistics
from .step_outputs import StepOutputs
from .stopping import StoppingRules
from .text import Text
from .token_choice import TokenChoice

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
    """What generate() returns with `return_dict_in_generate=True`: `sequences`, `statistics`, and `scores` and `logits`
    if they were asked for. The cache is not returned: `past_key_values` is `None`."""

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
    assistant_tokenizer=None,
    num_assistant_tokens: int | None = None,
    acceptance: str = "match",
    seed: int | list[int] | None = None,
    **kwargs,
):
    """Generate what `model.generate(...)` generates, with drafted tokens.

    Args:
        model: the target, any decoder-only causal LM that keeps keys and values of all tokens.
        assistant_model: what drafts: the SpecFormer drafter of that target, which is moved to the target's dtype and
            device, or a smaller causal LM with the same tokenizer. With `prompt_lookup_num_tokens` instead, drafts are
            copied from each row's own text.
        num_assistant_tokens: tokens to draft each round. `None` takes the generation config's, else the drafter's
            default; more than the drafter has slots is cut to them; 0 decodes plainly.
        acceptance: when sampling, "match" gives the same tokens as plain generate() with the same torch seed;
            "coupled" gives each row a text that depends on its own seed alone; "rejection" accepts most drafts, and
            gives a text with the same distribution. See `acceptance`.
        seed: for "coupled", an integer (row b of the expanded batch has seed + b) or one integer per row; `None` draws
            one from torch's generator.
        tokenizer: needed for `stop_strings`.
        assistant_tokenizer: must be the target's, since tokens are not translated; pipelines pass one.

    The other arguments are those of transformers' `generate()`.

    Returns:
        Token ids (batch, prompt + new tokens); with `return_dict_in_generate=True` a `SpeculativeOutput`.

    Raises:
        UnsupportedTargetError: this target cannot be decoded speculatively without risking another text.
        ValueError: an argument that does not fit; the message says what was expected.
    """
    for name in HUB_ARGUMENTS:
        kwargs.pop(name, None)
    model = unwrapped(model)
    settings = CallSettings(kwargs, generation_config, model.generation_config)
    check_acceptance(acceptance, seed)
    if isinstance(assistant_model, torch.Tensor):
        raise ValueError(
            "assistant_model is a tensor. Call specformer.generate(target, drafter, **inputs), or "
            "target.generate(**inputs, assistant_model=drafter, custom_generate=<folder or Hub id of the drafter>, "
            "trust_remote_code=True); as custom_generate=<function> this function cannot see the drafter."
        )
    check_inputs(inputs if inputs is not None else kwargs.get("input_ids"), kwargs)
    if synced_gpus:
        raise ValueError("synced_gpus=True (FSDP, ZeRO-3) is not supported: rows of one process would wait for others.")
    if tokenizer and assistant_tokenizer and tokenizer.get_vocab() != assistant_tokenizer.get_vocab():
        raise ValueError(
            "assistant_tokenizer has another vocabulary than tokenizer, and tokens are not translated. Pass an "
            "assistant_model with the target's own tokenizer."
        )
    if (kind := settings.get("cache_implementation")) not in EXACT_CACHES:
        raise ValueError(f"cache_implementation is {kind!r}; speculative decoding keeps its own cache. Leave it unset.")
    check_target(model)
    drafter, num_assistant_tokens = choose_drafter(
        model,
        assistant_model,
        settings.get("num_assistant_tokens") if num_assistant_tokens is None else num_assistant_tokens,
        prompt_lookup_num_tokens=settings.take("prompt_lookup_num_tokens"),
        max_matching_ngram_size=settings.get("max_matching_ngram_size"),
        prefill_chunk_size=settings.get("prefill_chunk_size"),
    )
    prefix_function = None
    if prefix_allowed_tokens_fn is not None:
        prefix_function = PrefixFunctionForWantedRows(prefix_allowed_tokens_fn)

    # generate() drops the tokenizer before a callable strategy can see it, so stop strings become a criterion here.
    stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
    if (stop_strings := settings.take("stop_strings")) is not None:
        if tokenizer is None:
            raise ValueError(f"stop_strings is {stop_strings!r}; pass tokenizer=... as well, to find them in the text.")
        stopping_criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))

    def strategy(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        input_ids = input_ids.long()  # plain generate() takes int32 as well, and returns int64
        rules = StoppingRules(stopping_criteria, generation_config.max_length, input_ids.shape[1])
        layout = PromptLayout.from_mask(model_kwargs.get("attention_mask"), input_ids)
        check_call(model, layout, generation_config, model_kwargs, rules.max_length)
        wants = generation_config if generation_config.return_dict_in_generate else None
        logits, scores = (
            StepOutputs(len(input_ids)) if getattr(wants, name, False) else None
            for name in ("output_logits", "output_scores")
        )
        pad_token = generation_config._pad_token_tensor
        text = Text(
            input_ids,
            rules,
            None if pad_token is None else int(pad_token),
            streamer,
            pads_through_model=logits is not None or scores is not None,
            scores=scores,
        )
        rule = acceptance_rule(acceptance, generation_config.do_sample, len(input_ids), input_ids.device, seed)
        choice = TokenChoice(rule, Processors(logits_processor), text, prefix_function, logits, scores)
        probe_target(model)
        chunk_size = generation_config.prefill_chunk_size
        statistics = decode(model, drafter, text, choice, layout, model_kwargs, num_assistant_tokens, chunk_size)
        if wants is None:
            return text.result()
        return SpeculativeOutput(
            sequences=text.result(),
            scores=None if scores is None else scores.first(text.end),
            logits=None if logits is None else logits.first(text.end),
            statistics=statistics,
        )

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


def choose_drafter(
    model,
    assistant_model,
    num_assistant_tokens: int | None,
    prompt_lookup_num_tokens: int | None = None,
    max_matching_ngram_size: int | None = None,
    prefill_chunk_size: int | None = None,
) -> tuple[Drafter, int]:
    """The drafter that a call means, and how many tokens it drafts each round.

    `assistant_model` is a SpecFormer network, a causal LM, or an object that is a `Drafter` already.

    Raises:
        ValueError: none of them, more than one, or the drafter of another target.
    """
    assistant_model = unwrapped(assistant_model)
    check_draft_length(num_assistant_tokens)
    if num_assistant_tokens == 0:
        return NoDrafter(), 0
    if prompt_lookup_num_tokens is not None:
        if assistant_model is not None:
            raise ValueError("assistant_model and prompt_lookup_num_tokens were both given; pass one of them.")
        check_draft_length(prompt_lookup_num_tokens, "prompt_lookup_num_tokens")
        drafter = PromptLookupDrafter(max_matching_ngram_size or 2)
        num_assistant_tokens = prompt_lookup_num_tokens
    elif hasattr(assistant_model, "propose"):
        drafter = assistant_model
    elif hasattr(assistant_model, "borrow"):
        drafter = SpecFormerDrafter(assistant_model, model)
    elif isinstance(assistant_model, GenerationMixin):
        drafter = AssistantDrafter(assistant_model, model, prefill_chunk_size)
    elif assistant_model is None:
        raise ValueError(
            "Nothing was passed that drafts: give assistant_model=AutoModel.from_pretrained(<drafter>, "
            "trust_remote_code=True), a smaller causal LM as assistant_model, or prompt_lookup_num_tokens; or "
            "num_assistant_tokens=0 for plain decoding."
        )
    else:
        raise ValueError(
            f"assistant_model is a {type(assistant_model).__name__}; expected a SpecFormer drafter, loaded with "
            "AutoModel.from_pretrained(<drafter>, trust_remote_code=True), or a causal LM."
        )
    if num_assistant_tokens is None:
        num_assistant_tokens = drafter.default_num_assistant_tokens
    if num_assistant_tokens == 0:
        return NoDrafter(), 0
    return drafter, min(num_assistant_tokens, drafter.max_draft_tokens)
