"""The custom generation strategy: what `target.generate(..., custom_generate=<this repository>)` calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .accept_noise import share_generators
from .accept_processors import PrefixFunctionForWantedRows, Processors
from .accept_rules import acceptance_rule, check_acceptance
from .accept_tokens import TokenChoice
from .backend_graphs import recorded_passes
from .backend_recordable import check_recordable
from .backend_versions import pad_token_id, warn_if_untested
from .call_drafter import DraftSettings, choose_draft_length, choose_drafter
from .call_refusals import check_arguments, check_call
from .call_rounds import Round, check_on_round
from .call_settings import CallSettings
from .call_statistics import GenerationStatistics
from .decoding import decode
from .draft_length import DraftLength
from .drafter import Drafter, NoDrafter
from .drafter_system import finished_texts, is_system
from .prompt import PromptLayout
from .ranks import among_ranks
from .ranks_agreement import check_agreement
from .target import prompt_layout
from .target_attention import usable_attention
from .target_probe import probe_target
from .target_refusals import check_target, unwrapped
from .text import Text
from .text_in_step import InStep
from .text_outputs import StepOutputs
from .text_stopping import StoppingRules, with_stop_strings
from .text_stops import RowStops

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
    tree_size: int | None = None,
    acceptance: str = "match",
    seed: int | list[int] | None = None,
    cuda_graphs: bool = False,
    on_round: Callable[[Round], object] | None = None,
    custom_generate=None,
    **kwargs,
):
    """Generate what `model.generate(...)` generates, with drafted tokens.

    Args:
        model: the target, any decoder-only causal LM that keeps keys and values of all tokens, or states, in its cache.
        assistant_model: what drafts: the SpecFormer drafter of that target, which is moved to the target's
            device and computes in its dtype; the folder or Hub id of a DFlash, DSpark or EAGLE-3 drafter; or a smaller
            causal LM with the same tokenizer. Where a row's text repeats itself, drafters that read the target's hidden
            states leave it to copies of that text (`drafter_copying`), but with "rejection";
            `prompt_lookup_num_tokens` says how many tokens, and 0 none. With `prompt_lookup_num_tokens` alone, all
            drafts are copied. With `use_mtp=True` in its place the target's own MTP layer drafts (`drafter_mtp`).
        num_assistant_tokens: tokens to draft each round. "auto" drafts what pays, measured while it runs: see
            `draft_length_auto`. `None` takes the generation config's number, else is "auto", but with "rejection" the
            drafter's default. More than the drafter has slots, or than are copied, is cut to that; 0
            decodes plainly.
        tree_size: tokens to draft each round as a tree, several guesses at a position: `num_assistant_tokens` is then
            how deep it may be, and where that is "auto", so many at most. For drafters that propose trees. `None`:
            trees under "auto" alone, where they pay, and not with "rejection"; 0: none.
        acceptance: when sampling, "match" gives the same tokens as plain generate() with the same torch seed;
            "coupled" gives each row a text that depends on its own seed alone; "rejection" accepts most drafts, and
            gives a text with the same distribution. See `accept_rules`.
        seed: for "coupled", an integer (row b of the expanded batch has seed + b) or one integer per row; `None` draws
            one from torch's generator.
        cuda_graphs: on one CUDA GPU, record the passes of target and drafter and replay them, which saves the time in
            which a GPU waits for the host: see `backend_graphs`. Replays do not call other code's hooks, and no other
            thread may use the GPU's random numbers meanwhile.
        on_round: is called with a `Round` after each pass of the target: who drafted what for each row, what was
            accepted, and what the target wrote. The text does not depend on it. An exception of it ends the call.
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
    check_on_round(on_round)
    check_arguments(assistant_model, inputs, synced_gpus, tokenizer, assistant_tokenizer, custom_generate, settings)
    check_target(model)
    drafts = DraftSettings.of_call(model, assistant_model, num_assistant_tokens, tree_size, settings)
    if cuda_graphs:
        check_recordable(model, drafts.assistant_model)
    strategy = Strategy(
        drafts,
        acceptance,
        seed,
        None if prefix_allowed_tokens_fn is None else PrefixFunctionForWantedRows(prefix_allowed_tokens_fn),
        streamer,
        cuda_graphs,
        on_round,
    )
    with usable_attention(model), among_ranks(model):
        # GenerationMixin's, since the model's own generate may be this very strategy, or another repository's.
        return GenerationMixin.generate(
            model,
            inputs,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=with_stop_strings(stopping_criteria, settings.take("stop_strings"), tokenizer),
            prefix_allowed_tokens_fn=strategy.prefix_function,
            streamer=streamer,
            custom_generate=strategy,
            **kwargs,
        )


@dataclass
class PreparedCall:
    """A call before its first token; what `decode` takes."""

    drafter: Drafter
    text: Text
    choice: TokenChoice
    layout: PromptLayout
    model_kwargs: dict
    draft_length: DraftLength


@dataclass
class Strategy:
    """What a call does once transformers' generate() has prepared it; the arguments are those of `generate`."""

    drafts: DraftSettings
    acceptance: str
    seed: int | list[int] | None
    prefix_function: PrefixFunctionForWantedRows | None
    streamer: object
    cuda_graphs: bool
    on_round: Callable[[Round], object] | None

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        call = self.prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        text, choice = call.text, call.choice
        with recorded_passes(self.cuda_graphs):
            statistics = decode(
                model,
                call.drafter,
                text,
                choice,
                call.layout,
                call.model_kwargs,
                call.draft_length,
                generation_config.prefill_chunk_size,
                self.on_round,
            )
        if is_system(system := self.drafts.assistant_model):
            system.finished(finished_texts(text.result(), call.layout, statistics.tokens_per_row))
        if not generation_config.return_dict_in_generate:
            return text.result()
        logits, scores, limit = choice.logits, choice.scores, text.stops.limit
        # transformers' annotations name classes that tensors do not have, and tuples of one
        return SpeculativeOutput(
            sequences=text.result(),  # type: ignore[arg-type]
            scores=None if scores is None else scores.first(limit),  # type: ignore[arg-type]
            logits=None if logits is None else logits.first(limit),  # type: ignore[arg-type]
            statistics=statistics,
        )

    def prepared(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ) -> PreparedCall:
        """What is decided before the first token. Passed as `custom_generate` itself, generate() returns it.

        Raises: see `generate`.
        """
        input_ids = input_ids.long()  # plain generate() takes int32 as well, and returns int64
        batch_size, width = input_ids.shape
        settings = [generation_config, logits_processor, stopping_criteria, self.acceptance, self.seed]
        check_agreement([input_ids, model_kwargs.get("attention_mask")], settings, self.drafts)
        if generation_config.do_sample:
            share_generators(input_ids.device)
        rules = StoppingRules(stopping_criteria, generation_config.max_length, width)
        layout = prompt_layout(model, model_kwargs.get("attention_mask"), input_ids)
        check_call(model, layout, generation_config, model_kwargs, rules.max_length)
        rule = acceptance_rule(self.acceptance, generation_config.do_sample, batch_size, input_ids.device, self.seed)
        drafter = choose_drafter(model, self.drafts, rule)
        probe_target(model)
        draft_length = choose_draft_length(model, self.drafts, rule, drafter, self.cuda_graphs)
        if not draft_length.most:
            drafter = NoDrafter()

        processors = Processors(logits_processor, self.prefix_function)
        wants = generation_config if generation_config.return_dict_in_generate else None
        logits, scores = (
            StepOutputs(batch_size) if getattr(wants, f"output_{name}", False) else None
            for name in ("logits", "scores")
        )
        in_step = InStep(batch_size)
        if (returned := processors.rows_of_a_prompt) > 1:
            in_step.require(
                f"prefix_allowed_tokens_fn holds for the {returned} sequences of a prompt together, in this version of "
                "transformers."
            )
        stops = RowStops(rules, batch_size, width, processors.need_prefix, scores, in_step)
        text = Text(
            input_ids,
            stops,
            pad_token_id(generation_config),
            self.streamer,
            pads_through_model=logits is not None or scores is not None,
        )
        choice = TokenChoice(rule, processors, text, logits, scores)
        return PreparedCall(drafter, text, choice, layout, model_kwargs, draft_length)
