"""Write a drafter in the format that an engine reads.

    specformer export runs/drafter --target HuggingFaceTB/SmolLM2-135M-Instruct --format speculators --output served
    vllm serve served

--format speculators is what vLLM serves as it is; dflash is z-lab's, for SGLang and vLLM beside the target; gguf-ready
is what llama.cpp's convert_hf_to_gguf.py takes, and, of EAGLE-3, SGLang. Any DFlash, DSpark or EAGLE-3 drafter that
`assistant_model` takes can be exported, those of `specformer train` and of other projects; what a format cannot carry
is refused. README.md in the output says how to serve it. A PARD model, and any other causal LM, is served as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from specformer.generation.drafter_foreign_network import ForeignNetwork
from specformer.generation.drafter_loading import KINDS, WEIGHTS, kind_of, load_network, read_config
from specformer.scripts.parts.drafter_formats import FORMATS, Checkpoint, checkpoint_of
from specformer.scripts.parts.runs import writing
from specformer.scripts.parts.serving import as_it_is, card, commands


def read_drafter(place: str) -> tuple[ForeignNetwork, int | None]:
    """The network of the drafter in the folder or repository `place`, and how many tokens its config says that it is
    to draft each round, if it does.

    Raises:
        ValueError: it is none, it is damaged, or no engine serves it, or as it is.
        OSError: its weights cannot be downloaded.
    """
    config = read_config(place)
    names = config.get("architectures") or []
    if config.get("model_type") == "specformer":
        raise ValueError(
            f"{place} is a SpecFormer network, which no engine has: they know neither its context layer nor what it "
            "makes of the newest token. Train a drafter that they do know on the same answers: "
            "specformer train --drafter dflash."
        )
    if kind_of(names) is None:
        if any("ForCausalLM" in str(name) or "LMHead" in str(name) for name in names):
            raise ValueError(as_it_is(place, config))
        raise ValueError(
            f"{place} holds {', '.join(map(str, names)) or 'a model'}; expected one of {', '.join(KINDS)}."
        )
    return load_network(place, config, f"{place}/config.json"), meant_tokens(config)


def meant_tokens(config: dict) -> int | None:
    """How many tokens a drafter is to draft each round, if its config says so."""
    try:
        count = config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (IndexError, KeyError, TypeError):
        return None
    return count if type(count) is int and count > 0 else None


def read_target(name: str):
    """The model of a folder or Hub id, by its config alone: no memory is taken for its weights.

    Raises:
        ValueError: there is none.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"The target {name} could not be read ({error}). Give a folder or a Hub id.") from error


def write(checkpoint: Checkpoint, text: str, folder: Path) -> None:
    """All of it, or nothing.

    Raises:
        FileExistsError: there is something in `folder`.
        OSError, RuntimeError: it cannot be written.
    """
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary) / "drafter"
        whole.mkdir()
        (whole / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8")
        with writing(folder):
            save_file(checkpoint.tensors, whole / WEIGHTS, metadata={"format": "pt"})
        (whole / "README.md").write_text(text, encoding="utf-8")
        os.replace(whole, folder)


def check_free(folder: Path) -> None:
    """Raises:
    FileExistsError: there is something in `folder`.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists, and nothing there is overwritten. Name another folder, or remove it.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", help="folder or Hub id of a DFlash, DSpark or EAGLE-3 drafter")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, which is not there yet")
    parser.add_argument("--target", required=True, help="model that it drafts for: folder, or Hub id")
    parser.add_argument("--format", choices=list(FORMATS), required=True, help="what the engine reads")
    parser.add_argument(
        "--num-assistant-tokens",
        type=int,
        help="tokens to draft each round where the engine is not told; default: all of a block; of EAGLE-3 what its "
        "config says, or 3",
    )
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    try:
        check_free(arguments.output)
        network, count = read_drafter(arguments.drafter)
        name = str(Path(arguments.target).resolve()) if Path(arguments.target).is_dir() else arguments.target
        target = read_target(name)
        checkpoint = checkpoint_of(network, target, name, arguments.format, arguments.num_assistant_tokens, count)
        write(checkpoint, card(checkpoint, name, arguments.output.name), arguments.output)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"Not exported. {error}")
    print(f"{arguments.output} is written. To serve it:")
    for engine, lines in commands(checkpoint, name, str(arguments.output)).items():
        print(f"\n{engine}\n    " + "\n    ".join(lines))


if __name__ == "__main__":
    main(parse())
