"""What plain generate() does in one call, and the check that ours does the same."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from oracles import Oracle

from specformer import generate


class Recorder:
    """A streamer that remembers what it was given."""

    def __init__(self):
        self.calls: list = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


@dataclass
class Reference:
    """One call of plain generate()."""

    sequences: torch.Tensor
    streamed: list
    generator_state: torch.Tensor


def plain(target, batch: dict, seed: int = 3, **arguments) -> Reference:
    streamer = Recorder()
    torch.manual_seed(seed)
    sequences = target.generate(**batch, streamer=streamer, **arguments)
    return Reference(sequences, streamer.calls, torch.get_rng_state())


def check(target, batch: dict, reference: Reference, drafter, k: int, seed: int = 3, **arguments):
    """Generate with `drafter` and demand the same tokens, streamer calls and final generator state."""
    streamer = Recorder()
    torch.manual_seed(seed)
    output = generate(
        target,
        drafter,
        **batch,
        streamer=streamer,
        num_assistant_tokens=k,
        return_dict_in_generate=True,
        **arguments,
    )
    assert output.sequences.tolist() == reference.sequences.tolist()
    assert streamer.calls == reference.streamed
    assert torch.equal(torch.get_rng_state(), reference.generator_state)
    assert [len(drafted) for drafted in output.statistics.was_drafted] == output.statistics.tokens_per_row
    return output.statistics


def oracle(reference: Reference, batch: dict, kind: str, eos_token_id: int | None) -> Oracle:
    return Oracle(reference.sequences, batch["input_ids"].shape[1], kind, eos_token_id or 0)


def choose_eos(sequences: torch.Tensor, prompt_width: int) -> int:
    """A token that ends several rows of this text, and each of them somewhere else."""
    new = sequences[:, prompt_width:].tolist()

    def spread(token: int) -> tuple[int, int]:
        ends = [row.index(token) for row in new if token in row[2:]]
        return len(set(ends)), -len(ends)

    return max({token for row in new for token in row}, key=spread)


def assert_meaningful(target, batch: dict, sequences: torch.Tensor) -> None:
    """The greedy text varies, and no two best tokens are so close that rounding could decide between them."""
    prompt_width = batch["input_ids"].shape[1]
    new = sequences[:, prompt_width:]
    distinct = [len(set(row)) for row in new.tolist()]
    assert sum(distinct) / len(distinct) >= 3, f"degenerate texts: {new.tolist()}"
    mask = torch.cat([batch["attention_mask"], torch.ones_like(new)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = target(input_ids=sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
    top = logits[:, prompt_width - 1 : -1].topk(2, dim=-1).values
    assert (top[..., 0] - top[..., 1]).min() >= 1e-4


def texts_of_threads(target, assistant, batch: dict, **arguments) -> list[list[list[int]]]:
    """What three threads write, three calls each, which share `assistant`."""
    found: list = []

    def call():
        for _ in range(3):
            found.append(generate(target, assistant, **batch, **arguments).tolist())

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
