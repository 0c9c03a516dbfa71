"""The demo: its texts, their colours, and the comparison that it prints."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from test_callers import tiny_tokenizer
from tiny import llama

from specformer import SpecFormerConfig, SpecFormerModel
from specformer.scripts import demo


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_pieces_make_the_text():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", errors="replace")

    ids = list("a\N{EURO SIGN}b".encode())
    assert list(demo.pieces(Bytes(), ids)) == ["a", "", "", "\N{EURO SIGN}", "b"]
    assert "".join(demo.pieces(Bytes(), ids[:3])) == "a\N{REPLACEMENT CHARACTER}"


def test_accepted_drafts_are_green(tokenizer):
    ids = tokenizer("one, two")["input_ids"]
    was_drafted = [place % 2 == 1 for place in range(len(ids))]
    text = demo.coloured(tokenizer, ids, was_drafted)
    assert text.replace("\x1b[32m", "").replace("\x1b[0m", "") == tokenizer.decode(ids, skip_special_tokens=True)
    assert 0 < text.count("\x1b[32m") <= sum(was_drafted)


def test_rows_of_other_widths_are_compared():
    assert demo.equal_rows(torch.tensor([[5, 6, 0], [5, 6, 7]]), torch.tensor([[5, 6], [5, 6]]), 0) == [True, False]


@pytest.mark.parametrize("code", [False, True])
def test_demo(code: bool, tokenizer, tmp_path, monkeypatch, capsys):
    target = llama(torch.float32)
    target.generation_config.eos_token_id = None
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))
    drafter.save_pretrained(tmp_path / "drafter")
    monkeypatch.setattr(demo, "fetch_target", lambda name: tmp_path / "target")
    shown = replace(demo.CODE if code else demo.CHAT, prompts=["one, two", "a hen on the hill"], max_new_tokens=8)
    shown = replace(shown, drafter=None if code else tmp_path / "drafter")
    monkeypatch.setattr(demo, "CODE" if code else "CHAT", shown)
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(tmp_path / "demo.json"), *(["--code"] if code else [])])
    assert demo.main(demo.parse()) == 0
    printed = capsys.readouterr().out
    assert "> a hen on the hill" in printed and ("agrees with itself in" in printed) == code
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["regime"]["dtype"] == ("bfloat16" if code else "float32")
    if not code:
        assert result["identical"] == 2 and "identical texts         2/2" in printed
