"""Train variants of the drafter under one budget, and compare what each comes to.

    python -m specformer.scripts.ablations --data answers --output runs/ablations -- --epochs 4 --batch-size 64
    python -m specformer.scripts.ablations --data answers --output runs/ablations --answers mt_bench_answers \\
        --prompts mt_bench.jsonl -- --epochs 4 --batch-size 64

The first variants try the paper's findings again, the others what this package adds to the paper's drafter.

What follows -- goes to specformer.scripts.train, the same for all. --other-data holds text that the target did not
write, in the form of --data. --answers holds the target's answers to evaluation prompts, one folder for each kind:
without them a variant's figures are those of its held-out answers. With --prompts, which were answered, the drafters of
the first seed also decode these, beside plain generate(). Run the same command again after an interruption. Fewer than
2 million tokens seen in training make a trial, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from specformer.generation.fast_linear import fast_linears
from specformer.modeling_specformer import SpecFormerModel
from specformer.scripts.answers import Answers
from specformer.scripts.cost_model import time_round
from specformer.scripts.decoded import evaluate_decoding
from specformer.scripts.fetch_target import fetch_target
from specformer.scripts.offline import evaluate_answers
from specformer.scripts.prompts import read_prompts
from specformer.scripts.provenance import provenance
from specformer.scripts.reproduce import KEEP_MEMORY
from specformer.scripts.stored_states import StoredStates, shared_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ENOUGH_TOKENS = 2_000_000
STATES = "hidden_states"
CORRECTED, SMOOTHED = "previous_token_rank=256", ["--slot-decay", "1", "--acceptance-weights", "0.5"]


def variants(target_config, other_data: Path | None = None) -> dict[str, list[str]]:
    """Name and training options of each variant."""
    text_config = target_config.get_text_config(decoder=True)
    layers, few = text_config.num_hidden_layers, text_config.vocab_size // 24
    # each differs from "paper" in one thing
    of_paper = {
        "paper": [],
        "causal draft attention": ["--config", "causal_draft_attention=true"],
        "no positional FFN": ["--config", "use_positional_ffn=false"],
        "twice as wide": ["--config", f"intermediate_size={2 * text_config.intermediate_size}"],
    }
    if other_data:
        of_paper["other text than the target's"] = ["--data", str(other_data)]
    # each differs from "with the anchor token" in one thing, but those that combine what others have
    beyond = {
        "with the anchor token": [],
        "anchor as a slot": ["--config", "use_anchor_token=false", "anchor_slot=true"],
        "anchor as input and slot": ["--config", "anchor_slot=true"],
        "anchor beside HS[0]": [
            "--config",
            f"target_layer_ids={sorted({0, layers // 2, layers - 1, layers})}".replace(" ", ""),
        ],
        "slots see the context": ["--config", "draft_attends_context=true"],
        "two draft layers": ["--config", "num_draft_layers=2"],
        "slot embeddings": ["--config", "use_positional_ffn=false"],
        "corrected by the previous token": ["--config", CORRECTED],
        "corrected, base loss first": ["--config", CORRECTED, "--base-loss", "1"],
        "weighed by acceptance": SMOOTHED,
        "distance from the target": ["--distance-loss", "0.9"],
        "all tokens drafted": ["--draft-vocab-size", str(2**24)],
        f"{few:,} tokens drafted": ["--draft-vocab-size", str(few)],
        "default": ["--config", CORRECTED, "confidence_head=true", *SMOOTHED],
        "stacked": ["--config", CORRECTED, "num_draft_layers=2", "draft_attends_context=true", *SMOOTHED],
    }
    return {name: ["--paper", *options] for name, options in of_paper.items()} | beyond


def main(arguments: argparse.Namespace) -> None:
    name = arguments.target or str(fetch_target())
    evaluation = read_evaluation(arguments)
    every, runs = variants(AutoConfig.from_pretrained(name), arguments.other_data), {}
    if unknown := set(arguments.variants or ()) - every.keys():
        raise ValueError(f"--variants {sorted(unknown)}: expected some of {', '.join(map(repr, every))}.")
    for variant in arguments.variants or every:
        options = every[variant]
        for seed in arguments.seeds:
            folder = arguments.output / f"{variant.replace(' ', '_')}-{seed}"
            runs.setdefault(variant, []).append(folder)
            if (folder / "training.json").exists():
                continue
            print(f"{variant}, seed {seed}", flush=True)
            common = ["--data", str(arguments.data), "--target", name, "--output", str(folder), "--seed", str(seed)]
            if arguments.store_hidden_states:
                common += ["--store-hidden-states", str(arguments.output / STATES)]
            command = [sys.executable, "-m", "specformer.scripts.train", *common, *arguments.train, *options]
            subprocess.run(command, check=True, env={**KEEP_MEMORY, **os.environ})

    target = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    target.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(name)
    results = {}
    for variant, folders in tqdm(runs.items(), unit="variant"):
        results[variant] = [trained(folder, target, evaluation, arguments) for folder in folders]
        drafter = load(folders[0], target)
        results[variant][0]["rounds"] = rounds(drafter, target, arguments)
        if arguments.prompts:
            results[variant][0]["decoded"] = decoded(drafter, target, tokenizer, evaluation, arguments)
    seen = min(run["tokens_seen"] for each in results.values() for run in each)
    result = {
        **provenance("specformer.scripts.ablations"),
        "trial": seen < ENOUGH_TOKENS,
        "evaluated_on": [folder.name for folder in arguments.answers] or ["held-out answers"],
        "variants": results,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


class Evaluation(NamedTuple):
    """What variants are evaluated on: answers of the target, and of each its prompt and kind."""

    answers: list[Answers]
    prompts: list[str]
    kinds: list[str]


def read_evaluation(arguments: argparse.Namespace) -> Evaluation:
    """Raises ValueError where prompts and answers do not belong together; nothing has been trained yet."""
    if arguments.prompts and len(arguments.prompts) != len(arguments.answers):
        raise ValueError(
            f"--prompts has {len(arguments.prompts)} files and --answers {len(arguments.answers)} folders; expected "
            "the prompts of each folder, in the same order."
        )
    found = Evaluation([Answers(folder, sys.maxsize) for folder in arguments.answers], [], [])
    for place, (folder, answers) in enumerate(zip(arguments.answers, found.answers, strict=True)):
        found.kinds.extend([folder.name] * len(answers))
        if arguments.prompts:
            found.prompts.extend(answers.those_answered(read_prompts(arguments.prompts[place])))
    return found


def load(folder: Path, target) -> SpecFormerModel:
    return SpecFormerModel.from_pretrained(folder).to(target.device, target.dtype)


def trained(folder: Path, target, evaluation: Evaluation, arguments: argparse.Namespace) -> dict:
    """How one drafter was trained, and what it would do on the answers, exactly."""
    log = json.loads((folder / "training.json").read_text())
    if evaluation.answers:
        borrowed = (drafter := load(folder, target)).borrow(target)
        texts = torch.utils.data.ConcatDataset(evaluation.answers)
        if arguments.store_hidden_states:
            texts = StoredStates(texts, borrowed, shared_file(arguments.output / STATES, texts, borrowed))
            with fast_linears(target, drafter, borrowed.rows):
                texts.fill(range(len(texts)))
        offline = evaluate_answers(drafter, borrowed, texts, evaluation.kinds, arguments.batch_size)
    else:
        (best,) = [each for each in log["history"] if "eval_loss" in each and each["step"] == log["best"]["step"]]
        best = {name.removeprefix("eval_"): value for name, value in best.items() if name.startswith("eval_")}
        offline = {"all": best, "tasks": {}}
    learnt = log["answers"] / (log["answers"] + log["held_out_answers"])
    return {
        "seed": log["settings"]["seed"],
        "parameters": log["parameters"],
        "steps": log["steps"],
        "tokens_seen": round(log["answer_tokens"] * learnt * log["settings"]["epochs"]),
        "minutes": log["minutes"],
        "offline": offline,
    }


def rounds(drafter: SpecFormerModel, target, arguments: argparse.Namespace) -> list[dict]:
    """Seconds of a round with all slots drafted, of the two passes in it, and of a plain step, at each batch size."""
    k, found = drafter.config.num_draft_tokens, []
    for size in arguments.time_at:
        plain, times = (time_round(target, drafter, size, length, arguments.context, repeats=9) for length in (0, k))
        found.append({"batch_size": size, "k": k, "plain_seconds": plain["verify_seconds"], **times})
    return found


def decoded(drafter: SpecFormerModel, target, tokenizer, evaluation: Evaluation, arguments: argparse.Namespace) -> dict:
    """What real decoding with the drafter alone comes to, as long as the answers are."""
    drafting = {
        "assistant_model": drafter,
        "num_assistant_tokens": drafter.config.num_draft_tokens,
        "prompt_lookup_num_tokens": 0,
    }
    settings = argparse.Namespace(
        batch_size=arguments.batch_size,
        max_new_tokens=max(answers.most_answer_tokens for answers in evaluation.answers),
        sample=False,
        acceptance="match",
    )
    found = evaluate_decoding(target, tokenizer, drafting, evaluation.prompts, evaluation.kinds, settings)
    names = ("prompts", "identical", "tokens_per_pass", "tasks", "acceptance_per_slot", "seconds")
    return {**vars(settings), **{name: found[name] for name in names}}


def table(result: dict) -> str:
    """Markdown: one line per variant, its seeds side by side; times are the first seed's."""
    first = next(iter(result["variants"].values()))[0]
    k = sum(name.startswith("accuracy_slot_") for name in first["offline"]["all"])
    kinds, sizes = list(first["offline"]["tasks"]), [each["batch_size"] for each in first.get("rounds", [])]
    titles = ["variant", "million weights", f"right at slots 1 to {k}"]
    titles += [f"tokens per pass, {kind}" for kind in kinds or result["evaluated_on"]]
    if "decoded" in first:
        titles += ["the same, decoded", "times plain `generate`, decoded"]
    if sizes:
        batches = ", ".join(map(str, sizes))
        titles += [f"draft, ms, batch {batches}", f"times plain, by rounds, batch {batches}"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant, runs in result["variants"].items():
        every = [run["offline"]["all"] for run in runs]
        cells = [variant, f"{runs[0]['parameters'] / 1e6:.1f}"]
        cells.append(", ".join(f"{mean(each[f'accuracy_slot_{slot}'] for each in every):.0%}" for slot in range(k)))
        of_kinds = [[run["offline"]["tasks"][kind] for run in runs] for kind in kinds] or [every]
        cells += [" / ".join(f"{each[f'tokens_per_pass_k{k}']:.3f}" for each in kind) for kind in of_kinds]
        if done := runs[0].get("decoded"):
            cells.append(" / ".join(f"{each['tokens_per_pass']:.3f}" for each in done["tasks"].values()))
            cells.append(f"{done['seconds']['plain'] / done['seconds']['drafting']:.2f}")
        if sizes:
            cells.append(", ".join(f"{1e3 * each['draft_seconds']:.1f}" for each in runs[0]["rounds"]))
            cells.append(", ".join(f"{speed_up(runs[0], each):.2f}" for each in runs[0]["rounds"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_up(run: dict, times: dict) -> float:
    """Times the speed of plain decoding, told from tokens per pass and the times of rounds."""
    gained = run["offline"]["all"][f"tokens_per_pass_k{times['k']}"]
    return gained * times["plain_seconds"] / (times["verify_seconds"] + times["draft_seconds"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of distill, or a jsonl file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs; gone on with")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/ablations.json"))
    parser.add_argument("--other-data", type=Path, help="text that the target did not write")
    parser.add_argument("--answers", type=Path, nargs="+", default=[], help="folders of distill for evaluation prompts")
    parser.add_argument("--prompts", nargs="+", default=[], help="of each of these folders, to be decoded")
    parser.add_argument("--target", help="folder or Hub id of the target; default: the one of fetch_target")
    parser.add_argument(
        "--store-hidden-states",
        action="store_true",
        help="read every text with the target once for all variants and keep that in --output, for small runs on a CPU",
    )
    parser.add_argument("--variants", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch-size", type=int, default=8, help="texts at once in the evaluation on --answers")
    parser.add_argument("--time-at", type=int, nargs="*", default=[1, 8, 32], help="batch sizes to time drafting at")
    parser.add_argument("--context", type=int, default=512, help="tokens that each row has when drafting is timed")
    parser.add_argument("train", nargs="*", help="options of specformer.scripts.train, behind --")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
