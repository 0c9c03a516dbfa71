"""A drafter that learns while it serves (OSD): from what, how well, that no text depends on it, what it survives."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path

import pytest
import torch
from exactness import check, plain, texts_of_threads
from test_copying import network_of
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, meaningful_target
from tiny import EOS, VOCAB, llama, ragged_batch
from torch import nn

from specformer import Hierarchy, OnlineDistillation, PathSearch, Reader, SpecFormerConfig, SpecFormerModel, generate
from specformer.generation import drafter_online_loss as losses
from specformer.generation.drafter_online import gradients_of
from specformer.generation.drafter_online_statistics import AdaptationStatistics
from specformer.generation.drafter_online_texts import LearningDrafter
from specformer.generation.drafter_specformer import SpecFormerDrafter

ENDLESS = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)
ALWAYS = dict(max_time_share=math.inf)  # tiny models learn for longer than they serve
KINDS = ["network", "causal lm"]


def learner(target, kind: str, preset: str = "anchor", **settings) -> OnlineDistillation:
    drafter = network_of(target, preset) if kind == "network" else llama(target.dtype, seed=7, num_hidden_layers=1)
    return OnlineDistillation(drafter, **{**ALWAYS, **settings})


def texts_of(target, learning: OnlineDistillation, batch: dict, k: int = 4, **arguments) -> list:
    """What a call leaves to learn from."""
    learning.every = None
    learning._texts.clear()
    generate(target, learning, **batch, num_assistant_tokens=k, **{**ENDLESS, **arguments})
    return list(learning._texts)


# ---- what is learned from


@pytest.mark.one_version
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_texts_with_what_the_target_said_of_them(kind: str, sampling: dict):
    """Against one pass of the target over each text."""
    target, batch, eos = meaningful_target("llama")
    learning = learner(target, kind)
    torch.manual_seed(3)
    texts = texts_of(target, learning, batch, eos_token_id=eos, **sampling)
    torch.manual_seed(3)
    written = target.generate(**batch, **{**ENDLESS, **sampling, "eos_token_id": eos}).tolist()
    prompts = [row[row.bool()].tolist() for row in batch["input_ids"] * batch["attention_mask"]]
    assert len(texts) > 2  # of a row that ended at once there is nothing to learn
    for text in texts:
        tokens, prompt = text.tokens.tolist(), next(ids for ids in prompts if text.tokens.tolist()[: len(ids)] == ids)
        whole = written[prompts.index(prompt)][batch["input_ids"].shape[1] :]
        assert tokens[len(prompt) :] == whole[: len(tokens) - len(prompt)] and text.first == len(prompt) + 1
        with torch.no_grad():
            output = target(input_ids=text.tokens[None], output_hidden_states=True)
        expected = output.logits[0, text.first - 1 : -1].float().log_softmax(dim=-1).topk(16)
        assert text.likely.tolist() == expected.indices.tolist()
        assert torch.allclose(text.chances, expected.values, atol=1e-5)
        if kind == "network":
            layers = SpecFormerConfig.from_target_config(target.config).target_layer_ids
            states = torch.stack([output.hidden_states[layer][0, :-1] for layer in layers], dim=1)
            assert torch.allclose(text.states, states)
        if not sampling:
            assert text.likely[:, 0].tolist() == tokens[text.first :]


@pytest.mark.one_version
@pytest.mark.parametrize("preset", ["anchor", "paper", "some tokens", "context", "all of it"])
def test_slots_are_compared_where_they_were_drafted(preset: str, monkeypatch):
    """The drafts of each round are the best tokens of what the loss is computed of, at the same place."""
    target = llama()
    batch = ragged_batch(padding=(0,))
    proposed, propose = [], SpecFormerDrafter.propose

    def noted(self, num_tokens, choose):
        proposal = propose(self, num_tokens, choose)
        proposed.append((int(self.cache.lengths[0]), proposal.tokens[0].tolist()))
        return proposal

    monkeypatch.setattr(SpecFormerDrafter, "propose", noted)
    learning = learner(target, "network", preset)
    (text,) = texts_of(target, learning, batch)
    seen, divergence = [], losses.divergence

    def spied(logits, places, chances):
        seen.append((logits, places))
        return divergence(logits, places, chances)

    monkeypatch.setattr(losses, "divergence", spied)
    loss, count = losses.loss_of_slots(learning.network, target, text.usable())
    assert count == len(text.likely) and float(loss.detach()) > 0
    ((logits, places),) = seen
    best = logits.argmax(dim=-1).view(count, 4)
    ids = learning.network.draft_token_ids
    best = best if ids is None else ids[best]
    if "previous" not in preset and "all" not in preset:  # these choose among the candidates of other scores
        for length, drafts in proposed:
            at = length - (text.first - 1)  # the position of the context state is length - 1
            if at < count:
                assert best[at].tolist()[: len(drafts)] == drafts
    # what slots are compared with: the target's best tokens, those that are never drafted left out
    for at in range(count):
        for slot in range(min(4, count - at)):
            token = int(text.likely[at + slot, 0])
            place = int(places.view(count, 4, -1)[at, slot, 0])
            if ids is None or token in ids.tolist():
                assert (place if ids is None else int(ids[place])) == token
            else:
                assert place < 0


def test_the_divergence_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    q = logits.softmax(dim=-1)
    target = torch.tensor([[0.5, 0.3, 0.2], [0.25, 0.25, 0.5]], dtype=torch.float64)  # of two tokens, and the rest
    places = torch.tensor([[1, 3], [2, 0]])
    ours = losses.divergence(logits, places, target[:, :2].log())
    for row in range(2):
        mine = q[row, places[row]]
        mine = torch.cat([mine, 1 - mine.sum(dim=0, keepdim=True)])
        assert float(ours[row]) == pytest.approx(float((target[row] * (target[row] / mine).log()).sum()))
    assert float(losses.divergence(q.log(), places, q.gather(1, places).log()).abs().max()) < 1e-9
    without = losses.divergence(logits, torch.tensor([[1, -1], [2, 0]]), target[:, :2].log())[0]
    by_hand = 0.5 * (0.5 / 0.7 / q[0, 1]).log() + 0.2 * (0.2 / 0.7 / (1 - q[0, 1])).log()
    assert float(without) == pytest.approx(float(by_hand))


def test_the_targets_own_copy_has_nothing_to_learn():
    """What is compared belongs together: the loss of a drafter that is the target is 0, and so is its gradient. Moved
    by one place, as OSD's code has it, it is not."""
    target, batch, _ = meaningful_target("llama")
    learning = OnlineDistillation(copy.deepcopy(target), **ALWAYS)
    texts = texts_of(target, learning, batch, **SAMPLING)
    parameters = list(learning.network.parameters())

    def loss_and_gradient() -> tuple[float, float]:
        loss = gradients_of(losses.loss_of_causal_lm, learning.network, target, texts, parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
        for parameter in parameters:
            parameter.grad = None
        return loss, norm

    loss, norm = loss_and_gradient()
    assert abs(loss) < 1e-5 and norm < 1e-3
    for text in texts:
        text.likely, text.chances = text.likely.roll(1, dims=0), text.chances.roll(1, dims=0)
    loss, norm = loss_and_gradient()
    assert loss > 0.1 and norm > 0.1
    assert all(parameter.grad is None for parameter in target.parameters())


@pytest.mark.one_version
def test_what_is_held_is_bounded():
    target, batch = llama(), ragged_batch()
    learning = learner(target, "network", every=None, max_tokens=100)
    for _ in range(3):
        generate(target, learning, **batch, **ENDLESS, num_assistant_tokens=4)
        held = [len(text.tokens) for text in learning._texts]
        assert 0 < sum(held) <= 100
        assert all(text.states.numel() == text.states.untyped_storage().size() / 8 for text in learning._texts)
    whole = learner(target, "network", every=None)
    expected = {tuple(text.tokens.tolist()) for text in texts_of(target, whole, batch)}
    for text in learning._texts:  # beginnings of texts, in one piece
        assert any(tokens[: len(text.tokens)] == tuple(text.tokens.tolist()) for tokens in expected)
    nothing = learner(target, "network", every=1, max_tokens=3)
    generate(target, nothing, **batch, **ENDLESS)
    assert not nothing._texts and nothing.statistics.steps == 0


# ---- two domains


def two_domains(seed: int = 0):
    """A target whose next token follows from the newest one, and keeps to the half of the vocabulary that it is from:
    each half is a cycle."""
    target = llama(torch.float32, seed, hidden_size=VOCAB, num_hidden_layers=2, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(seed)
    halves = torch.arange(EOS + 1, VOCAB).split((VOCAB - EOS) // 2)
    after = torch.arange(VOCAB)
    for half in halves:
        order = half[torch.randperm(len(half), generator=generator)]
        after[order] = order.roll(-1)
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight *= 0.05
            layer.mlp.down_proj.weight *= 0.05
        target.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        target.lm_head.weight.zero_()[after, torch.arange(VOCAB)] = 1.0

    def prompts(domain: int, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * domain + number)
        ids = halves[domain][torch.randint(len(halves[domain]), (3, 6), generator=generator)]
        mask = torch.ones_like(ids)
        ids[1, :2], mask[1, :2] = 0, 0
        return {"input_ids": ids, "attention_mask": mask}

    return target, prompts


def rates_of(target, batches: list, learning: OnlineDistillation) -> tuple[list[float], list[float | None]]:
    """Tokens per pass of each call, and the drift after it; each text is the target's."""
    rates, drifts = [], []
    for batch, reference in batches:
        rates.append(check(target, batch, reference, learning, 4, **SHORT).tokens_per_pass)
        drifts.append(learning.statistics.drift)
    return rates, drifts


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


SHORT = dict(max_new_tokens=16, eos_token_id=None)


@pytest.mark.one_version
@pytest.mark.parametrize(("kind", "calls"), [("causal lm", 8), pytest.param("network", 20, marks=pytest.mark.slow)])
def test_it_learns_a_domain_and_the_next_one(kind: str, calls: int, monkeypatch):
    """OSD's show: what is accepted rises, falls at the switch, and comes back; not where it is frozen, and not where it
    learns of the token beside the right one."""
    target, prompts = two_domains()
    drafter = learner(target, kind).network
    if kind == "causal lm":
        drafter = llama(torch.float32, seed=7, num_hidden_layers=1, hidden_size=VOCAB)
    before = [parameter.clone() for parameter in drafter.parameters()]
    batches = [prompts(domain, number) for domain in (0, 1) for number in range(calls)]
    batches = [(batch, plain(target, batch, **SHORT)) for batch in batches]

    def run(batches: list, **settings):
        learning = OnlineDistillation(drafter, every=3, learning_rate=1e-2, **ALWAYS, **settings)
        return *rates_of(target, batches, learning), learning

    rates, drifts, learning = run(batches)
    first, learned, switched, again = (mean(rates[at : at + 2]) for at in (0, calls - 2, calls, 2 * calls - 2))
    assert learned > first + 0.5 and switched < learned - 0.5 and again > switched + 0.5
    assert min(drifts[calls : calls + 4]) < -0.05 < 0.05 < max(drifts[:calls])  # as the switch shows
    statistics = learning.statistics
    assert statistics.steps == 2 * calls and statistics.texts == 6 * calls and statistics.skipped == 0
    assert statistics.losses[calls - 1] < statistics.losses[0] / 1.5
    assert statistics.acceptances[calls - 1] > statistics.acceptances[0] + 0.1

    frozen, _, control = run(batches[calls - 2 : calls], frozen=True)
    assert max(frozen) < first + 0.5 and control.network is drafter and control.statistics.steps == 0
    assert control.statistics.acceptance is not None
    assert all(torch.equal(one, other) for one, other in zip(before, drafter.parameters(), strict=True))

    update = LearningDrafter.update

    def beside(self, verified):
        verified.logits = verified.logits.roll(1, dims=-1)
        update(self, verified)

    monkeypatch.setattr(LearningDrafter, "update", beside)
    wrong, _, _ = run(batches[: calls - 2])
    assert mean(wrong[-2:]) < first + 0.3


# ---- texts


IN_EVERY_RUN = ["sampling with a penalty", "num_return_sequences"]
IN_LONG_RUNS = [pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name not in IN_EVERY_RUN]


@pytest.mark.parametrize("setting", [*IN_EVERY_RUN, *IN_LONG_RUNS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_does_not_depend_on_it(kind: str, setting: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    learning = learner(target, kind, "all of it", every=1, learning_rate=0.05)
    for k in (4, None, 9):
        check(target, batch, reference, learning, k, **arguments)
    assert learning.statistics.steps >= 2 and learning.statistics.skipped == 0


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_other_families(name: str):
    target, batch, eos = meaningful_target(name)
    learning = [
        OnlineDistillation(network_of(target), 1, 0.02, **ALWAYS),
        OnlineDistillation(copy.deepcopy(target), 1, 0.02, **ALWAYS),
    ]
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for each in learning:
            for _ in range(2):
                check(target, batch, reference, each, 4, **arguments)
            assert each.statistics.steps >= 1


def test_inside_other_systems_and_as_trees():
    target, batch, eos = meaningful_target("llama")
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    learning = learner(target, "network", every=1)
    for system in (Reader(drafter=learning), PathSearch(learning)):
        steps = learning.statistics.steps
        check(target, batch, reference, system, 4, **arguments)
        assert learning.statistics.steps == steps + 1
    check(target, batch, reference, learning, 4, tree_size=7, **arguments)
    assert learning.statistics.steps == 3
    with pytest.raises(ValueError, match=r"LearningDrafter cannot go back in its text"):
        generate(target, Hierarchy(learning, target), **batch, **arguments)


@pytest.mark.one_version
def test_rejection_keeps_the_distribution():
    """Each draft counts with the chance that it was drawn with, whatever has been learned since."""
    target = llama(torch.float32)
    learning = OnlineDistillation(llama(torch.float32, seed=4), 1, 0.02, max_tokens=256, **ALWAYS)
    logits = target(input_ids=torch.tensor([[7, 8, 9, 7, 8, 9]])).logits[0, -1].detach()
    torch.manual_seed(0)
    only = lambda row, text: [9] if len(text) == 5 else list(range(VOCAB))  # noqa: E731
    counts = torch.zeros(VOCAB)
    for _ in range(4):  # each learns from as many rows as are noted
        ids = torch.tensor([[7, 8, 9, 7, 8]]).expand(1000, -1)
        output = generate(
            target, learning, input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True,
            acceptance="rejection", max_new_tokens=3, eos_token_id=None, num_assistant_tokens=1,
            prefix_allowed_tokens_fn=only, return_dict_in_generate=True,
        )  # fmt: skip
        counts += output.sequences[:, 6].bincount(minlength=VOCAB)
    assert learning.statistics.steps >= 3
    assert float((counts / counts.sum() - logits.softmax(-1)).abs().sum() / 2) < 0.08


@pytest.mark.one_version
def test_calls_in_threads_learn_together():
    target, batch = llama(), ragged_batch()
    expected = plain(target, batch, **ENDLESS).sequences.tolist()
    learning = learner(target, "network", every=2, learning_rate=0.02)
    found = texts_of_threads(target, learning, batch, **ENDLESS, num_assistant_tokens=4)
    assert len(found) == 9 and all(text == expected for text in found)
    assert learning.statistics.calls == 9 and 1 <= learning.statistics.steps <= 9


def test_a_call_drafts_with_the_weights_that_it_began_with(monkeypatch):
    """Also where another thread learns meanwhile."""
    target, batch = llama(), ragged_batch()
    learning = learner(target, "network", every=None, learning_rate=0.1)
    texts_of(target, learning, batch)
    used, propose = [], SpecFormerDrafter.propose

    def noted(self, num_tokens, choose):
        if not used:
            thread = threading.Thread(target=learning.learn)
            thread.start()
            thread.join()
        used.append([parameter.clone() for parameter in self.network.parameters()])
        return propose(self, num_tokens, choose)

    monkeypatch.setattr(SpecFormerDrafter, "propose", noted)
    generate(target, learning, **batch, **ENDLESS, num_assistant_tokens=4)
    assert learning.statistics.steps == 1 and len(used) > 3
    for weights in used[1:]:
        assert all(torch.equal(one, other) for one, other in zip(used[0], weights, strict=True))
    now = list(learning.network.parameters())
    assert not all(torch.equal(one, other) for one, other in zip(used[0], now, strict=True))


# ---- when it learns, and when not


def test_when_it_learns():
    target, batch = llama(), ragged_batch(padding=(0, 3))
    call = lambda learning: generate(target, learning, **batch, **ENDLESS, num_assistant_tokens=2)  # noqa: E731
    learning = learner(target, "network", every=5)
    steps = []
    for _ in range(6):
        call(learning)
        steps.append(learning.statistics.steps)
    assert steps == [0, 0, 1, 1, 1, 2]
    learning.frozen = True
    served = learning.network
    call(learning)
    call(learning)
    assert learning.statistics.steps == 2 and learning.network is served and learning.statistics.calls == 8
    idle = learner(target, "network", every=None)
    call(idle)
    assert idle.statistics.steps == 0 and idle.learn() and not idle.learn() and idle.statistics.steps == 1
    busy = learner(target, "network", every=1, max_time_share=1e-9)
    for _ in range(3):
        call(busy)
    assert busy.statistics.steps == 1


def test_inference_mode_and_no_grad():
    target, batch = llama(), ragged_batch()
    for kind in KINDS:
        learning = learner(target, kind, every=1)
        with torch.inference_mode():
            generate(target, learning, **batch, **ENDLESS)
            generate(target, learning, **batch, **ENDLESS)
        generate(target, learning, **batch, **ENDLESS)
        assert learning.statistics.steps == 3
        assert not any(each.is_inference() for each in learning.network.parameters())


def test_a_failure_costs_no_text(monkeypatch):
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    learning = learner(target, "network", every=1)

    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    learning._loss_of = fails
    with pytest.warns(UserWarning, match=r"could not learn and is frozen now; texts.*no memory.*frozen = False"):
        check(target, batch, reference, learning, 4, **ENDLESS)
    assert learning.frozen
    check(target, batch, reference, learning, 4, **ENDLESS)


def test_a_gradient_that_is_not_finite_has_no_effect():
    target, batch = llama(), ragged_batch()
    learning = learner(target, "network", every=None)
    served = learning.network
    texts_of(target, learning, batch)
    learning._texts[0].states[:] = float("nan")
    assert not learning.learn() and learning.statistics.skipped == 1 and learning.network is served
    texts_of(target, learning, batch)
    assert learning.learn() and all(each.isfinite().all() for each in learning.network.parameters())


def test_only_what_requires_gradients_learns():
    target, batch = llama(), ragged_batch()
    drafter = llama(seed=7, num_hidden_layers=1).requires_grad_(False)
    drafter.model.layers[0].requires_grad_(True)
    learning = OnlineDistillation(drafter, 1, optimizer=lambda some: torch.optim.SGD(some, lr=0.1), **ALWAYS)
    generate(target, learning, **batch, **ENDLESS)
    changed = {
        name
        for (name, one), other in zip(drafter.named_parameters(), learning.network.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed and all(name.startswith("model.layers.0.") for name in changed)
    drafter.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"frozen now.*None of the drafter's parameters requires gradients"):
        generate(target, OnlineDistillation(drafter, 1, **ALWAYS), **batch, **ENDLESS)


def test_drift_by_hand():
    statistics = AdaptationStatistics()
    assert statistics.drift is None
    for _ in range(100):
        statistics.count(10, 8, 0.1)
    assert statistics.acceptance == pytest.approx(0.8) and statistics.drift == pytest.approx(0.0)
    for _ in range(5):
        statistics.count(10, 2, 0.1)
    assert statistics.drift < -0.3
    for _ in range(500):
        statistics.count(10, 2, 0.1)
    assert abs(statistics.drift) < 0.01


# ---- files, and bad input


def state_of(learning: OnlineDistillation) -> list[torch.Tensor]:
    return [parameter.clone() for parameter in learning.network.parameters()]


@pytest.mark.one_version
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_is_saved(kind: str, tmp_path: Path):
    """Weights, optimizer and statistics: the next step is the one that it would have made."""
    target, batch = llama(), ragged_batch()
    settings = dict(ENDLESS, num_assistant_tokens=2)  # "auto" would note other passes, which round otherwise
    learning = learner(target, kind, every=1, learning_rate=0.01)
    for _ in range(3):
        generate(target, learning, **batch, **settings)
    path = tmp_path / "folder" / "state.safetensors"
    learning.save(path)
    other = learner(target, kind, every=1, learning_rate=0.01)
    generate(target, other, **batch, **settings)
    other.restore(path)
    assert all(torch.equal(one, two) for one, two in zip(state_of(learning), state_of(other), strict=True))
    assert other.statistics == learning.statistics and len(list(path.parent.iterdir())) == 1
    alone = learner(target, kind, every=1, learning_rate=0.01)
    alone.network = copy.deepcopy(learning.network)  # the weights without the optimizer
    for each in (learning, other, alone):
        generate(target, each, **batch, **settings)
    assert all(torch.equal(one, two) for one, two in zip(state_of(learning), state_of(other), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(state_of(learning), state_of(alone), strict=True))


def test_the_network_alone_is_an_ordinary_drafter(tmp_path: Path):
    target, batch = llama(), ragged_batch()
    learning = learner(target, "network", every=1, learning_rate=0.01)
    generate(target, learning, **batch, **ENDLESS)
    learning.network.save_pretrained(tmp_path / "drafter")
    loaded = SpecFormerModel.from_pretrained(tmp_path / "drafter", dtype=torch.float64)
    assert all(torch.equal(one, two) for one, two in zip(state_of(learning), loaded.parameters(), strict=True))


@pytest.mark.one_version
def test_damaged_files_change_nothing(tmp_path: Path, monkeypatch):
    target, batch = llama(), ragged_batch()
    learning = learner(target, "network", every=1)
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match=r"is not there; expected what `save` of an OnlineDistillation"):
        learning.restore(path)
    generate(target, learning, **batch, **ENDLESS)
    learning.save(path)
    whole, before = path.read_bytes(), state_of(learning)
    for content in (
        b"",
        whole[:40],
        whole[:-4],
        whole.replace(b"adaptation 1", b"adaptation 9"),
        whole[:-8] + b"\xff" * 8,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"does not hold this drafter as it learns .*Nothing was changed"):
            learning.restore(path)
    path.write_bytes(whole)
    for other in (
        learner(target, "network", "two layers"),
        learner(target, "network", optimizer=lambda some: torch.optim.SGD(some, lr=0.1)),
    ):
        with pytest.raises(
            ValueError, match=r"of another drafter, or damaged|its optimizer is AdamW, and here it is SGD"
        ):
            other.restore(path)
    assert all(torch.equal(one, two) for one, two in zip(before, state_of(learning), strict=True))

    def full(tensors, place, about):
        place.write_bytes(b"half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("specformer.generation.drafter_online_state.save_file", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left.*what was there before is safe"):
        learning.save(path)
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OnlineDistillation("drafter"), r"drafter is a builtins.str; expected a SpecFormer drafter"),
        (lambda: OnlineDistillation(Reader()), r"Reader; expected a SpecFormer drafter.*or a causal LM"),
        (lambda: OnlineDistillation(llama(), 0), r"every is 0; expected a positive integer"),
        (lambda: OnlineDistillation(llama(), max_tokens=None), r"max_tokens is None; expected a positive integer"),
        (lambda: OnlineDistillation(llama(), learning_rate=0), r"learning_rate is 0; expected a number above 0"),
        (lambda: OnlineDistillation(llama(), max_time_share=True), r"max_time_share is True; expected a number"),
        (lambda: OnlineDistillation(llama(), optimizer="adam"), r"optimizer is a builtins.str; expected a function"),
        (lambda: OnlineDistillation(llama(vocab_size=80)), r"The assistant LlamaForCausalLM has 80 tokens"),
    ],
)
def test_bad_arguments(make, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        generate(llama(), make(), **ragged_batch(), max_new_tokens=2)


def test_another_target_is_refused():
    target, batch = llama(), ragged_batch()
    learning = learner(target, "causal lm")
    generate(target, learning, **batch, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"has learned from another target.*Make one for each target"):
        generate(llama(seed=1), learning, **batch, max_new_tokens=2)
