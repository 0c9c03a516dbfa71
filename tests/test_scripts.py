"""The benchmark, the plots, and the one command from prompts to a drafter, on a tiny target."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hybrids import INSTALLED, hybrid
from tape import use_tapes
from test_callers import tiny_tokenizer
from tiny import PRESETS, llama, ragged_batch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks import (
    ablations,
    before_after,
    cost_model,
    edit_prompts,
    half_precision,
    hybrid_cost,
    kinds,
    loop_overhead,
    packed_widths,
    rivals,
    variants,
    verifying_pass,
)
from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.scripts import benchmark, distill, evaluate_drafter, model_card, plots, reproduce, train
from specformer.scripts.parts import contenders, peak_memory
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.recipes import read_recipe
from specformer.scripts.parts.stored_states import map_file

TEXTS = ["the other note", "and in the end", "is it?", "one, two", "a hen on the hill", "so it is", "in there", "there"]
CONVERSATION = [{"role": "assistant", "content": "the cat"}, {"role": "user", "content": "and now?"}]

VERSIONS = dict(torch="2.0", transformers="5.0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A target with a tokenizer, and prompts."""
    target = llama(torch.float32)
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    config = SpecFormerConfig.from_target_config(target.config, target_name_or_path="some/target")
    SpecFormerModel(config).save_pretrained(tmp_path / "drafter")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return tmp_path


def run(module, monkeypatch, *arguments) -> int | None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main(module.parse())


BENCHMARK = ["--batch-sizes", 1, 5, "--max-new-tokens", 16, "--num-assistant-tokens", 4, "auto", "--repeats", 2]


def test_benchmark(folder: Path, monkeypatch):
    output = folder / "results" / "benchmark.json"
    arguments = ["--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--drafter", folder / "drafter"]
    options = [*BENCHMARK, "--tree-sizes", 6, "--decoding", "greedy", "sampling", "--dtype", "float64"]
    run(benchmark, monkeypatch, *arguments, *options, "--output", output)
    result = json.loads(output.read_text())
    assert result["finished"]
    contests = result["contests"]
    plots.main([output])
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert [(contest["decoding"], contest["batch_size"]) for contest in contests] == [
        ("greedy", 1),
        ("greedy", 5),
        ("sampling", 1),
        ("sampling", 5),
    ]
    for contest in contests:
        table = contest["contenders"]
        assert contest["turns"] == 2 and contest["best_plain"] == "plain generate"
        assert contest["texts"] == 2 * contest["batch_size"]
        assert table["plain generate"]["ratio_to_plain"]["median"] == 1
        sampled_elsewhere = {"transformers' prompt lookup"} if contest["decoding"] == "sampling" else set()
        for name in set(table) - sampled_elsewhere:
            assert table[name]["identical"] == contest["texts"], name
        assert ("transformers' prompt lookup" in table) == (contest["batch_size"] == 1)
        assert table["always wrong, k = 4"]["tokens_per_pass"] == 1
        assert table["always right, k = 4"]["tokens_per_pass"] == 5  # 15 tokens behind the prompt's, k + 1 a pass
        assert table["always right, k = 4"]["rounds_per_length"] == {"4": 2 * 3}
        assert 1 <= table["default, auto"]["tokens_per_pass"] < 5
        assert 1 < max(map(int, table["default, tree of 6"]["rounds_per_length"])) <= 4  # how deep they are
        for figures in table.values():
            ratio = figures["ratio_to_plain"]
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
            assert figures["first_call_seconds"] > 0
            assert figures["first_call_gib"] is None or figures["first_call_gib"] >= 0
            assert sum(figures.get("share_of_time", {"other": 1}).values()) == pytest.approx(1)


@pytest.mark.one_version
def test_benchmark_in_half_precision_without_a_drafter(folder: Path, monkeypatch):
    """Copies, an assistant, and a drafter that knows what its own calls write, which plain generate() does not."""
    output, most = folder / "benchmark.json", contenders.MOST_COPIED
    arguments = ["--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--drafter", "none"]
    options = ["--assistant", folder / "target", "--dtype", "bfloat16", "--num-assistant-tokens", 4]
    run(benchmark, monkeypatch, *arguments, *options, *BENCHMARK[:5], "--repeats", 1, "--output", output)
    for contest in json.loads(output.read_text())["contests"]:
        table = contest["contenders"]
        assert not any("default" in name for name in table)
        assert {"copies, auto", "prompt lookup", "assistant, auto", "always wrong, k = 4"} <= set(table)
        assert ("transformers' assisted decoding" in table) == (contest["batch_size"] == 1)
        assert table["always right, k = 4"]["tokens_per_pass"] == 5
        assert max(map(int, table["copies, auto"]["rounds_per_length"])) <= most


@pytest.mark.one_version
def test_a_stopped_benchmark_keeps_what_it_measured_and_goes_on(folder: Path, monkeypatch, capsys):
    output = folder / "benchmark.json"
    arguments = ["--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--drafter", folder / "drafter"]
    arguments += [*BENCHMARK, "--dtype", "float64", "--contenders", "always", "--output", output]
    calls, timed = [], benchmark.timed

    def stopping(*of):
        calls.append(of)
        if len(calls) == 28:  # in the third turn of the second batch; 5 contenders
            raise KeyboardInterrupt
        return timed(*of)

    monkeypatch.setattr(benchmark, "timed", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(benchmark, monkeypatch, *arguments)
    stopped = json.loads(output.read_text())
    assert not stopped["finished"] and [contest["turns"] for contest in stopped["contests"]] == [2, 1]
    run(benchmark, monkeypatch, *arguments)
    result = json.loads(output.read_text())
    assert result["finished"] and [contest["turns"] for contest in result["contests"]] == [2, 2]
    assert result["contests"][0] == stopped["contests"][0]
    assert "Going on with" in capsys.readouterr().out
    run(benchmark, monkeypatch, *arguments)  # what is finished is measured again
    assert json.loads(output.read_text())["contests"][0] != stopped["contests"][0]


def test_evaluation_and_benchmark_write_prompts_as_distill_does(folder: Path, monkeypatch):
    """Conversations, and arguments of the template."""
    asked, answered = ({"role": role, "content": "is it?"} for role in ("user", "assistant"))
    rows = [{"prompt": "is it?"}, {"messages": [asked, answered, asked, answered]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if not enable_thinking %}the{% endif %}"
    tokenizer.save_pretrained(folder / "target")
    arguments = ["--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--max-new-tokens", 4]
    thinking = ["--chat-template-kwargs", '{"enable_thinking": true}']
    run(distill, monkeypatch, *arguments, *thinking, "--output", folder / "answers")
    answers = (folder / "answers" / "answers-00000.jsonl").read_text(encoding="utf-8").splitlines()
    expected = sorted(json.loads(line)["prompt_ids"] for line in answers)
    read, generate = [], LlamaForCausalLM.generate

    def spied(self, input_ids, attention_mask, **options):
        read.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        return generate(self, input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", spied)
    arguments += ["--drafter", folder / "drafter", "--output", folder / "result.json"]
    few = ["--batch-sizes", 2, "--repeats", 1, "--contenders", "always right, k", "--num-assistant-tokens", 2]
    for module, options in ((evaluate_drafter, []), (benchmark, few)):
        read.clear()
        run(module, monkeypatch, *arguments, *options, *thinking)
        assert {tuple(ids) for ids in read} == set(map(tuple, expected))
        regime = json.loads((folder / "result.json").read_text(encoding="utf-8"))["regime"]
        assert regime["chat_template_kwargs"] == {"enable_thinking": True}
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
        with pytest.raises(ValueError, match="does not read thinking"):
            run(module, monkeypatch, *arguments, *options, "--chat-template-kwargs", '{"thinking": true}')
        monkeypatch.undo()
        monkeypatch.setattr(LlamaForCausalLM, "generate", spied)


@pytest.mark.one_version
def test_batches_of_the_turns():
    tokenizer = tiny_tokenizer()
    batches = benchmark.make_batches(tokenizer, TEXTS, 3, 2, 37, "cpu")
    assert all(batch["input_ids"].shape == (3, 37) and batch["attention_mask"].all() for batch in batches)
    assert len({tuple(row) for batch in batches for row in batch["input_ids"].tolist()}) == 6
    for batch_size, turns in ((2, 4), (1, 8), (8, 1)):  # as many as there are prompts: each of them once
        batches = benchmark.make_batches(tokenizer, TEXTS, batch_size, turns, None, "cpu")
        texts = [ids[mask.bool()] for batch in batches for ids, mask in zip(*batch.values(), strict=True)]
        assert len({tuple(ids.tolist()) for ids in texts}) == len(texts) == len(TEXTS)
    (batch,) = benchmark.make_batches(tokenizer, ["is it?", CONVERSATION], 1, 1, 37, "cpu")
    assert tokenizer.decode(batch["input_ids"][0]).startswith("is it?the cat\n\nand now?is it?")
    for batch in benchmark.make_batches(tokenizer, TEXTS, 9, 2, None, "cpu", same=True):
        assert batch["input_ids"].shape[0] == batch["attention_mask"].shape[0] == 9 and batch["attention_mask"].all()
        assert (batch["input_ids"] == batch["input_ids"][0]).all()
    with pytest.raises(ValueError, match="a batch of 9 was asked for, and there are 8 prompts"):
        benchmark.make_batches(tokenizer, TEXTS, 9, 2, None, "cpu")


@pytest.mark.one_version
@pytest.mark.skipif(not peak_memory.FORGET.exists(), reason="reads the peak where Linux keeps it")
def test_peak_memory_of_a_call():
    kept, peak = torch.ones(2**24), peak_memory.PeakMemory(torch.device("cpu"))
    before = peak.gib()
    (torch.ones(2**25) + kept.sum()).sum()  # twice 128 MiB for a moment
    assert 0.2 < peak.gib() - before < 0.5
    assert peak_memory.PeakMemory(torch.device("cpu")).gib() < 0.1


@pytest.mark.one_version
def test_peak_memory_where_it_cannot_be_told(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(peak_memory, "FORGET", tmp_path / "nowhere" / "clear_refs")
    assert peak_memory.PeakMemory(torch.device("cpu")).gib() is None


@pytest.mark.parametrize("name", ["static", "continuous"])
def test_plain_ways_of_a_gpu_write_the_same_text(name: str):
    """Batching without end tokens, so that all rows are as long."""
    target, batch = llama(torch.float32), ragged_batch()
    settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
    expected = target.generate(**batch, **settings)
    way = (
        contenders.continuous_way(target)
        if name == "continuous"
        else contenders.plain_way(target, cache_implementation="static")
    )
    sequences, _ = way.call(**batch, **settings)
    assert sequences.tolist() == expected.tolist()


@pytest.mark.one_version
@pytest.mark.parametrize("preset", PRESETS)
def test_rounds_of_every_network_are_timed(preset: str):
    target = llama()
    drafter = SpecFormerModel(PRESETS[preset](target.config)).to(target.dtype)
    times = cost_model.time_round(target, drafter, batch_size=2, k=3, context=20, repeats=1)
    assert min(times["verify_seconds"], times["draft_seconds"]) > 0


@pytest.mark.one_version
def test_loop_overhead(folder: Path, monkeypatch):
    output = folder / "results" / "loop.json"
    arguments = ["--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--drafter", folder / "drafter"]
    arguments += ["--batch-sizes", 1, 3, "--repeats", 2, "--max-new-tokens", 24, "--prompt-tokens", 8]
    run(loop_overhead, monkeypatch, *arguments, "--dtype", "float64", "--output", output)
    rounds = json.loads(output.read_text())["rounds"]
    assert [(row["batch_size"], row["decoding"]) for row in rounds] == [
        (1, "greedy"),
        (1, "sampling"),
        (3, "greedy"),
        (3, "sampling"),
    ]
    for row in rounds:
        assert row["rounds"] >= 2 * 2  # of at most five tokens each
        seconds = [row[f"{part}_seconds"] for part in ("round", "verify", "draft", "plain")]
        assert min(seconds) > 0
        assert row["outside_of_round"] == pytest.approx(1 - (seconds[1] + seconds[2]) / seconds[0])
        assert row["outside_of_plain"] == pytest.approx((seconds[0] - seconds[1] - seconds[2]) / seconds[3])


@pytest.mark.one_version
def test_recorded_rounds_are_timed(monkeypatch):
    tapes, target = use_tapes(monkeypatch), llama()
    drafter = SpecFormerModel(PRESETS["all of it"](target.config)).to(target.dtype)
    times = cost_model.time_round(target, drafter, batch_size=2, k=3, context=20, repeats=3, cuda_graphs=True)
    assert min(times.values()) > 0
    assert tapes.replayed > 6


@pytest.mark.one_version
def test_cost_model(folder: Path, monkeypatch):
    output = folder / "results" / "cost.json"
    options = ["--batch-sizes", 1, 3, "--num-assistant-tokens", 1, 4, "--context", 40, "--repeats", 2]
    run(cost_model, monkeypatch, "--shape", folder / "target", "--dtype", "float32", *options, "--output", output)
    result = json.loads(output.read_text())
    assert [(row["batch_size"], row["num_assistant_tokens"]) for row in result["rounds"]] == [
        (1, 1),
        (1, 4),
        (3, 1),
        (3, 4),
    ]
    for row in result["rounds"]:
        seconds = [row[name] for name in ("plain_seconds", "verify_seconds", "draft_seconds")]
        assert min(seconds) > 0
        cost = (seconds[1] + seconds[2]) / seconds[0]
        assert row["break_even_tokens_per_pass"] == pytest.approx(cost)
        k = row["num_assistant_tokens"]
        assert row["speed_up"]["0.5"] == pytest.approx((2 - 0.5**k) / cost)
    assert {"Qwen3-8B", "Llama-3.1-8B"} <= set(cost_model.SHAPES)
    for name, shape in cost_model.SHAPES.items():
        with torch.device("meta"):
            target = AutoModelForCausalLM.from_config(shape())
        assert target.num_parameters() == pytest.approx(1e9 * float(name.split("-")[-1].rstrip("B")), rel=0.03)


@pytest.mark.one_version
def test_hybrid_cost(tmp_path: Path, monkeypatch):
    output, names = tmp_path / "hybrid.json", ("tiny LFM2", "tiny Qwen3.5")
    sizes = ["--batch-sizes", 2, "--drafted", 2, "--context", 8, "--repeats", 1, "--dtype", "float32"]
    run(hybrid_cost, monkeypatch, "--targets", *names, *sizes, "--output", output)
    rounds = json.loads(output.read_text())["rounds"]
    assert [(each["target"], each["drafted"]) for each in rounds] == [(name, k) for name in names for k in (0, 2)]
    for each in rounds:
        assert 0 < each["share_of_states"] < each["share_of_mixers"] < 1
        assert each["break_even_tokens_per_pass"] == each["round_seconds"] / each["plain_step_seconds"] > 0
    assert len(hybrid_cost.table(rounds)) == 2 + 2
    for name, parameters in (("LFM2-350M", 354_483_968), ("Qwen3.5-0.8B", 752_393_024)):  # of the latter's text alone
        assert hybrid_cost.make_target(name, torch.float32, torch.device("meta")).num_parameters() == parameters


def test_rounds_of_hybrid_cost_take_turns(monkeypatch):
    """Each has as many drafts as it says, with products shared or not, and the text is plain generate()'s."""
    target = hybrid_cost.make_target("tiny Qwen3.5", torch.float64, torch.device("cpu"))
    turns, drafted, shared = hybrid_cost.Turns([0, 1, 3], 512, Counter()), [], set()
    product = hybrid_cost.SharedProducts.__torch_function__

    def seen(*args):
        shared.add(turns.turn)
        return product(*args)

    monkeypatch.setattr(hybrid_cost.SharedProducts, "__torch_function__", seen)
    monkeypatch.setattr(hybrid_cost.SharedProducts, "__torch_function__", hybrid_cost.products_of(turns))
    batch = dict(input_ids=torch.randint(512, (2, 6)), attention_mask=torch.ones(2, 6, dtype=torch.long))
    arguments = dict(max_new_tokens=24, num_assistant_tokens=3)
    text = generate(target, turns, **batch, **arguments, on_round=lambda told: drafted.append(told.rows[0].drafted))
    assert text.tolist() == target.generate(**batch, max_new_tokens=24).tolist()
    assert [*map(len, drafted[:8])] == [0, 0, 1, 3, 1, 3, 0, 1]  # the prompt, then turns
    assert set(turns.rounds) == {(0, True), (1, True), (3, True), (1, False), (3, False)}
    assert shared - {None} == {(1, True), (3, True)}


@pytest.mark.one_version
def test_verifying_pass(folder: Path, monkeypatch):
    output = folder / "verifying.json"
    arguments = ["--target", folder / "target", "--batch-sizes", 1, 3, "--most", 2, "--context", 8, "--turns", 1]
    run(verifying_pass, monkeypatch, *arguments, "--dtype", "bfloat16", "--output", output)
    for _ in range(2):  # the second takes the place of the first
        run(verifying_pass, monkeypatch, *arguments, "--output", output)
    result = json.loads(output.read_text())
    places = [(each["dtype"], each["batch_size"], each["tokens"]) for each in result["passes"]]
    assert places == [(kind, size, n) for kind in ("bfloat16", "float32") for size in (1, 3) for n in (1, 2)]
    ways = {verifying_pass.TORCH, *verifying_pass.WAYS}
    assert all(each[way] > 0 for each in result["passes"][4:] for way in ways)
    assert set(result["taken_here"]) == {"float32", "bfloat16"} and set(result["taken_here"].values()) <= ways
    assert len(verifying_pass.table(result["passes"])) == 2 + 2 * 2 + 2 * 4
    with pytest.raises(ValueError, match=r"'turns': 1}, and .*'turns': 2} was asked for"):
        run(verifying_pass, monkeypatch, *arguments, "--turns", 2, "--output", output)


@pytest.mark.one_version
def test_before_after(folder: Path, monkeypatch):
    """This version compared with itself: it goes on where it was stopped, and writes the same texts."""
    output, root = folder / "before_after.json", Path(train.__file__).resolve().parents[1]
    monkeypatch.setattr(before_after, "commit_of", lambda checkout: "a1b2c3d")
    arguments = ["--before", root, "--prompts", folder / "prompts.jsonl", "--target", folder / "target"]
    arguments += ["--drafter", folder / "drafter", "--max-new-tokens", 11, "--turns", 2, "--output", output]
    run(before_after, monkeypatch, *arguments, "--batch-sizes", 1)
    first = json.loads(output.read_text())["turns"]
    run(before_after, monkeypatch, *arguments, "--batch-sizes", 1, 2)
    result = json.loads(output.read_text())
    assert result["turns"][:2] == first
    assert [(turn["batch_size"], turn["turn"]) for turn in result["turns"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for turn in result["turns"]:
        answers = [turn["answers"][way][side] for way in before_after.WAYS for side in before_after.SIDES]
        assert len({answer["text"] for answer in answers}) == 1 and min(answer["seconds"] for answer in answers) > 0
        assert turn["answers"]["always right, k = 4"]["after"]["tokens_per_pass"] == 5
    assert [line.split(" | ")[6] for line in before_after.table(result)[2:]] == ["6 of 6", "6 of 6"]
    with pytest.raises(ValueError, match=r"'max_new_tokens': 11.*'max_new_tokens': 12.* was asked for"):
        run(before_after, monkeypatch, *arguments, "--max-new-tokens", 12)


@pytest.mark.one_version
def test_rivals(folder: Path, monkeypatch):
    """Without the others: transformers' and this package's, which write the same; what is there is kept."""
    output = folder / "rivals.json"
    alone = {"transformers, prompt lookup", "transformers, assistant"}
    arguments = ["--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--drafter", folder / "drafter"]
    arguments += ["--assistant", folder / "target", "--dtype", "float32", "--turns", 1, "--output", output]
    run(rivals, monkeypatch, *arguments, "--max-new-tokens", 9, "--batch-sizes", 1)
    first = json.loads(output.read_text())["turns"]
    run(rivals, monkeypatch, *arguments, "--max-new-tokens", 9, "--batch-sizes", 1, 2)
    result = json.loads(output.read_text())
    assert result["turns"][:1] == first and [turn["batch_size"] for turn in result["turns"]] == [1, 2]
    assert result["environments"]["specformer"]["torch"] == torch.__version__
    for turn in result["turns"]:
        (ways,) = turn["figures"].values()
        assert alone & set(ways) == (alone if turn["batch_size"] == 1 else set())
        assert all(answer["identical"] == turn["batch_size"] and answer["seconds"] > 0 for answer in ways.values())
    drafters = ["specformer, drafter", "specformer, drafter, chains"]
    columns = [
        "specformer, assistant",
        "specformer, copies, auto",
        *drafters,
        "specformer, prompt lookup",
        *sorted(alone),
    ]
    title, _, one, two = rivals.table(result)
    assert title == f"| target | prompts | batch | {' | '.join(columns)} |"
    assert one.startswith("| target, float32 | prompts | 1 |") and two.endswith(" |  |")
    with pytest.raises(ValueError, match=r"'max_new_tokens': 9.*'max_new_tokens': 8.* was asked for"):
        run(rivals, monkeypatch, *arguments, "--max-new-tokens", 8)


@pytest.mark.one_version
def test_prompts_to_edit_code(tmp_path: Path, monkeypatch):
    run(edit_prompts, monkeypatch, "--output", tmp_path / "edit.jsonl")
    prompts = read_prompts(tmp_path / "edit.jsonl")
    assert len(prompts) >= 16 and len(set(prompts)) == len(prompts)
    assert all(prompt.startswith("Rename `") and prompt.endswith("```") for prompt in prompts)


@pytest.mark.one_version
def test_widths_of_rows(folder: Path, monkeypatch):
    positions = [
        packed_widths.Position(3, 3, [0.99, 0.99, 0.9, 0.5]),
        packed_widths.Position(0, 0, [0.9, 0.9, 0.9, 0.9]),  # nothing drafted, whatever is said
        packed_widths.Position(2, 0, [0.1, 0.1, 0.1, 0.1]),
    ]
    assert packed_widths.own_widths(positions)[:2] == [3, 0]
    monkeypatch.setattr(packed_widths, "milliseconds", lambda tokens: 1.0)  # a pass costs the same whatever it carries
    assert packed_widths.own_widths(positions) == [3, 0, 2]
    assert packed_widths.same_width(positions) == [3] * 3
    monkeypatch.setattr(packed_widths, "milliseconds", lambda tokens: float(tokens))  # and here each token does
    assert packed_widths.own_widths(positions) == packed_widths.same_width(positions) == [0] * 3
    text = [packed_widths.Position(3, 3, [0.9] * 3)] * packed_widths.NEW_TOKENS
    passes = -(-(packed_widths.NEW_TOKENS - 1) // 4)
    assert packed_widths.seconds([text], lambda here: [3], is_padded=True) == pytest.approx(passes * 4 / 1000)
    assert packed_widths.seconds([text, text], lambda here: [3, 0][-len(here) :], is_padded=False) == pytest.approx(
        (passes * 5 + (packed_widths.NEW_TOKENS - 1 - passes)) / 1000
    )


@pytest.mark.one_version
def test_half_precision(folder: Path, monkeypatch):
    """In double precision every way writes the same; a way that does not is counted."""
    output = folder / "half.json"
    arguments = ["--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--drafter", folder / "drafter"]
    arguments += ["--batch-size", 3, "--max-new-tokens", 8, "--dtype", "float64", "--output", output]
    run(half_precision, monkeypatch, *arguments)
    result = json.loads(output.read_text())
    (equal,) = result["equal"].values()
    assert len(equal) == 5 and set(equal.values()) == {len(TEXTS)}
    assert result["regime"]["prompts"] == len(TEXTS)
    monkeypatch.setattr(half_precision, "generate", lambda target, drafter, **given: target.generate(**given)[:, :-1])
    run(half_precision, monkeypatch, *arguments)
    (equal,) = json.loads(output.read_text())["equal"].values()
    assert [equal[name] == len(TEXTS) for name in equal] == [True, True, False, False, False]


WITH_STATES = [("specformer", name) for name in ("Lfm2ForCausalLM", "Qwen3_5ForCausalLM") if name in INSTALLED]


@pytest.mark.parametrize(
    ("kind", "other_target"), [("specformer", None), ("dflash", None), ("pard", None), *WITH_STATES]
)
def test_figures_from_answers_are_those_of_decoding(kind: str, other_target: str | None, folder: Path, monkeypatch):
    """All together and task by task, for every draft length. The drafter learnt the answers, so that it is often
    right; also that of a target that keeps states."""
    if other_target is not None:
        copy.deepcopy(hybrid(other_target)[0]).float().save_pretrained(folder / "target")
    tasks = ["short" if len(text) < 10 else "long" for text in TEXTS]
    lines = [json.dumps({"prompt": text, "task": task}) + "\n" for text, task in zip(TEXTS, tasks, strict=True)]
    (folder / "prompts.jsonl").write_text("".join(lines))
    prompts = ("--prompts", folder / "prompts.jsonl", "--target", folder / "target")
    run(distill, monkeypatch, *prompts, "--max-new-tokens", 16, "--dtype", "float32", "--output", folder / "answers")
    settings = ("--epochs", 60, "--num-draft-tokens", 3, "--learning-rate", 3e-3, "--save-dtype", "float32")
    settings += ("--drafter", kind)
    data = ("--data", folder / "answers", "--target", folder / "target")
    run(train, monkeypatch, *data, *settings, "--evaluations", 1, "--output", folder / "trained")
    evaluated = (*prompts, "--drafter", folder / "trained", "--output", folder / "result.json")
    run(evaluate_drafter, monkeypatch, *evaluated, "--answers", folder / "answers", "--num-assistant-tokens", 3)
    offline = json.loads((folder / "result.json").read_text())
    assert {task: figures["answers"] for task, figures in offline["tasks"].items()} == Counter(tasks)
    for k in (1, 2, 3):
        options = ("--no-copies", "--num-assistant-tokens", k, "--max-new-tokens", 16, "--batch-size", 3)
        run(evaluate_drafter, monkeypatch, *evaluated, *options)
        decoded = json.loads((folder / "result.json").read_text())
        assert decoded["identical"] == len(TEXTS)
        assert decoded["tokens_per_pass"] == offline["all"][f"tokens_per_pass_k{k}"] > 1.2
        for task, figures in offline["tasks"].items():
            assert decoded["tasks"][task]["tokens_per_pass"] == figures[f"tokens_per_pass_k{k}"]
        measures = decoded["measures"]
        assert measures["kappa"] == decoded["tokens_per_pass"]
        assert measures["acceptance_per_slot"] == decoded["acceptance_per_slot"]
        assert ("r1" in measures) is (kind == "specformer")  # by parameters, which are counted of it alone
        assert kind != "specformer" or 0 < measures["r1"] < measures["kappa"]
        seconds = decoded["seconds"]
        assert measures["theta"] == pytest.approx(measures["kappa"] * seconds["drafting"] / seconds["plain"])


def test_answers_to_other_prompts_are_refused(folder: Path, monkeypatch):
    (folder / "answers.jsonl").write_text('{"id": 8, "prompt_ids": [3], "response_ids": [4, 5]}\n')
    evaluated = ("--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--drafter", folder / "drafter")
    with pytest.raises(ValueError, match=r"answers prompts \[8\], and the prompts .* are 0 to 7"):
        run(evaluate_drafter, monkeypatch, *evaluated, "--answers", folder / "answers.jsonl")
    with pytest.raises(ValueError, match="--answers and --prompt-lookup were both given"):
        options = ("--prompt-lookup", 2, "--answers", folder / "answers.jsonl")
        run(evaluate_drafter, monkeypatch, *evaluated[:4], *options)


@pytest.mark.one_version
@pytest.mark.parametrize("anchor_slot", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("rank", [None, 8])
def test_parameters_at_work(rank: int | None, layers: int, anchor_slot: bool):
    target = llama(torch.float32)
    fields = dict(num_draft_tokens=3, anchor_slot=anchor_slot, previous_token_rank=rank, num_candidates=5)
    fields.update(num_draft_layers=layers, confidence_head=layers > 1)
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, **fields))
    figures = evaluate_drafter.parameters_at_work(drafter, target)
    size = target.config.hidden_size
    read_only = 64 * size  # the target's embeddings; its head is a matrix of its own
    assert figures["target_parameters"] == target.num_parameters() - read_only
    times = {"draft_attention": 3 + anchor_slot, "draft_mlp": 3 + (anchor_slot and layers > 1), "final_norm": 3}
    times.update(previous_token_correction=3, confidence_head=3)
    times.update({"more_draft_layers.0": 3 + anchor_slot, "more_draft_layers.1.attention": 3 + anchor_slot})
    times["more_draft_layers.1.mlp"] = 3
    expected = 3 * 64 * size + (0 if rank is None else 3 * 5 * size)
    for name, weight in drafter.named_parameters():
        expected += weight.numel() * next((often for part, often in times.items() if name.startswith(part)), 1)
    assert figures["shared_parameters"] == expected


@pytest.fixture
def trained(folder: Path) -> Path:
    """What training leaves of a drafter that its model card tells about."""
    settings = dict(epochs=3, batch_size=8, accumulation=1, processes=2)
    machine = dict(device="CPU", cpu="an example", torch_threads=1)
    log = dict(
        settings=settings, machine=machine, versions=dict(torch="2.0", transformers="5.0"), command="python -m a"
    )
    log.update(parameters=7_100_000, answers=1_500, answer_tokens=234_567, held_out_answers=20, steps=99, minutes=12.3)
    (folder / "drafter" / "training.json").write_text(json.dumps({**log, "best": {"tokens_per_pass": 1.5}}))
    return folder / "drafter"


@pytest.mark.one_version
def test_model_card(trained: Path, monkeypatch):
    decoded, offline, sources = (trained.parent / name for name in ("decoded.json", "offline.json", "sources.md"))
    common = dict(
        machine=dict(device="GPU", cpu="x"), versions=dict(torch="2.1", transformers="5.1"), command="python -m b"
    )
    regime = dict(dtype="float32", decoding="greedy", max_new_tokens=64, batch_size=8, num_assistant_tokens=4)
    regime["drafter"] = "SpecFormer with copies"
    common["regime"] = regime
    tasks = {"poems": dict(prompts=3, tokens_per_pass=1.25), "sums": dict(prompts=5, tokens_per_pass=1.75)}
    decoded.write_text(
        json.dumps(dict(common, regime=regime, tasks=tasks, prompts=8, tokens_per_pass=1.5, identical=8))
    )
    figures = dict(answers=4, tokens_per_pass_k1=1.2, tokens_per_pass_k2=1.31)
    everything = dict(common, answer_tokens=4321, tasks={"poems": figures}, all=figures)
    offline.write_text(json.dumps(everything))
    sources.write_text("Prompts of a friend, CC0.")
    run(model_card, monkeypatch, trained, decoded, offline, "--license", "mit", "--sources", sources)
    card = ModelCard.load(trained / "README.md")
    assert card.data.library_name == "transformers"
    assert (card.data.license, card.data.base_model_relation) == ("mit", "adapter")
    assert set(card.data.tags) == {"custom_generate", "speculative-decoding", "specformer"}
    assert "| poems | 3 | 1.25 |" in card.text and "| all | 8 | 1.50 |" in card.text
    assert "| task | prompts | k = 1 | k = 2 |" in card.text and "| all | 4 | 1.20 | 1.31 |" in card.text
    assert "1,500 answers of the target itself (234,567 tokens" in card.text
    assert "Prompts of a friend, CC0." in card.text and "python -m a" in card.text
    run(model_card, monkeypatch, trained)  # its own card is written again
    assert "Not measured yet" in (trained / "README.md").read_text()
    (trained / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="left alone"):
        run(model_card, monkeypatch, trained)
    assert (trained / "README.md").read_text() == "mine"


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.one_version
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
    with pytest.raises(ValueError, match=r"other\.json is no training log"):
        plots.main([other])


@pytest.mark.one_version
def test_every_variant_is_another_drafter_or_training(folder: Path, monkeypatch):
    target_config, found = llama().config, []
    for name, options in variants.variants(target_config, folder / "other.jsonl").items():
        common = ["--data", folder, "--output", folder / "run", "--target", folder / "target"]
        budget = ["--num-draft-tokens", 3, "--draft-vocab-size", 40, "--slot-decay", 0.8]
        monkeypatch.setattr(sys, "argv", list(map(str, ["train", *common, *budget, *options])))
        arguments = train.parse()
        config = train.make_config(arguments)
        train.make_loss(arguments, config)
        losses = (arguments.acceptance_weights, arguments.distance_loss, arguments.base_loss, arguments.data)
        found.append((name, config.to_json_string(), losses))
    for place, (name, *what) in enumerate(found):
        same = {other for other, *rest in found[:place] if rest == what}
        assert not same, f"{name} is {same}"


@pytest.mark.one_version
def test_times_of_variants_do_not_depend_on_the_machines_pace():
    """The third was timed while the machine took twice as long for everything."""
    times = dict(batch_size=8, plain_seconds=1.0, verify_seconds=2.0)
    every = {name: [{"rounds": [times | {"draft_seconds": draft}]}] for name, draft in {"a": 0.1, "b": 0.3}.items()}
    every["c"] = [{"rounds": [dict(batch_size=8, plain_seconds=2.0, verify_seconds=4.0, draft_seconds=0.2)]}]
    found = ablations.at_one_pace(every)
    assert found == {"a": [(0.1, 2.0, 1.0)], "b": [(0.3, 2.0, 1.0)], "c": [(0.1, 2.0, 1.0)]}


@pytest.mark.slow
def test_ablations(folder: Path, monkeypatch):
    """On the target's answers and on other text, evaluated on held-out answers and on others; nothing is run twice."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prompts = ("--prompts", folder / "prompts.jsonl", "--target", folder / "target")
    run(distill, monkeypatch, *prompts, "--max-new-tokens", 16, "--output", folder / "answers")
    (folder / "other.jsonl").write_text('{"prompt_ids": [3, 4], "response_ids": [5, 6, 7, 8]}\n' * 4)
    arguments = ["--data", folder / "answers", "--target", folder / "target", "--output", folder / "runs"]
    arguments += ["--result", folder / "result.json", "--seeds", 0, "--other-data", folder / "other.jsonl"]
    arguments += ["--context", 16, "--store-hidden-states"]
    budget = ("--", "--epochs", 2, "--num-draft-tokens", 3, "--draft-vocab-size", 40, "--evaluations", 2)
    run(ablations, monkeypatch, *arguments, *budget)
    result = json.loads((folder / "result.json").read_text())
    assert result["trial"] is True and result["evaluated_on"] == ["held-out answers"]
    assert list(result["variants"]) == list(variants.variants(llama().config, folder / "other.jsonl"))
    every = {name: runs[0] for name, runs in result["variants"].items()}
    for found in every.values():
        assert 1 <= found["offline"]["all"]["tokens_per_pass_k3"] <= 4
        assert [times["batch_size"] for times in found["rounds"]] == [1, 8, 32]
        assert all(times[f"{what}_seconds"] > 0 for times in found["rounds"] for what in ("plain", "verify", "draft"))
    weights = {name: found["parameters"] for name, found in every.items()}
    assert weights["no positional FFN"] < weights["paper"] == weights["causal draft attention"]
    assert weights["paper"] < weights["twice as wide"] and weights["default"] < weights["stacked"]
    assert every["other text than the target's"]["tokens_seen"] == 24

    few = ["--variants", "paper", "default", "stacked", "--seeds", 0]
    answered = ["--answers", folder / "answers", "--prompts", folder / "prompts.jsonl", "--decode", 5]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", None)  # they are trained
        run(ablations, patch, *arguments, *few, *answered, *budget)
    result = json.loads((folder / "result.json").read_text())
    assert list(result["variants"]) == few[1:4] and result["evaluated_on"] == ["answers"]
    for (found,) in result["variants"].values():
        assert found["offline"]["all"]["answers"] == found["offline"]["tasks"]["answers"]["answers"] == len(TEXTS)
        decoded = found["decoded"]
        assert decoded["prompts"] == decoded["identical"] == 5 and 1 < decoded["max_new_tokens"] <= 16
        assert decoded["tokens_per_pass"] == pytest.approx(decoded["computed"])
    shown = ablations.table(result).splitlines()
    assert len(shown) == 5 and len({line.count("|") for line in shown}) == 1
    with pytest.raises(ValueError, match=r"--variants.*wider.*expected some of 'paper'"):
        run(ablations, monkeypatch, *arguments, "--variants", "wider", *budget)
    with pytest.raises(ValueError, match=r"--prompts has 1 files and --answers 0 folders"):
        run(ablations, monkeypatch, *arguments, *answered[2:], *budget)


@pytest.mark.slow
def test_kinds_under_one_budget(folder: Path, monkeypatch):
    """Trained once, evaluated once, and decoded beside plain decoding; nothing is trained twice."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prompts = ("--prompts", folder / "prompts.jsonl", "--target", folder / "target")
    run(distill, monkeypatch, *prompts, "--max-new-tokens", 16, "--dtype", "float32", "--output", folder / "answers")
    arguments = ["--data", folder / "answers", "--answers", folder / "answers", *prompts, "--output", folder / "runs"]
    arguments += ["--result", folder / "result.json", "--time-at", 1, 3, "--repeats", 2, "--max-new-tokens", 12]
    arguments += ["--draft-vocab-size", 60, "--num-draft-tokens", 3, "--", "--epochs", 2, "--evaluations", 1]
    run(kinds, monkeypatch, *arguments)
    first = json.loads((folder / "result.json").read_text())
    assert first["trial"] is True and list(first["kinds"]) == list(kinds.OPTIONS)
    for kind, found in first["kinds"].items():
        assert 1 <= found["offline"]["all"]["tokens_per_pass_k3"] <= 4 and found["steps"] == 2
        assert (found["copied_from_target"] > 0) is (kind in ("dflash", "eagle3", "parallelspec"))
        for decoded in first["decoded"]:
            assert decoded["kinds"][kind]["identical_to_plain"] == decoded["texts"]
            assert decoded["kinds"][kind]["draft_seconds"] > 0 and decoded["kinds"][kind]["times_plain"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", None)  # they are trained
        run(kinds, patch, *arguments)
    again = json.loads((folder / "result.json").read_text())
    assert again["kinds"] == first["kinds"]
    shown = kinds.table(again).splitlines()
    assert len(shown) == 7 and len({line.count("|") for line in shown}) == 1


@pytest.mark.slow
def test_one_command_from_prompts_to_a_drafter(folder: Path, monkeypatch):
    """Cut into pieces on the way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe, few = read_recipe(reproduce.RECIPES / "default.yaml"), folder / "few.yaml"
    recipe["train"][0]["prompts"], recipe["train"][1]["prompts"] = [0, 5], [5, 8500]
    few.write_text(json.dumps(recipe), encoding="utf-8")  # which is YAML too
    output = folder / "run"
    arguments = [
        *("--prompts", folder / "prompts.jsonl", "--evaluate", folder / "prompts.jsonl", "--output", output),
        *("--target", folder / "target", "--target-id", "some/target", "--recipe", few),
    ]
    for attempt in range(40):  # a busy machine may need longer for one step
        status = run(reproduce, monkeypatch, *arguments, "--minutes", 0.25 + attempt / 20)
        if status != reproduce.OUT_OF_TIME:
            break
    assert status == 0
    drafter = SpecFormerModel.from_pretrained(output / "drafter")
    assert drafter.config.target_name_or_path == "some/target"
    for number, ids in enumerate((range(5), range(5, len(TEXTS))), 1):
        lines = (output / f"answers-{number}" / "answers-00000.jsonl").read_text().splitlines()
        assert {json.loads(line)["id"] for line in lines} == set(ids)
    assert json.loads((output / "drafter" / "training.json").read_text())["before"]["answers"] == 4
    for k in (4, 7):
        assert json.loads((output / f"prompts_k{k}.json").read_text())["identical"] == len(TEXTS)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert run(reproduce, monkeypatch, *arguments) == 0  # nothing is left to do
    recipe["train"][0]["prompts"], recipe["train"][1]["prompts"] = [0, 50], [50, 100]
    few.write_text(json.dumps(recipe), encoding="utf-8")
    steps = reproduce.commands(reproduce.parse())
    assert [step[0] for step in steps] == ["distill", "train", "evaluate_drafter", "evaluate_drafter"]
    assert steps[1][steps[1].index("--output") + 1] == str(output / "drafter")


# ---- a target that brings its own code


CONFIGURATION = """
from transformers import LlamaConfig

class OtherConfig(LlamaConfig):
    model_type = "other-llama"
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_other import OtherConfig

class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OtherTokenizer(PreTrainedTokenizerFast):
    pass
"""


def make_remote(target: Path) -> None:
    """Give a saved Llama classes of its own."""
    for name, code in {"configuration": CONFIGURATION, "modeling": MODELING, "tokenization": TOKENIZATION}.items():
        (target / f"{name}_other.py").write_text(code, encoding="utf-8")
    classes = {
        "config.json": {
            "model_type": "other-llama",
            "architectures": ["OtherForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_other.OtherConfig",
                "AutoModelForCausalLM": "modeling_other.OtherForCausalLM",
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OtherTokenizer",
            "auto_map": {"AutoTokenizer": [None, "tokenization_other.OtherTokenizer"]},
        },
    }
    for name, fields in classes.items():
        before = json.loads((target / name).read_text(encoding="utf-8"))
        (target / name).write_text(json.dumps({**before, **fields}), encoding="utf-8")


def test_targets_with_code_of_their_own(folder: Path, monkeypatch):
    make_remote(folder / "target")
    prompts = ("--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--trust-remote-code")
    run(distill, monkeypatch, *prompts, "--max-new-tokens", 8, "--output", folder / "answers")
    assert json.loads((folder / "answers" / "settings.json").read_text(encoding="utf-8"))["trust_remote_code"] is True
    training = ("--data", folder / "answers", "--target", folder / "target", "--trust-remote-code", "--epochs", 1)
    run(train, monkeypatch, *training, "--num-draft-tokens", 3, "--evaluations", 1, "--output", folder / "trained")
    evaluated = (*prompts, "--drafter", folder / "trained", "--max-new-tokens", 8, "--output", folder / "result.json")
    run(evaluate_drafter, monkeypatch, *evaluated)
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["identical"] == len(TEXTS)


def test_training_of_before_there_was_an_option_is_gone_on_with(folder: Path, monkeypatch):
    (folder / "answers.jsonl").write_text('{"prompt_ids": [3, 4], "response_ids": [5, 6, 7, 8]}\n' * 4)
    options = ("--data", folder / "answers.jsonl", "--target", folder / "target", "--output", folder / "trained")
    options += ("--epochs", 1, "--num-draft-tokens", 3, "--evaluations", 1)
    run(train, monkeypatch, *options)
    settings = json.loads((folder / "trained" / "settings.json").read_text(encoding="utf-8"))
    del settings["trust_remote_code"]
    (folder / "trained" / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    run(train, monkeypatch, *options)
    with pytest.raises(ValueError, match="trust_remote_code: None there, True now"):
        run(train, monkeypatch, *options, "--trust-remote-code")


def test_one_command_hands_on_what_the_target_needs(folder: Path, monkeypatch):
    options = ["--trust-remote-code", "--chat-template-kwargs", '{"enable_thinking": false}']
    arguments = ["--prompts", folder / "prompts.jsonl", "--evaluate", folder / "prompts.jsonl", "--recipe", "default"]
    monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, [*arguments, *options, "--output", folder / "run"])])
    steps = reproduce.commands(reproduce.parse())
    assert [step[0] for step in steps] == ["distill", "train", "evaluate_drafter", "evaluate_drafter"]
    for name, *given in steps:
        monkeypatch.setattr(sys, "argv", [name, *given])
        understood = {"distill": distill, "train": train, "evaluate_drafter": evaluate_drafter}[name].parse()
        assert understood.trust_remote_code is True
        assert name == "train" or understood.chat_template_kwargs == {"enable_thinking": False}


# ---- other systems


@pytest.mark.one_version
def test_a_file_of_states_on_other_systems(tmp_path: Path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    for before in (0, 1):  # what is there is kept
        states = map_file(tmp_path / "states.bin", (3, 5), torch.bfloat16)
        assert states.shape == (3, 5) and (tmp_path / "states.bin").stat().st_size == 30
        assert (states == before).all()
        states.fill_(1)


@pytest.mark.one_version
def test_without_the_module_resource():
    """As on Windows: training goes on without the figure."""
    code = (
        "import sys, psutil\n"  # of accelerate: this one's own need of the module is Linux's
        "sys.modules['resource'] = None\n"
        "from specformer.scripts import train\n"
        "print(train.peak_memory())"
    )
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


@pytest.mark.one_version
def test_training_without_the_figure(folder: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    (folder / "answers.jsonl").write_text('{"prompt_ids": [3, 4], "response_ids": [5, 6, 7, 8]}\n' * 4)
    data = ("--data", folder / "answers.jsonl", "--target", folder / "target", "--output", folder / "trained")
    run(train, monkeypatch, *data, "--epochs", 1, "--num-draft-tokens", 3, "--evaluations", 1)
    log = json.loads((folder / "trained" / "training.json").read_text(encoding="utf-8"))
    assert log["peak_memory_gib"] is None or torch.cuda.is_available()


def opens_text_without_encoding(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if name not in ("open", "read_text", "write_text") or any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    modes = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [each.value for each in modes if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return not (name == "open" and any("b" in mode for mode in modes))


FOLDERS = ("", "generation", "scripts", "scripts/parts", "benchmarks")


@pytest.mark.parametrize("folder", ["scripts", "scripts/parts", "benchmarks"])
def test_every_module_can_be_imported(folder: str):
    """What one of them takes from another is still there, also where no test runs it."""
    package = folder if folder == "benchmarks" else f"specformer.{folder}".replace("/", ".")
    root = Path(train.__file__).resolve().parents[1]
    modules = [path.stem for path in (root / folder).glob("*.py") if path.stem != "__init__"]
    assert len(modules) > 5
    for name in modules:
        importlib.import_module(f"{package}.{name}")


@pytest.mark.one_version
def test_text_is_utf_8_everywhere():
    """Without an encoding it is what the system prefers, on Windows another one."""
    assert opens_text_without_encoding(ast.parse("open(path, 'a')").body[0].value)
    assert not opens_text_without_encoding(ast.parse("path.open('rb')").body[0].value)
    root = Path(train.__file__).resolve().parents[1]
    files = [path for folder in FOLDERS for path in (root / folder).glob("*.py")]
    assert len(files) > 50
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text_without_encoding(node)
    ]
    assert not found
