"""The custom generation strategy: what `target.generate(..., custom_generate=<this repository>)` calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from .accept_processors import PrefixFunctionForWantedRows, Processors
from .accept_rules import acceptance_rule, check_acceptance
from .accept_tokens import TokenChoice
from .backend_graphs import recorded_passes
from .backend_recordable import check_recordable
from .backend_versions import pad_token_id, warn_if_untested
from .call_drafter import choose_draft_length, choose_drafter, drafter_under
from .call_refusals import check_arguments, check_call
from .call_settings import CallSettings
from .call_statistics import GenerationStatistics
from .decoding import decode
from .prompt import PromptLayout
from .prompt_groups import tokens_of_a_pass
from .target_attention import usable_attention
from .target_probe import probe_target
from .target_refusals import check_target, unwrapped
from .text import Text
from .text_in_step import InStep
from .text_outputs import StepOutputs
from .text_stopping import StoppingRules

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


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What generate() returns with `return_dict_in_generate=True`: `sequences`, `statistics`, and `scores` and `logits`
    if they were asked for. The cache is not returned."""

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
    num_assistant_tokens: int | str | None = None,
    acceptance: str = "match",
    seed: int | list[int] | None = None,
    cuda_graphs: bool = False,
    custom_generate=None,
    **kwargs,
):
    """Generate what `model.generate(...)` generates, with drafted tokens.

    Args:
        model: the target, any decoder-only causal LM that keeps keys and values of all tokens.
        assistant_model: what drafts: the SpecFormer drafter of that target, which is moved to the target's
            device and computes in its dtype, or a smaller causal LM with the same tokenizer. Where a row's text
            repeats itself, the SpecFormer drafter leaves it to copies of that text (`drafter_copying`), but with
            "rejection"; `prompt_lookup_num_tokens` says how many tokens, and 0 none. With `prompt_lookup_num_tokens`
            alone, all drafts are copied.
        num_assistant_tokens: tokens to draft each round. "auto" drafts what pays, measured while it runs: see
            `draft_length_auto`. `None` takes the generation config's number, else is "auto", but with "rejection" the
            drafter's default. More than the drafter has slots, or than are copied, is cut to that; 0
            decodes plainly.
        acceptance: when sampling, "match" gives the same tokens as plain generate() with the same torch seed;
            "coupled" gives each row a text that depends on its own seed alone; "rejection" accepts most drafts, and
            gives a text with the same distribution. see `accept_rules`.
        seed: for "coupled", an integer (row b of the expanded batch has seed + b) or one integer per row; `None` draws
            one from torch's generator.
        cuda_graphs: on one CUDA GPU, record the passes of target and drafter and replay them, which saves the time in
            which a GPU waits for the host: see `backend_graphs`. Replays do not call other code's hooks, and no other
            thread may use the GPU's random numbers meanwhile.
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
    warn_if_untested()
    model = unwrapped(model)
    settings = CallSettings(kwargs, generation_config, model.generation_config)
    check_acceptance(acceptance, seed)
    if custom_generate is not None:
        raise ValueError(
            "custom_generate was given to a function that is a generation strategy itself. Leave it unset, or call "
            "model.generate(..., custom_generate=<string>)."
        )
    check_arguments(assistant_model, inputs, synced_gpus, tokenizer, assistant_tokenizer, settings)
    check_target(model)
    if cuda_graphs:
        check_recordable(model, unwrapped(assistant_model))
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
        if not any(isinstance(criterion, StopStringCriteria) for criterion in stopping_criteria):
            stopping_criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))

    def strategy(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        input_ids = input_ids.long()  # plain generate() takes int32 as well, and returns int64
        rules = StoppingRules(stopping_criteria, generation_config.max_length, input_ids.shape[1])
        layout = PromptLayout.from_mask(model_kwargs.get("attention_mask"), input_ids, tokens_of_a_pass(model))
        check_call(model, layout, generation_config, model_kwargs, rules.max_length)
        wants = generation_config if generation_config.return_dict_in_generate else None
        logits, scores = (
            StepOutputs(len(input_ids)) if getattr(wants, name, False) else None
            for name in ("output_logits", "output_scores")
        )
        processors = Processors(logits_processor, prefix_function)
        in_step = InStep(len(input_ids))
        if (returned := processors.rows_of_a_prompt) > 1:
            in_step.require(
                f"prefix_allowed_tokens_fn holds for the {returned} sequences of a prompt together, in this version of "
                "transformers."
            )
        text = Text(
            input_ids,
            rules,
            pad_token_id(generation_config),
            streamer,
            pads_through_model=logits is not None or scores is not None,
            is_read=processors.need_prefix,
            scores=scores,
            in_step=in_step,
        )
        rule = acceptance_rule(acceptance, generation_config.do_sample, len(input_ids), input_ids.device, seed)
        choice = TokenChoice(rule, processors, text, logits, scores)
        probe_target(model)
        chunk_size = generation_config.prefill_chunk_size
        drafting = drafter_under(rule, drafter)
        draft_length = choose_draft_length(num_assistant_tokens, drafting, model, assistant_model, rule, cuda_graphs)
        with recorded_passes(cuda_graphs):
            statistics = decode(model, drafting, text, choice, layout, model_kwargs, draft_length, chunk_size)
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
