"""Shared fixtures. Tiny models run on one thread: with two they are many times slower beside another process."""

import os
import tempfile

# Remote code is copied into and imported from a folder of this run, set before transformers is imported.
modules_cache = tempfile.TemporaryDirectory(prefix="specformer-modules-")
os.environ["HF_MODULES_CACHE"] = modules_cache.name
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("specformer", deadline=None)  # no test fails because the machine is busy
settings.load_profile("specformer")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def prompts_in_groups(monkeypatch, request):
    """The short prompts of the tests are read in several groups, as long ones are."""
    from specformer.generation import prompt_groups

    if not request.node.get_closest_marker("real"):
        monkeypatch.setattr(prompt_groups, "PASS_ON_CPU", 3)


@pytest.fixture(scope="session")
def real_target():
    """Folder of SmolLM2-135M-Instruct; the test is skipped where it can neither be found nor fetched."""
    from specformer.scripts.fetch_target import fetch_target

    try:
        return fetch_target()
    except RuntimeError as error:
        pytest.skip(f"the default target is not here: {error}")
