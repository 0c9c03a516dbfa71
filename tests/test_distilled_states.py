"""Hidden states kept while answering: those that reading the answers gives, found again by training, never mixed up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from architectures import make_target
from test_distill import NEW_TOKENS, distilled, prompt_file_of, prompts, saved_target  # noqa: F401, a fixture
from tiny import llama

from specformer.configuration_specformer import SpecFormerConfig
from specformer.modeling_specformer import SpecFormerModel
from specformer.scripts import train
from specformer.scripts.parts import stored_states
from specformer.scripts.parts.answering import Answer, Answering
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.distilled_states import OF_WHAT, DistilledStates, StatesWriter, begin_states
from specformer.scripts.parts.kinds.student import target_states
from specformer.scripts.parts.stored_states import StoredStates
from specformer.target_specformer import BorrowedTarget


def borrowed_by_drafter(target) -> BorrowedTarget:
    """What a new drafter of default layers borrows."""
    return SpecFormerModel(SpecFormerConfig.from_target_config(target.config)).borrow(target)


def distil(folder: Path, target, layer_ids: list[int], indices=range(9), batch_size: int = 4) -> Answers:
    """Answers to some prompts with their states, added to those in `folder`."""
    texts, path = prompts(), folder / "answers-00000.jsonl"
    begin_states(folder, target, layer_ids)
    writer = StatesWriter(path, len(layer_ids) * target.config.get_text_config(decoder=True).hidden_size)
    answering = Answering(target, batch_size, NEW_TOKENS, layer_ids=layer_ids)
    with open(path, "a", encoding="utf-8") as file:
        for answer in answering.run(Answer(index, texts[index]) for index in indices):
            writer.append(answer)
            file.write(answer.to_json() + "\n")
    writer.close()
    return Answers(folder, 100)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral-sliding"])
def test_they_are_those_of_reading_the_text(name: str, tmp_path: Path):
    target = make_target(name, seed=3)
    borrowed = borrowed_by_drafter(target)
    answers = distil(tmp_path, target, borrowed.layer_ids)
    distilled = DistilledStates(answers, borrowed)
    assert len(answers) == 9
    for index, row in enumerate(answers):
        read, kept = target_states(borrowed, Answers.collate([row]))[0], distilled.get(index)
        assert kept is not None and kept.shape == read.shape
        torch.testing.assert_close(kept[:-1], read[:-1].bfloat16(), rtol=0.01, atol=0.01)
        assert not kept[-1].any()


def test_texts_that_are_cut_and_texts_without(tmp_path: Path):
    """Those whose states are not kept are read, the others are not."""
    target = llama()
    borrowed = borrowed_by_drafter(target)
    distil(tmp_path, target, borrowed.layer_ids)
    with open(tmp_path / "answers-00001.jsonl", "w", encoding="utf-8") as file:
        file.write(Answer(20, [5, 6, 7], [8, 9]).to_json() + "\n")
    answers = Answers(tmp_path, 16)
    stored = StoredStates(answers, borrowed, tmp_path / "read.bin")
    stored.fill(range(len(answers)))
    assert stored.done.tolist() == [0] * (len(answers) - 1) + [1]
    assert any(len(tokens) == 16 for tokens, _, _ in stored)
    for tokens, labels, states in stored:
        read = target_states(borrowed, Answers.collate([(tokens, labels)]))[0]
        torch.testing.assert_close(states[:-1], read[:-1].bfloat16(), rtol=0.01, atol=0.01)


def test_what_an_interruption_left_is_not_taken_for_another_text(tmp_path: Path):
    """States without their answer, half a token, and states that were lost."""
    target = llama()
    borrowed = borrowed_by_drafter(target)
    distil(tmp_path, target, borrowed.layer_ids, range(5))
    with open(tmp_path / "states-00000.bin", "ab") as file:
        file.write(b"\x01" * 999)
    answers = distil(tmp_path, target, borrowed.layer_ids, range(5, 9))
    distilled = DistilledStates(answers, borrowed)
    for index, row in enumerate(answers):
        read, kept = target_states(borrowed, Answers.collate([row]))[0], distilled.get(index)
        assert kept is not None
        torch.testing.assert_close(kept[:-1], read[:-1].bfloat16(), rtol=0.01, atol=0.01)
    with open(tmp_path / "states-00000.bin", "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    distilled = DistilledStates(answers, borrowed)
    assert [distilled.get(index) is None for index in range(9)] == [False] * 8 + [True]
    for empty in (True, False):  # a file without states, and no file
        if empty:
            (tmp_path / "states-00000.bin").write_bytes(b"")
        else:
            (tmp_path / "states-00000.bin").unlink()
        assert all(DistilledStates(answers, borrowed).get(index) is None for index in range(9))
    with pytest.raises(ValueError, match=r"states-00000\.bin holds states of .* some were lost"):
        distil(tmp_path, target, borrowed.layer_ids, range(9, 12))


def test_those_of_others_are_not_used(tmp_path: Path):
    target = llama()
    borrowed = borrowed_by_drafter(target)
    answers = distil(tmp_path, target, borrowed.layer_ids)
    with torch.no_grad():
        other = llama()
        other.model.layers[-1].mlp.up_proj.weight.mul_(1.001)
    with pytest.warns(UserWarning, match=r"states in .* are those of another target .* read anew"):
        assert DistilledStates(answers, borrowed_by_drafter(other)).get(0) is None
    with pytest.raises(ValueError, match=r"holds hidden states of another target .* Name another folder"):
        begin_states(tmp_path, other, borrowed.layer_ids)
    with pytest.raises(ValueError, match="or of other layers"):
        begin_states(tmp_path, target, [0, 1])
    assert json.loads((tmp_path / OF_WHAT).read_text())["target_layer_ids"] == borrowed.layer_ids
    # the same weights in another precision are the same target
    as_single = llama().to(torch.float32)
    assert DistilledStates(answers, borrowed_by_drafter(as_single)).usable


def test_training_reads_no_answer_again(saved_target: Path, tmp_path: Path, monkeypatch):  # noqa: F811
    words = [" ".join(f"w{6 + (index * 7 + step) % 58}" for step in range(1 + index % 9)) for index in range(20)]
    prompt_file = prompt_file_of(tmp_path, *({"prompt": text} for text in words))
    options = ("--store-hidden-states", "--max-new-tokens", "12", "--batch-size", "4")
    folder = distilled(monkeypatch, prompt_file, saved_target, *options)
    monkeypatch.setattr(stored_states, "target_states", lambda *_: pytest.fail("an answer was read"))
    places = ["--data", folder, "--target", saved_target, "--output", tmp_path / "drafter"]
    few = ["--store-hidden-states", "--epochs", "1", "--evaluations", "1", "--held-out", "4"]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, places), *few])
    train.main(train.parse())
    assert (tmp_path / "drafter" / "model.safetensors").exists()
