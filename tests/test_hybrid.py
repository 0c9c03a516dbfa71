"""Targets that keep recurrent or convolutional states: the same text as plain generate()'s, whatever is drafted."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import census
import pytest
import torch
import transformers
from exactness import check, oracle, plain
from hybrids import INSTALLED, NEW_TOKENS, hybrid
from shrunken import make_target, tiny_config
from tape import use_tapes
from test_exactness import SAMPLING, SETTINGS
from test_stopping import TOKENIZER
from tiny import EOS, PAD, VOCAB, ragged_batch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation import backend_shared_products, decoding, draft_length_auto, target_mixers, target_probe
from specformer.generation import generate as entry
from specformer.generation.cache_ragged import RaggedCache
from specformer.generation.cache_states import StateLayer
from specformer.generation.target import prefill, prompt_arguments, prompt_layout, verify
from specformer.generation.target_mixers import Mixers, WatchedCache, keeps_states, mixers_by_token, takes_any_cache
from specformer.generation.target_probe import probe_target
from specformer.generation.target_refusals import UnsupportedTargetError

IN_EVERY_RUN = ["Lfm2ForCausalLM", "Qwen3NextForCausalLM", "FalconH1ForCausalLM", "MambaForCausalLM"]
IN_LONG_RUNS = [pytest.param(name, marks=pytest.mark.slow) for name in INSTALLED if name not in IN_EVERY_RUN]
EVERY_FAMILY = [name for name in [*IN_EVERY_RUN, *IN_LONG_RUNS] if not isinstance(name, str) or name in INSTALLED]
KINDS = ("never", "always", "sometimes", "adversarial")


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_every_family(name: str):
    target, batch, eos = hybrid(name)
    for arguments in (dict(eos_token_id=eos), dict(eos_token_id=None, **SAMPLING)):
        arguments = dict(arguments, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for kind, k in (("sometimes", 1), ("sometimes", 4), ("adversarial", 3), ("never", 2), ("always", 8)):
            check(target, batch, reference, oracle(reference, batch, kind, eos), k, **arguments)


WITH_STRINGS, IN_FLOAT32 = ", stop strings", ", float32"
CROSS = [*SETTINGS, *(f"{way}{how}" for how in (WITH_STRINGS, IN_FLOAT32) for way in ("greedy", "sampling"))]


@pytest.mark.slow
@pytest.mark.parametrize("setting", CROSS)
@pytest.mark.parametrize("name", INSTALLED)
def test_full_cross(name: str, setting: str):
    """Every kind of drafter and number of drafts, of every family: settings with an EOS token in float64, and greedy
    decoding and sampling with stop strings, and in float32."""
    target, batch, eos = hybrid(name)
    way, *_ = setting.split(", ")
    arguments = dict(SETTINGS[way], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    with in_float32(target) if setting.endswith(IN_FLOAT32) else nullcontext():
        if setting.endswith(WITH_STRINGS):
            arguments |= with_stop_strings(target, batch, **SETTINGS[way])
        reference = plain(target, batch, **arguments)
        for kind in KINDS:
            for k in range(1, 9):
                statistics = check(target, batch, reference, oracle(reference, batch, kind, eos), k, **arguments)
                if kind == "never":
                    assert sum(statistics.accepted_per_slot) == 0
                if kind == "always":
                    assert statistics.tokens_per_pass > 1


def with_stop_strings(target, batch: dict, **sampling) -> dict:
    """Two strings that end rows of the text at different places, while others go on. An EOS token has stopped rows
    padded; no row writes this one."""
    arguments = dict(sampling, max_new_tokens=NEW_TOKENS)
    text = plain(target, batch, **arguments, eos_token_id=None).sequences
    unused = next(token for token in range(EOS + 1, VOCAB) if token not in text)
    for early, late in ((14, 20), (16, 22), (12, 25), (18, 28)):
        strings = [TOKENIZER.decode(text[row, place : place + 2]) for row, place in ((1, early), (3, late))]
        stopping = dict(stop_strings=strings, tokenizer=TOKENIZER, eos_token_id=unused)
        stopped = plain(target, batch, **arguments, **stopping).sequences
        ends = {row[9:].index(PAD) for row in stopped.tolist() if PAD in row[9:]}
        if len(ends) > 1 and len(stopped[0]) == 9 + NEW_TOKENS:
            return stopping
    raise AssertionError(f"no two strings end rows at different places: {text.tolist()}")


@contextmanager
def in_float32(target):
    target.float()
    try:
        yield
    finally:
        target.double()


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_float32_prompts_in_chunks_and_stop_strings(name: str):
    target, batch, _ = hybrid(name)
    ways: list[dict] = [with_stop_strings(target, batch)]
    # plain generate() has no chunks where all layers keep states, and where a model makes a cache of its own class
    if read_prompts(target, batch).ragged_layers and takes_any_cache(target):
        ways.append(dict(prefill_chunk_size=4))
    for arguments in ways:
        arguments = dict(arguments, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        check(target, batch, reference, oracle(reference, batch, "sometimes", None), 4, **arguments)
    with in_float32(target):
        arguments = dict(SAMPLING, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        check(target, batch, reference, oracle(reference, batch, "sometimes", None), 4, **arguments)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_the_network_as_drafter(name: str):
    """It reads the target's hidden states, which hooks take while the mixers run token by token."""
    target, batch, eos = hybrid(name)
    heads = {} if hasattr(target.config, "num_attention_heads") else dict(num_attention_heads=4)
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, **heads))
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for k in (None, 4):
            check(target, batch, reference, drafter, k, **arguments)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_assistant_that_keeps_states(name: str):
    """It is right wherever it can be: its states are those after what the target took."""
    target, batch, _ = hybrid(name)
    arguments = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)
    reference = plain(target, batch, **arguments)
    statistics = check(target, batch, reference, target, 3, **arguments)
    assert statistics.accepted_per_slot == statistics.drafted_per_slot


# ---- what a pass does


def read_prompts(target, batch, most: int = 5) -> RaggedCache:
    layout = prompt_layout(target, batch["attention_mask"], batch["input_ids"])
    return prefill(target, batch["input_ids"], layout, 64, most, prompt_arguments(target, layout))[1]


class CountedWeights(TorchFunctionMode):
    """How often each weight is multiplied with something."""

    def __init__(self):
        super().__init__()
        self.counts: dict[int, int] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.linear:
            self.counts[id(args[1])] = self.counts.get(id(args[1]), 0) + 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", ["Lfm2ForCausalLM", "Qwen3NextForCausalLM", "FalconH1ForCausalLM", "BambaForCausalLM"])
def test_weights_of_a_mixer_are_read_once(name: str):
    target, batch, _ = hybrid(name)
    cache = read_prompts(target, batch)
    tokens = batch["input_ids"][:, :4]
    verify(target, cache, tokens)  # shows which layer is the last
    with CountedWeights() as counted:
        verify(target, cache, tokens)
    linears = [
        module for mixer in cache.mixers.states_of for module in mixer.modules() if isinstance(module, torch.nn.Linear)
    ]
    assert len(linears) >= 2 * len(cache.mixers.states_of)
    assert {counted.counts[id(linear.weight)] for linear in linears} == {1}


def test_mixers_are_as_they_were_afterwards_and_in_other_threads():
    """Plain calls of another thread go on with the same modules meanwhile."""
    target, batch, eos = hybrid("Lfm2ForCausalLM")
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    found, done = [], threading.Event()

    def others() -> None:
        while not done.is_set():
            found.append(target.generate(**batch, **arguments))

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(3):
            sequences = generate(
                target, oracle(reference, batch, "sometimes", eos), **batch, **arguments, num_assistant_tokens=4
            )
            assert sequences.tolist() == reference.sequences.tolist()
    finally:
        done.set()
        thread.join()
    assert found and all(sequences.tolist() == reference.sequences.tolist() for sequences in found)
    assert not any("forward" in vars(module) for module in target.modules())


@pytest.mark.parametrize("name", ["Lfm2ForCausalLM", "BambaForCausalLM"])
def test_recorded_passes(name: str, monkeypatch):
    tapes = use_tapes(monkeypatch)
    target, batch, eos = hybrid(name)
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    check(target, batch, reference, oracle(reference, batch, "sometimes", eos), 4, **arguments, cuda_graphs=True)
    assert tapes.replayed > tapes.recorded > 0


@pytest.mark.parametrize(("of_a_state", "drafts"), [(0.0, True), (1.0, False)])
def test_auto_knows_what_rounds_cost_with_states(of_a_state: float, drafts: bool, monkeypatch):
    """A clock on which a pass takes a second, and each state of a token so many more."""
    target, batch, _ = hybrid("Qwen3NextForCausalLM")
    arguments = dict(max_new_tokens=60, eos_token_id=None)
    reference = plain(target, batch, **arguments)
    drafter, now, lengths = oracle(reference, batch, "sometimes", None), [0.0], []
    drafter.default_num_assistant_tokens = 2
    remember, verify, decode = StateLayer.remember, decoding.verify, entry.decode

    def slowly_remember(self, names, tokens):
        now[0] += of_a_state
        remember(self, names, tokens)

    def slowly_verify(*arguments):
        now[0] += 1
        return verify(*arguments)

    probe_target(target)
    monkeypatch.setattr(StateLayer, "remember", slowly_remember)
    monkeypatch.setattr(decoding, "verify", slowly_verify)
    for module in (decoding, draft_length_auto):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    monkeypatch.setattr(entry, "decode", lambda *args: lengths.append(args[6]) or decode(*args))
    statistics = check(target, batch, reference, drafter, "auto", **arguments)
    states = len(read_prompts(target, batch).mixers.states_of)
    times = lengths[0].experience.passes.known()
    assert states > 1 and len(times) > 2
    for (_, k), seconds in times.items():
        assert seconds == pytest.approx(1 + of_a_state * states * (k + 1))
    assert (statistics.rounds_per_length.get(0, 0) < 0.4 * statistics.rounds) is drafts, statistics.rounds_per_length
    assert (statistics.tokens_per_pass > 2) is drafts


class Pair(torch.nn.Module):
    """Two linear layers, the second of which is not all of the output for later tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.seen = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        states = self.last(self.first(states).sin())
        return states if self.seen < 4 else states.clone()


def test_module_that_does_not_treat_its_tokens_alike_is_no_silent_error():
    pair, states = Pair(), torch.randn(2, 2, 3)
    for number in range(2):
        shared = backend_shared_products.SharedProducts(2, pair.last.weight if number else None)
        outputs = []
        for token in range(2):
            part = shared.part(states, token)
            with shared:
                outputs.append(pair(part))
        if number:
            with pytest.raises(RuntimeError, match="alike"):
                shared.joined(outputs)
        else:
            assert shared.weight_behind(outputs[0]) is pair.last.weight
            torch.testing.assert_close(shared.joined(outputs), pair.last(pair.first(states).sin()))


# ---- rings of states


def test_rows_that_leave_come_and_get_more_room_keep_their_states():
    """Each state is the number of tokens behind it, and ten times its row."""
    lengths = torch.tensor([7, 5, 3])
    like = layers_of("Lfm2ForCausalLM")
    cache, other = (
        RaggedCache(len(like), of, int(of.max()), 8, 64, like=like, states=states)
        for of, states in ((lengths, 3), (torch.tensor([9]), 4))
    )
    for one, rows in ((cache, [0, 1, 2]), (other, [8])):
        prompt = layers_of("Lfm2ForCausalLM")[0]
        prompt.update_conv_state(torch.tensor(rows)[:, None, None] * 10 + one.lengths[:, None, None].double())
        one.state_layers[0].load_states(torch.arange(len(rows)), prompt)
    layer, names = cache.state_layers[0], [("conv_states", 0)]

    def state() -> list[float]:
        layer.recall(names)
        return layer.conv_states[0].flatten().tolist()

    def read(tokens: int) -> None:
        layer.recall(names)
        for token in range(tokens):
            layer.conv_states[0] += 1
            layer.remember(names, token + 1)

    read(2)
    cache.advance(torch.tensor([2, 1, 0]), 9)
    assert state() == [9, 16, 23]
    cache.keep_states(6)
    assert state() == [9, 16, 23]
    cache.advance(torch.tensor([-1, -1, 0]), 8)
    assert state() == [8, 15, 23]
    read(5)
    cache.advance(torch.tensor([5, 3, 1]), 13)
    cache.select_rows(torch.tensor([0, 2]), 13)
    assert state() == [13, 24]
    cache.replace_rows(torch.tensor([0]), other, 9)
    assert state() == [89, 24]


def layers_of(name: str):
    return WatchedCache(config=hybrid(name)[0].config).layers


# ---- planted faults: each must fail the check


def one_token_too_many(monkeypatch) -> None:
    recall = StateLayer.recall

    def fault(self, names):
        for name in names:
            self.rings[name] = self.rings[name].roll(-1, dims=1)
        recall(self, names)
        for name in names:
            self.rings[name] = self.rings[name].roll(1, dims=1)

    monkeypatch.setattr(StateLayer, "recall", fault)


def one_token_too_few(monkeypatch) -> None:
    remember = StateLayer.remember
    monkeypatch.setattr(
        StateLayer, "remember", lambda self, names, tokens: remember(self, names, tokens + (tokens > 1))
    )


def of_another_row(monkeypatch) -> None:
    recall = StateLayer.recall

    def fault(self, names):
        recall(self, names)
        for kind, number in names:
            getattr(self, kind)[number] = getattr(self, kind)[number].roll(1, dims=0)

    monkeypatch.setattr(StateLayer, "recall", fault)


def stale_convolutions(monkeypatch) -> None:
    """Of a round, those after its last token stay, whatever was taken."""
    recall = StateLayer.recall

    def fault(self, names):
        before = {name: getattr(self, name[0])[name[1]] for name in names if name[0] == "conv_states"}
        recall(self, names)
        for (kind, number), state in before.items():
            if state is not None and state.shape == getattr(self, kind)[number].shape:
                getattr(self, kind)[number] = state

    monkeypatch.setattr(StateLayer, "recall", fault)


def stale_recurrence(monkeypatch) -> None:
    remember = StateLayer.remember
    monkeypatch.setattr(
        StateLayer,
        "remember",
        lambda self, names, tokens: remember(self, [name for name in names if name[0] == "conv_states"], tokens),
    )


def rows_that_leave_take_others_along(monkeypatch) -> None:
    select = StateLayer.select_states
    monkeypatch.setattr(StateLayer, "select_states", lambda self, index: select(self, index - 1))  # -1: the last one


def all_tokens_at_once(monkeypatch) -> None:
    """Mixers that give but the state after the whole pass."""

    def fault(self, cache, mixer, forward, args, kwargs):
        number, names = self.states_of[mixer]
        layer = cache.state_layers[number]
        layer.recall(names)
        output = forward(*args, **kwargs)
        for token in range(cache.width):
            layer.remember(names, token + 1)
        return output

    monkeypatch.setattr(Mixers, "__call__", fault)


NEEDED = {stale_convolutions: "conv_states", stale_recurrence: "recurrent_states"}
FAULTS = (
    one_token_too_many,
    one_token_too_few,
    of_another_row,
    stale_convolutions,
    stale_recurrence,
    rows_that_leave_take_others_along,
    all_tokens_at_once,
)


PLANTED_IN_EVERY_RUN = ["Lfm2ForCausalLM", "MambaForCausalLM"]
PLANTED = [name if name in PLANTED_IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in INSTALLED]


@pytest.mark.one_version
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault(name: str, plant, monkeypatch):
    target, batch, eos = hybrid(name)
    kinds = {kind for layer in read_prompts(target, batch).state_layers.values() for kind, _ in layer.rings}
    if NEEDED.get(plant, next(iter(kinds))) not in kinds:
        pytest.skip(f"it has no {NEEDED[plant]}")
    arguments = dict(eos_token_id=eos if plant is rows_that_leave_take_others_along else None)
    arguments["max_new_tokens"] = NEW_TOKENS
    reference = plain(target, batch, **arguments)
    probe_target(target)  # without the fault, which it would refuse

    def run() -> None:
        for kind in ("adversarial", "sometimes"):
            check(target, batch, reference, oracle(reference, batch, kind, eos), 4, **arguments)

    run()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run()


@pytest.mark.parametrize("plant", [one_token_too_many, one_token_too_few, of_another_row, all_tokens_at_once])
def test_the_trial_refuses_what_would_be_decoded_wrongly(plant, monkeypatch):
    target, _, _ = hybrid("Qwen3NextForCausalLM")
    monkeypatch.setattr(target_probe, "_probed", {})
    plant(monkeypatch)
    with pytest.raises(UnsupportedTargetError, match="did not agree with plain decoding"):
        probe_target(target)


def test_states_outside_of_the_cache_are_refused():
    target = make_target("RecurrentGemmaForCausalLM", torch.float64, 0, 0.15)
    sentence = "keeps its states elsewhere than in its cache|did not fill its cache"  # the latter before 5.24
    with pytest.raises(UnsupportedTargetError, match=sentence):
        probe_target(target)


def test_a_window_in_layers_that_are_called_full_is_refused():
    """As MiniMax's code has it, unlike that of others."""
    config = tiny_config("MiniMaxForCausalLM")
    config.sliding_window = 5
    with pytest.raises(UnsupportedTargetError, match="a sliding window in layers that its config calls full attention"):
        generate(transformers.MiniMaxForCausalLM(config), **ragged_batch(), prompt_lookup_num_tokens=2)


@pytest.mark.slow
def test_every_family_that_keeps_states_is_here():
    """Those of the census that are not refused."""
    classes = json.loads(census.RESULT.read_text(encoding="utf-8"))["classes"]
    exact = [name for name, entry in classes.items() if entry["copies"]["kind"] == census.EXACT]
    keeping = {name for name in exact if keeps_states(SimpleNamespace(config=tiny_config(name)))}
    assert keeping == set(INSTALLED)


def test_mixers_of_nested_passes_leave_in_order():
    """As in passes of two threads: the first that leaves does not take the other's along."""
    target, batch, _ = hybrid("Lfm2ForCausalLM")
    cache = read_prompts(target, batch)
    mixer = next(iter(cache.mixers.states_of))
    first, second = mixers_by_token(cache), mixers_by_token(cache)
    first.__enter__()
    ours = vars(mixer)["forward"]
    second.__enter__()
    first.__exit__(None, None, None)
    assert vars(mixer)["forward"] is ours
    second.__exit__(None, None, None)
    assert "forward" not in vars(mixer)
    assert not target_mixers._registration.inside
