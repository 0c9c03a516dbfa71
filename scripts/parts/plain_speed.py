"""How fast a run answered, and how fast plain generate() answers some of its prompts, with the same texts or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import torch

from specformer.generation.backend_linear import fast_linears
from specformer.scripts.parts.answering import Answer, left_padded
from specformer.scripts.parts.drafted_answering import DraftedAnswering

TURNS = 2


def both_ways(answering: DraftedAnswering, asked: Sequence[Answer]) -> dict[str, float]:
    """Answer prompts with plain generate(), in batches of the same size, and as `answering` does, in turns: tokens and
    seconds of either, and for how many prompts the texts are the same. Where they are sampled, none need be."""
    found = {"compared": len(asked), "same": 0, "plain_tokens": 0, "plain_seconds": 0.0}
    found |= {"again_tokens": 0, "again_seconds": 0.0}
    for turn in range(TURNS):
        some, plain = asked[turn::TURNS], list[list[int]]()
        started = perf_counter()
        for start in range(0, len(some), answering.batch_size):
            plain += plain_answers(answering, some[start : start + answering.batch_size])
        found["plain_seconds"] += perf_counter() - started
        started = perf_counter()
        with fast_linears(answering.target):
            again = answering.run(replace(answer, response_ids=[]) for answer in some)
            drafted = {answer.index: answer.response_ids for answer in again}
        found["again_seconds"] += perf_counter() - started
        found["plain_tokens"] += sum(map(len, plain))
        found["again_tokens"] += sum(map(len, drafted.values()))
        found["same"] += sum(drafted[answer.index] == text for answer, text in zip(some, plain, strict=True))
    return found


def plain_answers(answering: DraftedAnswering, batch: Sequence[Answer]) -> list[list[int]]:
    """What plain generate() answers, each up to its end."""
    ids, mask = left_padded(batch, answering.device)
    texts = answering.target.generate(ids, attention_mask=mask, **answering.settings)[:, ids.shape[1] :]
    eos = torch.tensor([token for token in answering.eos_token_ids if token is not None], device=texts.device).long()
    goes_on = (~torch.isin(texts, eos)).long().cumprod(dim=1).sum(dim=1)  # tokens in front of the first end
    return [text[: count + 1] for text, count in zip(texts.tolist(), goes_on.tolist(), strict=True)]


def figures_of(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of what each process measured: together in as long as the slowest took, and ratios of means."""

    def total(name: str) -> float:
        return sum(each.get(name, 0) for each in measured)

    figures: dict[str, float] = {"answers": total("answers"), "tokens": total("tokens")}
    if figures["tokens"]:
        figures["seconds"] = max(each["seconds"] for each in measured)
        figures["tokens_per_second"] = figures["tokens"] / figures["seconds"]
    if total("passes"):
        figures["tokens_per_pass"] = total("drafted_tokens") / total("passes")
    if total("compared"):
        figures |= {"compared": total("compared"), "same": total("same")}
        for way in ("plain", "again"):
            figures[f"{way}_tokens_per_second"] = total(f"{way}_tokens") / total(f"{way}_seconds")
        figures["speed_up"] = figures["again_tokens_per_second"] / figures["plain_tokens_per_second"]
    return figures


def in_words(figures: dict[str, float]) -> str:
    """One line for people."""
    if not figures["answers"]:
        words = "All of them were there."
    else:
        words = f"{figures['answers']} of them now: {figures['tokens_per_second']:.0f} tokens/s"
        words += f", {figures['tokens_per_pass']:.2f} tokens per target pass." if "tokens_per_pass" in figures else "."
    if "speed_up" in figures:
        ours, plain = (f"{figures[f'{way}_tokens_per_second']:.0f}" for way in ("again", "plain"))
        words += (
            f" Speed-up {figures['speed_up']:.2f}: {figures['compared']} prompts once more, with {ours} tokens/s of a "
            f"process, and with {plain} by plain generate(); {figures['same']} texts are the same."
        )
    return words
