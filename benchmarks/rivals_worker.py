"""One environment of `benchmarks.rivals`: generates what standard input asks for, with the library that it was told.

One JSON object a line. It is given "input_ids" and "attention_mask" of a batch, "max_new_tokens", and a "way" to
generate; it answers "seconds", and the new tokens of each row as "text". Libraries are imported here and nowhere else:
an environment has one of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers import AutoModelForCausalLM

DRAFTED = 4
MOST_COPIED = 10


def transformers_ways(target, smaller) -> dict[str, Callable]:
    def call(batch, settings, **more):
        width = batch["input_ids"].shape[1]
        return target.generate(**batch, **settings, do_sample=False, eos_token_id=None, **more)[:, width:].tolist()

    ways = {
        "plain generate": call,
        "transformers, prompt lookup": lambda *given: call(*given, prompt_lookup_num_tokens=DRAFTED),
    }
    if smaller is not None:
        ways["transformers, assistant"] = lambda *given: call(*given, assistant_model=smaller)
    return ways


def specformer_ways(target, drafter: str | None, smaller) -> dict[str, Callable]:
    import specformer

    def call(batch, settings, assistant=None, **more):
        width, settings = batch["input_ids"].shape[1], {**settings, "do_sample": False, "eos_token_id": None}
        return specformer.generate(target, assistant, **batch, **settings, **more)[:, width:].tolist()

    ways = {
        "specformer, prompt lookup": lambda *given: call(*given, prompt_lookup_num_tokens=DRAFTED),
        "specformer, copies, auto": lambda *given: call(
            *given, prompt_lookup_num_tokens=MOST_COPIED, num_assistant_tokens="auto"
        ),
    }
    if drafter is not None:
        network = specformer.SpecFormerModel.from_pretrained(drafter).eval()
        ways["specformer, drafter"] = lambda *given: call(*given, assistant=network)
        ways["specformer, drafter, chains"] = lambda *given: call(*given, assistant=network, tree_size=0)
    if smaller is not None:
        ways["specformer, assistant"] = lambda *given: call(*given, assistant=smaller)
    return ways


def economize_ways(target) -> dict[str, Callable]:
    # by name, since it is no dependency of this environment
    economize, decoding, lookup = map(import_module, ("economize", "economize.decoding", "economize.techniques.lookup"))
    # a cycle of economize is a token of the target and the drafts behind it
    cycles = decoding.DecodeConfig(cycle_length=DRAFTED + 1)
    model = economize.apply(target, lookup.LookupConfig(), decoding=cycles)

    def call(batch, settings):
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        results = model.decode_batch([ids[mask] for ids, mask in rows], settings["max_new_tokens"])
        return [result.tokens.tolist()[-settings["max_new_tokens"] :] for result in results]

    return {"economize, lookup": call}


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "specformer", "economize"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer
    library, folder, dtype, drafter, assistant = (word or None for word in sys.argv[1:])
    target, smaller = (
        name and AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).eval()
        for name in (folder, assistant)
    )
    ways = transformers_ways(target, smaller)
    ways |= specformer_ways(target, drafter, smaller) if library == "specformer" else economize_ways(target)
    print(json.dumps({"ways": list(ways), "versions": versions()}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        batch = {name: torch.tensor(task.pop(name)) for name in ("input_ids", "attention_mask")}
        way = ways[task.pop("way")]
        started = time.perf_counter()
        text = way(batch, task)
        print(json.dumps({"seconds": time.perf_counter() - started, "text": text}), file=answers, flush=True)


if __name__ == "__main__":
    main()
