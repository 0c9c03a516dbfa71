"""What transformers' own assisted decoding cannot do, side by side with the same call through this strategy.

`test_ours` must pass. `test_theirs` runs the same check on assisted decoding of the installed transformers: it is
expected to fail, and a pass that shows up there means that a limit was lifted.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exactness import Recorder
from tiny import llama, ragged_batch
from transformers import PreTrainedModel, StoppingCriteria

from specformer import generate

NEW_TOKENS = 24
SAMPLING = dict(do_sample=True, temperature=1.3, top_k=20)


def theirs(target: PreTrainedModel, **arguments):
    return target.generate(**arguments)


def ours(target: PreTrainedModel, assistant_model=None, **arguments):
    return generate(target, assistant_model, **arguments)


def likes_what_came_five_before(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Makes texts that repeat themselves, which prompt lookup can draft."""
    return scores.scatter_add(1, input_ids[:, -5:-4], scores.new_full((len(scores), 1), 6.0))


def both_ways(run: Callable, batch: dict, drafting: str, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain generate()'s tokens, and those of the same call with drafting, from the same seed."""
    target = llama()
    arguments = dict(arguments, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    if drafting == "assistant":  # that is mostly right: the target itself, a little changed
        assistant = llama()
        with torch.no_grad():
            assistant.lm_head.weight += 0.02 * torch.randn(assistant.lm_head.weight.shape, dtype=torch.float64)
        assistant.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
        drafts = dict(assistant_model=assistant)
    else:
        arguments["logits_processor"] = [likes_what_came_five_before]
        drafts = dict(prompt_lookup_num_tokens=4)
    streamers = arguments.pop("streamers", (None, None))
    torch.manual_seed(3)
    expected = target.generate(**batch, **arguments, streamer=streamers[0])
    torch.manual_seed(3)
    return expected, run(target, **batch, **arguments, **drafts, streamer=streamers[1])


def one_prompt() -> dict:
    return ragged_batch(padding=(0,))


def batch_of_different_prompts(run: Callable, drafting: str) -> None:
    """transformers: `assisted generate is only supported for batch_size = 1`."""
    expected, actual = both_ways(run, ragged_batch(), drafting)
    assert actual.tolist() == expected.tolist()


def several_sequences_of_one_prompt(run: Callable, drafting: str) -> None:
    """transformers: `num_return_sequences has to be 1 when doing assisted generate`."""
    expected, actual = both_ways(run, one_prompt(), drafting, num_return_sequences=3, **SAMPLING)
    assert actual.tolist() == expected.tolist()


class StopAtColumn(StoppingCriteria):
    """Like a stop string, it looks at how the text ends, and does not see what is further back."""

    def __init__(self, column: int):
        self.column = column

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] == self.column)


def stop_inside_a_draft(run: Callable, drafting: str) -> None:
    """transformers asks its criteria about the end of each accepted draft only (issue 48039)."""
    for column in range(10, 22):  # every offset of the drafts
        expected, actual = both_ways(run, one_prompt(), drafting, stopping_criteria=[StopAtColumn(column)])
        assert expected.shape[1] == column
        assert actual.tolist() == expected.tolist()


def streamer_gets_one_token_at_a_time(run: Callable, drafting: str) -> None:
    """transformers streams whole accepted drafts."""
    streamers = Recorder(), Recorder()
    expected, actual = both_ways(run, one_prompt(), drafting, streamers=streamers)
    assert actual.tolist() == expected.tolist()
    assert streamers[1].calls == streamers[0].calls


def sampled_text_of_a_seed(run: Callable, drafting: str) -> None:
    """transformers samples from the same distribution, but not what plain generate() samples with the same seed."""
    expected, actual = both_ways(run, one_prompt(), drafting, **SAMPLING)
    assert actual.tolist() == expected.tolist()


LIMITS = [
    batch_of_different_prompts,
    several_sequences_of_one_prompt,
    stop_inside_a_draft,
    streamer_gets_one_token_at_a_time,
    sampled_text_of_a_seed,
]
DRAFTING = ["assistant", "prompt lookup"]


@pytest.mark.parametrize("drafting", DRAFTING)
@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.__name__)
def test_ours(limit: Callable, drafting: str):
    limit(ours, drafting)


@pytest.mark.xfail(reason="a limit of transformers' own assisted decoding", strict=False)
@pytest.mark.parametrize("drafting", DRAFTING)
@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.__name__)
def test_theirs(limit: Callable, drafting: str):
    limit(theirs, drafting)
