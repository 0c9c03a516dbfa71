"""What the acceptance rules promise when sampling: "rejection" and "coupled" leave the target's distribution as it is,
and a "coupled" row's text depends on its prompt and its own seed alone.

The first part counts texts. A target with five tokens writes four, so that there are 625 texts per prompt; what each
of them should be worth is computed from the target's logits and the processors that plain generate() builds. Faults
planted into the product show what the test can see.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from exactness import check, choose_eos, plain
from tiny import PAD, llama, ragged_batch
from transformers import LogitsProcessor

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation import accept_noise as noise_module
from specformer.generation import accept_rules as acceptance
from specformer.generation.accept_noise import HashedNoise
from specformer.generation.accept_rules import ACCEPTANCE_RULES, Match, Rejection, row_seeds
from specformer.generation.accept_sampling import reject_and_resample, sample_with_noise
from specformer.generation.accept_tokens import TokenChoice
from specformer.generation.proposal import NO_TOKEN
from specformer.generation.proposal_tree import DraftTree
from specformer.generation.text_positions import Positions

CPU = torch.device("cpu")

# ---- the distribution of whole texts

TOKENS, NEW_TOKENS, DRAFTED = 5, 4, 3
FEW = 20_000
"""Texts that show each of the planted faults."""
ENOUGH, MANY = 2 * FEW, 5 * FEW
"""Texts of a sample in every run, and in long ones."""
ROWS_AT_ONCE = 10_000
LAST_TOKEN = TOKENS - 1
PROMPTS = {
    "input_ids": torch.tensor([[1, 2, 3, 2], [PAD, 3, 4, 3]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
}


def small_model(seed: int):
    """Distributions that are neither flat nor certain, and another one for every seed."""
    sizes = dict(vocab_size=TOKENS, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    heads = dict(num_attention_heads=1, num_key_value_heads=1)
    no_special_tokens = dict(bos_token_id=None, eos_token_id=None)
    return llama(torch.float32, seed, **sizes, **heads, **no_special_tokens, initializer_range=0.3)


def small_target():
    return small_model(1)


def draft_with_assistant(target) -> dict:
    return dict(assistant_model=small_model(2), num_assistant_tokens=DRAFTED)


def draft_with_network(target) -> dict:
    torch.manual_seed(3)
    config = SpecFormerConfig.from_target_config(target.config, num_draft_tokens=DRAFTED, initializer_range=0.3)
    return dict(assistant_model=SpecFormerModel(config).eval(), num_assistant_tokens=DRAFTED)


def draft_some_tokens(target) -> dict:
    """Never anything but tokens 1 and 3."""
    torch.manual_seed(3)
    sizes = dict(num_draft_tokens=DRAFTED, initializer_range=0.3, draft_vocab_size=2)
    network = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, **sizes)).eval()
    network.choose_draft_tokens(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    return dict(assistant_model=network, num_assistant_tokens=DRAFTED)


def draft_knowing_the_token_before(target) -> dict:
    """Samples from three candidates, each slot's from a distribution that depends on the draft before it."""
    torch.manual_seed(3)
    sizes = dict(num_draft_tokens=DRAFTED, initializer_range=0.5, previous_token_rank=4, num_candidates=3)
    network = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, **sizes)).eval()
    return dict(assistant_model=network, num_assistant_tokens=DRAFTED)


def draft_by_lookup(target) -> dict:
    return dict(prompt_lookup_num_tokens=DRAFTED)


def draft_trees(target) -> dict:
    """Six tokens, up to three deep."""
    return dict(draft_knowing_the_token_before(target), prompt_lookup_num_tokens=0, tree_size=6)


def draft_trees_with_copies(target) -> dict:
    return dict(draft_knowing_the_token_before(target), prompt_lookup_num_tokens=2, tree_size=5)


DRAFTERS = {
    "assistant": draft_with_assistant,
    "network": draft_with_network,
    "some tokens": draft_some_tokens,
    "lookup": draft_by_lookup,
    "token before": draft_knowing_the_token_before,
    "trees": draft_trees,
    "trees with copies": draft_trees_with_copies,
}


def all_texts() -> torch.Tensor:
    """(5^4, 4), text i being i's digits in base 5."""
    return torch.cartesian_prod(*[torch.arange(TOKENS)] * NEW_TOKENS)


def processors_of_plain_generate(target, batch: dict, settings: dict) -> list:
    found = []

    def strategy(model, input_ids, logits_processor, **kwargs):
        found.extend(logits_processor)
        return input_ids

    target.generate(**batch, custom_generate=strategy, do_sample=True, max_new_tokens=NEW_TOKENS, **settings)
    return found


@torch.no_grad()
def probabilities(target, settings: dict) -> torch.Tensor:
    """Of each text behind each prompt, float64 (2, 5^4): one pass over all texts, no cache, no drafts."""
    eos, texts = settings.get("eos_token_id"), all_texts()
    result = []
    for prompt in range(2):
        batch = {name: values[prompt].repeat(len(texts), 1) for name, values in PROMPTS.items()}
        processors, width = processors_of_plain_generate(target, batch, settings), batch["input_ids"].shape[1]
        ids = torch.cat([batch["input_ids"], texts], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(texts)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = target(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        probability = torch.ones(len(texts), dtype=torch.float64)
        ended = torch.zeros(len(texts), dtype=torch.bool)
        for step in range(NEW_TOKENS):
            scores = logits[:, width - 1 + step].clone()
            for processor in processors:
                scores = processor(ids[:, : width + step], scores)
            taken = texts[:, step]
            of_token = scores.double().softmax(-1).gather(1, taken[:, None])[:, 0]
            probability *= torch.where(ended, (taken == PAD).double(), of_token)
            ended |= taken == eos if eos is not None else False
        result.append(probability)
    result = torch.stack(result)
    torch.testing.assert_close(result.sum(dim=1), torch.ones(2, dtype=torch.float64))
    return result


@dataclass
class Sample:
    """Many calls with the same prompts.

    Attributes:
        counts: of each text behind each prompt, (2, 5^4).
        drafted, accepted: draft tokens.
    """

    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(2, TOKENS**NEW_TOKENS, dtype=torch.long))
    drafted: int = 0
    accepted: int = 0


def draw(target, drafter: dict, rule: str, settings: dict, size: int, seed: int = 0) -> Sample:
    """`size` texts, both prompts in turn, in batches of `ROWS_AT_ONCE`."""
    sample, powers = Sample(), TOKENS ** torch.arange(NEW_TOKENS - 1, -1, -1)
    torch.manual_seed(seed)
    gc.disable()  # rows are lists of numbers, and so many of them keep the collector busy for nothing
    try:
        for done in range(0, size, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, size - done)
            output = generate(
                target,
                **{name: values.repeat(rows // 2, 1) for name, values in PROMPTS.items()},
                **drafter,
                **settings,
                acceptance=rule,
                do_sample=True,
                max_new_tokens=NEW_TOKENS,
                return_dict_in_generate=True,
            )
            texts = (output.sequences[:, PROMPTS["input_ids"].shape[1] :] * powers).sum(dim=1)
            for prompt in range(2):
                sample.counts[prompt] += texts[prompt::2].bincount(minlength=sample.counts.shape[1])
            sample.drafted += sum(output.statistics.drafted_per_slot)
            sample.accepted += sum(output.statistics.accepted_per_slot)
    finally:
        gc.enable()
    assert sample.counts.sum() == size
    return sample


def p_value(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """Of a chi-square test of counts (rows, cells), each row a sample of its own with the given probabilities. Cells
    that expect fewer than 5 are one."""
    statistic, freedom = 0.0, 0
    for observed, shares in zip(counts.double(), probability, strict=True):
        if observed[shares == 0].any():
            return 0.0
        expected = shares * observed.sum()
        order = expected.argsort(descending=True)
        observed, expected = observed[order], expected[order]
        kept = int((expected >= 5).sum())
        kept -= bool(expected[kept:].sum() < 5)  # what is left over goes with the smallest cell that is not
        observed = torch.cat([observed[:kept], observed[kept:].sum()[None]])
        expected = torch.cat([expected[:kept], expected[kept:].sum()[None]])
        statistic += float(((observed - expected) ** 2 / expected).sum())
        freedom += len(expected) - 1
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves))


SETTINGS = {
    "plain": {},
    "temperature": dict(temperature=0.6),
    "top-p": dict(top_p=0.8),
    "top-k": dict(top_k=3),
    "all warpers": dict(temperature=1.4, top_k=4, top_p=0.9),
    "repetition penalty": dict(repetition_penalty=1.5, temperature=0.8),
    "no repeated n-gram": dict(no_repeat_ngram_size=2, top_k=4),
    "two tokens less": dict(suppress_tokens=[1, 3]),
    "eos": dict(eos_token_id=LAST_TOKEN),
    "eos, scores wanted": dict(eos_token_id=LAST_TOKEN, output_scores=True),
    "eos, not at once": dict(eos_token_id=LAST_TOKEN, min_new_tokens=2, top_p=0.9),
}
IN_EVERY_RUN = [
    ("match", "assistant", "temperature"),
    ("coupled", "assistant", "all warpers"),
    ("coupled", "network", "eos"),
    ("rejection", "assistant", "all warpers"),
    ("rejection", "assistant", "repetition penalty"),
    ("rejection", "network", "eos"),
    ("rejection", "some tokens", "top-p"),
    ("rejection", "some tokens", "two tokens less"),
    ("coupled", "some tokens", "all warpers"),
    ("rejection", "lookup", "top-p"),
    ("rejection", "token before", "all warpers"),
    ("coupled", "token before", "eos"),
    ("rejection", "trees", "all warpers"),
]
CASES = [
    pytest.param(*case, ENOUGH, id="-".join(case))
    if case in IN_EVERY_RUN
    else pytest.param(*case, MANY, marks=pytest.mark.slow, id="-".join(case))
    for case in [(rule, drafter, name) for rule in ACCEPTANCE_RULES for drafter in DRAFTERS for name in SETTINGS]
    if case in IN_EVERY_RUN or case[0] != "match"
]


@pytest.mark.one_version
def test_the_chi_square_test_itself():
    """Known values of the distribution, and p-values of samples that are right spread evenly from 0 to 1."""
    halves = torch.tensor([18.307038, 10 / 2, 124.342113, 100 / 2], dtype=torch.float64)
    for value, half_freedom in halves.view(2, 2):
        assert float(torch.special.gammaincc(half_freedom, value / 2)) == pytest.approx(0.05, abs=1e-6)
    shares = probabilities(small_target(), {})
    seen = []
    for _ in range(200):
        drawn = torch.multinomial(shares, 20_000, replacement=True)
        seen.append(p_value(torch.stack([row.bincount(minlength=shares.shape[1]) for row in drawn]), shares))
    gaps = torch.tensor(seen).sort().values - torch.arange(1, 201) / 200
    assert gaps.abs().max() < 1.95 / 200**0.5  # Kolmogorov and Smirnov, 1e-3
    impossible = torch.tensor([[5, 1]])
    assert p_value(impossible, torch.tensor([[1.0, 0.0]], dtype=torch.float64)) == 0


@pytest.mark.one_version
def test_drafters_are_no_copies_of_the_target():
    target = small_target()
    shares = probabilities(target, {})
    assert (shares > 0).all() and shares.max() < 0.06
    first = [probabilities(model, {}).view(2, TOKENS, -1).sum(-1) for model in (target, small_model(2))]
    distance = (first[0] - first[1]).abs().sum(dim=1) / 2
    assert (distance > 0.15).all() and (distance < 0.8).all()
    assert (first[0][0] - first[0][1]).abs().sum() / 2 > 0.15  # nor is the one prompt like the other


@pytest.mark.parametrize(("rule", "drafter", "name", "size"), CASES)
def test_texts_are_distributed_as_the_target_writes_them(rule: str, drafter: str, name: str, size: int):
    target, settings = small_target(), SETTINGS[name]
    shares = probabilities(target, settings)
    seed = list(DRAFTERS).index(drafter)  # from the same one, "coupled" writes the same texts with every drafter
    sample = draw(target, DRAFTERS[drafter](target), rule, settings, size, seed)
    assert not sample.counts[shares == 0].any()
    p = p_value(sample.counts, shares)
    rate = sample.accepted / sample.drafted
    print(f"{rule}, {drafter}, {name}: p = {p:.3g}, {rate:.1%} of {sample.drafted} drafts accepted")
    assert p > 1e-3
    assert 0.05 < rate < 0.9  # of others too where all that "some tokens" would draft is forbidden


# ---- faults that the test must find

take, draft, of_drafter, gather = Rejection.take, Rejection.draft, TokenChoice.of_drafter, HashedNoise.gather


def change_proposals(monkeypatch, change: Callable) -> None:
    """`change` maps the distributions that drafts were sampled from, (R, k, V), to wrong ones."""

    def fault(self, scores, drafts, proposals, positions):
        if proposals is not None and drafts.shape[1] > 1:
            proposals = torch.cat([change(proposals[:, :-1]), proposals[:, -1:]], dim=1)  # nothing drafted at the last
        return take(self, scores, drafts, proposals, positions)

    monkeypatch.setattr(Rejection, "take", fault)


def proposals_are_uniform(monkeypatch) -> None:
    change_proposals(monkeypatch, lambda proposals: torch.full_like(proposals, 1 / TOKENS))


def proposals_are_of_the_next_position(monkeypatch) -> None:
    change_proposals(monkeypatch, lambda proposals: proposals.roll(-1, dims=1))


def proposals_are_of_the_position_before(monkeypatch) -> None:
    change_proposals(monkeypatch, lambda proposals: proposals.roll(1, dims=1))


def proposals_are_of_the_next_row(monkeypatch) -> None:
    change_proposals(monkeypatch, lambda proposals: proposals.roll(1, dims=0))


def proposals_are_as_before_the_warpers(monkeypatch) -> None:
    def fault(self, logits, ahead=0, token_ids=None):
        assert token_ids is None
        tokens = of_drafter(self, logits, ahead)
        self.proposals[-1] = logits.float().softmax(dim=-1)
        return tokens

    monkeypatch.setattr(TokenChoice, "of_drafter", fault)


def drafts_are_the_best_tokens(monkeypatch) -> None:
    """And not samples of the proposals."""
    monkeypatch.setattr(Rejection, "draft", lambda self, scores, *_: (scores.argmax(-1), scores.softmax(dim=-1)))


def change_rejection(monkeypatch, change: Callable) -> None:
    monkeypatch.setattr(acceptance, "reject_and_resample", change)


def rejected_drafts_are_replaced_by_any_token(monkeypatch) -> None:
    """By samples of p, that is, where the residual of p and q is due."""

    def fault(scores, drafts, proposals, uniform, noise):
        tokens, accepted = reject_and_resample(scores, drafts, proposals, uniform, noise)
        return torch.where(accepted, tokens, sample_with_noise(scores, noise[:, None])), accepted

    change_rejection(monkeypatch, fault)


def one_number_decides_about_all_positions(monkeypatch) -> None:
    def fault(scores, drafts, proposals, uniform, noise):
        return reject_and_resample(scores, drafts, proposals, uniform[:, :1].expand_as(uniform), noise)

    change_rejection(monkeypatch, fault)


def possible_drafts_are_accepted(monkeypatch) -> None:
    def fault(scores, drafts, proposals, uniform, noise):
        return reject_and_resample(scores, drafts, proposals, torch.zeros_like(uniform), noise)

    change_rejection(monkeypatch, fault)


def noise_is_that_of_the_first_step(monkeypatch) -> None:
    monkeypatch.setattr(
        HashedNoise, "gather", lambda self, at, *of: gather(self, Positions(at.rows, 0 * at.steps), *of)
    )


def noise_lasts_for_two_steps(monkeypatch) -> None:
    monkeypatch.setattr(
        HashedNoise, "gather", lambda self, at, *of: gather(self, Positions(at.rows, at.steps // 2), *of)
    )


def noise_is_shared_by_four_rows(monkeypatch) -> None:
    monkeypatch.setattr(
        HashedNoise, "gather", lambda self, at, *of: gather(self, Positions(at.rows // 4 * 4, at.steps), *of)
    )


def noise_is_uniform(monkeypatch) -> None:
    monkeypatch.setattr(HashedNoise, "gather", lambda self, at, *of: -torch.expm1(-gather(self, at, *of)))


def likely_drafts_are_accepted(monkeypatch) -> None:
    """Whatever the noise says: what is accepted then depends on the drafter."""
    match = Match.take

    def fault(self, scores, drafts, proposals, positions):
        tokens, accepted = match(self, scores, drafts, proposals, positions)
        of_draft = scores.softmax(dim=-1).gather(-1, drafts.clamp(min=0)[..., None])[..., 0]
        accepted = accepted | (drafts >= 0) & (of_draft > 0.3)
        return torch.where(accepted, drafts, tokens), accepted

    monkeypatch.setattr(Match, "take", fault)


def guesses_are_accepted_whatever_was_rejected(monkeypatch) -> None:
    """One after the other with the target's probability of each, where that of what is left is due."""

    def descend(self, logits, tree):
        nodes, rows = torch.zeros_like(tree.parents[:, :1]), torch.arange(len(logits))
        tokens, accepted, path = [], [], []
        for _ in range(tree.depth + 1):
            path.append(nodes)
            p = self.processors.warp(logits[rows, nodes[:, 0], None])[:, 0].softmax(dim=-1)
            token = p.multinomial(1)
            for place in range(tree.tokens.shape[1] - 1, -1, -1):
                guess = tree.tokens[:, place, None]
                chance = p.gather(1, guess.clamp(min=0)) * (guess != NO_TOKEN) * (tree.parents[:, place, None] == nodes)
                token = torch.where(torch.rand(chance.shape) < chance, guess, token)
            children, found = tree.children(nodes, token)
            tokens.append(token)
            accepted.append(found)
            nodes = torch.where(found, children, nodes)
        return tuple(torch.cat(parts, dim=1) for parts in (tokens, accepted, path))

    monkeypatch.setattr(TokenChoice, "_descend", descend)


def another_guess_is_gone_on_with(monkeypatch) -> None:
    """Than the one that was accepted: the first of its siblings."""
    children = DraftTree.children

    def fault(self, nodes, tokens):
        _, found = children(self, nodes, tokens)
        return (self.parents == nodes).long().argmax(dim=1, keepdim=True) + 1, found

    monkeypatch.setattr(DraftTree, "children", fault)


FAULTS = [
    ("rejection", "assistant", "temperature", proposals_are_as_before_the_warpers),
    ("rejection", "network", "all warpers", proposals_are_as_before_the_warpers),
    ("rejection", "assistant", "plain", proposals_are_uniform),
    ("rejection", "assistant", "plain", proposals_are_of_the_next_position),
    ("rejection", "network", "plain", proposals_are_of_the_position_before),
    ("rejection", "assistant", "plain", proposals_are_of_the_next_row),
    ("rejection", "assistant", "plain", drafts_are_the_best_tokens),
    ("rejection", "assistant", "plain", rejected_drafts_are_replaced_by_any_token),
    ("rejection", "assistant", "repetition penalty", rejected_drafts_are_replaced_by_any_token),
    ("rejection", "lookup", "plain", rejected_drafts_are_replaced_by_any_token),
    ("rejection", "assistant", "plain", one_number_decides_about_all_positions),
    ("rejection", "lookup", "plain", possible_drafts_are_accepted),
    ("coupled", "assistant", "plain", noise_is_that_of_the_first_step),
    ("coupled", "assistant", "plain", noise_lasts_for_two_steps),
    ("coupled", "lookup", "plain", noise_is_shared_by_four_rows),
    ("coupled", "lookup", "plain", noise_is_uniform),
    ("coupled", "assistant", "plain", likely_drafts_are_accepted),
    ("match", "assistant", "plain", likely_drafts_are_accepted),
    ("rejection", "trees", "plain", guesses_are_accepted_whatever_was_rejected),
    ("rejection", "trees", "plain", another_guess_is_gone_on_with),
]


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("rule", "drafter", "name", "plant"), FAULTS, ids=lambda value: getattr(value, "__name__", value)
)
def test_planted_fault_changes_the_distribution(rule: str, drafter: str, name: str, plant: Callable, monkeypatch):
    """In half of the texts that the test above counts."""
    target, settings = small_target(), SETTINGS[name]
    plant(monkeypatch)
    sample = draw(target, DRAFTERS[drafter](target), rule, settings, FEW)
    p = p_value(sample.counts, probabilities(target, settings))
    print(f"{rule}, {drafter}, {name}, {plant.__name__}: p = {p:.3g}")
    assert p < 1e-9


# ---- rejection sampling as a function


def random_distribution(*shape: int, spread: float = 1.5) -> torch.Tensor:
    return (spread * torch.randn(shape)).softmax(dim=-1)


def reject(p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, uniform: torch.Tensor | None = None):
    """Of probabilities (N, k, V): tokens and which drafts were accepted."""
    uniform = torch.rand(drafts.shape) if uniform is None else uniform
    return reject_and_resample(p.log(), drafts, q, uniform, torch.empty(len(p), p.shape[-1]).exponential_(1))


def test_one_token():
    """It is distributed as p, and the draft is accepted as often as it can be."""
    p, q = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]), torch.tensor([0.1, 0.2, 0.15, 0.15, 0.4])
    drafts = torch.multinomial(q, 200_000, replacement=True)[:, None]
    tokens, accepted = reject(p.expand(len(drafts), 1, -1), q.expand(len(drafts), 1, -1), drafts)
    assert p_value(tokens[:, 0].bincount(minlength=TOKENS)[None], p.double()[None]) > 1e-3
    rate = torch.minimum(p, q).sum()  # 1 - the total variation distance
    assert abs(accepted.float().mean() - rate) < 4 * (0.25 / len(drafts)) ** 0.5
    assert torch.equal(tokens[accepted], drafts[accepted])


def test_drafts_that_are_certainly_right_are_accepted():
    """p = q, where no residual is left, and u close to 1."""
    p = random_distribution(1000, 3, 7)
    drafts = torch.multinomial(p.flatten(0, 1), 1).view(1000, 3)
    tokens, accepted = reject(p, p.log().softmax(dim=-1), drafts, torch.full((1000, 3), 1 - 2.0**-24))
    assert accepted.float().mean() > 0.99  # rounding may leave p a bit below q
    assert ((tokens >= 0) & (tokens < 7)).all()

    point = torch.nn.functional.one_hot(drafts, 7).float()
    tokens, accepted = reject(point, point, drafts, torch.full((1000, 3), 1 - 2.0**-24))
    assert accepted.all() and torch.equal(tokens, drafts)
    tokens, accepted = reject(point, p, drafts)  # p knows one token, and the draft is that one
    assert accepted.all() and torch.equal(tokens, drafts)


def test_no_residual_by_rounding_alone():
    """Not even then the token is one that the target never takes: p is what is sampled."""
    p = torch.tensor([[[0.5, 0.5, 0.0]]]).expand(1000, 1, 3)
    q = torch.tensor([[[0.5 + 2.0**-20, 0.5, 0.0]]]).expand(1000, 1, 3)
    drafts = torch.zeros(1000, 1, dtype=torch.long)
    tokens, accepted = reject(p, q, drafts, torch.full((1000, 1), 1 - 2.0**-24))
    assert not accepted.any()
    assert set(tokens.flatten().tolist()) == {0, 1}


def test_tokens_without_probability():
    p = torch.tensor([0.0, 0.3, 0.7, 0.0]).expand(4000, 1, 4)
    q = torch.tensor([0.5, 0.0, 0.0, 0.5]).expand(4000, 1, 4)
    drafts = torch.multinomial(q[:, 0], 1)
    for uniform in (None, torch.zeros(4000, 1)):  # u = 0 accepts whatever is possible, and this is not
        tokens, accepted = reject(p, q, drafts, uniform)
        assert not accepted.any()
        assert p_value(tokens[:, 0].bincount(minlength=4)[None], p[:1, 0].double()) > 1e-3


def test_uniform_of_zero_accepts_what_is_possible():
    p, q = random_distribution(500, 2, 6), random_distribution(500, 2, 6)
    drafts = torch.multinomial(q.flatten(0, 1), 1).view(500, 2)
    tokens, accepted = reject(p, q, drafts, torch.zeros(500, 2))
    assert accepted.all() and torch.equal(tokens, drafts)


def test_the_draft_that_no_distribution_was_given_for():
    """Nothing drafted is a sample of p; what a drafter without distributions drafts is certain."""
    p = random_distribution(TOKENS).expand(100_000, 1, -1)
    nothing = torch.full((len(p), 1), NO_TOKEN)
    tokens, accepted = reject(p, torch.zeros_like(p), nothing, torch.zeros(len(p), 1))
    assert not accepted.any()
    assert p_value(tokens[:, 0].bincount(minlength=TOKENS)[None], p[:1, 0].double()) > 1e-3

    drafts = torch.randint(TOKENS, (len(p), 1))
    tokens, accepted = Rejection().take(p.log(), drafts, None, Positions.at([], 0))
    assert p_value(tokens[:, 0].bincount(minlength=TOKENS)[None], p[:1, 0].double()) > 1e-3
    assert abs(accepted.float().mean() - 1 / TOKENS) < 0.01
    tokens, accepted = Rejection().take(p.log(), nothing, None, Positions.at([], 0))
    assert not accepted.any()
    assert p_value(tokens[:, 0].bincount(minlength=TOKENS)[None], p[:1, 0].double()) > 1e-3


def test_only_the_first_rejection_counts():
    p = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]).expand(50, 3, 3)
    q = torch.full((50, 3, 3), 1 / 3)
    for drafts, expected, count in [([0, 1, 2], [0, 1, 2], 3), ([0, 2, 2], [0, 1], 1), ([1, 1, 2], [0], 0)]:
        tokens, accepted = reject(p, q, torch.tensor(drafts).expand(50, 3))
        assert tokens[:, : len(expected)].tolist() == [expected] * 50
        assert accepted.long().cumprod(dim=1).sum(dim=1).tolist() == [count] * 50


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_cannot_be_sampled(bad: float):
    """`NO_TOKEN`, in the rows that have them alone and only if they get that far."""
    scores = torch.zeros(4, 2, TOKENS)
    scores[1, 0] = bad
    scores[2, 1] = bad
    if bad > 0 or bad != bad:
        scores[1, 0, 1:], scores[2, 1, 1:] = 0.0, 0.0
    q = torch.full_like(scores, 1 / TOKENS)
    drafts, uniform, noise = torch.ones(4, 2, dtype=torch.long), torch.zeros(4, 2), torch.ones(4, TOKENS)
    tokens, accepted = reject_and_resample(scores, drafts, q, uniform, noise)
    assert tokens[1, 0] == NO_TOKEN and not accepted[1, 0]
    assert tokens[2].tolist() == [1, NO_TOKEN] and accepted[2].tolist() == [True, False]
    assert tokens[[0, 3]].tolist() == [[1, 1]] * 2 and accepted[[0, 3]].all()

    scores[2, 0] = torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0])  # the draft before is rejected
    tokens, accepted = reject_and_resample(scores, drafts, q, uniform, noise)
    assert not accepted[2].any() and tokens[2, 0] != NO_TOKEN


def test_drafter_whose_scores_cannot_be_sampled():
    """Its draft is rejected, and the token is a sample of p."""
    rule, size = Rejection(), 20_000
    drafts, q = rule.draft(torch.full((size, 1, TOKENS), torch.nan), Positions.at([], 0), TOKENS)
    assert ((drafts >= 0) & (drafts < TOKENS)).all()
    p = random_distribution(TOKENS)
    tokens, accepted = rule.take(p.log().expand(size, 1, -1), drafts, q, Positions.at([], 0))
    assert not accepted.any()
    assert p_value(tokens[:, 0].bincount(minlength=TOKENS)[None], p.double()[None]) > 1e-3


# ---- texts that depend on their own seed alone

WRITTEN = 16
WARPED = dict(do_sample=True, temperature=1.3, top_k=20, top_p=0.95)
SEEDS = [7, -3, 10**30, 0, 7]  # of the rows of ragged_batch()


@pytest.fixture(scope="module")
def target():
    return llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def cousin(target):
    """A causal LM that is not the target and often right."""
    model = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def drafters_of(target, cousin) -> dict[str, dict]:
    network = SpecFormerModel(
        SpecFormerConfig.from_target_config(target.config, num_draft_tokens=8, initializer_range=0.3)
    )
    return {
        "assistant": dict(assistant_model=cousin),
        "network": dict(assistant_model=network),
        "lookup": {},  # and `prompt_lookup_num_tokens`
        "none": {},
    }


def coupled(target, batch: dict, seed, drafter: dict, k: int, lookup: bool = False, **arguments) -> list[list[int]]:
    """The new tokens of each row, without the padding behind its end."""
    length = dict(prompt_lookup_num_tokens=k) if lookup else dict(num_assistant_tokens=k)
    output = generate(
        target,
        **batch,
        **drafter,
        **length,
        acceptance="coupled",
        seed=seed,
        max_new_tokens=WRITTEN,
        return_dict_in_generate=True,
        **{**WARPED, **arguments},
    )
    new = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
    return [row[:length] for row, length in zip(new, output.statistics.tokens_per_row, strict=True)]


def pick(batch: dict, rows: list[int]) -> dict:
    return {name: values[rows] for name, values in batch.items()}


def pad_more(batch: dict, columns: int) -> dict:
    """The same prompts behind that many more columns of padding."""
    filling = {"input_ids": PAD, "attention_mask": 0}
    return {name: torch.nn.functional.pad(values, (columns, 0), value=filling[name]) for name, values in batch.items()}


def strip(batch: dict, row: int) -> dict:
    """One prompt without its padding."""
    real = batch["attention_mask"][row].bool()
    return {name: values[row][real][None] for name, values in batch.items()}


def check_that_place_does_not_matter(target, cousin, eos: int) -> None:
    batch, drafter = ragged_batch(), dict(assistant_model=cousin)
    expected = coupled(target, batch, SEEDS, drafter, 4, eos_token_id=eos)

    def demand(rows: list[int], *arguments) -> None:
        assert coupled(target, *arguments, eos_token_id=eos) == [expected[row] for row in rows]

    for row in range(5):
        demand([row], strip(batch, row), [SEEDS[row]], drafter, 4)
        demand([row], strip(batch, row), SEEDS[row], drafter, 2)
    for rows in ([4, 3, 2, 1, 0], [2, 0], [1, 1, 3, 1, 4, 0, 2]):
        demand(rows, pick(batch, rows), [SEEDS[row] for row in rows], drafter, 4)
    demand(list(range(5)), pad_more(batch, 6), SEEDS, drafter, 4)
    repeated = coupled(target, pick(batch, [0, 3]), [7, 7, 0, 0], drafter, 3, eos_token_id=eos, num_return_sequences=2)
    assert repeated == [expected[0], expected[0], expected[3], expected[3]]


@pytest.fixture(scope="module")
def eos(target):
    """A token that ends rows at different lengths."""
    batch = ragged_batch()
    torch.manual_seed(0)
    sequences = target.generate(**batch, eos_token_id=None, max_new_tokens=WRITTEN, **WARPED)
    return choose_eos(sequences, batch["input_ids"].shape[1])


def test_coupled_text_does_not_depend_on_its_place(target, cousin, eos):
    check_that_place_does_not_matter(target, cousin, eos)


@pytest.mark.one_version
def test_noise_that_depends_on_the_place_is_found(target, cousin, eos, monkeypatch):
    make = HashedNoise.__init__

    def fault(self, seeds, device):
        make(self, [seed + place for place, seed in enumerate(seeds)], device)

    monkeypatch.setattr(HashedNoise, "__init__", fault)
    with pytest.raises(AssertionError):
        check_that_place_does_not_matter(target, cousin, eos)


@pytest.mark.parametrize("settings", [{}, dict(repetition_penalty=1.3)], ids=["warpers", "penalty"])
@pytest.mark.parametrize("name", ["assistant", "network", "lookup"])
def test_coupled_text_does_not_depend_on_the_drafter(target, cousin, eos, name: str, settings: dict):
    batch, drafter = ragged_batch(), drafters_of(target, cousin)[name]
    expected = coupled(target, batch, SEEDS, {}, 0, eos_token_id=eos, **settings)
    assert len({len(row) for row in expected}) > 1  # they end on their own
    for k in (1, 2, 4, 8):
        assert coupled(target, batch, SEEDS, drafter, k, name == "lookup", eos_token_id=eos, **settings) == expected


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rule", ACCEPTANCE_RULES)
def test_drafts_of_the_target_itself_are_all_accepted(target, rule: str, k: int):
    """Wherever a rule samples drafts, it does so with what belongs to their position."""
    arguments = dict(WARPED, max_new_tokens=WRITTEN, eos_token_id=None, num_return_sequences=8)
    twin = copy.deepcopy(target)
    arguments |= dict(acceptance=rule, num_assistant_tokens=k, return_dict_in_generate=True)
    statistics = generate(target, twin, **ragged_batch(), **arguments).statistics
    assert statistics.accepted_per_slot == statistics.drafted_per_slot
    assert statistics.rounds == -(-(WRITTEN - 1) // (k + 1))


@pytest.mark.parametrize("rule", ACCEPTANCE_RULES)
def test_some_drafts_of_another_model_are_accepted(target, cousin, rule: str):
    """Else the tests of equal texts would not say much."""
    arguments = dict(WARPED, max_new_tokens=WRITTEN, eos_token_id=None, return_dict_in_generate=True)
    output = generate(target, cousin, **ragged_batch(), **arguments, acceptance=rule, num_assistant_tokens=4)
    accepted = output.statistics.accepted_per_slot
    assert accepted[3] > 0 and sum(accepted) < 0.9 * sum(output.statistics.drafted_per_slot)


def test_seeds(target, cousin):
    batch, drafter = ragged_batch(), dict(assistant_model=cousin)
    single = coupled(target, batch, 40, drafter, 4)
    assert single == coupled(target, batch, [40, 41, 42, 43, 44], drafter, 4)
    assert single == coupled(target, batch, torch.arange(40, 45), drafter, 4)
    same_prompt = pick(batch, [0] * 6)
    texts = coupled(target, same_prompt, [1, 2, -1, 2**62, 2**64, 1], drafter, 4)
    assert texts[0] == texts[5]
    assert len({tuple(text) for text in texts}) == 5
    several = coupled(target, pick(batch, [0]), 40, drafter, 4, num_return_sequences=3)
    assert several == coupled(target, pick(batch, [0, 0, 0]), [40, 41, 42], drafter, 4)
    assert len({tuple(text) for text in several}) == 3


def test_row_seeds():
    assert row_seeds(5, 3) == [5, 6, 7]
    assert row_seeds([5, -1, 10**40], 3) == [5, -1, 10**40]
    assert row_seeds(torch.tensor([4, 9]), 2) == [4, 9]
    assert row_seeds(torch.tensor(4), 2) == [4, 5]
    with pytest.raises(ValueError, match="2 seeds were given for 3 rows"):
        row_seeds([1, 2], 3)


@pytest.mark.parametrize("name", ["assistant", "network", "lookup", "none"])
def test_the_generator_of_torch_is_left_alone(target, cousin, name: str):
    drafter = drafters_of(target, cousin)[name]
    before = torch.get_rng_state()
    coupled(target, ragged_batch(), SEEDS, drafter, 0 if name == "none" else 4, name == "lookup")
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_generator_of_torch_gives_one(target, cousin):
    batch, drafter = ragged_batch(), dict(assistant_model=cousin)
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts += [coupled(target, batch, None, drafter, k) for k in (4, 2)]
    assert texts[:2] == texts[2:4]
    assert texts[0] != texts[1] and texts[0] != texts[4]


# ---- the noise of "coupled"


def exponential_noise(seeds: list[int], steps: int, tokens: int) -> torch.Tensor:
    """(seeds, steps, tokens)"""
    rows, places = torch.meshgrid(torch.arange(len(seeds)), torch.arange(steps), indexing="ij")
    return HashedNoise(seeds, CPU).gather(Positions(rows, places), tokens)


FAMILIES_OF_SEEDS = {
    "adjacent": list(range(1000)),
    "around zero": list(range(-500, 500)),
    "huge": [10**30 + 2**20 * number for number in range(1000)],
    "one bit": [1 << bit for bit in range(64)] * 2,
    "steps of SplitMix64": [number * 0x9E3779B97F4A7C15 for number in range(1000)],
}


@pytest.mark.parametrize("name", FAMILIES_OF_SEEDS)
def test_noise_is_exponential_and_uncorrelated(name: str):
    seeds = list(dict.fromkeys(FAMILIES_OF_SEEDS[name]))
    steps, tokens = 40, 50 if len(seeds) > 100 else 500
    noise = exponential_noise(seeds, steps, tokens)
    assert noise.dtype == torch.float32
    assert (noise > 0).all() and noise.isfinite().all()
    assert torch.equal(noise, exponential_noise(seeds, steps, tokens))

    evenly = -torch.expm1(-noise.double())
    bins = 200
    counts = (evenly * bins).long().clamp(max=bins - 1).flatten().bincount(minlength=bins)
    assert p_value(counts[None], torch.full((1, bins), 1 / bins, dtype=torch.float64)) > 1e-3
    # the smallest numbers decide which token is taken
    small = evenly[evenly < 2.0**-8] * 2**8
    counts = (small * 16).long().flatten().bincount(minlength=16)
    assert p_value(counts[None], torch.full((1, 16), 1 / 16, dtype=torch.float64)) > 1e-3

    centred = (evenly - 0.5) * 12**0.5
    for axis in range(3):
        length = centred.shape[axis]
        for lag in (1, 2, 7):
            pairs = centred.narrow(axis, 0, length - lag) * centred.narrow(axis, lag, length - lag)
            assert pairs.mean().abs() < 4 / pairs.numel() ** 0.5, (axis, lag)
    diagonal = centred[:-1, 1:] * centred[1:, :-1]  # step t + 1 of a seed and step t of the next one
    assert diagonal.mean().abs() < 4 / diagonal.numel() ** 0.5


def test_noise_at_the_ends_of_its_range(monkeypatch):
    """However the bits fall: a zero or an infinity would decide about a token on its own."""
    for bits in (0, 1, 2**63 - 1, 2**62, -1):
        monkeypatch.setattr(noise_module, "mix", lambda numbers, bits=bits: torch.full_like(numbers, bits))
        noise = HashedNoise([1], CPU).gather(Positions.at([0], 0), 3)
        assert (noise > 0).all() and noise.isfinite().all()


def test_any_integer_is_a_seed():
    """By its lowest 64 bits."""
    seeds = [0, -1, 2**63, -(2**63), 2**64 + 3, 10**40, -(10**40)]
    noise = exponential_noise(seeds, 2, 9)
    assert torch.equal(noise, exponential_noise([seed % 2**64 for seed in seeds], 2, 9))
    assert torch.equal(noise[4], exponential_noise([3], 2, 9)[0])
    assert torch.equal(noise[2], noise[3])
    assert len({tuple(row) for row in noise.flatten(1).tolist()}) == len(seeds) - 1


def test_noise_of_a_token_does_not_depend_on_the_others():
    """Neither on the other pairs that are asked for, nor on the size of the vocabulary."""
    whole = exponential_noise([3, 8, 5], 6, 40)
    noise = HashedNoise([5, 3], CPU).gather(Positions(torch.tensor([1, 0, 1, 1]), torch.tensor([5, 0, 2, 2])), 11)
    expected = [whole[0, 5, :11], whole[2, 0, :11], whole[0, 2, :11], whole[0, 2, :11]]
    assert torch.equal(noise, torch.stack(expected))


# ---- seeds, greedy search and threads


def test_rejection_with_the_same_seed_gives_the_same_text(target, cousin):
    arguments = dict(WARPED, assistant_model=cousin, num_assistant_tokens=4, max_new_tokens=WRITTEN)
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts += [generate(target, **ragged_batch(), **arguments, acceptance="rejection").tolist() for _ in range(2)]
    assert texts[:2] == texts[2:4]
    assert texts[0] != texts[1] and texts[0] != texts[4]


@pytest.mark.parametrize("name", ["assistant", "network", "lookup"])
@pytest.mark.parametrize("rule", ACCEPTANCE_RULES)
def test_greedy_text_is_the_same_by_every_rule(target, cousin, rule: str, name: str):
    batch, drafter = ragged_batch(), drafters_of(target, cousin)[name].get("assistant_model")
    for settings in ({}, dict(repetition_penalty=1.3)):
        settings = dict(settings, max_new_tokens=WRITTEN)
        reference = plain(target, batch, **settings)
        lookup = dict(prompt_lookup_num_tokens=4) if name == "lookup" else {}
        # plain generate() would take prompt_lookup_num_tokens for a strategy of its own
        check(target, batch, reference, drafter, 4, acceptance=rule, **settings, **lookup)


class WaitsAtFirst(LogitsProcessor):
    """Holds its call, which has begun to sample, until the others have."""

    def __init__(self, barrier: threading.Barrier):
        self.barrier, self.called = barrier, False

    def __call__(self, input_ids, scores):
        if not self.called:
            self.called = True
            self.barrier.wait(timeout=60)
        return scores


def test_threads_that_sample_at_once_do_not_draw_the_same_numbers(target, cousin):
    """A call with "match" replays torch's generator, and two of them must not replay it side by side."""
    prompt, count = strip(ragged_batch(), 0), 3
    arguments = dict(WARPED, max_new_tokens=WRITTEN, eos_token_id=None)
    texts, errors, barrier = [], [], threading.Barrier(count)

    def write() -> None:
        try:
            waits = [WaitsAtFirst(barrier)]
            text = generate(target, cousin, **prompt, **arguments, logits_processor=waits, num_assistant_tokens=3)
            texts.append(tuple(text[0].tolist()))
        except Exception as error:
            barrier.abort()
            errors.append(error)

    torch.manual_seed(3)
    threads = [threading.Thread(target=write) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(texts)) == count

    reference = plain(target, prompt, **arguments)  # the generator was released
    assert tuple(reference.sequences[0].tolist()) in texts  # the first call had it to itself
    check(target, prompt, reference, cousin, 3, **arguments)


def test_call_that_fails_releases_the_generator(target, cousin):
    prompt, arguments = strip(ragged_batch(), 0), dict(WARPED, max_new_tokens=WRITTEN)

    def fail(input_ids, scores):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(target, cousin, **prompt, **arguments, logits_processor=[fail], num_assistant_tokens=3)
    reference = plain(target, prompt, **arguments)
    check(target, prompt, reference, cousin, 3, **arguments)
