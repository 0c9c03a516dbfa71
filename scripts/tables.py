"""Write the figures of the README and of docs/ from the JSON files under benchmarks/results.

python -m specformer.scripts.tables          # rewrites what is between the markers
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from specformer.scripts import ablations
from specformer.scripts.contenders import PLAIN, PLAIN_ONEDNN
from specformer.scripts.model_card import regime_text, task_table, training_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

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
        result = json.loads((RESULTS / f"{name}.json").read_text())
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
    demo = json.loads((RESULTS / "demo_cpu.json").read_text())
    ratio = demo["tokens_per_second"] / demo["plain_tokens_per_second"]
    speed = (
        f"`make demo` on {machine_of(demo)}: {demo['tokens_per_second']:.0f} tokens/s where plain `generate` makes "
        f"{demo['plain_tokens_per_second']:.0f} ({ratio:.2f} times), at {demo['tokens_per_pass']:.2f} tokens per "
        f"target pass; batch of {demo['regime']['batch_size']}, draft length "
        f'"{demo["regime"]["num_assistant_tokens"]}", medians of {demo["regime"]["repeats"]} in turn.'
    )
    speeds = [line for name in SPEEDS for line in (*speed_table(name), "")] + [*speed_legend(), "", *other_speeds()]
    header = (
        "| what drafts | decoding | new tokens | texts identical to plain `generate` | tokens per target pass (95 %) | "
        "accepted drafts, slot by slot |\n|---|---|---|---|---|---|"
    )
    return "\n".join([header, *rows, "", *dict.fromkeys(notes), "", *speeds, "", speed]) + "\n"


SPEEDS = ["benchmark_cpu", "benchmark_cpu_amd"]
OTHER_SPEEDS = ["benchmark_cpu_256", "benchmark_cpu_sampling", "benchmark_cpu_long"]
"""Other regimes: long answers, sampling, long prompts."""


def ratios_of(figures: dict | None) -> str:
    """Times plain generate(), times the best of the plain ones if that is another one, and tokens per pass."""
    if not figures:
        return ""
    ratios = [figures[key]["median"] for key in ("ratio_to_plain", "ratio_to_best_plain")]
    rate = f" ({figures['tokens_per_pass']:.2f})" if "tokens_per_pass" in figures else ""
    return " / ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in ratios)) + rate


def machine_of(result: dict) -> str:
    machine = result["machine"]
    return f"{machine['torch_threads']} threads of {machine['device']} ({machine['cpu']})"


def speed_table(name: str) -> list[str]:
    """Speed beside plain generate(), with drafters at both ends of what can be."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    regime, contests = result["regime"], result["contests"]
    names = [name for name in contests[-1]["contenders"] if name != PLAIN]
    names += [name for name in contests[0]["contenders"] if name not in (PLAIN, *names)]  # of a batch of one
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
        f'brackets tokens per target pass. "{PLAIN_ONEDNN}" has the matrix products of this package\'s passes, '
        'where those are faster than torch\'s own: what is gained beside it, drafting gains. "auto" is the default: it '
        "drafts as much as seems to pay. The drafters that are always right, always wrong, or right at 7 of 10 tokens "
        'know the text and cost nothing; a real one takes time. "In step" all rows are right at the same tokens and '
        'advance together, "ragged" each row has its own: beside each other they show what raggedness costs. Drawn in '
        "benchmarks/results/benchmark_cpu.png and benchmark_cpu_amd.png.",
    ]


def other_speeds() -> list[str]:
    """Speed of the default drafter in other regimes."""
    lines = []
    for name in OTHER_SPEEDS:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        for contest in result["contests"]:
            found, prompts = contest["contenders"], contest["prompt_tokens"]
            names = [name for name in found if name.startswith("default")]
            if not lines:
                lines = [
                    "| decoding | prompt tokens | new tokens | batch | "
                    + " | ".join([PLAIN, *names])
                    + " | identical |",
                    "|---" * (6 + len(names)) + "|",
                ]
            identical = sum(figures["identical"] for figures in found.values())
            lines.append(
                f"| {contest['decoding']} | {' to '.join(dict.fromkeys(map(str, prompts.values())))} | "
                f"{result['regime']['max_new_tokens']} | {contest['batch_size']} | "
                f"{found[PLAIN]['tokens_per_second']:.0f} tokens/s | "
                + " | ".join(ratios_of(found[name]) for name in names)
                + f" | {identical} of {contest['texts'] * len(found)} |"
            )
    sampling = json.loads((RESULTS / "benchmark_cpu_sampling.json").read_text())["regime"]["decoding"]["sampling"]
    settings = ", ".join(f"{key} {value}" for key, value in sampling.items() if key != "do_sample")
    return [
        *lines,
        "",
        f"The same on {machine_of(result)}, medians of {contest['turns']} turns. Sampling: {settings}. Long prompts "
        "are pieces of all prompts in a row.",
    ]


def profile_section() -> str:
    """Shares of one call's time."""
    result = json.loads((RESULTS / "profile_cpu_batch_16.json").read_text())
    regime, seconds, outside = result["regime"], result["median_seconds"], result["share_outside_the_models"]
    return (
        "| part | share of the call |\n|---|---|\n"
        f"| target | {seconds['target'] / seconds['total']:.1%} |\n"
        f"| drafter | {seconds['drafter'] / seconds['total']:.1%} |\n"
        f"| everything else | {outside['median']:.1%} ({outside['min']:.1%} to {outside['max']:.1%}) |\n\n"
        f"{regime['target']} in {regime['dtype']}, greedy, {regime['batch_size']} different MT-Bench prompts, "
        f"{regime['max_new_tokens']} new tokens, {regime['num_assistant_tokens']} drafted a round, without copies, "
        f"median of {regime['repeats']} runs of {seconds['total']:.1f} s; {result['machine']['device']} "
        f"({result['machine']['cpu']}, {result['machine']['torch_threads']} threads), torch "
        f"{result['versions']['torch']}, transformers {result['versions']['transformers']}.\n"
    )


def drafter_section() -> str:
    """What the default drafter is, how it was trained, and what it comes to by task."""
    config = json.loads((ROOT / "config.json").read_text())
    log = json.loads((RESULTS / "default_drafter_training.json").read_text())
    lines = [f"For {config['target_name_or_path']}: {training_text(log, config)}", ""]
    for name in BY_TASK:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        lines += [*task_table(result), "", regime_text(result), ""]
    return "\n".join([*lines, *copies_table()]) + "\n"


def copies_table() -> list[str]:
    """By task, what the drafter and copies of the text come to together, in real decoding."""
    results = [json.loads((RESULTS / f"{name}.json").read_text()) for name in WITH_COPIES]
    rows = [
        f"| {task} | {figures['prompts']} | "
        + " | ".join(f"{(result['tasks'] | {'all': result})[task]['tokens_per_pass']:.2f}" for result in results)
        + " |"
        for task, figures in (results[0]["tasks"] | {"all": results[0]}).items()
    ]
    lengths = [f"k = {result['regime']['num_assistant_tokens']}, with copies" for result in results]
    header = [f"| task | prompts | {' | '.join(lengths)} |", "|---" * (2 + len(lengths)) + "|"]
    return [*header, *rows, "", regime_text(results[0])]


def ablations_section() -> str:
    """What variants of the drafter come to under one budget."""
    return ablations.table(json.loads((RESULTS / "ablations.json").read_text())) + "\n"


SECTIONS = {
    "README.md": {"results": results_section, "drafter": drafter_section},
    "docs/profile.md": {"results": profile_section},
    "docs/experiments.md": {"ablations": ablations_section},
}
"""By page, what stands between the markers <!-- name --> and <!-- /name -->."""


def render(page: str) -> str:
    """The page as it should be: its text, and the sections of today's result files between the markers."""
    text = (ROOT / page).read_text()
    for name, section in SECTIONS[page].items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        content = section()
        text = re.sub(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", lambda _: content, text, flags=re.S)  # noqa: B023
    return text


if __name__ == "__main__":
    for page in SECTIONS:
        (ROOT / page).write_text(render(page))
