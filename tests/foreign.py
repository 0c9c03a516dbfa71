"""What the tests of other projects' drafters share: their files, their drafts round by round, and batches of them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from specformer import generate


def save(folder: Path, config: dict, weights: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def recorded(monkeypatch, drafter: type) -> list[list[list[int]]]:
    """The proposals of all rounds, as they come."""
    rounds, propose = [], drafter.propose

    def noted(self, num_tokens, choose):
        proposal = propose(self, num_tokens, choose)
        rounds.append(proposal.tokens.tolist())
        return proposal

    monkeypatch.setattr(drafter, "propose", noted)
    return rounds


def assert_drafts(rounds: list, text: list[int], written: int, most: int, expected_after) -> None:
    """The drafts of each round are those that `expected_after` names for the text until then."""
    for (drafts,) in rounds:
        assert drafts == expected_after(text[:written])[: len(drafts)]
        goes_on = text[written : written + min(most, len(text) - written)]
        right = [a == b for a, b in zip(drafts, goes_on, strict=False)]
        written += 1 + [*right, False].index(False)
    assert len(rounds) > 3


def assert_rows_draft_as_alone(target, drafter, batch: dict, compared: slice = slice(None), **settings):
    """Every row of a batch has the text, and the drafts, that it has alone. Returns what came of the batch.

    Args:
        compared: the tokens of which it is compared whether they were drafted.
    """
    settings = dict(prompt_lookup_num_tokens=0, num_assistant_tokens=4, return_dict_in_generate=True) | settings
    settings |= dict(max_new_tokens=14, eos_token_id=None, do_sample=False)
    together = generate(target, drafter, **batch, **settings)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = generate(target, drafter, batch["input_ids"][row][mask][None], **settings)
        assert alone.statistics.was_drafted[0][compared] == together.statistics.was_drafted[row][compared]
        assert alone.sequences[0].tolist()[-14:] == together.sequences[row].tolist()[-14:]
    return together
