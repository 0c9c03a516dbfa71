"""What a round costs with a target that keeps states: a pass over one token and k drafts beside a plain step.

    python -m benchmarks.hybrid_cost --output benchmarks/results/hybrid_cost_cpu.json

Targets have random weights: tiny ones, whose passes are mostly overhead, and ones of the published sizes of LFM2-350M
(short convolutions) and of Qwen3.5-0.8B's text model (gated delta nets). For each batch size and number of drafts,
behind --context tokens:

- the pass, beside a step of plain generate(), which is one token with transformers' own cache. Their ratio is how many
  tokens a pass has to give with a drafter that costs nothing: the break-even;
- the parts of the pass in which mixers run, and in which states are put away and fetched;
- the pass with linear layers that read their weights once per token, which `backend_shared_products` saves.

Medians; on a GPU each pass is waited for, and the parts are those of the host.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from tqdm import tqdm
from transformers import DynamicCache

from benchmarks.cost_model import median_seconds
from specformer.generation.backend_linear import fast_linears
from specformer.generation.backend_shared_products import SharedProducts
from specformer.generation.backend_versions import cache_argument
from specformer.generation.cache_states import StateLayer
from specformer.generation.target import prefill, prompt_arguments, prompt_layout, verify
from specformer.generation.target_mixers import Mixers
from specformer.scripts.parts.provenance import provenance

LFM2 = dict(vocab_size=65536, hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, intermediate_size=6656)
QWEN = dict(vocab_size=248320, hidden_size=1024, num_attention_heads=8, num_key_value_heads=2, intermediate_size=3584)
TINY = dict(vocab_size=512, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)
RULE = dict(linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128)
TINY_RULE = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
TARGETS = {
    "tiny LFM2": ("Lfm2Config", dict(TINY, layer_types=["conv", "full_attention"] * 2, num_hidden_layers=4)),
    "tiny Qwen3.5": ("Qwen3_5TextConfig", dict(TINY, **TINY_RULE, head_dim=16, num_hidden_layers=4)),
    "LFM2-350M": (
        "Lfm2Config",
        dict(
            LFM2,
            num_hidden_layers=16,
            layer_types=["full_attention" if n in (2, 5, 8, 10, 12, 14) else "conv" for n in range(16)],
        ),
    ),
    "Qwen3.5-0.8B": ("Qwen3_5TextConfig", dict(QWEN, **RULE, head_dim=256, num_hidden_layers=24)),
}


def make_target(name: str, dtype: torch.dtype, device: torch.device):
    kind, sizes = TARGETS[name]
    config = getattr(transformers, kind)(**sizes, tie_word_embeddings=True)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(device, dtype).eval()


@contextmanager
def seconds_in(seconds: list[float], owner, *names: str):
    """Add up in `seconds` the time that these methods of `owner` take inside."""

    def timed(method):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    patches = [patch.object(owner, name, timed(getattr(owner, name))) for name in names]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def product_of_a_token(self, function, types, args=(), kwargs=None):
    """In the place of `SharedProducts`': each token by itself."""
    return function(*args, **(kwargs or {}))


@torch.no_grad()
def measure(target, batch_size: int, context: int, drafted: list[int], repeats: int) -> list[dict]:
    """Seconds of passes and steps, by drafts."""
    device, vocabulary = target.device, target.config.vocab_size
    prompts = torch.randint(vocabulary, (batch_size, context), device=device)
    layout = prompt_layout(target, None, prompts)
    most = context + max(drafted) + 2
    _, cache, _ = prefill(target, prompts, layout, most, max(drafted) + 1, prompt_arguments(target, layout))
    own = DynamicCache(config=target.config)
    target(input_ids=prompts, **cache_argument(target, own), use_cache=True)
    one, measured = prompts[:, :1], []
    with fast_linears(target):
        step = median_seconds(
            lambda: target(input_ids=one, **cache_argument(target, own), use_cache=True), device, repeats
        )
        for k in drafted:
            tokens = torch.randint(vocabulary, (batch_size, k + 1), device=device)

            def one_pass(tokens: torch.Tensor = tokens) -> None:
                verify(target, cache, tokens)

            seconds = median_seconds(one_pass, device, repeats)
            parts: dict[str, list[float]] = {"mixers": [], "states": []}
            with (
                seconds_in(parts["mixers"], Mixers, "__call__"),
                seconds_in(parts["states"], StateLayer, "recall", "remember"),
            ):
                started = time.perf_counter()
                for _ in range(repeats):
                    one_pass()
                whole = time.perf_counter() - started
            with patch.object(SharedProducts, "__torch_function__", product_of_a_token):
                by_token = median_seconds(one_pass, device, repeats)
            measured.append(
                {
                    "batch_size": batch_size,
                    "drafted": k,
                    "plain_step_seconds": step,
                    "pass_seconds": seconds,
                    "break_even_tokens_per_pass": seconds / step,
                    "share_of_mixers": sum(parts["mixers"]) / whole,
                    "share_of_states": sum(parts["states"]) / whole,
                    "pass_seconds_with_weights_read_per_token": by_token,
                }
            )
    return measured


def table(passes: list[dict]) -> list[str]:
    """Markdown: one line per target, batch size and number of drafts."""
    lines = [
        "| target | rows | drafts | plain step, ms | pass, ms | break-even tokens | mixers | states | per token, ms |",
        "|---" * 9 + "|",
    ]
    for each in passes:
        lines.append(
            f"| {each['target']} | {each['batch_size']} | {each['drafted']} | {1000 * each['plain_step_seconds']:.1f} "
            f"| {1000 * each['pass_seconds']:.1f} | {each['break_even_tokens_per_pass']:.2f} "
            f"| {each['share_of_mixers']:.0%} | {each['share_of_states']:.0%} "
            f"| {1000 * each['pass_seconds_with_weights_read_per_token']:.1f} |"
        )
    return lines


def main(arguments: argparse.Namespace) -> None:
    device, dtype, passes = torch.device(arguments.device), getattr(torch, arguments.dtype), []
    for name in arguments.targets:
        target = make_target(name, dtype, device)
        for batch_size in tqdm(arguments.batch_sizes, desc=name):
            found = measure(target, batch_size, arguments.context, arguments.drafted, arguments.repeats)
            passes += [{"target": name, **each} for each in found]
        del target
    result = {
        **provenance("benchmarks.hybrid_cost"),
        "regime": {name: getattr(arguments, name) for name in ("dtype", "device", "context", "repeats")},
        "passes": passes,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(passes)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--drafted", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="numbers of drafts")
    parser.add_argument("--context", type=int, default=128, help="tokens that every row has read")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
