"""SIGKILL at random moments of distillation and training, and whether the comparison of kill.py can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kill import JOBS, Distillation, Training, check

from specformer.scripts.parts.answering import Answer


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_killed_twice(name: str, tmp_path: Path):
    found = check(JOBS[name](tmp_path), kills=2, seed=0)
    assert len(found["kills"]) == 2
    assert not found["differences"]


@pytest.mark.one_version
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "fault", "difference"),
    [
        (Distillation, "AnswerFolder.there = lambda self: set()", "doubled"),
        (
            Training,
            "train.DrafterTrainer._load_optimizer_and_scheduler = lambda self, checkpoint: None",
            "another history",
        ),
    ],
    ids=["answers are forgotten", "the optimizer is forgotten"],
)
def test_a_planted_fault_is_found(make: Callable, fault: str, difference: str, tmp_path: Path):
    name = make.module.rpartition(".")[2]
    code = f"from specformer.scripts import {name}; from specformer.scripts.parts.answer_folder import AnswerFolder; "
    code += f"{fault}; {name}.main({name}.parse())"
    found = check(make(tmp_path, launcher=("-c", code)), kills=2, seed=0)
    assert any(difference in line for line in found["differences"])


# ---- the comparison alone


def double_an_answer(lines: list[str]) -> list[str]:
    return [*lines, lines[1]]


def lose_an_answer(lines: list[str]) -> list[str]:
    return lines[:2]


def change_a_token(lines: list[str]) -> list[str]:
    return [*lines[:2], lines[2].replace("12", "13")]


def cut_the_last_line(lines: list[str]) -> list[str]:
    return [*lines[:2], lines[2][:-1]]


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (double_an_answer, {"doubled"}),
        (lose_an_answer, {"lost"}),
        (change_a_token, {"lost", "doubled"}),
        (cut_the_last_line, {"lost", "doubled"}),
    ],
)
def test_other_answers_are_noticed(plant: Callable, words: set[str], tmp_path: Path):
    lines = [Answer(index, [7], [8, 10 + index], True).to_json() + "\n" for index in range(3)]
    for name, content in (("calm", lines), ("reordered", lines[::-1]), ("killed", plant(lines))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "answers-00000.jsonl").write_text("".join(content))
    job = Distillation(tmp_path)
    assert job.differences("reordered", "calm") == []
    assert {line.split()[0] for line in job.differences("killed", "calm")} == words


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def change_a_figure(folder: Path) -> None:
    log = json.loads((folder / "training.json").read_text())
    log["history"][0]["loss"] += 1e-12
    (folder / "training.json").write_text(json.dumps(log))


def lose_a_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint-5")


def leave_litter(folder: Path) -> None:
    (folder / "half").touch()


@pytest.mark.parametrize(
    ("plant", "difference"),
    [
        (flip_a_bit, "another model.safetensors"),
        (change_a_figure, "another history"),
        (lose_a_checkpoint, "checkpoint-5 is missing"),
        (leave_litter, "half is too much"),
    ],
)
def test_another_training_is_noticed(plant: Callable, difference: str, tmp_path: Path):
    checkpoint = tmp_path / "calm" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    for folder in (checkpoint, checkpoint.parent):
        (folder / "model.safetensors").write_bytes(b"weights")
    log = {"history": [{"step": 1, "loss": 2.0}], "best": {"step": 5}, "steps": 5}
    (tmp_path / "calm" / "training.json").write_text(json.dumps(log))
    shutil.copytree(tmp_path / "calm", tmp_path / "killed")
    job = Training(tmp_path)
    assert job.differences("killed", "calm") == []
    plant(tmp_path / "killed")
    assert difference in job.differences("killed", "calm")
