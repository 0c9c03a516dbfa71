"""A world of processes that share a target: `python tests/world.py <scenario> <ranks> <folder>`.

Models and what plain generate() writes in one process are made first; then the process forks, so that torch is imported
once. Every rank writes what came of each of its calls into `<folder>/rank<n>.json`. In all ranks but the first one the
clock runs at random, from a tenth of its speed to ten times as fast, and random numbers are others.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as distributed
from dflash import random_weights, raw_config
from exactness import choose_eos
from foreign import save
from tiny import PRESETS, VOCAB, llama, ragged_batch
from transformers import AutoModelForCausalLM, StoppingCriteria
from transformers.distributed import DistributedConfig
from transformers.generation import stopping_criteria
from transformers.utils.logging import disable_progress_bar

from specformer import Drafter, Hierarchy, Proposal, Reader, SpecFormerModel, TrigramChains, generate
from specformer.generation import decoding, draft_length_auto, drafter_hierarchy, prompt_groups
from specformer.generation import generate as entry
from specformer.generation.accept_tokens import TokenChoice

NEW_TOKENS, MANY = 16, 100
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class OddClock:
    """Goes on by the time that has passed, times a random number."""

    def __init__(self, seed: int):
        self.random, self.real, self.told = random.Random(seed), time.perf_counter(), 0.0

    def __call__(self) -> float:
        now = time.perf_counter()
        self.told += (now - self.real) * 10 ** self.random.uniform(-1, 1)
        self.real = now
        return self.told


class RandomDrafter(Drafter):
    """Drafts what comes to its mind, and as much: in each rank something else."""

    max_draft_tokens = 6

    def begin(self, prompts):
        self.newest = prompts.first_tokens

    def propose(self, num_tokens, choose):
        rows, width = len(self.newest), random.randint(0, num_tokens)
        tokens = [random.randrange(VOCAB) for _ in range(rows * width)]
        return Proposal(torch.tensor(tokens, dtype=torch.long).view(rows, width))

    def update(self, verified):
        self.newest = verified.newest(self.newest)

    def select_rows(self, index, longest):
        self.newest = self.newest[index]


class StopsElsewhere(StoppingCriteria):
    """Stops every row at once in all ranks but the first one, as one might that looks at a clock."""

    def __init__(self, rank: int):
        self.answer = rank > 0

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.answer)


def texts(target, batch: dict, **arguments) -> list:
    torch.manual_seed(3)
    return target.generate(**batch, **arguments).tolist()


class World:
    """What all processes have from before they are several."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.batch = folder, size, ragged_batch()
        self.arguments: dict = dict(max_new_tokens=NEW_TOKENS, pad_token_id=0)
        target = llama(num_key_value_heads=max(size, 2))
        target.generation_config.eos_token_id = None
        free = target.generate(**self.batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        target.generation_config.eos_token_id = choose_eos(free, self.batch["input_ids"].shape[1])
        target.save_pretrained(folder / "target")
        self.assistant = llama(num_key_value_heads=max(size, 2))
        with torch.no_grad():  # a relative, of which many drafts are accepted
            for parameter in self.assistant.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        self.assistant.save_pretrained(folder / "assistant")
        self.dflash = save(folder / "dflash", raw_config(target), random_weights(target))
        config = PRESETS["confidence"](target.config, num_draft_tokens=4)
        self.specformer = SpecFormerModel(config).double().eval()
        self.plain = {
            (name, do_sample): texts(target.to(dtype), self.batch, **self.arguments, do_sample=do_sample)
            for name, dtype in DTYPES.items()
            for do_sample in (False, True)
        }


class Rank:
    """One of the processes."""

    def __init__(self, world: World, rank: int, timeout: float = 60):
        self.world, self.rank, self.size, self.found = world, rank, world.size, {}
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.size))
        store = distributed.FileStore(str(world.folder / "store"), self.size)
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=self.size, timeout=timedelta(seconds=timeout)
        )
        if rank:
            clock = OddClock(rank)
            for module in (decoding, draft_length_auto, drafter_hierarchy):
                module.perf_counter = clock
            stopping_criteria.time = SimpleNamespace(time=lambda: 1e4 * clock())
        random.seed(rank)

    def load(self, dtype: str = "float64", name: str = "target", **sizes):
        config = DistributedConfig(**sizes)
        folder = self.world.folder / name
        return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], distributed_config=config).eval()

    def text(self, target, drafter, do_sample: bool = False, batch: dict | None = None, **arguments) -> list:
        torch.manual_seed(3 + self.rank)  # of the others nothing is to be seen
        batch = self.world.batch if batch is None else batch
        return generate(target, drafter, **batch, **self.world.arguments, do_sample=do_sample, **arguments).tolist()

    def check(self, name: str, target, drafter, dtype="float64", calls=2, turns=(False, True), **arguments) -> None:
        """Calls in turns, greedy and sampled, of which the later ones know of the earlier ones."""
        for do_sample in itertools.islice(itertools.cycle(turns), calls):
            if self.text(target, drafter, do_sample, **arguments) != self.world.plain[dtype, do_sample]:
                self.found[name] = "another text"
                return
        self.found[name] = "same"

    def raised(self, name: str, target, drafter, **arguments) -> None:
        """What a call raises, with its notes."""
        self.found[name] = "nothing was raised"
        try:
            self.text(target, drafter, **arguments)
        except Exception as error:
            self.found[name] = "".join(traceback.format_exception_only(error))

    def save(self) -> None:
        (self.world.folder / f"rank{self.rank}.json").write_text(json.dumps(self.found), encoding="utf-8")


def drafters(rank: Rank) -> dict[str, tuple]:
    """Of many kinds, each with what a call is told besides."""
    world, fixed = rank.world, dict(num_assistant_tokens=3)
    shared = rank.load(name="assistant", tp_size=rank.size)
    return {
        "default": (world.specformer, {}),
        "fixed": (world.specformer, fixed),
        "tree": (world.specformer, dict(tree_size=6, **fixed)),
        "copies": (None, dict(prompt_lookup_num_tokens=3, num_assistant_tokens="auto")),
        "assistant": (world.assistant, {}),
        "assistant, shared": (shared, {}),
        "assistant, shared, fixed": (shared, fixed),
        "DFlash": (str(world.dflash), {}),
        "random": (RandomDrafter(), {}),
        "hierarchy": (Hierarchy(Reader(), world.assistant), {}),
        "max_time": (world.assistant, dict(max_time=600.0)),
        "criterion": (world.assistant, dict(stopping_criteria=[StopsElsewhere(rank.rank)], **fixed)),
    }


def further_drafters(rank: Rank) -> dict[str, tuple]:
    """The kinds that are left."""
    from test_diffuspec import filler, system_of
    from test_eagle_and_pard import EAGLES
    from test_parallelspec import CHECKPOINTS

    folder = rank.world.folder / f"of rank {rank.rank}"
    pard = llama(seed=1)
    pard.config.pard_token = 3
    return {
        "EAGLE-3": (str(save(folder / "eagle", *EAGLES["SafeAILab"])), {}),
        "ParallelSpec": (str(save(folder / "parallelspec", *CHECKPOINTS["its own"])), {}),
        "PARD": (pard, {}),
        "diffusion": (system_of(filler()), {}),
        "chains": (TrigramChains(), {}),
    }


def quick(rank: Rank) -> None:
    size, world = rank.size, rank.world
    shared = rank.load(tp_size=size)
    for name, (drafter, arguments) in drafters(rank).items():
        rank.check(name, shared, drafter, calls=5 if name in ("default", "assistant") else 2, **arguments)
    single = rank.load("float32", tp_size=size)
    rank.check("default, float32", single, world.specformer, "float32")
    rank.check("fixed, float32", single, world.specformer, "float32", num_assistant_tokens=3)
    fully = rank.load(fsdp_size=size)
    rank.check("FSDP2", fully, world.specformer)
    rank.check("FSDP2, fixed", fully, world.assistant, num_assistant_tokens=3)

    torch.manual_seed(rank.rank)
    rank.raised("other weights", shared, SpecFormerModel(world.specformer.config).double().eval())
    rank.raised("other prompts", shared, world.specformer, batch=ragged_batch(seed=rank.rank))
    rank.raised("other settings", shared, world.specformer, num_assistant_tokens=3 + rank.rank)
    rank.raised("cuda_graphs", shared, world.specformer, cuda_graphs=True)
    rank.raised("shared middle model", shared, Hierarchy(Reader(), shared))
    rank.raised("pipeline", rank.load(pp_size=size), world.specformer)
    partitioned = llama()
    partitioned.lm_head.weight = torch.nn.Parameter(torch.empty(0))  # as DeepSpeed leaves it
    partitioned.lm_head.weight.ds_id = 0
    rank.raised("ZeRO-3", partitioned, world.specformer)

    if rank.rank:  # a rank that takes another token
        of_target = TokenChoice.of_target

        def wrong(self, *given):
            tokens, *others = of_target(self, *given)
            return (tokens + 1) % VOCAB, *others

        TokenChoice.of_target = wrong
    rank.check("other tokens", shared, world.assistant)
    if rank.rank:
        TokenChoice.of_target = of_target
    # Without what is told the ranks get apart. A message of another size ends a process of gloo at once.
    entry.among_ranks = lambda model: nullcontext()
    rank.found["nothing told"] = "it ended"
    rank.save()
    with suppress(RuntimeError):
        rank.check("nothing told", shared, world.assistant, calls=20, turns=(False,))


def many_calls(rank: Rank) -> None:
    """`MANY` of each kind, and one rank that is slow at random moments, by a factor of about ten."""
    if rank.rank == rank.size - 1:
        verify = decoding.verify

        def slowly(*given):
            time.sleep(random.choice([0, 0, 0, 0.1]))
            return verify(*given)

        decoding.verify = slowly
    shared = rank.load(tp_size=rank.size)
    for name, (drafter, arguments) in {**drafters(rank), **further_drafters(rank)}.items():
        rank.check(name, shared, drafter, calls=MANY, **arguments)
    single = rank.load("float32", tp_size=rank.size)
    rank.check("default, float32", single, rank.world.specformer, "float32", calls=MANY)
    sizes = dict(fsdp_size=rank.size)
    if hasattr(DistributedConfig, "dp_replicate_size"):  # a transformers that does both at once
        sizes = dict(tp_size=rank.size // 2, fsdp_size=2)
    rank.check("FSDP2", rank.load(**sizes), rank.world.specformer, calls=MANY)


def lost(rank: Rank, how: signal.Signals) -> None:
    """The last rank is killed, or stopped, in its fifth round."""
    shared = rank.load(tp_size=rank.size)

    def on_round(told) -> None:
        if told.number == 5 and rank.rank == rank.size - 1:
            rank.found["lost"] = "in round 5"
            rank.save()
            os.kill(os.getpid(), how)

    began = time.monotonic()
    rank.raised("raised", shared, rank.world.specformer, num_assistant_tokens=1, on_round=on_round)
    rank.found["seconds"] = time.monotonic() - began


SCENARIOS: dict[str, tuple[Callable[[Rank], None], float]] = {
    "quick": (quick, 60),
    "many calls": (many_calls, 600),
    "killed": (lambda rank: lost(rank, signal.SIGKILL), 60),
    "stopped": (lambda rank: lost(rank, signal.SIGSTOP), 10),
}
"""What each rank does, and the seconds that a rank waits for another one."""


def run(scenario: str, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    prompt_groups.PASS_ON_CPU = 3  # the short prompts are read in several groups, as long ones are
    world = World(folder, size)
    number = next((number for number in range(1, size) if os.fork() == 0), 0)
    act, timeout = SCENARIOS[scenario]
    rank = Rank(world, number, timeout)
    try:
        act(rank)
    except BaseException as error:
        rank.found["failed"] = "".join(traceback.format_exception(error))
    rank.save()
    os._exit(0)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
