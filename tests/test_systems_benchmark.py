"""benchmarks/systems.py on tiny models: every way and figure, in one file, gone on with after an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_callers import tiny_tokenizer
from test_copying import network_of
from tiny import llama

from benchmarks import systems
from specformer.scripts import plots

pytestmark = pytest.mark.one_version


def test_it_measures_every_system_and_goes_on_where_it_was(tmp_path: Path, monkeypatch):
    target, assistant, drafter, output = (
        tmp_path / name for name in ("target", "assistant", "drafter", "systems.json")
    )
    model = llama(torch.float32)
    for folder, each in ((target, model), (assistant, llama(torch.float32, seed=4, num_hidden_layers=1))):
        each.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    network_of(model).float().save_pretrained(drafter)
    prompts = tmp_path / "chat.jsonl"
    texts = ["the other note", "and in the end", "is it?", "one, two"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    options = {"target": target, "assistant": assistant, "drafter": drafter, "prompts": prompts, "output": output}
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    given += ["--batch-sizes", "2", "--max-new-tokens", "20", "--dtype", "float32", "--num-assistant-tokens", "6"]
    then = tmp_path / "code.jsonl"
    then.write_text(prompts.read_text(encoding="utf-8").replace("the", "in a"), encoding="utf-8")
    given += ["--then", str(then), "--every", "2", "--learning-rate", "0.01"]
    monkeypatch.setattr(sys, "argv", ["systems", *given])
    calls, measure = [], systems.measure

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(systems, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        systems.main(systems.parse())
    assert len(json.loads(output.read_text(encoding="utf-8"))["turns"]) == 11
    systems.main(systems.parse())
    result = json.loads(output.read_text(encoding="utf-8"))
    (figures,) = result["summary"].values()
    turns = [(turn["way"], turn["batch"]) for turn in result["turns"]]
    assert len(set(turns)) == len(turns) == 2 * (len(figures) + 1) and len(calls) == len(turns) + 1
    assert {systems.SECOND, systems.OTHERS, systems.ADAPTED, systems.FROZEN, systems.HIERARCHY} <= set(figures)
    assert all(of_way["identical"] == "4/4" and of_way["tokens_per_pass"] >= 1 for of_way in figures.values())
    second, others = (figures[name]["tokens_per_pass"] for name in (systems.SECOND, systems.OTHERS))
    assert second > 3 and second > others
    middle = [figures[name]["middle_passes_per_accepted"] for name in (systems.HIERARCHY, systems.MIDDLE)]
    assert all(each > 0 for each in middle)
    assert "command" in result and "date" in result
    assistant_alone, by_one = (figures[name] for name in (systems.MIDDLE, "LayerParallel, groups of 1"))
    assert by_one["as_the_assistant"] and by_one["acceptance"] == assistant_alone["acceptance"]
    assert figures["LayerParallel, groups of 4"]["acceptance"] <= 1
    # and the drafter that learns, beside the frozen one
    (switch,), (curves,) = result["switch_summary"].values(), result["switches"].values()
    assert switch["learning"]["steps"] >= 2 and switch["frozen"]["steps"] == 0
    assert all(of_way["identical"] == "8/8" for of_way in switch.values())
    assert [turn["batch"] for turn in curves if turn["way"] == "learning"] == [0, 1, 2, 3]
    before = json.dumps(curves)
    systems.main(systems.parse())  # there is nothing left to do
    again = json.loads(output.read_text(encoding="utf-8"))
    assert json.dumps(*again["switches"].values()) == before and again["turns"] == result["turns"]
    plots.main([output])
    assert output.with_suffix(".png").stat().st_size > 1000


def test_it_ends_in_time(monkeypatch):
    seconds = iter([0.0, 30.0, 61.0, 61.0, 200.0])
    monkeypatch.setattr(systems.time, "perf_counter", lambda: next(seconds))
    clock = systems.Clock(2, places=2)
    assert clock.is_within(0, 0.6) and not clock.is_within(0, 1.0)
    assert clock.is_within(1, 0.2) and not clock.is_within(1, 1.0)
    monkeypatch.undo()
    assert systems.Clock(None, 1).is_within(0, 0.0)
