"""Train variants of the drafter under one budget, and compare what each comes to.

    python -m specformer.scripts.ablations --data answers --output runs/ablations -- --epochs 4 --batch-size 64
    python -m specformer.scripts.ablations --family beyond --data answers --output runs/ablations -- --epochs 4

The family "paper" tries the paper's findings again, "beyond" what this package adds to the paper's drafter.

What follows -- goes to specformer.scripts.train, the same for all. --other-data holds text that the target did not
write, in the form of --data. --answers holds the target's answers to evaluation prompts: without them a variant's
figure is that of its held-out answers. Run the same command again after an interruption. Fewer than 2 million tokens
seen in training make a trial, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from specformer.modeling_specformer import SpecFormerModel
from specformer.scripts.answers import Answers
from specformer.scripts.cost_model import time_round
from specformer.scripts.fetch_target import fetch_target
from specformer.scripts.offline import evaluate_answers
from specformer.scripts.provenance import provenance
from specformer.scripts.reproduce import KEEP_MEMORY
from transformers import AutoConfig, AutoModelForCausalLM

ENOUGH_TOKENS = 2_000_000


def paper_variants(target_config, other_data: Path | None) -> dict[str, list[str]]:
    """Name and training options of each variant; all but one differ from the paper's drafter in one thing."""
    wide = 2 * target_config.get_text_config(decoder=True).intermediate_size
    options = {
        "paper": [],
        "with the anchor token": None,
        "causal draft attention": ["--config", "causal_draft_attention=true"],
        "no positional FFN": ["--config", "use_positional_ffn=false"],
        "twice as wide": ["--config", f"intermediate_size={wide}"],
        "weighed by acceptance": ["--slot-decay", "1", "--acceptance-weights", "0.5"],
        "corrected by the previous token": ["--config", "previous_token_rank=256"],
    }
    options = {name: [] if extra is None else ["--paper", *extra] for name, extra in options.items()}
    if other_data:
        options["other text than the target's"] = ["--paper", "--data", str(other_data)]
    return options


def beyond_variants(target_config, other_data: Path | None) -> dict[str, list[str]]:
    """Name and training options of each variant; all but the first and the last differ from "with the anchor token" in
    one thing."""
    text_config = target_config.get_text_config(decoder=True)
    layers, few = text_config.num_hidden_layers, text_config.vocab_size // 24
    all_states = sorted({0, layers // 2, layers - 1, layers})
    corrected, weighed = "previous_token_rank=256", ["--slot-decay", "1", "--acceptance-weights", "0.5"]
    return {
        "paper": ["--paper"],
        "with the anchor token": [],
        "anchor beside the embeddings": ["--config", f"target_layer_ids={all_states}".replace(" ", "")],
        "anchor as a slot": ["--config", "use_anchor_token=false", "anchor_slot=true"],
        "anchor as input and slot": ["--config", "anchor_slot=true"],
        "slots see the context": ["--config", "draft_attends_context=true"],
        "two draft layers": ["--config", "num_draft_layers=2"],
        "slot embeddings": ["--config", "use_positional_ffn=false"],
        "corrected by the previous token": ["--config", corrected],
        "corrected, base loss first": ["--config", corrected, "--base-loss", "1"],
        "weighed by acceptance": weighed,
        "distance from the target": ["--distance-loss", "0.9"],
        "all tokens drafted": ["--draft-vocab-size", str(2**24)],
        f"{few:,} tokens drafted": ["--draft-vocab-size", str(few)],
        "stacked": ["--config", corrected, "num_draft_layers=2", "draft_attends_context=true", *weighed],
    }


FAMILIES = {"paper": paper_variants, "beyond": beyond_variants}


def main(arguments: argparse.Namespace) -> None:
    name = arguments.target or str(fetch_target())
    every, runs = FAMILIES[arguments.family](AutoConfig.from_pretrained(name), arguments.other_data), {}
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
            command = [sys.executable, "-m", "specformer.scripts.train", *common, *arguments.train, *options]
            subprocess.run(command, check=True, env={**KEEP_MEMORY, **os.environ})

    target = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    target.to("cuda" if torch.cuda.is_available() else "cpu")
    results = {variant: [figures(folder, target, arguments) for folder in folders] for variant, folders in runs.items()}
    seen = min(run["tokens_seen"] for each in results.values() for run in each)
    result = {
        **provenance("specformer.scripts.ablations"),
        "trial": seen < ENOUGH_TOKENS,
        "evaluated_on": arguments.answers.name if arguments.answers else "held-out answers",
        "variants": results,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def figures(folder: Path, target, arguments: argparse.Namespace) -> dict:
    """What one trained drafter comes to."""
    log = json.loads((folder / "training.json").read_text())
    (best,) = [e for e in log["history"] if "eval_loss" in e and e["step"] == log["best"]["step"]]
    found = {name.removeprefix("eval_"): value for name, value in best.items() if name.startswith("eval_")}
    drafter = SpecFormerModel.from_pretrained(folder).to(target.device, target.dtype)
    if arguments.answers:
        answers = Answers(arguments.answers, sys.maxsize)
        tasks = ["all"] * len(answers)
        found = evaluate_answers(drafter, drafter.borrow(target), answers, tasks, arguments.batch_size)["all"]
    k = drafter.config.num_draft_tokens
    rounds = {size: time_round(target, drafter, size, k, arguments.context, repeats=9) for size in arguments.time_at}
    return {
        "seed": log["settings"]["seed"],
        "parameters": log["parameters"],
        "steps": log["steps"],
        "tokens_seen": round(log["answer_tokens"] * log["settings"]["epochs"]),
        "minutes": log["minutes"],
        "rounds": [{"batch_size": size, "k": k, **times} for size, times in rounds.items()],
        **found,
    }


def table(result: dict) -> str:
    """Markdown: one line per variant, its seeds side by side."""
    lengths = [name for name in next(iter(result["variants"].values()))[0] if name.startswith("tokens_per_pass_k")]
    titles = [f"tokens per pass, k = {name.rsplit('k', 1)[1]}" for name in lengths]
    sizes = [each["batch_size"] for each in next(iter(result["variants"].values()))[0].get("rounds", [])]
    titles += ["right at the first slot", *(f"draft, ms, batch {size}" for size in sizes)]
    lines = [f"| variant | million weights | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for variant, runs in result["variants"].items():
        cells = [" / ".join(f"{run[name]:.3f}" for run in runs) for name in lengths]
        cells.append(" / ".join(f"{run['accuracy_slot_0']:.1%}" for run in runs))
        for place in range(len(sizes)):
            cells.append(f"{1e3 * median(run['rounds'][place]['draft_seconds'] for run in runs):.1f}")
        lines.append(f"| {variant} | {runs[0]['parameters'] / 1e6:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of distill, or a jsonl file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs; gone on with")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/ablations.json"))
    parser.add_argument("--other-data", type=Path, help="text that the target did not write")
    parser.add_argument("--answers", type=Path, help="folder of distill for evaluation prompts")
    parser.add_argument("--target", help="folder or Hub id of the target; default: the one of fetch_target")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="paper")
    parser.add_argument("--variants", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch-size", type=int, default=8, help="texts at once in the evaluation on --answers")
    parser.add_argument("--time-at", type=int, nargs="*", default=[1, 8, 32], help="batch sizes to time drafting at")
    parser.add_argument("--context", type=int, default=512, help="tokens that each row has when drafting is timed")
    parser.add_argument("train", nargs="*", help="options of specformer.scripts.train, behind --")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
