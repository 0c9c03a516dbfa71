"""The ways in: a repository's `custom_generate`, the installed package, and what the wrong calls answer."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exactness import Recorder
from safetensors.torch import load_file, save_file
from tiny import llama, ragged_batch
from transformers import AutoConfig, AutoModel, PreTrainedModel, dynamic_module_utils

from specformer import SpecFormerConfig, SpecFormerModel, generate

ROOT = Path(__file__).resolve().parents[1]
GENERATION = ROOT / "generation"
REMOTE_CODE = [*sorted(ROOT.glob("*_specformer.py")), *sorted(GENERATION.glob("*.py"))]
NEW_TOKENS = 12
SAMPLING = dict(do_sample=True, temperature=1.3, top_k=20)


@pytest.fixture
def target() -> PreTrainedModel:
    return llama(torch.float32)


@pytest.fixture
def repository(tmp_path: Path, target: PreTrainedModel) -> Path:
    """A drafter as it is published: weights, remote code, and the strategy as files."""
    folder = tmp_path / "tiny-specformer"
    SpecFormerModel(SpecFormerConfig.from_target_config(target.config)).save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder, trust_remote_code=True)


def strategy(folder: Path) -> dict:
    return dict(assistant_model=load(folder), custom_generate=str(folder), trust_remote_code=True)


def seeded(call, *args, seed: int = 3, **arguments):
    torch.manual_seed(seed)
    return call(*args, **arguments)


# ---- a repository


@pytest.mark.parametrize("sampling", [{}, SAMPLING, dict(SAMPLING, num_return_sequences=3)], ids=str)
def test_repository_equals_plain(repository: Path, target: PreTrainedModel, sampling: dict):
    arguments = dict(ragged_batch(), max_new_tokens=NEW_TOKENS, **sampling)
    recorders = Recorder(), Recorder()
    reference = seeded(target.generate, streamer=recorders[0], **arguments)
    state = torch.get_rng_state()
    sequences = seeded(target.generate, streamer=recorders[1], **arguments, **strategy(repository))
    assert torch.equal(sequences, reference)
    assert torch.equal(torch.get_rng_state(), state)
    assert recorders[1].calls == recorders[0].calls
    assert recorders[0].calls[-1] == "end"


def test_repository_runs_its_own_code(repository: Path, target: PreTrainedModel):
    """Neither network nor strategy comes from the installed package."""
    drafter = load(repository)
    assert type(drafter).__module__.startswith("transformers_modules")
    file = repository / "custom_generate" / "generate.py"
    marked = file.read_text().replace("def generate(", "def generate(*_, **__):\n    return 'mine'\n\n\ndef _generate(")
    file.write_text(marked)
    output = target.generate(
        **ragged_batch(), assistant_model=drafter, custom_generate=str(repository), trust_remote_code=True
    )
    assert output == "mine"


def test_published_repository_is_complete(repository: Path):
    """save_pretrained() writes the remote code that config.json names."""
    config = AutoConfig.from_pretrained(repository, trust_remote_code=True)
    assert set(config.auto_map) == {"AutoConfig", "AutoModel"}
    for reference in config.auto_map.values():
        assert (repository / f"{reference.split('.')[0]}.py").is_file()


def test_statistics(repository: Path, target: PreTrainedModel):
    arguments = dict(ragged_batch(), max_new_tokens=NEW_TOKENS, eos_token_id=None, return_dict_in_generate=True)
    reference = target.generate(**arguments)
    output = target.generate(**arguments, **strategy(repository), num_assistant_tokens=3)
    assert torch.equal(output.sequences, reference.sequences)
    statistics = output.statistics
    assert statistics.tokens_per_row == [NEW_TOKENS] * 5
    assert len(statistics.drafted_per_slot) == 3
    assert 1 <= statistics.rounds < NEW_TOKENS
    assert all(tokens >= 1 for tokens in statistics.tokens_per_pass_per_row)
    assert all(0 <= a <= d for a, d in zip(statistics.accepted_per_slot, statistics.drafted_per_slot, strict=True))


@pytest.mark.parametrize("trust", [{}, dict(trust_remote_code=False)], ids=["unset", "False"])
def test_without_trust_remote_code(repository: Path, target: PreTrainedModel, trust: dict, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)  # otherwise it asks the terminal
    arguments = dict(assistant_model=load(repository), custom_generate=str(repository), **trust)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        target.generate(**ragged_batch(), **arguments)


def test_hub_arguments_pass_through(repository: Path, target: PreTrainedModel, tmp_path: Path):
    hub = dict(revision="main", code_revision=None, token=None, cache_dir=str(tmp_path / "cache"))
    hub.update(local_files_only=True, force_download=False, subfolder="")
    arguments = dict(ragged_batch(), max_new_tokens=NEW_TOKENS)
    reference = target.generate(**arguments)
    assert torch.equal(target.generate(**arguments, **strategy(repository), **hub), reference)


def test_every_argument_of_generate_passes_through(repository: Path, target: PreTrainedModel):
    """generate() hands over all of its named arguments, those that nobody set included."""
    batch = ragged_batch()
    spy: list[int] = []

    def criterion(input_ids, scores, **kwargs):
        spy.append(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool)

    arguments = dict(
        inputs=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        logits_processor=[lambda input_ids, scores: scores.roll(1, -1)],
        stopping_criteria=[criterion],
        prefix_allowed_tokens_fn=lambda row, input_ids: list(range(row, 64)),
        synced_gpus=False,
        negative_prompt_ids=None,
        use_cache=True,
    )
    reference = target.generate(**arguments)
    asked = spy.copy()
    spy.clear()
    assert torch.equal(target.generate(**arguments, **strategy(repository)), reference)
    # a length may come again once rows are apart, and at max_length the answer is of no use
    assert set(spy) == {length for length in asked if length < 9 + NEW_TOKENS}


def test_bf16_drafter_computes_in_the_targets_dtype(repository: Path, target: PreTrainedModel):
    load(repository).to(torch.bfloat16).save_pretrained(repository)
    drafter = AutoModel.from_pretrained(repository, trust_remote_code=True)
    assert drafter.dtype == torch.bfloat16
    arguments = dict(ragged_batch(), max_new_tokens=NEW_TOKENS)
    reference = target.generate(**arguments)
    sequences = target.generate(
        **arguments, assistant_model=drafter, custom_generate=str(repository), trust_remote_code=True
    )
    assert torch.equal(sequences, reference)
    assert {parameter.dtype for parameter in drafter.parameters()} == {torch.bfloat16}  # it may have another target too
    assert {parameter.dtype for parameter in target.parameters()} == {torch.float32}


# ---- the package


@pytest.mark.parametrize("sampling", [{}, SAMPLING, dict(SAMPLING, num_return_sequences=2)], ids=str)
def test_package_equals_plain(repository: Path, target: PreTrainedModel, sampling: dict):
    arguments = dict(ragged_batch(), max_new_tokens=NEW_TOKENS, **sampling)
    reference = seeded(target.generate, **arguments)
    for drafter in (load(repository), SpecFormerModel.from_pretrained(repository)):
        assert torch.equal(seeded(generate, target, drafter, **arguments), reference)


def test_package_takes_positional_inputs(repository: Path, target: PreTrainedModel):
    prompt = ragged_batch(padding=(0,))["input_ids"]
    reference = target.generate(prompt, max_new_tokens=NEW_TOKENS)
    assert torch.equal(generate(target, load(repository), prompt, max_new_tokens=NEW_TOKENS), reference)


def test_package_has_no_other_names():
    import specformer

    with pytest.raises(AttributeError, match=r"'nothing'.*SpecFormerModel"):
        _ = specformer.nothing


# ---- calls that cannot work say what would


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("source", ["repository", "package"])
def test_plain_assisted_generation_says_what_to_pass(
    repository: Path, target: PreTrainedModel, batch_size: int, source: str
):
    drafter = load(repository) if source == "repository" else SpecFormerModel.from_pretrained(repository)
    with pytest.raises((AttributeError, ValueError)) as caught:
        target.generate(**ragged_batch(padding=(0, 3, 5)[:batch_size]), max_new_tokens=4, assistant_model=drafter)
    assert "custom_generate" in str(caught.value)


def test_drafter_does_not_generate(repository: Path):
    drafter = load(repository)
    with pytest.raises(AttributeError) as caught:
        drafter.generate(**ragged_batch())
    for part in ("custom_generate", "trust_remote_code=True", "specformer.generate"):
        assert part in str(caught.value)
    with pytest.raises(AttributeError, match="nothing"):
        _ = drafter.nothing


def test_repository_without_a_strategy(repository: Path, target: PreTrainedModel):
    drafter = load(repository)
    shutil.rmtree(repository / "custom_generate")
    with pytest.raises(OSError, match="custom_generate"):
        target.generate(
            **ragged_batch(), assistant_model=drafter, custom_generate=str(repository), trust_remote_code=True
        )


# ---- checkpoints


@pytest.mark.parametrize("loader", [SpecFormerModel, AutoModel], ids=lambda loader: loader.__name__)
@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_broken_checkpoint(repository: Path, loader: type, fault: str):
    assert loader.from_pretrained(repository, trust_remote_code=True)
    weights = load_file(repository / "model.safetensors")
    if fault == "missing":
        name = "positional_ffn.bias"
        del weights[name]
    else:
        name = "second_layer.weight"
        weights[name] = torch.zeros(2)
    save_file(weights, repository / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        loader.from_pretrained(repository, trust_remote_code=True)
    for part in (str(repository), f"{fault}_keys", name, "save_pretrained"):
        assert part in str(caught.value)


# ---- this checkout


def test_checkout_is_loadable(tmp_path: Path):
    """The checkout is a repository as published: in a fresh process, with nothing but torch and transformers."""
    for name in ("config.json", "model.safetensors"):
        if not (ROOT / name).exists():
            pytest.skip(f"{name} is not in the checkout")
    program = f"""
from transformers import AutoModel
from transformers.dynamic_module_utils import get_cached_module_file, get_class_in_module
drafter = AutoModel.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
assert type(drafter).__module__.startswith("transformers_modules"), type(drafter).__module__
file = get_cached_module_file({str(ROOT)!r}, module_file="custom_generate/generate.py")
assert not HIDDEN & sys.modules.keys(), HIDDEN & sys.modules.keys()
print(type(drafter).__name__, get_class_in_module("generate", file).__name__)
"""
    program = (ROOT / "tests" / "clean_environment.py").read_text() + program
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SpecFormerModel", "generate"]


def test_custom_generate_is_generation():
    assert (ROOT / "custom_generate").resolve() == GENERATION
    assert (ROOT / "custom_generate" / "generate.py").is_file()


@pytest.mark.parametrize("file", REMOTE_CODE, ids=lambda file: file.name)
def test_remote_code_imports(file: Path):
    """Transformers copies the files that a remote file imports relatively, from its own folder, and no others."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"line {node.lineno}: not a flat import"
            assert node.module and "." not in node.module, f"line {node.lineno}: not `from .name import`"
            assert (file.parent / f"{node.module}.py").is_file(), f"line {node.lineno}: no file {node.module}.py"
            continue
        else:
            continue
        for name in names:
            top = name.split(".")[0]
            allowed = {"torch", "transformers", "huggingface_hub", "safetensors"}  # the last two come with transformers
            assert top in allowed or top in sys.stdlib_module_names, f"line {node.lineno}: {name}"
