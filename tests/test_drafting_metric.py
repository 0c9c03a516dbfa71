"""The paper's measures: by hand, against its own tables, and through `evaluate` from a real call of generate()."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from exactness import choose_eos, oracle, plain
from tiny import llama, ragged_batch

from specformer import generate
from specformer.generation.call_statistics import GenerationStatistics
from specformer.scripts import measures as measures_module
from specformer.scripts.measures import paper_measures

pytestmark = pytest.mark.one_version

METRIC = Path(__file__).parents[1] / "scripts" / "drafting_metric.py"
# four passes that accepted 4, 2, 0 and 1 of 4 drafts
COUNTS = dict(tokens=11, passes=4, drafted_per_slot=[4, 4, 4, 4], accepted_per_slot=[3, 2, 1, 1])
PARAMETERS = dict(target_parameters=1000, shared_parameters=60, slot_parameters=10)
DEVICE = dict(peak_flops=3e14, memory_bandwidth=2e12, batch_size=30)
SPEEDS = dict(tokens_per_second=100, plain_tokens_per_second=50)


def refuse(*arguments, **keywords):
    raise AssertionError("the network was asked for")


@pytest.fixture
def metric(monkeypatch, tmp_path: Path):
    evaluate = pytest.importorskip("evaluate")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return evaluate.load(str(METRIC), cache_dir=str(tmp_path))


# ---- by hand


def test_counts_alone():
    assert paper_measures(**COUNTS) == {
        "kappa": 2.75,
        "r2": 4,
        "acceptance_per_slot": [0.75, 0.5, 0.25, 0.25],
    }


def test_everything():
    measures = paper_measures(**COUNTS, **PARAMETERS, **DEVICE, **SPEEDS)
    assert measures.items() >= paper_measures(**COUNTS).items()
    assert measures["p"] == pytest.approx(1 + (60 + 4 * 10) / 1000)
    assert measures["r1"] == pytest.approx(2.75 / 1.1)
    assert measures["rho"] == pytest.approx(150)
    assert measures["r2_limit"] == pytest.approx(5)
    assert measures["theta"] == pytest.approx(2.75 / 2)
    assert len(measures) == 8


@pytest.mark.parametrize(
    ("given", "measured"),
    [(PARAMETERS, {"p", "r1"}), (DEVICE, {"rho", "r2_limit"}), (SPEEDS, {"theta"})],
    ids=["parameters", "device", "speeds"],
)
def test_only_what_the_keywords_allow(given: dict, measured: set):
    assert paper_measures(**COUNTS, **given).keys() - paper_measures(**COUNTS).keys() == measured


def test_plain_decoding_is_the_unit():
    measures = paper_measures(
        7, 7, [], [], **PARAMETERS | {"shared_parameters": 0}, tokens_per_second=5, plain_tokens_per_second=5
    )
    assert measures == {"kappa": 1, "r2": 0, "acceptance_per_slot": [], "p": 1, "r1": 1, "theta": 1}


def test_rounds_that_draft_less_count_less():
    """Three passes with 2, 1 and 0 drafts, all of them right."""
    measures = paper_measures(6, 3, [2, 1], [2, 1], **PARAMETERS)
    assert (measures["kappa"], measures["r2"], measures["acceptance_per_slot"]) == (2, 1, [1, 1])
    assert measures["p"] == pytest.approx(1 + (60 + 1 * 10) / 1000)


def test_a_tree_pays_for_its_width():
    """Two branches of two tokens: k = 4 and l_d = 2."""
    measures = paper_measures(5, 2, [4, 4], [2, 1], draft_length=2, **PARAMETERS)
    assert measures["kappa"] == pytest.approx(2.5 * 2 / 4)
    assert measures["r2"] == 4
    assert measures["p"] == pytest.approx(1 + (60 + 2 * 10) / 1000)
    assert measures["r1"] == pytest.approx(2.5 / measures["p"])


def test_a_slot_that_was_never_drafted():
    assert paper_measures(3, 2, [2, 0], [1, 0])["acceptance_per_slot"] == [0.5, None]


@pytest.mark.parametrize(
    ("kappa", "tokens_per_second", "plain", "theta"),
    [(1.84, 899, 588, 1.20), (1.86, 917, 588, 1.19), (1.71, 2524, 1713, 1.16), (1.68, 5586, 3882, 1.17)],
    ids=["4B k=4", "4B k=8", "14B k=4", "8B k=2"],
)
def test_theta_of_the_papers_table_3(kappa: float, tokens_per_second: int, plain: int, theta: float):
    tokens = round(100 * kappa)
    speeds = dict(tokens_per_second=tokens_per_second, plain_tokens_per_second=plain)
    measures = paper_measures(tokens, 100, [100], [tokens - 100], **speeds)
    assert measures["kappa"] == kappa
    assert measures["theta"] == pytest.approx(theta, abs=0.006)


def test_rho_of_the_papers_device():
    measures = paper_measures(**COUNTS, peak_flops=311.84e12, memory_bandwidth=2.04e12, batch_size=64)
    assert measures["rho"] == pytest.approx(152.86, abs=0.005)
    assert 2 < measures["r2_limit"] < 3


# ---- bad input


BAD_INPUT = {
    "no pass": (dict(passes=0), r"passes is 0; expected at least one target pass"),
    "slots of one kind only": (dict(accepted_per_slot=[3]), r"has 4 entries and accepted_per_slot 1"),
    "swapped": (
        dict(drafted_per_slot=[3, 2, 1, 1], accepted_per_slot=[4, 4, 4, 4]),
        r"Slot 0: 4 of 3 drafted .* swapped\?",
    ),
    "negative": (dict(accepted_per_slot=[3, 2, 1, -1]), r"Slot 3: -1 of 4"),
    "prompt pass counted": (dict(tokens=12), r"12 tokens in 4 passes that accepted 7 drafts; expected from 1 to 11"),
    "no token": (dict(tokens=0), r"0 tokens in 4 passes"),
    "longer than the draft": (dict(draft_length=5), r"draft_length is 5, and 4 tokens were drafted per pass"),
    "no length": (dict(draft_length=0), r"draft_length is 0"),
    "length of nothing": (
        dict(drafted_per_slot=[], accepted_per_slot=[], tokens=4, draft_length=1),
        r"draft_length is 1, and 0 tokens were drafted",
    ),
    "no target": (
        dict(shared_parameters=60, slot_parameters=10),
        r"p and r1: target_parameters missing. Give all of .* or none",
    ),
    "no batch size": (dict(peak_flops=1e12, memory_bandwidth=1e12), r"rho and r2_limit: batch_size missing"),
    "one speed": (dict(tokens_per_second=5), r"theta: plain_tokens_per_second missing"),
    "target of no size": (
        PARAMETERS | dict(target_parameters=0),
        r"target_parameters is 0; expected a positive number",
    ),
    "less than no parameters": (PARAMETERS | dict(slot_parameters=-1), r"slot_parameters is -1; expected .* 0"),
    "no speed": (SPEEDS | dict(tokens_per_second=0), r"tokens_per_second is 0; expected a positive"),
    "not a number": (SPEEDS | dict(tokens_per_second=float("nan")), r"tokens_per_second is nan"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str):
    overrides, message = BAD_INPUT[name]
    with pytest.raises(ValueError, match=message):
        paper_measures(**COUNTS | overrides)


# ---- through evaluate


def test_entries_add_up(metric):
    """The four passes of COUNTS one by one, and two of them as one entry; the same object again after bad input."""
    rounds = dict(
        tokens=[5, 3, 1, 2],
        passes=[1] * 4,
        drafted_per_slot=[[1] * 4] * 4,
        accepted_per_slot=[[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1]],
    )
    expected = paper_measures(**COUNTS, **PARAMETERS)
    assert metric.compute(**rounds, **PARAMETERS) == expected
    with pytest.raises(ValueError, match="expected from 1 to 11"):
        metric.compute(**rounds | {"tokens": [5, 3, 1, 3]})
    with pytest.raises(ValueError, match="target_parameters missing"):
        metric.compute(**rounds, slot_parameters=1, shared_parameters=1)
    for n in (0, 1):
        metric.add(**{name: column[n] for name, column in rounds.items()})
    metric.add(tokens=3, passes=2, drafted_per_slot=[2] * 4, accepted_per_slot=[1, 0])
    assert metric.compute(**PARAMETERS) == expected


def test_no_entry_at_all(metric):
    with pytest.raises(ValueError, match="passes is 0"):
        metric.compute(tokens=[], passes=[], drafted_per_slot=[], accepted_per_slot=[])


def test_the_metric_says_what_it_wants(metric):
    assert list(metric.features) == ["tokens", "passes", "drafted_per_slot", "accepted_per_slot"]
    for name in ("kappa", "theta", "target_parameters", "statistics.drafted_per_slot"):
        assert name in metric.inputs_description
    assert "2511.20340" in metric.citation


def entry(statistics: GenerationStatistics) -> dict:
    """As the metric's description has it."""
    return dict(
        tokens=sum(statistics.tokens_per_row) - statistics.batch_size,
        passes=sum(statistics.target_passes_per_row),
        drafted_per_slot=statistics.drafted_per_slot,
        accepted_per_slot=statistics.accepted_per_slot,
    )


@pytest.mark.parametrize("kind", ["never", "sometimes", "always"])
@pytest.mark.parametrize("with_eos", [False, True], ids=["full length", "eos"])
def test_a_real_call(with_eos: bool, kind: str, metric, monkeypatch):
    """Measures of a call's statistics, and of each of its rounds, are what the statistics say of themselves."""
    rounds = []

    def count(self, rows, width, drafted, outcome, is_prompt):
        for count, (accepted, added) in zip(drafted, outcome, strict=True):
            if added and not is_prompt:
                slots = [int(slot < accepted) for slot in range(count)]
                rounds.append(dict(tokens=added, passes=1, drafted_per_slot=[1] * count, accepted_per_slot=slots))
        original(self, rows, width, drafted, outcome, is_prompt)

    original = GenerationStatistics.count
    monkeypatch.setattr(GenerationStatistics, "count", count)
    target, batch = llama(), ragged_batch()
    settings = dict(max_new_tokens=23, do_sample=False, eos_token_id=None)
    reference = plain(target, batch, **settings)
    if with_eos:
        settings["eos_token_id"] = choose_eos(reference.sequences, batch["input_ids"].shape[1])
        reference = plain(target, batch, **settings)
    drafter = oracle(reference, batch, kind, settings["eos_token_id"])
    output = generate(target, drafter, **batch, **settings, num_assistant_tokens=4, return_dict_in_generate=True)
    statistics = output.statistics
    assert (len(set(statistics.tokens_per_row)) > 1) == with_eos
    counts = entry(statistics)
    if with_eos and kind != "never":  # rows end inside their drafts: kappa is not 1 + what is accepted per pass
        assert counts["tokens"] < counts["passes"] + sum(counts["accepted_per_slot"])

    metric.add(**counts)
    measures = metric.compute(**PARAMETERS)
    for of_round in rounds:
        metric.add(**of_round)
    assert metric.compute(**PARAMETERS) == measures == paper_measures(**counts, **PARAMETERS)
    assert measures["kappa"] == statistics.tokens_per_pass
    assert measures["r2"] == sum(statistics.drafted_per_slot) / sum(statistics.target_passes_per_row) <= 4
    assert measures["acceptance_per_slot"] == [
        accepted / drafted
        for accepted, drafted in zip(statistics.accepted_per_slot, statistics.drafted_per_slot, strict=True)
    ]
    assert measures["kappa"] == 1 if kind == "never" else measures["kappa"] > 1.5


def test_the_measures_need_no_evaluate():
    program = (
        "import runpy, sys; sys.modules.update(evaluate=None, datasets=None); "
        f"runpy.run_path({measures_module.__file__!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
