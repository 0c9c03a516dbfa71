"""Acceptance by comparison, and the noise that makes seeded sampling the same as plain generate()'s."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specformer.generation import accept_noise as noise_module
from specformer.generation.accept_noise import HashedNoise, StepNoise
from specformer.generation.accept_sampling import count_accepted, places_of_best, sample_with_noise
from specformer.generation.text_positions import Positions

CPU = torch.device("cpu")
BATCH, VOCAB = 3, 50


@given(st.data())
def test_count_accepted(data):
    rows, k = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 6))
    token = st.integers(0, 2)
    drafts = data.draw(st.lists(st.lists(token, min_size=k, max_size=k), min_size=rows, max_size=rows))
    tokens = data.draw(st.lists(st.lists(token, min_size=k + 1, max_size=k + 1), min_size=rows, max_size=rows))
    expected = []
    for drafted, taken in zip(drafts, tokens, strict=True):
        wrong = [slot for slot in range(k) if drafted[slot] != taken[slot]]
        expected.append(min(wrong, default=k))
    accepted = torch.tensor(drafts, dtype=torch.long).view(rows, k) == torch.tensor(tokens)[:, :k]
    counts = count_accepted(accepted)
    assert counts.tolist() == expected


def random_scores(rows: int, vocab_size: int, zeros: bool = False) -> torch.Tensor:
    scores = 2 * torch.randn(rows, vocab_size)
    if zeros:  # as top-k leaves them
        scores[torch.rand(scores.shape) < 0.9] = -torch.inf
        scores[:, vocab_size // 2] = 0.0
    return scores


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("vocab_size", [2, 15, 16, 17, 1000, 49152])
def test_sample_with_noise_is_multinomial(vocab_size: int, rows: int, zeros: bool):
    for seed in range(5):
        torch.manual_seed(seed)
        scores = random_scores(rows, vocab_size, zeros)
        before = torch.get_rng_state()
        expected = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        taken = sample_with_noise(scores, torch.empty(rows, vocab_size).exponential_(1))
        assert taken.tolist() == expected.tolist()
        assert torch.equal(torch.get_rng_state(), after)
        assert (scores.gather(1, taken[:, None]) > -torch.inf).all()


def plain_draws(scores: list[torch.Tensor]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens of consecutive steps as plain generate() samples them, and the generator's state before each step and
    after the last. The default generator is left as it was."""
    states, tokens = [torch.get_rng_state()], []
    for step in scores:
        tokens.append(torch.multinomial(step.softmax(-1), 1)[:, 0].tolist())
        states.append(torch.get_rng_state())
    torch.set_rng_state(states[0])
    return tokens, states


@pytest.fixture(params=["roomy", "tiny"])
def kept_bytes(request, monkeypatch):
    if request.param == "tiny":
        monkeypatch.setattr(noise_module, "KEPT_BYTES", 1)


def check_steps(asked: list[int]) -> None:
    torch.manual_seed(11)
    scores = [random_scores(BATCH, VOCAB) for _ in range(8)]
    expected, states = plain_draws(scores)
    noise = StepNoise(BATCH, CPU)
    for step in asked:
        assert sample_with_noise(scores[step], noise.step(step, VOCAB)).tolist() == expected[step]
    assert torch.equal(torch.get_rng_state(), states[0])
    noise.leave_after(len(scores), VOCAB)
    assert torch.equal(torch.get_rng_state(), states[-1])


@settings(max_examples=40)
@given(st.lists(st.integers(0, 7), max_size=12))
def test_steps_in_any_order_are_the_consecutive_ones(asked: list[int]):
    check_steps(asked)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 7), max_size=12))
def test_steps_that_were_not_kept_are_drawn_again(asked: list[int]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_module, "KEPT_BYTES", 1)
        check_steps(asked)


def test_gather_takes_each_pair_of_row_and_step(kept_bytes):
    pairs = [(2, 1), (0, 5), (1, 1), (2, 0), (0, 1), (0, 0), (2, 5)]
    reference = [StepNoise(BATCH, CPU).step(step, VOCAB) for step in range(6)]
    gathered = StepNoise(BATCH, CPU).gather(Positions(*torch.tensor(pairs).unbind(1)), VOCAB)
    for noise, (row, step) in zip(gathered, pairs, strict=True):
        assert torch.equal(noise, reference[step][row])


@pytest.mark.parametrize("noise", [lambda: StepNoise(BATCH, CPU), lambda: HashedNoise([3, 1, 4], CPU)])
def test_gather_takes_some_tokens(noise):
    positions = Positions(torch.tensor([2, 0, 1, 2]), torch.tensor([1, 5, 1, 0]))
    token_ids = torch.stack([torch.randperm(VOCAB)[:7] for _ in range(4)])
    found = [noise().gather(positions, VOCAB, ids) for ids in (None, token_ids)]
    assert torch.equal(found[0].gather(1, token_ids), found[1])


@pytest.mark.parametrize("forgotten", [0, 1, 3, 4])
def test_forget_before(forgotten: int, kept_bytes):
    reference = [StepNoise(BATCH, CPU).step(step, VOCAB) for step in range(7)]
    noise = StepNoise(BATCH, CPU)
    noise.step(4, VOCAB)
    noise.forget_before(forgotten)
    assert all(step >= forgotten for step in [*noise.kept, *noise.states])
    for step in [6, *range(forgotten, 7)]:
        assert torch.equal(noise.step(step, VOCAB), reference[step])


def test_what_is_kept_fits_into_its_bytes(monkeypatch):
    monkeypatch.setattr(noise_module, "KEPT_BYTES", 3 * BATCH * VOCAB * 4)
    noise = StepNoise(BATCH, CPU)
    for step in range(9):
        noise.step(step, VOCAB)
        assert len(noise.kept) == min(step + 1, 3)
    assert list(noise.kept) == [6, 7, 8]


@pytest.mark.parametrize("end", [0, 1, 3, 5, 6])
def test_leave_after(end: int, kept_bytes):
    """Fewer steps than were looked at, as many, and one more."""
    _, states = plain_draws([torch.zeros(BATCH, VOCAB)] * 6)
    noise = StepNoise(BATCH, CPU)
    noise.gather(Positions(torch.tensor([0, 1, 2]), torch.tensor([4, 2, 0])), VOCAB)
    noise.leave_after(end, VOCAB)
    assert torch.equal(torch.get_rng_state(), states[end])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_is_float32_whatever_the_default_dtype(dtype: torch.dtype):
    """generate() samples from float32 scores."""
    scores = [random_scores(BATCH, 5000) for _ in range(3)]
    expected, _ = plain_draws(scores)
    noise = StepNoise(BATCH, CPU)
    torch.set_default_dtype(dtype)
    try:
        drawn = [noise.gather(Positions.at(list(range(BATCH)), step), 5000)[:, 0] for step in range(3)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {draw.dtype for draw in drawn} == {torch.float32}
    assert [sample_with_noise(*pair).tolist() for pair in zip(scores, drawn, strict=True)] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 40, 64, 96, 256, 1024, 50257 // 64 * 32 + 1])
def test_places_of_best_are_those_of_argmax(width: int, dtype: torch.dtype):
    """The first place of several that are equal, and of NaN."""
    generator = torch.Generator().manual_seed(width)
    values = torch.randn(60, 3, width, generator=generator, dtype=dtype)
    values[:20] = torch.randint(0, 3, values[:20].shape, generator=generator).to(dtype)  # many ties
    some = torch.rand(values.shape, generator=generator)
    values[20:30] = values[20:30].masked_fill(some[20:30] < 0.02, torch.nan)
    values[30:40] = values[30:40].masked_fill(some[30:40] < 0.3, torch.inf)
    values[40:50] = values[40:50].masked_fill(some[40:50] < 0.9, -torch.inf)
    values[50:] = -torch.inf
    assert torch.equal(places_of_best(values), values.argmax(dim=-1))
    assert places_of_best(values[:0]).shape == (0, 3) and places_of_best(values[:, :0]).shape == (60, 0)
