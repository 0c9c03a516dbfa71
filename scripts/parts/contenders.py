"""The ways to generate that the benchmark times: transformers' own, and this package's with different drafters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from specformer.generation.backend_linear import fast_linears
from specformer.generation.call_statistics import GenerationStatistics
from specformer.generation.drafter import Drafter, Prompts, Verified
from specformer.generation.generate import generate
from specformer.generation.proposal import Proposal

PLAIN = "plain generate"
PLAIN_ONEDNN = "plain generate, oneDNN"
STATIC = "plain generate, static cache"
CONTINUOUS = "transformers' continuous batching"
CONTINUOUS_BLOCK = 256
"""Tokens of one of its blocks."""
THEIR_LOOKUP = "transformers' prompt lookup"
THEIR_ASSISTANT = "transformers' assisted decoding"
LOOKUP = "prompt lookup"
RIGHT = "always right"
COPIES = "copies, auto"
MOST_COPIED = 10
"""Tokens that copies alone draft at most where "auto" decides; so does a drafter that knows the text where there is no
default one."""
OWN_TEXT_TRIES = 3
RECORDED = ", CUDA graphs"
"""Behind the name of a contender of this package whose passes are recorded."""


class KnownText(Drafter):
    """Drafts from a text that is known in advance, and knows where to be wrong.

    Args:
        most: tokens to draft at most.
    """

    default_num_assistant_tokens = 2

    def __init__(self, most: int):
        self.max_draft_tokens = most

    def know(self, answer: torch.Tensor, is_right: torch.Tensor) -> None:
        """The text of the next call, new tokens of each row (B, T), and where to draft it and where another one, bool
        (B, T)."""
        self.drafts = answer ^ (~is_right).long()

    def begin(self, prompts: Prompts) -> None:
        self.rows = torch.arange(len(prompts.input_ids), device=prompts.input_ids.device)
        self.written = torch.ones_like(self.rows)

    def propose(self, num_tokens, choose) -> Proposal:
        steps = self.written[:, None] + torch.arange(num_tokens, device=self.rows.device)
        return Proposal(self.drafts[self.rows[:, None], steps.clamp(max=self.drafts.shape[1] - 1)])

    def update(self, verified: Verified) -> None:
        self.written = self.written + verified.counts

    def select_rows(self, index, longest) -> None:
        self.rows, self.written = self.rows[index], self.written[index]


@dataclass
class Way:
    """One way to generate.

    Attributes:
        call: from generate()'s arguments to token ids (B, P + T), and statistics where there are some.
        is_plain: whether it drafts nothing, so that others are compared with it.
        prepare: what comes before a call and is not timed, given the same arguments.
    """

    call: Callable[..., tuple[torch.Tensor, GenerationStatistics | None]]
    is_plain: bool = False
    prepare: Callable[..., None] | None = None


def plain_way(target, **settings) -> Way:
    return Way(lambda **batch: (target.generate(**batch, **settings), None), is_plain=True)


def onednn_way(target) -> Way:
    """Plain generate() with the products of this package's passes (see `fast_linears`): what is left beside it is what
    drafting gains."""

    def call(**batch):
        with fast_linears(target):
            return target.generate(**batch), None

    return Way(call, is_plain=True)


def continuous_way(target) -> Way:
    """With as much cache as the batch needs: by itself it takes nine tenths of the memory that is free."""

    def call(input_ids, attention_mask, max_new_tokens, **settings):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        tokens = input_ids.shape[1] + max_new_tokens
        memory = ContinuousBatchingConfig(
            num_blocks=len(input_ids) * (tokens // CONTINUOUS_BLOCK + 2), max_batch_tokens=input_ids.numel()
        )
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        config = GenerationConfig(
            **{"pad_token_id": 0, "eos_token_id": -1, "max_new_tokens": max_new_tokens, **settings}
        )
        answers = target.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=memory, progress_bar=False
        )
        # in the order in which they were asked: ids are req_0, req_1, ...
        answers = [answers[name] for name in sorted(answers, key=lambda name: int(name.rsplit("_", 1)[1]))]
        new = torch.tensor([answer.generated_tokens for answer in answers], device=input_ids.device)
        return torch.cat([input_ids, new], dim=1), None

    return Way(call, is_plain=True)


def our_way(target, assistant, k: int | str | None, **more) -> Way:
    def call(**batch):
        output = generate(target, assistant, **batch, **more, num_assistant_tokens=k, return_dict_in_generate=True)
        return output.sequences, output.statistics

    return Way(call)


def right_way(target, one: KnownText, k: int | str, **more) -> Way:
    """Always right: in half precision a text depends on how many tokens a pass carries, so it learns what its own calls
    write before they are timed."""
    way = our_way(target, one, k, **more)

    def prepare(input_ids, **batch):
        for _ in range(OWN_TEXT_TRIES):
            answer = way.call(input_ids=input_ids, **batch)[0][:, input_ids.shape[1] :]
            if torch.equal(answer, one.drafts):
                break
            one.know(answer, torch.ones_like(answer, dtype=torch.bool))

    return Way(way.call, prepare=prepare if target.dtype in (torch.bfloat16, torch.float16) else None)


def knowledge(answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where drafters know `answer` (B, T): everywhere, nowhere, and at 7 of 10 tokens: the same for all rows, which
    then advance together, or each row's own."""
    everywhere = torch.ones_like(answer, dtype=torch.bool)
    found = {RIGHT: everywhere, "always wrong": ~everywhere}
    if len(answer) > 1:
        mostly = torch.rand(answer.shape, generator=torch.Generator().manual_seed(0)).to(answer.device) < 0.7
        found |= {"7 of 10 right, in step": mostly[:1].expand(answer.shape), "7 of 10 right, ragged": mostly}
    return found


def ways(
    target,
    drafter,
    answer: torch.Tensor,
    lengths: list[int | str],
    assistant,
    known: dict[str, KnownText],
    tree_sizes: Sequence[int] = (),
) -> dict[str, Way]:
    """Every way that can run this batch, by name.

    Args:
        lengths: numbers of tokens to draft, and "auto".
        answer: what plain generate() answers, (B, T).
        known: the drafters of earlier batches that knew the text, which "auto" has experience of; they get this one's.
        tree_sizes: of trees of the default drafter, which are as deep as the largest of `lengths`.
    """
    batch_size, on_gpu = len(answer), target.device.type == "cuda"
    found = {PLAIN: plain_way(target)}
    with fast_linears(target) as faster:
        if any(batch_size in forward.rows for forward in faster):  # otherwise plain generate() has no such products
            found[PLAIN_ONEDNN] = onednn_way(target)
    if on_gpu:
        found[STATIC] = plain_way(target, cache_implementation="static")
        found[CONTINUOUS] = continuous_way(target)
    if batch_size == 1:  # all that they can do
        found[THEIR_LOOKUP] = Way(lambda **batch: (target.generate(**batch, prompt_lookup_num_tokens=4), None))
        if assistant is not None:
            found[THEIR_ASSISTANT] = Way(lambda **batch: (target.generate(**batch, assistant_model=assistant), None))
    found[LOOKUP] = our_way(target, None, None, prompt_lookup_num_tokens=4)
    found[COPIES] = our_way(target, None, "auto", prompt_lookup_num_tokens=MOST_COPIED)
    if assistant is not None:
        found["assistant, auto"] = our_way(target, assistant, "auto")
    every = {} if drafter is None else {"default": drafter}
    for name, is_right in knowledge(answer).items():
        most = getattr(getattr(drafter, "config", None), "num_draft_tokens", MOST_COPIED)
        every[name] = known.setdefault(name, KnownText(most))
        every[name].know(answer, is_right)
    paths: dict[str, dict] = {"": {}} | ({RECORDED: dict(cuda_graphs=True)} if on_gpu else {})
    for name, one in every.items():
        make = right_way if name == RIGHT else our_way
        # in step or ragged: at one length, so that only that differs
        for length in lengths if "7 of 10" not in name else [length for length in lengths if length != "auto"]:
            for path, more in paths.items():
                found[f"{name}, {'' if length == 'auto' else 'k = '}{length}{path}"] = make(target, one, length, **more)
    if drafter is not None:
        deepest = max((length for length in lengths if length != "auto"), default=None)
        for size in tree_sizes:
            found[f"default, tree of {size}"] = our_way(target, drafter, deepest, tree_size=size)
        found["default, chains, auto"] = our_way(target, drafter, "auto", tree_size=0)
        found["default alone, auto"] = our_way(target, drafter, "auto", prompt_lookup_num_tokens=0)
    return found
