"""A target that several processes share: is a drafter better whole in each of them, or shared as well?

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.divided --target Qwen2.5-Coder-1.5B-Instruct \\
        --assistant Qwen2.5-Coder-0.5B-Instruct --prompts prompts.jsonl --output divided.json

Each process makes the same calls with a tensor-parallel target; ways take turns, with another prompt each turn. Greedy,
one row unless --batch-size is given, a fixed number of drafts, so that a round does the same in all ways of one
drafter. Seconds are the first process's, with a barrier before each call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from specformer import generate
from specformer.scripts.benchmark import make_batches, save
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.provenance import provenance

PLAIN, WHOLE, SHARED, NETWORK = "plain generate", "assistant, whole", "assistant, shared", "SpecFormer, whole"


def measure(target, batch: dict, drafter, arguments: argparse.Namespace) -> dict:
    """Seconds of one call, and what came of it. `drafter` is `None` for plain generate()."""
    fixed = dict(max_new_tokens=arguments.max_new_tokens, do_sample=False, eos_token_id=None)
    distributed.barrier()
    start = time.perf_counter()
    if drafter is None:
        sequences = target.generate(**batch, **fixed)
        return {"seconds": time.perf_counter() - start, "tokens": sequences[:, batch["input_ids"].shape[1] :].tolist()}
    drafted = dict(num_assistant_tokens=arguments.num_assistant_tokens, tree_size=0, prompt_lookup_num_tokens=0)
    output = generate(target, drafter, **batch, **fixed, **drafted, return_dict_in_generate=True)
    return {
        "seconds": time.perf_counter() - start,
        "tokens": output.sequences[:, batch["input_ids"].shape[1] :].tolist(),
        "tokens_per_pass": output.statistics.tokens_per_pass,
    }


def summary(turns: list[dict[str, dict]]) -> dict[str, dict]:
    """Of each way: how often a text is plain generate()'s, and medians over the turns."""
    found = {}
    for way in turns[0]:
        times = [turn[PLAIN]["seconds"] / turn[way]["seconds"] for turn in turns]
        found[way] = {
            "seconds": round(statistics.median(turn[way]["seconds"] for turn in turns), 2),
            "times_plain": round(statistics.median(times), 3),
            "times_plain_from_to": [round(min(times), 3), round(max(times), 3)],
            "tokens_per_pass": round(statistics.mean(turn[way].get("tokens_per_pass", 1.0) for turn in turns), 3),
            "identical_turns": sum(turn[way]["tokens"] == turn[PLAIN]["tokens"] for turn in turns),
        }
    return found


def main(arguments: argparse.Namespace) -> None:
    distributed.init_process_group("gloo")
    processes, dtype = distributed.get_world_size(), getattr(torch, arguments.dtype)

    def load(name: str, shared: bool):
        divided = dict(distributed_config=DistributedConfig(tp_size=processes)) if shared else {}
        return AutoModelForCausalLM.from_pretrained(find_target(name)[0], dtype=dtype, **divided).eval()

    target, drafters = load(arguments.target, shared=True), {PLAIN: None}
    if arguments.assistant:
        drafters |= {WHOLE: load(arguments.assistant, shared=False), SHARED: load(arguments.assistant, shared=True)}
    if arguments.drafter:
        drafters[NETWORK] = AutoModel.from_pretrained(arguments.drafter, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(find_target(arguments.target)[0], padding_side="left")
    prompts, turns_to_make = read_prompts(arguments.prompts), arguments.repeats + 1
    batches = make_batches(tokenizer, prompts, arguments.batch_size, turns_to_make, None, "cpu")
    regime = {name: value for name, value in vars(arguments).items() if name not in ("output", "prompts")}
    turns: list[dict[str, dict]] = []
    for number, batch in enumerate(batches):
        names = list(drafters)
        order = names[number % len(names) :] + names[: number % len(names)]
        turn = {name: measure(target, batch, drafters[name], arguments) for name in order}
        if not number:  # the first one warms up
            continue
        turns.append({name: turn[name] for name in names})
        if distributed.get_rank() == 0:
            found = {"processes": processes, "regime": regime, "turns": len(turns), "summary": summary(turns)}
            save(arguments.output, {**provenance("benchmarks.divided"), **found})
            print(found["summary"], flush=True)
    distributed.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="folder, Hub id or name of `specformer fetch`")
    parser.add_argument("--assistant", help="a smaller causal LM, loaded whole and shared")
    parser.add_argument("--drafter", help="folder or Hub id of a SpecFormer drafter, whole in each process")
    parser.add_argument("--prompts", required=True, help="jsonl file")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--num-assistant-tokens", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
