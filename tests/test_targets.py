"""Targets as people load them: half precision, offloaded, quantised, with adapters, compiled, with remote code.

Each gives plain generate()'s tokens, or is refused before the first one. What needs an optional package is skipped
where that is missing.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import make_target
from exactness import assert_meaningful, check, choose_eos, oracle, plain
from test_bad_input import NEW_TOKENS as REFUSED_TOKENS
from test_bad_input import contains, drafter_for, hooks_of, refusal
from tiny import llama, ragged_batch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    TorchAoConfig,
)

from specformer import SpecFormerModel, generate
from specformer.generation import backend_versions
from specformer.generation import generate as entry
from specformer.generation.backend_compiled import uncompiled
from specformer.generation.backend_versions import cache_argument, cache_of
from specformer.generation.drafter_specformer import SpecFormerDrafter
from specformer.generation.target_refusals import UnsupportedTargetError
from specformer.generation.target_states import HiddenStates, StateReader, captures

NEW_TOKENS = 16
SAMPLING = dict(do_sample=True, temperature=1.3, top_k=20)
WIDE = dict(hidden_size=64, intermediate_size=128)  # quantisation wants whole blocks


def settings(target, batch: dict) -> list[dict]:
    """Greedy and sampling arguments, with an end of sequence at which rows leave the batch one after the other."""
    greedy = target.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    eos = choose_eos(greedy, batch["input_ids"].shape[1])
    return [dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS) for sampling in ({}, SAMPLING)]


def check_exact(target, model: PreTrainedModel | None = None, reference_of=None) -> None:
    """The tokens of `target` with drafters that know the answer and with a SpecFormer network.

    Args:
        model: the transformers model inside `target`, where that is another one.
        reference_of: whose plain text is demanded; default `target`'s own.
    """
    batch, network, reference_of = ragged_batch(), drafter_for(model or target), reference_of or target
    for arguments in settings(reference_of, batch):
        reference = plain(reference_of, batch, **arguments)
        for kind in ("sometimes", "adversarial"):
            drafter = oracle(reference, batch, kind, arguments["eos_token_id"])
            statistics = check(target, batch, reference, drafter, 4, **arguments)
            assert sum(statistics.accepted_per_slot) > 0
        check(target, batch, reference, network, 4, **arguments)


@torch.no_grad()
def borrowed(target: PreTrainedModel, drafter: SpecFormerModel) -> list[torch.Tensor]:
    """All that a drafter takes from its target: hidden states, embeddings, and logits."""
    tokens = ragged_batch(padding=(0, 0))["input_ids"]
    drafting = SpecFormerDrafter(drafter, target)
    _, states = StateReader(target, drafting.hidden_state_layers)(input_ids=tokens, use_cache=False)
    target_parts, states = drafting.borrowed, states.to(drafting.borrowed.device)
    return [states, target_parts.embed(tokens), target_parts.draft_logits(states[:, :, -1])]


def assert_same_borrowed(target: PreTrainedModel, twin: PreTrainedModel) -> None:
    drafter = drafter_for(twin)
    for ours, theirs in zip(borrowed(target, drafter), borrowed(twin, drafter), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- targets whose own rounding depends on the shape of a pass


@torch.no_grad()
def assert_taken_within_rounding(target, batch: dict, texts: list[torch.Tensor], noise: list[torch.Tensor]) -> None:
    """Each new token is the one of the highest score, up to the difference that the target has with itself.

    In half precision, and where activations are quantised, a pass over several tokens rounds otherwise than passes over
    one: plain generate() itself answers otherwise in another batch, wherever two scores are almost tied, and equal
    texts are no test. Here each text is read back, row by row and without padding, in one pass and token by token.
    The two differ by the target's rounding, and no token taken may be further below the best than twice that.

    Args:
        texts: sequences (B, P + new tokens), plain generate()'s among them: it has to pass as well.
        noise: what sampling adds to the scores of each step, (B, V) a step; zeros for greedy decoding.
    """
    width, gaps, decided = batch["input_ids"].shape[1], [], []
    for row, new in sorted({(row, tuple(new)) for text in texts for row, new in enumerate(text[:, width:].tolist())}):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        tokens = torch.cat([prompt, torch.tensor(new)])[None]
        whole = target(input_ids=tokens[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()
        output = target(input_ids=tokens[:, : len(prompt)], use_cache=True)
        steps = [output.logits[0, -1].float()]
        for token in new[:-1]:
            output = target(torch.tensor([[token]]), **cache_argument(target, cache_of(output)), use_cache=True)
            steps.append(output.logits[0, -1].float())
        rounding = (whole - torch.stack(steps)).abs().max()
        scores = whole + torch.stack([step[row] for step in noise])
        gaps.append((scores.max(-1).values - scores.gather(1, torch.tensor(new)[:, None])[:, 0]).max() / rounding)
        best = scores.topk(2).values
        decided.append((best[:, 0] - best[:, 1] > 2 * rounding).float().mean())
    assert torch.stack(decided).mean() > 0.5  # mostly, one token only will do
    assert max(gaps) <= 2, gaps


def check_within_rounding(target: PreTrainedModel) -> None:
    batch, network = ragged_batch(), drafter_for(target)
    vocabulary = target.config.vocab_size
    for sampling in ({}, dict(do_sample=True, top_k=0)):
        arguments = dict(sampling, eos_token_id=None, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        torch.manual_seed(3)
        noise = [torch.zeros(5, vocabulary) for _ in range(NEW_TOKENS)]
        if sampling:  # argmax(p / q) is what torch.multinomial() takes
            noise = [-torch.empty(5, vocabulary).exponential_().log() for _ in range(NEW_TOKENS)]
        texts = [reference.sequences]
        drafters = [oracle(reference, batch, kind, None) for kind in ("sometimes", "adversarial")]
        for drafter in (*drafters, network):
            torch.manual_seed(3)
            texts.append(generate(target, drafter, **batch, num_assistant_tokens=4, **arguments))
            assert torch.equal(torch.get_rng_state(), reference.generator_state)
        assert_taken_within_rounding(target, batch, texts, noise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_target_with_float32_drafter(dtype: torch.dtype):
    target = llama(dtype)
    check_within_rounding(target)
    drafter = drafter_for(target)
    assert drafter.dtype == torch.float32
    generate(target, drafter, **ragged_batch(), max_new_tokens=4)
    assert drafter.dtype == torch.float32  # a copy computes in the target's
    assert {parameter.dtype for parameter in target.parameters()} == {dtype}


@pytest.mark.one_version
def test_rounding_check_can_fail():
    """A token that is nowhere near the best is found, also in bfloat16."""
    target, batch = llama(torch.bfloat16), ragged_batch()
    noise = [torch.zeros(5, target.config.vocab_size)] * NEW_TOKENS
    right = target.generate(**batch, eos_token_id=None, max_new_tokens=NEW_TOKENS)
    assert_taken_within_rounding(target, batch, [right], noise)
    wrong = right.clone()
    wrong[2, -1] = (wrong[2, -1] + 1) % target.config.vocab_size
    with pytest.raises(AssertionError):
        assert_taken_within_rounding(target, batch, [wrong], noise)


def test_float32_target_with_bfloat16_drafter():
    target, batch = llama(torch.float32), ragged_batch()
    for arguments in settings(target, batch):
        drafter = drafter_for(target).to(torch.bfloat16)
        check(target, batch, plain(target, batch, **arguments), drafter, 4, **arguments)
        assert drafter.dtype == torch.bfloat16


# ---- offloaded by accelerate


PLACES = {
    "layers": {"model.layers.1": "disk", "model.layers.3": "disk"},
    "norm": {"model.norm": "disk"},
    "head": {"lm_head": "disk"},
    "embeddings": {"model.embed_tokens": "disk"},
    "tied": {"model.embed_tokens": "disk", "lm_head": "disk"},
    "all": {"": "disk"},
}


@pytest.mark.parametrize("place", PLACES)
def test_offloaded_to_disk(place: str, tmp_path: Path):
    pytest.importorskip("accelerate")
    twin = llama(tie_word_embeddings=place == "tied")
    torch.nn.init.uniform_(twin.model.norm.weight, 0.5, 2.0)
    twin.save_pretrained(tmp_path / "target")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    names += [f"model.layers.{layer}" for layer in range(twin.config.num_hidden_layers)]
    device_map = {**dict.fromkeys(names, "cpu"), **PLACES[place]} if place != "all" else PLACES[place]
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float64
    )
    assert any(parameter.is_meta for parameter in target.parameters())
    assert_same_borrowed(target, twin)
    drafter = drafter_for(twin)
    drafter.init_from_target(target)
    torch.testing.assert_close(drafter.final_norm.weight, twin.model.norm.weight.float(), rtol=1e-4, atol=0)
    check_exact(target, reference_of=twin)


# ---- quantised


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama(torch.float32, **WIDE).save_pretrained(tmp_path)
    return tmp_path


def quantised(folder: Path, config) -> PreTrainedModel:
    target = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    kept = torch.nn.Linear, torch.nn.Parameter
    layer = target.model.layers[0].mlp.up_proj
    assert (type(layer), type(layer.weight)) != kept
    return target


@pytest.mark.parametrize(
    "options",
    [
        dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        dict(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    ],
    ids=["fp4", "nf4"],
)
def test_bitsandbytes_4_bit(saved: Path, options: dict):
    pytest.importorskip("bitsandbytes")
    target = quantised(saved, BitsAndBytesConfig(**options))
    batch = ragged_batch()
    assert_meaningful(target, batch, target.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None))
    check_exact(target)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_bitsandbytes_8_bit(saved: Path, threshold: float):
    """It quantises activations too; above the threshold, columns of the whole batch together."""
    pytest.importorskip("bitsandbytes")
    check_within_rounding(quantised(saved, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)))


def test_torchao_8_bit_weights(saved: Path):
    quantization = pytest.importorskip("torchao.quantization")
    target = quantised(saved, TorchAoConfig(quantization.Int8WeightOnlyConfig()))
    batch = ragged_batch()
    assert_meaningful(target, batch, target.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None))
    check_exact(target)


def test_torchao_8_bit_activations(saved: Path):
    quantization = pytest.importorskip("torchao.quantization")
    check_within_rounding(quantised(saved, TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())))


# ---- adapters


def lora(**overrides):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{**dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), **overrides})


def fill_adapters(model: torch.nn.Module) -> torch.nn.Module:
    """New adapters are zero and would change nothing."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def assert_adapter_matters(target) -> None:
    batch = ragged_batch()
    texts = [model.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None) for model in (target, llama())]
    assert not torch.equal(*texts)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The drafter of the tiny target, as published."""
    folder = tmp_path / "drafter"
    drafter_for(llama()).save_pretrained(folder)
    return folder


def strategy(repository: Path) -> dict:
    drafter = SpecFormerModel.from_pretrained(repository)
    return dict(assistant_model=drafter, custom_generate=str(repository), trust_remote_code=True)


def check_repository(target, repository: Path, reference_of=None) -> None:
    batch, reference_of = ragged_batch(), reference_of or target
    for arguments in settings(reference_of, batch):
        reference = plain(reference_of, batch, **arguments)
        torch.manual_seed(3)
        sequences = target.generate(**batch, **arguments, **strategy(repository))
        assert sequences.tolist() == reference.sequences.tolist()
        assert torch.equal(torch.get_rng_state(), reference.generator_state)


@pytest.mark.parametrize("way", ["add", "load"])
def test_lora_inside_transformers(way: str, repository: Path, tmp_path: Path):
    target, config = llama(), lora()
    try:
        target.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers does not take the installed PEFT: {error}")
    fill_adapters(target)
    if way == "load":
        target.save_pretrained(tmp_path / "adapter")
        twin, target = target, llama()
        target.load_adapter(tmp_path / "adapter")
        assert_same_borrowed(target, twin)
    assert_adapter_matters(target)
    check_exact(target)
    check_repository(target, repository)


@pytest.mark.parametrize("layers", ["all-linear", ["lm_head", "embed_tokens", "q_proj"]], ids=["layers", "head"])
def test_peft_model(layers, repository: Path):
    import_peft = pytest.importorskip("peft")
    target = fill_adapters(import_peft.get_peft_model(llama(), lora(target_modules=layers)))
    assert_adapter_matters(target)
    check_repository(target, repository)
    check_exact(target, target.get_base_model())
    with target.disable_adapter():
        check_exact(target, target.get_base_model(), reference_of=llama())


def test_peft_rows_with_adapters_of_their_own(repository: Path):
    """They are hooked to the rows of the whole batch, which a pass may have lost."""
    peft = pytest.importorskip("peft")
    target = peft.get_peft_model(llama(), lora())
    target.add_adapter("other", lora())
    fill_adapters(target)
    batch = ragged_batch()
    arguments = dict(batch, max_new_tokens=NEW_TOKENS, adapter_names=["default", "other", "__base__"] + ["other"] * 2)
    assert target.generate(**arguments).shape[1] > batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match="cannot be decoded speculatively"):
        target.generate(**arguments, **strategy(repository))
    with pytest.raises(ValueError, match="adapter_names"):
        generate(target, SpecFormerModel.from_pretrained(repository), **arguments)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(kind: str, repository: Path):
    """They stand before the prompt, in no mask and no position. Also when the bare target has passed the probe."""
    peft = pytest.importorskip("peft")
    bare = llama(torch.float32)
    generate(bare, SpecFormerModel.from_pretrained(repository), **ragged_batch(), max_new_tokens=2)
    target = peft.get_peft_model(bare, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    arguments = dict(ragged_batch(), max_new_tokens=REFUSED_TOKENS)
    assert target.generate(**arguments).shape == (5, 9 + REFUSED_TOKENS)
    assert contains(refusal(target, drafter_for(bare)), "virtual tokens", "prompt or prefix tuning")
    spy: list = []
    with pytest.raises(ValueError, match=r"virtual tokens .*prompt or prefix tuning"):
        target.generate(**arguments, **strategy(repository), logits_processor=[lambda *a: spy.append(a) or a[1]])
    assert not spy


# ---- compiled


def compile_in_place(target, backend: str):
    target.compile(backend=backend)
    return target


def compile_forward(target, backend: str):
    target.forward = torch.compile(target.forward, backend=backend)
    return target


def compile_layers(target, backend: str):
    for layer in target.model.layers:
        layer.compile(backend=backend)
    return target


def compile_around(target, backend: str):
    return torch.compile(target, backend=backend)


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def two_layers() -> PreTrainedModel:
    return llama(torch.float32, num_hidden_layers=2)


WAYS = [
    compile_layers,
    compile_around,
    pytest.param(compile_forward, marks=pytest.mark.slow),
    pytest.param(compile_in_place, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_compiled(way: Callable, compiler):
    twin = two_layers()
    target = way(copy.deepcopy(twin), "eager")
    inside = getattr(target, "_orig_mod", target)
    with torch.no_grad():  # code that was made before there were hooks does not call them
        target(input_ids=ragged_batch(padding=(0, 0))["input_ids"], use_cache=False)
    assert_same_borrowed(inside, twin)
    check_exact(target, inside, reference_of=twin)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_by_inductor(compiler):
    twin, batch = two_layers(), ragged_batch()
    arguments = dict(eos_token_id=None, max_new_tokens=NEW_TOKENS)
    reference = plain(twin, batch, **arguments)
    assert_meaningful(twin, batch, reference.sequences)
    target = compile_forward(copy.deepcopy(twin), "inductor")
    assert plain(target, batch, **arguments).sequences.tolist() == reference.sequences.tolist()
    check(target, batch, reference, drafter_for(target), 4, **arguments)
    check(target, batch, reference, oracle(reference, batch, "sometimes", None), 4, **arguments)


def test_compiled_code_is_back_after_the_last_call(compiler):
    """Calls in several threads may end in any order; other compiled code waits for none of them for ever."""
    compiled: list = []
    function = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    for call in (first, second):
        function(torch.ones(2))
        assert not compiled
        call.__exit__(None, None, None)
    function(torch.ones(2))
    assert len(compiled) == 1


def counted(way: Callable, graphs: list, target):
    """`target`, compiled in a `way` that notes each of its graphs in `graphs` when it runs."""

    def backend(graph, inputs):
        def run(*args):
            graphs.append(graph)
            return graph.forward(*args)

        return run

    return way(target, backend)


@pytest.mark.parametrize("way", [compile_layers, compile_in_place])
@torch.no_grad()
def test_states_of_a_compiled_target(way: Callable, compiler):
    """A target that is compiled as a whole runs its compiled code, which gives the states; one of which parts are
    compiled runs as it is written. Either was compiled before anybody asked for states."""
    tokens = ragged_batch(padding=(0, 0))["input_ids"]
    twin, graphs = two_layers(), []
    _, expected = StateReader(twin, [0, 1, 2])(input_ids=tokens, use_cache=False)
    target = counted(way, graphs, copy.deepcopy(twin))
    target(input_ids=tokens, use_cache=False)
    assert graphs
    read = StateReader(target, [0, 1, 2])
    assert read.captures == (way is compile_in_place and captures(twin, [0, 1, 2]))
    assert read.runs_eagerly != read.captures
    graphs.clear()
    outputs, states = read(input_ids=tokens, use_cache=False)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(outputs.logits, twin(input_ids=tokens, use_cache=False).logits)
    assert bool(graphs) == read.captures


def test_the_newest_transformers_captures():
    """The oldest does not; what does is found out by a trial."""
    installed = backend_versions.numbers(transformers.__version__)
    assert captures(two_layers(), [1, 2]) or installed < backend_versions.numbers(backend_versions.NEWEST_TESTED)


def test_states_that_a_forward_does_not_give_are_not_captured(monkeypatch):
    """Its answer is compared: one that is late by a layer, or lacks some, is not taken."""
    target = two_layers()
    forward = target.forward

    def late(*args, output_hidden_states=None, **kwargs):
        return forward(*args, output_hidden_states=[(n + 1) % 3 for n in output_hidden_states or []] or None, **kwargs)

    monkeypatch.setattr(target, "forward", late)
    assert not captures(target, [1])


# ---- remote code


REMOTE = """
import torch
from transformers import DynamicCache, LlamaForCausalLM


class OwnForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, {others}):
        {change}
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
"""

OTHER_EMBEDDINGS = "input_ids = (input_ids + 7) % self.config.vocab_size"
FAITHFUL = {
    "takes anything": (OTHER_EMBEDDINGS, "**kwargs"),
    "takes what it must": (
        OTHER_EMBEDDINGS + "; kwargs = dict(use_cache=use_cache, return_dict=return_dict)",
        "use_cache=None, return_dict=None",
    ),
}
FAITHLESS = {
    "counts columns as positions": "position_ids = None",
    "ignores the mask": "attention_mask = None",
    "counts positions in a mask of two axes": (
        "position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :] "
        "if attention_mask is not None else position_ids"
    ),
    "masks the future only within a pass": (
        "attention_mask = torch.ones_like(attention_mask) "
        "if attention_mask is not None and attention_mask.ndim == 4 else attention_mask"
    ),
    "does not fill the cache it is given": (
        "past_key_values = DynamicCache(config=self.config) if input_ids.shape[1] > 1 else past_key_values"
    ),
}


def remote(folder: Path, change: str, others: str = "**kwargs") -> PreTrainedModel:
    llama(torch.float32).save_pretrained(folder)
    (folder / "modeling_own.py").write_text(REMOTE.format(change=change, others=others))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    target = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(target).__module__.startswith("transformers_modules")
    return target


@pytest.mark.parametrize("kind", FAITHFUL)
def test_remote_code(kind: str, tmp_path: Path, repository: Path):
    """Also where plain generate() of transformers 5.24 fails: with a forward that calls the cache `past_key_values` and
    takes nothing else. The reference is the same model with a forward that does."""
    target, batch = remote(tmp_path / "own", *FAITHFUL[kind]), ragged_batch()
    twin = remote(tmp_path / "twin", *FAITHFUL["takes anything"])
    texts = [model.generate(**batch, max_new_tokens=NEW_TOKENS) for model in (twin, llama(torch.float32))]
    assert texts[0].tolist() != texts[1].tolist()
    check_exact(target, reference_of=twin)
    check_repository(target, repository, twin)


@pytest.mark.parametrize("change", FAITHLESS)
def test_remote_code_that_reads_its_arguments_in_another_way(change: str, tmp_path: Path, monkeypatch):
    target, batch = remote(tmp_path / "own", FAITHLESS[change]), ragged_batch()
    arguments = dict(eos_token_id=None, max_new_tokens=NEW_TOKENS)
    message = refusal(target, error=UnsupportedTargetError)
    assert contains(message, "OwnForCausalLM", "a trial with two rows of different length did not agree")
    # It is not refused for nothing: without the probe the text would be another one, or an error.
    reference = plain(target, batch, **arguments)
    monkeypatch.setattr(entry, "probe_target", lambda *_, **__: None)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        check(target, batch, reference, oracle(reference, batch, "sometimes", None), 4, **arguments)


# ---- composite models, with a prompt of text alone


def gemma3_with_images(vision_layers: int) -> PreTrainedModel:
    """Its vision tower may have as many layers as the language model."""
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, head_dim=8, sliding_window=6, max_position_embeddings=64)
    text |= dict(eos_token_id=None, pad_token_id=0, initializer_range=0.15)
    vision = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, image_size=28, patch_size=14)
    vision |= dict(num_hidden_layers=vision_layers)
    images = dict(image_token_index=60, boi_token_index=61, eoi_token_index=62, mm_tokens_per_image=1)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **images)).eval()


@pytest.mark.parametrize("vision_layers", [2, 4])
def test_composite_model_with_text_alone(vision_layers: int):
    target, batch = gemma3_with_images(vision_layers), ragged_batch()
    batch["input_ids"] %= 58
    arguments = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)
    reference = plain(target, batch, **arguments)
    for kind in ("sometimes", "adversarial"):
        check(target, batch, reference, oracle(reference, batch, kind, None), 4, **arguments)
    check(target, batch, reference, drafter_for(target), 4, **arguments)
    check(target, batch, reference, target, 4, **arguments)


def gemma4_with_images() -> PreTrainedModel:
    if not hasattr(transformers, "Gemma4Config"):
        pytest.skip("this transformers has no Gemma 4")
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=6, max_position_embeddings=64)
    text |= dict(hidden_size_per_layer_input=4, vocab_size_per_layer_input=64, num_kv_shared_layers=0)
    text |= dict(eos_token_id=None, pad_token_id=0, initializer_range=0.15)
    vision = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    vision |= dict(num_hidden_layers=2, patch_size=4)
    tokens = dict(image_token_id=60, boi_token_id=61, eoi_token_id=62, audio_token_id=59, video_token_id=58)
    torch.manual_seed(0)
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)
    return transformers.Gemma4ForConditionalGeneration(config).eval()


TYPED = {"token_type_ids": lambda: gemma3_with_images(2), "mm_token_type_ids": gemma4_with_images}


@pytest.mark.parametrize("name", TYPED)
def test_token_types_of_text_alone(name: str):
    """Processors return them with every prompt; where there is no image they are 0."""
    target, batch = TYPED[name](), ragged_batch()
    batch["input_ids"] %= 57
    batch[name] = torch.zeros_like(batch["input_ids"])
    for sampling in ({}, SAMPLING):
        arguments = dict(sampling, max_new_tokens=NEW_TOKENS, eos_token_id=None)
        reference = plain(target, batch, **arguments)
        check(target, batch, reference, oracle(reference, batch, "sometimes", None), 4, **arguments)
        statistics = check(target, batch, reference, drafter_for(target), 4, **arguments)
        assert sum(statistics.drafted_per_slot) > 0
    with_images = batch[name].clone()
    with_images[1, 7] = 1
    message = refusal(target, **{**batch, name: with_images})
    assert contains(message, f"{name} is not 0 everywhere", "text alone")


def test_token_types_that_have_embeddings():
    """In GPT-2 those of type 0 are added as well: plain generate() writes another text than without types."""
    target, batch = make_target("gpt2"), ragged_batch()
    types = {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    texts = [target.generate(**batch, **given, max_new_tokens=NEW_TOKENS) for given in ({}, types)]
    assert texts[0].tolist() != texts[1].tolist()
    assert contains(refusal(target, **batch, **types), "token_type_ids", "not supported")


def test_attention_of_every_part_is_restored():
    target = gemma3_with_images(2)
    target.set_attn_implementation({"text_config": "flex_attention", "vision_config": "eager"})

    def implementations() -> list[str]:
        config = target.config
        return [part._attn_implementation for part in (config, config.text_config, config.vision_config)]

    before = implementations()
    with pytest.warns(UserWarning, match="flex_attention"):
        generate(target, None, **ragged_batch(), max_new_tokens=3, num_assistant_tokens=0)
    assert implementations() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            generate(target, None, **ragged_batch(), max_new_tokens=3, num_assistant_tokens=0)
    assert implementations() == before


def test_one_drafter_on_targets_of_two_dtypes():
    exact, half = llama(torch.float32), llama(torch.bfloat16)
    drafter, batch = drafter_for(exact), ragged_batch()
    weights = copy.deepcopy(drafter.state_dict())
    generate(half, drafter, **batch, max_new_tokens=4)
    check(exact, batch, plain(exact, batch, max_new_tokens=NEW_TOKENS), drafter, 4, max_new_tokens=NEW_TOKENS)
    assert all(torch.equal(weights[name], value) for name, value in drafter.state_dict().items())


def test_interrupted_entry_leaves_no_hooks(monkeypatch):
    target = llama()
    states = HiddenStates(target, [0, 2, 4])

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", interrupt)  # the last of them
    with pytest.raises(KeyboardInterrupt):
        states.__enter__()
    assert hooks_of(target) == 0
