"""A drafter that learns while it serves (`OnlineDistillation`), before and after what it is asked for changes.

    python -m benchmarks.systems --drafter . --prompts mt_bench.jsonl --then mbpp.jsonl --ways none --output switch.json

All prompts of one file, and then those of another one, in batches, by plain generate(), by the drafter as it was, and
by one that learns, whose state is kept beside --output. `python -m specformer.scripts.plots switch.json` draws tokens
per target pass of both over the prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from tqdm import tqdm

from specformer import OnlineDistillation, generate
from specformer.scripts.benchmark import save
from specformer.scripts.parts.prompts import encode

PLAIN, FROZEN, LEARNING = "plain generate", "frozen", "learning"


def switch_of_domain(
    target, drafter, tokenizer, domains: tuple[list, list], place: dict, result: dict, arguments, is_within: Callable
) -> None:
    """Add the turns of one place to `result["switches"]`, from where they ended.

    Args:
        drafter: a SpecFormer network or a causal LM.
        domains: the prompts of both.
        is_within: whether there is time for another batch.
    """
    if drafter is None:
        raise ValueError("--then shows a drafter that learns; expected --drafter or --assistant as well.")
    name = "-".join(map(str, place.values()))
    state = arguments.output.with_suffix("") / f"{name}.safetensors"
    turns = result.setdefault("switches", {}).setdefault(name, [])
    done = {turn["batch"] for turn in turns}
    settings = dict(every=arguments.every, learning_rate=arguments.learning_rate)
    learning, frozen = OnlineDistillation(drafter, **settings), OnlineDistillation(drafter, frozen=True)
    if done and state.exists():
        learning.restore(state)
    else:  # the one without the other is of no use
        turns.clear()
        done.clear()
    size = place["batch_size"]
    batches = [
        (domain, prompts[at : at + size])
        for domain, prompts in enumerate(domains)
        for at in range(0, len(prompts) - len(prompts) % size or len(prompts), size)
    ]
    fixed = dict(max_new_tokens=arguments.max_new_tokens, do_sample=False, eos_token_id=None)
    for number, (domain, prompts) in enumerate(tqdm(batches, desc=f"switch, batches of {size}")):
        if number in done:
            continue
        if not is_within():
            break
        batch, of_batch = dict(encode(tokenizer, prompts)), []
        start = time.perf_counter()
        expected = target.generate(**batch, **fixed)
        common = {"batch": number, "domain": domain}
        of_batch.append({**common, "way": PLAIN, "seconds": time.perf_counter() - start})
        ways = [(FROZEN, frozen), (LEARNING, learning)]
        for way, system in ways[:: 1 if number % 2 else -1]:  # by turns
            start = time.perf_counter()
            output = generate(target, system, **batch, **fixed, return_dict_in_generate=True)
            counts = output.statistics
            of_batch.append(
                {
                    **common,
                    "way": way,
                    "seconds": time.perf_counter() - start,
                    "tokens": sum(count - 1 for count in counts.tokens_per_row),
                    "passes": sum(counts.target_passes_per_row),
                    "acceptance": system.statistics.acceptance,
                    "drift": system.statistics.drift,
                    "steps": system.statistics.steps,
                    "learning_seconds": system.statistics.learning_seconds,
                    "identical": int((output.sequences == expected).all(dim=1).sum()),
                    "rows": len(expected),
                }
            )
        learning.save(state)  # before the turns: what is kept of a batch was learned
        turns += of_batch
        result.setdefault("switch_summary", {})[name] = summary(turns)
        save(arguments.output, result)


def summary(turns: list[dict]) -> dict:
    """Tokens per pass of both drafters in the halves of each domain, and what it took."""
    found: dict = {}
    plain = {turn["batch"]: turn["seconds"] for turn in turns if turn["way"] == PLAIN}
    for way in (FROZEN, LEARNING):
        of_way = [turn for turn in turns if turn["way"] == way]
        figures: dict = {}
        for domain in sorted({turn["domain"] for turn in of_way}):
            here = [turn for turn in of_way if turn["domain"] == domain]
            halves = here[: len(here) // 2], here[len(here) // 2 :]
            for half, some in zip(("first half", "second half"), halves, strict=True):
                passes = sum(turn["passes"] for turn in some)
                rate = round(sum(turn["tokens"] for turn in some) / passes, 3) if passes else None
                figures[f"domain {domain + 1}, {half}"] = rate
        figures["times_plain"] = round(statistics.median(plain[turn["batch"]] / turn["seconds"] for turn in of_way), 3)
        figures["identical"] = f"{sum(turn['identical'] for turn in of_way)}/{sum(turn['rows'] for turn in of_way)}"
        figures["steps"], figures["learning_seconds"] = of_way[-1]["steps"], round(of_way[-1]["learning_seconds"], 1)
        found[way] = figures
    return found
