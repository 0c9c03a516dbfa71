"""Confidences: what they learn, their calibration, and what "auto" makes of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from exactness import plain
from test_draft_length import World, alike, keep, live
from tiny import llama, ragged_batch

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation.draft_length_auto import AutoDraftLength, Experience
from specformer.generation.proposal import NO_TOKEN, Proposal
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.confidence import BINS, calibrate, calibration, confidence_loss, count_by_confidence
from specformer.scripts.parts.kinds.specformer import confidences, drafts_of_text
from specformer.scripts.parts.losses import IGNORED

pytestmark = pytest.mark.one_version

__all__ = ["alike"]  # a fixture

N, D = 400, 3


def make_outcomes(seed: int = 0, scale: float = 1.0, shift: float = 0.0, count: int = N):
    """Logits of the true chances, moved and stretched; whether drafts are right; labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, D, generator=generator, dtype=torch.float64) * 2
    right = torch.rand(count, D, generator=generator, dtype=torch.float64) < logits.sigmoid()
    labels = torch.where(torch.rand(count, D, generator=generator) < 0.1, IGNORED, 7)
    return logits * scale + shift, right & (labels != IGNORED), labels


def pairs_of(logits, right, labels, slot: int) -> list[tuple[float, bool]]:
    """Confidence and outcome of a slot wherever it is reached, by plain loops."""
    found = []
    for row in range(len(logits)):
        if right[row, :slot].all() and labels[row, slot] != IGNORED:
            found.append((float(logits[row, slot].sigmoid()), bool(right[row, slot])))
    return found


def make_drafter() -> SpecFormerModel:
    torch.manual_seed(0)
    fields = dict(num_draft_tokens=D, confidence_head=True, previous_token_rank=4)
    return SpecFormerModel(SpecFormerConfig.from_target_config(llama().config, **fields)).double()


def head_of() -> torch.nn.Module:
    return make_drafter().confidence_head


def drafted() -> tuple:
    """A drafter and what it drafts of a text of its target."""
    target, drafter = llama(), make_drafter()
    tokens = target.generate(**ragged_batch(padding=(0,)), max_new_tokens=40, eos_token_id=None)[0]
    batch = Answers.collate([(tokens, torch.where(torch.arange(len(tokens)) < 9, IGNORED, tokens))])
    return drafter, drafts_of_text(drafter, drafter.borrow(target), batch)


# ---- what is learnt


def test_the_loss_is_that_of_plain_loops():
    logits, right, labels = make_outcomes()
    pairs = [pair for slot in range(D) for pair in pairs_of(logits, right, labels, slot)]
    assert len(pairs) < N * D  # slots behind a wrong one do not count
    losses = [-torch.tensor(chance if hit else 1 - chance).log() for chance, hit in pairs]
    torch.testing.assert_close(confidence_loss(logits, right, labels), torch.stack(losses).mean(), check_dtype=False)
    assert confidence_loss(logits, right, torch.full_like(labels, IGNORED)) == 0


def test_no_gradient_reaches_the_drafts():
    target, (drafter, drafts) = llama(), drafted()
    predicted, right, labels = confidences(drafter, drafts, drafter.borrow(target))
    assert predicted.shape == right.shape == labels.shape == (len(drafts.labels), D)
    confidence_loss(predicted, right, labels).backward()
    learning = {name for name, weight in drafter.named_parameters() if weight.grad is not None}
    assert learning == {name for name, _ in drafter.named_parameters() if name.startswith("confidence_head")}


def test_some_of_the_positions():
    target, (drafter, drafts) = llama(), drafted()
    every, some = (confidences(drafter, drafts, drafter.borrow(target), count) for count in (1, 3))
    for one, other in zip(every, some, strict=True):
        torch.testing.assert_close(one[::3], other)


def test_what_is_sure_is_likely():
    head = head_of()
    states, logits = torch.randn(1, D, 32, dtype=torch.float64), torch.zeros(1, D, 4, dtype=torch.float64)
    unsure, logits[..., 2] = head(states, logits), 3.0
    assert (head(states, logits) > unsure + 1).all()
    assert head(states[:, :1], logits[:, :1]).shape == (1, 1)


# ---- calibration


def test_calibration_undoes_what_was_done_to_confidences():
    head = head_of()
    stretched, right, labels = make_outcomes(scale=3.0, shift=-1.0, count=20_000)
    halves = [tuple(part[place] for part in (stretched, right, labels)) for place in (slice(9000), slice(9000, None))]
    calibrate(head, halves)
    fitted = stretched * head.scale + head.shift
    before, after = (calibration(count_by_confidence(logits, right, labels)) for logits in (stretched, fitted.detach()))
    for slot in range(D):
        name = f"confidence_error_slot_{slot}"
        assert before[name] > 0.1 > 4 * after[name]
        assert head.scale[slot].item() == pytest.approx(1 / 3, rel=0.15)
        assert head.shift[slot].item() == pytest.approx(1 / 3, abs=0.15)


def test_a_head_that_is_calibrated_again_stays_as_it_is():
    head, inputs = head_of(), (torch.randn(3000, D, 32).double(), torch.randn(3000, D, 4).double() * 2)
    with torch.no_grad():
        right = torch.rand(3000, D) < (head(*inputs) * 2 + 0.5).sigmoid()
    labels = torch.full((3000, D), 7)
    calibrate(head, [(head(*inputs).detach(), right, labels)])
    first = head.scale.tolist() + head.shift.tolist()
    assert first[0] != 1
    calibrate(head, [(head(*inputs).detach(), right, labels)])
    assert head.scale.tolist() + head.shift.tolist() == pytest.approx(first, abs=1e-4)


def test_a_slot_without_outcomes_keeps_what_it_learnt():
    head = head_of()
    logits, right, labels = make_outcomes()
    right[:, 0], labels[:, 0] = True, 7  # never wrong
    labels[:, 2] = IGNORED  # never reached
    calibrate(head, [(logits, right, labels)])
    moved = (head.scale != 1) | (head.shift != 0)
    assert moved.tolist() == [False, True, False]


def test_figures_are_those_of_plain_loops():
    logits, right, labels = make_outcomes(scale=2.0)
    parts = [tuple(part[place] for part in (logits, right, labels)) for place in (slice(150), slice(150, None))]
    figures = calibration(sum(count_by_confidence(*part) for part in parts))
    for slot in range(D):
        pairs = pairs_of(logits, right, labels, slot)
        bins: dict[int, list] = {}
        for chance, hit in pairs:
            bins.setdefault(min(int(chance * BINS), BINS - 1), []).append((chance, hit))
        error = sum(abs(sum(chance for chance, _ in one) - sum(hit for _, hit in one)) for one in bins.values())
        assert figures[f"confidence_error_slot_{slot}"] == pytest.approx(error / len(pairs))
        above = [
            (at > other) + (at == other) / 2
            for at in (int(chance * BINS) for chance, hit in pairs if hit)
            for other in (int(chance * BINS) for chance, hit in pairs if not hit)
        ]
        assert figures[f"confidence_auc_slot_{slot}"] == pytest.approx(sum(above) / len(above))


# ---- what "auto" makes of them, in worlds whose costs are known


@dataclass
class UnevenWorld:
    """Where all slots of a round are right with one chance, and it is another one each round. See `World`."""

    slope: float
    draft: float
    rows: int = 8
    rates: tuple = (0.9, 0.05, 0.05)
    knows: bool = True  # whether confidences are those chances; otherwise they are all high


def live_confidently(length: AutoDraftLength, world: UnevenWorld, rounds: int, most: int) -> tuple[float, Counter]:
    """Tokens per second and row, and how often each (drafted, verified) was chosen."""
    chance, tokens, seconds, chosen = random.Random(0), 0, 0.0, Counter()
    for _ in range(rounds):
        k, rate = length.next(world.rows), chance.choice(world.rates)
        verified = k
        if k:
            confidences = torch.full((world.rows, k), rate if world.knows else 0.95)
            verified = keep(length, Proposal(torch.zeros(world.rows, k), confidences), world.draft)
        now = World([rate] * most, world.slope, world.draft, world.rows)
        outcome, spent = now.round(verified, chance)
        spent += world.draft if k and not verified else 0
        length.record(world.rows, verified, outcome, spent)
        tokens, seconds = tokens + sum(added for _, added in outcome) / world.rows, seconds + spent
        chosen[k, verified] += 1
    return tokens / seconds, chosen


UNEVEN = {
    "pays in some rounds": (UnevenWorld(slope=0.25, draft=0.05, rows=1), 1.1),
    "pays in some rounds of a batch": (UnevenWorld(slope=0.25, draft=0.05, rows=8), 1.1),
    "always pays": (UnevenWorld(slope=0.01, draft=0.05, rates=(0.9, 0.8)), 0.97),
    "never pays": (UnevenWorld(slope=0.3, draft=0.3, rates=(0.2, 0.1)), 0.97),
    "knows nothing, and never pays": (UnevenWorld(slope=0.1, draft=0.1, rates=(0.0,), knows=False), 0.97),
    "never pays, and is dear": (UnevenWorld(slope=0.4, draft=0.1, rates=(0.05,), rows=1), 0.96),
    "knows nothing, and is almost free": (UnevenWorld(slope=0.01, draft=0.02, rates=(0.0,), knows=False), 0.97),
    "knows nothing of one row, and is cheap": (UnevenWorld(0.02, 0.05, rates=(0.0,), rows=1, knows=False), 0.96),
    "knows nothing": (UnevenWorld(slope=0.05, draft=0.05, rates=(0.6,), knows=False), 0.97),
}


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("name", UNEVEN)
def test_beside_the_best_fixed_length(name: str):
    (world, least), most = UNEVEN[name], 4
    mean = [
        sum(rate ** (slot + 1) for rate in world.rates) / sum(rate**slot for rate in world.rates)
        if any(world.rates) else 0.0 for slot in range(most)
    ]  # fmt: skip
    fixed = World(mean, world.slope, world.draft).best()
    length = AutoDraftLength(most, 2, Experience())
    live_confidently(length, world, 100, most)
    speed, chosen = live_confidently(length, world, 1500, most)
    assert speed > least * fixed, (speed, fixed, chosen)
    if "some rounds" in name:
        assert chosen[4, 0] > 300 and chosen[4, 4] > 300  # it has drafted, and verified nothing, or everything
    if "never" in name:
        assert chosen[0, 0] > 1300


def test_a_drafter_may_begin_to_tell():
    """It is asked again, although it was not sure the first time that it told."""
    experience, world = Experience(), World([0.9] * 4, 0.01, 0.05)
    live(AutoDraftLength(4, 2, experience), world, 50)
    experience.allowance = 0.0  # no trial
    length = AutoDraftLength(4, 2, experience)
    assert length.next(world.rows) == 4
    assert not length.is_trial
    assert keep(length, Proposal(torch.zeros(8, 4), torch.full((8, 4), 0.01)), world.draft) == 0
    length.record(8, 0, [(0, 1)] * 8, world.seconds(0))
    asked = 0
    for _ in range(20):
        asked += length.next(world.rows) == 4
        length.record(8, 0, [(0, 1)] * 8, world.seconds(0))
    assert asked


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("rates", [(0.7, 0.6), (0.1, 0.0)], ids=["pays", "never pays"])
def test_every_length_is_timed(rates: tuple):
    """What confidences are worth depends on the times of all lengths, so each is verified now and then, whatever they
    say."""
    length, world = AutoDraftLength(4, 2, Experience()), UnevenWorld(slope=0.1, draft=0.1, rates=rates)
    live_confidently(length, world, 400, 4)
    assert {drafted for _, drafted in length.experience.passes.known()} == {0, 1, 2, 3, 4}


def test_rows_that_are_carried_along_do_not_count():
    length = AutoDraftLength(2, 1, Experience())
    confidences = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.25, 1.0]])
    keep(length, Proposal(torch.zeros(3, 2), confidences), 0.05, idle=[False, True, False])
    assert length.promises == pytest.approx([0.375, 0.25])


def test_a_broken_row_is_expected_to_have_nothing_accepted():
    length = AutoDraftLength(2, 1, Experience())
    confidences = torch.tensor([[0.5, 0.5], [torch.nan, 1.0], [torch.nan, torch.nan]])
    keep(length, Proposal(torch.zeros(3, 2), confidences), 0.05, idle=[False, True, False])
    assert length.promises == pytest.approx([0.25, 0.125])


GOOD = UnevenWorld(slope=0.01, draft=0.05, rates=(0.9, 0.8))


def test_a_round_of_which_no_row_counts_leaves_nothing_behind():
    world, length = World([0.9] * 4, 0.01, 0.05), AutoDraftLength(4, 2, Experience())
    live_confidently(length, GOOD, 50, 4)
    known = length.experience
    before = known.trust, list(known.promises)
    for _ in range(20):
        if length.next(8):
            assert keep(length, Proposal(torch.zeros(8, 4), torch.full((8, 4), 0.5)), 0.05, idle=[True] * 8) == 0
            length.record(8, 0, [(0, 0)] * 8, world.seconds(4))
    assert before == (pytest.approx(known.trust), list(known.promises))


@pytest.mark.parametrize("told", [torch.nan, None], ids=["not a number", "nothing"])
@pytest.mark.parametrize("begin", [0, 50], ids=["from the start", "later"])
def test_a_drafter_that_tells_nothing_useful_and_is_wrong_is_left_alone(told: float | None, begin: int):
    """It gives confidences that are no numbers, or none any more."""
    world, length = World([0.0] * 4, 0.05, 0.1), AutoDraftLength(4, 2, Experience())
    if begin:
        live_confidently(length, GOOD, begin, 4)
    asked = []
    for _ in range(400):
        k = length.next(8)
        asked.append(k > 0)
        if k:
            confidences = None if told is None else torch.full((8, k), told)
            k = keep(length, Proposal(torch.zeros(8, k), confidences), world.draft)
        length.record(8, k, [(0, 1)] * 8, world.seconds(k) + 0.1 * (asked[-1] and not k))
    assert sum(asked[:200]) < 120 and sum(asked[200:]) < 40, (sum(asked[:200]), sum(asked[200:]))


# ---- in real calls


def test_calls_that_draft_more_and_less_take_turns():
    target, batch = llama(), ragged_batch()
    config = SpecFormerConfig.from_target_config(target.config, confidence_head=True, num_draft_tokens=4)
    drafter, settings = SpecFormerModel(config).double().eval(), dict(max_new_tokens=30, eos_token_id=None)
    reference = plain(target, batch, **settings).sequences.tolist()
    for copied in (None, 0, 16, None, 0):
        assert generate(target, drafter, **batch, **settings, prompt_lookup_num_tokens=copied).tolist() == reference


@pytest.mark.parametrize(
    "sampling",
    [
        dict(do_sample=False, tree_size=0),
        dict(do_sample=True, tree_size=0),
        dict(do_sample=False, tree_size=12),
        dict(do_sample=True, tree_size=12),
        dict(acceptance="rejection"),
    ],
    ids=str,
)
def test_the_text_does_not_depend_on_what_is_verified(sampling: dict, monkeypatch):
    """Whatever is cut, at random; under "rejection", whose text would depend on it, nothing is."""
    target, batch = llama(), ragged_batch()
    config = SpecFormerConfig.from_target_config(target.config, confidence_head=True, previous_token_rank=4)
    torch.manual_seed(0)
    drafter, chance, cuts, whole = SpecFormerModel(config).double().eval(), random.Random(0), Counter(), []
    real = AutoDraftLength.keep

    def keep(self, proposal, stopped, started):
        drafts, confidences = proposal.tokens, proposal.confidences
        assert confidences.shape == drafts.shape
        if not self.may_cut:
            whole.append(real(self, proposal, stopped, started) == drafts.shape[1])
            return drafts.shape[1]
        assert ((confidences > 0) & (confidences < 1))[drafts != NO_TOKEN].all()
        cuts[width := chance.randint(0, drafts.shape[1])] += 1
        return width

    monkeypatch.setattr(AutoDraftLength, "keep", keep)
    monkeypatch.setattr(AutoDraftLength, "next", lambda self, num_rows: self.widest)
    settings = dict(max_new_tokens=30, eos_token_id=None, num_assistant_tokens="auto")
    torch.manual_seed(3)
    output = generate(target, drafter, **batch, **{"do_sample": True, **sampling}, **settings)
    if "acceptance" in sampling:
        assert not cuts and whole and all(whole)
        return
    settings.pop("num_assistant_tokens")
    settings["do_sample"] = sampling["do_sample"]
    assert output.tolist() == plain(target, batch, **settings).sequences.tolist()
    assert len(cuts) > 2
