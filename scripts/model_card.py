"""Write the model card of a trained drafter from what its training and its evaluations left.

    python -m specformer.scripts.model_card runs/drafter result.json ... --license apache-2.0 --sources data.md

README.md goes into the drafter's folder. Results are JSON files of specformer.scripts.evaluate_drafter. Without any,
the card says that nothing was measured. Training writes such a card; call this again when there are figures.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from specformer.configuration_specformer import SpecFormerConfig
from specformer.publishing_specformer import HERE, WRITTEN, card_head, hub_id
from specformer.scripts.parts.kinds.all import KINDS

USE = """```python
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}", padding_side="left")
target = AutoModelForCausalLM.from_pretrained("{target}")
drafter = AutoModel.from_pretrained("{here}", trust_remote_code=True)
inputs = tokenizer(["The capital of Portugal is"], return_tensors="pt")
output = target.generate(
    **inputs, assistant_model=drafter, custom_generate=drafter.name_or_path, trust_remote_code=True
)
```"""

USE_OF_OTHERS = """```python
import specformer
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}", padding_side="left")
target = AutoModelForCausalLM.from_pretrained("{target}")
inputs = tokenizer(["The capital of Portugal is"], return_tensors="pt")
output = specformer.generate(target, "{here}", **inputs)
```"""
"""Of kinds whose folder holds no code."""


def training_text(log: dict, config: dict) -> str:
    """What a drafter is and how it was trained, in sentences. `log`: training.json; `config`: config.json."""
    return (
        f"{what_it_is(log, config)} {run_text(log)} On the held-out answers the best checkpoint has "
        f"{log['best']['tokens_per_pass']:.2f} tokens per target pass, greedy, at {num_draft_tokens(log, config)} "
        "drafted."
    )


def kind_of_run(log: dict) -> str:
    return log["settings"].get("drafter") or "specformer"


def num_draft_tokens(log: dict, config: dict) -> int:
    return log.get("num_draft_tokens") or config["num_draft_tokens"]


def what_it_is(log: dict, config: dict) -> str:
    """Size and parts of a drafter, in one sentence."""
    kind, settings = kind_of_run(log), log["settings"]
    chosen = kind == "specformer" or settings.get("draft_vocab_size")  # others may name the whole vocabulary
    vocabulary = config.get("draft_vocab_size") if chosen else None
    vocabulary = f" for the {vocabulary:,} most frequent tokens" if vocabulary else ""
    size = f"{log['parameters'] / 1e6:.1f} million weights ({config['dtype']})"
    if kind != "specformer":
        return f"{size}, {KINDS[kind].about}, {num_draft_tokens(log, config)} draft slots{vocabulary}."
    inputs = "with" if config["use_anchor_token"] or config.get("anchor_slot") else "without"
    rank = config.get("previous_token_rank")
    correction = f", a correction of rank {rank} by the previous token" if rank else ""
    layers = f", {config['num_draft_layers']} draft layers" if config.get("num_draft_layers", 1) > 1 else ""
    confidence = ", and a head that estimates each draft's acceptance" if config.get("confidence_head") else ""
    return (
        f"{size}, {config['num_draft_tokens']} draft slots{vocabulary}, {inputs} the anchor token as input{layers}"
        f"{correction}{confidence}."
    )


def run_text(log: dict) -> str:
    """On what, for how long and where a drafter was trained, and before that the one that it began with."""
    settings, before = log["settings"], log.get("before")
    return (
        f"{run_text(before) + ' Then trained' if before else 'Trained'} on {log['answers']:,} answers of the target "
        f"itself ({log['answer_tokens']:,} tokens, {log['held_out_answers']} others held out), "
        f"{settings['epochs']:g} epoch{'s' * (settings['epochs'] != 1)}, {log['steps']:,} steps of "
        f"{settings['batch_size']} x {settings['accumulation']} texts on each of {settings['processes']} processes, in "
        f"{log['minutes']:.0f} minutes on {machine_text(log)}."
    )


def runs_of(log: dict) -> list[dict]:
    """The training, and before it those that it began with."""
    return [*(runs_of(log["before"]) if log.get("before") else []), log]


def run_table(log: dict) -> list[str]:
    """The same trainings as a table, for a drafter that had many."""
    titles = "training | answers | tokens | held out | epochs | steps | texts a step | minutes | tokens per target pass"
    rows = [
        f"| {number} | {run['answers']:,} | {run['answer_tokens']:,} | {run['held_out_answers']} | "
        f"{run['settings']['epochs']:g} | {run['steps']:,} | {texts_a_step(run['settings'])} | {run['minutes']:.0f} | "
        f"{run['best']['tokens_per_pass']:.2f} |"
        for number, run in enumerate(runs_of(log), start=1)
    ]
    return [f"| {titles} |", "|---" * 9 + "|", *rows]


def texts_a_step(settings: dict) -> int:
    return settings["batch_size"] * settings["accumulation"] * settings["processes"]


def machine_text(result: dict) -> str:
    """Where something was measured or trained, and with what."""
    machine, versions = result["machine"], result["versions"]
    return f"{machine['device']} ({machine['cpu']}), torch {versions['torch']}, transformers {versions['transformers']}"


def task_table(result: dict) -> list[str]:
    """Tokens per target pass by task, and of all where there are several. `result`: a JSON file of evaluate_drafter."""
    tasks = result["tasks"] if len(result["tasks"]) > 1 else {}
    if "all" in result:  # of answers, for every draft length
        lengths = [name for name in result["all"] if re.fullmatch(r"tokens_per_pass_k\d+", name)]
        titles = [f"k = {name.rsplit('k', 1)[1]}" for name in lengths]
        rows = {**tasks, "all": result["all"]}
        cells = {task: [figures[name] for name in lengths] for task, figures in rows.items()}
        if (interval := f"{lengths[-1]}_95") in result["all"]:
            titles += ["95 % from", "to"]
            for task, figures in rows.items():
                cells[task] += figures[interval]
        slots = [name for name in result["all"] if name.startswith("accuracy_slot_")]
        titles += [f"right in slot {slot}" for slot in range(1, len(slots) + 1)]
        for task, figures in rows.items():
            cells[task] += [figures[name] for name in slots]
        counts = {task: figures["answers"] for task, figures in rows.items()}
    else:
        titles = [f"k = {result['regime']['num_assistant_tokens']}"]
        rows = {**tasks, "all": result}
        cells = {task: [figures["tokens_per_pass"]] for task, figures in rows.items()}
        counts = {task: figures["prompts"] for task, figures in rows.items()}
    return [
        f"| task | prompts | {' | '.join(titles)} |",
        "|---" * (2 + len(titles)) + "|",
        *(f"| {task} | {counts[task]} | {' | '.join(f'{cell:.2f}' for cell in cells[task])} |" for task in rows),
    ]


def regime_text(result: dict) -> str:
    """How a result was measured, in one line."""
    regime = result["regime"]
    if "all" in result:
        how = (
            f"greedy, exactly computed over {result['answer_tokens']:,} tokens that the target answered; right in a "
            "slot are drafts behind tokens that are right"
        )
    else:
        how = (
            f"{regime['drafter']}, {regime['decoding']}, {regime['max_new_tokens']} new tokens, batches of "
            f"{regime['batch_size']} different prompts"
        )
        if "identical" in result:
            how += f", {result['identical']} of {result['prompts']} texts identical to plain `generate`"
    return (
        f"Tokens per target pass at k drafted tokens, {regime['dtype']}, {how}; {machine_text(result)}. "
        f"`{result['command']}`"
    )


def model_card(folder: Path, results: list[dict], license: str | None, sources: str | None) -> str:
    """The text of README.md for the drafter in `folder`."""
    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    kind, title, use = kind_of_run(log), "SpecFormer", USE
    if kind == "specformer":
        config = SpecFormerConfig.from_pretrained(folder).to_dict()
        name = config["target_name_or_path"]
        head = card_head(name, license)
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name, title, use = log["settings"]["target"], KINDS[kind].title, USE_OF_OTHERS
        head = card_head(name, license, ("speculative-decoding", kind))
    target = hub_id(name) or "its target"
    figures = ["Not measured yet on prompts of its own; see `specformer evaluate`."]
    if results:
        figures = [line for result in results for line in (*task_table(result), "", regime_text(result), "")]
    return "\n".join(
        [
            head,
            WRITTEN,
            "",
            f"# {title} drafter for {target}",
            "",
            f"Makes `generate` of {target} draft several tokens a pass, for one prompt or a batch of different ones, "
            "with the same text: the target verifies every token.",
            "",
            use.format(target=target, here=HERE),
            "",
            "## Figures",
            "",
            *figures,
            "" if results else "\n",
            "## Training",
            "",
            training_text(log, config),
            "",
            "```",
            *(run["command"] for run in runs_of(log)),
            "```",
            "",
            *(["## Prompts", "", sources.strip(), ""] if sources else []),
            "## Limits",
            "",
            f"It fits {target} and fine-tunes of the same sizes only. Drafts are best on text like the answers that it "
            "was trained on; elsewhere fewer are accepted, which costs time and never changes the text. Whether "
            "drafting saves time depends on the device, the batch and how much is accepted: measure it with "
            "`specformer bench`.",
            "",
        ]
    )


def write_model_card(folder: Path, results: list[dict], license: str | None = None, sources: str | None = None) -> None:
    """Write README.md into `folder`.

    Raises:
        FileExistsError: there is one that somebody else wrote.
    """
    path = folder / "README.md"
    if path.exists() and WRITTEN not in path.read_text(encoding="utf-8"):
        raise FileExistsError(f"{path} was not written by this script and is left alone. Move it away for a new card.")
    path.write_text(model_card(folder, results, license, sources), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path, help="folder of specformer.scripts.train")
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of specformer.scripts.evaluate_drafter")
    parser.add_argument("--license", help="of the weights, as the Hub spells it")
    parser.add_argument("--sources", type=Path, help="Markdown file about the prompts and their licences")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]
    sources = arguments.sources.read_text(encoding="utf-8") if arguments.sources else None
    write_model_card(arguments.drafter, results, arguments.license, sources)
    print(arguments.drafter / "README.md")


if __name__ == "__main__":
    main(parse())
