"""Train variants of the drafter under one budget, and compare what each comes to.

    python -m benchmarks.ablations --data answers --output runs/ablations -- --epochs 4 --batch-size 64
    python -m benchmarks.ablations --data answers --output runs/ablations --answers mt_bench_answers \\
        --prompts mt_bench.jsonl -- --epochs 4 --batch-size 64

The first variants try the paper's findings again, the others what this package adds to the paper's drafter.

What follows -- goes to `specformer train`, the same for all. --other-data holds text that the target did not
write, in the form of --data. --answers holds the target's answers to evaluation prompts, one folder for each kind:
without them a variant's figures are those of its held-out answers. With --prompts, which were answered, the drafters of
the first seed also decode some of these, beside plain generate(). Run the same command again after an interruption.
Fewer than 2 million tokens seen in training make a trial, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.cost_model import time_round
from benchmarks.variants import variants
from specformer.generation.backend_linear import fast_linears
from specformer.modeling_specformer import SpecFormerModel
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.decoded import evaluate_decoding
from specformer.scripts.parts.kinds.specformer import SpecFormerStudent
from specformer.scripts.parts.losses import IGNORED
from specformer.scripts.parts.offline import evaluate_answers
from specformer.scripts.parts.prompt_rows import Prompt
from specformer.scripts.parts.prompts import read_prompts
from specformer.scripts.parts.provenance import provenance
from specformer.scripts.parts.stored_states import StoredStates, shared_file
from specformer.scripts.reproduce import KEEP_MEMORY

ENOUGH_TOKENS = 2_000_000
STATES = "hidden_states"


def main(arguments: argparse.Namespace) -> None:
    name, _ = find_target(arguments.target)
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
    some, results = evaluation.some(arguments.decode) if arguments.prompts else None, {}
    for variant, folders in tqdm(runs.items(), unit="variant"):
        results[variant] = [trained(folder, target, evaluation, arguments) for folder in folders]
        drafter = load(folders[0], target)
        results[variant][0]["rounds"] = rounds(drafter, target, arguments)
        if some:
            results[variant][0]["decoded"] = decoded(drafter, target, tokenizer, some, arguments.batch_size)
    seen = min(run["tokens_seen"] for each in results.values() for run in each)
    result = {
        **provenance("benchmarks.ablations"),
        "trial": seen < ENOUGH_TOKENS,
        "evaluated_on": [folder.name for folder in arguments.answers] or ["held-out answers"],
        "variants": results,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


class Evaluation(NamedTuple):
    """What variants are evaluated on: answers of the target, and of each its prompt and kind."""

    answers: torch.utils.data.Dataset
    prompts: list[Prompt]
    kinds: list[str]

    def some(self, count: int) -> Evaluation:
        """The first so many of each kind."""
        kept = [place for place, kind in enumerate(self.kinds) if self.kinds[:place].count(kind) < count]
        return Evaluation(
            torch.utils.data.Subset(self.answers, kept),
            [self.prompts[place] for place in kept],
            [self.kinds[place] for place in kept],
        )


def read_evaluation(arguments: argparse.Namespace) -> Evaluation | None:
    """Raises ValueError where prompts and answers do not belong together; nothing has been trained yet."""
    if arguments.prompts and len(arguments.prompts) != len(arguments.answers):
        raise ValueError(
            f"--prompts has {len(arguments.prompts)} files and --answers {len(arguments.answers)} folders; expected "
            "the prompts of each folder, in the same order."
        )
    every, prompts, kinds = [Answers(folder, sys.maxsize) for folder in arguments.answers], [], []
    for place, answers in enumerate(every):
        kinds += [arguments.answers[place].name] * len(answers)
        if arguments.prompts:
            prompts += answers.those_answered(read_prompts(arguments.prompts[place]))
    return Evaluation(torch.utils.data.ConcatDataset(every), prompts, kinds) if every else None


def load(folder: Path, target) -> SpecFormerModel:
    return SpecFormerModel.from_pretrained(folder).to(target.device, target.dtype)


def trained(folder: Path, target, evaluation: Evaluation | None, arguments: argparse.Namespace) -> dict:
    """How one drafter was trained, and what it would do on the answers, exactly."""
    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if evaluation:
        store = arguments.output / STATES if arguments.store_hidden_states else None
        offline = computed(load(folder, target), target, evaluation, arguments.batch_size, store)
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


def computed(drafter, target, evaluation: Evaluation, batch_size: int, store: Path | None = None) -> dict:
    """Exact figures on the answers, all and by kind; with states of the target that are kept in the folder `store`."""
    student, texts = SpecFormerStudent(drafter, target), evaluation.answers
    if store:
        texts = StoredStates(texts, student, shared_file(store, texts, student))
        with fast_linears(target):
            texts.fill(range(len(texts)))
    return evaluate_answers(student, texts, evaluation.kinds, batch_size)


def rounds(drafter: SpecFormerModel, target, arguments: argparse.Namespace) -> list[dict]:
    """Seconds of a round with all slots drafted, of the two passes in it, and of a plain step, at each batch size."""
    k, found = drafter.config.num_draft_tokens, []
    for size in arguments.time_at:
        plain, times = (time_round(target, drafter, size, length, arguments.context, repeats=9) for length in (0, k))
        found.append({"batch_size": size, "k": k, "plain_seconds": plain["verify_seconds"], **times})
    return found


def decoded(drafter: SpecFormerModel, target, tokenizer, evaluation: Evaluation, batch_size: int) -> dict:
    """What real decoding with the drafter alone comes to, as long as the answers are, and what is computed for it."""
    drafting = {
        "assistant_model": drafter,
        "num_assistant_tokens": drafter.config.num_draft_tokens,
        "prompt_lookup_num_tokens": 0,
    }
    longest = max(int((labels != IGNORED).sum()) for _, labels in evaluation.answers)
    settings = dict(batch_size=batch_size, max_new_tokens=longest, sample=False, acceptance="match")
    found = evaluate_decoding(
        target, tokenizer, drafting, evaluation.prompts, evaluation.kinds, argparse.Namespace(**settings)
    )
    expected = computed(drafter, target, evaluation, batch_size)["all"]
    names = ("prompts", "identical", "tokens_per_pass", "tasks", "acceptance_per_slot")
    return {
        **settings,
        **{name: found[name] for name in names},
        "computed": expected[f"tokens_per_pass_k{drafter.config.num_draft_tokens}"],
    }


def table(result: dict) -> str:
    """Markdown: one line per variant, its seeds side by side; times are the first seed's."""
    first = next(iter(result["variants"].values()))[0]
    k = sum(name.startswith("accuracy_slot_") for name in first["offline"]["all"])
    kinds, times = list(first["offline"]["tasks"]), at_one_pace(result["variants"])
    sizes = [each["batch_size"] for each in first["rounds"]]
    titles = ["variant", "million weights", f"right at slots 1 to {k}"]
    titles += [f"tokens per pass, {kind}" for kind in kinds or result["evaluated_on"]]
    if "decoded" in first:
        titles.append("decoded / computed for these")
    if sizes:
        batches = ", ".join(map(str, sizes))
        titles += [f"draft, ms, batch {batches}", f"times plain decoding, by rounds, batch {batches}"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant, runs in result["variants"].items():
        every = [run["offline"]["all"] for run in runs]
        cells = [variant, f"{runs[0]['parameters'] / 1e6:.1f}"]
        cells.append(", ".join(f"{mean(each[f'accuracy_slot_{slot}'] for each in every):.0%}" for slot in range(k)))
        of_kinds = [[run["offline"]["tasks"][kind] for run in runs] for kind in kinds] or [every]
        cells += [" / ".join(f"{each[f'tokens_per_pass_k{k}']:.3f}" for each in kind) for kind in of_kinds]
        if done := runs[0].get("decoded"):
            cells.append(f"{done['tokens_per_pass']:.3f} / {done['computed']:.3f}")
        if sizes:
            gained = every[0][f"tokens_per_pass_k{k}"]
            cells.append(", ".join(f"{1e3 * draft:.1f}" for draft, _, _ in times[variant]))
            cells.append(
                ", ".join(f"{gained * plain / (draft + verify):.2f}" for draft, verify, plain in times[variant])
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def at_one_pace(every: dict[str, list[dict]]) -> dict[str, list[tuple[float, float, float]]]:
    """Seconds of drafting, verifying and a plain step of each variant, at each batch size.

    The target's passes are the same for all variants: their median is everyone's, and how long verifying took beside
    drafting tells how fast the machine was at that moment, which on a shared one is not the same for all.
    """
    of_variants = {variant: runs[0]["rounds"] for variant, runs in every.items()}
    of_sizes = list(zip(*of_variants.values(), strict=True))
    plain, verify = (
        [median(each[f"{what}_seconds"] for each in size) for size in of_sizes] for what in ("plain", "verify")
    )
    return {
        variant: [
            (each["draft_seconds"] * usual / each["verify_seconds"], usual, step)
            for each, usual, step in zip(rounds, verify, plain, strict=True)
        ]
        for variant, rounds in of_variants.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of `specformer distill`, or a jsonl file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs; gone on with")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/ablations.json"))
    parser.add_argument("--other-data", type=Path, help="text that the target did not write")
    parser.add_argument(
        "--answers", type=Path, nargs="+", default=[], help="folders of `specformer distill` for evaluation prompts"
    )
    parser.add_argument("--prompts", nargs="+", default=[], help="of each of these folders, to be decoded as well")
    parser.add_argument("--decode", type=int, default=8, help="how many of each are decoded")
    parser.add_argument("--target", help="folder or Hub id of the target; default: the one of `specformer fetch`")
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
    parser.add_argument("train", nargs="*", help="options of `specformer train`, after --")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
