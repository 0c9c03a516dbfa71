"""Write the figures of the README and of docs/ from the JSON files under benchmarks/results.

python -m specformer.scripts.tables          # rewrites what is between the markers
"""

from __future__ import annotations

import json
import re
import sys

from specformer.scripts import ablations
from specformer.scripts.model_card import regime_text, task_table, training_text
from specformer.scripts.speed_tables import (
    RESULTS,
    ROOT,
    contenders_legend,
    costs_section,
    lengths_section,
    loop_section,
    machine_of,
    memory_section,
    other_speeds,
    profile_section,
    result_of,
    same_prompt_section,
    speed_legend,
    speed_table,
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


def results_section() -> str:
    """The table of real decoding, and the regime it was measured in."""
    rows, notes = [], []
    for name in REAL_DECODING:
        result = result_of(name)
        regime, (low, high) = result["regime"], result["tokens_per_pass_95"]
        slots = ", ".join(f"{share:.0%}" for share in result["acceptance_per_slot"])
        same = (
            f"{result['identical']} of {result['prompts']}"
            if "identical" in result
            else "another text, same distribution"
        )
        decoding = regime["decoding"]
        if decoding != "greedy":
            decoding += f', "{regime["acceptance"]}"'
        rows.append(
            f"| {regime['drafter']} | {decoding} | {regime['max_new_tokens']} | {same} | "
            f"{result['tokens_per_pass']:.2f} ({low:.2f}-{high:.2f}) | {slots} |"
        )
        notes.append(
            f"First turns of MT-Bench ({result['prompts']} prompts, none of them trained on), {regime['target']} in "
            f"{regime['dtype']}, batches of {regime['batch_size']} different prompts, as many drafted a round as there "
            f"are slots in the last column; {result['machine']['device']} ({result['machine']['cpu']}), torch "
            f"{result['versions']['torch']}, transformers {result['versions']['transformers']}."
        )
    demo = result_of("demo_cpu")
    ratio = demo["tokens_per_second"] / demo["plain_tokens_per_second"]
    speed = (
        f"`make demo` on {machine_of(demo)}: {demo['tokens_per_second']:.0f} tokens/s where plain `generate` makes "
        f"{demo['plain_tokens_per_second']:.0f} ({ratio:.2f} times), at {demo['tokens_per_pass']:.2f} tokens per "
        f"target pass; batch of {demo['regime']['batch_size']}, draft length "
        f'"{demo["regime"]["num_assistant_tokens"]}", medians of {demo["regime"]["repeats"]} in turn.'
    )
    speeds = [*speed_table("benchmark_cpu"), "", *speed_legend(), "", *other_speeds()]
    header = (
        "| what drafts | decoding | new tokens | texts identical to plain `generate` | tokens per target pass (95 %) | "
        "accepted drafts, slot by slot |\n|---|---|---|---|---|---|"
    )
    return "\n".join([header, *rows, "", *dict.fromkeys(notes), "", *speeds, "", speed]) + "\n"


def drafter_section() -> str:
    """What the default drafter is, how it was trained, and what it comes to by task."""
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    log = result_of("default_drafter_training")
    lines = [f"For {config['target_name_or_path']}: {training_text(log, config)}", ""]
    for name in BY_TASK:
        result = result_of(name)
        lines += [*task_table(result), "", regime_text(result), ""]
    return "\n".join([*lines, *copies_table()]) + "\n"


def copies_table() -> list[str]:
    """By task, what the drafter and copies of the text come to together, in real decoding."""
    results = [result_of(name) for name in WITH_COPIES]
    rows = [
        f"| {task} | {figures['prompts']} | "
        + " | ".join(f"{(result['tasks'] | {'all': result})[task]['tokens_per_pass']:.2f}" for result in results)
        + " |"
        for task, figures in (results[0]["tasks"] | {"all": results[0]}).items()
    ]
    lengths = [f"k = {result['regime']['num_assistant_tokens']}, with copies" for result in results]
    header = [f"| task | prompts | {' | '.join(lengths)} |", "|---" * (2 + len(lengths)) + "|"]
    return [*header, *rows, "", regime_text(results[0])]


def speeds_section() -> str:
    """More contenders, and another machine."""
    tables = [line for name in ("benchmark_cpu_contenders", "benchmark_cpu_amd") for line in (*speed_table(name), "")]
    return "\n".join([*tables, *contenders_legend()]) + "\n"


def ablations_section() -> str:
    """What variants of the drafter come to under one budget."""
    return ablations.table(result_of("ablations")) + "\n"


SECTIONS = {
    "README.md": {"results": results_section, "drafter": drafter_section},
    "docs/speed.md": {
        "profile": profile_section,
        "loop": loop_section,
        "lengths": lengths_section,
        "same prompt": same_prompt_section,
        "costs": costs_section,
        "memory": memory_section,
        "speeds": speeds_section,
    },
    "docs/experiments.md": {"ablations": ablations_section},
}
"""By page, what stands between the markers <!-- name --> and <!-- /name -->."""


def render(page: str) -> str:
    """The page as it should be: its text, and the sections of today's result files between the markers."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, section in SECTIONS[page].items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page}: expected the markers {begin.strip()} and {end} once each.")
        content = section()
        text = re.sub(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", lambda _: content, text, flags=re.S)  # noqa: B023
    return text


def main() -> None:
    if not RESULTS.is_dir():
        sys.exit(f"There are no results under {RESULTS}: install from a checkout of SpecFormer with pip install -e.")
    for page in SECTIONS:
        (ROOT / page).write_text(render(page), encoding="utf-8")


if __name__ == "__main__":
    main()
