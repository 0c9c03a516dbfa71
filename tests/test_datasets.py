"""`datasets` fingerprints what it maps by dill, the drafter that a function holds with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModel

ROOT = Path(__file__).resolve().parents[1]


def test_functions_that_hold_a_drafter_are_fingerprinted():
    fingerprint = pytest.importorskip("datasets.fingerprint")
    drafter = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    assert type(drafter).__module__.startswith("transformers_modules.")
    assert len({fingerprint.Hasher.hash(lambda row: (drafter, row)) for _ in range(2)}) == 1
