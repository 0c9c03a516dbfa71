"""Figures from one teacher-forced pass are those of real decoding, to the last token and pass."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from exactness import choose_eos
from hypothesis import given
from hypothesis import strategies as st
from tiny import PRESETS, VOCAB, all_logits, llama, ragged_batch

from specformer import SpecFormerModel, generate
from specformer.generation.target_states import HiddenStates
from specformer.scripts.parts import offline
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.kinds import specformer as specformer_kind
from specformer.scripts.parts.kinds.specformer import SpecFormerStudent, calibrate_drafter, drafts_of_text
from specformer.scripts.parts.losses import IGNORED, drafter_loss, slot_labels
from specformer.scripts.parts.offline import evaluate_offline, summarise, walk

pytestmark = pytest.mark.one_version

SLOTS, NEW_TOKENS = 4, 24
LENGTHS = [1, 2, SLOTS]


@st.composite
def drafted_texts(draw):
    """A text, where its answer begins, and drafts from every position, many of them right."""
    prompt, length = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    text = draw(st.lists(st.integers(0, 2), min_size=prompt + length, max_size=prompt + length))
    behind = [(text + [-1] * 9)[n + 2 : n + 2 + SLOTS] for n in range(len(text))]
    wrong = st.lists(st.sampled_from([0, 0, 0, 9]), min_size=SLOTS, max_size=SLOTS)
    drafts = [[token + offset for token, offset in zip(tokens, draw(wrong), strict=True)] for tokens in behind]
    return text, prompt, drafts


@given(drafted_texts(), st.integers(1, SLOTS))
def test_the_walk_is_that_of_decoding(drafted, k: int):
    text, prompt, drafts = drafted
    written, passes = prompt + 1, []  # the prompt pass writes the first token
    while written < len(text):
        before = written
        for draft in drafts[written - 2][:k]:  # the newest token is not read yet
            if written == len(text) - 1 or draft != text[written]:
                break
            written += 1
        passes.append(written - before)
        written += 1  # the target's own token
    labels = [[token if token >= 0 else IGNORED for token in (text + [-1] * 9)[n + 2 :]] for n in range(len(text))]
    matches = []
    for tokens, right in zip(drafts, labels, strict=True):
        agree = [token == label for token, label in zip(tokens, right, strict=False)]
        matches.append([*agree, False].index(False))
    assert walk(matches, prompt, len(text) - prompt, k) == passes


@cache
def make_answers(with_eos: bool) -> tuple:
    """A target, a batch of prompts, and what plain greedy generate() answers."""
    target = llama()
    batch = ragged_batch(padding=(0, 3, 5, 1, 8, 2, 7, 4))
    width = batch["input_ids"].shape[1]
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    new = target.generate(**batch, **settings)[:, width:]
    if with_eos:
        settings["eos_token_id"] = choose_eos(new, 0)
        new = target.generate(**batch, **settings)[:, width:]
    rows = []
    for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], new.tolist(), strict=True):
        prompt = ids[mask.bool()]
        end = [*answer, settings["eos_token_id"]].index(settings["eos_token_id"]) + 1
        tokens = torch.cat([prompt, torch.tensor(answer[:end])])
        rows.append((tokens, torch.cat([torch.full_like(prompt, IGNORED), tokens[len(prompt) :]])))
    assert len({len(tokens) - int((labels == IGNORED).sum()) for tokens, labels in rows}) > 2 or not with_eos
    return target, batch, settings, rows


@cache
def make_drafter(preset: str, with_eos: bool) -> SpecFormerModel:
    """Trained briefly on the very answers, so that it is often right and often wrong."""
    target, _, _, rows = make_answers(with_eos)
    torch.manual_seed(0)
    drafter = SpecFormerModel(PRESETS[preset](target.config, num_draft_tokens=SLOTS)).to(torch.float64)
    if drafter.draft_token_ids is not None:
        drafter.choose_draft_tokens(
            torch.cat([labels[labels != IGNORED] for _, labels in rows]).bincount(minlength=VOCAB)
        )
    borrowed, batch = drafter.borrow(target), Answers.collate(rows)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    for _ in range(25):
        drafts = drafts_of_text(drafter, borrowed, batch)
        drafter_loss(drafts.states, drafts.labels, borrowed).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter.eval()


def offline_sums(preset: str, with_eos: bool) -> torch.Tensor:
    target, _, _, rows = make_answers(with_eos)
    drafter = make_drafter(preset, with_eos)
    batches = [Answers.collate(rows[start : start + 3]) for start in range(0, len(rows), 3)]
    return evaluate_offline(SpecFormerStudent(drafter, target), batches, LENGTHS)


def decode(preset: str, with_eos: bool, k: int):
    target, batch, settings, _ = make_answers(with_eos)
    drafter = make_drafter(preset, with_eos)
    alone = dict(num_assistant_tokens=k, prompt_lookup_num_tokens=0, return_dict_in_generate=True)
    output = generate(target, drafter, **batch, **settings, **alone)
    return output.statistics


@pytest.mark.parametrize("with_eos", [False, True], ids=["full length", "eos"])
@pytest.mark.parametrize("preset", PRESETS)
def test_offline_figures_are_those_of_decoding(preset: str, with_eos: bool):
    sums = offline_sums(preset, with_eos)
    figures = summarise(sums, LENGTHS)
    for k, (tokens, passes) in zip(LENGTHS, sums[-2 * len(LENGTHS) :].view(-1, 2).tolist(), strict=True):
        statistics = decode(preset, with_eos, k)
        assert passes == sum(statistics.target_passes_per_row)
        assert tokens == sum(statistics.tokens_per_row) - statistics.batch_size
        assert figures[f"tokens_per_pass_k{k}"] == statistics.tokens_per_pass
        assert 1.2 < statistics.tokens_per_pass < k + 0.97  # drafts of both kinds
    assert figures["tokens_per_pass_k1"] < figures["tokens_per_pass_k2"] < figures[f"tokens_per_pass_k{SLOTS}"]


def test_confidences_are_fitted_to_what_is_right():
    target, _, _, rows = make_answers(False)
    drafter = copy.deepcopy(make_drafter("confidence", False))
    borrowed, error = drafter.borrow(target), "confidence_error_slot_0"
    before = summarise(offline_sums("confidence", False), LENGTHS)
    calibrate_drafter(drafter, borrowed, rows, batch_size=3)
    after = summarise(evaluate_offline(SpecFormerStudent(drafter, target), [Answers.collate(rows)], LENGTHS), LENGTHS)
    assert after[error] < 0.5 * before[error]
    assert after["tokens_per_pass_k2"] == before["tokens_per_pass_k2"]


def shifted_labels(labels, num_slots):
    return slot_labels(labels.roll(1, dims=1), num_slots)


def shifted_walk(by: int):
    return lambda matches, first, *rest: walk(matches, first + by, *rest)


FAULTS = {
    "labels": ("slot_labels", shifted_labels),
    "a position before": ("walk", shifted_walk(-1)),
    "a position behind": ("walk", shifted_walk(1)),
    "one draft too many": ("walk", lambda matches, first, length, k: walk(matches, first, length, k + 1)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_comparison_notices_being_off_by_one(name: str, monkeypatch):
    for module in (offline, specformer_kind):
        monkeypatch.setattr(module, *FAULTS[name], raising=False)
    figures = summarise(offline_sums("anchor", False), LENGTHS)
    assert figures["tokens_per_pass_k2"] != decode("anchor", False, 2).tokens_per_pass


@pytest.mark.parametrize("preset", ["anchor", "some tokens"])
def test_loss_and_accuracy_one_token_at_a_time(preset: str):
    """Of the held-out half too, in batches of unequal size, whose logits are never held for more than one slot."""
    target, _, _, rows = make_answers(True)
    drafter = make_drafter(preset, True)
    hits, counts, losses = [0] * SLOTS, [0] * SLOTS, []
    for tokens, labels in rows:
        borrowed = drafter.borrow(target)
        with torch.no_grad():
            with HiddenStates(target, drafter.config.target_layer_ids) as hidden:
                target(input_ids=tokens[None])
            anchors = borrowed.embed(torch.cat([tokens[1:], tokens[:1]])[None])
            states = drafter(hidden.result(borrowed.device), anchors).draft_hidden_states
            logits = all_logits(borrowed, states)[0]
        for n in range(len(tokens)):
            for slot in range(SLOTS):
                place = n + 2 + slot
                if place < len(tokens) and labels[place] != IGNORED:
                    counts[slot] += 1
                    hits[slot] += int(logits[n, slot].argmax() == tokens[place])
                    losses.append(-float(logits[n, slot].log_softmax(-1)[tokens[place]]))
    assert all(loss < torch.inf for loss in losses) is (preset == "anchor")
    losses = [loss for loss in losses if loss < torch.inf]  # tokens that are never drafted are not in the loss
    figures = summarise(offline_sums(preset, True), LENGTHS)
    assert figures["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    for slot in range(SLOTS):
        assert figures[f"accuracy_slot_{slot}"] == hits[slot] / counts[slot]


def test_sums_add_up_over_processes():
    """Shares of the answers, whatever their sizes, an empty one too."""
    target, _, _, rows = make_answers(True)
    drafter = make_drafter("anchor", True)
    student = SpecFormerStudent(drafter, target)
    shares = [
        evaluate_offline(student, [Answers.collate(part)] if part else [], LENGTHS) for part in (rows[:1], rows[1:], [])
    ]
    torch.testing.assert_close(sum(shares), offline_sums("anchor", True), rtol=1e-7, atol=0)
