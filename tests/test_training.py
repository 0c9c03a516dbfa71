"""The trainer from its command line to a folder that loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.scripts import train
from specformer.scripts.answers import Answers
from specformer.scripts.losses import IGNORED
from tiny import llama, ragged_batch


def write_answers(path: Path, count: int = 24) -> None:
    """Texts that go up by one, so that there is something to learn."""
    with open(path, "w") as file:
        for number in range(count):
            tokens = [6 + (number + step) % 50 for step in range(20)]
            split = 2 + number % 4
            file.write(json.dumps({"prompt_ids": tokens[:split], "response_ids": tokens[split:]}) + "\n")


@pytest.fixture
def folders(tmp_path) -> Path:
    """A folder with a target and its answers."""
    llama(torch.float32).save_pretrained(tmp_path / "target")
    write_answers(tmp_path / "answers.jsonl")
    return tmp_path


def run(monkeypatch, folder: Path, *options: str) -> Path:
    """Train from the command line; returns the drafter's folder."""
    arguments = ["--data", folder / "answers.jsonl", "--target", folder / "target", "--output", folder / "drafter"]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments), *options])
    train.main(train.parse())
    return folder / "drafter"


@pytest.mark.parametrize("preset", [(), ("--paper",)], ids=["anchor", "paper"])
def test_training_end_to_end(preset: tuple, folders: Path, monkeypatch):
    options = ("--epochs", "4", "--num-draft-tokens", "3", "--default-num-assistant-tokens", "2", "--held-out", "4")
    folder = run(
        monkeypatch, folders, *options, *preset, "--target-id", "some/target", "--save-dtype", "float32",
        "--learning-rate", "1e-2",
    )  # fmt: skip
    log = json.loads((folder / "training.json").read_text())
    assert [entry["epoch"] for entry in log["epochs"]] == [1, 2, 3, 4]
    assert log["epochs"][-1]["train_loss"] < 0.7 * log["epochs"][0]["train_loss"]
    assert log["epochs"][-1]["held_out_loss"] < log["epochs"][0]["held_out_loss"]
    assert log["epochs"][-1]["held_out_accuracy_per_slot"][0] > 0.25  # chance is 1 in 64
    assert len(log["epochs"][-1]["held_out_accuracy_per_slot"]) == 3
    drafter = SpecFormerModel.from_pretrained(folder)
    assert drafter.config.use_anchor_token is not bool(preset)
    assert drafter.config.target_name_or_path == "some/target"
    assert drafter.config.default_num_assistant_tokens == 2
    assert drafter.dtype == torch.float32
    assert log["parameters"] == sum(parameter.numel() for parameter in drafter.parameters())
    assert [path.name for path in folders.iterdir() if path.name.startswith(".")] == []
    target, batch = llama(torch.float32), ragged_batch()
    texts = generate(target, drafter, **batch, max_new_tokens=8)
    assert texts.tolist() == target.generate(**batch, max_new_tokens=8).tolist()


def test_held_out_accuracy_is_that_of_the_saved_drafter(folders: Path, monkeypatch):
    """Counted one token at a time, from the folder."""
    options = ("--epochs", "1", "--num-draft-tokens", "3", "--held-out", "4", "--save-dtype", "float32")
    folder = run(monkeypatch, folders, *options, "--learning-rate", "1e-2")
    logged = json.loads((folder / "training.json").read_text())["epochs"][-1]["held_out_accuracy_per_slot"]
    drafter, target = SpecFormerModel.from_pretrained(folder), llama(torch.float32)
    hits, counts = [0] * 3, [0] * 3
    for line in (folders / "answers.jsonl").read_text().splitlines()[-4:]:
        row = json.loads(line)
        text = row["prompt_ids"] + row["response_ids"]
        with torch.no_grad(), drafter.borrow(target) as borrowed:
            target(input_ids=torch.tensor([text]))
            anchors = borrowed.embed(torch.tensor([[*text[1:], 0]]))
            choices = borrowed.logits(drafter(borrowed.take_hidden_states(), anchors).draft_hidden_states).argmax(-1)
        for n in range(len(text)):
            for slot in range(3):
                if len(row["prompt_ids"]) <= n + 2 + slot < len(text):
                    hits[slot] += text[n + 2 + slot] == int(choices[0, n, slot])
                    counts[slot] += 1
    assert logged == pytest.approx([hit / count for hit, count in zip(hits, counts, strict=True)])


def test_training_again_replaces_the_folder(folders: Path, monkeypatch):
    run(monkeypatch, folders, "--epochs", "1", "--num-draft-tokens", "2")
    (folders / "drafter" / "left-over").touch()
    folder = run(monkeypatch, folders, "--epochs", "1", "--num-draft-tokens", "3")
    assert not (folder / "left-over").exists()
    drafter = SpecFormerModel.from_pretrained(folder)
    assert drafter.config.num_draft_tokens == 3
    assert drafter.dtype == torch.bfloat16


def test_training_starts_from_the_targets_final_norm(folders: Path, monkeypatch):
    target = llama(torch.float32)
    torch.nn.init.normal_(target.model.norm.weight)
    target.save_pretrained(folders / "target")
    folder = run(monkeypatch, folders, "--epochs", "1", "--learning-rate", "0", "--save-dtype", "float32")
    drafter = SpecFormerModel.from_pretrained(folder)
    torch.testing.assert_close(drafter.final_norm.weight, target.model.norm.weight, rtol=2e-5, atol=1e-6)


def test_gradients_reach_all_of_the_drafter_and_none_of_the_target(folders: Path):
    target = llama(torch.float32)
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))
    target.requires_grad_(False)
    answers = Answers(folders / "answers.jsonl", 16)
    batch = Answers.collate([answers[0], answers[1]])
    borrowed = drafter.borrow(target)
    states = train.teacher_forced_states(drafter, borrowed, batch)
    train.drafter_loss(states, train.slot_labels(batch["labels"], 8), borrowed).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in drafter.parameters())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_right_padding_does_not_reach_drafts(folders: Path):
    target = llama(torch.float64)
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config)).to(torch.float64)
    answers = Answers(folders / "answers.jsonl", 100)
    rows = [answers[0], tuple(values[:9] for values in answers[1])]
    borrowed = drafter.borrow(target)
    together = train.teacher_forced_states(drafter, borrowed, Answers.collate(rows))
    alone = train.teacher_forced_states(drafter, borrowed, Answers.collate(rows[1:]))
    torch.testing.assert_close(together[1:, :8], alone[:, :8], rtol=0, atol=1e-6)


def test_labels_cover_answers_only(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt_ids": [1, 2, 3], "response_ids": [4, 5]}\n{"prompt_ids": [6], "response_ids": []}\n')
    answers = Answers(path, 10)
    assert list(answers) == [([1, 2, 3, 4, 5], [IGNORED, IGNORED, IGNORED, 4, 5])]
    assert Answers(path, 4)[0] == ([1, 2, 3, 4], [IGNORED, IGNORED, IGNORED, 4])
    batch = Answers.collate([answers[0], ([7, 8], [IGNORED, 8])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [IGNORED, 8, IGNORED, IGNORED, IGNORED]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        "",
        "[1, 2]",
        "3",
        '{"prompt_ids": [1]}',
        '{"prompt_ids": [1], "response_ids": 4}',
        '{"prompt_ids": [1], "response_ids": "text"}',
        '{"prompt_ids": [1], "response_ids": [4, "five"]}',
        '{"prompt_ids": [1.5], "response_ids": [4]}',
    ],
)
def test_a_broken_line_is_named(line: str, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt_ids": [1], "response_ids": [2]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2: expected"):
        Answers(path, 10)


def test_a_file_without_answers_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="holds no answers"):
        Answers(path, 10)
