"""docs/arguments.md says what really comes of each argument, and leaves out none of the installed transformers."""

from __future__ import annotations

import arguments
import pytest
from arguments import INTRODUCTION, PAGE, installed_arguments, rows, trials

from specformer.generation.backend_versions import CACHE_NAMES

BESIDE_PARAMETERS = {"input_ids", "attention_mask", "position_ids", *CACHE_NAMES, "inputs_embeds"} | {
    "logits_to_keep",
    "tokenizer",
    "assistant_tokenizer",
}
"""What generate() takes as keywords and hands on: in no signature."""


def test_every_argument_is_known():
    unknown = [name for name in installed_arguments() if name not in trials()]
    assert not unknown, (
        f"The installed transformers has arguments of generate() that nobody tried: {unknown}. Add each to `trials` in "
        "tests/arguments.py, then run `python tests/arguments.py`."
    )


def skip_if_not_installed(name: str) -> None:
    if name not in BESIDE_PARAMETERS and name not in installed_arguments():
        pytest.skip(f"the installed transformers has no argument {name}")


@pytest.mark.parametrize("name", trials())
def test_argument(name: str):
    """Equal to plain generate(), or refused before the first token; as the page says."""
    skip_if_not_installed(name)
    written = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert list(rows(name)) == written, "docs/arguments.md is out of date: run `python tests/arguments.py`"


def test_the_page_has_nothing_else():
    text = PAGE.read_text()
    assert text.startswith(INTRODUCTION)
    named = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert list(dict.fromkeys(named)) == list(trials())


@pytest.mark.one_version
def test_other_texts_are_found(monkeypatch):
    """The comparison with plain generate() is able to fail."""
    processors = arguments.generate.__globals__["Processors"]
    warp = processors.warp
    name, trial = "top_k", trials()["top_k"]
    assert arguments.run(name, trial, 2) == ("works", "")
    monkeypatch.setattr(processors, "leave_few", lambda self, scores: None)
    monkeypatch.setattr(processors, "warp", lambda self, scores: warp(self, scores.roll(1, dims=-1)))
    with pytest.raises(AssertionError, match="top_k=`2`: not as in plain"):
        arguments.run(name, trial, 2)


@pytest.mark.one_version
def test_errors_that_are_no_refusals_are_found(monkeypatch):
    def crash(*args):
        raise IndexError("a crash")

    monkeypatch.setitem(arguments.generate.__globals__, "check_call", crash)
    with pytest.raises(AssertionError, match="a crash"):
        arguments.run("top_k", trials()["top_k"], 2)
