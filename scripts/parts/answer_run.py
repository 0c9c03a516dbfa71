"""What `distill` and `generate` have in common: prompts, the target that answers them, the folder of the answers."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from specformer.scripts.fetch_target import find_target
from specformer.scripts.parts.answer_folder import WEIGHTS, AnswerFolder
from specformer.scripts.parts.answering import Answer
from specformer.scripts.parts.prompts import encode_each, read_prompts, template_arguments
from specformer.scripts.parts.provenance import has_bfloat16
from specformer.scripts.parts.some_weights import digest_of_weights


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", required=True, help="jsonl file or datasets id")
    parser.add_argument("--output", type=Path, required=True, help="folder for the answers; begun or gone on with")
    parser.add_argument("--target", help="folder or Hub id; default: the one of `specformer fetch`")
    parser.add_argument("--revision", help="branch, tag or commit of the target")
    parser.add_argument("--trust-remote-code", action="store_true", default=None, help="run the target's own code")
    parser.add_argument(
        "--chat-template-kwargs",
        type=template_arguments,
        metavar="JSON",
        help="""arguments of the target's chat template, such as '{"enable_thinking": false}'""",
    )
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--skip", type=int, default=0, help="not the first so many of these")
    parser.add_argument("--max-prompt-tokens", type=int, default=512, help="longer prompts are left out")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32, help="rows of each process; hundreds on a GPU")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 on a CPU without bfloat16 instructions, else bfloat16",
    )


class AnswerRun:
    """One process of a run.

    Args:
        arguments: those of `add_options`.

    Attributes:
        process: of accelerate.
        encoded: token ids of all prompts.
        kept: places of those that are to be answered.
        settings: what decides about the answers.

    Raises:
        ValueError: nothing to be answered, or a prompt that is none. Nothing was written, and no target loaded.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        prompts = read_prompts(arguments.prompts, arguments.limit)
        if not 0 <= arguments.skip < len(prompts):
            raise ValueError(f"--skip is {arguments.skip}, and there are {len(prompts)} prompts; expected fewer.")
        self.process = PartialState(cpu=not torch.accelerator.is_available())
        self.folder = AnswerFolder(arguments.output, self.process)
        name, identity = find_target(arguments.target)
        repository = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(name, **repository)
        self.encoded = encode_each(self.tokenizer, prompts, arguments.prompts, arguments.chat_template_kwargs)
        asked = range(arguments.skip, len(self.encoded))
        self.kept = [index for index in asked if len(self.encoded[index]) <= arguments.max_prompt_tokens]
        if not self.kept:
            shortest = min(len(self.encoded[index]) for index in asked)
            raise ValueError(
                f"--max-prompt-tokens is {arguments.max_prompt_tokens}, and all {len(asked)} prompts are longer; "
                f"expected {shortest} or more, which the shortest has."
            )
        on_cpu = self.process.device.type == "cpu"
        dtype = arguments.dtype or ("bfloat16" if not on_cpu or has_bfloat16() else "float32")
        target = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **repository)
        self.target = target.eval().to(self.process.device)
        self.settings = {
            "target": identity,
            "revision": getattr(target.config, "_commit_hash", None),
            WEIGHTS: digest_of_weights(target),
            "trust_remote_code": arguments.trust_remote_code,
            "dtype": dtype,
            "chat_template": digest(self.tokenizer.chat_template),
            "chat_template_kwargs": arguments.chat_template_kwargs or None,
            "prompts": digest(self.encoded),
            "max_prompt_tokens": arguments.max_prompt_tokens,
            "skip": arguments.skip,
            "prompts_left_out_as_longer": len(asked) - len(self.kept),
            "max_new_tokens": arguments.max_new_tokens,
            "temperature": arguments.temperature,
            "seed": arguments.seed,
        }

    def write(self, answers: Iterable[Answer], count: int) -> Iterator[Answer]:
        """Write `count` answers as they come, show how far that is, and pass each on once it is safe."""
        tokens = 0
        with tqdm(total=count, unit="answer", disable=not self.process.is_local_main_process) as progress:
            for answer in self.folder.write(answers):
                tokens += len(answer.response_ids)
                elapsed = progress.format_dict["elapsed"] or 1.0
                progress.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
                progress.update()
                yield answer


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
