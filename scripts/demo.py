"""Eight different prompts as one batch: with the drafter of this checkout, and with plain generate().

    specformer demo

Prints every text with its tokens per target pass, the speed of both, and whether all texts are identical.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from specformer.scripts.fetch_target import fetch_target
from specformer.scripts.parts.prompts import encode
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
NEW_TOKENS = 96
REPEATS = 3
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


def timed(function):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def main(arguments: argparse.Namespace) -> int:
    logging.set_verbosity_error()
    print("Loading the target (SmolLM2-135M-Instruct) and the drafter ...", flush=True)
    folder = fetch_target()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    drafter = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    inputs = encode(tokenizer, PROMPTS).to(device)

    def plain():
        return target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)

    def speculative():
        return target.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            assistant_model=drafter,
            custom_generate=str(ROOT),
            trust_remote_code=True,
            return_dict_in_generate=True,
        )

    print(f"Generating {len(PROMPTS)} texts as one batch, {REPEATS} times with each, in turn ...\n", flush=True)
    plain_seconds, our_seconds = [], []
    for _ in range(REPEATS):
        expected, seconds = timed(plain)
        plain_seconds.append(seconds)
        output, seconds = timed(speculative)
        our_seconds.append(seconds)

    width = max(expected.shape[1], output.sequences.shape[1])
    padded = [
        torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=tokenizer.pad_token_id)
        for ids in (expected, output.sequences)
    ]
    identical = (padded[0] == padded[1]).all(dim=1).tolist()
    prompt_width = inputs["input_ids"].shape[1]
    rates = output.statistics.tokens_per_pass_per_row
    for prompt, ids, rate, same in zip(PROMPTS, output.sequences, rates, identical, strict=True):
        text = tokenizer.decode(ids[prompt_width:], skip_special_tokens=True).strip()
        print(f"> {textwrap.shorten(prompt, 100)}")
        print(textwrap.indent(text, "    "))
        verdict = "identical to plain generate" if same else "DIFFERENT from plain generate"
        print(f"  [{rate:.2f} tokens per target pass, {verdict}]\n" if rate else f"  [{verdict}]\n")

    tokens = sum(output.statistics.tokens_per_row)
    plain_rate, our_rate = (tokens / statistics.median(seconds) for seconds in (plain_seconds, our_seconds))
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"tokens per target pass  {output.statistics.tokens_per_pass:.2f}  (plain generate: 1)")
    print(
        f"tokens/s                {our_rate:.1f}  (plain generate: {plain_rate:.1f}; ratio {our_rate / plain_rate:.2f})"
    )
    print(f"                        median of {REPEATS}, {len(PROMPTS)} rows, float32, {device}, {threads}")
    print(f"identical texts         {sum(identical)}/{len(identical)}")
    if arguments.output is not None:
        result = {
            **provenance("specformer.scripts.demo"),
            "regime": {
                "target": drafter.config.target_name_or_path,
                "dtype": "float32",
                "decoding": "greedy",
                "batch_size": len(PROMPTS),
                "max_new_tokens": NEW_TOKENS,
                "num_assistant_tokens": "auto",
                "repeats": REPEATS,
            },
            "identical": sum(identical),
            "tokens_per_pass": output.statistics.tokens_per_pass,
            "tokens_per_second": our_rate,
            "plain_tokens_per_second": plain_rate,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(identical) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
