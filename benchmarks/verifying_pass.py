"""What a verifying pass takes by its tokens, with each way to multiply matrices that `backend_linear` may take.

    python -m benchmarks.verifying_pass --target <folder> --output benchmarks/results/verifying_pass_cpu.json

Passes over 1 to --most tokens a row, behind --context tokens: with torch's own products; in float32 with large weights
beside few rows through oneDNN, and with all of them through oneDNN; and with packed weights. One turn has each of them
once. What a call takes on this machine is in the result as well. Targets, dtypes and numbers of rows add up in one
file: what is there already is measured anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.cost_model import full_cache
from specformer.generation import backend_linear
from specformer.generation.backend_linear import ANY, FEW, LARGE, NONE, fast_linears, faster_rows, gain, packing_pays
from specformer.generation.target import verify
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.provenance import provenance

TORCH, LARGE_AND_FEW, ALL = "torch's own products", "oneDNN for large weights and few rows", "oneDNN for all"
PACKED = "packed weights"
WAYS = {
    LARGE_AND_FEW: lambda weight, num_threads: FEW if weight.numel() >= LARGE else NONE,
    ALL: lambda weight, num_threads: ANY,
    PACKED: lambda weight, num_threads: NONE,
}
"""What stands for `faster_rows` in each."""


@torch.no_grad()
def time_pass(target, batch_size: int, num_tokens: int, context: int, turns: int) -> dict[str, float]:
    """Median seconds of a pass over (B, q) tokens, by the way to multiply."""
    tokens = torch.randint(target.config.vocab_size, (batch_size, num_tokens))
    cache = full_cache(target.config.num_hidden_layers, batch_size, context, num_tokens, target.device)
    ways = [TORCH, *WAYS] if target.dtype == torch.float32 else [TORCH, PACKED]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns + 1):  # the first of each is not counted
        for way in ways:
            with (
                patch.object(backend_linear, "faster_rows", WAYS.get(way)),
                patch.object(backend_linear, "packing_pays", lambda *_, way=way: way == PACKED),
                nullcontext() if way == TORCH else fast_linears(target),
            ):
                start = time.perf_counter()
                verify(target, cache, tokens)
                seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(times[1:]) for way, times in seconds.items()}


def taken_here(dtype: torch.dtype) -> str:
    """The way that a call takes on this machine."""
    num_threads = torch.get_num_threads()
    if packing_pays(dtype, num_threads):
        return PACKED
    rows = faster_rows(torch.empty(1, LARGE, dtype=dtype), num_threads)
    return ALL if rows == ANY else LARGE_AND_FEW if rows == FEW else TORCH


def gains(dtype: torch.dtype) -> dict[str, float]:
    num_threads = torch.get_num_threads()
    found = {f"packed, {rows}": gain(rows, num_threads, dtype, packed=True) for rows in (1, 5)}
    return found | {str(rows): gain(rows, num_threads, dtype) for rows in (3, 10)}


def main(arguments: argparse.Namespace) -> None:
    folder, name = find_target(arguments.target)
    name = Path(name).name
    dtype, before, there = getattr(torch, arguments.dtype), [], {}
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    regime = {"context": arguments.context, "turns": arguments.turns}
    if arguments.output and arguments.output.exists():
        there = json.loads(arguments.output.read_text(encoding="utf-8"))
        if there["regime"] != regime:
            raise ValueError(f"{arguments.output} is of {there['regime']}, and {regime} was asked for.")
        anew = [(name, arguments.dtype, size) for size in arguments.batch_sizes]
        before = [each for each in there["passes"] if group_of(each) not in anew]
    result = {
        **provenance("benchmarks.verifying_pass"),
        "regime": regime,
        "gains": there.get("gains", {}) | {arguments.dtype: gains(dtype)},
        "taken_here": there.get("taken_here", {}) | {arguments.dtype: taken_here(dtype)},
        "passes": before,
    }
    wanted = [(size, num) for size in arguments.batch_sizes for num in range(1, arguments.most + 1)]
    for batch_size, num_tokens in tqdm(wanted, unit="pass"):
        seconds = time_pass(target, batch_size, num_tokens, arguments.context, arguments.turns)
        result["passes"].append(
            {"target": name, "dtype": arguments.dtype, "batch_size": batch_size, "tokens": num_tokens, **seconds}
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(result["passes"])))


def group_of(one: dict) -> tuple[str, str, int]:
    return one["target"], one["dtype"], one["batch_size"]


def table(passes: list[dict]) -> list[str]:
    """Markdown: milliseconds, one line per target, batch size and way to multiply."""
    most = max(each["tokens"] for each in passes)
    lines = [f"| target | rows | products | {' | '.join(map(str, range(1, most + 1)))} |", "|---" * (most + 3) + "|"]
    groups: dict[tuple, list[dict]] = {}
    for each in passes:
        groups.setdefault(group_of(each), []).append(each)
    for (target, dtype, batch_size), group in sorted(groups.items()):
        for way in (way for way in (TORCH, *WAYS) if way in group[0]):
            times = " | ".join(f"{1000 * each[way]:.0f}" for each in group)
            lines.append(f"| {target}, {dtype} | {batch_size} | {way} | {times} |")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or Hub id; default: the one of `specformer fetch`")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--most", type=int, default=8, help="tokens a row")
    parser.add_argument("--context", type=int, default=128, help="tokens that every row has read")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
