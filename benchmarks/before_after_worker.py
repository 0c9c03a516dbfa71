"""One side of `benchmarks.before_after`: generates what standard input asks for, with the SpecFormer on its path.

One JSON object a line. It is given "input_ids" and "attention_mask" of a batch, "max_new_tokens", and a "way" to
generate; it answers "seconds", the "text" of the new tokens in short, and "tokens_per_pass". It uses only what the
versions compared have in common.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import specformer

PLAIN, AUTO, FOUR, RIGHT = "plain generate", "default, auto", "default, k = 4", "always right, k = 4"
WAYS = (PLAIN, AUTO, FOUR, RIGHT)


def known_text(most: int):
    """A drafter that knows the text, from wherever this version has it."""
    names = "specformer.scripts.parts.contenders", "specformer.scripts.contenders"
    found = (
        name for name in names if importlib.util.find_spec(name.rpartition(".")[0]) and importlib.util.find_spec(name)
    )
    return importlib.import_module(next(found)).KnownText(most)


class Side:
    """The target and the drafters of one version."""

    def __init__(self, target: str, dtype: str, drafter: str | None = None):
        kind, folder = getattr(torch, dtype), drafter or Path(specformer.__file__).parent
        self.target = AutoModelForCausalLM.from_pretrained(target, dtype=kind).eval()
        self.drafter = specformer.SpecFormerModel.from_pretrained(folder, dtype=kind).eval()
        self.known = known_text(self.drafter.config.num_draft_tokens)

    def run(self, way: str, batch: dict, **settings) -> dict:
        """One call, timed. A drafter that is always right first learns what its own call writes: in half precision that
        depends on how many tokens a pass carries."""
        if way == RIGHT:
            self.know(self.call(AUTO, batch, settings)[0])
            self.know(self.call(way, batch, settings)[0])
        started = time.perf_counter()
        answer, statistics = self.call(way, batch, settings)
        seconds = time.perf_counter() - started
        text = hashlib.sha256(answer.contiguous().numpy().tobytes()).hexdigest()[:16]
        if statistics is None:
            return {"seconds": seconds, "text": text, "tokens_per_pass": 1.0}
        tokens = sum(statistics.tokens_per_row) - len(answer)  # the prompt's pass gave one each
        return {
            "seconds": seconds,
            "text": text,
            "tokens_per_pass": tokens / sum(statistics.target_passes_per_row),
        }

    def know(self, answer: torch.Tensor) -> None:
        self.known.know(answer, torch.ones_like(answer, dtype=torch.bool))

    def call(self, way: str, batch: dict, settings: dict):
        """New tokens (B, T), and statistics where there are some."""
        width = batch["input_ids"].shape[1]
        if way == PLAIN:
            return self.target.generate(**batch, **settings)[:, width:], None
        output = specformer.generate(
            self.target,
            self.known if way == RIGHT else self.drafter,
            **batch,
            **settings,
            num_assistant_tokens="auto" if way == AUTO else 4,
            return_dict_in_generate=True,
        )
        return output.sequences[:, width:], output.statistics


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer
    side = Side(*sys.argv[1:])
    print(json.dumps({"package": str(Path(specformer.__file__).parent)}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        batch = {name: torch.tensor(task.pop(name)) for name in ("input_ids", "attention_mask")}
        answer = side.run(task.pop("way"), batch, **task, do_sample=False, eos_token_id=None)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
