"""Every family of targets under every kind of drafter with a network, which learnt a little of that target's own text:
plain generate()'s tokens, whatever is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import FAMILIES
from exactness import check, plain
from foreign import save
from test_dflash import checkpoints
from test_exactness import NEW_TOKENS, SAMPLING, meaningful_target
from test_kinds import make_student

from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.losses import IGNORED, drafter_loss

KINDS = ["dflash", "dspark", "eagle3", "falcon", "parallelspec", "pard"]
STEPS = 15


def taught(kind: str, target, batch: dict, sequences: torch.Tensor):
    """A drafter that saw these texts (B, T) for so few steps that it is right now and then."""
    width, rows = batch["input_ids"].shape[1], []
    for mask, sequence in zip(batch["attention_mask"].bool(), sequences, strict=True):
        tokens = torch.cat([sequence[:width][mask], sequence[width:]])
        rows.append((tokens, tokens.masked_fill(torch.arange(len(tokens)) < mask.sum(), IGNORED)))
    student = make_student(kind, target, rows)
    learning = [each for each in student.network.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    for _ in range(STEPS):
        student.loss(student.network, Answers.collate(rows), drafter_loss, 1.0, 0, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.network.eval().requires_grad_(False)


IN_EVERY_RUN = [("gpt2", "pard")]  # whose layers have another name than most


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in IN_EVERY_RUN else pytest.mark.slow)
        for name in FAMILIES
        for kind in KINDS
    ],
)
def test_every_family_under_every_kind(name: str, kind: str, tmp_path: Path):
    target, batch, eos = meaningful_target(name)
    settings = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)
    unstopped = plain(target, batch, **settings)
    if kind == "dspark":  # nothing here trains one
        drafter = save(tmp_path, *checkpoints(target)[kind][:2])
    else:
        drafter = taught(kind, target, batch, unstopped.sequences)
    # a causal LM drafts chains, and not beside copies
    alone, tree = ({}, {}) if kind == "pard" else (dict(prompt_lookup_num_tokens=0), dict(tree_size=12))
    accepted = drafted = 0
    for changes in ({}, dict(eos_token_id=eos), dict(SAMPLING, eos_token_id=eos)):
        arguments = settings | changes
        reference = plain(target, batch, **arguments) if changes else unstopped
        for k, more in ((1, alone), (4, alone), (4, tree), ("auto", {})):
            statistics = check(target, batch, reference, drafter, k, **more, **arguments)
            accepted += sum(statistics.accepted_per_slot)
            drafted += sum(statistics.drafted_per_slot)
    assert 0 < accepted < drafted
