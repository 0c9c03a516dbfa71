"""Eight different prompts as one batch: with drafts, and with plain generate().

    specformer demo
    specformer demo --code      # Qwen2.5-Coder-0.5B in bfloat16; the first time, 1.3 GB are fetched

Prints every text with its tokens per target pass, the speed of both, and how many texts are identical. In a terminal
that has colours, accepted drafts are green; the other tokens the target wrote by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from specformer.scripts.fetch_target import DEFAULT, TARGETS, fetch_target
from specformer.scripts.parts.prompts import encode
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
CODE_DRAFTER = ROOT / "drafters" / "qwen2.5-coder-0.5b-instruct"
"""In a checkout; the package that pip installs has the default drafter only, and copies then draft alone."""
REPEATS = 3
MORE_PADDING = 3
"""Columns with which plain generate() runs once more in half precision: what its texts differ by from themselves."""
PROMPTS = [
    "What is the capital of Portugal, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train leaves at 9:40 and arrives at 12:15. How long is the journey? Explain step by step.",
    "List five tips for staying focused while studying.",
    "Explain to a child why the sky is blue.",
    "Translate into French: The weather is beautiful today and we are going to the beach.",
    "Write a short poem about the sea in autumn.",
    "Summarise in one sentence: Photosynthesis is the process by which green plants use sunlight to make food from "
    "carbon dioxide and water. It releases oxygen as a by-product and is the basis of almost all life on Earth.",
]
ACCOUNT = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
        return self.balance
"""
SQUARES = """def squares(numbers):
    result = []
    for number in numbers:
        result.append(number * number)
    return result
"""
CODE_PROMPTS = [
    "Write a Python function that checks whether a string is a palindrome, with three examples.",
    f"Add type hints to this class and return the whole class:\n\n{ACCOUNT}",
    "Write a SQL query that returns the three customers with the highest total order value.",
    f"Rename `balance` to `total` everywhere in this class and return the whole class:\n\n{ACCOUNT}",
    "Write a JavaScript function that groups an array of objects by a key.",
    f"Write unit tests with pytest for this class:\n\n{ACCOUNT}",
    "Write a Python class for a stack with push, pop and peek, with docstrings.",
    f"Rewrite this function as a list comprehension, then explain the change:\n\n{SQUARES}",
]


@dataclass(frozen=True)
class Demo:
    """
    Attributes:
        target: a known target.
        drafter: folder of its SpecFormer drafter; `None`: all drafts are copies from the text.
        most_copied: tokens of a copy, where all drafts are copies.
        num_assistant_tokens: the default "auto", or a number where "auto" would rightly draft nothing on some machines.
    """

    target: str
    prompts: list[str]
    max_new_tokens: int
    drafter: Path | None = None
    most_copied: int = 10
    num_assistant_tokens: int | str = "auto"


# A pass of eight rows of so small a model in float32 has little time to spare: drafting two tokens is about as fast as
# none, and what "auto" chose changed from machine to machine, and with it what there was to see.
CHAT = Demo(DEFAULT, PROMPTS, 96, ROOT, num_assistant_tokens=2)
CODE = Demo("Qwen2.5-Coder-0.5B-Instruct", CODE_PROMPTS, 128, CODE_DRAFTER if CODE_DRAFTER.is_dir() else None)


def timed(function: Callable):
    """What `function` returns, and in how many seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def equal_rows(ours: torch.Tensor, theirs: torch.Tensor, pad_token_id: int) -> list[bool]:
    """Which rows of two batches of new tokens, (B, n) and (B, m), are the same text."""
    width = max(ours.shape[1], theirs.shape[1])
    ours, theirs = (
        torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=pad_token_id) for ids in (ours, theirs)
    )
    return (ours == theirs).all(dim=1).tolist()


def pieces(tokenizer, ids: list[int]) -> Iterator[str]:
    """What each token adds to the text. A character of several tokens comes with the last of them."""
    shown = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            yield ""
            continue
        yield text[len(shown) :]
        shown = text


def coloured(tokenizer, ids: list[int], was_drafted: list[bool]) -> str:
    """The text, with accepted drafts in green."""
    parts = zip(pieces(tokenizer, ids), was_drafted, strict=True)
    return "".join(typer.style(text, fg="green") if drafted and text.strip() else text for text, drafted in parts)


def has_colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def main(arguments: argparse.Namespace) -> int:
    logging.set_verbosity_error()
    demo = CODE if arguments.code else CHAT
    known = TARGETS[demo.target]
    print(f"Loading {demo.target} ({known.dtype}) ...", flush=True)
    folder = fetch_target(name=demo.target)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, known.dtype)).eval().to(device)
    if demo.drafter is None:
        drafts = dict(prompt_lookup_num_tokens=demo.most_copied)
    else:
        drafts = dict(assistant_model=AutoModel.from_pretrained(demo.drafter, trust_remote_code=True))
    inputs = encode(tokenizer, demo.prompts).to(device)
    settings = dict(max_new_tokens=demo.max_new_tokens, do_sample=False)

    def plain(more_padding: int = 0) -> torch.Tensor:
        """Its new tokens."""
        padded = {
            name: torch.nn.functional.pad(part, (more_padding, 0), value=filling)
            for name, part, filling in (
                ("input_ids", inputs["input_ids"], tokenizer.pad_token_id),
                ("attention_mask", inputs["attention_mask"], 0),
            )
        }
        return target.generate(**padded, **settings)[:, padded["input_ids"].shape[1] :]

    def speculative():
        return target.generate(
            **inputs,
            **settings,
            **drafts,
            num_assistant_tokens=demo.num_assistant_tokens,
            custom_generate=str(ROOT),
            trust_remote_code=True,
            return_dict_in_generate=True,
        )

    print(f"Generating {len(demo.prompts)} texts as one batch, {REPEATS} times with each, in turn ...\n", flush=True)
    plain_seconds, our_seconds = [], []
    for _ in range(REPEATS):
        expected, seconds = timed(plain)
        plain_seconds.append(seconds)
        output, seconds = timed(speculative)
        our_seconds.append(seconds)
    new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    identical = equal_rows(new_tokens, expected, tokenizer.pad_token_id)

    found = output.statistics
    rows = zip(demo.prompts, new_tokens, found.was_drafted, found.tokens_per_pass_per_row, identical, strict=True)
    for prompt, ids, was_drafted, rate, same in rows:
        if has_colours():
            text = coloured(tokenizer, ids[: len(was_drafted)].tolist(), was_drafted)
        else:
            text = str(tokenizer.decode(ids, skip_special_tokens=True))  # of one text it is no list
        print(f"> {textwrap.shorten(prompt, 100)}")
        print(textwrap.indent(text.strip(), "    "))
        verdict = "identical to plain generate" if same else "DIFFERENT from plain generate"
        print(f"  [{rate:.2f} tokens per target pass, {verdict}]\n" if rate else f"  [{verdict}]\n")

    tokens = sum(found.tokens_per_row)
    plain_rate, our_rate = (tokens / statistics.median(seconds) for seconds in (plain_seconds, our_seconds))
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"tokens per target pass  {found.tokens_per_pass:.2f}  (plain generate: 1)")
    print(
        f"tokens/s                {our_rate:.1f}  (plain generate: {plain_rate:.1f}; ratio {our_rate / plain_rate:.2f})"
    )
    print(f"                        median of {REPEATS}, {len(demo.prompts)} rows, {known.dtype}, {device}, {threads}")
    print(f"identical texts         {sum(identical)}/{len(identical)}")
    exact, with_itself = target.dtype in (torch.float32, torch.float64), None
    if not exact:
        again = equal_rows(plain(MORE_PADDING), expected, tokenizer.pad_token_id)
        with_itself = sum(again)
        print(
            f"                        {known.dtype} rounds by the shape of a pass: plain generate with {MORE_PADDING} "
            f"more columns of padding\n                        agrees with itself in {with_itself}/{len(again)}"
        )
    if arguments.output is not None:
        result = {
            **provenance("specformer.scripts.demo"),
            "regime": {
                "target": known.hub_id,
                "dtype": known.dtype,
                "decoding": "greedy",
                "batch_size": len(demo.prompts),
                "max_new_tokens": demo.max_new_tokens,
                "num_assistant_tokens": demo.num_assistant_tokens,
                "drafts": "copies" if demo.drafter is None else "SpecFormer",
                "repeats": REPEATS,
            },
            "identical": sum(identical),
            "plain_identical_with_more_padding": with_itself,
            "tokens_per_pass": found.tokens_per_pass,
            "tokens_per_second": our_rate,
            "plain_tokens_per_second": plain_rate,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(identical) or not exact else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", action="store_true", help="code prompts, and a larger target in bfloat16")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
