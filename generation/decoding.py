"""Speculative decoding of a ragged batch: draft, verify, accept, commit.

Every row accepts its own number of tokens each round, and the text that results is the one that the target alone
writes: a token enters it only if the target takes it at that position (see `verification` and `token_choice`).
"""

from __future__ import annotations

import torch

from .draft_length import round_draft_length
from .drafter import Drafter
from .noise import StepNoise
from .processors import PrefixFunctionForWantedRows, Processors
from .prompt import PromptLayout
from .statistics import GenerationStatistics
from .stopping import StoppingRules
from .target import prefill, verify
from .text import Text
from .token_choice import TokenChoice
from .verification import count_matches


@torch.no_grad()
def decode(
    model,
    drafter: Drafter,
    input_ids: torch.Tensor,
    layout: PromptLayout,
    processors: Processors,
    rules: StoppingRules,
    generation_config,
    model_kwargs: dict,
    num_assistant_tokens: int,
    streamer=None,
    prefix_function: PrefixFunctionForWantedRows | None = None,
) -> tuple[torch.Tensor, GenerationStatistics]:
    """Generate from prompts (B, P) until every row has stopped.

    Shapes below: R rows carried by a pass, k drafted tokens, V entries of the vocabulary.

    Returns:
        What plain generate() returns, (B, P + new tokens), and statistics.
    """
    statistics = GenerationStatistics(len(input_ids))
    pad_token = generation_config._pad_token_tensor
    text = Text(input_ids, rules, None if pad_token is None else int(pad_token), streamer)
    noise = StepNoise(len(input_ids), input_ids.device) if generation_config.do_sample else None
    choice = TokenChoice(processors, noise, text, prefix_function)

    with drafter:
        block_size = num_assistant_tokens + 1
        chunk_size = generation_config.prefill_chunk_size
        logits, cache = prefill(model, input_ids, layout, rules.max_length, block_size, model_kwargs, chunk_size)
        drafts = input_ids.new_empty(len(input_ids), 0)  # (B, 0): the prompt pass verifies nothing
        tokens = choice.of_target(logits, drafts)  # (B, 1)
        _, outcome = text.append(tokens, count_matches(drafts, tokens))
        statistics.count(text.rows, 0, outcome, is_prompt=True)
        statistics.lap("prefill")
        if not text.done and num_assistant_tokens:
            drafter.begin(input_ids, layout, tokens, rules.max_length)
        # Tokens of each row in the cache. Not what `text` counts: a criterion may cut a row inside what was accepted.
        read = list(layout.host_lengths)

        while not text.done:
            if (kept := text.drop_finished()) is not None:
                cache.select_rows(kept, max(read[row] for row in text.rows))
                drafter.select_rows(kept, cache.longest)
            k = round_draft_length(num_assistant_tokens, min(text.running_lengths()), text.max_new_tokens)
            if k:
                drafts = drafter.propose(k, choice.of_drafter).to(input_ids.device)  # (R, k)
            else:
                drafts = input_ids.new_empty(len(text.rows), 0)
            statistics.lap("draft")

            logits = verify(model, cache, torch.cat([text.last_tokens(), drafts], dim=1))  # (R, k + 1, V)
            statistics.lap("verify")

            tokens = choice.of_target(logits, drafts)  # (R, k + 1)
            counts, outcome = text.append(tokens, count_matches(drafts, tokens))
            statistics.count(text.rows, k, outcome, is_prompt=False)
            for row, (_, added) in zip(text.rows, outcome, strict=True):
                read[row] += added
            statistics.lap("accept")

            if not text.done:
                longest = max(read[row] for row in text.rows)
                cache.advance(counts, longest)
                if num_assistant_tokens:
                    drafter.update(tokens, counts, longest)
                if noise is not None:
                    noise.forget_before(min(text.running_lengths()))
                statistics.lap("draft")

    statistics.tokens_per_row = [min(generated, text.end) for generated in text.generated]
    if noise is not None:
        noise.leave_after(text.end, logits.shape[-1])
    return text.result(), statistics
