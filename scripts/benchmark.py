"""Time plain generate() and this package on the same different prompts, in turn, in one process.

    python -m specformer.scripts.benchmark --prompts prompts.jsonl --output benchmarks/results/benchmark_cpu.json

Contenders are in contenders.py. Besides the default drafter (or --drafter) there are some that know the text and cost
nothing: always right and always wrong, what drafting could give and what it costs; right at 7 of 10 tokens, the same
ones in all rows, which then advance in step, or each row's own: what raggedness costs. Every row writes exactly
--max-new-tokens tokens, so that all do the same work. Each turn runs every contender once, in an order that moves on;
figures are medians over the turns, ratios are taken within a turn.

The output is written after every turn. A stopped run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from specformer.scripts.contenders import PLAIN, Way, ways
from specformer.scripts.fetch_target import HUB_ID, fetch_target
from specformer.scripts.prompts import encode, read_prompts
from specformer.scripts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
DECODING = {"greedy": dict(do_sample=False), "sampling": dict(do_sample=True, temperature=0.7, top_k=50, top_p=0.9)}


def timed(device: torch.device, way: Way, batch: dict):
    """Token ids, statistics, seconds, and on a GPU the most GiB that were allocated."""
    torch.manual_seed(0)
    peak = None
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
    start = time.perf_counter()
    sequences, counts = way.call(**batch)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        peak = torch.accelerator.max_memory_allocated(device) / 2**30
    return sequences, counts, time.perf_counter() - start, peak


class Contest:
    """All contenders on one batch.

    Args:
        batch: input_ids, attention_mask and generate()'s other arguments.
        found: the contenders, by name.
        expected: what plain generate() writes, (B, P + T).
    """

    def __init__(self, batch: dict, found: dict[str, Way], expected: torch.Tensor):
        self.batch, self.ways, self.expected = batch, found, expected
        self.width = batch["input_ids"].shape[1]
        self.seconds: dict[str, list[float]] = {name: [] for name in found}
        self.first_call: dict[str, float] = {}
        self.figures: dict[str, dict] = {}

    def run(self, name: str) -> None:
        """One call; the first one of each contender is kept apart."""
        sequences, counts, seconds, peak = timed(self.expected.device, self.ways[name], self.batch)
        if name not in self.first_call:
            self.first_call[name] = seconds
            return
        self.seconds[name].append(seconds)
        self.figures[name] = {"identical": int((sequences == self.expected).all(dim=1).sum())}
        if counts is not None:
            parts = {part: value / seconds for part, value in counts.seconds.items()}
            self.figures[name] |= {
                "tokens_per_pass": counts.tokens_per_pass,
                "rounds_per_length": {str(length): n for length, n in sorted(counts.rounds_per_length.items())},
                "share_of_time": {**parts, "other": 1 - sum(parts.values())},
            }
        if peak is not None:
            self.figures[name]["peak_gib"] = peak

    def result(self) -> dict:
        """Figures of every contender that has had a turn after its first call."""
        done = [name for name, times in self.seconds.items() if times]
        turns = min((len(times) for times in self.seconds.values()), default=0)
        medians = {name: statistics.median(self.seconds[name]) for name in done}
        tokens = self.expected[:, self.width :].numel()
        best_plain = min((name for name in done if self.ways[name].is_plain), key=medians.get, default=None)
        table = {}
        for name in done:
            table[name] = {"tokens_per_second": tokens / medians[name], "first_call_seconds": self.first_call[name]}
            for reference, key in ((PLAIN, "ratio_to_plain"), (best_plain, "ratio_to_best_plain")):
                ratios = [base / own for base, own in zip(self.seconds[reference], self.seconds[name], strict=False)]
                table[name][key] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            table[name] |= self.figures[name]
        lengths = self.batch["attention_mask"].sum(dim=1).tolist()
        return {
            "batch_size": len(self.expected),
            "prompt_tokens": {"shortest": min(lengths), "longest": max(lengths)},
            "turns": turns,
            "best_plain": best_plain,
            "contenders": table,
        }


def make_batch(tokenizer, prompts: list[str], batch_size: int, prompt_tokens: int | None, device) -> dict:
    """The first `batch_size` prompts, or as many pieces of `prompt_tokens` tokens of all prompts in a row."""
    if prompt_tokens is None:
        if batch_size > len(prompts):
            raise ValueError(f"a batch of {batch_size} was asked for, and there are {len(prompts)} prompts.")
        return dict(encode(tokenizer, prompts[:batch_size]).to(device))
    stream = itertools.chain.from_iterable(tokenizer(prompt)["input_ids"] for prompt in itertools.cycle(prompts))
    ids = torch.tensor(list(itertools.islice(stream, batch_size * prompt_tokens)), device=device)
    ids = ids.view(batch_size, prompt_tokens)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def begin(output: Path | None, result: dict) -> dict:
    """`result`, or what a stopped run with the same regime left of it."""
    if output is None or not output.exists():
        return result
    before = json.loads(output.read_text())
    if before.get("finished") is False and before["regime"] == result["regime"]:
        print(f"Going on with {output}: {len(before['contests'])} contests are there.")
        return before
    return result


def save(output: Path | None, result: dict) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(output)


def main(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    name = arguments.target or str(fetch_target())
    target = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).eval()
    target.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(name)
    drafter = AutoModel.from_pretrained(arguments.drafter, trust_remote_code=True)
    assistant = None
    if arguments.assistant:
        assistant = AutoModelForCausalLM.from_pretrained(arguments.assistant, dtype=target.dtype).to(target.device)
    prompts = read_prompts(arguments.prompts)
    regime = {
        "target": arguments.target or HUB_ID,
        "dtype": arguments.dtype,
        "prompts": Path(arguments.prompts).name,
        "max_new_tokens": arguments.max_new_tokens,
        "turns": arguments.repeats,
        "lengths": arguments.num_assistant_tokens,
        "decoding": {decoding: DECODING[decoding] for decoding in arguments.decoding},
        "batch_sizes": arguments.batch_sizes,
        "prompt_tokens": arguments.prompt_tokens,
    }
    new = {**provenance("specformer.scripts.benchmark"), "regime": regime, "finished": False, "contests": []}
    result = begin(arguments.output, new)
    every = list(itertools.product(arguments.prompt_tokens or [None], arguments.decoding, arguments.batch_sizes))
    whole = [contest for contest in result["contests"] if contest["turns"] == arguments.repeats]
    for number, (prompt_tokens, decoding, batch_size) in enumerate(every[len(whole) :], len(whole) + 1):
        batch = make_batch(tokenizer, prompts, batch_size, prompt_tokens, target.device)
        batch |= dict(DECODING[decoding], max_new_tokens=arguments.max_new_tokens, eos_token_id=None)
        torch.manual_seed(0)
        expected = target.generate(**batch)
        answer = expected[:, batch["input_ids"].shape[1] :]
        found = ways(target, drafter, answer, arguments.num_assistant_tokens, assistant)
        found = {
            name: way
            for name, way in found.items()
            if name == PLAIN or not arguments.contenders or any(part in name for part in arguments.contenders)
        }
        contest, names = Contest(batch, found, expected), list(found)
        progress = tqdm(total=(arguments.repeats + 1) * len(names), desc=f"{number} of {len(every)}", unit="call")
        for turn in range(arguments.repeats + 1):  # the first one is each contender's first call
            for place in range(len(names)):
                contest.run(names[(turn + place) % len(names)])
                progress.update()
            if turn:
                result["contests"] = [*whole, {"decoding": decoding, **contest.result()}]
                save(arguments.output, result)
        progress.close()
        whole = result["contests"]
        print("\n".join(["", *table(whole[-1])]), flush=True)
    result["finished"] = True
    save(arguments.output, result)


def table(contest: dict) -> list[str]:
    """Markdown: one line per contender."""
    tokens = contest["prompt_tokens"]
    lines = [
        f"Batch {contest['batch_size']}, {contest['decoding']}, prompts of {tokens['shortest']} to {tokens['longest']} "
        f"tokens, medians of {contest['turns']} turns",
        "",
        "| contender | tokens/s | times plain | tokens per pass | identical texts |",
        "|---|---|---|---|---|",
    ]
    for name, figures in contest["contenders"].items():
        ratio = figures["ratio_to_plain"]
        rate = f"{figures['tokens_per_pass']:.2f}" if "tokens_per_pass" in figures else ""
        lines.append(
            f"| {name} | {figures['tokens_per_second']:.1f} | {ratio['median']:.2f} ({ratio['min']:.2f}-"
            f"{ratio['max']:.2f}) | {rate} | {figures['identical']} of {contest['batch_size']} |"
        )
    return lines


def length(text: str) -> int | str:
    return text if text == "auto" else int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--target", help="folder or Hub id; default: the one of fetch_target")
    parser.add_argument("--drafter", default=str(ROOT), help="SpecFormer folder or Hub id; default: this checkout")
    parser.add_argument("--assistant", help="a smaller causal LM for transformers' assisted decoding: folder or Hub id")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--decoding", nargs="+", default=["greedy"], choices=list(DECODING))
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", help="cut prompts of so many tokens; default: as they are"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-assistant-tokens", type=length, nargs="+", default=["auto", 4])
    parser.add_argument(
        "--contenders", nargs="+", help="only plain generate and those with one of these in their names"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
