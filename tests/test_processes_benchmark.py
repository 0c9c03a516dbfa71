"""A thousand prompts in one command, by one process and by two: each is answered once, and alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_callers import tiny_tokenizer
from tiny import llama

from benchmarks import processes
from specformer import SpecFormerConfig, SpecFormerModel


@pytest.mark.slow
def test_a_thousand_prompts(tmp_path: Path, monkeypatch):
    target = llama(torch.float32)
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    SpecFormerModel(SpecFormerConfig.from_target_config(target.config)).save_pretrained(tmp_path / "drafter")
    words = [" ".join(chr(97 + (7 * index + step) % 26) for step in range(1 + index % 9)) for index in range(1000)]
    lines = [json.dumps({"prompt": text}) + "\n" for text in words]
    (tmp_path / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    options = {"--prompts": "prompts.jsonl", "--target": "target", "--drafter": "drafter", "--output": "found.json"}
    places = [part for option, name in options.items() for part in (option, str(tmp_path / name))]
    monkeypatch.setattr(sys, "argv", ["processes", *places, "--max-new-tokens", "8", "--batch-size", "64"])
    assert processes.main(processes.parse()) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["prompts"] == 1000 and not found["differences"]
    assert [run["answers"] for run in found["runs"]] == [1000, 1000]
    assert found["speed_up"]["1"] == 1


def test_lost_and_other_answers_are_noticed(tmp_path: Path, monkeypatch, capsys):
    """Of four prompts, three runs: as they should be, one answer twice in place of another, one of other tokens."""
    right = [{"id": place, "response_ids": [7, place]} for place in range(4)]
    answered = iter([right, [right[0], *right[:3]], [*right[:3], {"id": 3, "response_ids": [8, 3]}]])

    def answer(number: int, arguments, folder: Path) -> dict:
        folder.mkdir()
        lines = [json.dumps(row) + "\n" for row in next(answered)]
        (folder / "answers-00000.jsonl").write_text("".join(lines), encoding="utf-8")
        return {"processes": number, "answers": 4, "tokens_per_second": 8.0 * number}

    monkeypatch.setattr(processes, "answer", answer)
    monkeypatch.setattr(sys, "argv", ["processes", "--prompts", "none.jsonl", "--processes", "1", "2", "4"])
    assert processes.main(processes.parse()) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["differences"] == [
        "turn 0, 2 processes: answers are lost or doubled",
        "turn 0, 2 processes: 1 answers are not the first run's",
        "turn 0, 4 processes: 1 answers are not the first run's",
    ]
    assert found["speed_up"] == {"1": 1.0, "2": 2.0, "4": 4.0}
