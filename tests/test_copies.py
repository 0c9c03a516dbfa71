"""Any number of copies of this code in one process, in any number of threads: package, folders, Hub ids.

Each copy has module-level variables of its own. What belongs to the process they share, and leave as they found it.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_bad_input import drafter_for
from tiny import llama, ragged_batch
from transformers import AttentionInterface, AutoModel

from specformer.generation.generate import generate

ROOT = Path(__file__).parent.parent
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two drafters' repositories with the code of this checkout, which transformers loads as two copies."""
    made = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp("copies") / name
        drafter_for(llama()).save_pretrained(folder)
        made.append(str(folder))
    return made


@pytest.fixture(autouse=True)
def one_syntax_tree_at_a_time(monkeypatch):
    """transformers parses the code of custom_generate=<folder> in every call, and ast.parse in two threads ends in
    "SystemError: AST constructor recursion depth mismatch" before CPython 3.11.8 and 3.12.2 (its issue 106905)."""
    parse, lock = ast.parse, threading.Lock()

    def in_turn(*args, **kwargs):
        with lock:
            return parse(*args, **kwargs)

    if sys.version_info[:3] < (3, 11, 8) or (3, 12) <= sys.version_info[:3] < (3, 12, 2):
        monkeypatch.setattr(ast, "parse", in_turn)


def state_of_process() -> tuple:
    return (
        AttentionInterface()["sdpa"],
        sorted(AttentionInterface()),
        torch._dynamo.eval_frame._stance.stance,
        torch.backends.mkldnn.enabled,
        torch.get_default_dtype(),
    )


def prepared(implementation: str):
    """A target of each kind, and the texts that plain generate() writes with it before any copy has run."""
    eager = implementation == "eager"  # which is NaN in float64 where a row is padded, in plain generate() as well
    target = llama(torch.float32 if eager else torch.float64, attn_implementation="eager" if eager else "sdpa")
    batch = ragged_batch()
    greedy = target.generate(**batch, max_new_tokens=NEW_TOKENS).tolist()
    if implementation == "compiled":
        for layer in target.model.layers:
            layer.compile(backend="eager")
    return target, batch, greedy


@pytest.mark.parametrize("implementation", ["sdpa", "eager", pytest.param("compiled", marks=pytest.mark.one_version)])
@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_copies_in_threads_leave_everything_as_it_was(folders, implementation, rounds):
    """Four threads, two copies and the package: afterwards plain generate() of another model runs, and nothing that
    the process has one of is another one."""
    before = state_of_process()
    other = llama(seed=5)
    other_text = other.generate(**ragged_batch(), max_new_tokens=NEW_TOKENS).tolist()
    targets = [prepared(implementation) for _ in range(2)]
    drafters = [AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in folders]
    assert len({type(drafter) for drafter in drafters}) == 2  # two copies indeed

    def by_folder(which: int, **arguments):
        target, batch, _ = targets[which]
        return target.generate(
            **batch,
            **arguments,
            max_new_tokens=NEW_TOKENS,
            assistant_model=drafters[which],
            custom_generate=folders[which],
            trust_remote_code=True,
            num_assistant_tokens=3,
        )

    def by_package(which: int, **arguments):
        target, batch, _ = targets[which]
        return generate(
            target, drafters[which], **batch, **arguments, max_new_tokens=NEW_TOKENS, num_assistant_tokens=3
        )

    def sampled(call, which):  # of its own seeds, since threads share torch's generator
        return call(which, do_sample=True, acceptance="coupled", seed=7)

    calls = [
        lambda: by_folder(0),
        lambda: by_folder(1),
        lambda: by_package(0),
        lambda: by_package(1),
        lambda: sampled(by_folder, 0),
        lambda: sampled(by_folder, 1),
        lambda: sampled(by_package, 0),
        lambda: sampled(by_package, 1),
    ]
    expected = [targets[0][2], targets[1][2]] * 2 + [call().tolist() for call in calls[4:]]
    gate = threading.Barrier(4)

    def together(index: int):
        gate.wait(timeout=60)
        return calls[index]().tolist()

    with ThreadPoolExecutor(4) as pool:
        for number in range(rounds):
            chosen = [(number + step) % 8 for step in (0, 1, 2, 3)] if number % 2 else [0, 1, 4, 5]
            texts = list(pool.map(together, chosen))
            assert texts == [expected[index] for index in chosen]

    assert state_of_process() == before
    assert other.generate(**ragged_batch(), max_new_tokens=NEW_TOKENS).tolist() == other_text
    assert targets[0][0].generate(**targets[0][1], max_new_tokens=NEW_TOKENS).tolist() == targets[0][2]


def test_one_copy_samples_with_a_stream_of_its_own_while_another_replays_the_generator(folders):
    """Two calls that replay torch's generator at the same time draw the same numbers, whatever copies they are of."""
    from specformer.generation import accept_noise as noise
    from specformer.generation import backend_process as process_wide

    target, batch, _ = prepared("sdpa")
    target.generate(
        **batch, max_new_tokens=2, prompt_lookup_num_tokens=2, custom_generate=folders[0], trust_remote_code=True
    )
    copies = [
        module._replayed
        for name, module in list(sys.modules.items())
        if name.endswith(".accept_noise") and hasattr(module, "_replayed")
    ]
    assert len(copies) >= 2 and all(copy is noise._replayed for copy in copies)
    assert process_wide.shared("replayed", set) is noise._replayed


def test_a_function_that_somebody_registered_stays(folders):
    """Nothing is folded then, and theirs runs in every pass."""
    calls = []
    original = AttentionInterface()["sdpa"]

    def theirs(*args, **kwargs):
        calls.append(args[1].shape[2])
        return original(*args, **kwargs)

    target, batch, text = prepared("sdpa")
    AttentionInterface.register("sdpa", theirs)
    try:
        for folder in folders:
            found = target.generate(
                **batch,
                max_new_tokens=NEW_TOKENS,
                prompt_lookup_num_tokens=3,
                custom_generate=folder,
                trust_remote_code=True,
            )
            assert found.tolist() == text
        assert AttentionInterface()["sdpa"] is theirs
        assert any(width > 1 for width in calls)
    finally:
        AttentionInterface.register("sdpa", original)


def test_model_that_is_switched_by_one_copy_stays_switched_for_the_other(tmp_path):
    """A target whose attention takes no mask per row is switched while any copy is inside."""
    copies = []
    for name in ("first_copy", "second_copy"):
        package = ModuleType(name)
        package.__path__ = [str(shutil.copytree(ROOT / "generation", tmp_path / name))]
        sys.modules[name] = package
        copies.append(importlib.import_module(f"{name}.target_attention"))
    target = llama()
    target.set_attn_implementation("flex_attention")
    first, second = (copy.usable_attention(target) for copy in copies)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert copies[1].attention_of(target) == "sdpa"
    second.__exit__(None, None, None)
    assert copies[1].attention_of(target) == "flex_attention"
