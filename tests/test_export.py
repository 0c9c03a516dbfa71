"""Exported drafters: names, shapes and fields of each format, the same drafts there and back, and what is refused."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest
import torch
from dflash import WIDTH, random_weights, raw_config, speculators_config
from engine_formats import FIELDS, LAYER_FIELDS, LAYER_KIND, SHAPES
from foreign import recorded, save
from safetensors import safe_open
from test_eagle_and_pard import EAGLES
from test_exactness import meaningful_target
from test_parallelspec import checkpoint as parallelspec
from tiny import VOCAB, llama, ragged_batch

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation.drafter_dflash import DFlashDrafter
from specformer.generation.drafter_dflash_network import DFlashNetwork
from specformer.generation.drafter_eagle import EagleDrafter
from specformer.generation.drafter_loading import KINDS
from specformer.generation.drafter_parallelspec import ParallelSpecDrafter
from specformer.scripts import export
from specformer.scripts.parts.drafter_formats import FORMATS

MARKOV = dict(markov_rank=6, enable_confidence_head=True, confidence_head_with_markov=True)


def kinds(target) -> dict[str, tuple[dict, dict]]:
    """Config and weights of drafters, by what they are."""
    return {
        "DFlash": (raw_config(target), random_weights(target)),
        "DFlash, tokens of its own": (raw_config(target, draft_vocab_size=24), random_weights(target, draft_vocab=24)),
        "DFlash of speculators": (speculators_config(target), random_weights(target)),
        "DSpark": (
            speculators_config(target, "dspark", block_size=4, draft_vocab_size=24, **MARKOV),
            random_weights(target, draft_vocab=24, markov="vanilla", confidence=WIDTH + 6),
        ),
        "EAGLE-3 of SafeAILab": (EAGLES["SafeAILab"][0] | LAYERS, EAGLES["SafeAILab"][1]),
        "EAGLE-3": EAGLES["speculators"],
        "EAGLE-3, norms of heads": EAGLES["speculators, more norms"],
        "ParallelSpec": parallelspec(),
    }


LAYERS = dict(eagle_aux_hidden_state_layer_ids=[1, 2, 3])
"""In order, which those that SafeAILab's drafters read of four layers are not."""
CARRIED = {
    "DFlash": ["speculators", "dflash", "gguf-ready"],
    "DFlash, tokens of its own": ["speculators", "dflash", "gguf-ready"],
    "DFlash of speculators": ["speculators", "dflash", "gguf-ready"],
    "DSpark": ["speculators", "gguf-ready"],
    "EAGLE-3 of SafeAILab": ["speculators", "gguf-ready"],
    "EAGLE-3": ["speculators", "gguf-ready"],
    "EAGLE-3, norms of heads": ["speculators"],
    "ParallelSpec": ["speculators"],
}
PAIRS = [(kind, form) for kind, forms in CARRIED.items() for form in forms]


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    llama().save_pretrained(folder)
    return folder


def called(drafter: Path, target: Path, form: str, output: Path, num_assistant_tokens: int | None = None) -> Path:
    asked = dict(drafter=str(drafter), target=str(target), format=form, output=output)
    export.main(argparse.Namespace(**asked, num_assistant_tokens=num_assistant_tokens))
    return output


def exported(kind: str, form: str, target_folder: Path, tmp_path: Path) -> Path:
    drafter = save(tmp_path / "before", *kinds(llama())[kind])
    return called(drafter, target_folder, form, tmp_path / "out" / "after")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# ---- the formats


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_names_shapes_and_fields_are_those_of_the_format(kind: str, form: str, target_folder: Path, tmp_path: Path):
    folder = exported(kind, form, target_folder, tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    assert shapes == SHAPES[kind, form]
    config = config_of(folder)
    layers = config.pop("transformer_layer_config", None)
    if layers is None:  # they stand among the others
        layers = {name: config.pop(name) for name in list(config) if name not in FIELDS[kind, form]}
    model_type, count = next(known for part, known in LAYER_KIND.items() if part in kind)
    expected = LAYER_FIELDS | dict(model_type=model_type, num_hidden_layers=count, rope_theta=10000.0)
    expected["max_position_embeddings"] = layers["max_position_embeddings"]
    assert layers == expected
    if verifier := config.get("speculators_config", {}).get("verifier"):
        assert verifier.pop("name_or_path") == str(target_folder)
    assert config == FIELDS[kind, form]


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_it_drafts_the_same_after_the_way_there_and_back(
    kind: str, form: str, target_folder: Path, tmp_path: Path, monkeypatch
):
    target, batch = llama(), ragged_batch()
    after = exported(kind, form, target_folder, tmp_path)
    drafters = {"EAGLE": EagleDrafter, "Paral": ParallelSpecDrafter}
    rounds = recorded(monkeypatch, drafters.get(kind[:5], DFlashDrafter))
    settings = dict(max_new_tokens=10, eos_token_id=None, num_assistant_tokens=4, prompt_lookup_num_tokens=0)
    texts = []
    for folder in (tmp_path / "before", after):
        texts.append(generate(target, folder, **batch, **settings))
        texts.append(rounds[:])
        rounds.clear()
    assert torch.equal(texts[0], texts[2])
    assert texts[1] == texts[3]
    assert len({tuple(drafts) for proposal in texts[1] for drafts in proposal}) > 5  # they say something


def test_states_that_no_config_names_are_named(target_folder: Path, tmp_path: Path):
    """SafeAILab's drafters read those of some layers by the number of layers."""
    deep, folder = llama(num_hidden_layers=9), tmp_path / "target"
    deep.save_pretrained(folder)
    drafter = save(tmp_path / "before", *EAGLES["SafeAILab"])
    after = called(drafter, folder, "speculators", tmp_path / "after")
    assert config_of(after)["eagle_aux_hidden_state_layer_ids"] == [2, 4, 6]
    with pytest.raises(SystemExit, match=r"states \[2, 2, 1\], and engines give each once, in ascending order"):
        called(drafter, target_folder, "speculators", tmp_path / "other")


def test_how_many_tokens_a_round_drafts(target_folder: Path, tmp_path: Path):
    """What is asked for, else what the config says; of a block all."""

    def drafted(kind: str, said: int, asked: int | None = None) -> int:
        config, weights = kinds(llama())[kind]
        config = config | dict(speculators_config=dict(proposal_methods=[dict(speculative_tokens=said)]))
        output = tmp_path / f"{kind} {said} {asked}"
        called(save(tmp_path / "before", config, weights), target_folder, "speculators", output, asked)
        return config_of(output)["speculators_config"]["proposal_methods"][0]["speculative_tokens"]

    assert [drafted("EAGLE-3", 5), drafted("EAGLE-3", 5, 7), drafted("DFlash", 2), drafted("DFlash", 2, 3)] == [
        5,
        7,
        4,
        3,
    ]


def test_rotations_and_windows_are_kept(target_folder: Path, tmp_path: Path):
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    layers = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
    config = speculators_config(llama(), layers=dict(layers, rope_scaling=scaling), sliding_window_non_causal=True)
    before = save(tmp_path / "before", config, random_weights(llama()))
    after = called(before, target_folder, "speculators", tmp_path / "after")
    written = config_of(after)["transformer_layer_config"]
    assert dict(layers, use_sliding_window=True).items() <= written.items()
    assert written["rope_parameters"] == dict(scaling, rope_theta=10000.0)
    assert config_of(after)["sliding_window_non_causal"] is True


# ---- what is refused


def refused(config: dict, weights: dict, target: Path, form: str, tmp_path: Path) -> str:
    """The sentence, after which nothing is there."""
    drafter = save(tmp_path / "before", config, weights)
    with pytest.raises(SystemExit) as ended:
        called(drafter, target, form, tmp_path / "out" / "after")
    assert not (tmp_path / "out").exists()
    return str(ended.value)


@pytest.mark.parametrize(
    ("kind", "form", "message"),
    [
        ("DSpark", "dflash", "DFlash has no Markov head and no confidence head. Use --format speculators or gguf-"),
        ("EAGLE-3", "dflash", "one token after the other, and DFlash a block at once. Use --format speculators or gg"),
        ("ParallelSpec", "gguf-ready", "which speculators' P-EAGLE alone has. Use --format speculators."),
        ("EAGLE-3, norms of heads", "gguf-ready", "llama.cpp's EAGLE-3 does not; it norms each state or its output"),
    ],
)
def test_what_a_format_cannot_carry(kind: str, form: str, message: str, target_folder: Path, tmp_path: Path):
    sentence = refused(*kinds(llama())[kind], target_folder, form, tmp_path)
    assert sentence.startswith(f"Not exported. --format {form} cannot carry this ")
    assert message in sentence


WINDOW = dict(layer_types=["sliding_attention"] * 2, sliding_window=4, use_sliding_window=True)


@pytest.mark.parametrize(
    ("config", "weights", "form", "message"),
    [
        (
            lambda target: speculators_config(target, "dspark", markov_head_type="gated", markov_rank=6),
            dict(markov="gated"),
            "speculators",
            "its Markov head is 'gated', and engines have 'vanilla' alone. specformer.generate() runs it as it is.",
        ),
        (
            lambda target: speculators_config(target, "dspark", enable_confidence_head=True),
            dict(confidence=WIDTH),
            "speculators",
            "a confidence head, with a Markov head only",
        ),
        (
            lambda target: raw_config(target, **WINDOW),
            {},
            "speculators",
            "counted from each slot, and this format's from",
        ),
        (
            lambda target: speculators_config(target, layers=WINDOW),
            {},
            "dflash",
            "counted from the newest token, and this",
        ),
        (lambda target: raw_config(target, **WINDOW), {}, "gguf-ready", "sliding window, which are not translated"),
        (lambda target: raw_config(target) | dict(hidden_act="gelu"), {}, "gguf-ready", "its activation is gelu"),
        (
            lambda target: raw_config(target) | dict(vocab_size=VOCAB + 1),
            {},
            "dflash",
            "has 65 tokens and the target 64",
        ),
    ],
)
def test_what_else_a_format_cannot_carry(config, weights, form, message, target_folder: Path, tmp_path: Path):
    sentence = refused(config(llama()), random_weights(llama(), **weights), target_folder, form, tmp_path)
    assert message in sentence


def test_a_target_whose_embeddings_have_a_factor(tmp_path: Path):
    """z-lab's drafters read them with it, speculators' without."""
    target, *_ = meaningful_target("gemma3")
    target.save_pretrained(tmp_path / "target")
    sentence = refused(raw_config(target), random_weights(target), tmp_path / "target", "speculators", tmp_path / "raw")
    assert "embeddings with the factor that they have, and this format without. Use --format dflash." in sentence
    config = speculators_config(target)
    sentence = refused(config, random_weights(target), tmp_path / "target", "dflash", tmp_path / "speculators")
    assert "without the factor that they have, and this format with. Use --format speculators or gguf-ready" in sentence
    called(tmp_path / "raw" / "before", tmp_path / "target", "dflash", tmp_path / "after")
    assert (tmp_path / "after" / "config.json").exists()


def test_a_kind_of_its_own_is_refused(target_folder: Path, tmp_path: Path, monkeypatch):
    class Another(DFlashNetwork):
        kind = "Another"

    monkeypatch.setitem(KINDS, "DFlashDraftModel", (KINDS["DFlashDraftModel"][0], Another))
    sentence = refused(*kinds(llama())["DFlash"], target_folder, "speculators", tmp_path)
    assert "this Another drafter: it is of a kind that no format here has. specformer.generate() runs it" in sentence


def test_a_specformer_network_is_refused_with_the_alternative(target_folder: Path, tmp_path: Path):
    SpecFormerModel(SpecFormerConfig.from_target_config(llama().config)).save_pretrained(tmp_path / "drafter")
    with pytest.raises(SystemExit, match=r"which no engine has: .* specformer train --drafter dflash"):
        called(tmp_path / "drafter", target_folder, "speculators", tmp_path / "after")
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("pard_token", [None, 3])
def test_a_causal_lm_is_served_as_it_is(pard_token: int | None, target_folder: Path, tmp_path: Path):
    """The sentence says how, in a command line that a shell reads as it is meant."""
    assistant = llama(num_hidden_layers=2)
    if pard_token is not None:
        assistant.config.pard_token = pard_token
    assistant.save_pretrained(tmp_path / "assistant")
    with pytest.raises(SystemExit) as ended:
        called(tmp_path / "assistant", target_folder, "speculators", tmp_path / "after")
    words = shlex.split(str(ended.value).replace("llama.cpp", "").replace("'s", ""))
    settings = json.loads(words[words.index("--speculative-config") + 1].rstrip(".,"))
    assert settings["model"] == str(tmp_path / "assistant")
    assert settings.get("parallel_drafting", False) == (pard_token is not None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "of which no config.json could be read"),
        (dict(architectures=["SomethingElse"]), "holds SomethingElse; expected one of DFlashDraftModel"),
        (dict(architectures=["DFlashDraftModel"]), "is not that of a DFlash drafter"),
    ],
)
def test_what_is_no_drafter(config: dict | None, message: str, target_folder: Path, tmp_path: Path):
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    if config is not None:
        save(drafter, config, {"weight": torch.zeros(1)})
    with pytest.raises(SystemExit, match=message):
        called(drafter, target_folder, "speculators", tmp_path / "after")


def test_another_target_and_no_target(target_folder: Path, tmp_path: Path):
    drafter = save(tmp_path / "before", *kinds(llama())["DFlash"])
    wide = llama(hidden_size=48)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(SystemExit, match=r"does not fit .*hidden_size is 48 there and 32 here"):
        called(drafter, tmp_path / "wide", "dflash", tmp_path / "after")
    with pytest.raises(SystemExit, match=r"The target .*nowhere could not be read"):
        called(drafter, tmp_path / "nowhere", "dflash", tmp_path / "after")
    with pytest.raises(SystemExit, match="5 tokens were asked for each round; this drafter has 1 to 4"):
        called(drafter, target_folder, "dflash", tmp_path / "after", num_assistant_tokens=5)


# ---- the folder


def test_a_folder_with_something_in_it_is_left_alone(target_folder: Path, tmp_path: Path):
    drafter, there = save(tmp_path / "before", *kinds(llama())["DFlash"]), tmp_path / "after"
    there.mkdir()
    called(drafter, target_folder, "dflash", there)  # there was nothing in it
    (there / "config.json").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit, match="exists, and nothing there is overwritten"):
        called(drafter, target_folder, "speculators", there)
    assert (there / "config.json").read_text(encoding="utf-8") == "mine"


def test_what_breaks_off_leaves_nothing(target_folder: Path, tmp_path: Path, monkeypatch):
    drafter = save(tmp_path / "before", *kinds(llama())["DFlash"])

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(SystemExit, match=r"Not exported. .*could not be written \(No space left"):
        called(drafter, target_folder, "dflash", tmp_path / "out" / "after")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "form", "commands"),
    [
        ("DFlash", "speculators", ["vllm serve after\n"]),
        (
            "DFlash",
            "dflash",
            [
                '{"method": "dflash", "model": "after", "num_speculative_tokens": 4}',
                "--speculative-algorithm DFLASH --speculative-draft-model-path after\n",
            ],
        ),
        ("DFlash", "gguf-ready", ["convert_hf_to_gguf.py after --target-model-dir", "--spec-type draft-dflash"]),
        ("DSpark", "gguf-ready", ["--spec-type draft-dspark --spec-draft-n-max 4\n"]),
        ("EAGLE-3", "speculators", ["vllm serve after\n", "a folder of the machine on which this was written"]),
        ("EAGLE-3", "gguf-ready", ["--spec-type draft-eagle3", "--speculative-algorithm EAGLE3"]),
    ],
)
def test_card_and_output_say_how_to_serve_it(kind, form, commands, target_folder: Path, tmp_path: Path, capsys):
    folder = exported(kind, form, target_folder, tmp_path)
    card, shown = (folder / "README.md").read_text(encoding="utf-8"), capsys.readouterr().out
    for command in commands:
        assert command in card
        if "a folder of" not in command:
            assert command.replace("after", str(folder)) in shown
    assert 'specformer.generate(target, "after", **inputs)' in card
    assert str(tmp_path) not in card and str(target_folder) not in card  # folders are nobody else's business


def test_every_format_is_tried():
    assert {form for forms in CARRIED.values() for form in forms} == set(FORMATS)
    assert {kind for kind, _ in PAIRS} == set(kinds(llama()))
