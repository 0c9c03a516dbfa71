"""Time plain generate() and this package on the same prompts, in turn, in one process.

    specformer bench --prompts prompts.jsonl --output benchmarks/results/benchmark_cpu.json
    specformer bench --prompts prompts.jsonl --target <model> --drafter <drafter> --dtype bfloat16 \
        --batch-sizes 1 2 4 8 16 --num-assistant-tokens auto 4 --tree-sizes 8 16 --contenders "default, " \
        --output trees.json

Contenders are in contenders.py. Besides the default drafter (or --drafter), copies and an --assistant there are some
that know the text and cost nothing: always right and always wrong, what drafting could give and what it costs; right at
7 of 10 tokens, the same ones in all rows, which then advance in step, or each row's own: what raggedness costs. Every
row writes exactly --max-new-tokens tokens, so that all do the same work. Each turn has a batch of its own, spread over
the prompts, and runs every contender once, in an order that moves on. Times and ratios are medians over the turns, and
ratios are taken within a turn.

The output is written after every turn. A stopped run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from specformer.generation.call_statistics import GenerationStatistics
from specformer.generation.drafter_loading import drafting_model
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.contenders import PLAIN, KnownText, Way, ways
from specformer.scripts.parts.peak_memory import PeakMemory
from specformer.scripts.parts.prompt_rows import Prompt
from specformer.scripts.parts.prompts import encode, encode_each, read_prompts, template_arguments
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
NO_DRAFTER = "none"
DECODING: dict[str, dict] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=0.7, top_k=50, top_p=0.9),
}


def timed(device: torch.device, way: Way, batch: dict):
    """Token ids, statistics, and seconds."""
    if way.prepare is not None:
        way.prepare(**batch)
    torch.manual_seed(0)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    sequences, counts = way.call(**batch)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return sequences, counts, time.perf_counter() - start


class Contest:
    """All contenders on the batches of one kind.

    Args:
        ways_of: from a batch, and what plain generate() writes (B, P + T), to the contenders by name.
    """

    def __init__(self, ways_of: Callable[[dict, torch.Tensor], dict[str, Way]]):
        self.ways_of = ways_of
        self.lengths: list[int] = []  # of prompts
        self.tokens = self.texts = 0  # of a turn's answers
        self.plain: list[str] = []
        self.first_call: dict[str, dict] = {}  # by contender, its figures
        self.turns: dict[str, list[dict]] = {}  # by contender, what came of each turn

    def run(self, batch: dict, expected: torch.Tensor, first: int, is_first_call: bool) -> Iterator[str]:
        """A turn: `batch` with every contender from the one at place `first` on. Yields the name of each that is
        through. First calls, which compile, measure and fill caches, are kept apart; their memory is looked at, since
        that may change the times of what follows."""
        found = self.ways_of(batch, expected)
        names = list(found)
        self.plain = [name for name in names if found[name].is_plain]
        for place in range(len(names)):
            name = names[(first + place) % len(names)]
            if is_first_call:
                peak = PeakMemory(expected.device)
                seconds = timed(expected.device, found[name], batch)[2]
                self.first_call[name] = {"first_call_seconds": seconds, "first_call_gib": peak.gib()}
            else:
                sequences, counts, seconds = timed(expected.device, found[name], batch)
                figures = {"seconds": seconds, "identical": int((sequences == expected).all(dim=1).sum())}
                self.turns.setdefault(name, []).append({**figures, "counts": counts})
            yield name
        if not is_first_call:
            self.lengths += batch["attention_mask"].sum(dim=1).tolist()
            self.tokens, self.texts = expected[:, batch["input_ids"].shape[1] :].numel(), len(expected)

    def result(self) -> dict:
        """Figures of the turns so far."""
        seconds = {name: [turn["seconds"] for turn in turns] for name, turns in self.turns.items()}
        best_plain = min(self.plain, key=lambda name: statistics.median(seconds[name]))
        table = {}
        for name in self.first_call:
            turns = self.turns[name]
            figures = {"tokens_per_second": self.tokens / statistics.median(seconds[name]), **self.first_call[name]}
            for reference, key in ((PLAIN, "ratio_to_plain"), (best_plain, "ratio_to_best_plain")):
                ratios = [base / own for base, own in zip(seconds[reference], seconds[name], strict=True)]
                figures[key] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            figures["identical"] = sum(turn["identical"] for turn in turns)
            counted = [turn["counts"] for turn in turns]
            if counted[0] is not None:
                figures |= rounds_of(counted, sum(seconds[name]))
            table[name] = figures
        turns = len(seconds[PLAIN])
        return {
            "batch_size": self.texts,
            "prompt_tokens": {"shortest": min(self.lengths), "longest": max(self.lengths)},
            "turns": turns,
            "texts": turns * self.texts,
            "best_plain": best_plain,
            "contenders": table,
        }


def rounds_of(counted: list[GenerationStatistics], seconds: float) -> dict:
    """Tokens per target pass, rounds of each draft length and where the time went, of several calls that took
    `seconds` together."""
    passes = sum(sum(counts.target_passes_per_row) for counts in counted)
    tokens = sum(sum(counts.tokens_per_row) - counts.batch_size for counts in counted)
    lengths: Counter[int] = Counter()
    parts: defaultdict[str, float] = defaultdict(float)
    for counts in counted:
        lengths.update(counts.rounds_per_length)
        for part, spent in counts.seconds.items():
            parts[part] += spent
    shares = {part: spent / seconds for part, spent in parts.items()}
    return {
        "tokens_per_pass": tokens / passes if passes else None,
        "rounds_per_length": {str(length): lengths[length] for length in sorted(lengths)},
        "share_of_time": {**shares, "other": 1 - sum(shares.values())},
    }


def make_batches(
    tokenizer,
    prompts: list[Prompt],
    batch_size: int,
    turns: int,
    prompt_tokens: int | None,
    device,
    same: bool = False,
    template_kwargs: dict | None = None,
) -> list[dict]:
    """A batch for every turn, each spread over all prompts; or of pieces of `prompt_tokens` tokens of all prompts in a
    row. `same`: the rows of a batch are one prompt again and again."""
    if same:
        batches = make_batches(tokenizer, prompts, 1, turns, prompt_tokens, device, template_kwargs=template_kwargs)
        return [{name: part.repeat(batch_size, 1) for name, part in batch.items()} for batch in batches]
    if prompt_tokens is None:
        if batch_size > len(prompts):
            raise ValueError(f"a batch of {batch_size} was asked for, and there are {len(prompts)} prompts.")
        spread = [
            [(turn + turns * row) * len(prompts) // (batch_size * turns) for row in range(batch_size)]
            for turn in range(turns)
        ]
        encoded = [encode(tokenizer, [prompts[place] for place in row], template_kwargs) for row in spread]
        return [dict(batch.to(device)) for batch in encoded]
    texts = [
        prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
        for prompt in prompts
    ]
    stream = itertools.chain.from_iterable(tokenizer(text)["input_ids"] for text in itertools.cycle(texts))
    ids = torch.tensor(list(itertools.islice(stream, turns * batch_size * prompt_tokens)), device=device)
    batches = ids.view(turns, batch_size, prompt_tokens)
    return [dict(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in batches]


def begin(output: Path | None, result: dict) -> dict:
    """`result`, or what a stopped run with the same regime left of it."""
    if output is None or not output.exists():
        return result
    before = json.loads(output.read_text(encoding="utf-8"))
    if before.get("finished") is False and before["regime"] == result["regime"]:
        print(f"Going on with {output}: {len(before['contests'])} contests are there.")
        return before
    return result


def save(output: Path | None, result: dict) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}")
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        temporary.replace(output)


def main(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = read_prompts(arguments.prompts)
    known: dict[str, KnownText] = {}
    name, identity = find_target(arguments.target)
    tokenizer, template_kwargs = AutoTokenizer.from_pretrained(name), arguments.chat_template_kwargs
    encode_each(tokenizer, prompts, arguments.prompts, template_kwargs)  # refuses what it must before the work begins
    target = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).eval()
    target.to("cuda" if torch.cuda.is_available() else "cpu")
    drafter = None
    if arguments.drafter != NO_DRAFTER:
        drafter = drafting_model(arguments.drafter, target)
    assistant = None
    if arguments.assistant:
        assistant = AutoModelForCausalLM.from_pretrained(arguments.assistant, dtype=target.dtype).to(target.device)
    regime = {
        "target": identity,
        "dtype": arguments.dtype,
        "prompts": Path(arguments.prompts).name,
        "max_new_tokens": arguments.max_new_tokens,
        "turns": arguments.repeats,
        "lengths": arguments.num_assistant_tokens,
        **({"tree_sizes": arguments.tree_sizes} if arguments.tree_sizes else {}),
        "decoding": {decoding: DECODING[decoding] for decoding in arguments.decoding},
        "batch_sizes": arguments.batch_sizes,
        "prompt_tokens": arguments.prompt_tokens,
        "same_prompt": arguments.same_prompt,
        **({"chat_template_kwargs": template_kwargs} if template_kwargs else {}),
    }
    new = {**provenance("specformer.scripts.benchmark"), "regime": regime, "finished": False, "contests": []}
    result = begin(arguments.output, new)
    every = list(itertools.product(arguments.prompt_tokens or [None], arguments.decoding, arguments.batch_sizes))
    whole = [contest for contest in result["contests"] if contest["turns"] == arguments.repeats]

    def ways_of(batch: dict, expected: torch.Tensor) -> dict[str, Way]:
        answer = expected[:, batch["input_ids"].shape[1] :]
        lengths, sizes = arguments.num_assistant_tokens, arguments.tree_sizes
        found = ways(target, drafter, answer, lengths, assistant, known, sizes)
        wanted = arguments.contenders
        return {
            name: way
            for name, way in found.items()
            if way.is_plain or not wanted or any(part in name for part in wanted)
        }

    for number, (prompt_tokens, decoding, batch_size) in enumerate(every[len(whole) :], len(whole) + 1):
        shape = batch_size, arguments.repeats, prompt_tokens
        batches = make_batches(tokenizer, prompts, *shape, target.device, arguments.same_prompt, template_kwargs)
        settings = dict(DECODING[decoding], max_new_tokens=arguments.max_new_tokens, eos_token_id=None)
        known.clear()
        contest, progress = Contest(ways_of), tqdm(desc=f"{number} of {len(every)}", unit="call")
        widest = max(batches, key=lambda batch: batch["input_ids"].shape[1])  # what is compiled for it fits the others
        for turn, batch in enumerate([widest, *batches], -1):
            batch |= settings
            torch.manual_seed(0)
            expected = target.generate(**batch)
            for _ in contest.run(batch, expected, first=turn + 1, is_first_call=turn < 0):
                progress.update()
            if turn < 0:
                progress.reset(total=(arguments.repeats + 1) * progress.n)
                progress.update(len(contest.first_call))
            else:
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
        rate = f"{figures['tokens_per_pass']:.2f}" if figures.get("tokens_per_pass") else ""
        lines.append(
            f"| {name} | {figures['tokens_per_second']:.1f} | {ratio['median']:.2f} ({ratio['min']:.2f}-"
            f"{ratio['max']:.2f}) | {rate} | {figures['identical']} of {contest['texts']} |"
        )
    return lines


def length(text: str) -> int | str:
    return text if text == "auto" else int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--target", help="folder or Hub id; default: the one of `specformer fetch`")
    parser.add_argument(
        "--drafter",
        default=str(ROOT),
        help=f"folder or Hub id of any drafter of the target, or {NO_DRAFTER!r}; default: this checkout",
    )
    parser.add_argument("--assistant", help="a smaller causal LM for transformers' assisted decoding: folder or Hub id")
    parser.add_argument(
        "--chat-template-kwargs",
        type=template_arguments,
        metavar="JSON",
        help="""arguments of the target's chat template, such as '{"enable_thinking": false}'""",
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--decoding", nargs="+", default=["greedy"], choices=list(DECODING))
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", help="cut prompts of so many tokens; default: as they are"
    )
    parser.add_argument(
        "--same-prompt", action="store_true", help="the rows of a batch are one prompt: what different ones cost"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-assistant-tokens", type=length, nargs="+", default=["auto", 4])
    parser.add_argument(
        "--tree-sizes",
        type=int,
        nargs="+",
        default=[],
        help="the drafter also drafts trees of so many tokens, as deep as the largest number of --num-assistant-tokens",
    )
    parser.add_argument("--contenders", nargs="+", help="only plain ones and those with one of these in their names")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
