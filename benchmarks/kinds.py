"""Train a drafter of each kind under one budget, and compare what each comes to.

    python -m benchmarks.kinds --data answers --output runs/kinds --prompts mt_bench.jsonl --answers mt_bench_answers \\
        -- --epochs 4 --batch-size 16 --max-length 512

What follows -- goes to `specformer train`, the same for all kinds, with the same data, slots and steps. On the prompts,
which were answered, plain decoding and the drafters then write texts in turns, in batches of different prompts: draft
time, tokens per pass and tokens per second compared with plain decoding. Sizes are those of SmolLM2-135M's width: 8 to
10 million weights where the shape allows. Run the same command again after an interruption: what was trained, evaluated
and decoded is kept in --output. Fewer than 2 million tokens seen in training make a trial, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.ablations import ENOUGH_TOKENS, STATES, Evaluation, read_evaluation
from specformer.generation.backend_linear import fast_linears
from specformer.generation.drafter_loading import drafting_model
from specformer.generation.generate import generate
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.kinds.all import student_of
from specformer.scripts.parts.offline import evaluate_answers
from specformer.scripts.parts.prompts import encode
from specformer.scripts.parts.provenance import provenance
from specformer.scripts.parts.stored_states import StoredStates, shared_file
from specformer.scripts.reproduce import KEEP_MEMORY
from specformer.scripts.tables import kinds_lines

OPTIONS: dict[str, list[str]] = {
    "specformer": ["--drafter", "specformer", "--config", "previous_token_rank=256", "confidence_head=true"],
    "dflash": ["--drafter", "dflash", "--config", "num_hidden_layers=2"],
    "eagle3": ["--drafter", "eagle3"],
    "falcon": ["--drafter", "falcon"],
    "falcon-without-glancing": ["--drafter", "falcon", "--glancing", "0"],
    "parallelspec": ["--drafter", "parallelspec"],
    "pard": ["--drafter", "pard", "--config", "num_hidden_layers=2", "--position-share", "0.2"],
}
"""Of `train`, by what is trained; also the name of its folder. A step of pard takes four times as long as one of the
others at as many positions: its own head of all tokens learns."""
PLAIN, PADDED = "plain", "plain with more padding"
MORE_PADDING = 3


def main(arguments: argparse.Namespace) -> None:
    name, identity = find_target(arguments.target)
    evaluation = read_evaluation(arguments)
    assert evaluation is not None  # --answers is required
    folders = {kind: arguments.output / kind for kind in arguments.kinds}
    for kind, folder in folders.items():
        if not (folder / "training.json").exists():
            print(kind, flush=True)
            command = [sys.executable, "-m", "specformer.scripts.train", *options_of(kind, folder, arguments)]
            # logits of all tokens, now more of them and now fewer, leave gaps in memory that is kept
            keeping = {} if kind == "pard" else KEEP_MEMORY
            subprocess.run(command, check=True, env={**keeping, **os.environ})

    found, decoded_texts = dict[str, dict](), list[dict]()
    tokenizer = AutoTokenizer.from_pretrained(name)
    for dtype in arguments.dtypes:
        target = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).eval()
        target.to("cuda" if torch.cuda.is_available() else "cpu")
        drafters = {kind: drafting_model(folder, target).to(target.device) for kind, folder in folders.items()}
        if not found:
            for kind, folder in folders.items():
                found[kind] = of_kind(kind, folder, drafters[kind], target, evaluation, arguments)
        for size in arguments.time_at:
            # kept figures are those of just these kinds and settings, or are made anew
            asked = [dtype, size, arguments.max_new_tokens, arguments.repeats, *drafters]
            path = arguments.output / f"decoded-{dtype}-{size}.json"
            kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if kept.get("asked") != asked:
                kept = {"asked": asked, "found": decoded(size, drafters, target, tokenizer, evaluation, arguments)}
                path.write_text(json.dumps(kept) + "\n", encoding="utf-8")
            decoded_texts.append(kept["found"])
    result = {
        **provenance("benchmarks.kinds"),
        "regime": {
            "target": identity,
            "dtype": arguments.dtypes[0],  # of the figures by slot
            "num_assistant_tokens": arguments.num_draft_tokens,
            "max_new_tokens": arguments.max_new_tokens,
            "decoding": "greedy, to that length",
            "answers": [folder.name for folder in arguments.answers],
        },
        "trial": min(each["tokens_seen"] for each in found.values()) < ENOUGH_TOKENS,
        "kinds": found,
        "decoded": decoded_texts,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(kinds_lines(result)))


def options_of(kind: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Of `train`: those of the kind, and those of all."""
    options = ["--data", str(arguments.data), "--output", str(folder)]
    options += [] if arguments.target is None else ["--target", arguments.target]
    options += ["--num-draft-tokens", str(arguments.num_draft_tokens), "--acceptance-weights", "0.5"]
    if kind != "pard":  # it reads no states, and its vocabulary is its own
        options += ["--draft-vocab-size", str(arguments.draft_vocab_size)]
        options += ["--store-hidden-states", str(arguments.output / STATES)]
    return [*options, *arguments.train, *OPTIONS[kind]]


def of_kind(
    kind: str, folder: Path, drafter, target, evaluation: Evaluation, arguments: argparse.Namespace
) -> dict[str, object]:
    """How a drafter was trained, and what it would do on the answers, exactly. Kept beside it."""
    path = folder / "evaluated.json"
    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if not path.exists():
        student, texts = student_of(drafter, target, arguments.num_draft_tokens), evaluation.answers
        if student.layer_ids:
            texts = StoredStates(texts, student, shared_file(arguments.output / STATES, texts, student))
            with fast_linears(target):
                texts.fill(range(len(texts)))
        figures = evaluate_answers(student, texts, evaluation.kinds, arguments.batch_size)
        path.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    lm_head = getattr(drafter, "lm_head", None)
    copied = lm_head.weight.numel() if kind != "pard" and lm_head is not None else 0
    learnt = log["answers"] / (log["answers"] + log["held_out_answers"])
    return {
        "parameters": log["parameters"],
        "copied_from_target": copied,
        "steps": log["steps"],
        "tokens_seen": round(log["answer_tokens"] * learnt * log["settings"]["epochs"]),
        "answer_tokens": log["answer_tokens"],
        "minutes": log["minutes"],
        "command": log["command"],
        "offline": json.loads(path.read_text(encoding="utf-8")),
    }


@torch.no_grad()
def decoded(
    size: int, drafters: dict, target, tokenizer, evaluation: Evaluation, arguments: argparse.Namespace
) -> dict[str, object]:
    """What real decoding of batches of `size` different prompts comes to: medians over the repeats of times and of the
    ratios to plain decoding in the same turn. Plain decoding with other padding says how far texts may differ in half
    precision."""
    settings = dict(max_new_tokens=arguments.max_new_tokens, eos_token_id=None, do_sample=False)
    counts: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    same: defaultdict[str, int] = defaultdict(int)
    for repeat in range(arguments.repeats):
        start = repeat * size
        prompts = [evaluation.prompts[(start + row) % len(evaluation.prompts)] for row in range(size)]
        batch, turn, texts = encode(tokenizer, prompts).to(target.device), {}, {}
        for kind, drafter in {PLAIN: None, PADDED: None, **drafters}.items():
            drafting = {"num_assistant_tokens": 0}
            if drafter is not None:
                drafting = {"assistant_model": drafter, "num_assistant_tokens": arguments.num_draft_tokens}
                drafting |= {} if kind == "pard" else {"prompt_lookup_num_tokens": 0}
            given = with_more_padding(batch) if kind == PADDED else batch
            began = time.perf_counter()
            output = generate(target, **given, **settings, **drafting, return_dict_in_generate=True)
            seconds, statistics = time.perf_counter() - began, output.statistics
            rounds = max(1, statistics.rounds)
            texts[kind] = output.sequences[:, given["input_ids"].shape[1] :]
            turn[kind] = {
                "seconds": seconds,
                "draft_seconds": statistics.seconds.get("draft", 0.0) / rounds,
                "verify_seconds": statistics.seconds.get("verify", 0.0) / rounds,
                "tokens_per_pass": statistics.tokens_per_pass,
            }
        for kind, values in turn.items():
            counts[kind].append({**values, "times_plain": turn[PLAIN]["seconds"] / values["seconds"]})
            same[kind] += int((texts[kind] == texts[PLAIN]).all(dim=1).sum())
    return {
        "dtype": str(target.dtype).removeprefix("torch."),
        "batch_size": size,
        "texts": arguments.repeats * size,
        "kinds": {
            kind: {
                "identical_to_plain": same[kind],
                **{name: median(turn[name] for turn in turns) for name in turns[0]},
            }
            for kind, turns in counts.items()
        },
    }


def with_more_padding(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A few columns more on the left."""
    return {
        name: torch.cat([torch.zeros_like(part[:, :1]).expand(-1, MORE_PADDING), part], dim=1)
        for name, part in batch.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of `specformer distill`, or a jsonl file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs; gone on with")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/kinds.json"))
    parser.add_argument("--answers", type=Path, nargs="+", required=True, help="answers to evaluation prompts")
    parser.add_argument("--prompts", nargs="+", required=True, help="those that each of --answers answered")
    parser.add_argument("--target", help="folder or Hub id of the target; default: the one of `specformer fetch`")
    parser.add_argument("--kinds", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="to decode with; the first evaluates as well"
    )
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--draft-vocab-size", type=int, default=8192, help="of all but pard")
    parser.add_argument("--batch-size", type=int, default=8, help="texts at once in the evaluation on --answers")
    parser.add_argument("--time-at", type=int, nargs="*", default=[1, 8, 32], help="batch sizes to decode with")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="batches that are decoded, by all in turns")
    parser.add_argument("train", nargs="*", help="options of `specformer train`, after --")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
