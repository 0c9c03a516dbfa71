"""Training and decoding agree on who predicts what: cached drafts equal those of the teacher-forced pass over the
finished text, and labels and loss are those of the slots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from exactness import choose_eos
from tiny import PRESETS, VOCAB, all_logits, llama, over_vocabulary, ragged_batch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from specformer import SpecFormerModel, generate
from specformer.context_specformer import SeenContext
from specformer.generation.accept_tokens import TokenChoice
from specformer.generation.drafter_specformer import SpecFormerDrafter
from specformer.generation.proposal import Proposal
from specformer.generation.target_states import HiddenStates
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.kinds.specformer import drafts_of_text
from specformer.scripts.parts.kinds.student import Drafts, target_states
from specformer.scripts.parts.losses import (
    IGNORED,
    ChunkedLoss,
    acceptance_weights,
    base_share,
    decaying_weights,
    distances,
    drafter_loss,
    slot_labels,
)

NEW_TOKENS = 16


@dataclass
class Draft:
    """What one running row drafted when its text had `generated` new tokens."""

    row: int
    generated: int
    logits: torch.Tensor  # (k, V)
    tokens: list[int]
    proposed: list[int]
    confidences: torch.Tensor | None  # (k,)


@pytest.fixture
def target(monkeypatch):
    """A llama whose norms compute in float64 too: its own ones round to float32."""

    def forward(self, states):
        return functional.rms_norm(states, states.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    return llama()


def make_network(preset: str, target) -> SpecFormerModel:
    config = PRESETS[preset](target.config, num_draft_tokens=4, initializer_range=0.3)
    network = SpecFormerModel(config).to(torch.float64).eval()
    if preset == "some tokens":
        network.choose_draft_tokens(torch.rand(VOCAB, generator=torch.Generator().manual_seed(0)))
    return network


def record_drafts(monkeypatch, answer: torch.Tensor | None = None) -> list[Draft]:
    """Note what every running row drafts. With `answer` (B, T), what it proposes is the answer instead, wrong from
    another slot on in every row and round."""
    drafts: list[Draft] = []
    propose, for_drafter, choices = SpecFormerDrafter.propose, TokenChoice.for_drafter.fget, []

    def recorded(self, num_tokens, choose):
        seen = []

        def noted(logits, ahead=0, token_ids=None):
            seen.append(over_vocabulary(logits, token_ids))
            return choose(logits, ahead, token_ids)

        proposal = propose(self, num_tokens, noted)
        tokens = proposal.tokens
        logits = torch.cat(seen, dim=1)
        text, proposed = choices[-1].text, tokens.clone()
        for place, row in enumerate(text.rows):
            if not text.is_running(row):
                continue
            generated = text.generated[row]
            if answer is not None:
                truth = answer[row, generated : generated + num_tokens]
                proposed[place, : len(truth)] = truth
                proposed[place, (row + generated) % (num_tokens + 1) :] += 1
                proposed[place] %= VOCAB
            confidences = None if proposal.confidences is None else proposal.confidences[place]
            both = tokens[place].tolist(), proposed[place].tolist()
            drafts.append(Draft(row, generated, logits[place], *both, confidences))
        return Proposal(proposed, proposal.confidences)

    monkeypatch.setattr(SpecFormerDrafter, "propose", recorded)
    monkeypatch.setattr(TokenChoice, "for_drafter", property(lambda self: choices.append(self) or for_drafter(self)))
    return drafts


@torch.no_grad()
def assert_teacher_forced_agrees(target, network, batch, sequences, drafts, shift: int = 0) -> None:
    """Every draft equals the one of its position, `shift` tokens on, in one pass over the whole text of its row."""
    prompt_width = batch["input_ids"].shape[1]
    for row in {draft.row for draft in drafts}:
        padding = int((batch["attention_mask"][row] == 0).sum())
        text = sequences[row : row + 1, padding:]
        borrowed = network.borrow(target)
        with HiddenStates(target, network.config.target_layer_ids) as hidden:
            target(input_ids=text)
        hidden_states = hidden.result(borrowed.device)
        anchors = borrowed.embed(functional.pad(text[:, 1:], (0, 1))) if network.config.reads_anchor_token else None
        states = network(hidden_states, anchors).draft_hidden_states[0]  # (T, D, d)
        for draft in (draft for draft in drafts if draft.row == row):
            # the newest token is not read yet: the target read up to the one before it
            position = prompt_width - padding + draft.generated - 2 + shift
            slots = states[position, : len(draft.logits)]
            expected = all_logits(borrowed, slots)
            if network.config.previous_token_rank is not None:
                previous = borrowed.embed(torch.cat([text[0, [position + 1]], torch.tensor(draft.tokens[:-1]).long()]))
                expected = corrected_logits(network, borrowed, slots, previous, expected)
                slots = network.previous_token_correction(slots, previous)
            if network.config.confidence_head:
                best = expected.topk(network.config.num_candidates).values
                confidences = network.confidence_head(slots, best).sigmoid()
                torch.testing.assert_close(draft.confidences.double(), confidences, rtol=0, atol=1e-6)
            torch.testing.assert_close(draft.logits, expected, rtol=0, atol=1e-9)
            assert draft.tokens == expected.argmax(-1).tolist()


def corrected_logits(network, borrowed, states, previous_embeds, logits) -> torch.Tensor:
    """Of the best candidates by `logits` (k, V), what the head gives them after the correction; the others are -inf."""
    layer = network.previous_token_correction
    both = layer.token_proj(layer.norm(previous_embeds)) + layer.state_proj(states)
    corrected = all_logits(borrowed, states + layer.up_proj(functional.silu(both)))
    worst = logits.sort(dim=-1, descending=True).values[:, network.config.num_candidates - 1]
    return corrected.masked_fill(logits < worst[:, None], -torch.inf)


@torch.no_grad()
def run(monkeypatch, target, preset: str, k: int, kind: str):
    """Decode a ragged batch whose rows end at different times: network, batch, sequences, statistics, drafts."""
    batch, network = ragged_batch(), make_network(preset, target)
    arguments = dict(max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    free = target.generate(**batch, eos_token_id=None, max_new_tokens=NEW_TOKENS)
    width = batch["input_ids"].shape[1]
    arguments["eos_token_id"] = choose_eos(free, width)
    drafts = record_drafts(monkeypatch, free[:, width:] if kind == "oracle" else None)
    output = generate(target, network, **batch, num_assistant_tokens=k, **arguments)
    plain = target.generate(**batch, **{**arguments, "return_dict_in_generate": False})
    assert output.sequences.tolist() == plain.tolist()
    return network, batch, output.sequences, output.statistics, drafts


@pytest.mark.one_version
@pytest.mark.parametrize("kind", ["own", "oracle"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_cached_drafts_equal_teacher_forced(preset: str, k: int, kind: str, monkeypatch, target):
    network, batch, sequences, statistics, drafts = run(monkeypatch, target, preset, k, kind)
    assert_teacher_forced_agrees(target, network, batch, sequences, drafts)
    assert {draft.row for draft in drafts} == set(range(5))
    assert len(set(statistics.tokens_per_row)) > 2  # rows dropped out at different times
    if kind == "oracle":
        assert statistics.accepted_per_slot[-1] > 0  # some blocks were accepted whole, others in part
        assert len(set(statistics.accepted_per_slot)) == k
        assert statistics.accepted_per_slot[0] < statistics.drafted_per_slot[0]


@pytest.mark.one_version
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shift", [-1, 1])
def test_the_comparison_notices_the_position_beside(preset: str, shift: int, monkeypatch, target):
    network, batch, sequences, _, drafts = run(monkeypatch, target, preset, 4, "oracle")
    with pytest.raises(AssertionError, match="Tensor-likes"):
        assert_teacher_forced_agrees(target, network, batch, sequences, drafts, shift)


@pytest.mark.one_version
def test_the_comparison_notices_anchors_shifted_by_one(monkeypatch, target):
    anchors = SpecFormerDrafter._anchors
    monkeypatch.setattr(SpecFormerDrafter, "_anchors", lambda self, tokens: anchors(self, tokens.roll(1, dims=1)))
    network, batch, sequences, _, drafts = run(monkeypatch, target, "anchor", 4, "oracle")
    with pytest.raises(AssertionError, match="Tensor-likes"):
        assert_teacher_forced_agrees(target, network, batch, sequences, drafts)


def planted(fault: str, seen: SeenContext) -> SeenContext:
    if fault == "a token behind":
        return seen._replace(visible=seen.visible | seen.visible.roll(1, dims=-1))
    if fault == "a token less":
        return seen._replace(visible=seen.visible & seen.visible.roll(-1, dims=-1))
    return seen._replace(keys=seen.keys.roll(1, dims=0), values=seen.values.roll(1, dims=0))


@pytest.mark.one_version
@pytest.mark.parametrize("preset", ["context", "all of it"])
@pytest.mark.parametrize("fault", ["a token behind", "a token less", "another row's tokens"])
def test_the_comparison_notices_another_context(fault: str, preset: str, monkeypatch, target):
    attend = SeenContext.attend
    with pytest.MonkeyPatch.context() as decoding:
        decoding.setattr(SeenContext, "attend", lambda self, *args: attend(planted(fault, self), *args))
        network, batch, sequences, _, drafts = run(monkeypatch, target, preset, 4, "oracle")
    with pytest.raises(AssertionError, match="Tensor-likes"):
        assert_teacher_forced_agrees(target, network, batch, sequences, drafts)


@pytest.mark.one_version
def test_the_comparison_notices_another_anchor_slot(monkeypatch, target):
    draft = SpecFormerModel.draft
    with pytest.MonkeyPatch.context() as decoding:
        decoding.setattr(
            SpecFormerModel, "draft", lambda self, states, anchors: draft(self, states, anchors.roll(1, 0))
        )
        network, batch, sequences, _, drafts = run(monkeypatch, target, "anchor slot", 4, "oracle")
    with pytest.raises(AssertionError, match="Tensor-likes"):
        assert_teacher_forced_agrees(target, network, batch, sequences, drafts)


@pytest.mark.one_version
@pytest.mark.parametrize("preset", ["anchor", "some tokens"])
def test_sampled_drafts_equal_teacher_forced(preset: str, monkeypatch, target):
    """Noise shared with the target gets drafts accepted; the states behind them are the teacher-forced ones."""
    batch, network = ragged_batch(), make_network(preset, target)
    drafts = record_drafts(monkeypatch)
    arguments = dict(do_sample=True, top_k=0, temperature=8.0, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    output = generate(target, network, **batch, num_assistant_tokens=4, return_dict_in_generate=True, **arguments)
    assert sum(output.statistics.accepted_per_slot) > 0
    for draft in drafts:
        draft.tokens = draft.logits.argmax(-1).tolist()  # sampled ones are not comparable; states are
    assert_teacher_forced_agrees(target, network, batch, output.sequences, drafts)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("settings", [{}, dict(do_sample=True, temperature=8.0), dict(suppress_tokens=[3, 9, 20])])
def test_texts_are_the_targets_with_every_variant(preset: str, settings: dict, target):
    batch, network = ragged_batch(), make_network(preset, target)
    settings = dict(settings, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    for k in (1, 3, 4, "auto"):
        torch.manual_seed(5)
        expected = target.generate(**batch, **settings)
        torch.manual_seed(5)
        assert torch.equal(generate(target, network, **batch, **settings, num_assistant_tokens=k), expected)


@pytest.mark.parametrize("preset", ["some tokens", "previous token"])
@pytest.mark.parametrize("warper", [dict(eta_cutoff=0.1), dict(top_h=0.5), dict(typical_p=0.5), dict(top_k=3)])
def test_all_that_is_drafted_may_be_forbidden(warper: dict, preset: str, target):
    """Some processors raise where no token is left: one of them is always left to drafts."""
    batch, network = ragged_batch(), make_network(preset, target)
    settings = dict(do_sample=True, max_new_tokens=NEW_TOKENS, eos_token_id=None, **warper)
    settings["suppress_tokens"] = list(range(5, VOCAB - 3))
    torch.manual_seed(7)
    expected = target.generate(**batch, **settings)
    torch.manual_seed(7)
    assert torch.equal(generate(target, network, **batch, **settings, num_assistant_tokens=4), expected)
    generate(target, network, **batch, **settings, num_assistant_tokens=4, acceptance="rejection")


@pytest.mark.parametrize("preset", ["some tokens", "previous token"])
def test_the_best_draft_is_found_with_and_without_the_whole_vocabulary(preset: str, monkeypatch, target):
    """A processor that changes nothing sends greedy drafts the long way."""
    batch, network = ragged_batch(), make_network(preset, target)
    settings = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None, num_assistant_tokens=4)
    drafts = record_drafts(monkeypatch)
    short = generate(target, network, **batch, **settings)
    count = len(drafts)
    never = next(token for token in range(VOCAB) if not (short == token).any())
    long = generate(target, network, **batch, **settings, suppress_tokens=[never])
    assert torch.equal(short, long)
    assert len(drafts) == 2 * count
    for one, other in zip(drafts[:count], drafts[count:], strict=True):
        assert one.tokens == other.tokens or never in one.tokens


def test_slot_j_at_n_is_labelled_with_token_n_plus_2_plus_j():
    tokens = torch.arange(100, 114).view(2, 7)
    tokens[0, :2] = IGNORED
    labels = slot_labels(tokens, 3)
    assert labels.shape == (2, 7, 3)
    for row in range(2):
        for n in range(7):
            for j in range(3):
                inside = n + 2 + j < 7
                assert labels[row, n, j] == (tokens[row, n + 2 + j] if inside else IGNORED)


def test_labels_and_drafts_mean_the_same_token(monkeypatch, target):
    """The label of slot j, where decoding drafts from, is the token that its draft is verified against."""
    _, batch, sequences, _, drafts = run(monkeypatch, target, "anchor", 4, "oracle")
    prompt_width = batch["input_ids"].shape[1]
    for draft in drafts:
        padding = int((batch["attention_mask"][draft.row] == 0).sum())
        text = sequences[draft.row, padding:]
        labels = slot_labels(text[None], 4)[0, prompt_width - padding + draft.generated - 2]
        verified = text[prompt_width - padding + draft.generated :][:4].tolist()
        assert [label for label in labels.tolist() if label != IGNORED] == verified


@pytest.mark.one_version
@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("weigh", [lambda losses: losses.new_ones(losses.shape), lambda losses: 1 / (2 + losses)])
def test_chunks_have_the_loss_and_the_gradient_of_all_slots(count: int, factor: float, weigh):
    """Chunks of 4 positions that fit and that do not. Weights are of the cross-entropies, whatever the losses."""
    head = torch.randn(16, 30, dtype=torch.float64)
    states = torch.randn(count, 3, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 30, (count, 3))
    labels[0, 1] = IGNORED
    losses = functional.cross_entropy((states @ head).transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    weights = weigh(losses.detach()) * (labels != IGNORED)
    naive = (losses**2 * weights).sum()
    (expected,) = torch.autograd.grad(factor * naive, states)

    def losses_of(chunk, slots):
        entropies = functional.cross_entropy(chunk @ head, labels[slots], reduction="none")
        return entropies, entropies**2

    ours, weight = ChunkedLoss.apply(states, labels != IGNORED, weigh, losses_of, 13)
    (gradient,) = torch.autograd.grad(factor * ours, states)
    torch.testing.assert_close(ours, naive, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight, weights.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_acceptance_weights_by_hand(smoothing: float):
    losses = torch.tensor([[0.5, 1.0, 0.2, 2.0], [0.1, torch.inf, 0.3, 0.4], [0.7, 0.1, torch.inf, torch.inf]])
    weights = acceptance_weights(losses, smoothing)
    for row in range(3):
        chances = [smoothing + (1 - smoothing) * math.exp(-loss) for loss in losses[row].tolist()]
        for slot in range(4):
            ends = [end for end in range(slot, 4) if losses[row, end] < torch.inf]
            expected = sum(math.prod(chances[: end + 1]) for end in ends)
            assert float(weights[row, slot]) == pytest.approx(expected, rel=1e-5)


def test_acceptance_weights_are_the_gradient_of_expected_acceptance():
    """Without smoothing, up to the sign: sum over ends of the product of chances, by the logarithm of each chance."""
    losses = torch.rand(3, 4, dtype=torch.float64).requires_grad_()
    expected_acceptance = (-losses).exp().cumprod(dim=1).sum()
    (gradient,) = torch.autograd.grad(expected_acceptance, losses)
    torch.testing.assert_close(acceptance_weights(losses.detach(), 0.0), -gradient)


@pytest.mark.one_version
@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("preset", ["anchor", "some tokens"])
def test_drafter_loss_is_the_weighted_mean_over_labelled_slots(preset: str, decay: float, target):
    network = make_network(preset, target)
    borrowed = network.borrow(target)
    states = torch.randn(2, 6, 4, 32, dtype=torch.float64, requires_grad=True)
    labels = slot_labels(torch.randint(0, VOCAB, (2, 6)), 4)
    drafted = set(range(VOCAB) if network.draft_token_ids is None else network.draft_token_ids.tolist())
    probabilities = all_logits(borrowed, states).log_softmax(-1)
    parts, weights = [], []
    for row, position, slot in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        if (label := int(labels[row, position, slot])) in drafted:
            parts.append(-probabilities[row, position, slot, label] * decay**slot)
            weights.append(decay**slot)
    assert 0 < len(parts) < labels.numel()
    naive = torch.stack(parts).sum() / sum(weights)
    loss = drafter_loss(states, labels, borrowed, partial(decaying_weights, decay=decay), chunk_size=7)
    torch.testing.assert_close(loss, naive, rtol=1e-6, atol=0)
    ours, expected = (torch.autograd.grad(value, states)[0] for value in (loss, naive))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert drafter_loss(states, torch.full_like(labels, IGNORED), borrowed) == 0


@pytest.mark.parametrize("drafted", [30, 12])
def test_distances_are_half_of_all_differences(drafted: int):
    """And the share of speculative sampling's drafts that are rejected, of tokens that are never drafted too."""
    chances = torch.randn(9, 30, dtype=torch.float64).mul(3).softmax(-1)
    logits = torch.randn(9, drafted, dtype=torch.float64)
    everywhere = functional.pad(logits.softmax(-1), (0, 30 - drafted))
    ours = distances(logits, chances[:, :drafted])
    torch.testing.assert_close(ours, (chances - everywhere).abs().sum(-1) / 2)
    rejection = (everywhere * (1 - chances / everywhere).clamp(min=0)).nan_to_num().sum(-1)
    torch.testing.assert_close(ours, rejection)
    own = chances[:, :drafted] / chances[:, :drafted].sum(-1, keepdim=True)
    torch.testing.assert_close(distances(own.log(), chances[:, :drafted]), 1 - chances[:, :drafted].sum(-1))


def texts_of_different_lengths() -> dict[str, torch.Tensor]:
    generator, rows = torch.Generator().manual_seed(3), []
    for prompt, length in ((3, 13), (5, 8), (1, 10), (2, 2)):  # the last one has nothing to draft
        tokens = torch.randint(0, VOCAB, (length,), generator=generator)
        rows.append((tokens, torch.cat([torch.full((prompt,), IGNORED), tokens[prompt:]])))
    return Answers.collate(rows)


def naive_loss(target, borrowed, batch, drafts: Drafts, weigh, share: float) -> torch.Tensor:
    """Slot by slot, beside what the target says of each text alone."""
    logits = all_logits(borrowed, drafts.states.to(target.dtype)).to(drafts.states.dtype)  # (N, D, V)
    slots = logits.shape[1]
    entropies, losses, place = torch.full(logits.shape[:2], torch.inf).to(logits), {}, 0
    for tokens, labels, mask in zip(*(batch[name] for name in ("input_ids", "labels", "attention_mask")), strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            chances = target(input_ids=tokens[None, :length]).logits[0].to(logits.dtype).softmax(-1)
        for n in range(length):
            places = [n + 2 + j for j in range(slots)]
            if not any(at < length and labels[at] != IGNORED for at in places):
                continue
            for j, at in enumerate(places):
                if at < length and labels[at] != IGNORED and logits[place, j, labels[at]] > -torch.inf:
                    drafted = logits[place, j].softmax(-1)
                    entropies[place, j] = -drafted[labels[at]].log().detach()
                    distance = (chances[at - 1] - drafted).abs().sum() / 2
                    losses[place, j] = share * distance - (1 - share) * drafted[labels[at]].log()
            place += 1
    assert place == len(logits)
    assert (len(losses) == int((drafts.labels != IGNORED).sum())) is (borrowed.draft_token_ids is None)
    weights = weigh(entropies)
    return sum(weights[slot] * loss for slot, loss in losses.items()) / sum(weights[slot] for slot in losses)


@pytest.mark.one_version
@pytest.mark.parametrize("chunk_size", [7, 1000])
@pytest.mark.parametrize("weigh", [partial(decaying_weights, decay=0.8), acceptance_weights], ids=["decay", "D-PACE"])
@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("preset", ["anchor", "some tokens", "previous token"])
def test_loss_and_gradient_with_the_targets_own_distribution(preset: str, share: float, weigh, chunk_size: int, target):
    network, batch = make_network(preset, target), texts_of_different_lengths()
    borrowed = network.borrow(target)
    drafts = drafts_of_text(network, borrowed, batch)
    naive = naive_loss(target, borrowed, batch, drafts, weigh, share)
    loss = drafter_loss(drafts.states, drafts.labels, borrowed, weigh, chunk_size, share, drafts.verifiers)
    torch.testing.assert_close(loss, naive, rtol=1e-9, atol=0)
    weights = list(network.parameters())
    ours, expected = (torch.autograd.grad(value, weights, retain_graph=True) for value in (loss, naive))
    for gradient, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)
    nothing = torch.full_like(drafts.labels, IGNORED)
    assert drafter_loss(drafts.states, nothing, borrowed, weigh, chunk_size, share, drafts.verifiers) == 0


@pytest.mark.parametrize("stored", [False, True])
def test_distance_from_a_target_in_bfloat16(stored: bool):
    """Its states may be read from a file, where they are in bfloat16 too."""
    target, batch = llama(torch.bfloat16), texts_of_different_lengths()
    network = SpecFormerModel(PRESETS["some tokens"](target.config, num_draft_tokens=4))
    borrowed = network.borrow(target)
    if stored:
        batch["hidden_states"] = target_states(borrowed, batch)
    drafts = drafts_of_text(network, borrowed, batch)
    naive = naive_loss(target, borrowed, batch, drafts, decaying_weights, 0.9)
    loss = drafter_loss(drafts.states, drafts.labels, borrowed, distance_share=0.9, verifiers=drafts.verifiers)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, naive, rtol=1e-3, atol=0)
    ours, expected = (torch.autograd.grad(value, drafts.states, retain_graph=True)[0] for value in (loss, naive))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_base_share_falls_to_nothing_by_half_of_the_steps():
    assert [base_share(0.8, step, 20) for step in (0, 5, 10, 15, 20)] == [0.8, 0.4, 0, 0, 0]
    assert [base_share(1.0, step, 5) for step in range(5)] == pytest.approx([1, 0.6, 0.2, 0, 0])
    assert base_share(0.0, 0, 20) == 0
