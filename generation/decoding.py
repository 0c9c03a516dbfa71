"""Speculative decoding of a ragged batch: draft, verify, accept, commit.

Every row accepts its own number of tokens each round, and the text that results is the one that the target alone
writes: a token enters it only if the target takes it at that position (see `accept_tokens` and `accept_rules`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch

from .accept_tokens import TokenChoice
from .backend_linear import fast_linears
from .call_rounds import Rounds
from .call_statistics import GenerationStatistics
from .draft_length import DraftLength, round_draft_length
from .drafter import Drafter, Prompts, Verified
from .prompt import PromptLayout
from .proposal import count_drafted, to_verify
from .proposal_tree import DraftTree, along
from .ranks import decided_numbers, told
from .target import prefill, verify
from .target_positions import positions_in_table
from .target_states import StateReader
from .text import Text


@torch.no_grad()
def decode(
    model,
    drafter: Drafter,
    text: Text,
    choice: TokenChoice,
    layout: PromptLayout,
    model_kwargs: dict,
    draft_length: DraftLength,
    prefill_chunk_size: int | None = None,
    on_round: Callable | None = None,
) -> GenerationStatistics:
    """Write `text`, which holds the prompts (B, P), until every row has stopped.

    Shapes below: R rows carried by a pass, k drafted tokens, V entries of the vocabulary. Of a tree the target takes a
    path, and from there on it is as if that had been drafted alone.
    """
    input_ids, max_length = text.ids, text.rules.max_length
    statistics = GenerationStatistics(text.batch_size)
    rounds = Rounds(on_round, statistics, drafter, text, choice.rule)
    table = positions_in_table(model)

    with drafter, choice.rule, fast_linears(model):
        widest = draft_length.widest
        states_of = StateReader(model, drafter.hidden_state_layers if draft_length.most else None)
        logits, cache, states = prefill(
            model, input_ids, layout, max_length, widest + 1, model_kwargs, prefill_chunk_size, states_of, widest
        )
        drafts = input_ids.new_empty(text.batch_size, 0)  # (B, 0): the prompt pass verifies nothing
        tokens, accepted, _ = told(*choice.of_target(logits, drafts))  # (B, 1), (B,)
        _, outcome, drafted = text.append(tokens, accepted)
        statistics.count(text.rows, 0, drafted, outcome, is_prompt=True)
        statistics.lap("prefill")
        rounds.report(tokens, drafts, drafted, outcome)
        if not text.done and draft_length.most:
            drafter.begin(Prompts(input_ids, layout, tokens, max_length, states))

        while not text.done:
            if (kept := text.drop_finished()) is not None:
                longest = longest_read(text, layout)
                cache.select_rows(kept, longest)
                drafter.select_rows(kept, longest)
            started = perf_counter()
            wanted, tree_size = decided_numbers(2, partial(draft_length.amounts, len(text.rows)))
            k = round_draft_length(min(wanted, draft_length.most), min(text.running_lengths()), text.stops.limit)
            if table is not None:
                k = max(0, min(k, table - 1 - longest_read(text, layout)))
            drafts, tree, sources = input_ids.new_empty(len(text.rows), 0), None, None
            if k and text.stops.in_step.may_draft():
                if tree_size:
                    proposal = drafter.propose_tree(k, wanted, choice.chances)
                else:
                    proposal = drafter.propose(k, choice.for_drafter)
                proposal = choice.checked(proposal, drafter, k, tree_size)
                keep = partial(draft_length.keep, proposal, text.device_idle, started)
                proposal = to_verify(proposal, keep)
                sources = proposal.sources
                drafts = text.pad_stopped(proposal.tokens)  # (R, k) or fewer
                tree = DraftTree.of(drafts, proposal, k)
            statistics.lap("draft")

            block = torch.cat([text.last_tokens(), choice.readable(drafts)], dim=1)
            branches = () if tree is None else (tree.depths, tree.ancestors)
            logits, states = verify(model, cache, block, states_of, branches)  # (R, k + 1, V), (R, k + 1, S, d)
            statistics.lap("verify")

            tokens, accepted, path = told(*choice.of_target(logits, drafts, tree))  # (R, k + 1), (R,)
            if path is not None:
                cache.follow(path)
                logits, states = along(logits, path), None if states is None else along(states, path)
            drafted = count_drafted(drafts) if tree is None else tree.drafted()  # (R,)
            counts, outcome, drafted = text.append(tokens, accepted, drafted)
            deepest = drafts.shape[1] if tree is None else tree.depth
            statistics.count(text.rows, deepest, drafted, outcome, is_prompt=False)
            draft_length.record(len(text.rows), drafts.shape[1], outcome, perf_counter() - started, path)
            statistics.lap("accept")
            rounds.report(tokens, drafts, drafted, outcome, sources, path)

            if not text.done:
                longest = longest_read(text, layout)
                cache.advance(counts, longest)
                if draft_length.most:
                    seen = logits if drafter.reads_logits else None
                    drafter.update(Verified(tokens, counts, longest, states, seen))
                choice.rule.forget_before(min(text.running_lengths()))
                statistics.lap("draft")

        choice.finish()
    statistics.finish(text.stops.tokens_per_row)
    return statistics


def longest_read(text: Text, layout: PromptLayout) -> int:
    """Tokens of the longest row that the target has read: all but the newest one."""
    return max(layout.host_lengths[row] + text.generated[row] for row in text.rows) - 1
