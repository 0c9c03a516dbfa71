"""DiffuSpec's parts: the best path through slots, how much to draft, and a masked diffusion LM as drafter."""

from __future__ import annotations

from itertools import product
from math import log

import pytest
import torch
from exactness import check, plain
from foreign import assert_rows_draft_as_alone
from test_copying import network_of
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, UNDER_A_DRAFTER, meaningful_target
from test_own_drafter import SomeRows
from tiny import EOS, VOCAB, llama, ragged_batch

from specformer import MaskedDiffusion, PathSearch, Proposal, Reader, TrigramTable, generate
from specformer.generation.draft_length_adaptive import AdaptiveDraftLength
from specformer.generation.drafter import Prompts
from specformer.generation.drafter_diffusion import DiffusionDrafter
from specformer.generation.drafter_paths import Path, PathDrafter
from specformer.generation.prompt import PromptLayout

ENDLESS = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)

# ---- path search


class Slots(SomeRows):
    """At every slot a wrong token is a little likelier than the right one."""

    max_draft_tokens = 6

    def propose(self, num_tokens, choose):
        right = super().propose(num_tokens, choose).tokens
        logits = torch.full((*right.shape, VOCAB), -9.0).scatter_(2, right.clamp(min=0)[..., None], 1.0)
        return Proposal(choose(logits.scatter_(2, ((right + 5) % VOCAB)[..., None], 1.2)))


def begun(table: TrigramTable, text: list[int], ends=(), **settings) -> PathDrafter:
    settings = dict(weight=0.5, width=3) | settings
    drafter = PathDrafter(Slots(torch.zeros(1, 9, dtype=torch.long), 1), table, ends=ends, **settings)
    ids = torch.tensor([text[:-1]])
    drafter.begin(Prompts(ids, PromptLayout.from_mask(None, ids), torch.tensor([text[-1:]]), 99))
    drafter.behind = [Path((text[-2], text[-1]), [], 0.0)]
    return drafter


def test_a_wide_beam_finds_the_best_path_of_all():
    """By hand: all paths, scored by the drafter and by the table."""
    torch.manual_seed(1)
    table = TrigramTable(frozen=True)
    table.count([torch.randint(0, 5, (300,)).tolist()])
    drafter = begun(table, [1, 2], weight=0.4, width=10**4)
    drafter.MASS = 2.0  # all candidates
    logits = torch.randn(1, 3, 5)
    found = drafter._choose(logits).tolist()[0]

    def score(tokens) -> float:
        total, pair = 0.0, (1, 2)
        for slot, token in enumerate(tokens):
            (chances,) = drafter.texts.chances([0], [pair])
            unseen = (1 - sum(chances.values())) / PathDrafter.MOST
            likely = float(logits[0, slot].log_softmax(-1)[token])
            total += 0.4 * likely + 0.6 * log(chances.get(token, unseen))
            pair = pair[1], token
        return total

    best = max(product(range(5), repeat=3), key=score)
    assert tuple(found) == best != tuple(logits.argmax(-1)[0].tolist())


def test_candidates_are_those_of_most_of_the_mass_and_ends_are_kept():
    drafter = begun(TrigramTable(), [1, 2], ends=[EOS])
    logits = torch.log(torch.tensor([[[0.5, 0.2, 0.15, 0.1, 0.04, 0.01]]]))
    (((*kept,),),) = drafter._candidates(logits, None)
    assert sorted(token for token, _ in kept) == [0, 1, 2, EOS]  # 0.5 + 0.2 < 0.8
    ids = torch.tensor([9, 8, 7, 6, 4, 3])
    assert sorted(token for token, _ in drafter._candidates(logits, ids)[0][0]) == [7, 8, 9]


def test_nothing_is_drafted_behind_an_end():
    drafter = begun(TrigramTable(), [1, 2], ends=[EOS])
    logits = torch.full((1, 4, VOCAB), -20.0)
    for slot, token in enumerate([7, EOS, 8, 9]):
        logits[0, slot, token] = 0
    assert drafter._choose(logits).tolist() == [[7, EOS, -1, -1]]


def test_the_drafter_alone_is_its_best_tokens():
    torch.manual_seed(0)
    logits = torch.randn(1, 5, VOCAB)
    drafter = begun(TrigramTable(), [1, 2, 1, 2, 3], weight=1.0)
    assert torch.equal(drafter._choose(logits), logits.argmax(-1))
    one_by_one = [int(drafter._choose(logits[:, [slot]], ahead=slot)) for slot in range(5)]
    assert one_by_one == logits.argmax(-1)[0].tolist()


@pytest.mark.one_version
def test_a_path_by_a_table_of_the_targets_texts_is_accepted_where_the_best_tokens_are_not():
    """DiffuSpec's show: accepted at or above each slot's best token, at the same length."""
    target, batch = llama(), ragged_batch()
    reference = plain(target, batch, **ENDLESS)
    slots = Slots(reference.sequences[:, 9:], 5)
    table = TrigramTable()
    table.count(reference.sequences.tolist())
    best = check(target, batch, reference, slots, 6, **ENDLESS)
    path = check(target, batch, reference, PathSearch(slots, table), 6, **ENDLESS)
    alone = check(target, batch, reference, PathSearch(slots, table, weight=1.0), 6, **ENDLESS)
    assert sum(best.accepted_per_slot) == sum(alone.accepted_per_slot) < 10
    assert path.tokens_per_pass > 3 * best.tokens_per_pass


@pytest.mark.parametrize("preset", ["anchor", "all of it", "some tokens"])
@pytest.mark.parametrize("setting", ["greedy", "repetition penalty", "sampling", "num_return_sequences"])
def test_the_text_does_not_depend_on_the_path(setting: str, preset: str):
    """Networks whose slots are drafted at once, and one by one."""
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    search = PathSearch(network_of(target, preset))
    for k in (None, 1, 4):
        check(target, batch, reference, search, k, **arguments)
    check(target, batch, reference, Reader(drafter=search), 6, **arguments)


# ---- how much to draft


def test_the_draft_length_by_hand():
    """DiffuSpec's recursion: half of the newest round, ten more where as much is accepted as drafted, in bounds."""
    rule, idle = AdaptiveDraftLength(4, 30), torch.tensor([False, True])

    def round_of(drafted: int, accepted: int) -> int:
        drafts = torch.full((2, rule.next(2)), -1)
        drafts[0, :drafted] = 7
        drafts[1, :2] = 7  # of a row that is carried along
        assert rule.keep(Proposal(drafts), idle, 0.0) == drafts.shape[1]
        rule.record(2, drafts.shape[1], [(accepted, accepted + 1), (0, 0)], 0.0)
        return rule.next(2)

    assert rule.next(2) == 30
    assert round_of(20, 20) == 20  # 10 lately, and 10 accepted
    assert round_of(20, 0) == 15  # 15 lately, 5 accepted
    assert round_of(1, 0) == 8
    assert round_of(1, 0) == 4 and round_of(1, 0) == 4
    rule.record(2, 0, [(0, 1), (0, 0)], 0.0)  # a round without drafts says nothing
    assert rule.drafted == pytest.approx(2.75) and rule.accepted == pytest.approx(0.625)
    rule = AdaptiveDraftLength(4, 30)
    assert round_of(3, 3) == 11  # all were accepted


# ---- masked diffusion


def filler(seed: int = 3, **overrides):
    """A model that sees both sides once it is given a mask that says so."""
    return llama(torch.float32, seed=seed, **overrides)


def system_of(model, **settings) -> MaskedDiffusion:
    return MaskedDiffusion(model, **{"mask_token_id": 2, "num_tokens": (2, 8), **settings})


@pytest.mark.one_version
@pytest.mark.parametrize("shifted", [False, True])
def test_one_trained_on_the_targets_texts_drafts_them(shifted: bool):
    """Dream's logits are those of the next position, LLaDA's those of their own."""
    target, batch = llama(), ragged_batch(padding=(0, 3, 5))
    reference = plain(target, batch, **ENDLESS)
    before = check(target, batch, reference, system_of(filler(), shifted=shifted), 6, **ENDLESS).tokens_per_pass
    model = filler().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    texts = [row[count:] for row, count in zip(reference.sequences, (0, 3, 5), strict=True)]
    generator = torch.Generator().manual_seed(0)
    for step in range(240):
        text = texts[step % 3][None]
        start = int(torch.randint(4, text.shape[1] - 1, (), generator=generator))
        end = min(start + 6, text.shape[1])
        ids = text[:, :end].clone()
        ids[:, start:] = 2
        logits = model(input_ids=ids, attention_mask=torch.zeros(1, 1, end, end)).logits
        logits = logits[:, start - shifted : end - shifted]
        loss = torch.nn.functional.cross_entropy(logits[0], text[0, start:end])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    after = check(target, batch, reference, system_of(model, shifted=shifted), 6, **ENDLESS).tokens_per_pass
    assert after > 2 > 1.5 > before
    other = check(target, batch, reference, system_of(model, shifted=not shifted), 6, **ENDLESS).tokens_per_pass
    assert other < after - 0.5  # read one position off
    table = TrigramTable()
    table.count([row.tolist() for row in texts])
    path = check(target, batch, reference, PathSearch(system_of(model, shifted=shifted), table), 6, **ENDLESS)
    assert path.tokens_per_pass >= after


@pytest.mark.parametrize("setting", UNDER_A_DRAFTER)
def test_the_text_does_not_depend_on_it(setting: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for k in (None, 1, 5):
        check(target, batch, reference, system_of(filler()), k, **arguments)
    check(target, batch, reference, PathSearch(system_of(filler(), shifted=True)), None, **arguments)


def test_rows_of_a_batch_are_drafted_as_alone():
    target, batch = llama(), ragged_batch()
    assert_rows_draft_as_alone(target, system_of(filler(5)), batch, prompt_lookup_num_tokens=None)


def test_a_row_of_a_batch_sees_no_other_rows_padding():
    """Logits that choose() is given, of a ragged batch and of each row alone."""
    model, batch = filler(5), ragged_batch()

    def logits_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        drafter, seen = DiffusionDrafter(model, 2, False, 2, 8), []
        first = torch.full((len(ids), 1), 9)
        drafter.begin(Prompts(ids, PromptLayout.from_mask(mask, ids), first, 99))
        drafter.propose(4, lambda logits: seen.append(logits) or logits.argmax(-1))
        return seen[0]

    together = logits_of(batch["input_ids"], batch["attention_mask"])
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row][mask][None]
        torch.testing.assert_close(logits_of(ids, torch.ones_like(ids))[0], together[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rule", [dict(acceptance="rejection"), dict(acceptance="coupled", seed=3)], ids=["rejection", "coupled"]
)
def test_other_rules_run_in_batches(rule: dict):
    target, batch, eos = meaningful_target("llama")
    settings = dict(SAMPLING, **rule, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    texts = [
        generate(target, system, **batch, **settings).tolist()
        for system in (system_of(filler()), PathSearch(system_of(filler())))
    ]
    assert "seed" not in rule or texts[0] == texts[1]


# ---- bad input


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PathSearch(llama(), weight=2), r"weight is 2; expected a number from 0 to 1"),
        (lambda: PathSearch(llama(), width=0), r"width is 0; expected a positive integer"),
        (lambda: PathSearch(llama(), "table"), r"table is a builtins.str; expected a TrigramTable"),
        (lambda: PathSearch(None), r"Nothing was passed that drafts"),
        (lambda: MaskedDiffusion("dream"), r"model is a builtins.str; expected a loaded masked diffusion LM"),
        (lambda: MaskedDiffusion(llama()), r"mask_token_id is None; expected one of the 64 tokens of Llama"),
        (lambda: MaskedDiffusion(llama(), VOCAB), r"mask_token_id is 64; expected one of"),
        (lambda: MaskedDiffusion(llama(), 2, num_tokens=(5, 4)), r"num_tokens is \(5, 4\); expected two positive"),
        (lambda: MaskedDiffusion(llama(vocab_size=80), 2), r"has 80 tokens and the target 64"),
    ],
)
def test_bad_arguments(make, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        generate(llama(), make(), **ragged_batch(), max_new_tokens=2)
