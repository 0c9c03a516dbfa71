"""Let a target answer prompts: the training data of its drafter.

    specformer distill --prompts prompts.jsonl --output answers
    accelerate launch -m specformer.scripts.distill --prompts <datasets id> --target <your model> --output answers

A row of --prompts is a text or a conversation, in one of the forms that prompt_rows.py lists: {"prompt": "..."},
{"messages": [...]}, ShareGPT's, Alpaca's and others. --output becomes a folder that `datasets` reads: JSON lines of id,
prompt_ids, response_ids and finished (whether the answer ended by itself), and a README.md with where they come from;
with --store-hidden-states also what `train --store-hidden-states` needs, so that it does not read the answers again.
Run the same command again after an interruption, with as many processes as you like: answers that are there are kept,
those that are missing are made. An answer depends on its prompt and the settings alone, not on the batch or the order,
so an interrupted run ends with the same answers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from specformer.configuration_specformer import SpecFormerConfig
from specformer.generation.backend_linear import fast_linears
from specformer.publishing_specformer import hub_id
from specformer.scripts.parts.answering import Answer, Answering
from specformer.scripts.parts.distilled_states import StatesWriter, begin_states
from specformer.scripts.parts.prompts import encode_each, read_prompts, template_arguments
from specformer.scripts.parts.provenance import has_bfloat16, provenance
from specformer.scripts.parts.runs import begin_or_go_on


def read_answers(folder: Path) -> set[int]:
    """Ids of the answers that are there. What an interruption left of a last line is cut off."""
    done: set[int] = set()
    for path in sorted(folder.glob("answers-*.jsonl")):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with open(path, "r+b") as file:
                file.truncate(len(whole))
        done.update(json.loads(line)["id"] for line in whole.splitlines())
    return done


def write_card(folder: Path, settings: dict) -> None:
    """README.md: what `datasets` needs to know, and where the answers come from."""
    files = sorted(folder.glob("answers-*.jsonl"))
    rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    tokens = sum(len(row["response_ids"]) for row in rows)
    ended = sum(row["finished"] for row in rows) / max(1, len(rows))
    target = hub_id(settings["target"])
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        '  data_files: "answers-*.jsonl"',
        "task_categories:",
        "- text-generation",
        "tags:",
        "- specformer",
        "- speculative-decoding",
        "---",
        f"# Answers of {f'[{target}](https://huggingface.co/{target})' if target else 'a target'}",
        "",
        f"{len(rows)} answers, {tokens} tokens, {ended:.1%} of them ended by the target itself. They are token ids, to "
        "train a drafter for speculative decoding of that model: `specformer train --data <this folder>`. The prompts "
        "have licences of their own.",
        "",
        "```json",
        json.dumps({**settings, **provenance("specformer.scripts.distill")}, indent=2),
        "```",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def main(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from specformer.scripts.fetch_target import find_target

    prompts = read_prompts(arguments.prompts, arguments.limit)
    if not 0 <= arguments.skip < len(prompts):
        raise ValueError(f"--skip is {arguments.skip}, and there are {len(prompts)} prompts; expected fewer than that.")
    process = PartialState(cpu=not torch.accelerator.is_available())
    name, identity = find_target(arguments.target)
    repository = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **repository)
    encoded = encode_each(tokenizer, prompts, arguments.prompts, arguments.chat_template_kwargs)
    asked = range(arguments.skip, len(encoded))
    kept = [index for index in asked if len(encoded[index]) <= arguments.max_prompt_tokens]
    if not kept:
        shortest = min(len(encoded[index]) for index in asked)
        raise ValueError(
            f"--max-prompt-tokens is {arguments.max_prompt_tokens}, and all {len(asked)} prompts are longer; expected "
            f"{shortest} or more, which the shortest has."
        )
    dtype = arguments.dtype or ("bfloat16" if process.device.type != "cpu" or has_bfloat16() else "float32")
    target = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **repository)
    target = target.eval().to(process.device)
    settings = {
        "target": identity,
        "revision": getattr(target.config, "_commit_hash", None),
        "trust_remote_code": arguments.trust_remote_code,
        "dtype": dtype,
        "chat_template": digest(tokenizer.chat_template),
        "chat_template_kwargs": arguments.chat_template_kwargs or None,
        "prompts": digest(encoded),
        "max_prompt_tokens": arguments.max_prompt_tokens,
        "skip": arguments.skip,
        "prompts_left_out_as_longer": len(asked) - len(kept),
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
    }
    layer_ids = None
    if arguments.store_hidden_states:
        layer_ids = list(SpecFormerConfig.from_target_config(target.config).target_layer_ids)
    done: set[int] = set()
    if process.is_main_process:
        begin_or_go_on(arguments.output, settings)
        if layer_ids is not None:
            begin_states(arguments.output, target, layer_ids)
        done = read_answers(arguments.output)
    process.wait_for_everyone()
    done = done or read_answers(arguments.output)
    missing = [index for index in kept if index not in done]
    mine = missing[process.process_index :: process.num_processes]
    process.wait_for_everyone()  # nobody writes before everybody has read

    answering = Answering(
        target, arguments.batch_size, arguments.max_new_tokens, arguments.temperature, arguments.seed, layer_ids
    )
    path = arguments.output / f"answers-{process.process_index:05d}.jsonl"
    progress = tqdm(total=len(mine), unit="answer", disable=not process.is_local_main_process)
    tokens = 0
    try:
        answers = answering.run(Answer(index, encoded[index]) for index in mine)
        with open(path, "a", encoding="utf-8") as file, closing(answers), fast_linears(target), ExitStack() as stack:
            states = None
            if layer_ids is not None:
                size = len(layer_ids) * target.config.get_text_config(decoder=True).hidden_size
                states = stack.enter_context(closing(StatesWriter(path, size)))
            for answer in answers:
                if states is not None:
                    states.append(answer)
                file.write(answer.to_json() + "\n")
                file.flush()
                tokens += len(answer.response_ids)
                elapsed = progress.format_dict["elapsed"] or 1.0
                progress.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
                progress.update()
    except OSError as error:
        raise RuntimeError(
            f"{path} could not be written ({error}). The answers so far are safe; free some space and run the same "
            "command again."
        ) from error
    progress.close()
    process.wait_for_everyone()
    if process.is_main_process:
        write_card(arguments.output, settings)
        print(f"{len(kept)} answers in {arguments.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument(
        "--store-hidden-states",
        action="store_true",
        help="keep the target's hidden states as well, for `train --store-hidden-states`, which then need not read the "
        "answers again: 2 bytes a value, for a target of width 896 5 kB a token",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 on a CPU without bfloat16 instructions, else bfloat16",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
