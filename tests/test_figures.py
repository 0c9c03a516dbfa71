"""Measured figures on the pages are those of benchmarks/results, or it is said that no file keeps them.

Tables between markers are written by `python -m specformer.scripts.tables`, which tests/test_readme.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import rivals
from specformer.scripts.model_card import task_table
from specformer.scripts.parts.contenders import PLAIN_ONEDNN
from specformer.scripts.speed_tables import BY_ROWS, kind_of_prompts, result_of

pytestmark = pytest.mark.one_version

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted(ROOT.glob("drafters/*/README.md")),
    )
}
CARDS = {
    "drafters/qwen2.5-coder-0.5b-instruct/README.md": [
        "qwen2.5_coder_0.5b_mt_bench_by_task",
        "qwen2.5_coder_0.5b_mbpp_by_task",
    ],
    "drafters/qwen2.5-coder-1.5b-instruct/README.md": [
        "qwen2.5_coder_1.5b_mt_bench_by_task",
        "qwen2.5_coder_1.5b_code_by_task",
    ],
}
"""Model cards, and the result files of their tables."""
WITHOUT_FILES = re.compile("no file (is kept|keeps)")
"""What a heading or the first lines of a page say where figures were noted by hand."""


# ---- tables


def outside_of_markers(page: str) -> str:
    """A page's own text: without tables that are written, and without code."""
    text = re.sub(r"^<!-- ([^/\n]*) -->\n.*?^<!-- /\1 -->$", "", page, flags=re.M | re.S)
    return re.sub(r"^```.*?^```$|`[^`]*`", "", text, flags=re.M | re.S)


def tables_of_hand(page: str) -> list[str]:
    """Lines of tables with measured figures, outside of sections whose heading says that no file keeps them."""
    found, says_so = [], False
    for line in outside_of_markers(page).splitlines():
        if line.startswith("#"):
            says_so = bool(WITHOUT_FILES.search(line))
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        if not says_so and any(re.fullmatch(r"\d+\.\d+|[\d., ]+%(, [\d., ]+%)*", cell) for cell in cells):
            found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_written_and_not_typed(page: str):
    lines = tables_of_hand(PAGES[page])
    if page in CARDS:
        written = [line for name in CARDS[page] for line in task_table(result_of(name))]
        assert [line for line in written if re.search(r"\d\.\d", line)] == lines
    else:
        assert not lines


def test_a_typed_table_is_found():
    table = "| a | b |\n|---|---|\n| x | 1.25 |\n"
    assert tables_of_hand("# Speed\n" + table) == ["| x | 1.25 |"]
    assert tables_of_hand("# Speed\n| x | 25 %, 17 % |\n") == ["| x | 25 %, 17 % |"]
    assert tables_of_hand("# Speed\n<!-- speed -->\n" + table + "<!-- /speed -->\n| of | 3 |\n") == []
    assert tables_of_hand("# Trials, of which no file is kept\n" + table + "# Speed\n") == []
    assert tables_of_hand("# Trials, of which no file is kept\n## Others\n" + table) == ["| x | 1.25 |"]


# ---- sentences


def ratios(name: str, batch_size: int, contender: str = "default, auto") -> dict[str, float]:
    """A contender's median, lowest and highest speed, in times of the fastest plain generate()."""
    return contest(name, batch_size)["contenders"][contender]["ratio_to_best_plain"]


def contest(name: str, batch_size: int) -> dict:
    (found,) = [each for each in result_of(name)["contests"] if each["batch_size"] == batch_size]
    return found


def spread(name: str, batch_size: int) -> tuple[float, float]:
    return ratios(name, batch_size)["min"], ratios(name, batch_size)["max"]


def lost(name: str) -> float:
    """Percent that a useless drafter with "auto" costs one row."""
    return 100 * (1 - ratios(name, 1, "always wrong, auto")["median"])


def lost_by_different_prompts(contender: str) -> float:
    """Percent of the tokens a second with one prompt in all rows."""
    rates = [
        contest(name, 8)["contenders"][contender]["tokens_per_second"]
        for name in ("benchmark_cpu", "benchmark_cpu_same_prompt")
    ]
    return 100 * (1 - rates[0] / rates[1])


def rounds_of(batch_size: int, decoding: str = "greedy") -> dict:
    rounds = result_of("loop_overhead_cpu")["rounds"]
    (found,) = [each for each in rounds if (each["batch_size"], each["decoding"]) == (batch_size, decoding)]
    return found


def slower_by_drafts(batch_size: int) -> float:
    """A pass over five tokens a row in times of one over one."""
    found = rounds_of(batch_size)
    return found["verify_seconds"] / found["plain_seconds"]


def ahead_of_auto() -> tuple[float, float]:
    """How much faster a fixed k = 2 is than "auto", at least and at most, with two and four rows of SmolLM2."""
    ahead = [
        each["summary"]["default, k = 2"]["speed"] - each["summary"]["default, auto"]["speed"]
        for each in result_of("draft_length_rules")["contests"]
        if each["regime"]["batch_size"] in (2, 4) and "default, auto" in each["summary"]
    ]
    assert len(ahead) == 4
    return min(ahead), max(ahead)


def larger_target() -> tuple[float, float]:
    """The default drafter's tokens per pass at k = 2, and what a larger target would gain with as many."""
    (cost,) = [
        each
        for each in result_of("cost_smollm2_1.7b_cpu")["rounds"]
        if (each["batch_size"], each["num_assistant_tokens"]) == (1, 2)
    ]
    rate = result_of("mt_bench_by_task")["all"]["tokens_per_pass_k2"]
    return rate, rate / cost["break_even_tokens_per_pass"]


def trees_and_chains() -> tuple[float, ...]:
    groups = rivals.groups_of(result_of("rivals_drafter"))
    return tuple(
        rivals.speed(groups[f"Qwen2.5-Coder-{size}-Instruct", "bfloat16", prompts, 1], "specformer", way)
        for size in ("1.5B", "0.5B")
        for prompts in ("code", "mt_bench")
        for way in ("specformer, drafter", "specformer, drafter, chains")
    )


BY_ROWS_OF_CHAT = [name for name in BY_ROWS if kind_of_prompts(result_of(name)) == "mt_bench"]


def tokens_in_trees_of_16() -> tuple[float, float]:
    """Tokens per pass at one row, in times of a chain's, at least and at most."""
    found = [contest(name, 1)["contenders"] for name in BY_ROWS_OF_CHAT]
    times = [
        each["default, tree of 16"]["tokens_per_pass"] / each["default, k = 4"]["tokens_per_pass"] for each in found
    ]
    return min(times), max(times)


def auto_behind(name: str, batch_size: int, compared_with: str) -> float:
    """Percent that "auto" is behind the better of a chain and plain generate()."""
    chain, auto = (
        contest(name, batch_size)["contenders"][f"default, {way}"][compared_with]["median"] for way in ("k = 4", "auto")
    )
    return 100 * (1 - auto / max(chain, 1.0))


def auto_beside_the_better() -> tuple[float, ...]:
    """Of all numbers of rows and targets: where "auto" is ahead or at most 3 % behind, how many there are, and by how
    many percent it is behind at most. Then the same where it is compared with the fastest plain generate()."""
    cells = [(name, found["batch_size"]) for name in BY_ROWS_OF_CHAT for found in result_of(name)["contests"]]
    found = []
    for way in ("ratio_to_plain", "ratio_to_best_plain"):
        behind = [auto_behind(*cell, way) for cell in cells]
        found += [sum(each <= 3 for each in behind), len(cells), max(behind)]
    return tuple(found)


def packed_passes() -> tuple[float, ...]:
    """Milliseconds of passes over five tokens and over one, packed and not."""
    passes = {
        each["tokens"]: each
        for each in result_of("verifying_pass_cpu")["passes"]
        if (each["target"], each["dtype"], each["batch_size"]) == ("Qwen2.5-Coder-0.5B-Instruct", "bfloat16", 1)
    }
    return tuple(1000 * passes[tokens][way] for tokens in (5, 1) for way in ("packed weights", "torch's own products"))


def rounds_with_states() -> tuple[float, ...]:
    """Of four drafts, in plain steps: for one row and for eight."""
    found = {
        (each["target"], each["batch_size"]): each["break_even_tokens_per_pass"]
        for each in result_of("hybrid_cost_cpu")["rounds"]
        if each["drafted"] == 4
    }
    return tuple(found[target, rows] for rows in (1, 8) for target in ("LFM2-350M", "Qwen3.5-0.8B"))


def gained_by_onednn() -> tuple[float, float]:
    gains = [
        each["contenders"][PLAIN_ONEDNN]["ratio_to_plain"]["median"]
        for each in result_of("benchmark_cpu_amd")["contests"]
    ]
    return min(gains), max(gains)


def code_demo() -> tuple[float, float]:
    result = result_of("demo_code_cpu")
    return result["tokens_per_pass"], result["tokens_per_second"] / result["plain_tokens_per_second"]


FIGURES: dict[str, list[tuple[str, Callable[[], tuple]]]] = {
    "docs/benchmarks.md": [
        ("a tree of 16 has {:.2f} to {:.2f} times the tokens per pass of a chain of 4", tokens_in_trees_of_16),
        (
            "or at most 3 % behind it, in {:.0f} of {:.0f} cells of the tables that compare with torch's own products, "
            "and {:.0f} % behind at worst; in {:.0f} of {:.0f} of those that compare with the fastest plain "
            "generate(), and {:.0f} % behind at worst",
            auto_beside_the_better,
        ),
        (
            "takes {:.1f} plain steps with the sizes of LFM2-350M and {:.1f} with those of Qwen, for eight rows "
            "{:.1f} and {:.1f}.",
            rounds_with_states,
        ),
        ("{:.1f} to {:.1f} times in the turns of batch 32", lambda: spread("benchmark_cpu", 32)),
        ("{:.1f} to {:.1f} in those of 64", lambda: spread("benchmark_cpu_64", 64)),
        ("{:.1f} to {:.1f} in those of 128", lambda: spread("benchmark_cpu_128", 128)),
        (
            "costs one row {:.0f} % of its first 64 tokens, and {:.0f} % of 256",
            lambda: (lost("benchmark_cpu"), lost("benchmark_cpu_256")),
        ),
        ("a pass over five tokens of each of 16 rows takes {:.1f} times as long", lambda: (slower_by_drafts(16),)),
        (
            "about {:.0f} % of the time of 16 rows when greedy, and {:.0f} % when sampling",
            lambda: tuple(100 * rounds_of(16, how)["outside_of_round"] for how in ("greedy", "sampling")),
        ),
        ("loses {:.0f} % of its tokens a second", lambda: (lost_by_different_prompts("plain generate"),)),
        (
            "a drafter that is always right loses {:.0f} %",
            lambda: (lost_by_different_prompts("always right, k = 4"),),
        ),
        ("a fixed k = 2 is {:.1f} to {:.1f} faster", ahead_of_auto),
        (
            "the default drafter's {:.2f} tokens a pass at k = 2, a drafter for such a target would make it "
            "{:.1f} times as fast",
            larger_target,
        ),
    ],
    "docs/experiments.md": [
        ("{:.2f} tokens per target pass, and {:.2f} times the speed of plain generate", code_demo),
        (
            "has {:.2f} times the speed of plain generate with trees and {:.2f} with chains on code, "
            "{:.2f} and {:.2f} on MT-Bench; Qwen-Coder has {:.2f} and {:.2f}, {:.2f} and {:.2f} ",
            trees_and_chains,
        ),
    ],
    "CHANGELOG.md": [
        (
            "in bfloat16 takes {:.0f} ms in place of {:.0f}, one over a single token {:.0f} in place of {:.0f}",
            packed_passes,
        ),
        ("on an AMD EPYC that alone is {:.1f} to {:.1f} times the speed of plain generate()", gained_by_onednn),
    ],
    "docs/default_drafter.md": [
        ("1.69, 1.76 (trials) and {:.2f}", lambda: (result_of("mt_bench_by_task")["all"]["tokens_per_pass_k4"],)),
    ],
}
"""By page, its sentences with measured figures, and where these come from."""
NOT_MEASURED = {
    "CHANGELOG.md": ["0.1.0, unreleased"],
    "docs/benchmarks.md": [
        "only where 2 GiB stay free",
        "the goal for the loop's share is 3 %",
        "the goal is 3 % of a round",
        "publish 39 to 47 % for it",  # others
        '"auto" is within 0.1 of the best number',
        "at most 5 % more memory",  # a limit, which a test holds
    ],
    "docs/default_drafter.md": ["over MT-Bench from 1.56 to"],  # of trials, as it says
}
"""Figures that are goals or limits, or that others published, by their sentences."""


def plain_text(page: str) -> str:
    """A page's sentences in one line each: without marks, the addresses of links, and names with versions."""
    text = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.S)
    text = re.sub(r"^<!-- ([^/\n]*) -->\n.*?^<!-- /\1 -->$|^```.*?^```$|^\|.*$", "", text, flags=re.M | re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("*", "")
    text = re.sub(r"(Python|torch|transformers|Qwen|arXiv|speculators|CPython) ?\d[\d.]*|\b\d{4}\.\d{5}\b", r"\1", text)
    text = re.sub(r"-\d+(\.\d+)+B?|=[\d.]+|\b5\.(17|18|19|2\d)\b", "", text)
    return re.sub(r"\s+", " ", text)


def figures_without_a_source(page: str, sentences: list[str]) -> list[str]:
    """What looks like a measure and stands in none of `sentences`."""
    text = plain_text(page)
    for sentence in sentences:
        text = re.sub(re.escape(sentence), " ", text, flags=re.I)
    return re.findall(r".{0,40}(?:\d+\.\d+|\b\d+ (?:%|ms\b|times\b|GiB\b|seconds\b))", text)


@pytest.mark.parametrize("page", FIGURES)
def test_sentences_have_the_figures_of_the_files(page: str):
    text = plain_text(PAGES[page])
    for sentence, values in FIGURES[page]:
        assert sentence.format(*values()) in text


CHECKED = [
    "README.md",
    "CHANGELOG.md",
    "docs/benchmarks.md",
    "docs/default_drafter.md",
    "docs/how_it_works.md",
    "docs/lossless.md",
]
CHECKED += ["docs/space.md", "docs/publishing.md", "docs/pypi.md"]
"""Where every figure has a source. docs/experiments.md and docs/notes.md say what no file keeps."""


@pytest.mark.parametrize("page", CHECKED)
def test_every_figure_has_a_source(page: str):
    sentences = [sentence.format(*values()) for sentence, values in FIGURES.get(page, ())]
    assert figures_without_a_source(PAGES[page], [*sentences, *NOT_MEASURED.get(page, ())]) == []


@pytest.mark.parametrize("page", ["docs/experiments.md", "docs/notes.md"])
def test_pages_say_what_no_file_keeps(page: str):
    assert WITHOUT_FILES.search(PAGES[page])


def test_a_figure_without_a_source_is_found():
    page = "It is 1.7 times as fast with Qwen2.5-Coder-0.5B, and costs 4 % of it (arXiv 2510.02358).\nAnd 3 ms."
    assert len(figures_without_a_source(page, [])) == 3
    assert len(figures_without_a_source(page, ["is 1.7 times as fast"])) == 2
