"""Tables of speed and of where the time goes, in Markdown, from the JSON files under benchmarks/results.

One number a cell. Speed-ups are ratios to plain `generate()`, taken within one turn; where oneDNN's matrix products are
faster than torch's own, plain `generate()` was timed with both, and the fastest plain one is what counts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from specformer.scripts.parts.contenders import PLAIN, PLAIN_ONEDNN

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

HEADLINE = "benchmark_cpu"
NAMES_OF_WAYS = {
    "specformer, drafter": "SpecFormer, drafter and copies",
    "specformer, drafter, chains": "SpecFormer, the same without trees",
    "specformer, assistant": "SpecFormer, a smaller model of the family",
    "specformer, copies, auto": "SpecFormer, copies of up to 10 tokens",
    "specformer, prompt lookup": "SpecFormer, copies of 4 tokens",
    "economize, lookup": "economize, copies of 4 tokens",
    "transformers, prompt lookup": "transformers' prompt lookup, 4 tokens",
    "transformers, assistant": "transformers' assisted decoding, the same smaller model",
}
KINDS_OF_PROMPTS = {"code": "code", "mbpp": "code (MBPP)", "mt_bench": "chat (MT-Bench)", "edit": "editing code"}
"""What the README calls the ways to generate and the prompts of `benchmarks.rivals`."""
BY_ROWS = [
    f"benchmark_{name}"
    for name in (
        "qwen2.5_coder_1.5b_mt_bench",
        "qwen2.5_coder_0.5b_mt_bench",
        "smollm2_mt_bench",
        "qwen2.5_coder_0.5b_mbpp",
    )
]
"""Results by number of rows; those of chat are the README's."""
OTHER_SPEEDS = [f"benchmark_cpu_{regime}" for regime in ("256", "sampling", "long", "8k", "64", "128")]
"""Other regimes: long answers, sampling, long prompts, large batches."""


def result_of(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# ---- cells and lines


def markdown(titles: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def tokens_per_second(figures: dict | None) -> str:
    rate = figures["tokens_per_second"] if figures else None
    return "" if rate is None else f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def speed_up(figures: dict | None) -> str:
    """Compared with the fastest plain generate()."""
    return f"{figures['ratio_to_best_plain']['median']:.2f}" if figures else ""


def speed_up_over_torch(figures: dict | None) -> str:
    """Compared with plain generate() as torch computes its matrix products by itself."""
    return f"{figures['ratio_to_plain']['median']:.2f}" if figures else ""


def tokens_per_pass(figures: dict | None) -> str:
    return f"{figures['tokens_per_pass']:.2f}" if figures and "tokens_per_pass" in figures else ""


def names_of(contests: list[dict]) -> list[str]:
    """All contenders, in the order of the contest that has most of them; not every batch size has all."""
    by_number = sorted((list(contest["contenders"]) for contest in contests), key=len, reverse=True)
    return list(dict.fromkeys(name for names in by_number for name in names))


def by_batch(contests: list[dict], names: list[str], cell) -> list[str]:
    """`cell` of each contender at each batch size; contenders that have none anywhere are left out."""
    rows = [[name, *(cell(contest["contenders"].get(name)) for contest in contests)] for name in names]
    return markdown(["contender", *batch_titles(contests)], [row for row in rows if any(row[1:])])


def in_order(result: dict) -> list[dict]:
    """The contests of a result, the smallest batch first."""
    return sorted(result["contests"], key=lambda contest: contest["batch_size"])


def batch_titles(contests: list[dict]) -> list[str]:
    return [f"batch {contest['batch_size']}" for contest in contests]


def machine_of(result: dict) -> str:
    machine = result["machine"]
    known = ", ".join([machine["cpu"], *machine.get("cpu_flags", [])[:1]])  # the first flag says most
    return f"{machine['torch_threads']} threads of {machine['device']} ({known})"


def software_of(result: dict) -> str:
    return f"torch {result['versions']['torch']}, transformers {result['versions']['transformers']}"


def regime_of(result: dict) -> str:
    regime, turns = result["regime"], span({contest["turns"] for contest in result["contests"]})
    return (
        f"Greedy, {regime['max_new_tokens']} new tokens, {regime['dtype']}, {prompts_of(result)} prompts, medians of "
        f"{turns} turns with other prompts each, {machine_of(result)}, {result['date']}"
    )


def kind_of_prompts(result: dict) -> str:
    return Path(result["regime"]["prompts"]).stem


def prompts_of(result: dict) -> str:
    kind = kind_of_prompts(result)
    return {"mbpp": "MBPP", "mt_bench": "MT-Bench"}.get(kind, kind)


def name_of_target(result: dict) -> str:
    return result["regime"]["target"].split("/")[-1]


def identical_of(result: dict) -> str:
    """How many texts with drafts were those of plain generate()."""
    found = [
        (figures["identical"], contest["texts"])
        for contest in result["contests"]
        for name, figures in contest["contenders"].items()
        if name not in (PLAIN, PLAIN_ONEDNN)
    ]
    identical, texts = (sum(numbers) for numbers in zip(*found, strict=True))
    return f"with drafts {identical} of {texts} texts are identical to plain `generate`"


def sampling_of(result: dict) -> str:
    settings = result["regime"]["decoding"]["sampling"]
    return ", ".join(f"{key} {value}" for key, value in settings.items() if key != "do_sample")


def section(*lines: str) -> str:
    return "\n".join(lines) + "\n"


# ---- sections of the README and of docs/benchmarks.md


def headline_section() -> str:
    """The README's tables."""
    return section(*by_task("rivals_drafter"), "", *default_by_rows())


def default_by_rows() -> list[str]:
    """Default settings by number of rows, and what of it plain generate() would gain as well."""
    results = [result for result in map(result_of, BY_ROWS) if kind_of_prompts(result) == "mt_bench"]
    ways = {"SpecFormer, default settings": "default, auto", "plain `generate` with packed weights": PLAIN_ONEDNN}
    rows = [
        [
            f"{size_of(name_of_target(result))}, {title}",
            *(speed_up_over_torch(contest["contenders"].get(name)) for contest in in_order(result)),
        ]
        for result in results
        for title, name in ways.items()
    ]
    targets = ", ".join(map(name_of_target, results))
    titles = [KINDS_OF_PROMPTS["mt_bench"], *batch_titles(in_order(results[0]))]
    tokens = ", ".join(
        f"{result['regime']['max_new_tokens']} ({size_of(name_of_target(result))})" for result in results
    )
    turns = span({contest["turns"] for result in results for contest in result["contests"]})
    dtypes = ", ".join(dict.fromkeys(result["regime"]["dtype"] for result in results))
    return [
        *markdown(titles, rows),
        "",
        f"{targets}, {dtypes}, times plain `generate`. Greedy, {tokens} new tokens, medians of {turns} turns with "
        f"other prompts each; {machine_of(results[0])}, {software_of(results[0])}; {results[0]['date']}.",
    ]


def rivals_section() -> str:
    """The same without a drafter, and with what other libraries make of it."""
    return section(*by_task("rivals"))


def by_task(name: str) -> list[str]:
    """Models that people use, and what others make of them: a column for each target, kind of prompts and batch."""
    from benchmarks import rivals  # of a checkout, as the results are

    result = result_of(name)
    groups = rivals.groups_of(result)
    ways = sorted(rivals.ways_of(result), key=lambda pair: list(NAMES_OF_WAYS).index(pair[1]))
    rows = [
        [NAMES_OF_WAYS[way], *(ratio(rivals.speed(groups[place], library, way)) for place in groups)]
        for library, way in ways
    ]
    targets = dict.fromkeys(target for target, *_ in groups)
    sizes = {place[-1] for place in groups}
    titles = [
        ", ".join(
            [size_of(target)] * (len(targets) > 1)
            + [KINDS_OF_PROMPTS[prompts]]
            + ["one row" if size == 1 else f"{size} rows"] * (len(sizes) > 1)
        )
        for target, _, prompts, size in groups
    ]
    turns = {len(figures) for figures in groups.values()}
    dtypes = ", ".join(dict.fromkeys(dtype for _, dtype, _, _ in groups))
    others = ""
    if economize := result["environments"].get("economize"):
        others = f", economize {economize['economize']} with transformers {economize['transformers']}"
    return [
        *markdown(["", *titles], rows),
        "",
        f"{', '.join(targets)}, {dtypes}{', one row' if sizes == {1} else ''}, times plain `generate`. Greedy, "
        f"{result['regime']['max_new_tokens']} new "
        f"tokens, medians of {span(turns)} turns with other prompts each; {machine_of(result)}, "
        f"{software_of(result)}{others}; {result['date']}.",
    ]


def ratio(speed: float | None) -> str:
    return "" if speed is None else f"{speed:.2f}"


def size_of(target: str) -> str:
    """The size that stands in a target's name, such as "0.5B", or all of the name."""
    found = re.search(r"[0-9.]+[BM]\b", target)
    return found[0] if found else target


def by_rows_section() -> str:
    """Chains, trees and "auto" by number of rows."""
    lines = []
    for name in BY_ROWS:
        result = result_of(name)
        title = f"{name_of_target(result)}, {KINDS_OF_PROMPTS[kind_of_prompts(result)]}"
        lines += [f"### {title}", "", *speeds(name), "", f"![]({picture(name)})", ""]
    return section(*lines[:-1])


def speeds(name: str) -> list[str]:
    """Every contender of one result, by batch size: speed-ups, tokens per pass, and the plain ones in tokens/s."""
    result = result_of(name)
    contests = in_order(result)
    names = names_of(contests)
    plain, drafting = ([name for name in names if (name in (PLAIN, PLAIN_ONEDNN)) == kind] for kind in (True, False))
    lines = [
        "Tokens a second of plain `generate`:",
        "",
        *by_batch(contests, plain, tokens_per_second),
        "",
        "Speed-up over the fastest plain `generate`:",
        "",
        *by_batch(contests, drafting, speed_up),
        "",
    ]
    if PLAIN_ONEDNN in names:
        lines += ["Speed-up over plain `generate` with torch's own matrix products:", ""]
        lines += [*by_batch(contests, [PLAIN_ONEDNN, *drafting], speed_up_over_torch), ""]
    lines += ["Tokens per target pass:", "", *by_batch(contests, drafting, tokens_per_pass), ""]
    return [*lines, f"{regime_of(result)}; {identical_of(result)}."]


def speed_section() -> str:
    return section(*speeds(HEADLINE))


def contenders_section() -> str:
    """More contenders, on two machines."""
    lines = []
    for name in ("benchmark_cpu_contenders", "benchmark_cpu_amd"):
        lines += [f"### {result_of(name)['machine']['cpu']}", "", *speeds(name), "", f"![]({picture(name)})", ""]
    return section(*lines[:-1])


def picture(name: str) -> str:
    """What `plots` drew of a result, as pages under docs/ refer to it."""
    return f"../benchmarks/results/{name}.png"


def regimes_section() -> str:
    """Speed of the default drafter in other regimes."""
    rows = []
    for name in OTHER_SPEEDS:
        result = result_of(name)
        for contest in result["contests"]:
            lengths = " to ".join(dict.fromkeys(map(str, contest["prompt_tokens"].values())))
            for contender, figures in contest["contenders"].items():
                rows.append(
                    [
                        contest["decoding"],
                        lengths,
                        str(result["regime"]["max_new_tokens"]),
                        str(contest["batch_size"]),
                        contender,
                        tokens_per_second(figures),
                        speed_up(figures),
                        tokens_per_pass(figures),
                        f"{figures['identical']} of {contest['texts']}",
                    ]
                )
    titles = ["decoding", "prompt tokens", "new tokens", "batch", "contender", "tokens/s", "speed-up"]
    return section(
        *markdown([*titles, "tokens per pass", "identical"], rows),
        "",
        f"On {machine_of(result)}, medians of {contest['turns']} turns, {result['date']}; speed-ups over the fastest "
        f"plain `generate`. Sampling: {sampling_of(result_of('benchmark_cpu_sampling'))}. Prompts that are all of one "
        "length are pieces of all prompts in a row. Batches of 64 and more also have short prompts of Spec-Bench.",
    )


def demo_section() -> str:
    demo = result_of("demo_cpu")
    ratio = demo["tokens_per_second"] / demo["plain_tokens_per_second"]
    return section(
        f"`make demo` on {machine_of(demo)}: {demo['tokens_per_second']:.0f} tokens/s where plain `generate` has "
        f"{demo['plain_tokens_per_second']:.0f} ({ratio:.2f} times), {demo['tokens_per_pass']:.2f} tokens per target "
        f"pass; batch of {demo['regime']['batch_size']}, {demo['regime']['num_assistant_tokens']} drafted a round, "
        f"medians of {demo['regime']['repeats']} calls each, in turn."
    )


def lengths_section() -> str:
    """Speed of the default drafter by how many tokens a round drafts."""
    result = result_of("benchmark_cpu_lengths")
    contests = result["contests"]
    titles = [f"{what}, {batch}" for batch in batch_titles(contests) for what in ("speed-up", "tokens per pass")]
    rows = []
    for name in contests[0]["contenders"]:
        if name.startswith("default"):
            found = [contest["contenders"][name] for contest in contests]
            cells = [cell(figures) for figures in found for cell in (speed_up, tokens_per_pass)]
            rows.append([name.removeprefix("default, ").removeprefix("k = "), *cells])
    return section(*markdown(["drafted a round", *titles], rows), "", f"{regime_of(result)}.")


def same_prompt_section() -> str:
    """Batches of one prompt again and again, compared with different ones."""
    same, different = result_of("benchmark_cpu_same_prompt"), result_of("benchmark_cpu")
    (contest,) = same["contests"]
    (other,) = (found for found in different["contests"] if found["batch_size"] == contest["batch_size"])
    cells = {"tokens/s": tokens_per_second, "speed-up": speed_up, "tokens per pass": tokens_per_pass}
    titles = [f"{which}: {what}" for which in ("different prompts", "one prompt") for what in cells]
    rows = [
        [name, *(cell(one) for one in (other["contenders"][name], figures) for cell in cells.values())]
        for name, figures in contest["contenders"].items()
        if name in other["contenders"]
    ]
    return section(
        *markdown(["contender", *titles], rows), "", f"Batches of {contest['batch_size']}. {regime_of(same)}."
    )


def memory_section() -> str:
    """What the first call of each contender took, of memory and of time."""
    result = result_of("benchmark_cpu")
    contests, names = result["contests"], names_of(result["contests"])
    return section(
        "Memory in GiB:",
        "",
        *by_batch(contests, names, lambda figures: f"{figures['first_call_gib']:.2f}" if figures else ""),
        "",
        "Seconds:",
        "",
        *by_batch(contests, names, lambda figures: f"{figures['first_call_seconds']:.1f}" if figures else ""),
        "",
        f"The first call of each, with its widest batch: {result['regime']['max_new_tokens']} new tokens, "
        f"{result['regime']['dtype']}, {machine_of(result)}, {result['date']}. Memory is the peak of resident memory "
        "during the call, less what was resident before it, such as the weights. The first calls of the process, in "
        "the first column, also find out which matrix products are faster, probe the target and load the drafter.",
    )


def profile_section() -> str:
    """Shares of one call's time."""
    result = result_of("profile_cpu_batch_16")
    regime, seconds, outside = result["regime"], result["median_seconds"], result["share_outside_the_models"]
    shares = {
        "target": seconds["target"] / seconds["total"],
        "drafter": seconds["drafter"] / seconds["total"],
        "everything else": outside["median"],
        "of which rows of different lengths": seconds["alignment"] / seconds["total"],
    }
    return section(
        *markdown(["part", "share of the call"], [[name, f"{share:.1%}"] for name, share in shares.items()]),
        "",
        f"{regime['target']} in {regime['dtype']}, greedy, {regime['batch_size']} different MT-Bench prompts, "
        f"{regime['max_new_tokens']} new tokens, {regime['num_assistant_tokens']} drafted a round, without copies, "
        f"median of {regime['repeats']} runs of {seconds['total']:.1f} s, in which everything else took "
        f"{outside['min']:.1%} to {outside['max']:.1%}; {machine_of(result)}, {software_of(result)}, "
        f"{result['date']}.",
    )


def loop_section() -> str:
    """Rounds compared with the passes in them."""
    from benchmarks import loop_overhead  # of a checkout, as the results are

    result = result_of("loop_overhead_cpu")
    regime = result["regime"]
    return section(
        *loop_overhead.table(result["rounds"]),
        "",
        f"{regime['target']} in {regime['dtype']}, {regime['max_new_tokens']} new tokens after prompts of "
        f"{regime['prompt_tokens']}, {regime['num_assistant_tokens']} drafted a round, without copies, medians of all "
        f"rounds of {regime['calls']} calls; sampling: {sampling_of(result)}; {machine_of(result)}, {result['date']}.",
    )


def verifying_section() -> str:
    """What a pass over several tokens a row costs, by the way to multiply."""
    from benchmarks import verifying_pass  # of a checkout, as the results are

    result = result_of("verifying_pass_cpu")
    taken = " and ".join(f"{way} in {dtype}" for dtype, way in result["taken_here"].items())
    return section(
        *verifying_pass.table(result["passes"]),
        "",
        f"Behind {result['regime']['context']} tokens, medians of {result['regime']['turns']} turns; a call takes "
        f"{taken} here; {machine_of(result)}, {software_of(result)}, {result['date']}.",
    )


def hybrid_section() -> str:
    """What rounds cost with targets that keep states."""
    from benchmarks import hybrid_cost  # of a checkout, as the results are

    result = result_of("hybrid_cost_cpu")
    regime = result["regime"]
    sizes = ", ".join(f"{name} {number / 1e6:.1f}" for name, number in result["parameters"].items())
    return section(
        *hybrid_cost.table(result["rounds"]),
        "",
        f"Random weights, million parameters: {sizes}; {regime['dtype']}, greedy, prompts of {regime['context']}, "
        f"medians of {regime['repeats']} or more rounds of each kind in turn, {2 * regime['repeats']} plain steps; "
        f"{machine_of(result)}, {software_of(result)}, {result['date']}.",
    )


def before_after_section() -> str:
    """How this version compares with an earlier one."""
    return section(*before_after_lines("before_after"), "", *before_after_lines("before_after_32"))


def before_after_lines(name: str) -> list[str]:
    """A table of `benchmarks.before_after`, and what was compared there."""
    from benchmarks import before_after  # of a checkout, as the results are

    result = result_of(name)
    regime = result["regime"]
    return [
        *before_after.table(result),
        "",
        f"{regime['target']}, greedy, {regime['max_new_tokens']} new tokens, MT-Bench prompts, medians of the "
        f"turns: commit {regime['commits']['after']} over {regime['commits']['before']}; {machine_of(result)}, "
        f"{software_of(result)}, {result['date']}.",
    ]


def rules_section() -> str:
    """What "auto" makes of the draft length, beside fixed numbers."""
    result = result_of("draft_length_rules")
    ways = ["always wrong, auto", "default, auto", "default, k = 2", "default, k = 4", "copies, auto", "copies, k = 10"]
    lines = [f"| target | dtype | batch | {' | '.join(ways)} |", "|---" * (3 + len(ways)) + "|"]
    for contest in result["contests"]:
        regime, summary = contest["regime"], contest["summary"]
        cells = [f"{summary[way]['speed']:.2f}" if way in summary else "" for way in ways]
        target = regime["target"].rpartition("/")[2]
        lines.append(f"| {target} | {regime['dtype']} | {regime['batch_size']} | {' | '.join(cells)} |")
    turns = {len(contest["turns"]) for contest in result["contests"]}
    new_tokens = {contest["regime"]["max_new_tokens"] for contest in result["contests"]}
    return section(
        *lines,
        "",
        f"Speeds in times of plain `generate`. Greedy, {span(new_tokens)} new tokens, MT-Bench prompts, medians of "
        f"{span(turns)} turns; {machine_of(result)}, {software_of(result)}, {result['date']}.",
    )


def span(numbers: set[int]) -> str:
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def costs_section() -> str:
    """What drafting would cost a larger target."""
    from benchmarks import cost_model  # of a checkout, as the results are

    result = result_of("cost_smollm2_1.7b_cpu")
    regime = result["regime"]
    return section(
        cost_model.table(result),
        "",
        f"A model of costs, no generation: random weights of the shape of {regime['shape']} "
        f"({regime['target_parameters'] / 1e9:.1f} billion, and {regime['drafter_parameters'] / 1e6:.0f} million of a "
        f"drafter, which drafts {regime['draft_vocab_size']:,} tokens), {regime['dtype']}, texts of "
        f"{regime['context']} tokens, medians of {regime['repeats']}; {machine_of(result)}, {result['date']}.",
    )
