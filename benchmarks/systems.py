"""The systems that need no training, or learn while they serve, beside copies, an assistant and the default drafter.

    python -m benchmarks.systems --target Qwen2.5-Coder-1.5B-Instruct --assistant Qwen2.5-Coder-0.5B-Instruct \\
        --prompts mt_bench.jsonl --output systems.json
    python -m benchmarks.systems --drafter . --prompts mbpp.jsonl --output systems.json
    python -m benchmarks.systems --drafter . --prompts mt_bench.jsonl --then mbpp.jsonl --ways none --minutes 20 \\
        --output switch.json

All prompts once, in batches, by every way in turn; greedy, each row --max-new-tokens tokens. Then once more those ways
whose store is full by then. Speeds are times plain generate() of the same batch, tokens per target pass of all rows.
What a way remembers lies in a folder beside --output, so that a run that is stopped goes on by the same command; pairs
of models, kinds of prompts and sizes of batches add up in one file. For each of them it is told

- of `Reader`: the run that fills its store, the second run over the full store, and one whose store holds the answers
  to the other half of the prompts;
- of `TrigramChains`: both halves of the prompts, adapted and frozen;
- of `Hierarchy`: passes of the middle model for each accepted token, beside the middle model alone;
- of `PathSearch`: drafts accepted for each pass beside the drafter's best tokens, at the same length;
- of `LayerParallel`: groups of 1, 2 and 4 layers beside the assistant: how often drafts are accepted that are looked
  at, and whether those accepted with groups of 1 are the assistant's, token for token;
- with --then, of `OnlineDistillation`: see `domain_switch`.

With --minutes it ends by itself after about that time, and goes on by the same command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from benchmarks.domain_switch import switch_of_domain
from specformer import (
    AnswerStore,
    Hierarchy,
    LayerParallel,
    PathSearch,
    Reader,
    TrigramChains,
    TrigramTable,
    generate,
)
from specformer.scripts.benchmark import save
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.prompts import encode, read_prompts
from specformer.scripts.parts.provenance import provenance

PLAIN, SECOND, OTHERS = "plain generate", "Reader, second run", "Reader, answers to other prompts"
ADAPTED, FROZEN, HIERARCHY, MIDDLE = "TrigramChains", "TrigramChains, frozen", "Hierarchy", "assistant"
PATHS, BEST = "PathSearch", "drafter alone"
GROUPS = {f"LayerParallel, groups of {size}": size for size in (1, 2, 4)}
GROWN = 2**22


class Ways:
    """Every way to generate, and what those remember that learn.

    Args:
        state: the folder for that.
        length: tokens to draft.
    """

    def __init__(self, target, assistant, drafter, state: Path, length: int):
        self.target, self.state, self.length = target, state, length
        self.tables = {name: self._table(name, frozen=name == FROZEN) for name in (ADAPTED, FROZEN, PATHS)}
        k = dict(num_assistant_tokens=length)
        self.first: dict[str, Callable[[], tuple[object, dict]]] = {
            "copies": lambda: (None, dict(prompt_lookup_num_tokens=length)),
            "copies, auto": lambda: (None, dict(prompt_lookup_num_tokens=length, num_assistant_tokens="auto")),
            "Reader": lambda: (Reader(self._store("grown", GROWN), num_tokens=length), k),
            ADAPTED: lambda: (TrigramChains(self.tables[ADAPTED]), k),
            FROZEN: lambda: (TrigramChains(self.tables[FROZEN]), k),
        }
        self.second: dict[str, Callable[[], tuple[object, dict]]] = {
            SECOND: lambda: (Reader(self._store("grown"), num_tokens=length), k),
        }
        if assistant is not None:
            self.hierarchy = Hierarchy(Reader(), assistant)
            self.first |= {MIDDLE: lambda: (assistant, k), HIERARCHY: lambda: (self.hierarchy, k)}
            systems = {name: LayerParallel(assistant, size) for name, size in GROUPS.items()}
            self.first |= {name: partial(lambda system: (system, k), system) for name, system in systems.items()}
        if drafter is not None:
            slots = dict(num_assistant_tokens=drafter.config.num_draft_tokens)
            self.first |= {
                "default drafter, auto": lambda: (drafter, dict(num_assistant_tokens="auto")),
                BEST: lambda: (drafter, slots | dict(prompt_lookup_num_tokens=0)),
                PATHS: lambda: (PathSearch(drafter, self.tables[PATHS]), slots),
                "Reader with the drafter": lambda: (Reader(self._store("with", GROWN), drafter, length), k),
            }

    def others(self, half: int) -> tuple[object, dict]:
        """With the answers to the other half of the prompts."""
        return Reader(self._store(f"half-{1 - half}"), num_tokens=self.length), dict(num_assistant_tokens=self.length)

    def keep_answers(self, half: int, texts: list[list[int]]) -> None:
        self._store(f"half-{half}", GROWN).add(texts)

    def keep(self, name: str) -> None:
        """What a way has learned, on disk."""
        if name in self.tables and not self.tables[name].frozen:
            self.tables[name].save(self.state / f"{name}.safetensors")

    def _table(self, name: str, frozen: bool) -> TrigramTable:
        path = self.state / f"{name}.safetensors"
        return TrigramTable.load(path) if path.exists() else TrigramTable(frozen=frozen)

    def _store(self, name: str, grows: int = 0) -> AnswerStore:
        return AnswerStore(self.state / name, grows)


def measure(target, batch: dict, assistant, settings: dict, new_tokens: int, expected: torch.Tensor | None) -> dict:
    """What came of one batch: seconds, and beside plain generate() the passes and whose text it is."""
    fixed = dict(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    start = time.perf_counter()
    if expected is None:
        target.generate(**batch, **fixed)
        return {"seconds": time.perf_counter() - start}
    output = generate(target, assistant, **batch, **fixed, **settings, return_dict_in_generate=True)
    seconds, counts = time.perf_counter() - start, output.statistics
    return {
        "seconds": seconds,
        "tokens": sum(count - 1 for count in counts.tokens_per_row),
        "passes": sum(counts.target_passes_per_row),
        "accepted": sum(counts.accepted_per_slot),
        "looked_at": sum(
            min(drafted, before)
            for drafted, before in zip(counts.drafted_per_slot, [sys.maxsize, *counts.accepted_per_slot], strict=False)
        ),
        "which": zlib.crc32(json.dumps(counts.was_drafted).encode()),  # of the tokens were drafted
        "drafted_tokens_a_row": sum(length * rounds for length, rounds in counts.rounds_per_length.items()),
        "identical": int((output.sequences == expected).all(dim=1).sum()),
        "rows": len(expected),
    }


def summary(turns: list[dict]) -> dict[str, dict]:
    """Of each way, over the batches of one place."""
    plain = {turn["batch"]: turn["seconds"] for turn in turns if turn["way"] == PLAIN}
    found: dict[str, dict] = {}
    for name in dict.fromkeys(turn["way"] for turn in turns if turn["way"] != PLAIN):
        of_way = sorted((turn for turn in turns if turn["way"] == name), key=lambda turn: turn["batch"])

        def per_pass(some: list[dict]) -> float | None:
            passes = sum(turn["passes"] for turn in some)
            return round(sum(turn["tokens"] for turn in some) / passes, 3) if passes else None

        half = len(of_way) // 2
        found[name] = {
            "tokens_per_pass": per_pass(of_way),
            "first_half": per_pass(of_way[:half]),
            "second_half": per_pass(of_way[half:]),
            "accepted_per_pass": round(
                sum(turn["accepted"] for turn in of_way) / max(1, sum(turn["passes"] for turn in of_way)), 3
            ),
            "acceptance": round(
                sum(turn["accepted"] for turn in of_way) / max(1, sum(turn["looked_at"] for turn in of_way)), 4
            ),
            "times_plain": round(statistics.median(plain[turn["batch"]] / turn["seconds"] for turn in of_way), 3),
            "identical": f"{sum(turn['identical'] for turn in of_way)}/{sum(turn['rows'] for turn in of_way)}",
        }
        middle = [turn["middle_passes"] for turn in of_way if "middle_passes" in turn]
        if middle:
            found[name]["middle_passes_per_accepted"] = round(
                sum(middle) / max(1, sum(turn["accepted"] for turn in of_way)), 3
            )
        if GROUPS.get(name) == 1:
            of_assistant = {turn["batch"]: turn["which"] for turn in turns if turn["way"] == MIDDLE}
            found[name]["as_the_assistant"] = all(of_assistant.get(turn["batch"]) == turn["which"] for turn in of_way)
    return found


class Clock:
    """How much of the time of a run is over.

    Args:
        minutes: of all places together; `None`: no end.
        places: that follow one another.
    """

    def __init__(self, minutes: float | None, places: int):
        self.minutes, self.places, self.begun = minutes, places, time.perf_counter()

    def is_within(self, place: int, share: float) -> bool:
        """Whether there is time for more at a place, of whose time it may go on for `share`."""
        if self.minutes is None:
            return True
        return time.perf_counter() - self.begun < 60 * self.minutes * (place + share) / self.places


def main(arguments: argparse.Namespace) -> None:
    folder, identity = find_target(arguments.target)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    dtype = getattr(torch, arguments.dtype)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assistant = drafter = None
    if arguments.assistant:
        assistant = AutoModelForCausalLM.from_pretrained(find_target(arguments.assistant)[0], dtype=dtype).eval()
    if arguments.drafter:
        drafter = AutoModel.from_pretrained(arguments.drafter).eval()
    prompts, kind = read_prompts(arguments.prompts, arguments.limit), Path(arguments.prompts).stem
    regime = {"max_new_tokens": arguments.max_new_tokens, "num_assistant_tokens": arguments.num_assistant_tokens}
    result = {**provenance("benchmarks.systems"), "regime": regime, "turns": []}
    if arguments.output.exists():
        there = json.loads(arguments.output.read_text(encoding="utf-8"))
        if there["regime"] != regime:
            raise ValueError(f"{arguments.output} holds {there['regime']}, and {regime} was asked for.")
        result |= {name: there[name] for name in ("turns", "summary", "switches", "switch_summary") if name in there}
    clock = Clock(arguments.minutes, len(arguments.batch_sizes))
    for at, size in enumerate(arguments.batch_sizes):
        place = {"target": Path(identity).name, "dtype": arguments.dtype, "prompts": kind, "batch_size": size}
        if arguments.ways != ["none"]:
            is_within = lambda share, at=at: clock.is_within(at, share * (0.6 if arguments.then else 1))  # noqa: E731
            run(target, assistant, drafter, tokenizer, prompts, place, result, arguments, is_within)
        if arguments.then:
            is_within = partial(clock.is_within, at, 1.0)
            others = read_prompts(arguments.then, arguments.limit)
            place |= {"then": Path(arguments.then).stem}
            learning = assistant if drafter is None else drafter
            switch_of_domain(target, learning, tokenizer, (prompts, others), place, result, arguments, is_within)
    print(json.dumps({name: result.get(name) for name in ("summary", "switch_summary")}, indent=2))


def run(target, assistant, drafter, tokenizer, prompts, place: dict, result: dict, arguments, is_within) -> None:
    """All ways at one place, whose turns are added to `result`. `is_within(share)` tells whether there is time."""
    state = arguments.output.with_suffix("") / "-".join(map(str, place.values()))
    mine = [turn for turn in result["turns"] if {name: turn[name] for name in place} == place]
    if not mine and state.exists():  # of a run whose results are gone
        shutil.rmtree(state)
    ways = Ways(target, assistant, drafter, state, arguments.num_assistant_tokens)
    size = place["batch_size"]
    batches = [dict(encode(tokenizer, prompts[at : at + size])) for at in range(0, len(prompts), size)]
    answers: dict[int, torch.Tensor] = {}
    done = {(turn["way"], turn["batch"]) for turn in mine}

    def answer(number: int) -> torch.Tensor:
        if number not in answers:
            fixed = dict(max_new_tokens=arguments.max_new_tokens, do_sample=False, eos_token_id=None)
            answers.clear()
            answers[number] = target.generate(**batches[number], **fixed)
        return answers[number]

    def turn(name: str, number: int, make: Callable[[], tuple[object, dict]] | None) -> None:
        if (name, number) in done or not (name == PLAIN or is_wanted(name)):
            return
        expected = None if make is None else answer(number)
        model, settings = (None, {}) if make is None else make()
        before = ways.hierarchy.costs.passes if name == HIERARCHY else 0
        figures = measure(target, batches[number], model, settings, arguments.max_new_tokens, expected)
        if name == HIERARCHY:
            figures["middle_passes"] = ways.hierarchy.costs.passes - before
        elif name == MIDDLE:
            figures["middle_passes"] = figures["drafted_tokens_a_row"]
        ways.keep(name)
        result["turns"].append({**place, "way": name, "batch": number, **figures})
        done.add((name, number))
        here = [turn for turn in result["turns"] if {name: turn[name] for name in place} == place]
        result.setdefault("summary", {})["-".join(map(str, place.values()))] = summary(here)
        save(arguments.output, result)

    is_wanted = lambda name: arguments.ways is None or any(part in name for part in arguments.ways)  # noqa: E731
    half_of = lambda number: int(number >= len(batches) // 2)  # noqa: E731
    for number in tqdm(range(len(batches)), desc=f"{place['prompts']}, batches of {size}"):
        if not is_within(0.7):
            break
        turn(PLAIN, number, None)
        names = list(ways.first)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # an order that moves on
            turn(name, number, ways.first[name])
        if is_wanted(OTHERS) and (OTHERS, number) not in done:
            masks = batches[number]["attention_mask"].sum(dim=1).tolist()
            width = batches[number]["input_ids"].shape[1]
            texts = [row[width - count :].tolist() for row, count in zip(answer(number), masks, strict=True)]
            ways.keep_answers(half_of(number), texts)
    read = [number for number in range(len(batches)) if (PLAIN, number) in done]
    for number in tqdm(read, desc="second run"):
        if not is_within(1.0):
            break
        for name, make in ways.second.items():
            turn(name, number, make)
        if len(read) == len(batches) > 1:  # or there is no other half
            turn(OTHERS, number, partial(ways.others, half_of(number)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder, Hub id or name of `specformer fetch`; default SmolLM2-135M-Instruct")
    parser.add_argument("--assistant", help="a smaller causal LM: alone, and as the middle model of a hierarchy")
    parser.add_argument("--drafter", help="folder or Hub id of a SpecFormer drafter of the target")
    parser.add_argument("--prompts", required=True, help="jsonl file")
    parser.add_argument("--limit", type=int, help="only the first so many prompts of a file")
    parser.add_argument("--then", help="jsonl file of another domain: also show a drafter that learns the change")
    parser.add_argument("--ways", nargs="+", help="only ways with these in their names; none: only what --then shows")
    parser.add_argument("--minutes", type=float, help="end by itself after about that time")
    parser.add_argument("--every", type=int, default=8, help="texts after which the drafter learns")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-assistant-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; begun or gone on with")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
