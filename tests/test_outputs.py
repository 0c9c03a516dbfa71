"""return_dict_in_generate: scores and logits as plain generate() fills them, finished rows included."""

from __future__ import annotations

import pytest
import torch
from exactness import oracle, plain
from test_exactness import NEW_TOKENS, SAMPLING, StopAt, meaningful_target
from tiny import llama

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation.text import Text

SETTINGS = {
    "greedy": {},
    "no end of sequence": dict(eos_token_id=None),
    "sampling": SAMPLING,
    "penalty": dict(SAMPLING, repetition_penalty=1.3),
    "num_return_sequences": dict(SAMPLING, num_return_sequences=3),
    "rows stop on their own": dict(stopping_criteria=[StopAt([12, 30, 17, 11, 22])]),
    "rows stop on their own, no end of sequence": dict(
        stopping_criteria=[StopAt([12, 30, 17, 11, 22])], eos_token_id=None
    ),
    "the pad token ends a row": dict(SAMPLING, pad_token_id=0, eos_token_id=[0, 7]),
    "the pad token ends a row, penalty": dict(repetition_penalty=1.3, pad_token_id=0, eos_token_id=[0, 7]),
}
OUTPUTS = dict(output_scores=True, output_logits=True, return_dict_in_generate=True)


def both(target, batch: dict, drafter, k: int, seed: int = 3, **arguments):
    torch.manual_seed(seed)
    expected = target.generate(**batch, **arguments)
    torch.manual_seed(seed)
    return expected, generate(target, drafter, **batch, **arguments, num_assistant_tokens=k)


def assert_same_steps(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert len(ours) == len(expected)
    for step, (our, their) in enumerate(zip(ours, expected, strict=True)):
        assert our.shape == their.shape, step
        assert our.dtype == their.dtype == torch.float32
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5, msg=f"step {step}")


def check_outputs(setting: str, kind: str) -> None:
    target, batch, eos = meaningful_target("llama")
    arguments = {"eos_token_id": eos, **SETTINGS[setting], "max_new_tokens": NEW_TOKENS}
    reference = plain(target, batch, **arguments)
    for k in (1, 4, 8):
        expected, ours = both(target, batch, oracle(reference, batch, kind, eos), k, **arguments, **OUTPUTS)
        assert torch.equal(ours.sequences, expected.sequences)
        assert_same_steps(ours.scores, expected.scores)
        assert_same_steps(ours.logits, expected.logits)
        assert torch.equal(torch.get_rng_state(), reference.generator_state)


@pytest.mark.parametrize("kind", ["always", "sometimes", "adversarial"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_scores_and_logits(setting: str, kind: str):
    check_outputs(setting, kind)


@pytest.mark.parametrize("setting", ["greedy", "penalty", "rows stop on their own"])
def test_the_check_finds_rows_that_are_not_padded_through_the_model(setting: str, monkeypatch):
    """The check can fail: scores of finished rows are those of their padding, in plain generate()."""
    initialise = Text.__init__

    def fault(self, *args, pads_through_model=False, **kwargs):
        initialise(self, *args, pads_through_model=False, **kwargs)

    monkeypatch.setattr(Text, "__init__", fault)
    with pytest.raises(AssertionError):
        check_outputs(setting, "sometimes")


@pytest.mark.parametrize("setting", ["greedy", "sampling", "penalty"])
def test_compute_transition_scores(setting: str):
    target, batch, eos = meaningful_target("gpt2")
    arguments = {"eos_token_id": eos, **SETTINGS[setting], "max_new_tokens": NEW_TOKENS}
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))
    outputs = dict(output_scores=True, return_dict_in_generate=True)
    expected, ours = both(target, batch, drafter, 4, **arguments, **outputs)
    for normalize in (False, True):
        scores = [
            target.compute_transition_scores(output.sequences, output.scores, normalize_logits=normalize)
            for output in (expected, ours)
        ]
        assert scores[0].shape == (5, expected.sequences.shape[1] - 9)
        torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)


def test_only_what_was_asked_for():
    target, batch, _ = meaningful_target("llama")
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))
    arguments = dict(batch, max_new_tokens=4, num_assistant_tokens=2)
    output = generate(target, drafter, **arguments, return_dict_in_generate=True)
    assert output.scores is None and output.logits is None and output.past_key_values is None
    assert list(output.keys()) == ["sequences", "statistics"]
    output = generate(target, drafter, **arguments, return_dict_in_generate=True, output_logits=True)
    assert output.scores is None and len(output.logits) == 4
    assert isinstance(generate(target, drafter, **arguments, output_scores=True), torch.Tensor)


def test_statistics_leave_padding_out():
    """Rows that are carried on for their scores are not counted as generating."""
    target, batch, eos = meaningful_target("llama")
    arguments = dict(batch, max_new_tokens=NEW_TOKENS, eos_token_id=eos, num_assistant_tokens=4)
    reference = plain(target, batch, max_new_tokens=NEW_TOKENS, eos_token_id=eos)
    counted = []
    for outputs in ({}, OUTPUTS):
        drafter = oracle(reference, batch, "always", eos)
        outputs = dict(outputs, return_dict_in_generate=True)
        statistics = generate(target, drafter, **arguments, **outputs).statistics
        counted.append((statistics.tokens_per_row, statistics.target_passes_per_row, statistics.tokens_per_pass))
    assert counted[0] == counted[1]
    assert len(set(counted[0][0])) > 2  # rows end at different places


class StopWhenUnsure:
    """A criterion that looks at the scores of the newest token."""

    eos_token_id = None  # so that plain generate() pads the rows it stops

    def __init__(self):
        self.asked: list[tuple[int, int]] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append((input_ids.shape[1], len(scores)))
        return scores[-1].softmax(-1).amax(-1) < 0.056


@pytest.mark.parametrize("kind", ["always", "sometimes", "adversarial"])
def test_criteria_see_the_scores(kind: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(max_new_tokens=NEW_TOKENS, output_scores=True, return_dict_in_generate=True)
    expected = target.generate(**batch, **arguments, stopping_criteria=[StopWhenUnsure()])
    full = plain(target, batch, max_new_tokens=NEW_TOKENS)
    assert expected.sequences.tolist() != full.sequences.tolist()
    criterion = StopWhenUnsure()
    drafter = oracle(full, batch, kind, eos)
    ours = generate(target, drafter, **batch, **arguments, num_assistant_tokens=4, stopping_criteria=[criterion])
    assert torch.equal(ours.sequences, expected.sequences)
    assert all(steps == width - 9 for width, steps in criterion.asked)


def test_criteria_see_no_scores_where_plain_generate_shows_none():
    seen = []

    def criterion(input_ids, scores, **kwargs):
        seen.append(scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    target = llama()
    generate(target, target, torch.tensor([[7, 8, 9]]), max_new_tokens=6, stopping_criteria=[criterion])
    assert seen and all(scores is None for scores in seen)
