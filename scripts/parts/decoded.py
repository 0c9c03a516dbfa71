"""What a drafter comes to in real decoding, beside plain generate() on the same batches."""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from specformer.generation.generate import generate
from specformer.scripts.parts.prompt_rows import Prompt
from specformer.scripts.parts.prompts import encode


def bootstrap_interval(tokens: Sequence[int], passes: Sequence[int], draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of sum(tokens) / sum(passes) when the prompts are drawn again."""
    of_prompts = np.array([tokens, passes])
    index = np.random.default_rng(0).integers(0, len(tokens), (draws, len(tokens)))
    drawn = of_prompts[:, index].sum(-1)
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    return float(low), float(high)


@torch.no_grad()
def explain(target, text: torch.Tensor, mask: torch.Tensor, theirs: int, ours: int) -> float:
    """Logit of plain generate()'s token minus ours, after `text` (T,): near 0 where rounding decided."""
    kept = text[mask.bool()][None]
    logits = target(input_ids=kept, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return float(logits[theirs] - logits[ours])


def evaluate_decoding(
    target,
    tokenizer,
    drafting: dict,
    prompts: list[Prompt],
    tasks: list[str],
    arguments: argparse.Namespace,
    template_kwargs: dict | None = None,
) -> dict:
    """Generate with and without drafting, in turn.

    Args:
        drafting: what makes generate() draft, and how much.
        tasks: of each prompt.
        arguments: batch_size, max_new_tokens, sample, acceptance.
        template_kwargs: of the tokenizer's chat template.

    Returns:
        Texts that agree, tokens per pass (all, by task), acceptance per slot, and the counts that `paper_measures`
        takes.
    """
    from tqdm import tqdm

    # the other rules give another text of the same distribution
    same_text = not arguments.sample or arguments.acceptance == "match"
    rows: dict[str, list[int]] = {"tokens": [], "passes": []}
    mismatches: list[dict] = []
    seconds: defaultdict[str, float] = defaultdict(float)
    by_task: defaultdict[str, Counter[str]] = defaultdict(Counter)
    drafted: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    progress = tqdm(total=len(prompts), unit="prompt")
    for start in range(0, len(prompts), arguments.batch_size):
        batch = encode(tokenizer, prompts[start : start + arguments.batch_size], template_kwargs).to(target.device)
        settings = dict(max_new_tokens=arguments.max_new_tokens, do_sample=arguments.sample)
        torch.manual_seed(start)
        began = time.perf_counter()
        plain = target.generate(**batch, **settings)
        seconds["plain"] += time.perf_counter() - began
        torch.manual_seed(start)
        began = time.perf_counter()
        output = generate(
            target,
            **batch,
            **settings,
            **drafting,
            acceptance=arguments.acceptance,
            return_dict_in_generate=True,
        )
        seconds["drafting"] += time.perf_counter() - began
        statistics = output.statistics
        width = max(plain.shape[1], output.sequences.shape[1])
        theirs, ours = (
            torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=tokenizer.pad_token_id)
            for ids in (plain, output.sequences)
        )
        for row, (tokens, passes) in enumerate(
            zip(statistics.tokens_per_row, statistics.target_passes_per_row, strict=True)
        ):
            if passes:
                rows["tokens"].append(tokens - 1)
                rows["passes"].append(passes)
                by_task[tasks[start + row]].update(tokens=tokens - 1, passes=passes)
            different = (theirs[row] != ours[row]).nonzero().flatten().tolist()
            if different and same_text:
                at, prompt_width = different[0], batch["input_ids"].shape[1]
                mask = torch.cat([batch["attention_mask"][row], batch["attention_mask"].new_ones(at - prompt_width)])
                gap = explain(target, theirs[row, :at], mask, int(theirs[row, at]), int(ours[row, at]))
                mismatches.append({"prompt": start + row, "new_token": at - prompt_width, "logit_gap": gap})
        drafted.update(dict(enumerate(statistics.drafted_per_slot)))
        accepted.update(dict(enumerate(statistics.accepted_per_slot)))
        progress.update(len(batch["input_ids"]))
        progress.set_postfix(tokens_per_pass=f"{sum(rows['tokens']) / sum(rows['passes']):.3f}")
    progress.close()
    tokens, passes = sum(rows["tokens"]), sum(rows["passes"])
    return {
        "prompts": len(prompts),
        **({"identical": len(prompts) - len(mismatches), "mismatches": mismatches} if same_text else {}),
        "tokens_per_pass": tokens / passes,
        "tokens_per_pass_95": bootstrap_interval(rows["tokens"], rows["passes"]),
        "tasks": {
            task: {"prompts": tasks.count(task), "tokens_per_pass": counts["tokens"] / counts["passes"]}
            for task, counts in by_task.items()
        },
        "acceptance_per_slot": [accepted[slot] / drafted[slot] for slot in sorted(drafted)],
        "counts": {
            "tokens": tokens,
            "passes": passes,
            "drafted_per_slot": [drafted[slot] for slot in sorted(drafted)],
            "accepted_per_slot": [accepted[slot] for slot in sorted(drafted)],
        },
        "seconds": dict(seconds),
    }
