"""Distillation: every prompt is answered once, as plain generate() answers it alone, whatever happens on the way."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, make_target
from exactness import choose_eos
from hybrids import hybrid
from tiny import EOS, VOCAB, llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from specformer.generation import backend_linear
from specformer.generation.backend_linear import plain_linears
from specformer.generation.target_attention import attention_of
from specformer.scripts.distill import main, parse
from specformer.scripts.parts import answering
from specformer.scripts.parts.answer_folder import AnswerFolder
from specformer.scripts.parts.answering import Answer, Answering
from specformer.scripts.parts.runs import begin_or_go_on

NEW_TOKENS = 20


def prompts(count: int = 23, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(EOS + 1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def answer_all(target, batch_size: int, indices=None, **settings) -> dict[int, list[int]]:
    texts = prompts()
    answering = Answering(target, batch_size, NEW_TOKENS, **settings)
    answers = list(answering.run(Answer(index, texts[index]) for index in indices or range(len(texts))))
    assert len({answer.index for answer in answers}) == len(answers) == len(indices or texts)
    for answer in answers:
        assert answer.prompt_ids == texts[answer.index]
        assert answer.finished == (answer.response_ids[-1] == target.generation_config.eos_token_id)
        assert answer.finished or len(answer.response_ids) == NEW_TOKENS
    return {answer.index: answer.response_ids for answer in answers}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral-sliding", "Qwen3NextForCausalLM"])
def test_answers_are_those_of_plain_generate(name: str):
    target = make_target(name, seed=3) if name in FAMILIES else copy.deepcopy(hybrid(name)[0])

    def plain_answers(count: int | None = None) -> dict[int, list[int]]:
        answers = {}
        for index, ids in enumerate(prompts()[:count]):
            ids = torch.tensor([ids])
            text = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS)
            answers[index] = text[0, ids.shape[1] :].tolist()
        return answers

    target.generation_config.eos_token_id = None
    lines = torch.tensor(list(plain_answers(8).values()))
    target.generation_config.eos_token_id = choose_eos(lines, 0)
    expected = plain_answers()
    assert len({len(answer) for answer in expected.values()}) > 2  # some end by themselves, at different places
    for batch_size in (1, 4, 8, 64):
        assert answer_all(target, batch_size) == expected


def test_sampled_answers_depend_on_prompt_and_seed_alone():
    target = llama()
    expected = answer_all(target, 4, temperature=1.2)
    assert answer_all(target, 9, temperature=1.2) == expected
    assert answer_all(target, 3, list(range(22, 8, -1)), temperature=1.2) == {
        index: expected[index] for index in range(9, 23)
    }
    assert answer_all(target, 4, temperature=1.2, seed=1) != expected
    assert answer_all(target, 4) != expected


def test_rows_are_refilled(monkeypatch):
    """A finished row does not wait for the others: few passes, and all of them full until the prompts run out."""
    target, carried = llama(), []
    verify = answering.verify
    monkeypatch.setattr(answering, "verify", lambda *args: carried.append(len(args[2])) or verify(*args))
    answers = answer_all(target, 8)
    waited = sum(sorted(map(len, answers.values()))[-3:])  # batches of 8 that wait for their longest row
    assert len(carried) < waited
    assert carried[0] == 8
    assert carried == sorted(carried, reverse=True)  # rows leave at the end only


@pytest.mark.filterwarnings("ignore:This target was loaded with attn_implementation")
def test_between_answers_the_target_is_as_it_was(monkeypatch):
    """Layers, attention and gradients are other ones while it answers, and its own in what the caller does then."""
    target, seen = llama(torch.float32), []
    target.set_attn_implementation("flex_attention")
    verify = answering.verify

    def state() -> tuple:
        forwards = sum("forward" in vars(module) for module in target.modules())
        return forwards, attention_of(target), torch.is_grad_enabled()

    monkeypatch.setattr(backend_linear, "gain", lambda *_, **__: 2.0)
    monkeypatch.setattr(answering, "verify", lambda *args: seen.append(state()) or verify(*args))
    texts, before = prompts(), state()
    for _ in Answering(target, 4, 5).run(Answer(index, ids) for index, ids in enumerate(texts)):
        assert state() == before
    assert set(seen) == {(len(plain_linears(target)), "sdpa", False)}


# ---- the folder


def test_what_an_interruption_left_is_cut_off(tmp_path: Path):
    whole = [Answer(index, [7], [8, 9], True).to_json() for index in range(3)]
    for number, tail in enumerate(("", '{"id":9,"prompt', "\x00\x00")):
        path = tmp_path / f"answers-{number:05d}.jsonl"
        path.write_text("\n".join(whole) + "\n" + tail)
        assert AnswerFolder(tmp_path).there() == {0, 1, 2}
        assert path.read_text() == "\n".join(whole) + "\n"


def test_other_settings_are_refused(tmp_path: Path):
    folder = tmp_path / "answers"
    begin_or_go_on(folder, dict(target="a", seed=0))
    begin_or_go_on(folder, dict(target="a", seed=0))
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 now"):
        begin_or_go_on(folder, dict(target="a", seed=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="another folder"):
        begin_or_go_on(tmp_path / "other", dict(target="a"))


def test_settings_of_before_there_was_an_option(tmp_path: Path):
    begin_or_go_on(tmp_path / "answers", dict(target="a"))
    assert begin_or_go_on(tmp_path / "answers", dict(target="a", chat_template_kwargs=None))
    with pytest.raises(ValueError, match=r"chat_template_kwargs: None there, \{'a': 1\} now"):
        begin_or_go_on(tmp_path / "answers", dict(target="a", chat_template_kwargs={"a": 1}))


# ---- the command


@pytest.fixture
def saved_target(tmp_path: Path) -> Path:
    from test_callers import tiny_tokenizer

    folder = tmp_path / "target"
    target = llama(torch.float32)
    target.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def command(target: Path, tmp_path: Path, *options: str) -> list[str]:
    prompt_file = tmp_path / "prompts.jsonl"
    if not prompt_file.exists():
        words = [" ".join(f"w{6 + (index * 7 + step) % 58}" for step in range(1 + index % 9)) for index in range(40)]
        prompt_file.write_text("\n".join(json.dumps({"prompt": text}) for text in words) + "\n")
    arguments = ["--prompts", prompt_file, "--target", target, "--batch-size", "4", "--max-new-tokens", "24"]
    return [sys.executable, "-m", "specformer.scripts.distill", *map(str, arguments), *options]


def run(*args, **options) -> subprocess.CompletedProcess:
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(command(*args), env=environment, capture_output=True, text=True, timeout=300, **options)


def rows_of(folder: Path) -> list[dict]:
    files = sorted(folder.glob("answers-*.jsonl"))
    return sorted((json.loads(line) for path in files for line in path.read_text().splitlines()), key=lambda r: r["id"])


def test_command(saved_target: Path, tmp_path: Path, monkeypatch):
    """In a process of its own, and again in this one."""
    output = tmp_path / "answers"
    arguments = (saved_target, tmp_path, "--output", str(output))
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    rows = rows_of(output)
    assert [row["id"] for row in rows] == list(range(40))
    assert "data_files" in (output / "README.md").read_text()
    monkeypatch.setattr(sys, "argv", command(*arguments)[2:])
    main(parse())
    assert rows_of(output) == rows  # nothing was left to do
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["id"]) == list(range(40))
    assert loaded.column_names == ["id", "prompt_ids", "response_ids", "finished"]
    sys.argv += ["--temperature", "1.0"]
    with pytest.raises(ValueError, match=r"begun with other settings \(temperature: 0\.0 there, 1\.0 now\)"):
        main(parse())
    assert rows_of(output) == rows


# ---- in this process


def distilled(monkeypatch, prompt_file: Path, target: Path | str, *options: str) -> Path:
    """Run the command here; returns the folder of answers."""
    output = prompt_file.parent / "answers"
    arguments = ["--prompts", prompt_file, "--target", target, "--output", output, "--max-new-tokens", 3, *options]
    monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
    main(parse())
    return output


def prompt_file_of(folder: Path, *rows) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def no_target(monkeypatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))


def test_conversations_are_answered(saved_target: Path, tmp_path: Path, monkeypatch):
    asked = [{"role": "user", "content": "is it?"}]
    more = [{"role": "system", "content": "be terse"}, *asked, {"role": "assistant", "content": "it is"}]
    again = {"role": "user", "content": "is it so?"}
    rows = [{"prompt": "is it?"}, {"prompt": asked}, {"messages": [*more, again]}, {"messages": more}]
    answers = rows_of(distilled(monkeypatch, prompt_file_of(tmp_path, *rows), saved_target))
    tokenizer, prompts = AutoTokenizer.from_pretrained(saved_target), [asked, asked, [*more, again], more[:2]]
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert answer["prompt_ids"] == expected


def test_a_broken_line_is_found_before_the_target_is_loaded(tmp_path: Path, monkeypatch):
    path = prompt_file_of(tmp_path, *[{"prompt": "the other"}] * 9, {"prompt": {"role": "user"}})
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 10: found .*as prompt; expected a text"):
        distilled(monkeypatch, path, tmp_path / "nowhere")
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        ([], [], "holds no prompts"),
        (["the cat", "the other cat"], ["--max-prompt-tokens", 3], r"is 3, and all 2 prompts are longer; expected \d+"),
        (["the cat"], ["--skip", 1], r"--skip is 1, and there are 1 prompts"),
        (["the cat"], ["--skip", -1], r"--skip is -1"),
        (["the cat"], ["--limit", 0], r"limit is 0"),
        (["the cat"], ["--chat-template-kwargs", '{"enable_thinking": false}'], "does not read enable_thinking"),
    ],
)
def test_nothing_to_be_done(rows: list, options: list, reason: str, saved_target: Path, tmp_path: Path, monkeypatch):
    no_target(monkeypatch)
    with pytest.raises(ValueError, match=reason):
        distilled(monkeypatch, prompt_file_of(tmp_path, *({"prompt": text} for text in rows)), saved_target, *options)
    assert not (tmp_path / "answers").exists()


def test_several_messages_and_no_template(saved_target: Path, tmp_path: Path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(saved_target)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(saved_target)
    (saved_target / "chat_template.jinja").unlink(missing_ok=True)
    one = [{"role": "user", "content": "is it?"}]
    path = prompt_file_of(tmp_path, {"prompt": one})
    (answer,) = rows_of(distilled(monkeypatch, path, saved_target))
    assert answer["prompt_ids"] == tokenizer("is it?")["input_ids"]
    no_target(monkeypatch)
    path = prompt_file_of(tmp_path, {"prompt": one}, {"prompt": [*one, {"role": "assistant", "content": "a"}, *one]})
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: found a conversation of 3 messages"):
        distilled(monkeypatch, path, saved_target)


def test_template_arguments_decide_about_a_run(saved_target: Path, tmp_path: Path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(saved_target)
    tokenizer.chat_template += "{% if not enable_thinking %}the{% endif %}"
    tokenizer.save_pretrained(saved_target)
    path = prompt_file_of(tmp_path, {"prompt": "is it?"})
    thinking = ("--chat-template-kwargs", '{"enable_thinking": true}')
    output = distilled(monkeypatch, path, saved_target)
    (answer,) = rows_of(output)
    settings = json.loads((output / "settings.json").read_text(encoding="utf-8"))
    older = {
        name: value for name, value in settings.items() if name not in ("chat_template_kwargs", "trust_remote_code")
    }
    (output / "settings.json").write_text(json.dumps(older), encoding="utf-8")
    for same in ((), ("--chat-template-kwargs", "{}")):  # begun before there was the option
        assert rows_of(distilled(monkeypatch, path, saved_target, *same)) == [answer]
    with pytest.raises(ValueError, match=r"chat_template_kwargs: None there, \{'enable_thinking': True\} now"):
        distilled(monkeypatch, path, saved_target, *thinking)
    shutil.rmtree(output)
    (other,) = rows_of(distilled(monkeypatch, path, saved_target, *thinking))
    assert [*other["prompt_ids"], tokenizer.convert_tokens_to_ids("the")] == answer["prompt_ids"]
    assert json.loads((output / "settings.json").read_text(encoding="utf-8"))["chat_template_kwargs"] == {
        "enable_thinking": True
    }


def test_template_arguments_are_checked_first(tmp_path: Path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        distilled(monkeypatch, tmp_path / "prompts.jsonl", "nowhere", "--chat-template-kwargs", "enable_thinking")
    assert "--chat-template-kwargs: expected a JSON object" in capsys.readouterr().err
