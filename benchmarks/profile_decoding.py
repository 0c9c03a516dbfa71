"""Where the time of a batch goes: the target, the drafter, and everything else.

    python -m benchmarks.profile_decoding --prompts prompts.jsonl --output benchmarks/results/profile.json

Wall-clock around the target's forward and around the drafter's network and head, on a device that runs them at once
(CPU); what remains of the decode loop is its own: caches, masks, acceptance, stopping, bookkeeping. Of these, what
rows of different lengths cost is named as well: positions, masks, advancing each row by its own number, dropping rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import specformer
from specformer.generation.cache_ragged import RaggedCache
from specformer.scripts.fetch_target import fetch_target
from specformer.scripts.parts.prompts import encode, read_prompts
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def timed_calls(seconds: dict[str, float], part: str, owner, *names: str):
    """Book the time of the methods `names` of `owner` under `part`; calls inside one another count once."""
    depth = 0

    def wrap(method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            nonlocal depth
            depth += 1
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    seconds[part] += time.perf_counter() - started

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name))))
        yield


def profile_once(target, drafter, inputs, arguments) -> dict[str, float]:
    """Seconds of one call by part."""
    seconds: dict[str, float] = defaultdict(float)
    borrow = drafter.borrow

    with ExitStack() as stack:

        def borrow_timed(model):
            borrowed = borrow(model)
            head = ("embed", "draft_logits", "candidates", "tokens_at", "candidate_logits")
            stack.enter_context(timed_calls(seconds, "drafter", borrowed, *head))
            return borrowed

        stack.enter_context(timed_calls(seconds, "target", target, "forward"))
        stack.enter_context(timed_calls(seconds, "alignment", RaggedCache, "prepare", "mask", "advance", "select_rows"))
        stack.enter_context(timed_calls(seconds, "drafter", drafter, "encode_context", "draft"))
        if drafter.config.previous_token_rank is not None:
            stack.enter_context(timed_calls(seconds, "drafter", drafter.previous_token_correction, "forward"))
        if drafter.config.confidence_head:
            stack.enter_context(timed_calls(seconds, "drafter", drafter.confidence_head, "forward"))
        drafter.borrow = borrow_timed
        started = time.perf_counter()
        output = specformer.generate(
            target,
            drafter,
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            num_assistant_tokens=arguments.num_assistant_tokens,
            prompt_lookup_num_tokens=0,  # copies take time as well, which is not the loop's
            return_dict_in_generate=True,
        )
        seconds["total"] = time.perf_counter() - started
        del drafter.borrow
    return {**seconds, "rounds": output.statistics.rounds}


def main(arguments: argparse.Namespace) -> None:
    prompts, folder = read_prompts(arguments.prompts, arguments.batch_size), fetch_target()
    inputs = encode(AutoTokenizer.from_pretrained(folder), prompts)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # in the dtype that it computes in: a copy in another one would not be timed
    drafter = AutoModel.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32)
    profile_once(target, drafter, inputs, arguments)  # the probe, and warm-up
    runs = [profile_once(target, drafter, inputs, arguments) for _ in range(arguments.repeats)]
    outside = [1 - (run["target"] + run["drafter"]) / run["total"] for run in runs]
    result = {
        **provenance("benchmarks.profile_decoding"),
        "regime": {
            "target": drafter.config.target_name_or_path,
            "dtype": "float32",
            "batch_size": arguments.batch_size,
            "max_new_tokens": arguments.max_new_tokens,
            "num_assistant_tokens": arguments.num_assistant_tokens,
            "repeats": arguments.repeats,
        },
        "median_seconds": {
            part: statistics.median(run[part] for run in runs) for part in ("total", "target", "drafter", "alignment")
        },
        "share_outside_the_models": {"median": statistics.median(outside), "min": min(outside), "max": max(outside)},
        "rounds": runs[0]["rounds"],
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--num-assistant-tokens", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    main(parser.parse_args())
