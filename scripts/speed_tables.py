"""Tables of speed and of where the time goes, in Markdown, from the JSON files under benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path

from specformer.scripts import cost_model, loop_overhead
from specformer.scripts.contenders import PLAIN, PLAIN_ONEDNN

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

OTHER_SPEEDS = [f"benchmark_cpu_{regime}" for regime in ("256", "sampling", "long", "8k", "64", "128")]
"""Other regimes: long answers, sampling, long prompts, large batches."""


def result_of(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def ratios_of(figures: dict | None) -> str:
    """Times plain generate(), times the best of the plain ones if that is another one, and tokens per pass."""
    if not figures:
        return ""
    ratios = [figures[key]["median"] for key in ("ratio_to_plain", "ratio_to_best_plain")]
    rate = f" ({figures['tokens_per_pass']:.2f})" if "tokens_per_pass" in figures else ""
    return " / ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in ratios)) + rate


def names_of(contests: list[dict]) -> list[str]:
    """All contenders, in the order of the contest that has most of them; not every batch size has all."""
    by_number = sorted((list(contest["contenders"]) for contest in contests), key=len, reverse=True)
    return list(dict.fromkeys(name for names in by_number for name in names))


def machine_of(result: dict) -> str:
    machine = result["machine"]
    return f"{machine['torch_threads']} threads of {machine['device']} ({machine['cpu']})"


def sampling_of(result: dict) -> str:
    settings = result["regime"]["decoding"]["sampling"]
    return ", ".join(f"{key} {value}" for key, value in settings.items() if key != "do_sample")


def speed_table(name: str) -> list[str]:
    """Speed beside plain generate(), with drafters at both ends of what can be."""
    result = result_of(name)
    regime, contests = result["regime"], result["contests"]
    names = [name for name in names_of(contests) if name != PLAIN]
    lines = [
        "| contender | " + " | ".join(f"batch {contest['batch_size']}" for contest in contests) + " |",
        "|---" * (1 + len(contests)) + "|",
        f"| {PLAIN} | "
        + " | ".join(f"{contest['contenders'][PLAIN]['tokens_per_second']:.0f} tokens/s" for contest in contests)
        + " |",
    ]
    for name in names:
        cells = [ratios_of(contest["contenders"].get(name)) for contest in contests]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    identical, texts = (
        sum(numbers)
        for numbers in zip(
            *((f["identical"], c["texts"]) for c in contests for f in c["contenders"].values()), strict=True
        )
    )
    return [
        *lines,
        "",
        f"Greedy, {regime['max_new_tokens']} new tokens, {regime['dtype']}, MT-Bench prompts, medians of "
        f"{contests[0]['turns']} turns with other prompts each, {machine_of(result)}; {identical} of {texts} texts "
        f"identical to plain `generate`; {result['date']}.",
    ]


def speed_legend() -> list[str]:
    return [
        "Times the speed of plain `generate`, where another plain one is faster / times the speed of that one, and in "
        f'brackets tokens per target pass. "{PLAIN_ONEDNN}" has the matrix products of this package\'s passes, where '
        'some of those are faster than torch\'s own. "auto" is the default: it drafts as much as seems to pay. The '
        "drafters that are always right or always wrong know the text and cost nothing; a real one takes time. Drawn "
        "in benchmarks/results/benchmark_cpu.png.",
    ]


def contenders_legend() -> list[str]:
    return [
        "Times the speed of plain `generate`, where another plain one is faster / times the speed of that one, and in "
        f'brackets tokens per target pass. "{PLAIN_ONEDNN}" has the matrix products of this package\'s passes, '
        "where those are faster than torch's own: what is gained beside it, drafting gains. The drafters that are "
        'always right, always wrong, or right at 7 of 10 tokens know the text and cost nothing. "In step" all rows '
        'are right at the same tokens and advance together, "ragged" each row has its own: beside each other they '
        'show what raggedness costs. "default alone" drafts without copies. Drawn in '
        "benchmarks/results/benchmark_cpu_contenders.png and benchmark_cpu_amd.png.",
    ]


def other_speeds() -> list[str]:
    """Speed of the default drafter in other regimes."""
    results = [result_of(name) for name in OTHER_SPEEDS]
    every = names_of([contest for result in results for contest in result["contests"]])
    names = [name for name in every if name.startswith("default")]
    lines = [
        "| decoding | prompt tokens | new tokens | batch | " + " | ".join([PLAIN, *names]) + " | identical |",
        "|---" * (6 + len(names)) + "|",
    ]
    for result in results:
        for contest in result["contests"]:
            found, prompts = contest["contenders"], contest["prompt_tokens"]
            identical = sum(figures["identical"] for figures in found.values())
            lines.append(
                f"| {contest['decoding']} | {' to '.join(dict.fromkeys(map(str, prompts.values())))} | "
                f"{result['regime']['max_new_tokens']} | {contest['batch_size']} | "
                f"{found[PLAIN]['tokens_per_second']:.0f} tokens/s | "
                + " | ".join(ratios_of(found.get(name)) for name in names)
                + f" | {identical} of {contest['texts'] * len(found)} |"
            )
    settings = sampling_of(result_of("benchmark_cpu_sampling"))
    return [
        *lines,
        "",
        f"The same on {machine_of(result)}, medians of {contest['turns']} turns. Sampling: {settings}. Prompts that "
        "are all of one length are pieces of all prompts in a row. Batches of 64 and more have short prompts of "
        "Spec-Bench besides.",
    ]


def lengths_section() -> str:
    """Speed of the default drafter by how many tokens a round drafts."""
    result = result_of("benchmark_cpu_lengths")
    contests = result["contests"]
    names = [name for name in contests[0]["contenders"] if name.startswith("default")]
    lines = ["| drafted a round | " + " | ".join(f"batch {contest['batch_size']}" for contest in contests) + " |"]
    lines.append("|---" * (1 + len(contests)) + "|")
    for name in names:
        cells = [ratios_of(contest["contenders"][name]) for contest in contests]
        lines.append(f"| {name.removeprefix('default, ').removeprefix('k = ')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Times plain `generate`, as above. {regime_of(result)}"]) + "\n"


def same_prompt_section() -> str:
    """Batches of one prompt again and again, beside such of different ones."""
    same, different = result_of("benchmark_cpu_same_prompt"), result_of("benchmark_cpu")
    (contest,) = same["contests"]
    (other,) = (found for found in different["contests"] if found["batch_size"] == contest["batch_size"])
    lines = ["| contender | different prompts | one prompt again and again |", "|---|---|---|"]
    for name, figures in contest["contenders"].items():
        if theirs := other["contenders"].get(name):
            speeds = [f"{one['tokens_per_second']:.0f} tokens/s, {ratios_of(one)}" for one in (theirs, figures)]
            lines.append(f"| {name} | {' | '.join(speeds)} |")
    return "\n".join([*lines, "", f"Batches of {contest['batch_size']}. {regime_of(same)}"]) + "\n"


def memory_section() -> str:
    """What the first call of each contender took, of memory and of time."""
    result = result_of("benchmark_cpu")
    contests = result["contests"]
    lines = ["| contender | " + " | ".join(f"batch {contest['batch_size']}" for contest in contests) + " |"]
    lines.append("|---" * (1 + len(contests)) + "|")
    for name in names_of(contests):
        found = [contest["contenders"].get(name) for contest in contests]
        cells = [f"{one['first_call_gib']:.2f} GiB, {one['first_call_seconds']:.1f} s" if one else "" for one in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    regime = result["regime"]
    return "\n".join(
        [
            *lines,
            "",
            f"The first call of each, with its widest batch: {regime['max_new_tokens']} new tokens, {regime['dtype']}, "
            f"{machine_of(result)}; {result['date']}. Memory is the most that was resident beside what was there "
            "before the call, such as the weights. The first calls in the process, in the first column, find out what "
            "is faster here, probe the target and load the drafter.\n",
        ]
    )


def regime_of(result: dict) -> str:
    regime = result["regime"]
    return (
        f"Greedy, {regime['max_new_tokens']} new tokens, {regime['dtype']}, MT-Bench prompts, medians of "
        f"{regime['turns']} turns, {machine_of(result)}; {result['date']}."
    )


def profile_section() -> str:
    """Shares of one call's time."""
    result = result_of("profile_cpu_batch_16")
    regime, seconds, outside = result["regime"], result["median_seconds"], result["share_outside_the_models"]
    return (
        "| part | share of the call |\n|---|---|\n"
        f"| target | {seconds['target'] / seconds['total']:.1%} |\n"
        f"| drafter | {seconds['drafter'] / seconds['total']:.1%} |\n"
        f"| everything else | {outside['median']:.1%} ({outside['min']:.1%} to {outside['max']:.1%}) |\n"
        f"| of which rows of different lengths cost | {seconds['alignment'] / seconds['total']:.1%} |\n\n"
        f"{regime['target']} in {regime['dtype']}, greedy, {regime['batch_size']} different MT-Bench prompts, "
        f"{regime['max_new_tokens']} new tokens, {regime['num_assistant_tokens']} drafted a round, without copies, "
        f"median of {regime['repeats']} runs of {seconds['total']:.1f} s; {result['machine']['device']} "
        f"({result['machine']['cpu']}, {result['machine']['torch_threads']} threads), torch "
        f"{result['versions']['torch']}, transformers {result['versions']['transformers']}.\n"
    )


def loop_section() -> str:
    """Rounds beside the passes in them."""
    result = result_of("loop_overhead_cpu")
    regime = result["regime"]
    return "\n".join(
        [
            *loop_overhead.table(result["rounds"]),
            "",
            f"{regime['target']} in {regime['dtype']}, {regime['max_new_tokens']} new tokens behind prompts of "
            f"{regime['prompt_tokens']}, {regime['num_assistant_tokens']} drafted a round, without copies, medians of "
            f"all rounds of {regime['calls']} calls; sampling: {sampling_of(result)}; {machine_of(result)}; "
            f"{result['date']}.\n",
        ]
    )


def costs_section() -> str:
    """What drafting would cost a larger target."""
    result = result_of("cost_smollm2_1.7b_cpu")
    regime = result["regime"]
    return "\n".join(
        [
            cost_model.table(result),
            "",
            f"A model of costs, no generation: random weights of the shape of {regime['shape']} "
            f"({regime['target_parameters'] / 1e9:.1f} billion, and {regime['drafter_parameters'] / 1e6:.0f} million "
            f"of a drafter, which drafts {regime['draft_vocab_size']:,} tokens), {regime['dtype']}, texts of "
            f"{regime['context']} tokens, medians of {regime['repeats']}; {machine_of(result)}; {result['date']}.\n",
        ]
    )
