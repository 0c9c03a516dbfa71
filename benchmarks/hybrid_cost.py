"""What a round costs with a target that keeps states, beside a step of plain generate().

    python -m benchmarks.hybrid_cost --output benchmarks/results/hybrid_cost_cpu.json

Targets have random weights: tiny ones, whose passes are mostly overhead, and ones of the published sizes of LFM2-350M
(short convolutions) and of the text model of Qwen3.5-0.8B (gated delta rules). A drafter that takes no time drafts
another number of random tokens in each round, so that rounds of all numbers take turns within one call:

- a round, beside steps of plain generate() before and after the call. Their ratio is how many tokens a pass has to give
  where drafts cost nothing: the break-even. Nothing is computed again after a pass, so there is no replay in it;
- the parts of a round in which the modules with states run, and in which states are fetched and put away;
- a round in which these modules read their weights once per token, which `backend_shared_products` saves.

Medians. On a GPU a round ends when its tokens are on the host; the parts are the host's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import transformers
from tqdm import tqdm

import specformer
from specformer.generation.backend_shared_products import SharedProducts
from specformer.generation.cache_states import StateLayer
from specformer.generation.drafter import Drafter, Prompts
from specformer.generation.proposal import Proposal
from specformer.generation.target_mixers import Mixers
from specformer.scripts.parts.provenance import has_bfloat16, provenance

LFM2 = dict(
    vocab_size=65536,
    hidden_size=1024,
    num_attention_heads=16,
    num_key_value_heads=8,
    num_hidden_layers=16,
    intermediate_size=6656,  # of which the model makes 4608 (block_auto_adjust_ff_dim)
)
QWEN = dict(
    vocab_size=248320,
    hidden_size=1024,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=256,
    num_hidden_layers=24,
    intermediate_size=3584,
)
RULE = dict(linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128)
TINY = dict(
    vocab_size=512,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=4,
    intermediate_size=128,
)
TINY_RULE = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
ATTENTION = (2, 5, 8, 10, 12, 14)
TARGETS = {
    "tiny LFM2": ("Lfm2Config", dict(TINY, layer_types=["conv", "full_attention"] * 2)),
    "tiny Qwen3.5": ("Qwen3_5TextConfig", dict(TINY, **TINY_RULE, head_dim=16)),
    "LFM2-350M": (
        "Lfm2Config",
        dict(LFM2, layer_types=["full_attention" if layer in ATTENTION else "conv" for layer in range(16)]),
    ),
    "Qwen3.5-0.8B": ("Qwen3_5TextConfig", dict(QWEN, **RULE)),
}
WARM_UP = 1
"""Turns of a call that are not counted, in which weights are packed and kernels loaded."""


def make_target(name: str, dtype: torch.dtype, device: torch.device):
    kind, sizes = TARGETS[name]
    config = getattr(transformers, kind)(**sizes, tie_word_embeddings=True, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Turns(Drafter):
    """Drafts random tokens, another number in each round, and takes the time of the rounds.

    Args:
        drafted: numbers of tokens, from 0 on.
        vocab_size: of which they are.
        seconds: what adds up, by part of a round.

    Attributes:
        shares_products: whether linear layers of mixers get all tokens of this round at once.
        rounds: by drafts and `shares_products`, the seconds of each round of the whole batch, and those of its parts.
    """

    def __init__(self, drafted: list[int], vocab_size: int, seconds: Counter):
        self.max_draft_tokens, self.vocab_size, self.seconds = max(drafted), vocab_size, seconds
        self.turns = [(k, shares) for shares in (True, False) for k in drafted if k or shares]
        self.rounds: defaultdict[tuple[int, bool], list[tuple[float, Counter]]] = defaultdict(list)
        self.turn, self.shares_products = None, True

    def begin(self, prompts: Prompts) -> None:
        self.num_rows, self.next, self.is_whole = len(prompts.input_ids), cycle(self.turns), True

    def propose(self, num_tokens: int, choose) -> Proposal:
        now = time.perf_counter()
        if self.turn is not None:
            self.rounds[self.turn].append((now - self.began, self.seconds - self.before))
        self.turn = next(self.next) if self.is_whole and num_tokens == self.max_draft_tokens else None
        k, self.shares_products = self.turn or (0, True)
        self.began, self.before = now, self.seconds.copy()
        return Proposal(torch.randint(self.vocab_size, (self.num_rows, k)))

    def select_rows(self, index, longest) -> None:
        self.num_rows, self.is_whole = len(index), False


def timed(part: str, seconds: Counter, owner: type, name: str):
    """A context in which what method `name` of `owner` takes is added to the `seconds` of its part."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - start

    return patch.object(owner, name, call)


def products_of(turns: Turns) -> Callable:
    """In the place of that of `SharedProducts`: where the round is not to share them, each token by itself."""
    shared = SharedProducts.__torch_function__

    def product(self, function, types, args=(), kwargs=None):
        if turns.shares_products:
            return shared(self, function, types, args, kwargs)
        return function(*args, **(kwargs or {}))

    return product


class Stamps(transformers.generation.BaseStreamer):
    """When each token came, the prompt being the first."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def plain_steps(target, batch: dict, steps: int) -> list[float]:
    """Seconds of the steps of plain generate()."""
    stamps = Stamps()
    target.generate(**batch, max_new_tokens=1 + WARM_UP + steps, do_sample=False, streamer=stamps)
    _, *of_tokens = stamps.times
    return [end - start for start, end in pairwise(of_tokens)][WARM_UP:]


def measure(target, batch_size: int, context: int, drafted: list[int], repeats: int) -> list[dict]:
    """Rounds beside plain steps, by the number of drafts, 0 among them."""
    prompts = torch.randint(target.config.vocab_size, (batch_size, context), device=target.device)
    batch = dict(input_ids=prompts, attention_mask=torch.ones_like(prompts))
    seconds: Counter = Counter()
    turns = Turns([0, *drafted], target.config.vocab_size, seconds)
    rounds = (WARM_UP + repeats) * len(turns.turns)
    # more, since a random token may be right, and the last rounds have no room for all drafts
    new_tokens = 2 * turns.max_draft_tokens + rounds + rounds // 8
    plain = plain_steps(target, batch, repeats)
    with (
        timed("mixers", seconds, Mixers, "__call__"),
        timed("states", seconds, StateLayer, "recall"),
        timed("states", seconds, StateLayer, "remember"),
        patch.object(SharedProducts, "__torch_function__", products_of(turns)),
    ):
        specformer.generate(
            target,
            turns,
            **batch,
            max_new_tokens=new_tokens,
            num_assistant_tokens=turns.max_draft_tokens,
            do_sample=False,
        )
    plain += plain_steps(target, batch, repeats)
    found, step = [], median(plain)
    for k in (0, *drafted):
        shared, each = (turns.rounds[k, shares][WARM_UP:] for shares in (True, False))
        whole = median(taken for taken, _ in shared)
        found.append(
            {
                "batch_size": batch_size,
                "drafted": k,
                "rounds": len(shared),
                "plain_step_seconds": step,
                "round_seconds": whole,
                "break_even_tokens_per_pass": whole / step,
                "share_of_mixers": median(parts["mixers"] / taken for taken, parts in shared),
                "share_of_states": median(parts["states"] / taken for taken, parts in shared),
                "round_seconds_with_weights_read_per_token": median(taken for taken, _ in each) if k else whole,
            }
        )
    return found


def table(rounds: list[dict]) -> list[str]:
    """Markdown: one line per target and batch size, with the break-even of each number of drafts."""
    numbers = sorted({each["drafted"] for each in rounds})
    most = numbers[-1]
    titles = ["target", "rows", "plain step, ms", *("1 draft" if k == 1 else f"{k} drafts" for k in numbers)]
    titles += [f"in modules with states, at {most}", "in their states", f"{most} drafts, weights read per token"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    by_place: defaultdict[tuple[str, int], dict[int, dict]] = defaultdict(dict)
    for each in rounds:
        by_place[each["target"], each["batch_size"]][each["drafted"]] = each
    for (target, batch_size), by_drafts in by_place.items():
        widest = by_drafts[most]
        step = widest["plain_step_seconds"]
        lines.append(
            f"| {target} | {batch_size} | {1000 * step:.1f} | "
            + " | ".join(f"{by_drafts[k]['break_even_tokens_per_pass']:.2f}" for k in numbers)
            + f" | {widest['share_of_mixers']:.0%} | {widest['share_of_states']:.0%} | "
            f"{widest['round_seconds_with_weights_read_per_token'] / step:.2f} |"
        )
    return lines


def main(arguments: argparse.Namespace) -> None:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    result = {
        **provenance("benchmarks.hybrid_cost"),
        "regime": {name: getattr(arguments, name) for name in ("dtype", "device", "context", "repeats")},
        "parameters": {},
        "rounds": [],
    }
    for name in arguments.targets:
        target = make_target(name, dtype, device)
        result["parameters"][name] = target.num_parameters()
        for batch_size in tqdm(arguments.batch_sizes, desc=f"{name}, {target.num_parameters():,} parameters"):
            found = measure(target, batch_size, arguments.context, arguments.drafted, arguments.repeats)
            result["rounds"] += [{"target": name, **each} for each in found]
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        del target  # before the next one takes memory
    print("\n".join(table(result["rounds"])))


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is no number of drafts; expected 1 or more. 0 is always measured.")
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = "bfloat16" if has_bfloat16() else "float32"
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtype", default=own, choices=["float32", "bfloat16"], help=f"default: {own}, on this CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--drafted", type=positive, nargs="+", default=[1, 2, 4, 8], help="numbers of drafts beside 0")
    parser.add_argument("--context", type=int, default=64, help="tokens of each row's prompt")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each kind; twice as many plain steps")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
