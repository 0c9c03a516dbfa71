"""Recorded passes: the same texts, from tapes in the place of graphs (see `tape`). On a GPU: test_gpu.py."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from architectures import FAMILIES, make_target
from exactness import Recorder, check, oracle, plain
from tape import Tape, use_tapes
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, meaningful_target
from tiny import PRESETS, VOCAB, llama, ragged_batch

from specformer import SpecFormerModel, generate
from specformer.generation import backend_graphs as cuda_graphs
from specformer.generation import cache_ragged as ragged_cache
from specformer.generation.accept_tokens import BestDrafts
from specformer.generation.backend_graphs import RecordedPass
from specformer.generation.backend_recordable import Watch
from specformer.generation.cache_ragged import RaggedCache
from specformer.generation.drafter_specformer import SpecFormerDrafter
from specformer.generation.target import verify


@pytest.fixture
def tapes(monkeypatch) -> type[Tape]:
    return use_tapes(monkeypatch)


@pytest.fixture(autouse=True)
def no_warnings():
    """None that a pass could not be recorded, that is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without CUDA graphs.*")
        yield


def network_of(target, preset: str) -> SpecFormerModel:
    torch.manual_seed(4)
    network = SpecFormerModel(PRESETS[preset](target.config)).eval()
    network.init_from_target(target)
    return network


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral-sliding", "qwen3", "phi3-sliding", "cohere2"])
def test_passes_of_the_target(name: str, tapes):
    target, batch, eos = meaningful_target(name)
    for arguments in (dict(eos_token_id=eos), dict(eos_token_id=eos, **SAMPLING), dict(eos_token_id=None)):
        arguments = dict(arguments, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for k in (1, 4):
            for kind in ("sometimes", "adversarial"):
                check(target, batch, reference, oracle(reference, batch, kind, eos), k, **arguments, cuda_graphs=True)
    assert tapes.replayed > 2 * tapes.recorded > 0


CASES = [(preset, setting) for preset in PRESETS for setting in ("greedy", "sampling")]
CASES += [("all of it", setting) for setting in SETTINGS if setting not in ("greedy", "sampling")]


@pytest.mark.one_version
@pytest.mark.parametrize("k", ["auto", 4])
@pytest.mark.parametrize(("preset", "setting"), CASES)
def test_drafters(preset: str, setting: str, k: int | str, tapes):
    target, batch, eos = meaningful_target("llama")
    network = network_of(target, preset)
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    alone_or_not = {4: 0, "auto": None}
    for copies in (0, None) if preset == "all of it" else (alone_or_not[k],):
        more = dict(arguments, prompt_lookup_num_tokens=copies)
        check(target, batch, reference, network, k, **more, cuda_graphs=True)
    assert tapes.replayed > tapes.recorded > 0


@pytest.mark.one_version
@pytest.mark.parametrize("preset", PRESETS)
def test_drafts_and_acceptance_are_those_without_graphs(preset: str, tapes):
    """Equal texts do not show it: a drafter may draft anything."""
    target, batch = llama(), ragged_batch()
    network = network_of(target, preset)
    for sampling in ({}, SAMPLING):
        arguments = dict(batch, **sampling, max_new_tokens=40, eos_token_id=None, prompt_lookup_num_tokens=0)
        counts = []
        for recorded in (False, True):
            torch.manual_seed(0)
            arguments |= dict(cuda_graphs=recorded, num_assistant_tokens=4, return_dict_in_generate=True)
            counts.append(generate(target, network, **arguments).statistics)
        assert counts[0].accepted_per_slot == counts[1].accepted_per_slot
        assert sum(counts[0].accepted_per_slot) > 10


def test_a_row_that_repeats_itself_is_drafted_for(tapes):
    """Rounds without a draft, whose states are read later."""
    target, batch = llama(), ragged_batch()
    network, lengths = network_of(target, "context"), iter([4, 0, 0, 3, 0, 4, 1, 0, 0, 0, 4, 2, 4] * 9)
    reference = plain(target, batch, max_new_tokens=60, eos_token_id=None)
    with pytest.MonkeyPatch.context() as patch:
        from specformer.generation.draft_length import DraftLength

        patch.setattr(DraftLength, "next", lambda self, num_rows: next(lengths))
        settings = dict(max_new_tokens=60, eos_token_id=None, prompt_lookup_num_tokens=0)
        statistics = check(target, batch, reference, network, 4, **settings, cuda_graphs=True)
    assert {0, 1, 2, 3, 4} <= set(statistics.rounds_per_length)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_rules(rule: str, tapes):
    target, batch = llama(), ragged_batch()
    network, texts = network_of(target, "all of it"), []
    for recorded in (False, True):
        torch.manual_seed(0)
        arguments = dict(batch, **SAMPLING, max_new_tokens=NEW_TOKENS, acceptance=rule, num_assistant_tokens=3)
        texts.append(generate(target, network, **arguments, cuda_graphs=recorded).tolist())
    assert texts[0] == texts[1]
    assert tapes.replayed > tapes.recorded > 0


@pytest.mark.parametrize("assistant", ["llama", "gpt2"])
def test_an_assistant(assistant: str, tapes):
    target, batch, eos = meaningful_target("llama")
    assistant = make_target(assistant, seed=11)
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        check(target, batch, reference, assistant, 3, **arguments, cuda_graphs=True)
    assert tapes.replayed > 2 * tapes.recorded > 0


def test_long_texts_and_buffers_that_grow(tapes, monkeypatch):
    monkeypatch.setattr("specformer.generation.target.FIRST_CAPACITY", 8)
    monkeypatch.setattr("specformer.generation.drafter_specformer.FIRST_CAPACITY", 8)
    monkeypatch.setattr(ragged_cache, "KV_LENGTH_STEP_RECORDED", 16)
    target, batch = llama(), ragged_batch()
    network = network_of(target, "context")
    reference = plain(target, batch, max_new_tokens=100, eos_token_id=None)
    arguments = dict(max_new_tokens=100, eos_token_id=None, cuda_graphs=True)
    check(target, batch, reference, network, 4, **arguments)
    assert tapes.replayed > tapes.recorded > 20 > tapes.most_at_once  # those of old buffers are gone


def test_prompts_alone_and_one_token(tapes):
    target, batch = llama(), ragged_batch()
    for new in (1, 2):
        reference = plain(target, batch, max_new_tokens=new)
        check(target, batch, reference, network_of(target, "anchor"), 4, max_new_tokens=new, cuda_graphs=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_inference_mode(name: str, tapes):
    """In which torch shows operations that consist of others as a whole, such as a dropout that drops nothing."""
    target, batch = make_target(name), ragged_batch()
    network = network_of(target, "all of it")
    expected = target.generate(**batch, max_new_tokens=NEW_TOKENS)
    with torch.inference_mode():
        for _ in range(2):
            ours = generate(target, network, **batch, max_new_tokens=NEW_TOKENS, cuda_graphs=True)
            assert ours.tolist() == expected.tolist()


def test_an_exception_in_the_middle_of_a_call(tapes):
    """Its graphs go, their memory is there for the next call, and this thread records no more."""
    target, batch = llama(), ragged_batch()
    network, streamer = network_of(target, "anchor"), Recorder()
    expected = target.generate(**batch, max_new_tokens=NEW_TOKENS)

    def fail_later(value) -> None:
        streamer.calls.append(value)
        if len(streamer.calls) == 12:
            raise RuntimeError("the caller's")

    streamer.put = fail_later
    settings = dict(batch, max_new_tokens=NEW_TOKENS, num_assistant_tokens=4)
    with pytest.raises(RuntimeError, match="the caller's"):
        generate(target, network, **settings, streamer=streamer, cuda_graphs=True)
    assert tapes.recorded > len(tapes.tapes) == 1
    before = tapes.replayed
    assert generate(target, network, **settings).tolist() == expected.tolist()
    assert tapes.replayed == before
    assert generate(target, network, **settings, cuda_graphs=True).tolist() == expected.tolist()
    assert tapes.replayed > before and len(tapes.tapes) == 1


def test_memory_is_given_back(tapes):
    target, batch = llama(), ragged_batch()
    generate(target, network_of(target, "anchor"), **batch, max_new_tokens=NEW_TOKENS, cuda_graphs=True)
    assert len(tapes.tapes) == 1
    cuda_graphs.free_memory()
    assert not tapes.tapes


# ---- on a device whose values nobody knows: what the host would have to wait for fails


def lengths_on_meta() -> RaggedCache:
    return RaggedCache(4, torch.tensor([9, 6, 4], device="meta"), longest=9, capacity=64, max_length=128)


EXPERTS = {"qwen3-moe", "mixtral", "deepseek-v3", "gpt-oss"}
"""Their eager experts, which float64 needs, look at which of them were chosen."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in EXPERTS])
def test_passes_of_a_target_need_no_values(name: str):
    target, cache = make_target(name).to("meta"), lengths_on_meta()
    tokens = torch.zeros(3, 5, dtype=torch.long, device="meta")
    with torch.no_grad(), Watch() as watch:
        logits, _ = verify(target, cache, tokens)
    assert logits.shape == (3, 5, VOCAB)
    assert watch.obstacle is None


@pytest.mark.parametrize("preset", PRESETS)
def test_passes_of_a_drafter_need_no_values(preset: str, monkeypatch):
    target = llama()
    network, device = network_of(target, preset).to(target.dtype), torch.device("meta")
    monkeypatch.setattr("specformer.target_specformer.check_embeddings", lambda *_: None)
    monkeypatch.setattr("specformer.target_specformer.device_of", lambda module: device)
    drafter = SpecFormerDrafter(network.to("meta"), target.to("meta"))
    tokens, counts = (torch.ones(*shape, dtype=torch.long, device="meta") for shape in ((3, 4), (3,)))
    states = torch.zeros(3, 4, len(network.config.target_layer_ids), 32, dtype=target.dtype, device="meta")
    drafter.begin_behind(lengths_on_meta(), states[:, 0, 0], tokens[:, :1])
    with Watch() as watch:
        for _ in range(2):
            drafter.unread.rounds = [(states, tokens, counts)]
            drafts = drafter.propose(4, BestDrafts(VOCAB)).tokens
    assert drafts.shape == (3, 4)
    assert watch.obstacle is None


# ---- what cannot be recorded


def test_a_compiled_target_is_refused(tapes):
    target = llama()
    target.model.layers[0].compile()
    with pytest.raises(ValueError, match="together with a model that torch"):
        generate(target, None, **ragged_batch(), prompt_lookup_num_tokens=2, cuda_graphs=True)


def test_a_target_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="on cpu; expected all of it on one CUDA GPU"):
        generate(llama(), None, **ragged_batch(), prompt_lookup_num_tokens=2, cuda_graphs=True)


OBSTACLES = {
    "waits for a value": lambda states: states * float(states.sum() < torch.inf),
    "has a shape that depends on values": lambda states: states[: len((states[:, 0, 0] < torch.inf).nonzero())],
    "has a mask as an index": lambda states: states[states[:, 0, 0] < torch.inf],
    "draws random numbers": lambda states: states + 0 * torch.rand_like(states),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_cannot_be_recorded_runs_as_it_is_written(obstacle: str, tapes):
    target, batch = llama(), ragged_batch()
    target.model.layers[1].mlp.register_forward_hook(lambda module, args, output: OBSTACLES[obstacle](output))
    expected = target.generate(**batch, max_new_tokens=NEW_TOKENS)
    with pytest.warns(UserWarning, match="verify. goes on without CUDA graphs: aten::.*cannot be recorded"):
        ours = generate(target, network_of(target, "anchor"), **batch, max_new_tokens=NEW_TOKENS, cuda_graphs=True)
    assert ours.tolist() == expected.tolist()
    assert tapes.failed == 0  # it was not even tried


def test_a_recording_that_fails(tapes, monkeypatch):
    """Where an obstacle was not seen. Torch may not be well on that GPU any more: nothing is recorded there again."""
    monkeypatch.setattr(Watch, "OBSTACLES", {})
    target, batch = llama(), ragged_batch()
    target.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: OBSTACLES["waits for a value"](output)
    )
    expected = target.generate(**batch, max_new_tokens=NEW_TOKENS)
    with pytest.warns(UserWarning, match="verify. goes on without CUDA graphs: RuntimeError: not permitted"):
        settings = dict(max_new_tokens=NEW_TOKENS, num_assistant_tokens=4, cuda_graphs=True)
        ours = generate(target, network_of(target, "anchor"), **batch, **settings)
    assert ours.tolist() == expected.tolist()
    assert tapes.failed == 1
    recorded = tapes.recorded
    again = generate(target, network_of(target, "anchor"), **batch, **settings)  # and no warning
    assert again.tolist() == expected.tolist()
    assert (tapes.failed, tapes.recorded) == (1, recorded)


def test_a_gpu_that_records_nothing(tapes, monkeypatch):
    """Not even what memory is kept with."""

    def fail(self) -> None:
        self.__exit__(None, None, None)
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(Tape, "capture_end", fail)
    target, batch = llama(), ragged_batch()
    expected = target.generate(**batch, max_new_tokens=NEW_TOKENS)
    with pytest.warns(UserWarning, match="goes on without CUDA graphs: RuntimeError: no graphs here"):
        ours = generate(target, network_of(target, "anchor"), **batch, max_new_tokens=NEW_TOKENS, cuda_graphs=True)
    assert ours.tolist() == expected.tolist()


def test_no_more_are_recorded_than_there_is_room_for(tapes, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_RECORDED", 2)
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, max_new_tokens=NEW_TOKENS)
    check(target, batch, reference, network_of(target, "anchor"), 4, max_new_tokens=NEW_TOKENS, cuda_graphs=True)
    assert tapes.most_at_once == 2 + 1  # which keeps the memory


def test_nothing_is_left_after_a_call(tapes):
    target, batch = llama(), ragged_batch()
    generate(target, network_of(target, "anchor"), **batch, max_new_tokens=NEW_TOKENS, cuda_graphs=True)
    assert len(tapes.tapes) == 1 < tapes.recorded  # with which the next call goes on recording in the same memory
    before = tapes.recorded, tapes.replayed
    generate(target, network_of(target, "anchor"), **batch, max_new_tokens=NEW_TOKENS)
    assert (tapes.recorded, tapes.replayed) == before
    generate(target, network_of(target, "anchor"), **batch, max_new_tokens=NEW_TOKENS, cuda_graphs=True)
    assert len(tapes.tapes) == 1 and tapes.recorded == 2 * before[0] - 1


# ---- faults that the tests must find


def replays_nothing(patch) -> None:
    patch.setattr(Tape, "replay", lambda self: None)


def lengths_stay(patch) -> None:
    replay = RecordedPass.replay

    def fault(self, inputs):
        before, self.cache.lengths = self.cache.lengths, self.lengths
        try:
            return replay(self, inputs)
        finally:
            self.cache.lengths = before

    patch.setattr(RecordedPass, "replay", fault)


def tokens_stay(patch) -> None:
    replay = RecordedPass.replay
    patch.setattr(RecordedPass, "replay", lambda self, inputs: replay(self, tuple(self.inputs)))


@pytest.mark.one_version
@pytest.mark.parametrize(
    "fault",
    [replays_nothing, lengths_stay, tokens_stay],
    ids=lambda fault: fault.__name__,
)
def test_texts_of_wrong_graphs_differ(fault, tapes, monkeypatch):
    monkeypatch.setattr("specformer.generation.target.FIRST_CAPACITY", 8)
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, max_new_tokens=40, eos_token_id=None)
    drafter = oracle(reference, batch, "sometimes", None)
    settings = dict(max_new_tokens=40, eos_token_id=None, cuda_graphs=True)
    check(target, batch, reference, drafter, 4, **settings)
    fault(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "agree", lambda ours, theirs: True)
    with pytest.raises((AssertionError, RuntimeError)):
        check(target, batch, reference, oracle(reference, batch, "sometimes", None), 4, **settings)


def replays_with_wrong_weights(patch) -> None:
    replay = Tape.replay

    def fault(self):
        changed = [args[0] for func, args, *_ in self.operations if func.name() == "aten::t"]
        for weight in changed:
            weight.mul_(2)
        replay(self)
        for weight in changed:
            weight.div_(2)

    patch.setattr(Tape, "replay", fault)


@pytest.mark.one_version
@pytest.mark.parametrize("fault", [replays_nothing, replays_with_wrong_weights], ids=lambda fault: fault.__name__)
def test_a_wrong_graph_is_noticed_where_it_is_recorded(fault, tapes, monkeypatch):
    """And what it has written to the cache is written again."""
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, max_new_tokens=NEW_TOKENS)
    fault(monkeypatch)
    with pytest.warns(UserWarning, match="computed something else when it was replayed"):
        check(target, batch, reference, network_of(target, "anchor"), 4, max_new_tokens=NEW_TOKENS, cuda_graphs=True)


def test_buffers_go_without_garbage_collection():
    gc.disable()
    try:
        cache = RaggedCache(2, torch.tensor([3]), 3, 8, 20)
        cache.prepare(1)
        cache.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), 0)
        buffer = weakref.ref(cache.layers[0].keys)
        del cache
        assert buffer() is None
    finally:
        gc.enable()


def test_states_of_a_replay_are_its_results(tapes, monkeypatch):
    """Stale ones would give other drafts."""
    target, batch = llama(), ragged_batch()
    network = network_of(target, "anchor")
    reference = plain(target, batch, max_new_tokens=NEW_TOKENS)
    counts = []
    for recorded in (False, True):
        arguments = dict(max_new_tokens=NEW_TOKENS, cuda_graphs=recorded, prompt_lookup_num_tokens=0)
        counts.append(check(target, batch, reference, network, 4, **arguments).accepted_per_slot)
    assert counts[0] == counts[1]
