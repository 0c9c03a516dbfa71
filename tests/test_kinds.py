"""Drafters of every kind that `train` makes: what is learnt in one packed pass is what decoding drafts, what is saved
loads, and the text is the target's own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from test_offline import LENGTHS, SLOTS, make_answers

from specformer import generate
from specformer.generation.call_drafter import drafter_of_network
from specformer.generation.drafter import Prompts
from specformer.generation.drafter_parallel import ParallelDrafter
from specformer.generation.prompt import PromptLayout
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.kinds.all import KINDS
from specformer.scripts.parts.losses import IGNORED, drafter_loss
from specformer.scripts.parts.offline import evaluate_offline, summarise
from specformer.scripts.parts.training_arguments import DrafterTrainingArguments

OTHERS = [kind for kind in KINDS if kind != "specformer"]
VARIANTS = {
    "dflash": ("dflash", {}),
    "dflash, two layers, some tokens": ("dflash", dict(config=["num_hidden_layers=2"], draft_vocab_size=40)),
    "eagle3": ("eagle3", dict(draft_vocab_size=40)),
    "eagle3, more norms": ("eagle3", dict(config=["norm_output=true", "norm_before_fc=true"])),
    "parallelspec": ("parallelspec", dict(draft_vocab_size=40)),
    "parallelspec, a norm a state": ("parallelspec", dict(config=["fc_norm=true", "norm_before_residual=true"])),
    "pard": ("pard", {}),
}


class Texts:
    """Answers as `Student.make` takes them."""

    def __init__(self, rows):
        self.rows = [(tokens, int((labels == IGNORED).sum())) for tokens, labels in rows]
        self.token_counts = lambda size: torch.cat([tokens[at:] for tokens, at in self.rows]).bincount(minlength=size)


def make_student(variant: str, target, rows, seed: int = 0):
    """A new one for `target`, in its dtype."""
    kind, options = VARIANTS[variant]
    arguments = DrafterTrainingArguments(
        data=Path("unread"),
        output_dir="unwritten",
        target="some/target",
        drafter=kind,
        num_draft_tokens=SLOTS,
        **options,
    )
    torch.manual_seed(seed)
    student = KINDS[kind].make(KINDS[kind].make_config(arguments, target.config), target, Texts(rows), arguments)
    student.network.to(target.dtype)
    return student


@cache
def trained(variant: str, with_eos: bool):
    """Trained briefly on the very answers, so that it is often right and often wrong."""
    target, _, _, rows = make_answers(with_eos)
    student, batch = make_student(variant, target, rows), Answers.collate(rows)
    optimizer = torch.optim.AdamW([each for each in student.network.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        loss = student.loss(student.network, batch, drafter_loss, 1.0, 0, 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    student.network.eval()
    return student


# ---- a packed pass is what decoding does


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_of_a_packed_pass_are_those_of_the_cached_one(variant: str):
    """Its states at every position, among them those of texts that are padded, to 1e-5; and the tokens in front of a
    slot are the true ones, as where they were accepted."""
    target, _, _, rows = make_answers(False)
    student = trained(variant, False)
    with torch.no_grad():
        drafts = student.drafts(student.network, Answers.collate(rows[:3]))
        logits = student.head.draft_logits(drafts.states)
    number = 0
    for tokens, labels in rows[:3]:
        first = int((labels != IGNORED).long().argmax())
        for read in range(max(0, first - 1 - SLOTS), len(tokens) - 2):
            here = logits[number]
            number += 1
            if read % 7:
                continue
            count = min(SLOTS, len(tokens) - read - 2)
            seen = cached_logits(student, target, tokens, read + 1, count)
            torch.testing.assert_close(here[:count], seen, rtol=0, atol=1e-5)
    assert number == len(drafts.states)


def cached_logits(student, target, tokens: torch.Tensor, known: int, count: int) -> torch.Tensor:
    """Logits (count, V') of what is drafted after the first `known` + 1 of `tokens` by the drafter that decodes, which
    is told the true tokens."""
    prompt, first, found = tokens[None, :known], tokens[None, known : known + 1], []

    def choose(logits, ahead=0, token_ids=None):
        found.append(logits[0])
        return tokens[None, known + 1 + ahead : known + 1 + ahead + logits.shape[1]]

    network = student.network
    drafter = drafter_of_network(network, target) or ParallelDrafter(network, target)
    layout = PromptLayout.from_mask(None, prompt)
    states = None
    if drafter.hidden_state_layers:
        every = target(input_ids=prompt, output_hidden_states=True).hidden_states
        states = [torch.stack([every[layer] for layer in drafter.hidden_state_layers], dim=2)]
    with torch.no_grad():
        drafter.begin(Prompts(prompt, layout, first, 99, states))
        drafter.propose(count, choose)
    return torch.cat(found)


@pytest.mark.parametrize("with_eos", [False, True], ids=["full length", "eos"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_offline_figures_are_those_of_decoding(variant: str, with_eos: bool):
    target, batch, settings, rows = make_answers(with_eos)
    student = trained(variant, with_eos)
    batches = [Answers.collate(rows[start : start + 3]) for start in range(0, len(rows), 3)]
    sums = evaluate_offline(student, batches, LENGTHS)
    figures = summarise(sums, LENGTHS)
    alone = {} if variant == "pard" else dict(prompt_lookup_num_tokens=0)
    for k, (tokens, passes) in zip(LENGTHS, sums[-2 * len(LENGTHS) :].view(-1, 2).tolist(), strict=True):
        output = generate(
            target, student.network, **batch, **settings, **alone, num_assistant_tokens=k, return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, target.generate(**batch, **settings))
        statistics = output.statistics
        assert passes == sum(statistics.target_passes_per_row)
        assert tokens == sum(statistics.tokens_per_row) - statistics.batch_size
        assert figures[f"tokens_per_pass_k{k}"] == statistics.tokens_per_pass
        assert 1.1 < statistics.tokens_per_pass < k + 0.99  # drafts of both kinds
