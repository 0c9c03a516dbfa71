"""A drafter knows its target: silent on its own, a warning on a relative, an error on any other model."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from accelerate import cpu_offload
from exactness import check, plain
from tiny import PRESETS, VOCAB, llama, ragged_batch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.configuration_specformer import FORMAT
from specformer.target_specformer import check_embeddings, some_embeddings

OWN = "someone/own-target"
SETTINGS = dict(max_new_tokens=8, eos_token_id=None, do_sample=False)


def named(target: PreTrainedModel, name: str) -> PreTrainedModel:
    target.config.name_or_path = target.name_or_path = name
    return target


def own_target(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> PreTrainedModel:
    return named(llama(dtype, seed=seed, **overrides), OWN)


def drafter_of(target: PreTrainedModel, **overrides) -> SpecFormerModel:
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, **overrides))
    drafter.init_from_target(target)
    return drafter.eval()


@torch.no_grad()
def perturbed(target: PreTrainedModel, share: float) -> PreTrainedModel:
    """Every weight moved by `share` of its spread, as a fine-tune does."""
    generator = torch.Generator().manual_seed(7)
    for parameter in target.parameters():
        if parameter.ndim > 1:
            parameter += share * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return target


@torch.no_grad()
def dequantised(target: PreTrainedModel, block: int = 16) -> PreTrainedModel:
    """As a GGUF of four bits is read: every block of weights on sixteen levels, embeddings too."""
    for parameter in target.parameters():
        if parameter.ndim > 1:
            blocks = parameter.view(-1, block)
            scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 7  # the pad token's are all 0
            parameter.copy_(((blocks / scale).round() * scale).view_as(parameter))
    return target


def warned(call) -> tuple[object, list[str]]:
    """What `call` returns, and what it warns of about targets."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in caught if "This drafter was made for" in str(warning.message)]


def lossless(target: PreTrainedModel, drafter: SpecFormerModel) -> list[str]:
    """Warnings of one call, whose text must be plain generate()'s."""
    batch = ragged_batch()
    reference = target.generate(**batch, **SETTINGS)
    ids, messages = warned(lambda: generate(target, drafter, **batch, **SETTINGS))
    assert torch.equal(ids, reference)
    return messages


# ---- what is remembered


def test_numbers_are_read_where_they_should_be():
    """Rows and columns by whole-number arithmetic: rounding that depends on the device would choose others."""
    target = llama()  # 64 rows and 32 columns
    weight = target.get_input_embeddings().weight
    rows, columns = [0, 9, 18, 27, 36, 45, 54, 63], [0, 4, 8, 13, 17, 22, 26, 31]
    expected = weight[rows][:, columns].flatten().tolist()
    assert some_embeddings(target, 64) == pytest.approx(expected, rel=1e-3)
    assert len(some_embeddings(llama(vocab_size=3, hidden_size=4, eos_token_id=2), 3)) == 64


def test_a_saved_drafter_remembers(tmp_path):
    target = own_target()
    drafter = drafter_of(target)
    drafter.save_pretrained(tmp_path)
    loaded = SpecFormerModel.from_pretrained(tmp_path)
    assert loaded.config.target_embeddings == drafter.config.target_embeddings == some_embeddings(target, VOCAB)
    assert loaded.config.format_version == FORMAT


def test_unused_rows_that_hold_anything():
    target = own_target()
    with torch.no_grad():
        target.get_input_embeddings().weight[0] = torch.nan
        target.get_input_embeddings().weight[63] = torch.inf
    drafter = drafter_of(target)
    SpecFormerConfig(**drafter.config.to_dict())  # the numbers are finite
    assert warned(lambda: drafter.borrow(target))[1] == []
    with pytest.raises(ValueError, match="another model"):
        drafter.borrow(own_target(seed=1))


# ---- its own target


@pytest.mark.parametrize("learnt_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_own_target_in_any_dtype(learnt_in: torch.dtype, dtype: torch.dtype):
    drafter = drafter_of(own_target(learnt_in))
    for name in (OWN, "/a/copy/elsewhere"):
        assert warned(lambda name=name: drafter.borrow(named(own_target(dtype), name)))[1] == []


def test_own_target_reloaded_and_offloaded(tmp_path):
    target = own_target()
    drafter = drafter_of(target)
    assert lossless(target, drafter) == []
    target.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert reloaded.name_or_path != OWN
        assert warned(lambda reloaded=reloaded: drafter.borrow(reloaded))[1] == []
    offloaded = cpu_offload(reloaded, execution_device="cpu")
    assert offloaded.get_input_embeddings().weight.is_meta
    assert warned(lambda: check_embeddings(offloaded, drafter.config))[1] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_own_target_on_a_gpu():
    drafter = drafter_of(own_target())
    for dtype in (torch.float32, torch.bfloat16):
        assert warned(lambda dtype=dtype: drafter.borrow(own_target(dtype).cuda()))[1] == []
    with pytest.raises(ValueError, match="another model"):
        drafter.borrow(own_target(seed=1).cuda())


# ---- its own target, with more tokens


RESIZED = {
    "two tokens": dict(new_num_tokens=VOCAB + 2),
    "padded": dict(pad_to_multiple_of=48),
    "one token, padded": dict(new_num_tokens=VOCAB + 1, pad_to_multiple_of=64),
}


def resized(target: PreTrainedModel, how: str) -> PreTrainedModel:
    """With new tokens whose embeddings are random, so that it writes them too."""
    torch.manual_seed(0)
    target.resize_token_embeddings(**RESIZED[how], mean_resizing=False)
    assert target.config.vocab_size == len(target.lm_head.weight) > VOCAB
    return target


def new_tokens_in_prompts() -> dict[str, torch.Tensor]:
    batch = ragged_batch()
    batch["input_ids"][0, -1] = batch["input_ids"][3, 4] = VOCAB
    return batch


@pytest.mark.parametrize("preset", ["anchor", "some tokens", "previous token", "all of it"])
@pytest.mark.parametrize("how", RESIZED)
def test_a_target_with_more_tokens(how: str, preset: str):
    """Silent, and exact where texts have new tokens in them; a drafter of all tokens drafts these, too."""
    drafter = SpecFormerModel(PRESETS[preset](own_target().config)).eval()
    drafter.init_from_target(own_target())
    target, batch = resized(own_target(torch.float64), how), new_tokens_in_prompts()
    written = []
    for sampling in (dict(do_sample=False), dict(do_sample=True, temperature=2.0)):
        arguments = dict(sampling, max_new_tokens=16, eos_token_id=None)
        reference = plain(target, batch, **arguments)
        statistics, messages = warned(
            lambda reference=reference, arguments=arguments: check(target, batch, reference, drafter, 4, **arguments)
        )
        assert messages == [] and sum(statistics.drafted_per_slot) > 0
        written += reference.sequences[:, batch["input_ids"].shape[1] :].flatten().tolist()
    assert max(written) >= VOCAB
    for rule in ("coupled", "rejection"):
        generate(target, drafter, **batch, do_sample=True, max_new_tokens=8, acceptance=rule)


@torch.no_grad()
@pytest.mark.parametrize("drafted", [None, 24])
def test_training_on_texts_with_new_tokens(drafted: int | None):
    """Where all tokens are drafted there are logits of the new ones; elsewhere their positions do not count."""
    drafter = drafter_of(own_target(), draft_vocab_size=drafted)
    borrowed = drafter.borrow(resized(own_target(), "two tokens"))
    logits = borrowed.draft_logits(torch.randn(3, 32))
    assert logits.shape == (3, drafted or VOCAB + 2)
    labels = borrowed.draft_labels(torch.tensor([5, VOCAB, VOCAB + 1]))
    assert labels.tolist() == [5, *([-100] * 2 if drafted else [VOCAB, VOCAB + 1])]


@pytest.mark.parametrize("how", RESIZED)
def test_relatives_and_other_models_with_more_tokens(how: str):
    drafter = drafter_of(own_target())
    tuned = named(resized(perturbed(own_target(), 0.2), how), "someone/fine-tune")
    assert len(lossless(tuned, drafter)) == 1
    with pytest.raises(ValueError, match="another model"):
        drafter.borrow(resized(own_target(seed=1), how))


def test_a_target_with_fewer_tokens():
    """Also where none of those that are drafted is missing."""
    drafter = drafter_of(own_target(), draft_vocab_size=24)
    target = own_target()
    target.resize_token_embeddings(VOCAB - 2)
    with pytest.raises(ValueError, match=r"vocab_size is 62 there and 64 here\. Load the drafter of this target"):
        generate(target, drafter, **ragged_batch(), **SETTINGS)


def test_the_vocabulary_need_not_be_given_when_loading(tmp_path):
    drafter_of(own_target()).save_pretrained(tmp_path)
    target = resized(own_target(), "two tokens")
    assert lossless(target, SpecFormerModel.from_pretrained(tmp_path)) == []
    assert lossless(target, SpecFormerModel.from_pretrained(tmp_path, vocab_size=VOCAB)) == []
    for load in (SpecFormerModel, AutoModel):
        with pytest.raises(ValueError, match=r"vocab_size=66 was given, .*vocabulary of 64\. Leave it out"):
            load.from_pretrained(tmp_path, vocab_size=VOCAB + 2, trust_remote_code=True)


@pytest.mark.parametrize("how", ["target alone", "both"])
def test_an_assistant_of_a_target_with_more_tokens(how: str):
    target, assistant = llama(vocab_size=512), llama(vocab_size=512, num_hidden_layers=2, seed=1)
    for model in (target, assistant) if how == "both" else (target,):
        model.resize_token_embeddings(514, mean_resizing=False)
    batch = ragged_batch()
    batch["input_ids"][:, -1] = 512
    batch["input_ids"][0, 3] = 513
    for sampling in (dict(do_sample=False), dict(do_sample=True, temperature=3.0)):
        arguments = dict(sampling, max_new_tokens=16, eos_token_id=None)
        reference = plain(target, batch, **arguments)
        statistics = check(target, batch, reference, assistant, 4, **arguments)
        assert sum(statistics.drafted_per_slot) > 0


def test_an_assistant_of_a_target_with_many_more_tokens():
    """The message says what helps, and it does."""
    target, assistant = llama(), llama(num_hidden_layers=2, seed=1)
    target.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    batch = new_tokens_in_prompts()
    with pytest.raises(ValueError, match=r"64 tokens and the target 66.*assistant\.resize_token_embeddings\(66\)"):
        generate(target, assistant, **batch, **SETTINGS)
    assistant.resize_token_embeddings(66)
    check(target, batch, plain(target, batch, **SETTINGS), assistant, 4, **SETTINGS)


# ---- relatives


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_fine_tune_is_told_once_and_works(share: float):
    target = own_target()
    drafter = drafter_of(target)
    tuned = named(perturbed(own_target(), share), "someone/fine-tune")
    for _ in range(2):  # every call
        messages = lossless(tuned, drafter)
        assert len(messages) == 1
        for part in (OWN, "someone/fine-tune", "related", "likeness", "text stays the target's own"):
            assert part in messages[0]


def test_a_quantised_copy():
    """Silent under the target's own name, and a relative under another."""
    drafter = drafter_of(own_target())
    copy = dequantised(own_target())
    assert lossless(copy, drafter) == []
    assert len(warned(lambda: drafter.borrow(named(copy, "someone/own-target-4bit")))[1]) == 1


# ---- other models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["someone/other", OWN])
def test_another_model_of_the_same_sizes(name: str, dtype: torch.dtype):
    """Refused before anything runs, under whatever name."""
    drafter, other = drafter_of(own_target()), named(own_target(dtype, seed=1), name)
    passes = []
    other.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError) as caught:
        generate(other, drafter, **ragged_batch(), **SETTINGS)
    assert passes == []
    for part in (OWN, name, "another model of the same sizes", "embeddings", "likeness is", "Load the drafter of this"):
        assert part in str(caught.value)


def test_many_other_models():
    drafter = drafter_of(own_target())
    for seed in range(1, 30):
        with pytest.raises(ValueError, match="another model of the same sizes"):
            drafter.borrow(own_target(seed=seed))


def test_names_where_there_are_none():
    drafter = drafter_of(own_target(), target_name_or_path=None)
    with pytest.raises(ValueError, match="made for another target, and LlamaForCausalLM is another model"):
        drafter.borrow(llama(torch.float32, seed=1))
    assert len(warned(lambda: drafter.borrow(perturbed(llama(torch.float32), 0.2)))[1]) == 1


def test_other_sizes_are_named_first():
    drafter = drafter_of(own_target())
    with pytest.raises(ValueError, match=f"{OWN}.*someone/other: hidden_size is 64 there and 32 here"):
        drafter.borrow(named(llama(torch.float32, seed=1, hidden_size=64), "someone/other"))


def test_a_drafter_that_remembers_nothing_does_not_check():
    drafter = drafter_of(own_target())
    drafter.config.target_embeddings = None
    assert lossless(named(llama(torch.float32, seed=1), "someone/other"), drafter) == []


@pytest.mark.one_version
def test_this_file_can_fail(monkeypatch):
    """Without the check, nothing is raised."""
    monkeypatch.setattr("specformer.target_specformer.check_embeddings", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        test_another_model_of_the_same_sizes("someone/other", torch.float32)
    with pytest.raises(AssertionError):
        test_a_fine_tune_is_told_once_and_works(0.1)


# ---- the fields


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        [0.5] * 63,
        [0.5] * 65,
        [float("nan")] * 64,
        [0.5] * 63 + [float("inf")],
        [0.5] * 63 + [10**400],
        [0.5] * 63 + ["0.5"],
        [0.5] * 63 + [None],
        [True] * 64,
        [[0.5] * 8] * 8,
        "0.5" * 64,
        {"0": 0.5},
        0.5,
    ],
    ids=lambda numbers: str(numbers)[-30:],
)
def test_wrong_target_embeddings(numbers):
    with pytest.raises(ValueError, match=r"target_embeddings is .*; expected 64 finite numbers, or None"):
        SpecFormerConfig(target_embeddings=numbers)


def edited_config(tmp_path, **fields) -> None:
    """A drafter in `tmp_path` whose config.json has other `fields`; None removes one."""
    drafter_of(own_target()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = {name: value for name, value in {**json.loads(file.read_text()), **fields}.items() if value is not None}
    file.write_text(json.dumps(saved))


def test_a_newer_format_says_what_to_do(tmp_path):
    edited_config(tmp_path, format_version=FORMAT + 1)
    with pytest.raises(ValueError) as caught:
        SpecFormerModel.from_pretrained(tmp_path)
    for part in (f"in format {FORMAT + 1}", f"up to {FORMAT}", "pip install -U specformer", "trust_remote_code=True"):
        assert part in str(caught.value)


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", True, [1]])
def test_no_format(version):
    with pytest.raises(ValueError, match=r"format_version is .*expected a positive integer"):
        SpecFormerConfig(format_version=version)


def test_a_config_of_older_code_loads(tmp_path):
    edited_config(tmp_path, format_version=None, target_embeddings=None)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"format_version", "target_embeddings"} & saved.keys()
    loaded = SpecFormerModel.from_pretrained(tmp_path)
    assert (loaded.config.format_version, loaded.config.target_embeddings) == (FORMAT, None)
    assert lossless(own_target(), loaded) == []
