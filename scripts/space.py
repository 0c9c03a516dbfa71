"""A page on which several prompts are answered at once, with drafts and without, and one sees who wrote what.

    specformer space                                        # SmolLM2-135M-Instruct with the default drafter
    specformer space --target my-model --drafter my-drafter # folders or Hub ids; without a drafter: copies of the text

It is the Space that `specformer publish --space` sends to the Hub, run here, and needs pip install "specformer[space]"
in a checkout. It opens at http://127.0.0.1:7860 and is seen by this machine alone, unless --host says something else.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec

from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.linked import SPACE

ROOT = SPACE.parents[1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or Hub id; default: the one of `specformer fetch`")
    parser.add_argument("--drafter", help="folder or Hub id; default, for the default target: the default drafter")
    parser.add_argument("--assistant", help="a smaller causal LM with the target's tokenizer, which drafts as well")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--host", help="address to listen at, such as 0.0.0.0; default: this machine alone")
    parser.add_argument("--port", type=int, help="default: the first one from 7860 on that is free")
    return parser.parse_args()


def options(arguments: argparse.Namespace) -> list[str]:
    """What app.py is started with. The decoding is that of this checkout."""
    target, name = find_target(arguments.target)
    given = dict(
        target=target,
        name=name,
        drafter=arguments.drafter or (str(ROOT) if arguments.target is None else None),
        repository=str(ROOT),
        assistant=arguments.assistant,
        dtype=arguments.dtype,
        host=arguments.host,
        port=arguments.port,
    )
    return [word for option, value in given.items() if value is not None for word in (f"--{option}", str(value))]


def main(arguments: argparse.Namespace) -> None:
    if not SPACE.is_dir():
        sys.exit("The Space is no part of the installed package: run `specformer space` in a checkout of SpecFormer.")
    if find_spec("gradio") is None:
        sys.exit('The Space needs gradio, which is not installed: pip install "specformer[space]"')
    sys.path.insert(0, str(SPACE))
    app = import_module("app")
    app.main(app.parse(options(arguments)))


if __name__ == "__main__":
    main(parse())
