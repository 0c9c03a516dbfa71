"""Drafters of every kind that `train` makes: what is learnt in one packed pass is what decoding drafts, what is saved
loads, and the text is the target's own."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from exactness import check, plain
from safetensors.torch import load_file
from test_offline import LENGTHS, SLOTS, make_answers
from test_training import assert_same_run, command, completed, driver_of_two, log_of, prepare, run
from tiny import llama, ragged_batch

from specformer import generate
from specformer.generation.call_drafter import drafter_of_network
from specformer.generation.drafter import Prompts
from specformer.generation.drafter_loading import drafting_model
from specformer.generation.drafter_parallel import ParallelDrafter
from specformer.generation.prompt import PromptLayout
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.kinds.all import KINDS, student_of
from specformer.scripts.parts.kinds.groups import Groups
from specformer.scripts.parts.losses import IGNORED, drafter_loss
from specformer.scripts.parts.offline import evaluate_offline, summarise
from specformer.scripts.parts.training_arguments import OF_SOME_KINDS, DrafterTrainingArguments
from specformer.scripts.train import DrafterTrainer

VARIANTS = {
    "dflash": ("dflash", {}),
    "dflash, two layers, some tokens": ("dflash", dict(config=["num_hidden_layers=2"], draft_vocab_size=40)),
    "eagle3": ("eagle3", dict(draft_vocab_size=40)),
    "eagle3, more norms": ("eagle3", dict(config=["norm_output=true", "norm_before_fc=true"])),
    "falcon": ("falcon", dict(draft_vocab_size=40)),
    "falcon, more norms": ("falcon", dict(config=["block_size=3", "norm_output=true"], glancing=0.0)),
    "parallelspec": ("parallelspec", dict(draft_vocab_size=40)),
    "parallelspec, a norm a state": ("parallelspec", dict(config=["fc_norm=true", "norm_before_residual=true"])),
    "pard": ("pard", {}),
}


class Texts:
    """Answers as `Student.make` takes them."""

    def __init__(self, rows):
        self.rows = [(tokens, int((labels == IGNORED).sum())) for tokens, labels in rows]
        self.token_counts = lambda size: torch.cat([tokens[at:] for tokens, at in self.rows]).bincount(minlength=size)


def make_student(variant: str, target, rows, seed: int = 0):
    """A new one for `target`, in its dtype."""
    kind, options = VARIANTS[variant]
    arguments = DrafterTrainingArguments(
        data=Path("unread"),
        output_dir="unwritten",
        target="some/target",
        drafter=kind,
        num_draft_tokens=SLOTS,
        **options,
    )
    torch.manual_seed(seed)
    student = KINDS[kind].make(KINDS[kind].make_config(arguments, target.config), target, Texts(rows), arguments)
    student.network.to(target.dtype)
    return student


@cache
def trained(variant: str, with_eos: bool):
    """Trained briefly on the very answers, so that it is often right and often wrong."""
    target, _, _, rows = make_answers(with_eos)
    student, batch = make_student(variant, target, rows), Answers.collate(rows)
    optimizer = torch.optim.AdamW([each for each in student.network.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        loss = student.loss(student.network, batch, drafter_loss, 1.0, 0, 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    student.network.eval()
    return student


# ---- a packed pass is what decoding does


@pytest.mark.one_version
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_of_a_packed_pass_are_those_of_the_cached_one(variant: str):
    """Its states at every position, among them those of texts that are padded, to 1e-5; and the tokens in front of a
    slot are the true ones, as where they were accepted."""
    target, _, _, rows = make_answers(False)
    student = trained(variant, False)
    with torch.no_grad():
        drafts = student.drafts(student.network, Answers.collate(rows[:3]))
        logits = student.head.draft_logits(drafts.states)
    number = 0
    for tokens, labels in rows[:3]:
        first = int((labels != IGNORED).long().argmax())
        for read in range(max(0, first - 1 - SLOTS), len(tokens) - 2):
            here = logits[number]
            number += 1
            if read % 7:
                continue
            count = min(SLOTS, len(tokens) - read - 2)
            seen = cached_logits(student, target, tokens, read + 1, count)
            torch.testing.assert_close(here[:count], seen, rtol=0, atol=1e-5)
    assert number == len(drafts.states)


def cached_logits(student, target, tokens: torch.Tensor, known: int, count: int) -> torch.Tensor:
    """Logits (count, V') of what is drafted after the first `known` + 1 of `tokens` by the drafter that decodes, which
    is told the true tokens."""
    prompt, first, found = tokens[None, :known], tokens[None, known : known + 1], []

    def choose(logits, ahead=0, token_ids=None):
        found.append(logits[0])
        return tokens[None, known + 1 + ahead : known + 1 + ahead + logits.shape[1]]

    network = student.network
    drafter = drafter_of_network(network, target) or ParallelDrafter(network, target)
    layout = PromptLayout.from_mask(None, prompt)
    states = None
    if drafter.hidden_state_layers:
        every = target(input_ids=prompt, output_hidden_states=True).hidden_states
        states = [torch.stack([every[layer] for layer in drafter.hidden_state_layers], dim=2)]
    with torch.no_grad():
        drafter.begin(Prompts(prompt, layout, first, 99, states))
        drafter.propose(count, choose)
    return torch.cat(found)


@pytest.mark.one_version
@pytest.mark.parametrize("with_eos", [False, True], ids=["full length", "eos"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_offline_figures_are_those_of_decoding(variant: str, with_eos: bool):
    target, batch, settings, rows = make_answers(with_eos)
    student = trained(variant, with_eos)
    batches = [Answers.collate(rows[start : start + 3]) for start in range(0, len(rows), 3)]
    sums, expected = evaluate_offline(student, batches, LENGTHS), target.generate(**batch, **settings)
    figures = summarise(sums, LENGTHS)
    alone = {} if variant == "pard" else dict(prompt_lookup_num_tokens=0)
    for k, (tokens, passes) in zip(LENGTHS, sums[-2 * len(LENGTHS) :].view(-1, 2).tolist(), strict=True):
        output = generate(
            target, student.network, **batch, **settings, **alone, num_assistant_tokens=k, return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, expected)
        statistics = output.statistics
        assert passes == sum(statistics.target_passes_per_row)
        assert tokens == sum(statistics.tokens_per_row) - statistics.batch_size
        assert figures[f"tokens_per_pass_k{k}"] == statistics.tokens_per_pass
        assert 1.1 < statistics.tokens_per_pass < k + 0.99  # drafts of both kinds


def seen_too_far(visible):
    return lambda self, slots, length: visible(self._replace(starts=self.starts + 1), slots, length)


FAULTS = {
    "a token too many": lambda: ("visible", seen_too_far(Groups.visible)),
    "slots of other groups": lambda: ("own", lambda self, slots, causal: torch.ones_like(OWN(self, slots, causal))),
    "a place behind": lambda: ("places", lambda self, slots, first: PLACES(self, slots, first + 1)),
}
OWN, PLACES = Groups.own, Groups.places


@pytest.mark.one_version
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("variant", ["dflash", "eagle3", "falcon", "parallelspec"])
def test_the_comparison_notices_what_groups_must_not_see(variant: str, fault: str, monkeypatch):
    student, batch = trained(variant, False), Answers.collate(make_answers(False)[3][:2])
    with torch.no_grad():
        before = student.drafts(student.network, batch).states
        monkeypatch.setattr(Groups, *FAULTS[fault]())
        after = student.drafts(student.network, batch).states
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.one_version
@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_of_any_length(variant: str):
    """One in which nothing is drafted, alone and beside one whose groups are in several rows; and a single slot."""
    rows = make_answers(False)[3]
    student = trained(variant, False)
    (prompt, _), (tokens, _) = rows[:2]
    nothing = prompt, torch.full_like(prompt, IGNORED)
    drafts = student.drafts(student.network, Answers.collate([nothing]))
    assert drafts.states.shape[:2] == (0, SLOTS)
    loss = student.loss(student.network, Answers.collate([nothing]), drafter_loss, 1.0, 0, 1)
    loss.backward()
    assert float(loss.detach()) == 0
    tokens = tokens.repeat(4)[:100]
    long = tokens, tokens.masked_fill(torch.arange(100) < 4, IGNORED)
    with torch.no_grad():
        alone, beside = (student.drafts(student.network, Answers.collate(texts)) for texts in ([long], [nothing, long]))
        torch.testing.assert_close(alone.states, beside.states, rtol=0, atol=1e-9)
        assert torch.equal(alone.labels, beside.labels)
        if "dflash" not in variant:  # whose block is of one size
            one = type(student)(student.network, student.target, 1).drafts(student.network, Answers.collate([long]))
            assert one.states.shape[1] == 1
            torch.testing.assert_close(one.states[:, 0], alone.states[-len(one.states) :, 0], rtol=0, atol=1e-9)


# ---- from the command line to a folder


OPTIONS: dict[str, tuple[str, ...]] = {
    "dflash": (
        "--draft-vocab-size",
        "60",
        "--config",
        "num_hidden_layers=2",
        "rope_theta=500",
        "--store-hidden-states",
    ),
    "eagle3": ("--draft-vocab-size", "60", "--config", "rope_theta=500", "--slot-decay", "0.8"),
    "falcon": ("--config", "rope_theta=500", "block_size=2", "--glancing", "0.3"),
    "parallelspec": ("--config", "rope_theta=500", "--acceptance-weights", "0.5", "--position-share", "0.8"),
    "pard": ("--config", "num_hidden_layers=3", "--acceptance-weights", "0.5", "--slot-share", "0.8"),
}
"""Of each kind, some that change its network or its training."""
IN_EVERY_RUN = [kind if kind != "falcon" else pytest.param(kind, marks=pytest.mark.slow) for kind in OPTIONS]
"""Falcon trains as EAGLE-3 does."""
BUDGET = ("--num-draft-tokens", "3", "--held-out", "4", "--save-dtype", "float32", "--learning-rate", "1e-2")
BUDGET += ("--batch-size", "4", "--logging-steps", "1", "--evaluations", "2")


@pytest.mark.parametrize("kind", OPTIONS)
def test_training_end_to_end(kind: str, tmp_path: Path, monkeypatch):
    """The loss falls, more than two tokens a pass are right in the end, what is saved is what was evaluated, and the
    text of ragged batches stays the target's, whatever has been learnt."""
    folders = prepare(tmp_path)
    folder = run(monkeypatch, folders, "--drafter", kind, *BUDGET, *OPTIONS[kind], "--epochs", "16")
    log = log_of(folder)
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert log["settings"]["drafter"] == kind and log["best"]["tokens_per_pass"] > 2
    assert not list(folder.glob("hidden_states.bin*"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{KINDS[kind].title} drafter" in card and "3 draft slots" in card and "specformer.generate" in card

    target, answers = llama(torch.float32), Answers(folders / "answers.jsonl", 1024)
    network = drafting_model(str(folder), target)
    weights = load_file(folder / "model.safetensors")
    assert log["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert all(weight.dtype == torch.float32 for weight in weights.values() if weight.is_floating_point())
    held_out = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()[:4]
    batches = [Answers.collate([answers[index] for index in held_out])]
    figures = summarise(evaluate_offline(student_of(network, target, 3), batches, [3]), [3])
    assert figures["tokens_per_pass_k3"] == pytest.approx(log["best"]["tokens_per_pass"])
    for setting in (dict(do_sample=False), dict(do_sample=True, top_k=20)):
        arguments = dict(max_new_tokens=12, eos_token_id=None, **setting)
        reference = plain(target, ragged_batch(), **arguments)
        for k in (1, 3, "auto"):
            check(target, ragged_batch(), reference, folder, k, **arguments)


@pytest.mark.one_version
@pytest.mark.parametrize("kind", IN_EVERY_RUN)
def test_a_run_that_was_interrupted_is_that_of_one_left_alone(kind: str, tmp_path: Path, monkeypatch):
    folders = prepare(tmp_path)
    options = ("--drafter", kind, *BUDGET, *OPTIONS[kind], "--epochs", "2")
    calm = run(monkeypatch, folders, *options, output="calm")
    broken, save = [], DrafterTrainer._save_checkpoint

    def break_off(self, *args, **kwargs):
        save(self, *args, **kwargs)
        broken.append(self.state.global_step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DrafterTrainer, "_save_checkpoint", break_off)
        run(patch, folders, *options)
    assert broken == [5]
    assert_same_run(run(monkeypatch, folders, *options), calm)


@pytest.mark.one_version
@pytest.mark.parametrize("kind", IN_EVERY_RUN)
def test_training_goes_on_from_another_drafter(kind: str, tmp_path: Path, monkeypatch):
    folders = prepare(tmp_path)
    few = ("--drafter", kind, *BUDGET, "--epochs", "4")
    first = run(monkeypatch, folders, *few, *OPTIONS[kind])
    start, little = ("--start-from", str(first)), ("--learning-rate", "1e-9", "--epochs", "1", "--evaluations", "1")
    second = run(monkeypatch, folders, *few, *start, *little, output="second")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)
    assert log_of(second)["best"]["tokens_per_pass"] == pytest.approx(log_of(first)["best"]["tokens_per_pass"])
    assert log_of(second)["before"]["settings"]["drafter"] == kind


@pytest.mark.one_version
def test_mixed_precision(tmp_path: Path, monkeypatch):
    """Other losses than without, and close to them."""
    folders = prepare(tmp_path)
    for kind in OPTIONS:
        few = ("--drafter", kind, *BUDGET, "--epochs", "1", "--config")
        few += ("num_hidden_layers=2",) if kind == "pard" else ("rms_norm_eps=1e-5",)
        outputs = [f"{kind}{len(more)}" for more in ((), ("--bf16",))]
        runs = [
            run(monkeypatch, folders, *few, *more, output=output)
            for more, output in zip(((), ("--bf16",)), outputs, strict=True)
        ]
        ours, theirs = ([entry["loss"] for entry in log_of(each)["history"] if "loss" in entry] for each in runs)
        assert ours != theirs
        assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_EVERY_RUN)
def test_two_processes(kind: str, tmp_path: Path):
    """They train one drafter."""
    folders = prepare(tmp_path)
    driver, launcher = driver_of_two(folders)
    options = ("--drafter", kind, *BUDGET, *OPTIONS[kind], "--epochs", "4")
    said = completed(**command(folders, "drafter", *options, launcher=launcher))
    assert said.count("The drafter is in") == 1
    (weights, best), (others, other_best) = (torch.load(f"{driver}.{process}") for process in (0, 1))
    assert best == other_best and all(torch.equal(weights[name], others[name]) for name in weights)
    log = log_of(folders / "drafter")
    assert log["settings"]["processes"] == 2
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dflash", ("--config", "previous_token_rank=8"), "'previous_token_rank' is no one of .*num_hidden_layers"),
        ("dflash", ("--paper",), "--paper was given, which means nothing for --drafter dflash: it is for specformer"),
        ("dflash", ("--distance-loss", "0.5"), "--distance-loss was given, which means nothing for --drafter dflash"),
        ("dflash", ("--slot-share", "0.5"), "--slot-share was given, .* it is for pard"),
        ("dflash", ("--gradient-checkpointing",), "--gradient-checkpointing .* it is for specformer, pard"),
        ("dflash", ("--config", "num_attention_heads=0"), "num_attention_heads is 0"),
        ("dflash", ("--config", "mask_token_id=64"), "mask_token_id is 64; expected a token of the 64"),
        ("dflash", ("--config", "target_layer_ids=[9]"), "4 layers, and state 9 is read"),
        ("dflash", ("--config", "target_layer_ids=[]"), r"target_layer_ids is \[\]; expected a list of layers"),
        ("eagle3", ("--config", "fc_norm=3"), "fc_norm is 3; expected true or false"),
        ("dflash", ("--config", 'hidden_act="none of these"'), "no dflash drafter can be so .*none of these"),
        ("dflash", ("--num-draft-tokens", "0"), "--num-draft-tokens is 0; expected at least 1"),
        ("eagle3", ("--config", "num_hidden_layers=2"), "num_hidden_layers is 2; expected 1"),
        ("eagle3", ("--config", "head_dim=7"), "head_dim is 7; expected an even"),
        ("eagle3", ("--config", "norm_before_fc=true", "fc_norm=true"), "the format has one of them at most"),
        ("eagle3", ("--num-draft-tokens", "17"), "--num-draft-tokens is 17; eagle3 drafts 16 at most"),
        ("eagle3", ("--draft-vocab-size", "-1"), "--draft-vocab-size is -1; expected at least 1"),
        ("parallelspec", ("--base-loss", "0.5"), "--base-loss was given"),
        ("falcon", ("--config", "block_size=0"), "block_size is 0; expected a whole number from 1 to 16"),
        ("falcon", ("--glancing", "2"), "--glancing is 2.0; expected a number from 0 to 1"),
        ("eagle3", ("--glancing", "0.5"), "--glancing was given, .* it is for falcon"),
        ("pard", ("--draft-vocab-size", "9"), "--draft-vocab-size .* it is for specformer, dflash, eagle3, falcon"),
        ("pard", ("--store-hidden-states",), "--store-hidden-states was given, which means nothing for --drafter pard"),
        ("pard", ("--config", "num_hidden_layers=5"), "num_hidden_layers is 5; expected a number from 1 to 4"),
        ("pard", ("--config", "mask_token_id=99"), "pard_token of .* is 99; expected one of its 64 tokens"),
        ("pard", ("--slot-share", "2"), "--slot-share is 2.0; expected a number from 0 to 1"),
        ("pard", ("--start-from", "x", "--config", "num_hidden_layers=2"), "were both given"),
    ],
)
def test_options_that_do_not_go_together(kind: str, options: tuple, message: str, folders: Path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, folders, "--drafter", kind, *options)
    assert not (folders / "drafter").exists()


def test_every_option_means_something_for_some_kind():
    fields = {field.name for field in dataclasses.fields(DrafterTrainingArguments)}
    meant = {option for kind in KINDS.values() for option in kind.means}
    assert set(OF_SOME_KINDS) == meant and meant - {"activation_checkpointing"} <= fields  # of newer transformers


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("folders"))
