"""`from_pretrained` with fields of its own, and with weights that are not finite. Hostile files: test_safety.py."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from exactness import check, plain
from safetensors.torch import load_file, save_file
from test_acceptance import DRAFTED, p_value, probabilities, small_target
from test_acceptance import draw as draw_texts
from tiny import PRESETS, llama, ragged_batch
from transformers import AutoModel, PreTrainedModel

from specformer import SpecFormerConfig, SpecFormerModel, generate

SETTINGS = dict(max_new_tokens=12, eos_token_id=None)
LOADERS = [SpecFormerModel, AutoModel]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("drafter")
    SpecFormerModel(SpecFormerConfig.from_target_config(llama().config)).save_pretrained(folder)
    return folder


def load(loader: type, folder: Path, **fields) -> PreTrainedModel:
    return loader.from_pretrained(folder, trust_remote_code=True, **fields)


# ---- fields of the config


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
@pytest.mark.parametrize(
    "fields",
    [
        dict(default_num_assistant_tokens=2),
        dict(causal_draft_attention=True),
        dict(draft_attends_context=True),
        dict(target_layer_ids=[0, 1, 4]),
        dict(rope_theta=500.0, rms_norm_eps=1e-3),
        dict(target_name_or_path="someone/target"),
    ],
    ids=str,
)
def test_fields_that_fit_the_weights_are_taken(loader: type, fields: dict, folder: Path):
    drafter, target, batch = load(loader, folder, **fields), llama(), ragged_batch()
    assert {name: getattr(drafter.config, name) for name in fields} == fields
    reference = plain(target, batch, do_sample=True, **SETTINGS)
    check(target, batch, reference, drafter, k=3, do_sample=True, **SETTINGS)


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
@pytest.mark.parametrize("more", [{}, dict(ignore_mismatched_sizes=True)], ids=["", "ignore_mismatched_sizes"])
@pytest.mark.parametrize(
    "fields, problem",
    [
        (dict(num_draft_tokens=2), r"positional_ffn.weight: \[256, 32\], not \[64, 32\]"),
        (dict(use_anchor_token=False), r"input_proj.weight: \[32, 128\], not \[32, 96\]"),
        (dict(anchor_slot=True), r"'missing_keys': \['anchor_slot.norm.weight', 'anchor_slot.proj.weight'\]"),
        (dict(num_draft_layers=2), r"'missing_keys': \['more_draft_layers.0.attention.k_proj.weight'"),
        (dict(confidence_head=True), r"'missing_keys': \['confidence_head.in_proj.bias'"),
        (dict(draft_vocab_size=5), r"'missing_keys': \['draft_token_ids'\]"),
        (dict(use_positional_ffn=False), r"'missing_keys': \['slot_embeddings.weight'\], 'unexpected_keys': \['pos"),
        (dict(hidden_size=10**9), "hidden_size is 1000000000; expected a positive integer"),
        (dict(num_draft_tokens=0), "num_draft_tokens is 0; expected a positive integer"),
        (dict(target_layer_ids=[0, 1, 2, 9]), "expected integers from 0 to 4"),
        (dict(no_such_field=3), "unexpected keyword argument 'no_such_field'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fields_that_do_not_fit_are_refused(loader: type, more: dict, fields: dict, problem: str, folder: Path, capfd):
    with pytest.raises(ValueError, match=problem) as caught:
        load(loader, folder, **fields, **more)
    if problem.startswith(("positional", "input", "'missing")):
        assert "a field that was given to from_pretrained(...) does not fit" in str(caught.value)
        assert "Leave such fields out" in str(caught.value)
    assert "LOAD REPORT" not in capfd.readouterr().err  # refused before anything was loaded


def test_other_ways_to_load(folder: Path, tmp_path: Path):
    """A config of one's own, weights of one's own, a subfolder, a dtype, a variant; none of them draws numbers."""
    whole = SpecFormerModel.from_pretrained(folder)
    weights = whole.state_dict()
    shutil.copytree(folder, tmp_path / "part")
    whole.save_pretrained(tmp_path / "variant", variant="fp16")
    state = torch.get_rng_state()
    ways = [
        (folder, dict(config=whole.config)),
        (folder, dict(config=str(folder))),
        (None, dict(config=whole.config, state_dict=weights)),
        (tmp_path, dict(subfolder="part")),
        (folder, dict(dtype="auto")),
        (folder, dict(dtype=torch.bfloat16)),
        (tmp_path / "variant", dict(variant="fp16")),
    ]
    for name, arguments in ways:
        loaded = SpecFormerModel.from_pretrained(name, **arguments).state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[key], weight.to(loaded[key].dtype)) for key, weight in weights.items())
    assert torch.equal(torch.get_rng_state(), state)
    smaller = {key: weight for key, weight in weights.items() if key != "input_proj.weight"}
    for state_dict in (smaller, None):
        with pytest.raises(ValueError, match="missing_keys"):
            SpecFormerModel.from_pretrained(None, config=whole.config, state_dict=state_dict)


# ---- weights that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_weights_that_are_not_finite_are_refused(loader: type, value: float, folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights["draft_mlp.up_proj.weight"][-1, -1] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'not_finite': \['draft_mlp.up_proj.weight'\]"):
        load(loader, copy)


NOT_FINITE = [torch.nan, torch.inf, 1e30, 1e300]
"""The last ones are finite, and what is computed with them is not."""


@torch.no_grad()
def spoil(drafter: SpecFormerModel, value: float, part: str) -> SpecFormerModel:
    """Put `value` into some weights of one part, or of all."""
    for name, weight in drafter.named_parameters():
        if part == "all" or name.startswith(part):
            weight.view(-1)[::3] = value
    return drafter


WAYS = (dict(do_sample=False), dict(do_sample=True), dict(do_sample=True, top_p=0.9, top_k=20))
COUPLED = dict(SETTINGS, do_sample=True, acceptance="coupled", seed=5)


@cache
def without_drafts():
    """A target, prompts, what plain generate() writes in each of the `WAYS`, and a text of a seed."""
    target, batch = llama(), ragged_batch()
    references = [plain(target, batch, **way, **SETTINGS) for way in WAYS]
    return target, batch, references, generate(target, None, num_assistant_tokens=0, **batch, **COUPLED)


@pytest.mark.one_version
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("part", ["all", "final_norm", "positional_ffn", "context_attention"])
@pytest.mark.parametrize("preset", ["anchor", "some tokens"])
def test_drafts_that_are_not_finite_change_no_text(preset: str, part: str, value: float):
    """Of a drafter whose training went wrong, for example."""
    target, batch, references, text = without_drafts()
    torch.manual_seed(0)
    drafter = spoil(SpecFormerModel(PRESETS[preset](target.config)).double(), value, part)
    for way, reference in zip(WAYS, references, strict=True):
        check(target, batch, reference, drafter, k=3, **way, **SETTINGS)
    assert torch.equal(generate(target, drafter, **batch, **COUPLED), text)


@pytest.mark.one_version
@pytest.mark.parametrize("value", NOT_FINITE[:3])
def test_drafts_that_are_not_finite_change_no_distribution(value: float):
    """By the rule "rejection", whose text depends on the drafts: they are rejected, all of them."""
    target = small_target()
    config = SpecFormerConfig.from_target_config(target.config, num_draft_tokens=DRAFTED)
    drafter = spoil(SpecFormerModel(config), value, "all")
    settings = dict(top_p=0.8)
    drafting = dict(assistant_model=drafter, num_assistant_tokens=DRAFTED)
    sample = draw_texts(target, drafting, "rejection", settings, size=40_000)
    assert (sample.accepted, sample.drafted > 0) == (0, True)
    assert p_value(sample.counts, probabilities(target, settings)) > 1e-3


# ---- checkouts without symbolic links


def test_checkout_of_windows_says_what_to_do(folder: Path, tmp_path: Path):
    """git writes the target of a link into a text file there. What the sentence advises works."""
    checkout = tmp_path / "checkout"
    shutil.copytree(folder, checkout, ignore=shutil.ignore_patterns("custom_generate"))
    (checkout / "custom_generate").write_text("generation", encoding="utf-8")
    with pytest.warns(
        UserWarning, match=r"without symbolic links, as on Windows.* specformer\.generate\(.*save_pretrained"
    ):
        drafter = SpecFormerModel.from_pretrained(checkout)
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **SETTINGS)
    check(target, batch, reference, drafter, k=3, **SETTINGS)
    with pytest.raises(OSError):
        target.generate(**batch, **SETTINGS, custom_generate=str(checkout), trust_remote_code=True)
    drafter.save_pretrained(tmp_path / "whole")
    output = target.generate(
        **batch, **SETTINGS, assistant_model=drafter, custom_generate=str(tmp_path / "whole"), trust_remote_code=True
    )
    assert output.tolist() == reference.sequences.tolist()
