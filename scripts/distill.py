"""Let a target answer prompts: the training data of its drafter.

    specformer distill --prompts prompts.jsonl --output answers
    accelerate launch -m specformer.scripts.distill --prompts <datasets id> --target <your model> --output answers

A row of --prompts is a text or a conversation, in one of the forms that prompt_rows.py lists: {"prompt": "..."},
{"messages": [...]}, ShareGPT's, Alpaca's and others. --output becomes a folder that `datasets` reads: JSON lines of id,
prompt_ids, response_ids and finished (whether the answer ended by itself), and a README.md with where they come from.
Run the same command again after an interruption, with as many processes as you like: answers that are there are kept,
those that are missing are made. An answer depends on its prompt and the settings alone, not on the batch or the order,
so an interrupted run ends with the same answers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from specformer.generation.accept_noise import HashedNoise
from specformer.generation.accept_sampling import sample_with_noise
from specformer.generation.backend_linear import fast_linears
from specformer.generation.prompt import PromptLayout
from specformer.generation.prompt_groups import tokens_of_a_pass
from specformer.generation.target import prefill, prompt_arguments, verify
from specformer.generation.target_attention import usable_attention
from specformer.generation.target_probe import probe_target
from specformer.generation.target_refusals import check_target, input_device
from specformer.generation.text_positions import Positions
from specformer.scripts.parts.prompts import encode_each, read_prompts, template_arguments
from specformer.scripts.parts.provenance import provenance
from specformer.scripts.parts.runs import begin_or_go_on


@dataclass
class Answer:
    """One prompt and what the target has answered so far."""

    index: int
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    finished: bool = False

    def to_json(self) -> str:
        row = {"id": self.index, "prompt_ids": self.prompt_ids}
        row.update(response_ids=self.response_ids, finished=self.finished)
        return json.dumps(row, separators=(",", ":"))


class Answering:
    """A batch of prompts that is refilled: the row of a finished answer is taken by the next prompt.

    Args:
        target: a causal LM.
        batch_size: rows of the batch.
        max_new_tokens: longest answer.
        temperature: 0 takes the best token, otherwise tokens are sampled, with noise that depends on `seed`, the index
            of the prompt and the position alone.
    """

    def __init__(self, target, batch_size: int, max_new_tokens: int, temperature: float = 0.0, seed: int = 0):
        check_target(target)
        self.target, self.device = target, input_device(target)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.temperature, self.seed = temperature, seed
        eos = target.generation_config.eos_token_id
        self.eos_token_ids = set(eos if isinstance(eos, list) else [eos])

    def run(self, prompts: Iterator[Answer]) -> Generator[Answer, None, None]:
        """Yield answers as they are complete. In between the target is as it was, for whatever the caller does."""
        waiting = deque(prompts)
        self.rows: list[Answer | None] = []  # the one in each row of the batch, None where it is complete
        is_probed = False
        while waiting or any(self.rows):
            with torch.no_grad(), usable_attention(self.target), fast_linears(self.target):
                if not is_probed:
                    probe_target(self.target)
                    is_probed = True
                complete: list[Answer] = []
                while not complete and (waiting or any(self.rows)):
                    complete = self._refill(waiting)
                    if any(self.rows):
                        complete += self._step()
            yield from complete

    def _refill(self, waiting: deque[Answer]) -> list[Answer]:
        """Give free rows to prompts that wait, or drop them. Returns answers of one token."""
        free = [place for place, answer in enumerate(self.rows) if answer is None]
        if waiting and (not any(self.rows) or len(free) >= max(1, self.batch_size // 8)):
            count = len(free) if self.rows else self.batch_size
            return self._admit([waiting.popleft() for _ in range(min(count, len(waiting)))], free)
        if len(free) > len(self.rows) // 2:
            self._drop(free)
        return []

    def _admit(self, answers: list[Answer], free: list[int]) -> list[Answer]:
        """Read prompts into free rows, or into a new batch, and take their first tokens."""
        width = max(len(answer.prompt_ids) for answer in answers)
        missing = [width - len(answer.prompt_ids) for answer in answers]
        ids = [[0] * pad + answer.prompt_ids for pad, answer in zip(missing, answers, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in missing]
        input_ids, mask = torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)
        layout = PromptLayout.from_mask(mask, input_ids, tokens_of_a_pass(self.target))
        # A row may be taken by a longer prompt later, so the buffers' limit is the model's.
        limit = getattr(self.target.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20
        arguments = prompt_arguments(self.target, layout)
        most = max(limit, width + self.max_new_tokens)
        logits, cache, _ = prefill(self.target, input_ids, layout, most, 1, arguments)
        places = free[: len(answers)]
        if not self.rows:
            self.cache, self.rows, places = cache, list(answers), list(range(len(answers)))
            self.last = torch.zeros(len(answers), 1, dtype=torch.long, device=self.device)
        else:
            for place, answer in zip(places, answers, strict=True):
                self.rows[place] = answer
            self.cache.replace_rows(torch.tensor(places, device=self.device), cache, self._longest())
        return self._take(logits[:, -1], places)

    def _step(self) -> list[Answer]:
        """One more token for every row."""
        logits = verify(self.target, self.cache, self.last)[0][:, -1]
        running = torch.tensor([answer is not None for answer in self.rows], device=self.device)
        self.cache.advance(running.long(), self._longest())
        return self._take(logits, list(range(len(self.rows))))

    def _take(self, logits: torch.Tensor, places: list[int]) -> list[Answer]:
        """The next token of the rows at `places`. Returns the answers that it completes."""
        scores = logits.to(self.device, torch.float32)
        if self.temperature:
            answers = [self.rows[place] or Answer(0, []) for place in places]  # complete ones are only carried along
            noise = HashedNoise([self.seed + answer.index for answer in answers], self.device)
            steps = torch.tensor([len(answer.response_ids) for answer in answers])
            noise = noise.gather(Positions(torch.arange(len(answers)), steps), scores.shape[-1])
            tokens = sample_with_noise(scores / self.temperature, noise)
        else:
            tokens = scores.argmax(-1)
        self.last[places, 0] = tokens
        complete = []
        for place, token in zip(places, tokens.tolist(), strict=True):
            if (answer := self.rows[place]) is None:
                continue
            answer.response_ids.append(token)
            answer.finished = token in self.eos_token_ids
            if answer.finished or len(answer.response_ids) == self.max_new_tokens:
                self.rows[place] = None
                complete.append(answer)
        return complete

    def _drop(self, free: list[int]) -> None:
        """There is nothing left to fill rows with: carry on the running ones alone."""
        kept = [place for place in range(len(self.rows)) if place not in set(free)]
        self.rows = [self.rows[place] for place in kept]
        index = torch.tensor(kept, device=self.device)
        self.cache.select_rows(index, self._longest())
        self.last = self.last[index]

    def _longest(self) -> int:
        """Tokens of the longest running row that the target has read once the newest ones are."""
        lengths = [len(answer.prompt_ids) + len(answer.response_ids) for answer in self.rows if answer is not None]
        return max(lengths, default=0)


# ---- the folder of answers


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
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        '  data_files: "answers-*.jsonl"',
        "---",
        f"{len(rows)} answers, {tokens} tokens, {ended:.1%} of them ended by the target itself.",
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
    dtype = arguments.dtype or ("float32" if process.device.type == "cpu" else "bfloat16")
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
    done: set[int] = set()
    if process.is_main_process:
        begin_or_go_on(arguments.output, settings)
        done = read_answers(arguments.output)
    process.wait_for_everyone()
    done = done or read_answers(arguments.output)
    missing = [index for index in kept if index not in done]
    mine = missing[process.process_index :: process.num_processes]
    process.wait_for_everyone()  # nobody writes before everybody has read

    answering = Answering(target, arguments.batch_size, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    path = arguments.output / f"answers-{process.process_index:05d}.jsonl"
    progress = tqdm(total=len(mine), unit="answer", disable=not process.is_local_main_process)
    tokens = 0
    try:
        answers = answering.run(Answer(index, encoded[index]) for index in mine)
        with open(path, "a", encoding="utf-8") as file, closing(answers), fast_linears(target):
            for answer in answers:
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
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, else bf16"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
