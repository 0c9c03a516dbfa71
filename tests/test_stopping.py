"""Stopping on every offset inside an accepted draft: tokens, padding and streamer calls are plain generate()'s.

The drafter knows the text that the target would write if nothing stopped it, so all drafts are accepted and rounds end
after 1, 6, 11, 16 and 21 new tokens. What stops a row lies inside such a round, at another offset in every row.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from exactness import Recorder, Reference, check, plain
from oracles import Oracle
from test_callers import tiny_tokenizer
from tiny import EOS, VOCAB, llama, ragged_batch
from transformers import EosTokenCriteria, StoppingCriteriaList
from transformers.generation import stopping_criteria as library_criteria

from specformer import generate
from specformer.generation.text_stopping import StoppingRules
from specformer.generation.text_stops import RowStops

K = 4
BLOCK = K + 1
NEW_TOKENS = 1 + 4 * BLOCK
ROWS, WIDTH = 5, 9
UNUSED = 2
"""A token that the texts here do not have: as EOS it makes plain generate() pad, and stops nothing."""

TARGET = llama()
BATCH = ragged_batch()
TOKENIZER = tiny_tokenizer()
SAMPLING = dict(do_sample=True, temperature=1.3)
SETTINGS = {
    "greedy": {},
    "no repeated n-gram": dict(no_repeat_ngram_size=2),
    "sampling": SAMPLING,
}


@pytest.fixture(scope="module")
def full_texts() -> dict[str, Reference]:
    """What the target writes if nothing stops it."""
    return {name: unstopped(**setting) for name, setting in SETTINGS.items()}


def unstopped(**arguments) -> Reference:
    return plain(TARGET, BATCH, **call(arguments, eos_token_id=None))


def call(setting: dict, **more) -> dict:
    """Arguments of one call, whose text has no special tokens."""
    return dict(setting, max_new_tokens=NEW_TOKENS, suppress_tokens=list(range(EOS + 1)), **more)


def knowing(full: Reference, kind: str = "always") -> Oracle:
    return Oracle(full.sequences, WIDTH, kind, EOS)


def stops(reference: Reference, full: Reference) -> list[int]:
    """New tokens of each row before its padding."""
    same = reference.sequences == full.sequences[:, : reference.sequences.shape[1]]
    return same[:, WIDTH:].long().cumprod(1).sum(1).tolist()


def offset(length: int) -> int:
    """Which token of its round is the last one of a text of `length` new tokens: 0 to k; a round's own is the kth."""
    return (length - 2) % BLOCK


def check_stopped(full: Reference, **arguments) -> Reference:
    """Check one call whose drafts are all right, and count its rounds."""
    reference = plain(TARGET, BATCH, **arguments)
    statistics = check(TARGET, BATCH, reference, knowing(full), K, **arguments)
    new = reference.sequences.shape[1] - WIDTH
    rounds = -(-(new - 1) // BLOCK)
    if arguments["eos_token_id"] is None and "no_repeat_ngram_size" in arguments:
        # Rows that have stopped, but are not padded, do not run ahead where a processor reads them.
        assert rounds <= statistics.rounds <= 2 * rounds + 2
    else:
        assert statistics.rounds == rounds, "not all drafts were accepted: the stops are not where we think"
    return reference


def lengths_at(shift: int) -> list[int]:
    """New tokens at which each row stops: every row at another offset, in the first, second or third round."""
    lengths = [2 + (row + shift) % BLOCK + BLOCK * ((2 * row + shift) % 3) for row in range(ROWS)]
    assert sorted(offset(length) for length in lengths) == list(range(BLOCK))
    return lengths


def test_texts_are_worth_stopping(full_texts):
    for full in full_texts.values():
        new = full.sequences[:, WIDTH:]
        assert new.shape == (ROWS, NEW_TOKENS)
        assert new.min() > EOS
    assert all(len(set(row)) >= 8 for row in full_texts["sampling"].sequences[:, WIDTH:].tolist())


# ---- criteria of one's own


class From:
    """Stops row b from lengths[b] new tokens on."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor(input_ids.shape[1] - WIDTH) >= self.lengths


class Only(From):
    """Says so once, at that very length, and denies it later."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor(input_ids.shape[1] - WIDTH) == self.lengths


class OnText:
    """Stops where the new tokens add up to a multiple of 16, as often as that happens."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, WIDTH:].sum(1) % 16 == 0


class Padding:
    """A criterion with an `eos_token_id`: plain generate() pads the rows that have stopped."""

    eos_token_id = torch.tensor([UNUSED])

    def __init__(self, criterion: Callable):
        self.criterion = criterion

    def __call__(self, input_ids, scores, **kwargs):
        return self.criterion(input_ids, scores, **kwargs)


@pytest.mark.parametrize("setting", ["greedy", "sampling"])
@pytest.mark.parametrize("padding", ["no padding", "eos_token_id of the criterion", "eos_token_id of the call"])
@pytest.mark.parametrize("criterion", [From, Only], ids=lambda kind: kind.__name__)
def test_criterion_at_every_offset(full_texts, criterion: type, padding: str, setting: str):
    full = full_texts[setting]
    for shift in range(BLOCK):
        lengths = lengths_at(shift)
        stopping = criterion(lengths)
        reference = check_stopped(
            full,
            **call(SETTINGS[setting]),
            eos_token_id=UNUSED if padding == "eos_token_id of the call" else None,
            stopping_criteria=[Padding(stopping) if padding == "eos_token_id of the criterion" else stopping],
        )
        end = max(lengths)
        assert reference.sequences.shape[1] == WIDTH + end
        assert stops(reference, full) == ([end] * ROWS if padding == "no padding" else lengths)


@pytest.mark.parametrize("setting", SETTINGS)
def test_criteria_together(full_texts, setting: str):
    """Each stops other rows at other times; some rows meet two of them."""
    full = full_texts[setting]
    never = NEW_TOKENS + 1
    for shift in range(BLOCK):
        lengths = lengths_at(shift)
        early = Only([length if row % 2 else never for row, length in enumerate(lengths)])
        late = From([length + row for row, length in enumerate(lengths)])
        expected = [length if row % 2 else length + row for row, length in enumerate(lengths)]
        for criteria in ([early, late], StoppingCriteriaList([late, Padding(early)])):
            reference = check_stopped(full, **call(SETTINGS[setting]), eos_token_id=None, stopping_criteria=criteria)
            assert reference.sequences.shape[1] == WIDTH + max(expected)
        assert stops(reference, full) == expected


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_criterion_that_reads_the_text(full_texts, setting: str, pads: bool):
    full = full_texts[setting]
    sums = full.sequences[:, WIDTH:].cumsum(1) % 16 == 0
    expected = [row.index(True) + 1 if True in row else NEW_TOKENS for row in sums.tolist()]
    assert len({offset(length) for length in expected if length < NEW_TOKENS}) >= 2
    criterion = Padding(OnText()) if pads else OnText()
    reference = check_stopped(full, **call(SETTINGS[setting]), eos_token_id=None, stopping_criteria=[criterion])
    if pads:
        assert stops(reference, full) == expected


@pytest.mark.parametrize("kind", ["sometimes", "adversarial"])
@pytest.mark.parametrize("pads", [False, True])
def test_criterion_behind_wrong_drafts(full_texts, pads: bool, kind: str):
    """What a rejected draft would have stopped is not stopped."""
    arguments = call(SAMPLING, eos_token_id=None)
    for shift in range(BLOCK):
        criterion = Only(lengths_at(shift))
        criteria = [Padding(criterion) if pads else criterion, OnText()]
        reference = plain(TARGET, BATCH, **arguments, stopping_criteria=criteria)
        oracle = knowing(full_texts["sampling"], kind)
        check(TARGET, BATCH, reference, oracle, K, **arguments, stopping_criteria=criteria)


# ---- end-of-sequence tokens


class PlantEos:
    """A processor that lets row b write the EOS token as its lengths[b]th new one, and nowhere else."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        here = self.lengths == input_ids.shape[1] - WIDTH + 1
        scores[:, EOS] = -torch.inf
        scores[here] = -torch.inf
        scores[here, EOS] = 0.0
        return scores


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_planted_eos_at_every_offset(sampling: dict):
    for shift in range(BLOCK):
        lengths = lengths_at(shift)
        arguments = call(sampling, logits_processor=[PlantEos(lengths)])
        full = plain(TARGET, BATCH, **arguments, eos_token_id=None)
        assert full.sequences.shape[1] == WIDTH + NEW_TOKENS
        reference = check_stopped(full, **arguments, eos_token_id=EOS)
        assert stops(reference, full) == lengths
        criterion = EosTokenCriteria(EOS)
        check_stopped(full, **arguments, eos_token_id=UNUSED, stopping_criteria=[criterion])


@pytest.mark.parametrize("setting", ["no repeated n-gram", "sampling"])
def test_tokens_of_the_text_as_eos(full_texts, setting: str):
    """Wherever that stops which rows: all offsets are among them."""
    full, landed = full_texts[setting], set()
    for token in sorted(set(full.sequences[:, WIDTH:].flatten().tolist()))[::3]:
        reference = check_stopped(full, **call(SETTINGS[setting]), eos_token_id=token)
        landed |= {offset(length) for length in stops(reference, full) if 1 < length < NEW_TOKENS}
    assert landed == set(range(BLOCK))


def test_eos_before_a_criterion_and_behind_it(full_texts):
    """Both in one round, in either order."""
    for shift in range(BLOCK):
        lengths = [length + BLOCK for length in lengths_at(shift)]
        arguments = call(SAMPLING, logits_processor=[PlantEos(lengths)])
        full = plain(TARGET, BATCH, **arguments, eos_token_id=None)
        for distance in (-2, 0, 1):
            criterion = Only([length + distance for length in lengths])
            reference = check_stopped(full, **arguments, eos_token_id=EOS, stopping_criteria=[criterion])
            assert stops(reference, full) == [length + min(distance, 0) for length in lengths]


# ---- stop strings


def new_text(full: Reference, row: int, first: int, last: int) -> str:
    """The text of a row's new tokens from the `first` to the `last`, counted from 1."""
    return TOKENIZER.decode(full.sequences[row, WIDTH + first - 1 : WIDTH + last], skip_special_tokens=False)


def expected_stops(full: Reference, strings: list[str]) -> list[int]:
    """New tokens at which the text of each row holds one of the strings for the first time."""
    return [
        next(
            (n for n in range(1, NEW_TOKENS + 1) if any(string in new_text(full, row, 1, n) for string in strings)),
            NEW_TOKENS,
        )
        for row in range(ROWS)
    ]


def check_stop_strings(full: Reference, setting: str, strings: list[str], eos_token_id: int | None) -> Reference:
    return check_stopped(
        full, **call(SETTINGS[setting]), eos_token_id=eos_token_id, stop_strings=strings, tokenizer=TOKENIZER
    )


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("setting", ["no repeated n-gram", "sampling"])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_stop_strings_at_every_offset(full_texts, setting: str, tokens: int, pads: bool):
    """One string per row, made of the tokens up to where the row is to stop. Those of 3 tokens may span two rounds."""
    full, landed = full_texts[setting], set()
    for shift in range(BLOCK):
        lengths = [max(length, tokens) for length in lengths_at(shift)]
        strings = [new_text(full, row, length - tokens + 1, length) for row, length in enumerate(lengths)]
        expected = expected_stops(full, strings)  # a string may be in another row, or earlier in its own
        reference = check_stop_strings(full, setting, strings, UNUSED if pads else None)
        assert reference.sequences.shape[1] == WIDTH + max(expected)
        if pads:
            assert stops(reference, full) == expected
        landed |= {(row, offset(length)) for row, length in enumerate(expected) if length > 1}
    assert {place for _, place in landed} == set(range(BLOCK))
    assert len(landed) >= (10 if tokens == 1 else 20)


@pytest.mark.parametrize("setting", ["no repeated n-gram", "sampling"])
@pytest.mark.parametrize("behind", range(1, 4))
def test_stop_string_that_spans_two_rounds(full_texts, setting: str, behind: int):
    """4 tokens, of which 3, 2 or 1 are the end of one round, and the others the beginning of the next."""
    full = full_texts[setting]
    for end_of_round in (1 + BLOCK, 1 + 2 * BLOCK):
        last = end_of_round + behind
        strings = [new_text(full, row, last - 3, last) for row in range(ROWS)]
        assert expected_stops(full, strings) == [last] * ROWS
        for chosen in ([0, 3], [4]):  # the others go on
            reference = check_stop_strings(full, setting, [strings[row] for row in chosen], UNUSED)
            assert all(stops(reference, full)[row] == last for row in chosen)


def test_stop_string_inside_tokens(full_texts):
    """The string begins in the middle of a token, ends in the middle of a later one, and both in another round."""
    full, tried = full_texts["sampling"], 0
    for row in range(ROWS):
        for last in range(3, NEW_TOKENS):
            pieces = [new_text(full, row, place, place) for place in range(last - 2, last + 1)]
            if len(pieces[0]) < 2 or len(pieces[-1]) < 2 or tried == 8:
                continue
            string = "".join(pieces)[1:-1]
            expected = expected_stops(full, [string])
            assert expected[row] <= last
            reference = check_stop_strings(full, "sampling", [string], UNUSED)
            assert stops(reference, full) == expected
            tried += 1
    assert tried >= 5


def test_stop_string_that_begins_in_the_prompt(full_texts):
    """Plain generate() looks at the prompt as well, so does this."""
    full = full_texts["sampling"]
    for row in range(ROWS):
        for new in (1, 2):
            ids = full.sequences[row, WIDTH - 2 : WIDTH + new]
            string = TOKENIZER.decode(ids, skip_special_tokens=False)
            reference = check_stop_strings(full, "sampling", [string], UNUSED)
            assert stops(reference, full)[row] == new


# ---- the clock


class Clock:
    """`time.time()` that goes on by one second whenever somebody looks."""

    def __init__(self):
        self.now = 0.0

    def time(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def seconds(monkeypatch) -> Callable:
    """Makes a call with a `max_time` at which the criterion has looked `looks` times, and says yes to the next one."""

    def run(function: Callable, looks: int, **arguments):
        monkeypatch.setattr(library_criteria, "time", SimpleNamespace(time=Clock().time))
        return function(**arguments, max_time=looks + 0.5)

    return run


class OwnPace(Oracle):
    """In every round another number of right drafts in each row, from 0 to k: rows are cut at every offset."""

    def drafts(self, num_tokens):
        drafts = super().drafts(num_tokens)
        wrong = (self.rows * 2 + self.rounds) % BLOCK  # the place of the first wrong one; k: none
        ahead = torch.arange(num_tokens)
        return torch.where(ahead == wrong[:, None], (drafts + 1) % VOCAB, drafts)


@pytest.mark.parametrize("stop", ["nothing else", "eos", "criterion", "padding criterion"])
@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("drafter", [Oracle, OwnPace], ids=lambda kind: kind.__name__)
def test_max_time(seconds: Callable, drafter: type, sampling: dict, stop: str):
    """The clock is asked once a round. What is there then equals what plain generate() has after as many tokens."""
    lengths = [3, 30, 5, 12, 30]
    arguments = call(sampling, logits_processor=[PlantEos(lengths)])
    full = plain(TARGET, BATCH, **arguments, eos_token_id=None)
    arguments["eos_token_id"] = EOS if stop == "eos" else None
    if "criterion" in stop:
        criterion = Only(lengths)
        arguments["stopping_criteria"] = [Padding(criterion) if stop == "padding criterion" else criterion]
    ends = []
    for looks in range(5):
        streamer = Recorder()
        torch.manual_seed(3)
        ours = seconds(
            generate,
            looks,
            model=TARGET,
            assistant_model=drafter(full.sequences, WIDTH, "always"),
            num_assistant_tokens=K,
            streamer=streamer,
            **BATCH,
            **arguments,
        )
        state = torch.get_rng_state()
        ends.append(ours.shape[1] - WIDTH)
        reference = seconds(plain, ends[-1] - 1, target=TARGET, batch=BATCH, **arguments)
        assert ours.tolist() == reference.sequences.tolist()
        assert streamer.calls == reference.streamed
        assert torch.equal(state, reference.generator_state)
    assert ends[0] == 1 and ends == sorted(ends)
    if stop == "criterion":
        assert max(ends) > 5  # rows that have stopped do not run ahead of the others: there, rounds are shorter
    elif drafter is Oracle:
        assert ends == [1, 6, 11, 16, 21]
    else:
        assert max(ends) < NEW_TOKENS and {offset(end) for end in ends[1:]} - {K}, "cut at the end of rounds only"


# ---- these checks can fail


def look_at_the_last_token_of_a_round(monkeypatch) -> None:
    ask, is_eos = RowStops._ask_about_new_tokens, StoppingRules.is_eos

    def ask_at_the_end(self, text, before):
        ask(self, text, [max(old, new - 1) for old, new in zip(before, self.generated, strict=True)])

    def is_eos_at_the_end(self, tokens):
        found = is_eos(self, tokens)
        if found.ndim == 2:
            found[:, :-1] = False
        return found

    monkeypatch.setattr(RowStops, "_ask_about_new_tokens", ask_at_the_end)
    monkeypatch.setattr(StoppingRules, "is_eos", is_eos_at_the_end)


def mistake_what_pads(monkeypatch) -> None:
    make = StoppingRules.__init__

    def fault(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.pads = not self.pads

    monkeypatch.setattr(StoppingRules, "__init__", fault)


def stop_all_rows_together(monkeypatch) -> None:
    given = StoppingRules.others_stop

    def fault(self, input_ids, *args):
        return [any(given(self, input_ids, *args))] * len(input_ids)

    monkeypatch.setattr(StoppingRules, "others_stop", fault)


def run_criteria(full_texts, name: str) -> None:
    if name == "stop strings":
        test_stop_strings_at_every_offset(full_texts, "sampling", 2, True)
    elif name == "spanning stop strings":
        test_stop_string_that_spans_two_rounds(full_texts, "sampling", 2)
    elif name == "eos":
        test_planted_eos_at_every_offset(SAMPLING)
    else:
        test_criterion_at_every_offset(full_texts, Only, name, "sampling")


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("stop strings", look_at_the_last_token_of_a_round),
        ("spanning stop strings", look_at_the_last_token_of_a_round),
        ("eos", look_at_the_last_token_of_a_round),
        ("no padding", look_at_the_last_token_of_a_round),
        ("eos_token_id of the criterion", look_at_the_last_token_of_a_round),
        ("no padding", mistake_what_pads),
        ("eos_token_id of the criterion", mistake_what_pads),
        ("stop strings", stop_all_rows_together),
        ("no padding", stop_all_rows_together),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_planted_fault_is_found(full_texts, name: str, plant: Callable, monkeypatch):
    run_criteria(full_texts, name)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_criteria(full_texts, name)
