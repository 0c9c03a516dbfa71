"""Rows whose text repeats itself are copied, others drafted: which, how sure, and that the text does not change."""

from __future__ import annotations

import pytest
import torch
from exactness import check, plain
from test_drafters import repeats_what_came_five_before
from test_exactness import NEW_TOKENS, SETTINGS, crossed, meaningful_target
from tiny import PRESETS, llama, ragged_batch

from specformer import SpecFormerModel, generate
from specformer.generation.accept_rules import Greedy, Rejection
from specformer.generation.call_drafter import DraftSettings, choose_drafter
from specformer.generation.draft_length_auto import experience_of
from specformer.generation.drafter import NoDrafter, Prompts, Verified
from specformer.generation.drafter_copying import MOST_COPIED, CopyingDrafter, CopyRates
from specformer.generation.drafter_specformer import SpecFormerDrafter
from specformer.generation.prompt import PromptLayout
from specformer.generation.proposal import NO_TOKEN, Proposal


def network_of(target, preset: str = "confidence") -> SpecFormerModel:
    torch.manual_seed(0)
    config = PRESETS[preset](target.config, num_draft_tokens=4, initializer_range=0.3)
    return SpecFormerModel(config).to(torch.float64)


@pytest.mark.parametrize(("preset", "setting"), crossed("all of it", "anchor", "confidence"))
def test_the_text_does_not_depend_on_copies(preset: str, setting: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for k, copied in ((None, None), (1, None), (4, 2), (9, 9), (9, 0)):
        check(target, batch, reference, network_of(target, preset), k, **arguments, prompt_lookup_num_tokens=copied)


@pytest.mark.one_version
@pytest.mark.parametrize("preset", ["anchor", "confidence"])
def test_a_repeating_text_is_copied(preset: str):
    target, batch = llama(), ragged_batch()
    repeat = dict(logits_processor=[repeats_what_came_five_before], max_new_tokens=40, eos_token_id=None)
    reference = plain(target, batch, **repeat)
    rates = []
    for k, copied in ((8, None), (4, None), (8, 5), (8, 2), (8, 0)):
        drafter = network_of(target, preset)
        more = dict(repeat, prompt_lookup_num_tokens=copied)
        rates.append(check(target, batch, reference, drafter, k, **more).tokens_per_pass)
    assert rates[0] > 5.5 > rates[2] > rates[1] > 3.5 > 1.2 > rates[4], rates
    assert rates[3] == rates[1]  # as many as there are slots


@pytest.mark.one_version
def test_more_are_copied_than_there_are_slots_where_it_pays():
    """ "auto" verifies long copies, and the drafts of other rows no further than they reach."""
    target, batch = llama(), ragged_batch()
    repeat = dict(logits_processor=[repeats_what_came_five_before], max_new_tokens=100, eos_token_id=None)
    reference = plain(target, batch, **repeat)
    network, longest, tokens_per_pass = network_of(target), 0, 0.0
    for call in range(1, 61):  # a busy machine spoils some, and what is learnt from it: each network begins anew
        network = network if call % 4 else network_of(target)
        statistics = check(target, batch, reference, network, None, **repeat)
        longest = max(longest, len(statistics.drafted_per_slot))
        tokens_per_pass = max(tokens_per_pass, statistics.tokens_per_pass)
        if longest > network.config.num_draft_tokens and tokens_per_pass > 2:
            break
    assert network.config.num_draft_tokens < longest <= MOST_COPIED
    assert tokens_per_pass > 2  # of about 5


# ---- which rows


class Drafts(NoDrafter):
    """The token 50 in every slot, with given confidences."""

    max_draft_tokens = default_num_assistant_tokens = 3

    def __init__(self, confidences: torch.Tensor | None):
        self.known = confidences

    def propose(self, num_tokens, choose):
        confidences = None if self.known is None else self.known[:, :num_tokens]
        return Proposal(torch.full((3, num_tokens), 50), confidences)


CONFIDENT = torch.tensor([[0.9, 0.9, 0.9], [0.2, 0.2, 0.2], [0.2, 0.2, 0.2]])


def begun(confidences: torch.Tensor | None, num_tokens: int = 5) -> CopyingDrafter:
    """The first two rows end as they went on before; the third has nothing that was there before."""
    drafter = CopyingDrafter(Drafts(confidences), num_tokens, CopyRates())
    prompts = torch.tensor([[7, 8, 9, 10, 11, 7, 8], [1, 2, 3, 4, 5, 1, 2], [20, 21, 22, 23, 24, 25, 26]])
    first = torch.tensor([[9], [3], [27]])
    drafter.begin(Prompts(prompts, PromptLayout.from_mask(None, prompts), first, 50))
    return drafter


def test_a_row_is_copied_where_that_is_more_likely_right():
    drafter = begun(CONFIDENT)
    proposal = drafter.propose(5, None)
    drafts = proposal.tokens
    assert drafts[:, :3].tolist() == [[50, 50, 50], [4, 5, 1], [50, 50, 50]]
    assert drafts[1].tolist() == [4, 5, 1, 2, 3]
    expected = torch.zeros(3, 5)
    expected[:, :3] = CONFIDENT
    expected[1] = torch.tensor(CopyRates.FIRST[2:7])  # three tokens stood there before
    torch.testing.assert_close(proposal.confidences, expected)
    assert drafts[[0, 2], 3:].tolist() == [[NO_TOKEN, NO_TOKEN]] * 2  # where the other one has no more slots


def test_a_drafter_that_does_not_tell_is_left_for_two_tokens_that_were_there_before():
    drafter = begun(None)
    proposal = drafter.propose(3, None)
    assert proposal.tokens.tolist() == [[10, 11, 7], [4, 5, 1], [50, 50, 50]]
    assert proposal.confidences is None


def test_the_other_drafter_is_not_asked_where_copies_are_sure():
    drafter = begun(CONFIDENT)
    asked: list[int] = []
    propose = drafter.drafter.propose
    drafter.drafter.propose = lambda *args: asked.append(1) or propose(*args)
    rounds = torch.tensor([[9, 10, 11, 7, 8], [3, 4, 5, 1, 2], [20, 21, 22, 23, 24]])
    for place in range(30):
        drafter.propose(4, None)
        drafter.update(Verified(rounds[:, [(place + 1) % 5]], torch.ones(3, dtype=torch.long), 8 + place))
    assert 5 < len(asked) < 20  # until all rows have gone on as before for long
    text = [7, 8, 9, 10, 11]
    proposal = drafter.propose(4, None)
    copies = proposal.tokens[0].tolist()
    start = text.index(copies[0])
    assert copies == [text[(start + place) % 5] for place in range(4)]
    assert torch.equal(proposal.confidences, drafter.rates.chances(drafter.copied[1], 4))


def test_under_rejection_nothing_is_copied():
    """Which row is copied follows from the drafts, and their distribution would be another one."""

    target = llama()
    drafts = DraftSettings(network_of(target), 4, None, None, None)
    assert isinstance(choose_drafter(target, drafts, Greedy()), CopyingDrafter)
    assert isinstance(choose_drafter(target, drafts, Rejection()), SpecFormerDrafter)


# ---- how sure


def test_rates_follow_what_is_accepted():
    rates = CopyRates()
    matched = torch.tensor([3, 0, 16])
    first = rates.chances(matched, 4)
    assert first[0].tolist() == pytest.approx(CopyRates.FIRST[2:6])
    assert not first[1].any() and first[2].tolist() == pytest.approx([CopyRates.FIRST[-1]] * 4)
    copies, tokens = torch.full((3, 4), 7), torch.tensor([[7, 8, 0, 0, 0], [7, 7, 7, 7, 8], [8, 0, 0, 0, 0]])
    for _ in range(200):
        rates.count(matched, copies, tokens, torch.tensor([2, 5, 1]))
    chances = rates.chances(matched, 4)
    assert chances[0, 0] > 0.9 and chances[0, 1] < 0.15  # the first one right, the second wrong
    assert chances[0, 2:].tolist() == pytest.approx(CopyRates.FIRST[4:6])  # never looked at
    assert not chances[1].any() and chances[2].max() < 0.2
    for _ in range(1000):  # what was seen fades
        rates.count(torch.zeros(3, dtype=torch.long), copies, tokens, torch.tensor([2, 5, 1]))
    torch.testing.assert_close(rates.chances(matched, 4), first, rtol=0.01, atol=0)


def test_a_copy_that_ends_the_text_was_right():
    """The last token of a row that ends, or is cut, is a right copy; of those behind it nothing is known."""
    rates = CopyRates()
    before, copies = rates.right.clone(), torch.tensor([[7, 8, 9]])
    rates.count(torch.tensor([3]), copies, torch.tensor([[7, 8, 9, 1]]), torch.tensor([2]))
    right, seen = (rates.right - before).tolist(), (rates.seen - CopyRates.FIRST_WEIGHT).tolist()
    assert [place for place, count in enumerate(right) if count] == [3, 4]
    assert [place for place, count in enumerate(seen) if count] == [3, 4]


def test_only_rounds_that_copied_are_counted():
    drafter = begun(CONFIDENT)
    before = drafter.rates.seen.clone()
    drafter.propose(3, None)
    # row 0 drafted, row 1 had one copy accepted, row 2 drafted
    tokens = torch.tensor([[50, 50, 50, 1], [4, 6, 0, 0], [1, 0, 0, 0]])
    drafter.update(Verified(tokens, torch.tensor([4, 2, 1]), 11))
    added = (drafter.rates.seen - before).round().tolist()
    assert [place for place, count in enumerate(added) if count] == [3, 4]  # behind three tokens, and behind four
    drafter.update(Verified(torch.tensor([[1], [1], [1]]), torch.tensor([1, 1, 1]), 12))  # a plain round
    assert (drafter.rates.seen - before).round().tolist() == added


def test_a_wrong_copy_that_ends_the_path_through_a_tree_is_counted():
    drafter = begun(CONFIDENT)
    copies, matched, seen = torch.tensor([[7, 8]] * 3), torch.tensor([3, 0, 0]), drafter.rates.seen.clone()
    drafter.followed = [(drafter.rates, copies, matched)]
    # no row went on with a token of its tree, so that there is the target's first token alone
    drafter.update(Verified(torch.tensor([[9], [9], [9]]), torch.tensor([1, 1, 1]), 9))
    added = (drafter.rates.seen - seen).round().tolist()
    assert [place for place, count in enumerate(added) if count] == [3]


def test_calls_share_what_they_saw():
    """Also where the first one ran in inference mode, whose tensors others may not change."""
    target, batch = llama(), ragged_batch()
    network = network_of(target)
    repeat = dict(logits_processor=[repeats_what_came_five_before], max_new_tokens=30, eos_token_id=None)
    with torch.inference_mode():
        generate(target, network, **batch, **repeat, num_assistant_tokens=4)
    rates = experience_of(target, network, CopyingDrafter, CopyRates)
    seen = rates.seen.sum()
    assert seen > CopyRates().seen.sum()
    generate(target, network, **batch, **repeat, num_assistant_tokens=4)
    assert rates.seen.sum() > seen
