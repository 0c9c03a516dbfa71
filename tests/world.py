"""A world of processes that share a target: `python tests/world.py <scenario> <ranks> <folder> [<options, JSON>]`.

Models and what plain generate() writes in one process are made first; then the process forks, so that torch is imported
once. Started by torchrun it is one of the processes, which all make the same models. Every rank writes what came of
each of its calls into `<folder>/rank<n>.json`. In all ranks but the first one the clock runs at random, from a tenth of
its speed to ten times as fast, and random numbers are others.
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as distributed
from dflash import WIDTH, random_weights, raw_config, speculators_config
from exactness import choose_eos
from foreign import save
from tiny import PRESETS, VOCAB, llama, ragged_batch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria
from transformers.distributed import DistributedConfig
from transformers.generation import stopping_criteria
from transformers.utils.logging import disable_progress_bar

from specformer import (
    Drafter,
    Hierarchy,
    LayerParallel,
    OnlineDistillation,
    Proposal,
    Reader,
    SpecFormerModel,
    TrigramChains,
    generate,
)
from specformer.generation import decoding, draft_length_auto, drafter_hierarchy, drafter_online, prompt_groups
from specformer.generation import generate as entry
from specformer.generation.accept_tokens import TokenChoice
from specformer.generation.drafter_layer_division import DividedGroups
from specformer.generation.drafter_layer_parallel import LayerParallelDrafter
from specformer.generation.ranks_agreement import fingerprint, weights_of
from specformer.generation.target_head import embed_tokens
from specformer.scripts.fetch_target import fetch_target
from specformer.scripts.parts.fewer_layers import keep_layers
from specformer.target_specformer import some_embeddings

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float64": torch.float64, "float32": torch.float32}
FIXED = dict(num_assistant_tokens=3)


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


def drafts_of(target, drafter, batch: dict, **arguments) -> tuple[list, list[int]]:
    """What a `LayerParallel` drafts in a call, round by round, and how much of it was accepted, slot by slot."""
    rounds, propose = [], LayerParallelDrafter.propose

    def noted(self, *given):
        proposal = propose(self, *given)
        rounds.append(proposal.tokens.tolist())
        return proposal

    with patch.object(LayerParallelDrafter, "propose", noted):
        torch.manual_seed(3)
        output = generate(target, drafter, **batch, **arguments, **FIXED, return_dict_in_generate=True)
    return rounds, output.statistics.accepted_per_slot


class Doubled(torch.nn.Embedding):
    """As a family has it that scales embeddings."""

    def forward(self, token_ids):
        return 2 * super().forward(token_ids)


class World:
    """What all processes have from before they are several.

    Args:
        folder: for its models.
        size: how many processes there are to be.
        new_tokens: of each text.
    """

    def __init__(self, folder: Path, size: int, new_tokens: int = 16):
        self.folder, self.size = folder, size
        self.arguments: dict = dict(max_new_tokens=new_tokens, pad_token_id=0)
        self.plain: dict[tuple[str, bool], list] = {}  # texts of one process, by dtype and whether they are sampled
        self.make()

    def make(self) -> None:
        self.batch, heads = ragged_batch(), max(self.size, 2)
        target = llama(num_key_value_heads=heads)
        target.generation_config.eos_token_id = None
        free = target.generate(**self.batch, **self.arguments, do_sample=False)
        target.generation_config.eos_token_id = choose_eos(free, self.batch["input_ids"].shape[1])
        target.save_pretrained(self.folder / "target")
        self.assistant = llama(num_key_value_heads=heads)
        with torch.no_grad():  # a relative, of which many drafts are accepted
            for parameter in self.assistant.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        self.assistant.save_pretrained(self.folder / "assistant")
        self.dflash = save(self.folder / "dflash", raw_config(target), random_weights(target))
        config = PRESETS["confidence"](target.config, num_draft_tokens=4)
        self.specformer = SpecFormerModel(config).double().eval()
        self.specformer.config.target_embeddings = some_embeddings(target, VOCAB)  # compared before the first pass
        self.layer_parallel = [LayerParallel(self.assistant, 2), LayerParallel(llama(num_hidden_layers=7), 3)]
        self.drafts = [drafts_of(target, drafter, self.batch, **self.arguments) for drafter in self.layer_parallel]
        self.note_plain(target)

    def note_plain(self, target) -> None:
        for name, dtype in DTYPES.items():
            for do_sample in (False, True):
                self.plain[name, do_sample] = texts(target.to(dtype), self.batch, **self.arguments, do_sample=do_sample)

    def loaded(self, target):
        return target

    def ways(self) -> dict[str, tuple[dict, tuple[str, ...]]]:
        """How the target is divided, and which kinds draft; none named: all."""
        few = ("SpecFormer", "assistant")
        found = {"tensor parallel": (dict(tp_size=self.size), ()), "FSDP2": (dict(fsdp_size=self.size), ())}
        if self.size > 2 and hasattr(DistributedConfig, "dp_replicate_size"):  # a transformers that does both at once
            found["both"] = dict(tp_size=self.size // 2, fsdp_size=2), few
        return found


class RealWorld(World):
    """SmolLM2-135M-Instruct, and what drafts for it. Its 3 key and value heads are for 3 processes, or not divided.
    Prompts are short, since so many calls read them."""

    PROMPTS = ["The capital of Portugal is", "Count"]

    def make(self) -> None:
        (self.folder / "target").symlink_to(fetch_target())
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "target")
        tokenizer.padding_side = "left"
        self.batch = dict(tokenizer(self.PROMPTS, padding=True, return_tensors="pt"))
        target = AutoModelForCausalLM.from_pretrained(self.folder / "target", dtype=torch.float32).eval()
        self.assistant = keep_layers(target, 9)
        self.specformer = SpecFormerModel.from_pretrained(ROOT).eval()
        self.note_plain(target)

    def ways(self) -> dict[str, tuple[dict, tuple[str, ...]]]:
        if self.size == 3:
            return {"tensor parallel": (dict(tp_size=3), ())}
        return {"FSDP2": (dict(fsdp_size=self.size), ())}


class MtpWorld(World):
    """A tiny GLM-4.5, which has experts, and a layer for multi-token prediction."""

    def make(self) -> None:
        from test_mtp import target_with_layer

        target, self.layer, self.batch, eos = target_with_layer("GLM-4.5")
        target.generation_config.eos_token_id = eos
        target.save_pretrained(self.folder / "target")
        self.note_plain(target)

    def ways(self) -> dict[str, tuple[dict, tuple[str, ...]]]:
        return {
            "tensor parallel": (dict(tp_size=self.size), ())
        }  # its routers are in float32, which FSDP2 does not take

    def loaded(self, target):
        target.set_experts_implementation("eager")  # the grouped kernels do not take float64
        self.layer.to(target.dtype)
        return target


WORLDS = {"tiny": World, "SmolLM2": RealWorld, "MTP": MtpWorld}


class Rank:
    """One of the processes.

    Args:
        world: before they were several.
        rank: which one.
        folder: for what it found.
    """

    def __init__(self, world: World, rank: int, folder: Path):
        self.world, self.rank, self.size, self.folder, self.found = world, rank, world.size, folder, {}
        if rank:
            clock = OddClock(rank)
            for module in (decoding, draft_length_auto, drafter_hierarchy):
                module.perf_counter = clock
            stopping_criteria.time = SimpleNamespace(time=lambda: 1e4 * clock())
        random.seed(rank)

    def load(self, dtype: str = "float64", name: str = "target", **sizes):
        config = DistributedConfig(**sizes)
        folder = self.world.folder / name
        target = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], distributed_config=config)
        return self.world.loaded(target.eval())

    def text(self, target, drafter, do_sample: bool = False, batch: dict | None = None, **arguments) -> list:
        torch.manual_seed(3 + self.rank)  # of the others nothing is to be seen
        batch = self.world.batch if batch is None else batch
        return generate(target, drafter, **batch, **self.world.arguments, do_sample=do_sample, **arguments).tolist()

    def check(self, name: str, target, drafter, *settings: dict, dtype="float64", calls=2, turns=(False, True)) -> None:
        """Calls in turns, greedy and sampled, with each of `settings`; the later ones know of the earlier ones."""
        others = 0
        for arguments, do_sample in itertools.islice(itertools.cycle(itertools.product(settings, turns)), calls):
            others += self.text(target, drafter, do_sample, **arguments) != self.world.plain[dtype, do_sample]
        self.found[name] = f"another text in {others} of {calls} calls" if others else "same"

    def raised(self, name: str, target, drafter, **arguments) -> None:
        """What a call raises, with its notes."""
        self.found[name] = "nothing was raised"
        try:
            self.text(target, drafter, **arguments)
        except Exception as error:
            self.found[name] = "".join(traceback.format_exception_only(error))

    def save(self) -> None:
        (self.folder / f"rank{self.rank}.json").write_text(json.dumps(self.found), encoding="utf-8")


def learning_with(world, drafter=None, **settings) -> OnlineDistillation:
    """A drafter that learns after each call."""
    return OnlineDistillation(drafter or world.specformer, every=1, max_time_share=1e9, **settings)


def usual_drafters(world) -> dict[str, tuple]:
    """Those of every target, each with what a call is told besides."""
    return {
        "SpecFormer": (world.specformer, {}),
        "trees": (world.specformer, dict(tree_size=6)),
        "copies": (None, dict(prompt_lookup_num_tokens=3, num_assistant_tokens="auto")),
        "assistant": (world.assistant, {}),
        "hierarchy": (Hierarchy(Reader(), world.assistant), {}),
        "learning": (learning_with(world), {}),
    }


def drafters(rank: Rank) -> dict[str, tuple]:
    """Of many kinds."""
    world = rank.world
    return {
        **usual_drafters(world),
        "assistant, shared": (rank.load(name="assistant", tp_size=rank.size), {}),
        "DFlash": (str(world.dflash), {}),
        "random": (RandomDrafter(), {}),
        "max_time": (world.assistant, dict(max_time=600.0)),
        "criterion": (world.assistant, dict(stopping_criteria=[StopsElsewhere(rank.rank)])),
    }


def further_drafters(rank: Rank) -> dict[str, tuple]:
    """The kinds that are left."""
    from test_diffuspec import filler, system_of
    from test_eagle_and_pard import EAGLES
    from test_falcon import falcon
    from test_parallelspec import CHECKPOINTS

    world, folder = rank.world, rank.world.folder / f"of rank {rank.rank}"
    pard = llama(seed=1)
    pard.config.pard_token = 3
    dspark = dict(markov_rank=6, enable_confidence_head=True, confidence_head_with_markov=True)
    config = speculators_config(world.assistant, "dspark", block_size=4, **dspark)
    weights = random_weights(world.assistant, markov="vanilla", confidence=WIDTH + 6)
    return {
        "DSpark": (str(save(folder / "dspark", config, weights)), {}),
        "EAGLE-3": (str(save(folder / "eagle", *EAGLES["SafeAILab"])), {}),
        "Falcon": (str(save(folder / "falcon", *falcon(2))), {}),
        "ParallelSpec": (str(save(folder / "parallelspec", *CHECKPOINTS["its own"])), {}),
        "PARD": (pard, {}),
        "diffusion": (system_of(filler()), {}),
        "chains": (TrigramChains(), {}),
        "copies beside": (Reader(drafter=world.assistant), {}),
        "layer-parallel": (LayerParallel(world.assistant, 2), {}),
    }


def real_drafters(rank: Rank) -> dict[str, tuple]:
    """Those for SmolLM2."""
    return {
        **usual_drafters(rank.world),
        "layer-parallel": (LayerParallel(rank.world.assistant, 3), {}),
        "chains": (TrigramChains(), {}),
    }


def all_drafters(rank: Rank) -> dict[str, tuple]:
    if isinstance(rank.world, RealWorld):
        return real_drafters(rank)
    if isinstance(rank.world, MtpWorld):
        return {"MTP": (rank.world.layer, {})}
    return {**drafters(rank), **further_drafters(rank)}


def quick(rank: Rank) -> None:
    size, world = rank.size, rank.world
    shared, some = rank.load(tp_size=size), drafters(rank)
    some["trees"][1].update(FIXED)
    for name, (drafter, arguments) in some.items():
        rank.check(name, shared, drafter, arguments, calls=5 if name in ("SpecFormer", "assistant") else 2)
    for name in ("SpecFormer", "assistant, shared"):
        rank.check(f"{name}, fixed", shared, some[name][0], FIXED)
    single = rank.load("float32", tp_size=size)
    rank.check("SpecFormer, float32", single, world.specformer, {}, FIXED, dtype="float32", calls=4)
    fully = rank.load(fsdp_size=size)
    rank.check("FSDP2", fully, world.specformer, {})
    rank.check("FSDP2, fixed", fully, world.assistant, FIXED)
    rank.check("FSDP2, learning", fully, learning := learning_with(world), {}, calls=3)
    rank.found["learned, FSDP2"] = "same" if learning.statistics.steps == 3 else f"{learning.statistics}"
    rank.check("learning, a causal LM", shared, learning_with(world, drafter=world.assistant), {})

    for scaled, embeddings in (
        (False, Doubled(VOCAB, 8)),
        (True, Doubled(VOCAB, 8)),
        (False, torch.nn.Embedding(VOCAB, 8)),
    ):
        distributed.broadcast(table := embeddings.weight.detach().clone(), 0)
        with torch.no_grad():
            embeddings.weight.copy_(table)
        fully_shard(torch.nn.Sequential(fully_shard(embeddings)))
        ids = world.batch["input_ids"]
        right = torch.equal(embed_tokens(embeddings, ids, scaled), table[ids] * (1 + scaled))
        rank.found[f"{type(embeddings).__name__}, {scaled=}"] = "same" if right else "other embeddings"

    torch.manual_seed(rank.rank)
    rank.raised("other weights", shared, SpecFormerModel(world.specformer.config).double().eval())
    rank.raised("other prompts", shared, world.specformer, batch=ragged_batch(seed=rank.rank))
    rank.raised("other settings", shared, world.specformer, num_assistant_tokens=3 + rank.rank)
    rank.raised("cuda_graphs", shared, world.specformer, cuda_graphs=True)
    rank.raised("shared middle model", shared, Hierarchy(Reader(), shared))
    rank.raised("shared learner", shared, OnlineDistillation(shared))
    rank.raised("pipeline", rank.load(pp_size=size), world.specformer)
    partitioned = llama()
    partitioned.lm_head.weight = torch.nn.Parameter(torch.empty(0))  # as DeepSpeed leaves it
    partitioned.lm_head.weight.ds_id = 0
    rank.raised("ZeRO-3", partitioned, world.specformer)

    for drafter, alone in zip(world.layer_parallel, world.drafts, strict=True):  # divided, they draft what they draft
        layers = f"layer-parallel, {drafter.assistant.config.num_hidden_layers} layers"
        rank.check(layers, shared, drafter, FIXED)
        divided = drafts_of(shared, drafter, world.batch, **world.arguments)
        rank.found[f"drafts, {layers}"] = "same" if divided == alone else f"{divided} and not {alone}"
    exchange = DividedGroups._exchange

    def turned(self, *given):  # the layers of a group have one another's attention
        attended = exchange(self, *given)
        return dict(zip(attended, [*attended.values()][::-1], strict=True))

    with patch.object(DividedGroups, "_exchange", turned):
        rank.check("layers turned", shared, drafter, FIXED)
        turned_drafts = drafts_of(shared, drafter, world.batch, **world.arguments)
    rank.found["drafts, layers turned"] = "same" if turned_drafts == alone else "other drafts"

    learning = learning_with(world, learning_rate=1e-2 * (1 + rank.rank))  # what each learns is another thing
    rank.check("learning, apart", shared, learning, {}, calls=4)
    rank.found["learned"] = [learning.statistics.steps, fingerprint(weights_of(learning.network))]
    with patch.object(drafter_online, "follow_first", list):
        rank.text(shared, learning)
        rank.raised("nothing followed", shared, learning)

    if rank.rank:  # a rank that takes another token
        of_target = TokenChoice.of_target

        def wrong(self, *given):
            tokens, *others = of_target(self, *given)
            return (tokens + 1) % VOCAB, *others

        TokenChoice.of_target = wrong
    rank.check("other tokens", shared, world.assistant, {})
    if rank.rank:
        TokenChoice.of_target = of_target
    # Without what is told the ranks get apart. A message of another size ends a process of gloo at once.
    entry.among_ranks = lambda model: nullcontext()
    rank.found["nothing told"] = "it ended"
    rank.save()
    with suppress(RuntimeError):
        rank.check("nothing told", shared, world.assistant, {}, calls=20, turns=(False,))


def many_calls(rank: Rank, calls: int = 100, seconds: float = 1e9, skipped: tuple[str, ...] = ()) -> None:
    """So many of each kind, default and fixed draft lengths in turns, greedy and sampled, in each dtype and with each
    way to divide the target; and one rank that is slow at random moments, by a factor of about ten.

    Args:
        seconds: after which nothing more is begun.
        skipped: what is known already.
    """
    if rank.rank == rank.size - 1:
        verify = decoding.verify

        def slowly(*given):
            time.sleep(random.choice([0, 0, 0, 0.1]))
            return verify(*given)

        decoding.verify = slowly
    began = time.monotonic()
    kinds = all_drafters(rank)
    for (way, (sizes, few)), dtype in itertools.product(rank.world.ways().items(), DTYPES):
        wanted = {f"{way}, {dtype}: {kind}": kind for kind in few or kinds}
        wanted = {name: kind for name, kind in wanted.items() if name not in skipped}
        target = rank.load(dtype, **sizes) if wanted else None
        if "learning" in kinds:  # from one target
            kinds["learning"] = learning_with(rank.world), {}
        for name, kind in wanted.items():
            late = torch.tensor(time.monotonic() - began > seconds)
            distributed.broadcast(late, 0)
            if late:
                return
            drafter, arguments = kinds[kind]
            rank.check(name, target, drafter, arguments, {**arguments, **FIXED}, dtype=dtype, calls=calls)
            rank.save()
        target = None  # a large one is not kept beside the next


def lost(rank: Rank, how: signal.Signals, number: int = 5) -> None:
    """The last rank is killed, or stopped, in its round of that number."""
    shared = rank.load(tp_size=rank.size)

    def on_round(told) -> None:
        if told.number == number and rank.rank == rank.size - 1:
            rank.found["lost"] = f"in round {number}"
            rank.save()
            os.kill(os.getpid(), how)

    began = time.monotonic()
    rank.raised("raised", shared, rank.world.specformer, num_assistant_tokens=1, on_round=on_round)
    rank.found["seconds"] = time.monotonic() - began


SCENARIOS: dict[str, tuple[Callable[..., None], float]] = {
    "quick": (quick, 60),
    "many calls": (many_calls, 7200),
    "killed": (partial(lost, how=signal.SIGKILL), 60),
    "stopped": (partial(lost, how=signal.SIGSTOP), 10),
}
"""What each rank does, and the seconds that a rank waits for another one."""


def ranks_of_torchrun(make: Callable[[Path, int], World], folder: Path, timeout: timedelta) -> Rank:
    """This process, one of those that torchrun has started: each has its own copy of the same models."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (own := folder / f"models of rank {rank}").mkdir()
    world = make(own, size)  # among several processes, the first one alone would save its models
    distributed.init_process_group("gloo", timeout=timeout)
    return Rank(world, rank, folder)


def ranks_by_fork(make: Callable[[Path, int], World], size: int, folder: Path, timeout: timedelta) -> Rank:
    world = make(folder, size)
    number = next((number for number in range(1, size) if os.fork() == 0), 0)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size))
    store = distributed.FileStore(str(folder / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=timeout)
    return Rank(world, number, folder)


def run(scenario: str, size: int, folder: Path, target: str = "tiny", new_tokens: int = 16, **options) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    if scenario == "quick":
        prompt_groups.PASS_ON_CPU = 3  # the short prompts are read in several groups, as long ones are
    act, seconds = SCENARIOS[scenario]
    make, timeout = partial(WORLDS[target], new_tokens=new_tokens), timedelta(seconds=seconds)
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    rank = ranks_of_torchrun(make, folder, timeout) if is_torchrun else ranks_by_fork(make, size, folder, timeout)
    try:
        act(rank, **options)
    except BaseException as error:
        rank.found["failed"] = "".join(traceback.format_exception(error))
    rank.save()
    os._exit(0)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), **json.loads((sys.argv[4:] or ["{}"])[0]))
