"""Time plain generate() and this package on the same different prompts, in turn, in one process.

    python -m specformer.scripts.benchmark --prompts prompts.jsonl --output benchmarks/results/benchmark_cpu.json

Three drafters: the default one (or --drafter), one that is always right and one that is always wrong, both of which
cost nothing: what drafting could give, and what it costs. Tokens per second are medians over --repeats turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from specformer.generation.drafter import NoDrafter
from specformer.generation.generate import generate
from specformer.scripts.fetch_target import HUB_ID, fetch_target
from specformer.scripts.prompts import encode, read_prompts
from specformer.scripts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]


class KnownText(NoDrafter):
    """Drafts from a text that is known in advance: right everywhere, or wrong everywhere.

    Args:
        answer: new tokens of each row, (B, T).
        is_right: whether to draft them or other ones.
    """

    max_draft_tokens = 64

    def __init__(self, answer: torch.Tensor, is_right: bool):
        self.answer, self.shift = answer, 0 if is_right else 1

    def begin(self, input_ids, layout, first_tokens, max_length) -> None:
        self.rows = torch.arange(len(input_ids), device=input_ids.device)
        self.written = torch.ones_like(self.rows)

    def propose(self, num_tokens, choose) -> torch.Tensor:
        steps = self.written[:, None] + torch.arange(num_tokens, device=self.rows.device)
        return self.answer[self.rows[:, None], steps.clamp(max=self.answer.shape[1] - 1)] ^ self.shift

    def update(self, tokens, counts, longest) -> None:
        self.written = self.written + counts

    def select_rows(self, index, longest) -> None:
        self.rows, self.written = self.rows[index], self.written[index]


def timed(device: torch.device, call, **arguments):
    """What the call returns, and its seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    output = call(**arguments)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return output, time.perf_counter() - start


def measure(target, drafter, batch: dict, k: int, new_tokens: int, repeats: int) -> dict:
    """Seconds of every way, interleaved; the texts of all of them are compared with plain generate()'s."""
    # Exactly as many tokens in every row, so that all ways do the same work.
    settings = dict(batch, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    width = batch["input_ids"].shape[1]
    plain = target.generate(**settings)
    answer = plain[:, width:]
    drafters = {
        "default": drafter,
        "always right": KnownText(answer, True),
        "always wrong": KnownText(answer, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *drafters)}
    outputs = {}
    for repeat in range(repeats + 1):  # the first turn warms up
        _, spent = timed(target.device, target.generate, **settings)
        seconds["plain"].append(spent)
        for name, assistant in drafters.items():
            speculative = dict(assistant_model=assistant, num_assistant_tokens=k, return_dict_in_generate=True)
            outputs[name], spent = timed(target.device, generate, model=target, **settings, **speculative)
            seconds[name].append(spent)
        if repeat == 0:
            seconds = {name: [] for name in seconds}
    tokens = answer.numel()
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    result = {"batch_size": len(plain), "plain_tokens_per_second": rates.pop("plain"), "drafters": {}}
    for name, rate in rates.items():
        ratios = [base / own for base, own in zip(seconds["plain"], seconds[name], strict=True)]
        result["drafters"][name] = {
            "tokens_per_second": rate,
            "ratio_to_plain": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "tokens_per_pass": outputs[name].statistics.tokens_per_pass,
            "identical": int((outputs[name].sequences == plain).all(dim=1).sum()),
        }
    return result


def main(arguments: argparse.Namespace) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    name = arguments.target or str(fetch_target())
    target = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).eval()
    target.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(name)
    drafter = AutoModel.from_pretrained(arguments.drafter, trust_remote_code=True)
    k = arguments.num_assistant_tokens or drafter.config.default_num_assistant_tokens
    prompts = read_prompts(arguments.prompts, max(arguments.batch_sizes))
    result = {
        **provenance("specformer.scripts.benchmark"),
        "regime": {
            "target": arguments.target or HUB_ID,
            "dtype": arguments.dtype,
            "decoding": "greedy",
            "max_new_tokens": arguments.max_new_tokens,
            "num_assistant_tokens": k,
            "repeats": arguments.repeats,
        },
        "batches": [],
    }
    for batch_size in arguments.batch_sizes:
        batch = encode(tokenizer, prompts[:batch_size]).to(target.device)
        row = measure(target, drafter, batch, k, arguments.max_new_tokens, arguments.repeats)
        result["batches"].append(row)
        print(f"batch {batch_size}: plain {row['plain_tokens_per_second']:.0f} tokens/s")
        for way, figures in row["drafters"].items():
            ratio = figures["ratio_to_plain"]
            print(
                f"  {way}: {ratio['median']:.2f} times plain ({ratio['min']:.2f}-{ratio['max']:.2f}), "
                f"{figures['tokens_per_pass']:.2f} tokens per pass, {figures['identical']} of {batch_size} identical"
            )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--target", help="folder or Hub id; default: the one of fetch_target")
    parser.add_argument("--drafter", default=str(ROOT), help="SpecFormer folder or Hub id; default: this checkout")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-assistant-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
