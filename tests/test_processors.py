"""Every logits processor of the installed transformers is of a known kind, and the kinds are what they claim to be."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from exactness import check, oracle, plain
from test_exactness import NEW_TOKENS, SAMPLING, meaningful_target
from tiny import VOCAB
from transformers import LogitsProcessorList, WatermarkingConfig

from specformer.generation import accept_processors as kinds
from specformer.generation.accept_processors import PREFIX_FREE, READS_TEXT, SCORES_ALONE, STATEFUL, Processors
from specformer.generation.accept_rules import acceptance_rule
from specformer.generation.accept_tokens import TokenChoice
from specformer.generation.text import Text
from specformer.generation.text_stopping import StoppingRules
from specformer.generation.text_stops import RowStops

PACKAGE = Path(transformers.__file__).parent
CLASS = re.compile(r"^class (\w+)\((?:\w+\.)*(\w*(?:LogitsProcessor|LogitsWarper)|NoSpeechDetection)\):", re.M)


def library_processors() -> dict[str, Path]:
    """Name and file of every class that derives from LogitsProcessor, model-specific ones included."""
    found: dict[str, Path] = {}
    bases: dict[str, str] = {}
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "LogitsProcessor" in text or "LogitsWarper" in text:
            for name, base in CLASS.findall(text):
                found[name], bases[name] = file, base

    def root(name: str) -> str:
        return root(bases[name]) if name in bases else name

    return {name: file for name, file in found.items() if root(name) == "LogitsProcessor"}


def test_every_processor_is_of_a_known_kind():
    found = library_processors()
    assert {"TemperatureLogitsWarper", "NoBadWordsLogitsProcessor", "HiggsAudioV2DelayPatternLogitsProcessor"} <= {
        *found
    }
    known = {*PREFIX_FREE, *READS_TEXT, *STATEFUL}
    unknown = {name: str(file.relative_to(PACKAGE)) for name, file in found.items() if name not in known}
    assert not unknown, f"sort these into the kinds of {kinds.__file__}: {unknown}"


def test_no_processor_is_of_two_kinds():
    assert len(PREFIX_FREE | READS_TEXT | set(STATEFUL)) == len(PREFIX_FREE) + len(READS_TEXT) + len(STATEFUL)


def library_class(name: str) -> type:
    if (kind := getattr(transformers.generation.logits_process, name, None)) is not None:
        return kind
    if name not in (files := library_processors()):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    module = ".".join(["transformers", *files[name].relative_to(PACKAGE).with_suffix("").parts])
    return getattr(importlib.import_module(module), name)


ARGUMENTS = {
    "TemperatureLogitsWarper": dict(temperature=0.7),
    "TopPLogitsWarper": dict(top_p=0.8),
    "TopKLogitsWarper": dict(top_k=5),
    "TopHLogitsWarper": dict(top_h=0.4),
    "MinPLogitsWarper": dict(min_p=0.1),
    "TypicalLogitsWarper": dict(mass=0.8),
    "EpsilonLogitsWarper": dict(epsilon=0.02),
    "EtaLogitsWarper": dict(epsilon=0.02),
    "InfNanRemoveLogitsProcessor": {},
    "LogitNormalization": {},
    "SuppressTokensLogitsProcessor": dict(suppress_tokens=[3, 7]),
    "BarkEosPrioritizerLogitsProcessor": dict(eos_token_id=3, min_eos_p=0.01),
    "VibeVoiceTokenConstraintProcessor": dict(valid_token_ids=[1, 2, 5], vocab_size=VOCAB),
}


@pytest.mark.parametrize("name", sorted(PREFIX_FREE))
def test_prefix_free_processors_see_neither_text_nor_other_rows(name: str):
    processor = library_class(name)(**ARGUMENTS[name])
    scores = 2 * torch.randn(6, VOCAB)
    if name == "InfNanRemoveLogitsProcessor":
        scores[2, 5], scores[3, 1] = torch.nan, torch.inf
    together = Processors(LogitsProcessorList([processor])).warp(scores.view(2, 3, VOCAB)).view(6, VOCAB)
    assert not torch.equal(together, scores)
    for row in range(6):
        text = torch.randint(VOCAB, (1, 4))
        assert torch.equal(processor(text, scores[row : row + 1].clone())[0], together[row])


def two_rows() -> Text:
    """With 3 and 5 tokens."""
    text = Text(torch.zeros(2, 1, dtype=torch.long), RowStops(StoppingRules([], 20, 1), 2, 1), None)
    text.generated[:] = 3, 5
    return text


@pytest.mark.parametrize("name", sorted(SCORES_ALONE))
@pytest.mark.parametrize("rule", ["greedy", "match", "coupled", "rejection"])
def test_drafts_from_some_tokens_are_those_of_the_vocabulary_where_no_others_are_likely(
    name: str, rule: str, monkeypatch
):
    """The scores of a few tokens are processed as they are, which is the same as beside others that are never drawn."""
    torch.manual_seed(1)
    logits, token_ids = 2 * torch.randn(2, 3, 8), torch.stack([torch.randperm(VOCAB)[:8] for _ in range(6)])
    token_ids, drafts, proposals = token_ids.view(2, 3, 8), [], []
    for know_tokens in (False, True):
        processors = Processors(LogitsProcessorList([library_class(name)(**ARGUMENTS[name])]))
        assert not processors.know_tokens
        processors.know_tokens = know_tokens
        torch.manual_seed(2)
        rule_of_call = acceptance_rule(rule, rule != "greedy", 2, torch.device("cpu"), 5 if rule == "coupled" else None)
        choice = TokenChoice(rule_of_call, processors, two_rows())
        choice.vocab_size = VOCAB
        with monkeypatch.context() as patch:
            if rule == "rejection":  # it draws as many numbers as there are scores, and others for fewer of them
                patch.setattr(torch.Tensor, "exponential_", lambda self, *_, **__: self.fill_(1.0))
            drafts.append(choice.of_drafter(logits, 1, token_ids))
        proposals.append(choice.proposals[0])
    assert torch.equal(drafts[0], drafts[1])
    assert (drafts[0][..., None] == token_ids).any(dim=-1).all()
    if rule == "rejection":
        assert proposals[0].shape == (2, 3, VOCAB)
        torch.testing.assert_close(proposals[0], proposals[1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(proposals[0].sum(dim=-1), torch.ones(2, 3))
    else:
        assert proposals == [None, None]


@pytest.mark.parametrize("name", sorted(PREFIX_FREE - SCORES_ALONE))
def test_processors_that_know_tokens(name: str):
    assert Processors(LogitsProcessorList([library_class(name)(**ARGUMENTS[name])])).know_tokens


def test_unknown_processors_are_shown_the_text():
    class TemperatureLogitsWarper:
        """Somebody's own, named like one of the library's."""

        def __call__(self, input_ids, scores):
            return scores

    assert Processors(LogitsProcessorList([TemperatureLogitsWarper()])).need_prefix
    assert not Processors(LogitsProcessorList([transformers.TemperatureLogitsWarper(0.5)])).need_prefix


def fewer_of_what_was_there(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A pure function of the row's text, that changes its argument in place."""
    counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
    scores -= 0.7 * counts
    return scores


def depends_on_the_row(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Bound to the batch it was made for."""
    assert len(input_ids) == 5
    return scores + torch.sin(torch.arange(len(scores))[:, None] * 3.0 + torch.arange(scores.shape[1]))


def some_tokens(row: int, input_ids: torch.Tensor) -> list[int]:
    return [(5 * row + 3 * len(input_ids) + offset) % VOCAB for offset in range(9)]


READING = {
    "custom, in place": dict(logits_processor=[fewer_of_what_was_there]),
    "custom, by row": dict(logits_processor=[depends_on_the_row]),
    "prefix function": dict(prefix_allowed_tokens_fn=some_tokens),
    "encoder penalties": dict(encoder_repetition_penalty=1.5, encoder_no_repeat_ngram_size=2),
    "bias and bad words": dict(sequence_bias=[[[3, 4], -5.0], [[7], 2.0]], bad_words_ids=[[9], [4, 6]]),
    "forced ends": dict(forced_bos_token_id=7, forced_eos_token_id=9),
    "least length": dict(min_new_tokens=12),
    "length penalty": dict(exponential_decay_length_penalty=(2, 1.3)),
    "suppressed at first": dict(begin_suppress_tokens=list(range(10, 40)), suppress_tokens=[3, 50]),
    "watermark": dict(watermarking_config=WatermarkingConfig(bias=2.5, seeding_scheme="lefthash")),
    "watermark, selfhash": dict(watermarking_config=WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")),
    "many": dict(repetition_penalty=1.2, no_repeat_ngram_size=3, logits_processor=[depends_on_the_row]),
}


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("setting", READING)
def test_processors_that_read_the_text(setting: str, sampling: dict):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(READING[setting], **sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    changed = plain(target, batch, **sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    assert reference.sequences.tolist() != changed.sequences.tolist()  # the setting does something here
    for kind in ("sometimes", "adversarial"):
        check(target, batch, reference, oracle(reference, batch, kind, eos), 4, **arguments)
