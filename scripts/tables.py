"""Write the figures of the README and of docs/ from the JSON files under benchmarks/results.

python -m specformer.scripts.tables          # rewrites what is between the markers
"""

from __future__ import annotations

import json
import sys
from statistics import mean

from specformer.scripts.model_card import machine_text, regime_text, run_table, task_table, what_it_is
from specformer.scripts.speed_tables import (
    KINDS_OF_PROMPTS,
    RESULTS,
    ROOT,
    before_after_lines,
    before_after_section,
    by_rows_section,
    contenders_section,
    costs_section,
    demo_section,
    headline_section,
    hybrid_section,
    lengths_section,
    loop_section,
    machine_of,
    markdown,
    memory_section,
    profile_section,
    regimes_section,
    result_of,
    rivals_section,
    rules_section,
    same_prompt_section,
    section,
    software_of,
    speed_section,
    verifying_section,
)

REAL_DECODING = [
    "mt_bench_256_greedy",
    "mt_bench_256_greedy_k7",
    "mt_bench_first_turns_greedy",
    "mt_bench_first_turns_sampling",
    "mt_bench_alone_greedy",
    "mt_bench_alone_sampling",
    "mt_bench_assistant_greedy",
    "mt_bench_assistant_sampling",
    "mt_bench_prompt_lookup_greedy",
    "mt_bench_prompt_lookup_sampling",
]
WITH_COPIES = ["mt_bench_256_greedy", "mt_bench_256_greedy_k7"]
BY_TASK = ["mt_bench_by_task", "spec_bench_by_task"]


# ---- docs/benchmarks.md


def acceptance_section() -> str:
    """Tokens per target pass and accepted drafts of real decoding, and the regime they were measured in."""
    rows, shares, notes = [], [], []
    for name in REAL_DECODING:
        result = result_of(name)
        regime, (low, high) = result["regime"], result["tokens_per_pass_95"]
        decoding = regime["decoding"]
        if decoding != "greedy":
            decoding += f', "{regime["acceptance"]}"'
        which = [regime["drafter"], decoding, str(regime["max_new_tokens"]), str(len(result["acceptance_per_slot"]))]
        identical = f"{result['identical']} of {result['prompts']}"
        rows.append([*which, identical, *(f"{rate:.2f}" for rate in (result["tokens_per_pass"], low, high))])
        shares.append([*which[:-1], *(f"{share:.0%}" for share in result["acceptance_per_slot"])])
        notes.append(
            f"First turns of MT-Bench ({result['prompts']} prompts, none of them trained on), {regime['target']} in "
            f"{regime['dtype']}, batches of {regime['batch_size']} different prompts, k tokens drafted a round; "
            f"{machine_text(result)}."
        )
    most = max(map(len, shares))
    shares = [[*row, *[""] * (most - len(row))] for row in shares]
    which = ["what drafts", "decoding", "new tokens"]
    return section(
        *markdown([*which, "k", "identical texts", "tokens per target pass", "95 % from", "to"], rows),
        "",
        "How many of the rounds accept the draft of a slot, and all before it:",
        "",
        *markdown([*which, *(f"slot {slot + 1}" for slot in range(most - len(which)))], shares),
        "",
        *dict.fromkeys(notes),
    )


# ---- docs/default_drafter.md


def drafter_section() -> str:
    """What the default drafter is, and how it was trained."""
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    log = result_of("default_drafter_training")
    return section(
        f"For {config['target_name_or_path']}: {what_it_is(log, config)}",
        "",
        *run_table(log),
        "",
        "Each training began with the weights of the one before. The last column is the best checkpoint, on answers "
        f"held out of that training, greedy, at {config['num_draft_tokens']} drafted tokens. {machine_text(log)}.",
    )


def by_task_section() -> str:
    """Tokens per target pass of the drafter alone, by task."""
    tables = [(*task_table(result), "", regime_text(result), "") for result in map(result_of, BY_TASK)]
    return section(*[line for lines in tables for line in lines][:-1])


def copies_section() -> str:
    """By task, what the drafter and copies of the text reach together, in real decoding."""
    results = [result_of(name) for name in WITH_COPIES]
    tasks = results[0]["tasks"] | {"all": results[0]}
    rows = [
        [
            task,
            str(figures["prompts"]),
            *(f"{(result['tasks'] | {'all': result})[task]['tokens_per_pass']:.2f}" for result in results),
        ]
        for task, figures in tasks.items()
    ]
    lengths = [f"k = {result['regime']['num_assistant_tokens']}, with copies" for result in results]
    return section(*markdown(["task", "prompts", *lengths], rows), "", regime_text(results[0]))


# ---- docs/lossless.md


def half_precision_section() -> str:
    """How many texts are equal in half precision, of each target; nothing where that has not been measured."""
    lines: list[str] = []
    for name in sorted(path.stem for path in RESULTS.glob("half_precision*.json")):
        result = result_of(name)
        regime, equal = result["regime"], result["equal"]
        ways = list(next(iter(equal.values())))
        rows = [[way, *(str(counts[way]) for counts in equal.values())] for way in ways]
        lines += [
            *markdown(["compared with plain `generate` of a batch", *equal], rows),
            "",
            f"Identical texts of {regime['prompts']}: {regime['target']}, {regime['decoding']}, "
            f"{regime['max_new_tokens']} new tokens, batches of {regime['batch_size']}; {machine_of(result)}, "
            f"{software_of(result)}, {result['date']}.",
            "",
        ]
    if not lines:
        return ""
    return section(*lines, "The first ways run no code of this package: what they differ in is rounding.")


# ---- docs/experiments.md


def ablations_section() -> str:
    """What variants of the drafter reach under one budget."""
    from benchmarks.ablations import at_one_pace  # of a checkout, as the results are

    result = result_of("ablations")
    variants = result["variants"]
    first = next(iter(variants.values()))
    k = sum(name.startswith("accuracy_slot_") for name in first[0]["offline"]["all"])
    kinds, seeds = list(first[0]["offline"]["tasks"]), [run["seed"] for run in first]
    sizes = [each["batch_size"] for each in first[0]["rounds"]]
    times = at_one_pace(variants)
    right, gained, speed = [], [], []
    for variant, runs in variants.items():
        every = [run["offline"]["all"] for run in runs]
        slots = [f"{mean(each[f'accuracy_slot_{slot}'] for each in every):.0%}" for slot in range(k)]
        right.append([variant, f"{runs[0]['parameters'] / 1e6:.1f}", *slots])
        rates = [run["offline"]["tasks"][kind][f"tokens_per_pass_k{k}"] for kind in kinds for run in runs]
        rates += [runs[0]["decoded"]["tokens_per_pass"], runs[0]["decoded"]["computed"]]
        gained.append([variant, *(f"{rate:.3f}" for rate in rates)])
        ratios = [every[0][f"tokens_per_pass_k{k}"] * step / (draft + check) for draft, check, step in times[variant]]
        drafting = [f"{1e3 * draft:.1f}" for draft, _, _ in times[variant]]
        speed.append([variant, *drafting, *(f"{ratio:.2f}" for ratio in ratios)])
    return section(
        *markdown(["variant", "million weights", *(f"right at slot {slot + 1}" for slot in range(k))], right),
        "",
        f"Tokens per target pass at k = {k}:",
        "",
        *markdown(
            ["variant", *(f"{kind}, seed {seed}" for kind in kinds for seed in seeds), "decoded", "computed for these"],
            gained,
        ),
        "",
        "Milliseconds of drafting, and the speed in times of plain decoding that follows from them:",
        "",
        *markdown(
            ["variant", *(f"draft, ms, batch {size}" for size in sizes), *(f"speed, batch {size}" for size in sizes)],
            speed,
        ),
    )


def replay_section() -> str:
    """Draft lengths replayed on the drafts of real texts: "auto", the rule before it, and fixed numbers."""
    result = result_of("draft_length_replay")
    ((target, speeds),) = result["targets"].items()
    titles = list(speeds[0]["speed"])
    rows = [
        [each["drafts"], each["machine"], str(each["batch_size"])]
        + [f"{each['speed'][title]:.2f}" if title in each["speed"] else "" for title in titles]
        for each in speeds
    ]
    return section(
        *markdown(["drafts", "passes of", "batch", *titles], rows),
        "",
        f"Speeds in times of plain decoding, {target}, {result['texts']} answers; "
        f"torch {result['versions']['torch']}, transformers {result['versions']['transformers']}, {result['date']}.",
    )


def rule_before_after_section() -> str:
    """The rule of "auto" against the one before it."""
    return section(*before_after_lines("draft_length_before_after"))


def packed_widths_section() -> str:
    """One number of drafts for all rows beside a number for each."""
    result = result_of("packed_widths")
    titles = list(result["table"][0]["speed"])
    rows = [
        [each["target"], KINDS_OF_PROMPTS[each["prompts"]], each["drafts"], str(each["batch_size"])]
        + [f"{each['speed'][title]:.2f}" for title in titles]
        for each in result["table"]
    ]
    return section(
        *markdown(["target", "prompts", "drafts", "batch", *titles], rows),
        "",
        f"Speeds in times of plain decoding, bfloat16, simulated; {machine_of(result)}, {software_of(result)}, "
        f"{result['date']}.",
    )


# ---- docs/drafters.md


def kinds_lines(result: dict) -> list[str]:
    """What drafters of each kind came to that were trained under one budget: what they draft, and what that costs."""
    k, timed = result["regime"]["num_assistant_tokens"], result["decoded"]
    several = len(runs_by_dtype(timed)) > 1
    titles = ["kind", "minutes of training", "tokens per pass", "from", "to"]
    titles += [f"right at slot {slot + 1}" for slot in range(k)]
    costs = ["kind", "million weights", "copied from the target"]
    for what in ("drafting a round, ms", "times plain"):
        costs += [f"{what}, {each['dtype'] + ', ' if several else ''}batch {each['batch_size']}" for each in timed]
    rows, cost_rows = [], []
    for kind, found in result["kinds"].items():
        name, figures = kind.replace("-", " "), found["offline"]["all"]
        rates = [figures[f"tokens_per_pass_k{k}"], *figures[f"tokens_per_pass_k{k}_95"]]
        right = [f"{figures[f'accuracy_slot_{slot}']:.0%}" for slot in range(k)]
        rows.append([name, f"{found['minutes']:.0f}", *(f"{rate:.2f}" for rate in rates), *right])
        sizes = [f"{found[count] / 1e6:.1f}" for count in ("parameters", "copied_from_target")]
        drafts = [f"{1e3 * each['kinds'][kind]['draft_seconds']:.1f}" for each in timed]
        speeds = [f"{each['kinds'][kind]['times_plain']:.2f}" for each in timed]
        cost_rows.append([name, *sizes, *drafts, *speeds])
    return [*markdown(titles, rows), "", *markdown(costs, cost_rows)]


def runs_by_dtype(decoded: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for each in decoded:
        found.setdefault(each["dtype"], []).append(each)
    return found


def kinds_section() -> str:
    """Drafters of each kind, trained under one budget, and what that was."""
    result = result_of("kinds")
    regime, kinds = result["regime"], list(result["kinds"].values())
    answers, seen = min(each["answer_tokens"] for each in kinds), min(each["tokens_seen"] for each in kinds)
    repeats = ", ".join(str(each["texts"] // each["batch_size"]) for each in result["decoded"])
    same = []
    for dtype, batches in runs_by_dtype(result["decoded"]).items():
        texts = sum(each["texts"] for each in batches)
        found = [sum(each["kinds"][kind]["identical_to_plain"] for each in batches) for kind in result["kinds"]]
        control = sum(each["kinds"]["plain with more padding"]["identical_to_plain"] for each in batches)
        same.append(f"{dtype}: {min(found)} to {max(found)} of {texts} (plain with other padding {control})")
    return section(
        *kinds_lines(result),
        "",
        f"{regime['target']}, {answers:,} tokens of its answers, {seen:,} of them learnt from, the same steps for all"
        f"{', a trial' if result['trial'] else ''}. Slots and tokens per pass: of its answers to MT-Bench, without "
        f"copies, with 95 % intervals. Times plain: beside plain decoding with packed weights, "
        f"{regime['max_new_tokens']} new tokens, medians of {repeats} batches of other prompts. Texts that are plain "
        f"ones: {'; '.join(same)}. {machine_of(result)}, {software_of(result)}, {result['date']}.",
    )


# ---- docs/devices.md and docs/scaling.md


TARGETS_OF_RANKS = {"tiny": "a tiny Llama", "MTP": "a tiny GLM-4.5", "SmolLM2": "SmolLM2-135M-Instruct"}


def ranks_section() -> str:
    """What was compared where several processes share a target, and what came of lost ones."""
    rows, lost = [], list[dict]()
    for run in result_of("ranks")["runs"]:
        lost += run["lost"]
        which = [TARGETS_OF_RANKS[run["target"]], f"{run['ranks']}, by {run['started_by']}"]
        for (way, calls, drafters), dtypes in alike(run["kinds"]).items():
            names = [f"{way}, {dtype}: {drafter}" for dtype in dtypes for drafter in drafters]
            differ = sum(bool(run["kinds"][name]["differences"]) for name in names)
            rows.append([*which, way, ", ".join(dtypes), *map(str, (len(drafters), calls, differ))])
    titles = ["target", "processes", "divided by", "numbers", "kinds of drafters", "calls of each", "kinds that differ"]
    told = sum(bool(each["raised"]) for each in lost)
    ways = " and ".join(f"{sum(each['how'] == how for each in lost)} {how}" for how in ("killed", "stopped"))
    return section(
        *markdown(titles, rows),
        "",
        f"Of processes that were lost in a call, {ways}, the others told {told} times in a sentence.",
    )


def alike(kinds: dict[str, dict]) -> dict[tuple[str, int, frozenset[str]], list[str]]:
    """The dtypes of kinds of tests/ranks.py, whose names are "way, dtype: what drafts": by the way, how often each was
    called, and what drafted."""
    drafters: dict[tuple[str, str, int], set[str]] = {}
    for name in sorted(kinds):
        first, drafter = name.split(": ")
        way, dtype = first.rsplit(", ", 1)
        drafters.setdefault((way, dtype, kinds[name]["calls"]), set()).add(drafter)
    found: dict[tuple[str, int, frozenset[str]], list[str]] = {}
    for (way, dtype, calls), some in drafters.items():
        found.setdefault((way, calls, frozenset(some)), []).append(dtype)
    return found


def divided_section() -> str:
    """A drafter whole in each process beside one that is shared."""
    result = result_of("divided")
    regime, ways = result["regime"], result["summary"]
    rows = []
    for way, figures in ways.items():
        (low, high), turns = figures["times_plain_from_to"], f"{figures['identical_turns']} of {result['turns']}"
        rates = [f"{rate:.2f}" for rate in (figures["times_plain"], low, high, figures["tokens_per_pass"])]
        rows.append([way, f"{figures['seconds']:.1f}", *rates, turns])
    return section(
        *markdown(["", "seconds", "times plain", "from", "to", "tokens per pass", "same texts"], rows),
        "",
        f"{regime['target']}, tensor parallel in {result['processes']} processes of "
        f"{result['machine']['torch_threads']} thread each, {regime['dtype']}, greedy, {regime['batch_size']} row, "
        f"{regime['max_new_tokens']} new tokens, {regime['num_assistant_tokens']} drafted a round; the assistant is "
        f"{regime['assistant']}; medians of {result['turns']} turns with other prompts; {result['machine']['cpu']}, "
        f"{software_of(result)}, {result['date']}.",
    )


def processes_section() -> str:
    """A file of prompts answered by several processes."""
    result = result_of("processes")
    rows = [
        [number, f"{speed:.0f}", f"{result['speed_up'][number]:.2f}"]
        for number, speed in result["tokens_per_second"].items()
    ]
    regime, cpu = result["regime"], ", ".join([result["machine"]["cpu"], *result["machine"]["cpu_flags"][:1]])
    lost = "; ".join(result["differences"]) or "no answer was lost, doubled or another one"
    return section(
        *markdown(["processes", "tokens per second", "times one process"], rows),
        "",
        f"{result['prompts']} prompts in one command, {regime['target'] or 'SmolLM2-135M-Instruct'} in "
        f"{regime['dtype']}, {regime['max_new_tokens']} new tokens, {regime['batch_size']} rows, each process on "
        f"{result['threads_per_process']} thread of {cpu}; runs of each: {len(result['runs']) // len(rows)}; {lost}. "
        f"`{result['command']}`, {software_of(result)}, {result['date']}.",
    )


SECTIONS = {
    "README.md": {"speed": headline_section},
    "docs/benchmarks.md": {
        "rivals": rivals_section,
        "by rows": by_rows_section,
        "acceptance": acceptance_section,
        "speed": speed_section,
        "regimes": regimes_section,
        "demo": demo_section,
        "profile": profile_section,
        "loop": loop_section,
        "before after": before_after_section,
        "rules": rules_section,
        "verifying": verifying_section,
        "lengths": lengths_section,
        "same prompt": same_prompt_section,
        "costs": costs_section,
        "hybrids": hybrid_section,
        "memory": memory_section,
        "contenders": contenders_section,
    },
    "docs/default_drafter.md": {"drafter": drafter_section, "by task": by_task_section, "copies": copies_section},
    "docs/lossless.md": {"half precision": half_precision_section},
    "docs/drafters.md": {"kinds": kinds_section},
    "docs/devices.md": {"ranks": ranks_section, "divided": divided_section},
    "docs/scaling.md": {"processes": processes_section},
    "docs/experiments.md": {
        "replay": replay_section,
        "rule before after": rule_before_after_section,
        "packed widths": packed_widths_section,
        "ablations": ablations_section,
    },
}
"""By page, what stands between the markers <!-- name --> and <!-- /name -->."""


def render(page: str) -> str:
    """The page as it should be: its text, and the sections of today's result files between the markers."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, content in SECTIONS[page].items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page}: expected the markers {begin.strip()} and {end} once each.")
        before, _, rest = text.partition(begin)
        text = before + begin + content() + end + rest.partition(end)[2]
    return text


def main() -> None:
    if not RESULTS.is_dir():
        sys.exit(f"There are no results under {RESULTS}: install from a checkout of SpecFormer with pip install -e.")
    for page in SECTIONS:
        (ROOT / page).write_text(render(page), encoding="utf-8")


if __name__ == "__main__":
    main()
