"""How many texts are equal in half precision, where two batch shapes of plain generate() already disagree.

    python -m benchmarks.half_precision --prompts mt_bench.jsonl --output half_precision.json

Each prompt is answered greedily in a batch of plain generate(), which the other ways are compared with: the same batch
with a few more columns of padding, every row alone, and this package. The first two are the control: they run no code
of this package, and what they differ in is rounding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from specformer.generation.generate import generate
from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.prompts import encode, read_prompts
from specformer.scripts.parts.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
MORE_COLUMNS = 3


def padded_by(batch: dict, columns: int, pad_token_id: int) -> dict:
    """The same prompts with more padding in front of them."""
    ids = torch.nn.functional.pad(batch["input_ids"], (columns, 0), value=pad_token_id)
    return {"input_ids": ids, "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (columns, 0))}


def rows_of(batch: dict) -> list[dict]:
    """Each prompt alone, without padding."""
    return [
        {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def new_texts(output: torch.Tensor, prompt_width: int, eos_token_ids: set[int]) -> list[list[int]]:
    """The new tokens of each row, up to the one that ends it."""
    texts = []
    for row in output[:, prompt_width:].tolist():
        end = next((place for place, token in enumerate(row) if token in eos_token_ids), len(row))
        texts.append(row[: end + 1])
    return texts


def ways_of(target, drafter, tokenizer, max_new_tokens: int) -> dict[str, Callable[[dict], list[list[int]]]]:
    """What to compare, by name: from a batch to the new tokens of its rows. The others are compared with the first."""
    eos = target.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    settings = dict(max_new_tokens=max_new_tokens, do_sample=False)
    pad = tokenizer.pad_token_id

    def plain(batch: dict) -> list[list[int]]:
        return new_texts(target.generate(**batch, **settings, pad_token_id=pad), batch["input_ids"].shape[1], ends)

    def ours(batch: dict, **how) -> list[list[int]]:
        output = generate(target, drafter, **batch, **settings, **how, pad_token_id=pad)
        return new_texts(output, batch["input_ids"].shape[1], ends)

    copies = {} if drafter is not None else {"prompt_lookup_num_tokens": 4}
    fixed = {"num_assistant_tokens": 4} if drafter is not None else copies
    by_default = {"SpecFormer, default settings": ours} if drafter is not None else {}
    return {
        "plain generate": plain,
        f"plain generate, {MORE_COLUMNS} more columns of padding": lambda batch: plain(
            padded_by(batch, MORE_COLUMNS, pad)
        ),
        "plain generate, every row alone": lambda batch: [text for row in rows_of(batch) for text in plain(row)],
        "SpecFormer, plain decoding in its loop": lambda batch: ours(batch, num_assistant_tokens=0),
        "SpecFormer, four tokens drafted": lambda batch: ours(batch, **fixed),
        **by_default,
    }


def main(arguments: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    prompts = read_prompts(arguments.prompts, arguments.limit)
    folder, identity = find_target(arguments.target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    default = arguments.drafter is None and arguments.target is None
    drafter = (
        AutoModel.from_pretrained(ROOT if default else arguments.drafter) if default or arguments.drafter else None
    )
    results = {}
    for dtype in arguments.dtype:
        target = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        ways = ways_of(target, drafter, tokenizer, arguments.max_new_tokens)
        equal = dict.fromkeys(ways, 0)
        starts = range(0, len(prompts), arguments.batch_size)
        for start in tqdm(starts, desc=dtype):
            batch = dict(encode(tokenizer, prompts[start : start + arguments.batch_size]))
            reference = None
            for name, way in ways.items():
                texts = way(batch)
                reference = texts if reference is None else reference
                equal[name] += sum(one == other for one, other in zip(texts, reference, strict=True))
        results[dtype] = {name: count for name, count in equal.items() if name != "plain generate"}
        print(dtype, json.dumps(results[dtype], indent=2))
    result = {
        **provenance("benchmarks.half_precision"),
        "regime": {
            "target": arguments.name or identity,
            "decoding": "greedy",
            "prompts": len(prompts),
            "batch_size": arguments.batch_size,
            "max_new_tokens": arguments.max_new_tokens,
        },
        "equal": results,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument(
        "--target", help="folder or Hub id; default: the one of `specformer fetch`, with the default drafter"
    )
    parser.add_argument("--drafter", help="folder or Hub id; default: copies, where --target is given")
    parser.add_argument("--name", help="what to call the target, where it is a folder")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
