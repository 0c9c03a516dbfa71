"""What depends on the version of transformers is told by what is there, and stands in one place."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import llama, ragged_batch
from transformers import DynamicCache

import specformer
from specformer import generate
from specformer.generation import backend_versions as versions
from specformer.generation import target_probe as probe
from specformer.generation.target_refusals import UnsupportedTargetError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def newer(monkeypatch):
    """A transformers of the day after the newest tested one."""
    monkeypatch.setattr(versions.transformers, "__version__", "99.1.0.dev0")
    versions.warn_if_untested.cache_clear()
    yield "99.1.0.dev0"
    versions.warn_if_untested.cache_clear()


def test_one_warning_in_a_process_on_a_newer_version(newer):
    target, batch = llama(), ragged_batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            generate(target, **batch, max_new_tokens=2, prompt_lookup_num_tokens=2)
    ours = [str(each.message) for each in caught if "SpecFormer" in str(each.message)]
    assert len(ours) == 1
    assert re.search(
        rf"transformers {newer} is newer than {versions.NEWEST_TESTED}, the newest that .* tested", ours[0]
    )


def test_no_warning_on_what_was_tested():
    assert versions.numbers(transformers.__version__) <= versions.numbers(versions.NEWEST_TESTED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested.cache_clear()
        versions.warn_if_untested()
    assert versions.untested() == ""


def refuse_by_signature(target, monkeypatch):
    def renamed(input_ids=None, attention_mask=None, position_ids=None, keys_and_values=None, **kwargs): ...

    monkeypatch.setattr(target, "forward", renamed)


def refuse_by_trial(target, monkeypatch):
    def fails(*args, **kwargs):
        raise TypeError("got an unexpected keyword argument")

    monkeypatch.setattr(probe, "verify", fails)


@pytest.mark.parametrize("break_it", [refuse_by_signature, refuse_by_trial])
@pytest.mark.parametrize("is_newer", [True, False])
def test_refusals_end_with_the_sentence_on_a_newer_version(break_it, is_newer: bool, monkeypatch, request):
    """What cannot be done any more may be new: the reader learns that, and what to do."""
    if is_newer:
        request.getfixturevalue("newer")
    target = llama()
    break_it(target, monkeypatch)
    with warnings.catch_warnings(), pytest.raises(UnsupportedTargetError) as caught:
        warnings.simplefilter("ignore")
        generate(target, **ragged_batch(), max_new_tokens=2, prompt_lookup_num_tokens=2)
    message = str(caught.value)
    assert ("is newer than" in message) == is_newer
    assert not is_newer or message.endswith("update specformer and the drafter.)")


@pytest.mark.parametrize("name", versions.CACHE_NAMES)
def test_the_cache_goes_in_and_out_by_either_name(name: str):
    """Remote code may still use the old name, in one place or in both."""
    scope: dict = {}
    exec(f"def forward(input_ids=None, {name}=None): ...", scope)

    def old(input_ids, past_key_values=None, **kwargs):
        return dict(input_ids=input_ids, past_key_values=past_key_values)

    def new(input_ids, cache=None, **kwargs):
        return dict(input_ids=input_ids, cache=cache)

    def any_name(input_ids, **kwargs):
        return dict(input_ids=input_ids, **kwargs)

    cache, ids = DynamicCache(), torch.zeros(1, 2)
    for prepare in (old, new, any_name):
        model = SimpleNamespace(forward=scope["forward"], prepare_inputs_for_generation=prepare)
        assert versions.prepared_inputs(model, ids, cache) == {"input_ids": ids, name: cache}
        assert versions.cache_argument(model, cache) == {name: cache}
    assert versions.cache_of({"logits": 1, name: cache}) is cache
    assert versions.cache_of({"logits": 1}) is None


def test_the_pinned_version_is_the_newest_tested_one():
    pinned = re.search(r"^transformers==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert pinned and pinned[1] == versions.NEWEST_TESTED


def test_names_that_changed_stand_in_one_file():
    """The old name of the cache, and private names of transformers that its versions module covers."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "generation").glob("*.py")]:
        if path.name == "backend_versions.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\.past_key_values\b|_pad_token_tensor|_is_stateful|__version__", text), path


def test_no_warning_of_ours_about_old_names():
    """A call of each kind, in a process in which such warnings are errors."""
    program = (
        "import sys, warnings; sys.path.insert(0, sys.argv[1]); warnings.simplefilter('error', FutureWarning)\n"
        "from tiny import llama, ragged_batch\n"
        "from specformer import SpecFormerConfig, SpecFormerModel, generate\n"
        "target, batch = llama(), ragged_batch()\n"
        "network = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))\n"
        "for drafter, settings in ((network, {}), (llama(seed=3), {}), (None, dict(prompt_lookup_num_tokens=3))):\n"
        "    generate(target, drafter, **batch, max_new_tokens=8, return_dict_in_generate=True, **settings)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)], capture_output=True, text=True, encoding="utf-8"
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "deprecated" not in run.stderr, run.stderr


def test_the_package_says_what_it_has():
    assert {"Drafter", "Proposal", "SpecFormerConfig", "SpecFormerModel", "generate"} <= set(specformer.__all__)
