"""`specformer generate`: every prompt is answered once, as plain generate() answers it alone, whatever happens."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from exactness import choose_eos
from test_callers import tiny_tokenizer
from test_distill import prompts, rows_of
from tiny import llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from specformer import SpecFormerConfig, SpecFormerModel
from specformer import generate as generate_drafted
from specformer.generation.cache_ragged import RaggedCache
from specformer.scripts import distill, generate
from specformer.scripts.parts.answer_folder import AnswerFolder
from specformer.scripts.parts.answering import Answer, Answering
from specformer.scripts.parts.drafted_answering import DraftedAnswering, Joined

NEW_TOKENS = 20
GREEDY = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
SAMPLED = dict(max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.3, top_k=20)


@pytest.fixture(scope="module")
def answered() -> tuple[PreTrainedModel, dict[int, list[int]]]:
    """A target, some of whose answers end by themselves, at different places; and what plain generate() answers."""
    target = llama(seed=3)
    target.generation_config.eos_token_id = None
    texts = [plain(target, ids) for ids in prompts()]
    target.generation_config.eos_token_id = eos = choose_eos(torch.tensor(texts), 0)
    ends = [text.index(eos) + 1 if eos in text else NEW_TOKENS for text in texts]
    assert len(set(ends)) > 2
    return target, {index: text[:end] for index, (text, end) in enumerate(zip(texts, ends, strict=True))}


@pytest.fixture
def target(answered):
    return copy.deepcopy(answered[0])


@pytest.fixture
def expected(answered):
    return answered[1]


def plain(target, ids: list[int], **settings) -> list[int]:
    ids = torch.tensor([ids])
    text = target.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **settings})
    return text[0, ids.shape[1] :].tolist()


def drafter_of(target, **fields) -> SpecFormerModel:
    torch.manual_seed(1)
    config = SpecFormerConfig.from_target_config(target.config, **fields)
    return SpecFormerModel(config).to(target.dtype)


def gpt2() -> GPT2LMHeadModel:
    """Positions end at a table's end, where a draft must not reach beyond it."""
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=64, n_positions=31, n_embd=32, n_layer=2, n_head=4, initializer_range=0.15)
    config.eos_token_id, config.bos_token_id = 5, 1
    return GPT2LMHeadModel(config).double().eval()


DRAFTERS = {
    "specformer": lambda target: (drafter_of(target), {}),
    "with confidences": lambda target: (drafter_of(target, confidence_head=True), {"num_assistant_tokens": "auto"}),
    "without copies": lambda target: (drafter_of(target), {"num_assistant_tokens": 3, "prompt_lookup_num_tokens": 0}),
    "copies": lambda target: (None, {"prompt_lookup_num_tokens": 4}),
    "trees": lambda target: (drafter_of(target), {"num_assistant_tokens": 4, "tree_size": 9}),
    "trees of copies": lambda target: (
        None,
        {"prompt_lookup_num_tokens": 4, "num_assistant_tokens": "auto", "tree_size": 6},
    ),
    "causal LM": lambda target: (llama(seed=9, num_hidden_layers=1), {"num_assistant_tokens": 3}),
    "the target itself": lambda target: (target, {"num_assistant_tokens": 4}),
    "none": lambda target: (drafter_of(target), {"num_assistant_tokens": 0}),
}


def answer_all(target, batch_size: int, settings: dict, drafter, drafting: dict, indices=None) -> dict[int, list[int]]:
    texts, seen = prompts(), []
    answering = DraftedAnswering(target, batch_size, settings, drafter, drafting, seed=40)
    for answer in answering.run(Answer(index, texts[index]) for index in indices or range(len(texts))):
        eos = target.generation_config.eos_token_id
        assert answer.finished == (answer.response_ids[-1] == eos)
        assert answer.finished or len(answer.response_ids) == NEW_TOKENS
        seen.append(answer)
    assert len({answer.index for answer in seen}) == len(seen) == len(indices or texts)
    assert not answering.groups
    return {answer.index: answer.response_ids for answer in seen}


SLOW = pytest.mark.slow
QUICK_KINDS = ("with confidences", "copies", "trees")


@pytest.mark.parametrize("batch_size", [5, pytest.param(1, marks=SLOW), pytest.param(64, marks=SLOW)])
@pytest.mark.parametrize("kind", [kind if kind in QUICK_KINDS else pytest.param(kind, marks=SLOW) for kind in DRAFTERS])
def test_answers_are_those_of_plain_generate(kind: str, batch_size: int, target, expected):
    assert answer_all(target, batch_size, GREEDY, *DRAFTERS[kind](target)) == expected


def test_answers_of_a_target_whose_positions_end():
    target, some = gpt2(), range(6)
    expected = {index: plain(target, prompts()[index]) for index in some}
    assert answer_all(target, 3, GREEDY, target, {"num_assistant_tokens": 4}, some) == expected


@pytest.mark.parametrize("is_padded", [False, True], ids=["", "planted fault"])
@pytest.mark.parametrize(("name", "value"), [("min_length", 14), pytest.param("repetition_penalty", 1.7, marks=SLOW)])
def test_what_the_generation_config_says_counts(name: str, value: float, is_padded: bool, target, expected):
    """Processors that read the text, and would read its padding, among it."""
    setattr(target.generation_config, name, value)
    some = range(8)
    wanted = {index: plain(target, prompts()[index]) for index in some}
    assert any(wanted[index] != expected[index] for index in some)
    answering = DraftedAnswering(target, 5, GREEDY, target, {"num_assistant_tokens": 3})
    answering.reads_text = False if is_padded else None
    answers = {answer.index: answer.response_ids for answer in answering.run(Answer(n, prompts()[n]) for n in some)}
    if name == "min_length" or not is_padded:  # padding is penalised in some versions of transformers only
        assert (answers == wanted) != is_padded


def test_sampled_answers_depend_on_prompt_and_seed_alone(target):
    drafter, some = drafter_of(target), list(range(22, 15, -1))
    settings = dict(SAMPLED, acceptance="coupled", num_assistant_tokens=2)
    expected = {}
    for index in some:
        ids = torch.tensor([prompts()[index]])
        text = generate_drafted(target, drafter, ids, seed=40 + index, **settings)
        expected[index] = text[0, ids.shape[1] :].tolist()
    assert answer_all(target, 4, SAMPLED, drafter, {"num_assistant_tokens": 3}, some) == expected
    assert answer_all(target, 9, SAMPLED, target, {"num_assistant_tokens": 4}, some[::-1]) == expected
    trees = {"num_assistant_tokens": 3, "tree_size": 8}
    assert answer_all(target, 5, SAMPLED, drafter, trees, some) == expected


@pytest.mark.one_version
@pytest.mark.parametrize(
    "fault",
    [
        "places that were dropped",
        pytest.param("another row's logits", marks=SLOW),
        pytest.param("another row's place", marks=SLOW),
        "paths that are not followed",
    ],
)
def test_a_planted_fault_is_found(fault: str, target, expected, monkeypatch):
    begin, drafts = DraftedAnswering._begin, (target, {"num_assistant_tokens": 3})
    if fault == "paths that are not followed":  # of trees
        monkeypatch.setattr(RaggedCache, "follow", lambda self, path: None)
        drafts = drafter_of(target), {"num_assistant_tokens": 4, "tree_size": 30}
    elif fault == "another row's logits":
        monkeypatch.setattr(Joined, "own", lambda self, values: values[: len(self.places)])
    elif fault == "another row's place":
        monkeypatch.setattr(DraftedAnswering, "_begin", lambda self, group, places: begin(self, group, places[::-1]))
    else:
        monkeypatch.setattr(DraftedAnswering, "_drop", Answering._drop)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        assert answer_all(target, 5, GREEDY, *drafts) == expected


def test_drafts_save_passes(target):
    answering = DraftedAnswering(target, 8, GREEDY, target, {"num_assistant_tokens": 4})
    answers = list(answering.run(Answer(index, ids) for index, ids in enumerate(prompts())))
    assert answering.tokens == sum(len(answer.response_ids) - 1 for answer in answers)
    assert answering.tokens > 3 * answering.passes  # the target drafts for itself


# ---- the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A target with a tokenizer, its drafter, and prompts."""
    target = llama(torch.float32)
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    drafter_of(target).save_pretrained(tmp_path / "drafter")
    words = [" ".join(chr(97 + (7 * index + step) % 26) for step in range(1 + index % 9)) for index in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in words))
    return tmp_path


def options(folder: Path, output: str = "answers", *more) -> list[str]:
    places = ("--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--output", folder / output)
    return [*map(str, (*places, "--drafter", folder / "drafter", "--batch-size", 4, "--max-new-tokens", 16, *more))]


def run(monkeypatch, folder: Path, *more, module=generate, **kwargs) -> list[dict]:
    arguments = options(folder, *more, **kwargs)
    if module is distill:
        place = arguments.index("--drafter")
        del arguments[place : place + 2]
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    module.main(module.parse())
    return rows_of(folder / (more[0] if more else "answers"))


def expected_rows(folder: Path, limit: int = 40) -> dict[int, list[int]]:
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    tokenizer, found = tiny_tokenizer(), {}
    for index, line in enumerate((folder / "prompts.jsonl").read_text().splitlines()[:limit]):
        chat = [{"role": "user", "content": json.loads(line)["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        found[index] = plain(target, ids, max_new_tokens=16)
    return found


def test_command(folder: Path, monkeypatch, capsys):
    some = ("--dtype", "float32", "--limit", 14)
    rows = run(monkeypatch, folder, "answers", *some, "--measure-plain", 4)
    assert {row["id"]: row["response_ids"] for row in rows} == expected_rows(folder, 14)
    tokenizer = tiny_tokenizer()
    assert all(row["text"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True) for row in rows)
    told = capsys.readouterr().out
    assert "14 answers in" in told and "tokens per target pass" in told
    assert "Speed-up" in told and "4 prompts once more" in told and "4 texts are the same" in told
    assert '"speed_up"' in (folder / "answers" / "README.md").read_text(encoding="utf-8")
    assert run(monkeypatch, folder, "answers", *some) == rows
    assert "All of them were there." in capsys.readouterr().out


def test_other_settings_and_other_weights_are_refused(folder: Path, monkeypatch):
    few = ("--limit", 2, "--dtype", "float32")
    rows = run(monkeypatch, folder, "answers", *few)
    with pytest.raises(ValueError, match=r"other settings \(top_k: None there, 7 now\)"):
        run(monkeypatch, folder, "answers", *few, "--top-k", 7)
    with pytest.raises(ValueError, match=r"other settings \(generation_config: .* there, None now\)"):
        run(monkeypatch, folder, "answers", *few, module=distill)
    target = llama(torch.float32)
    with torch.no_grad():
        target.model.layers[1].mlp.up_proj.weight.mul_(1.1)  # as a training step does
    target.save_pretrained(folder / "target")
    with pytest.raises(ValueError, match=r"other settings \(weights: "):
        run(monkeypatch, folder, "answers", *few)
    assert rows_of(folder / "answers") == rows


def test_a_folder_from_before_weights_were_noted(folder: Path, monkeypatch):
    rows = run(monkeypatch, folder, "answers", "--limit", 2, module=distill)
    path = folder / "answers" / "settings.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["weights"], settings["generation_config"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert run(monkeypatch, folder, "answers", "--limit", 2, module=distill) == rows


def test_a_folder_that_another_run_writes_to(tmp_path: Path, monkeypatch):
    from specformer.scripts.parts import answer_folder

    monkeypatch.setattr(answer_folder, "PATIENCE", 0.1)
    one, other = AnswerFolder(tmp_path / "answers"), AnswerFolder(tmp_path / "answers")
    with one.missing({"a": 1}, range(3)) as missing:
        assert missing == [0, 1, 2]
        with pytest.raises(RuntimeError, match="is written to by another run"), other.missing({"a": 1}, range(3)):
            pass
        assert [answer.index for answer in one.write([Answer(1, [7], [8], True)])] == [1]
    with other.missing({"a": 1}, range(3)) as missing:
        assert missing == [0, 2]


def launched(folder: Path, output: str, *more, seconds_of_an_answer: float = 0.0) -> subprocess.Popen:
    """Two processes, which take their time."""
    code = (
        "import time\nfrom specformer.scripts import generate\n"
        "with_text = generate.with_text\n"
        f"generate.with_text = lambda *args: time.sleep({seconds_of_an_answer}) or with_text(*args)\n"
        "generate.main(generate.parse())\n"
    )
    (folder / "slow.py").write_text(code)
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(folder / "slow.py"))
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    log = open(folder / f"{output}.log", "w")  # noqa: SIM115, closed with this process
    command = [sys.executable, *launch, *options(folder, output, "--dtype", "float32", *more)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("answers-*.jsonl"))


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed(folder: Path):
    """SIGKILL in the midst of the work; the same command again answers the others."""
    output = folder / "answers"
    process = launched(folder, "answers", seconds_of_an_answer=0.2)
    try:
        while lines(output) < 6:
            assert process.poll() is None, (folder / "answers.log").read_text()
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        victim = next(worker for worker in workers[::-1] if "slow.py" in " ".join(worker.cmdline()))
        os.kill(victim.pid, signal.SIGKILL)
        assert process.wait(60) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    there = lines(output)
    assert 6 <= there < 40
    with open(output / "answers-00001.jsonl", "a") as file:
        file.write('{"id":3,"text":"bro')  # as a kill in the midst of a line leaves it
    again = launched(folder, "answers")
    assert again.wait(120) == 0, (folder / "answers.log").read_text()
    rows = rows_of(output)
    assert [row["id"] for row in rows] == list(range(40))
    assert {row["id"]: row["response_ids"] for row in rows} == expected_rows(folder)
    assert all((output / f"answers-0000{number}.jsonl").stat().st_size for number in (0, 1))
    told = (folder / "answers.log").read_text()
    assert "40 answers in" in told and f"{40 - there} of them now" in told
