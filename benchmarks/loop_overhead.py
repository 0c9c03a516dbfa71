"""What the decode loop costs beside its two models: a round, less the target's and the drafter's passes timed alone.

    python -m benchmarks.loop_overhead --prompts prompts.jsonl --output benchmarks/results/loop_overhead.json

Every row writes --max-new-tokens tokens behind --prompt-tokens of its own, and rounds before any row leaves the batch
are timed, from the beginning of one to that of the next. The passes are those of `cost_model`: as many rows, as many
tokens, behind as long a text as rows have halfway. The drafter's has the choice of the drafts in it as far as greedy
decoding goes; what sampling them takes longer counts as the rest, as does handing it the hidden states. On a CUDA GPU
the same once more with recorded passes (`cuda_graphs`); there each pass alone is waited for, while in a round the host
goes on, so that the rest comes out shorter than it is. Medians of all rounds and passes; what a round takes longer is
given in parts of it, and of a pass over one token a row, plain decoding's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import specformer
from benchmarks.cost_model import time_round
from specformer.generation.draft_length import DraftLength
from specformer.scripts.benchmark import DECODING, make_batches
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
FIRST = 2
"""Rounds of a call that are not counted, in which passes may be recorded."""


def time_rounds(target, drafter, batch: dict, **settings) -> list[float]:
    """Seconds of the rounds of one call before any row leaves the batch."""
    began, num_rows = [], len(batch["input_ids"])
    next_length = DraftLength.next

    def stamped(self, rows: int) -> int:
        if rows == num_rows:
            began.append(time.perf_counter())
        return next_length(self, rows)

    with patch.object(DraftLength, "next", stamped):
        specformer.generate(target, drafter, **batch, **settings, eos_token_id=None, prompt_lookup_num_tokens=0)
    return [end - start for start, end in pairwise(began)][FIRST:]


def measure(target, drafter, batches: list[dict], k: int, cuda_graphs: bool, decoding: str, new_tokens: int) -> dict:
    """Medians of rounds and of passes alone, call by call in turn."""
    num_rows, prompt_tokens = batches[0]["input_ids"].shape
    k = min(k, drafter.config.num_draft_tokens)
    times: dict[str, list[float]] = {"round": [], "verify": [], "draft": [], "plain": []}
    for turn, batch in enumerate(batches):
        torch.manual_seed(turn)
        settings = dict(DECODING[decoding], max_new_tokens=new_tokens, cuda_graphs=cuda_graphs, num_assistant_tokens=k)
        rounds = time_rounds(target, drafter, batch, **settings)
        alone = time_round(target, drafter, num_rows, k, prompt_tokens + new_tokens // 2, 5, cuda_graphs)
        plain = time_round(target, drafter, num_rows, 0, prompt_tokens + new_tokens // 2, 5, cuda_graphs)
        if turn:  # the first call finds out what is faster here, probes, and loads kernels
            times["round"] += rounds
            times["verify"].append(alone["verify_seconds"])
            times["draft"].append(alone["draft_seconds"])
            times["plain"].append(plain["verify_seconds"])
    medians = {f"{part}_seconds": statistics.median(seconds) for part, seconds in times.items()}
    outside = medians["round_seconds"] - medians["verify_seconds"] - medians["draft_seconds"]
    return {
        "batch_size": num_rows,
        "decoding": decoding,
        "cuda_graphs": cuda_graphs,
        "rounds": len(times["round"]),
        **medians,
        "outside_of_round": outside / medians["round_seconds"],
        "outside_of_plain": outside / medians["plain_seconds"],
    }


def main(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    prompts, dtype = read_prompts(arguments.prompts), getattr(torch, arguments.dtype)
    folder, identity = find_target(arguments.target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    target.to("cuda" if torch.cuda.is_available() else "cpu")
    drafter = AutoModel.from_pretrained(arguments.drafter, trust_remote_code=True, dtype=dtype).to(target.device)
    paths = [False, True] if target.device.type == "cuda" else [False]
    result = {
        **provenance("benchmarks.loop_overhead"),
        "regime": {
            "target": identity,
            "dtype": arguments.dtype,
            "prompt_tokens": arguments.prompt_tokens,
            "max_new_tokens": arguments.max_new_tokens,
            "num_assistant_tokens": arguments.num_assistant_tokens,
            "decoding": {name: DECODING[name] for name in arguments.decoding},
            "calls": arguments.repeats,
        },
        "rounds": [],
    }
    wanted = [(size, way, path) for size in arguments.batch_sizes for way in arguments.decoding for path in paths]
    for size, decoding, cuda_graphs in tqdm(wanted, unit="regime"):
        # one more, which is not counted
        batches = make_batches(tokenizer, prompts, size, arguments.repeats + 1, arguments.prompt_tokens, target.device)
        settings = arguments.num_assistant_tokens, cuda_graphs, decoding, arguments.max_new_tokens
        result["rounds"].append(measure(target, drafter, batches, *settings))
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(result["rounds"])))


def table(rounds: list[dict]) -> list[str]:
    """Markdown: one line per batch size and way to decode."""
    lines = ["| batch | decoding | round, ms | verifying, ms | drafting, ms | the rest, of a round | of a plain pass |"]
    lines.append("|---" * 7 + "|")
    for row in rounds:
        path = ", CUDA graphs" if row["cuda_graphs"] else ""
        times = " | ".join(f"{1000 * row[f'{part}_seconds']:.2f}" for part in ("round", "verify", "draft"))
        lines.append(
            f"| {row['batch_size']} | {row['decoding']}{path} | {times} | {row['outside_of_round']:.1%} | "
            f"{row['outside_of_plain']:.1%} |"
        )
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--target", help="folder or Hub id; default: the one of `specformer fetch`")
    parser.add_argument("--drafter", default=str(ROOT), help="SpecFormer folder or Hub id; default: this checkout")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--decoding", nargs="+", default=["greedy", "sampling"], choices=list(DECODING))
    parser.add_argument("--num-assistant-tokens", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="calls of each kind")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
