"""A page on which several prompts are answered at once, with drafts and without, and one sees who wrote what.

    python app.py                                           # SmolLM2-135M-Instruct, from the Hub
    python app.py --target my-model --drafter my-drafter    # folders or Hub ids

On the Hub it is a Space, whose README.md names target and drafter. In a checkout, `specformer space` starts it.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

import gradio as gr
import pandas as pd
import torch
from huggingface_hub import metadata_load
from look import CSS, page
from models import Models, load
from runs import MOST_DRAFTED, MOST_IN_TREE, MOST_NEW_TOKENS, BadInput, Run, checked

README = Path(__file__).with_name("README.md")
BETWEEN_CHARTS = 1.0
"""Seconds: a chart takes the browser longer to draw than a text."""
LEAST_SLOTS = 4
"""Of the chart."""
EXAMPLES = [
    "What is the capital of Portugal, and what is it known for?\nExplain to a child why the sky is blue.\n"
    "Write a short poem about the sea in autumn.\nList five tips for staying focused while studying.",
    "Write the numbers from one to twenty in words, and then write the same list again.\n"
    "Repeat this sentence four times: The quick brown fox jumps over the lazy dog near the quiet river bank.",
    "Write a Python function that returns the n-th Fibonacci number.\n"
    "Write a Python function that checks whether a string is a palindrome.",
]
ABOUT = """# Speculative decoding of a batch
Several prompts are answered **at once** by {target}. A drafter proposes tokens, the target verifies them in one pass,
and each text advances by as many as were accepted in it. The text is the one that plain `generate()` writes. {links}"""
LINKS = "[The drafter]({hub}/{drafter}) · [the target]({hub}/{target})"
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def acceptance(run: Run | None) -> pd.DataFrame:
    """Of the rounds that drafted a slot, the share that accepted it, in percent. Never without a slot: the chart would
    take what comes for numbers."""
    side = run and run.speculative
    counts = zip(side.accepted, side.drafted, strict=True) if side else ()
    shares = [100 * right / drafted for right, drafted in counts]
    shares += [0.0] * (LEAST_SLOTS - len(shares))
    return pd.DataFrame({"slot": [f"slot {slot}" for slot in range(1, len(shares) + 1)], "accepted, %": shares})


def build(models: Models, about: str) -> gr.Blocks:
    """The page. Each visitor has one run at a time; one run of all visitors computes at a time."""
    runs: dict[str, Run] = {}
    guard = threading.Lock()

    def start(text, drafter, num_tokens, tree_size, temperature, seed, max_new_tokens, request: gr.Request):
        try:
            run = Run(models, checked(text, drafter, num_tokens, tree_size, temperature, seed, max_new_tokens, models))
        except BadInput as error:
            yield str(error), gr.skip(), gr.skip()
            return
        with guard:
            if (before := runs.get(request.session_hash)) is not None:
                before.stop.set()
            runs[request.session_hash] = run
        drawn = 0.0
        try:
            for _ in run.looks():
                is_due = time.monotonic() - drawn > BETWEEN_CHARTS
                drawn = time.monotonic() if is_due else drawn
                yield status(run), page(run), acceptance(run) if is_due else gr.skip()
            yield status(run), page(run), acceptance(run)
        except Exception as error:
            yield f"This could not be generated: {error}", page(run), acceptance(run)
        finally:
            with guard:
                if runs.get(request.session_hash) is run:
                    del runs[request.session_hash]

    def stop(request: gr.Request) -> None:
        with guard:
            if (run := runs.get(request.session_hash)) is not None:
                run.stop.set()

    with gr.Blocks(title="SpecFormer: a batch, speculatively", analytics_enabled=False) as blocks:
        gr.Markdown(about)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                text = gr.Textbox(
                    EXAMPLES[0], lines=4, max_lines=10, label="Prompts, one on each line", elem_id="prompts"
                )
                with gr.Row():
                    begin = gr.Button("Generate", variant="primary", elem_id="start", min_width=100)
                    end = gr.Button("Stop", elem_id="stop", min_width=100)
                gr.Examples([[example] for example in EXAMPLES], [text], label="Examples")
            with gr.Column(scale=2, min_width=320):
                drafter = gr.Dropdown(models.drafters, value=models.drafters[0], label="Drafter", elem_id="drafter")
                num_tokens = gr.Slider(0, MOST_DRAFTED, 4, step=1, label="Tokens to draft each round")
                tree_size = gr.Slider(0, MOST_IN_TREE, 0, step=4, label="Tokens of a tree (0: a chain)")
                temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0: greedy)")
                with gr.Row():
                    seed = gr.Number(0, precision=0, label="Seed", min_width=100)
                    max_new_tokens = gr.Slider(8, MOST_NEW_TOKENS, 64, step=8, label="New tokens", min_width=180)
        said = gr.Markdown("", elem_id="status")
        shown = gr.HTML("", elem_id="texts")
        chart = gr.BarPlot(
            acceptance(None),
            x="slot",
            y="accepted, %",
            y_lim=[0, 100],
            title="Accepted drafts by slot",
            x_title=" ",
            height=220,
            elem_id="chart",
        )
        settings = [text, drafter, num_tokens, tree_size, temperature, seed, max_new_tokens]
        begin.click(start, settings, [said, shown, chart], concurrency_limit=8, show_progress="hidden")
        end.click(stop, queue=False)
        blocks.unload(stop)
    return blocks


def status(run: Run) -> str:
    ours, theirs = run.speculative, run.plain
    if ours.state == "waits":
        return "Stopped." if run.stop.is_set() else "Another visitor's run is going on; yours is next."
    if "stopped" in (ours.state, theirs.state):
        return "Stopped."
    if run.is_complete:
        return "Done. This is one run, on a machine that others share."
    return "Generating with drafts ..." if ours.state == "runs" else "The same with plain generate() ..."


def named_in_readme() -> tuple[str, str]:
    """Target and drafter, as the Space's README.md names them."""
    target, drafter = (metadata_load(README) or {})["models"]
    return target, drafter


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or Hub id of a causal LM; default: the first model of README.md")
    parser.add_argument("--name", help="what to call the target")
    parser.add_argument("--drafter", help="folder or Hub id; default, for the default target: README.md's second model")
    parser.add_argument("--assistant", help="folder or Hub id of a smaller causal LM with the target's tokenizer")
    parser.add_argument(
        "--repository", help="folder or Hub id whose custom_generate/ decodes; default: as the drafter's"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--host", default=None, help="address to listen at; default: this machine alone")
    parser.add_argument("--port", type=int, help="default: the first one from 7860 on that is free")
    return parser.parse_args(words)


def main(arguments: argparse.Namespace) -> None:
    if cores := os.environ.get("CPU_CORES"):  # of a Space, whose machine has more than are its own
        torch.set_num_threads(max(1, int(float(cores))))
    default_target, published = named_in_readme()
    target = arguments.target or default_target
    drafter = arguments.drafter or (published if arguments.target is None else None)
    repository = arguments.repository or published
    name = arguments.name or target
    models = load(target, name, repository, drafter, arguments.assistant, arguments.dtype)
    links = LINKS.format(hub=HUB, drafter=published, target=default_target) if arguments.target is None else ""
    blocks = build(models, ABOUT.format(target=name, links=links))
    blocks.queue(max_size=32).launch(
        server_name=arguments.host, server_port=arguments.port, css=CSS, footer_links=["gradio"], ssr_mode=False
    )


if __name__ == "__main__":
    main(parse())
