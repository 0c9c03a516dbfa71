"""The benchmark, the plots, and the one command from prompts to a drafter, on a tiny target."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from specformer import SpecFormerConfig, SpecFormerModel
from specformer.scripts import benchmark, distill, evaluate_drafter, plots, reproduce, train
from test_callers import tiny_tokenizer
from tiny import llama

TEXTS = ["the other note", "and in the end", "is it?", "one, two", "a hen on the hill", "so it is", "in there", "there"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A target with a tokenizer, and prompts."""
    target = llama(torch.float32)
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    SpecFormerModel(SpecFormerConfig.from_target_config(target.config)).save_pretrained(tmp_path / "drafter")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return tmp_path


def run(module, monkeypatch, *arguments) -> int | None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main(module.parse())


def test_benchmark(folder: Path, monkeypatch):
    output = folder / "results" / "benchmark.json"
    arguments = ["--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--drafter", folder / "drafter"]
    options = ["--batch-sizes", 1, 5, "--max-new-tokens", 16, "--num-assistant-tokens", 4, "--repeats", 2]
    run(benchmark, monkeypatch, *arguments, *options, "--output", output)
    result = json.loads(output.read_text())
    assert [row["batch_size"] for row in result["batches"]] == [1, 5]
    for row in result["batches"]:
        drafters = row["drafters"]
        assert list(drafters) == ["default", "always right", "always wrong"]
        assert {figures["identical"] for figures in drafters.values()} == {row["batch_size"]}
        assert drafters["always wrong"]["tokens_per_pass"] == 1
        assert drafters["always right"]["tokens_per_pass"] == 5  # 15 tokens behind the prompt's, k + 1 a pass
        assert 1 <= drafters["default"]["tokens_per_pass"] < 5
        ratio = drafters["default"]["ratio_to_plain"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]


def test_figures_from_answers_are_those_of_decoding(folder: Path, monkeypatch):
    """All together and task by task, for every draft length. The drafter learnt the answers, so that it is often
    right."""
    tasks = ["short" if len(text) < 10 else "long" for text in TEXTS]
    lines = [json.dumps({"prompt": text, "task": task}) + "\n" for text, task in zip(TEXTS, tasks, strict=True)]
    (folder / "prompts.jsonl").write_text("".join(lines))
    prompts = ("--prompts", folder / "prompts.jsonl", "--target", folder / "target")
    run(distill, monkeypatch, *prompts, "--max-new-tokens", 16, "--output", folder / "answers")
    settings = ("--epochs", 60, "--num-draft-tokens", 3, "--learning-rate", 3e-3, "--save-dtype", "float32")
    data = ("--data", folder / "answers", "--target", folder / "target")
    run(train, monkeypatch, *data, *settings, "--evaluations", 1, "--output", folder / "trained")
    evaluated = (*prompts, "--drafter", folder / "trained", "--output", folder / "result.json")
    run(evaluate_drafter, monkeypatch, *evaluated, "--answers", folder / "answers")
    offline = json.loads((folder / "result.json").read_text())
    assert {task: figures["answers"] for task, figures in offline["tasks"].items()} == Counter(tasks)
    for k in (1, 2, 3):
        options = ("--num-assistant-tokens", k, "--max-new-tokens", 16, "--batch-size", 3)
        run(evaluate_drafter, monkeypatch, *evaluated, *options)
        decoded = json.loads((folder / "result.json").read_text())
        assert decoded["identical"] == len(TEXTS)
        assert decoded["tokens_per_pass"] == offline["all"][f"tokens_per_pass_k{k}"] > 1.2
        for task, figures in offline["tasks"].items():
            assert decoded["tasks"][task]["tokens_per_pass"] == figures[f"tokens_per_pass_k{k}"]
        measures = decoded["measures"]
        assert measures["kappa"] == decoded["tokens_per_pass"]
        assert measures["acceptance_per_slot"] == decoded["acceptance_per_slot"]
        assert 0 < measures["r1"] < measures["kappa"]
        seconds = decoded["seconds"]
        assert measures["theta"] == pytest.approx(measures["kappa"] * seconds["drafting"] / seconds["plain"])


def test_answers_to_other_prompts_are_refused(folder: Path, monkeypatch):
    (folder / "answers.jsonl").write_text('{"id": 8, "prompt_ids": [3], "response_ids": [4, 5]}\n')
    evaluated = ("--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--drafter", folder / "drafter")
    with pytest.raises(ValueError, match=r"answers prompts \[8\], and .* has prompts 0 to 7"):
        run(evaluate_drafter, monkeypatch, *evaluated, "--answers", folder / "answers.jsonl")
    with pytest.raises(ValueError, match="needs a SpecFormer drafter"):
        options = ("--prompt-lookup", 2, "--answers", folder / "answers.jsonl")
        run(evaluate_drafter, monkeypatch, *evaluated[:4], *options)


def test_parameters_at_work(folder: Path):
    target = llama(torch.float32)
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, num_draft_tokens=3))
    figures = evaluate_drafter.parameters_at_work(drafter, target)
    size = target.config.hidden_size
    read_only = 64 * size  # the target's embeddings; its head is a matrix of its own
    assert figures["target_parameters"] == target.num_parameters() - read_only
    shared = {"input_norm", "input_proj", "context_attention", "positional_norm", "positional_ffn"}
    expected = 3 * 64 * size
    for name, weight in drafter.named_parameters():
        expected += weight.numel() * (1 if name.split(".")[0] in shared else 3)
    assert figures["shared_parameters"] == expected


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_plots(tmp_path: Path):
    history = [{"step": 10, "loss": 3.0}, {"step": 10, "eval_loss": 3.1, "eval_tokens_per_pass_k4": 1.2}]
    history += [{"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 2.1, "eval_tokens_per_pass_k4": 1.4}]
    training, decoded, other = (tmp_path / f"{name}.json" for name in ("training", "decoded", "other"))
    training.write_text(json.dumps({"history": history}))
    regime = {"drafter": "SpecFormer", "decoding": "greedy", "acceptance": "match"}
    decoded.write_text(json.dumps({"regime": regime, "acceptance_per_slot": [0.5, 0.2]}))
    plots.main([training, decoded])
    assert is_picture(tmp_path / "training.png") and is_picture(tmp_path / "acceptance.png")
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is neither"):
        plots.main([other])


@pytest.mark.slow
def test_one_command_from_prompts_to_a_drafter(folder: Path, monkeypatch):
    """Cut into pieces on the way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = folder / "run"
    arguments = [
        *("--prompts", folder / "prompts.jsonl", "--evaluate", folder / "prompts.jsonl", "--output", output),
        *("--target", folder / "target", "--target-id", "some/target", "--recipe", "cpu"),
    ]
    for _ in range(40):
        status = run(reproduce, monkeypatch, *arguments, "--minutes", 0.25)
        if status != reproduce.OUT_OF_TIME:
            break
    assert status == 0
    drafter = SpecFormerModel.from_pretrained(output / "drafter")
    assert drafter.config.target_name_or_path == "some/target"
    assert len((output / "answers" / "answers-00000.jsonl").read_text().splitlines()) == len(TEXTS)
    for k in (4, 7):
        assert json.loads((output / f"prompts_k{k}.json").read_text())["identical"] == len(TEXTS)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert run(reproduce, monkeypatch, *arguments) == 0  # nothing is left to do
