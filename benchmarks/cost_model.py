"""What drafting would cost a target of a given shape, with random weights: no text is written, only passes are timed.

    python -m benchmarks.cost_model --shape Qwen3-8B --output benchmarks/results/cost_qwen3_8b.json
    python -m benchmarks.cost_model --shape <folder or Hub id of a config>

For every batch size and draft length: the target's pass over 1 and over k + 1 tokens a row behind --context tokens, the
drafter's share of a round, and from these the tokens per target pass at which drafting breaks even, and the speed-up if
every slot were accepted with the same probability. A model of costs, not a measurement of generation: how often a real
drafter is right for such a target, it does not say.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from specformer.configuration_specformer import SpecFormerConfig
from specformer.generation.accept_tokens import BestDrafts
from specformer.generation.backend_graphs import recorded_passes
from specformer.generation.backend_linear import fast_linears
from specformer.generation.cache_ragged import RaggedCache
from specformer.generation.drafter_specformer import SpecFormerDrafter
from specformer.generation.target import verify
from specformer.modeling_specformer import SpecFormerModel
from specformer.scripts.parts.provenance import provenance

SHAPES = {
    "SmolLM2-1.7B": lambda: LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Qwen3-8B": lambda: Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    ),
    "Llama-3.1-8B": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
}
ACCEPTANCE = (0.5, 0.6, 0.7, 0.8, 0.9)


def median_seconds(call, device: torch.device, repeats: int) -> float:
    """Median wall-clock of `call`, whatever it leaves running on the device included; the first two are not counted."""
    seconds = []
    for _ in range(repeats + 2):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def full_cache(num_layers: int, batch_size: int, context: int, room: int, device) -> RaggedCache:
    """A cache whose rows hold `context` tokens, of which nothing is known: the first pass makes the buffers."""
    lengths = torch.full((batch_size,), context, device=device)
    return RaggedCache(num_layers, lengths, context, context + room, context + room)


@torch.no_grad()
def time_round(
    target, drafter: SpecFormerModel, batch_size: int, k: int, context: int, repeats: int, cuda_graphs: bool = False
) -> dict:
    """Seconds of the target's pass over k + 1 tokens a row, and of the drafter's part of a round, when greedy."""
    device, config = target.device, drafter.config
    tokens = torch.randint(config.vocab_size, (batch_size, k + 1), device=device)
    cache = full_cache(config.target_num_hidden_layers, batch_size, context, k + 1, device)
    with fast_linears(target), recorded_passes(cuda_graphs):
        result = {"verify_seconds": median_seconds(lambda: verify(target, cache, tokens), device, repeats)}
    if k == 0:
        return result
    states = torch.randn(
        batch_size, k + 1, len(config.target_layer_ids), config.hidden_size, device=device, dtype=target.dtype
    )
    counts = torch.full_like(tokens[:, 0], k + 1)
    own_cache = full_cache(1, batch_size, context, k + 1, device)
    drafting = SpecFormerDrafter(drafter, target)
    drafting.begin_behind(own_cache, states[:, 0, 0], tokens[:, :1])
    drafting.longest = context + k + 1  # once they are read

    def draft():
        drafting.unread.rounds = [(states, tokens, counts)]
        drafting.propose(k, BestDrafts(config.vocab_size))
        own_cache.advance(-counts, context)

    with drafting, recorded_passes(cuda_graphs):
        return result | {"draft_seconds": median_seconds(draft, device, repeats)}


def tokens_per_pass(acceptance: float, k: int) -> float:
    """Expected tokens of a round whose slots are each accepted with the same probability."""
    return sum(acceptance**slot for slot in range(k + 1))


def main(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    shape = SHAPES[arguments.shape]() if arguments.shape in SHAPES else AutoConfig.from_pretrained(arguments.shape)
    with torch.device(device):
        target = AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()
        most = max(arguments.num_assistant_tokens)
        config = SpecFormerConfig.from_target_config(
            shape, num_draft_tokens=most, draft_vocab_size=arguments.draft_vocab_size, previous_token_rank=256
        )
        drafter = SpecFormerModel(config).to(dtype).eval()
    result = {
        **provenance("benchmarks.cost_model"),
        "regime": {
            "shape": arguments.shape,
            "weights": "random",
            "dtype": arguments.dtype,
            "context": arguments.context,
            "cuda_graphs": arguments.cuda_graphs,
            "repeats": arguments.repeats,
            "draft_vocab_size": arguments.draft_vocab_size,
            "target_parameters": target.num_parameters(),
            "drafter_parameters": drafter.num_parameters(),
        },
        "rounds": [],
    }
    lengths = [0, *arguments.num_assistant_tokens]
    with tqdm(total=len(lengths) * len(arguments.batch_sizes), unit="round") as progress:
        for batch_size in arguments.batch_sizes:
            for k in lengths:
                times = time_round(
                    target,
                    drafter,
                    batch_size,
                    k,
                    arguments.context,
                    arguments.repeats,
                    arguments.cuda_graphs,
                )
                progress.update()
                if k == 0:
                    plain = times["verify_seconds"]
                    continue
                cost = (times["verify_seconds"] + times["draft_seconds"]) / plain
                result["rounds"].append(
                    {
                        "batch_size": batch_size,
                        "num_assistant_tokens": k,
                        "plain_seconds": plain,
                        **times,
                        "break_even_tokens_per_pass": cost,
                        "speed_up": {str(rate): tokens_per_pass(rate, k) / cost for rate in ACCEPTANCE},
                    }
                )
                if arguments.output:
                    arguments.output.parent.mkdir(parents=True, exist_ok=True)
                    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


def table(result: dict) -> str:
    """Markdown: one line per batch size and draft length."""
    titles = " | ".join(f"speed-up if {rate:.0%} of each slot are right" for rate in ACCEPTANCE)
    lines = [f"| batch | k | one token, ms | k + 1 tokens, ms | drafting, ms | breaks even at | {titles} |"]
    lines.append("|---" * (6 + len(ACCEPTANCE)) + "|")
    for row in result["rounds"]:
        times = (1000 * row[name] for name in ("plain_seconds", "verify_seconds", "draft_seconds"))
        lines.append(
            f"| {row['batch_size']} | {row['num_assistant_tokens']} | "
            + " | ".join(f"{time:.1f}" for time in times)
            + f" | {row['break_even_tokens_per_pass']:.2f} | "
            + " | ".join(f"{value:.2f}" for value in row["speed_up"].values())
            + " |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help=f"{', '.join(SHAPES)}, or folder or Hub id of a config")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-assistant-tokens", type=int, nargs="+", default=[2, 4, 7])
    parser.add_argument("--draft-vocab-size", type=int, help="default: the whole vocabulary")
    parser.add_argument("--context", type=int, default=1024, help="tokens that every row has read")
    parser.add_argument("--cuda-graphs", action="store_true", help="with recorded passes")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
