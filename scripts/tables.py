"""Write the README's results from the JSON files under benchmarks/results.

python -m specformer.scripts.tables          # rewrites README.md between its two markers
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = "<!-- results -->\n", "<!-- /results -->"


def results_section() -> str:
    """The table of real decoding, and the regime it was measured in."""
    rows, notes = [], []
    for name, prompts in (("mt_bench_first_turns", "MT-Bench, 80 first turns"),):
        for decoding in ("greedy", "sampling"):
            result = json.loads((RESULTS / f"{name}_{decoding}.json").read_text())
            regime, (low, high) = result["regime"], result["tokens_per_pass_95"]
            slots = ", ".join(f"{share:.0%}" for share in result["acceptance_per_slot"])
            rows.append(
                f"| {prompts} | {regime['decoding']} | {result['identical']} of {result['prompts']} | "
                f"{result['tokens_per_pass']:.2f} ({low:.2f}-{high:.2f}) | {slots} |"
            )
            notes.append(
                f"{regime['target']} in {regime['dtype']}, batches of {regime['batch_size']} different prompts, "
                f"{regime['max_new_tokens']} new tokens, {regime['num_assistant_tokens']} drafted a round; "
                f"{result['machine']['device']} ({result['machine']['cpu']}, {result['machine']['torch_threads']} "
                f"threads), torch {result['versions']['torch']}, transformers {result['versions']['transformers']}."
            )
    header = (
        "| prompts, none of them trained on | decoding | texts identical to plain `generate` | "
        "tokens per target pass (95 %) | accepted drafts, slot by slot |\n|---|---|---|---|---|"
    )
    return "\n".join([header, *rows, "", *dict.fromkeys(notes)]) + "\n"


def render(readme: str) -> str:
    begin, end = MARKERS
    return re.sub(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", lambda _: results_section(), readme, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
