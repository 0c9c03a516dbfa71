"""Prompts are read as people write them; what is no prompt ends in one sentence with file and line, before a target is
loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from test_callers import CHAT_TEMPLATE, tiny_tokenizer

from specformer.scripts.parts.answer_run import digest
from specformer.scripts.parts.prompt_rows import task_of
from specformer.scripts.parts.prompts import encode, encode_each, read, read_prompts, template_arguments

HELLO = {"role": "user", "content": "hello"}
TERSE = {"role": "system", "content": "be terse"}
TURNS = [HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and again?"}]
ANSWER = {"role": "assistant", "content": "the data set's own answer"}
SHARE_GPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}, {"from": "human", "value": "bye"}]
ROWS = [
    ({"prompt": "hello"}, "hello"),
    ({"prompt": " hello\n"}, " hello\n"),
    ({"turns": ["hello", "and again?"], "category": "writing"}, "hello"),
    ({"question": "why?", "answer": "so"}, "why?"),
    ({"text": "hello"}, "hello"),
    # instructions
    ({"instruction": "translate", "output": "x"}, "translate"),
    ({"instruction": "translate", "input": "", "output": "x"}, "translate"),
    ({"instruction": "translate", "input": None, "output": "x", "text": "### translate"}, "translate"),
    ({"instruction": "translate", "input": "hello", "output": "x"}, "translate\n\nhello"),
    ({"instruction": "why?", "context": "it is so", "response": "x"}, "why?\n\nit is so"),
    # conversations: one user message is its text, what the data set answered last is left out
    ({"prompt": [HELLO]}, "hello"),
    ({"prompt": [HELLO], "completion": [ANSWER]}, "hello"),
    ({"prompt": [TERSE, HELLO]}, [TERSE, HELLO]),
    ({"messages": [HELLO, ANSWER]}, "hello"),
    ({"messages": [TERSE, *TURNS, ANSWER]}, [TERSE, *TURNS]),
    ({"messages": [*TURNS, ANSWER, ANSWER]}, TURNS),
    ({"conversations": [HELLO, ANSWER]}, "hello"),
    ({"turns": [TERSE, HELLO, ANSWER]}, [TERSE, HELLO]),
    (
        {"conversations": [{"from": "system", "value": "be terse"}, *SHARE_GPT, {"from": "gpt", "value": "bye"}]},
        [TERSE, HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "bye"}],
    ),
    ({"conversations": [{"from": "human", "value": "hello"}, {"from": "chatgpt", "value": "hi"}]}, "hello"),
    # as `datasets` fills up what only some rows have
    ({"prompt": None, "messages": [HELLO | {"from": None, "value": None, "tool_calls": None}]}, "hello"),
    ({"messages": [{"from": "human", "value": "hello", "role": None, "content": None}]}, "hello"),
    # content in parts, empty content of others than the user, and more keys, which a template may read
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]},
        "hello",
    ),
    ({"messages": [{"role": "system", "content": ""}, HELLO]}, [{"role": "system", "content": ""}, HELLO]),
    (
        {"messages": [HELLO, ANSWER | {"reasoning_content": "hm", "weight": None}, HELLO]},
        [HELLO, ANSWER | {"reasoning_content": "hm"}, HELLO],
    ),
    # a system prompt beside the prompt
    ({"system_prompt": "be terse", "question": "hello"}, [TERSE, HELLO]),
    ({"system": "be terse", "conversations": [HELLO, ANSWER]}, [TERSE, HELLO]),
    ({"system": "", "conversations": [HELLO, ANSWER], "tools": []}, "hello"),
    # the order that decides
    ({"text": "f", "question": "e", "instruction": "d", "turns": ["c"], "messages": [HELLO], "prompt": "a"}, "a"),
    ({"text": "f", "question": "e", "instruction": "d", "turns": ["c"], "messages": [HELLO]}, "hello"),
    ({"text": "f", "question": "e", "instruction": "d", "turns": ["c"]}, "c"),
    ({"text": "f", "question": "e", "instruction": "d"}, "d"),
    ({"text": "f", "question": "e"}, "e"),
]
FAULTS = [
    # lines
    (b'{"prompt": "hel', ["hel", "expected a line of JSON"]),
    (b"hello", ["hello", "expected a line of JSON"]),
    (b'{"prompt": "\xff"}', ["expected a line of JSON", "utf-8"]),
    (b"[" * 100_000, ["expected a line of JSON"]),
    (b'["hello"]', ["(list)", "hello", "expected an object"]),
    (b"7", ["7", "expected an object"]),
    (b'"hello"', ["(str)", "hello", "expected an object"]),
    (b"null", ["None", "expected an object"]),
    (b"", ["an empty line"]),
    # fields
    (b"{}", ["no field", "prompt, messages, conversations, turns, instruction, question, text"]),
    (b'{"promt": "hello", "id": 7}', ["promt, id", "prompt, messages"]),
    (b'{"prompt": ""}', ["prompt", "an empty text"]),
    (b'{"prompt": " \\n"}', ["prompt", "an empty text"]),
    (b'{"prompt": "", "text": "hello"}', ["prompt", "an empty text"]),
    (b'{"prompt": {"content": "hello"}}', ["prompt", "(dict)", "hello", "expected a text"]),
    (b'{"prompt": 7}', ["prompt", "7 (int)", "expected a text"]),
    (b'{"prompt": true}', ["prompt", "True (bool)", "expected a text"]),
    (b'{"prompt": ["hello"]}', ["prompt[0]", "hello", "role"]),
    (b'{"question": [{"role": "user", "content": "hello"}]}', ["question", "(list)", "expected a text"]),
    (b'{"messages": "hello"}', ["messages", "hello", "expected a list"]),
    (b'{"conversations": "[]"}', ["conversations", "expected a list"]),
    (b'{"instruction": "add", "input": 7}', ["input", "7", "expected a text"]),
    (b'{"instruction": "add", "input": ["a"]}', ["input", "(list)", "expected a text"]),
    (b'{"question": "hello", "system_prompt": 7}', ["system_prompt", "7", "expected a text"]),
    (b'{"turns": []}', ["turns", "no user message"]),
    (b'{"turns": ["", "hello"]}', ["turns", "an empty text"]),
    (b'{"prompt": "half a \\ud83d smile"}', ["\\ud83d", "surrogate"]),
    (b'{"messages": [{"role": "user", "content": "half a \\ude00 smile"}]}', ["\\ude00", "surrogate"]),
    # what would be lost
    (b'{"messages": [{"role": "user", "content": "hello"}], "tools": [{"name": "add"}]}', ["tools", "cannot be read"]),
    (b'{"instruction": "hello", "history": [["a", "b"]]}', ["history", "cannot be read"]),
    (b'{"prompt": "what is it?", "images": ["a.png"]}', ["images", "cannot be read"]),
    # conversations
    (b'{"messages": []}', ["messages", "no user message"]),
    (b'{"messages": [{"role": "system", "content": "be terse"}]}', ["messages", "no user message", "system"]),
    (b'{"messages": [{"role": "assistant", "content": "hi"}]}', ["messages", "no user message", "assistant"]),
    (b'{"messages": ["hello"]}', ["messages[0]", "hello", "role"]),
    (b'{"messages": [[{"role": "user", "content": "hello"}]]}', ["messages[0]", "role"]),
    (b'{"messages": [{"content": "hello"}]}', ["messages[0]", "role", "None", "user"]),
    (b'{"messages": [{"role": ["user"], "content": "hello"}]}', ["messages[0]", "role", "user"]),
    (b'{"conversations": [{"from": "moon", "value": "hello"}]}', ["conversations[0]", "moon", "human"]),
    (b'{"messages": [{"role": "user"}]}', ["messages[0]", "None", "expected a text"]),
    (b'{"messages": [{"role": "user", "content": ""}]}', ["messages[0]", "an empty text"]),
    (b'{"messages": [{"role": "user", "content": {"text": "hello"}}]}', ["messages[0]", "(dict)", "expected a text"]),
    (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', ["messages[0]", "image", "expected a text"]),
    (b'{"messages": [{"role": "user", "content": ["hello"]}]}', ["messages[0]", "hello", "expected a text"]),
]


def write(folder: Path, *lines: bytes) -> str:
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def as_line(row: dict) -> bytes:
    return json.dumps(row).encode()


# ---- reading


@pytest.mark.parametrize(("row", "prompt"), ROWS)
def test_rows_that_people_write(row: dict, prompt: str | list, tmp_path: Path):
    assert read_prompts(write(tmp_path, as_line(row))) == [prompt]


@pytest.mark.parametrize(("line", "parts"), FAULTS, ids=lambda value: repr(value)[2:60])
def test_what_is_no_prompt(line: bytes, parts: list[str], tmp_path: Path):
    source = write(tmp_path, b'{"prompt": "hello"}', line, b'{"prompt": "hello"}')
    with pytest.raises(ValueError) as caught:
        read_prompts(source)
    message = str(caught.value)
    assert caught.value.__suppress_context__  # one error, not a chain of them
    assert message.startswith(f"{source}, line 2: found ")
    assert not [part for part in (*parts, "expected") if part not in message], message
    assert len(message) < len(source) + 600 and "\n" not in message
    assert read_prompts(source, 1) == ["hello"]


def test_ends_and_beginnings_of_files(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    for content in (
        b'{"prompt": "a"}\n{"prompt": "\xc3\xbc"}',
        b'{"prompt": "a"}\r\n{"prompt": "\xc3\xbc"}\r\n',
        b'{"prompt": "a"}\n{"prompt": "\xc3\xbc"}\n\n  \n\r\n',
        b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "\\u00fc"}\n',  # with a byte order mark, as some editors write it
        b'{"prompt": "a"}\n{"prompt": "\xc3\xbc", "id": "\xe2\x80\xa8"}\n',  # a line separator, but no line's end
    ):
        path.write_bytes(content)
        assert read_prompts(str(path)) == ["a", "ü"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_no_prompt_at_all(content: bytes, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.jsonl holds no prompts"):
        read_prompts(str(path))


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_that_leave_nothing(limit: int, tmp_path: Path):
    with pytest.raises(ValueError, match=f"limit is {limit}; expected 1 or more"):
        read_prompts(write(tmp_path, b'{"prompt": "hello"}'), limit)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_prompts(str(tmp_path / "prompts.jsonl"))


def test_tasks(tmp_path: Path):
    rows = ({"task": "a", "category": "b"}, {"category": "b"}, {"prompt": "hello"}, {"task": ["x"]})
    assert read(write(tmp_path, *map(as_line, rows)), task_of) == ["a", "b", "all", "['x']"]


def test_data_sets(tmp_path: Path):
    """A folder, as `datasets` reads it; a data set of the Hub is no different."""
    pytest.importorskip("datasets")
    rows = [{"messages": [TERSE, *TURNS, ANSWER]}, {"messages": [HELLO, ANSWER]}]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", *map(as_line, rows))
    source = str(tmp_path / "set")
    assert read_prompts(source) == [[TERSE, *TURNS], "hello"]
    assert read_prompts(source, 1) == [[TERSE, *TURNS]]
    write(tmp_path / "set", *map(as_line, [*rows, {"messages": [ANSWER]}]))
    with pytest.raises(ValueError) as caught:
        read_prompts(source)
    assert str(caught.value).startswith(f"{source}, row 2: found no user message")


# ---- encoding


def rendered(tokenizer, prompt: str | list, **arguments) -> list[int]:
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, **arguments)["input_ids"]


def test_conversations_are_written_with_the_template():
    tokenizer, prompts = tiny_tokenizer(), ["the other", [TERSE, *TURNS], [TERSE, HELLO]]
    batch = encode(tokenizer, prompts)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert rows == [rendered(tokenizer, prompt) for prompt in prompts] == encode_each(tokenizer, prompts, "a.jsonl")
    assert batch["attention_mask"][:, -1].all()
    assert len({tuple(row) for row in rows}) == 3


def test_conversations_without_a_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (ids,) = encode_each(tokenizer, ["hello"], "a.jsonl")
    assert ids == tokenizer("hello")["input_ids"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*2 messages.*no chat template"):
        encode_each(tokenizer, ["hello", [TERSE, HELLO]], "a.jsonl")


def test_what_the_template_refuses(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHAT_TEMPLATE
    )
    for source, place in (("a.jsonl", "line 2"), ("some/set", "row 1")):
        with pytest.raises(ValueError, match=f"{source}, {place}: .*template.*no system here"):
            encode_each(tokenizer, ["hello", [TERSE, HELLO]], source)


def test_prompts_without_a_token():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .*no tokens"):
        encode_each(tokenizer, ["hello"], "a.jsonl")


def test_template_arguments():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if not enable_thinking %}the{% endif %}"
    given = template_arguments('{"enable_thinking": true}')
    assert given == {"enable_thinking": True}
    ids = encode(tokenizer, ["hello"], given)["input_ids"][0].tolist()
    assert ids == rendered(tokenizer, "hello", enable_thinking=True) != rendered(tokenizer, "hello")
    for template in (CHAT_TEMPLATE, None):  # where it would have no effect
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="chat template does not read enable_thinking"):
            encode_each(tokenizer, ["hello"], "a.jsonl", given)
    with pytest.raises(ValueError, match="chat template does not read role_of"):
        encode_each(tokenizer, ["hello"], "a.jsonl", {"role_of": 1, "add": 2})
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE + "{{ tools[0].name }}{{ also }}"}
    with_tools = {"tools": [{"name": "a tool"}], "also": "that"}
    (ids,) = encode_each(tokenizer, ["hello"], "a.jsonl", with_tools)
    assert tokenizer.decode(ids).endswith("a toolthat")
    with pytest.raises(ValueError, match="chat template does not read also"):
        encode_each(tokenizer, ["hello"], "a.jsonl", {"also": "that"})


@pytest.mark.parametrize("text", ["enable_thinking=false", "{enable_thinking: false}", "[1]", "7", ""])
def test_template_arguments_that_are_no_object(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a JSON object"):
        template_arguments(text)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "padding", "tokenize", "chat_template"])
def test_template_arguments_that_are_not_the_users(name: str):
    with pytest.raises(argparse.ArgumentTypeError, match=name):
        template_arguments(json.dumps({name: False}))


def test_digest_of_plain_texts_is_what_it_was():
    """Folders of answers that were begun by earlier versions are gone on with."""
    texts = ["the other note", "and in the end", "is it?", "one, two", "a hen on the hill", "so it is", "in there"]
    tokenizer = tiny_tokenizer()
    assert digest(encode_each(tokenizer, [*texts, "there"], "a.jsonl")) == "02fcf155554baa36"
    tokenizer.chat_template = None
    assert digest(encode_each(tokenizer, [*texts, "there"], "a.jsonl")) == "d3529e6fa671fb36"
    assert torch.is_tensor(encode(tokenizer, texts)["input_ids"])
