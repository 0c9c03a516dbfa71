"""How engines serve a drafter: their commands, and the card of an exported one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from specformer.publishing_specformer import WRITTEN, hub_id
from specformer.scripts.parts.drafter_formats import Checkpoint

NAMES = {"dflash": "DFlash", "dspark": "DSpark", "eagle3": "EAGLE-3", "peagle": "ParallelSpec"}
"""By what engines call the kind."""
SEEN = "vLLM 0.32 on a CPU drafted with such drafters the tokens that `specformer.generate` drafts, slot by slot."
NOT_SEEN = "vLLM serves DSpark on GPUs only, which was not tried."
CONVERTED = "The converter of llama.cpp took such folders (that of llama-cpp-python 0.3.36); what it made was not run."


def kind_of(config: dict) -> str:
    """What engines call the kind of an exported drafter: one of `NAMES`."""
    if "PEagle" in config["architectures"][0]:
        return "peagle"
    if "Eagle3" in config["architectures"][0]:
        return "eagle3"
    return "dspark" if config.get("markov_rank") else "dflash"


def vllm_beside(target: str, **speculative) -> str:
    return f"vllm serve {shlex.quote(target)} --speculative-config {shlex.quote(json.dumps(speculative))}"


def commands(checkpoint: Checkpoint, target: str, folder: str) -> dict[str, list[str]]:
    """By engine, the lines that serve the drafter in `folder` beside `target`."""
    kind, count = kind_of(checkpoint.config), checkpoint.num_tokens
    where, beside = shlex.quote(folder), shlex.quote(target)
    found: dict[str, list[str]] = {}
    if checkpoint.form == "speculators":
        found["vLLM"] = [f"vllm serve {where}"]
    if checkpoint.form == "dflash":
        found["vLLM"] = [vllm_beside(target, method="dflash", model=folder, num_speculative_tokens=count)]
    if checkpoint.form == "dflash" or (checkpoint.form == "gguf-ready" and kind == "eagle3"):
        options = (
            f"--speculative-num-steps {count} --speculative-eagle-topk 1 --speculative-num-draft-tokens {count + 1}"
        )
        found["SGLang"] = [
            f"python -m sglang.launch_server --model-path {beside} --speculative-algorithm {kind.upper()} "
            f"--speculative-draft-model-path {where}" + (f" {options}" if kind == "eagle3" else "")
        ]
    if checkpoint.form == "gguf-ready":
        found["llama.cpp"] = [
            f"python convert_hf_to_gguf.py {beside} --outfile target.gguf",
            f"python convert_hf_to_gguf.py {where} --target-model-dir {beside} --outfile drafter.gguf",
            f"llama-server -m target.gguf -md drafter.gguf --spec-type draft-{kind} --spec-draft-n-max {count}",
        ]
    return found


def card(checkpoint: Checkpoint, target: str, folder: str) -> str:
    """README.md of an exported drafter, in a folder of that name."""
    kind, known = kind_of(checkpoint.config), hub_id(target)
    place = known or f"path/to/{Path(target).name}"
    lines = ["---"]
    lines += [f"base_model: {known}", "base_model_relation: adapter"] if known else []
    lines += ["pipeline_tag: text-generation", "tags:", "  - speculative-decoding", f"  - {kind}", "---", WRITTEN, ""]
    lines += [
        f"# {NAMES[kind]} drafter for {known or Path(target).name}",
        "",
        f"Written by `specformer export --format {checkpoint.form}`. It drafts {checkpoint.num_tokens} tokens a round, "
        "which the target verifies: the text is the target's own.",
        "",
        "## Serving",
        "",
    ]
    served = commands(checkpoint, place, folder)
    for engine, calls in served.items():
        lines += [f"{engine}, from the folder that this one is in:", "", "```bash", *calls, "```", ""]
    if checkpoint.form == "gguf-ready":
        notes = [CONVERTED, "It reads the target's tokenizer and sizes from a folder; a Hub id has to be downloaded."]
    else:
        notes = [NOT_SEEN if kind == "dspark" else SEEN]
    if "SGLang" in served:
        notes.append("SGLang was not run.")
    if checkpoint.form == "speculators":
        where = "its Hub id" if known else "a folder of the machine on which this was written, so put its Hub id there"
        notes.append(f"config.json names the target, `speculators_config.verifier.name_or_path`: by {where}.")
    lines += [*notes, ""]
    lines += [
        "In `generate` of transformers, in batches of different prompts:",
        "",
        "```python",
        f'output = specformer.generate(target, "{folder}", **inputs)',
        "```",
        "",
    ]
    return "\n".join(lines)


def as_it_is(place: str, config: dict) -> str:
    """What to do with a causal LM, which is no drafter's format of its own."""
    if config.get("pard_token") is None:
        speculative = {"method": "draft_model", "model": place, "num_speculative_tokens": 4}
        return (
            f"{place} is a causal LM, which engines take as it is: {vllm_beside('TARGET', **speculative)}, or, in "
            "llama.cpp, both models converted and llama-server --spec-type draft-simple."
        )
    speculative = {
        "method": "draft_model",
        "model": place,
        "num_speculative_tokens": 8,
        "parallel_drafting": True,
    }
    return (
        f"{place} is a causal LM that drafts in parallel (PARD), which vLLM takes as it is: "
        f"{vllm_beside('TARGET', **speculative)}. Other engines have no parallel drafts; in llama.cpp it drafts one "
        "token after the other, as any small model: llama-server --spec-type draft-simple."
    )
