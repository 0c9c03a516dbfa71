"""Every causal LM class of the installed transformers decodes as plain generate() does or is refused, as the page says.

`make test` runs one class of every kind, `make test-all` all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import census
import pytest
import transformers
from census import (
    COLUMNS,
    DIFFERENT,
    EXACT,
    FAILED,
    LENGTHS,
    NEW_TOKENS,
    NOT_BUILT,
    ONE_ROW,
    PAGE,
    REFUSED,
    RESULT,
    entry_of,
    page_of,
    wrong_in,
)
from shrunken import COUNTS, SIZES, class_names, image_text_names, tiny_config

from specformer import SpecFormerConfig
from specformer.generation.cache_ragged import RaggedCache

IN_EVERY_RUN = {
    "BloomForCausalLM": "ALiBi",
    "DeepseekV3ForCausalLM": "latent attention and experts",
    "GPTNeoForCausalLM": "windows by the number of keys",
    "Gemma4ForCausalLM": "layers of different sizes",
    "JambaForCausalLM": "attention beside recurrent layers",
    "Llama4ForCausalLM": "chunks",
    "LlamaForCausalLM": "full attention",
    "MambaForCausalLM": "recurrent layers",
    "MistralForCausalLM": "sliding windows in all layers",
    "OPTForCausalLM": "learned positions",
    "Olmo3ForCausalLM": "sliding windows in some layers",
}
EVERY_CLASS = [*class_names(), *image_text_names()]
IN_LONG_RUNS = [pytest.param(name, marks=pytest.mark.slow) for name in EVERY_CLASS if name not in IN_EVERY_RUN]
WORKS = (EXACT, ONE_ROW)
TABLES = max(COUNTS)
"""Positions that a tiny model can tell."""
NO_COUNTS = {
    *SIZES[max(SIZES)],
    *COUNTS[TABLES],
    # widths
    *("adapter_rank", "attention_hidden_size", "block_multiple_of", "dim_model_base", "embedding_dim", "hc_lowrank"),
    *("ffn_round_up_to_multiple_of", "hidden_size", "loop_gate_rank", "prompt_mid_dim", "pronunciation_embed_dim"),
    *("shape_embed_dim", "classifier_proj_size"),
    # of vocabularies, sounds, layers, and numbers of other kinds
    *("audio_vocab_size", "encoder_hash_byte_group_vocab", "pronunciation_vocab_size", "shape_vocab_size"),
    *(
        "decoder_vocab_size",
        "unpadded_vocab_size",
        "ngram_vocab_size_base",
        "make_ngram_vocab_size_divisible_by",
        "split_ngram_parts",
    ),
    *("max_source_positions", "num_mel_bins", "max_window_layers", "prompt_length", "seed", "altup_coef_clip"),
    # of positions, in families that are refused because they keep a state of their own
    *("mem_len", "max_inference_chunksize", "local_attn_chunk_length", "lsh_attn_chunk_length"),
}
"""Fields of text configs that may be larger than any text here."""


@pytest.fixture(scope="module")
def written() -> dict:
    return json.loads(RESULT.read_text(encoding="utf-8"))


def is_of_this_version(written: dict) -> bool:
    return written["versions"]["transformers"] == transformers.__version__


@pytest.mark.parametrize("name", [*IN_EVERY_RUN, *IN_LONG_RUNS])
def test_every_class(name: str, written: dict):
    """Never another text, never an error that is no refusal; and with the transformers that the page was made with,
    what was exact still is."""
    if name not in EVERY_CLASS:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    entry = entry_of(name)
    assert not wrong_in(entry)
    if is_of_this_version(written):
        before = (written["classes"] | written["with_text_alone"])[name]
        tried = [column for column in COLUMNS if column in before]
        lost = [column for column in tried if before[column]["kind"] in WORKS and entry[column] != before[column]]
        assert not lost, f"{lost} worked when docs/compatibility.md was made, and now: {entry}"


def test_every_kind_is_exact_or_refused_as_it_should_be(written: dict):
    """The classes of every run are what they are there for."""
    if not is_of_this_version(written):
        pytest.skip(f"docs/compatibility.md was made with transformers {written['versions']['transformers']}")
    kinds = {name: written["classes"][name]["copies"]["kind"] for name in IN_EVERY_RUN}
    assert set(kinds.values()) == {EXACT, REFUSED}
    for name in ("BloomForCausalLM", "GPTNeoForCausalLM"):
        assert kinds[name] == REFUSED


def test_the_page_is_made_of_the_result(written: dict):
    assert PAGE.read_text(encoding="utf-8") == page_of(written), "run `python tests/census.py`"


def test_the_result_has_every_class_of_its_transformers(written: dict):
    if not is_of_this_version(written):
        pytest.skip(f"it was made with transformers {written['versions']['transformers']}")
    assert list(written["classes"]) == class_names()
    assert list(written["with_text_alone"]) == image_text_names()


# ---- the tiny models


def numbers_in(value, name: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a config and the names of their fields, at any depth; not the ids of tokens."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from numbers_in(part, key if isinstance(key, str) else name)
    elif isinstance(value, list):
        for part in value:
            yield from numbers_in(part, name)
    elif isinstance(value, int | float) and not name.endswith(("_id", "_ids", "_token", "_tokens", "_index", "theta")):
        yield name, value


def text_fields(name: str) -> dict:
    """The config of a class, without those of parts that read no text."""
    config = tiny_config(name)
    fields = (getattr(config, "text_config", None) or config).to_dict()
    return {key: value for key, value in fields.items() if not key.endswith("_config")}


def test_texts_go_past_all_that_is_counted_and_not_past_the_tables():
    longest = max(LENGTHS) + NEW_TOKENS
    counts = sorted(COUNTS)
    assert counts[-1] == TABLES > longest
    assert min(LENGTHS) < counts[-2] < min(LENGTHS) + NEW_TOKENS  # also a row that begins below


@pytest.mark.slow
@pytest.mark.parametrize("name", class_names())
def test_no_number_of_a_tiny_config_is_out_of_reach(name: str):
    """A window, chunk or threshold that no text here gets to would not be tried. What a new family calls it belongs in
    the tables of tests/shrunken.py; what counts neither keys nor positions, in NO_COUNTS."""
    longest = max(LENGTHS) + NEW_TOKENS
    large = {key: value for key, value in numbers_in(text_fields(name)) if longest < value < float("inf")}
    assert not large.keys() - NO_COUNTS, large


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Olmo3ForCausalLM", {"sliding_attention", "full_attention"}),
        ("Qwen3NextForCausalLM", {"linear_attention", "full_attention"}),
        ("Qwen2ForCausalLM", {"sliding_attention", "full_attention"}),
        ("Gemma4ForCausalLM", {"sliding_attention", "full_attention"}),
    ],
)
def test_a_tiny_config_has_layers_of_every_kind(name: str, kinds: set[str]):
    if name not in class_names():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = tiny_config(name)
    assert set(config.layer_types) == kinds
    assert len(config.layer_types) == config.num_hidden_layers == 4


# ---- the census is able to fail

mask, advance = RaggedCache.mask, RaggedCache.advance


@pytest.mark.one_version
def test_another_text_is_found(monkeypatch):
    def one_key_more(self, position_ids, window=None, chunk=None):
        return mask(self, position_ids, window and window + 1, chunk)

    monkeypatch.setattr(RaggedCache, "mask", one_key_more)
    entry = entry_of("MistralForCausalLM")
    assert entry["copies"]["kind"] == DIFFERENT
    assert "another text from new token" in entry["copies"]["why"]
    assert len(wrong_in(entry)) >= 3


@pytest.mark.one_version
def test_an_error_that_is_no_refusal_is_found(monkeypatch):
    def crash(*args):
        raise IndexError("a crash")

    monkeypatch.setitem(census.generate.__globals__, "check_call", crash)
    entry = entry_of("LlamaForCausalLM")
    assert entry["copies"] == {"kind": FAILED, "why": "IndexError: a crash"}


def test_a_refusal_is_raised_by_our_own_code():
    def by_others():
        raise ValueError("of transformers")

    assert census.attempt(by_others) == census.Outcome(FAILED, "ValueError: of transformers")
    assert census.attempt(lambda: SpecFormerConfig(vocab_size=-1)).kind == REFUSED


@pytest.mark.one_version
def test_a_refusal_after_the_first_token_is_found(monkeypatch):
    """Its text was begun, and is not finished."""

    def refuse_later(self, counts, longest):
        if longest > max(LENGTHS) + 4:
            raise census.UnsupportedTargetError("too late")
        return advance(self, counts, longest)

    monkeypatch.setattr(RaggedCache, "advance", refuse_later)
    entry = entry_of("LlamaForCausalLM")
    assert entry["copies"] == {"kind": FAILED, "why": "refused after the first token: too late"}


def test_drafts_that_are_all_wrong_try_too_little(monkeypatch):
    case = census.find_case("LlamaForCausalLM")
    drafts = census.Counts(drafted=5)
    monkeypatch.setattr(census, "Counts", lambda: drafts)
    monkeypatch.setattr(census, "compare", lambda *args, **kwargs: census.Outcome(EXACT))
    assert census.decoding(case, None, needs_both=True).kind == FAILED
    drafts.accepted = 2
    assert census.decoding(case, None, needs_both=True).kind == EXACT


def test_texts_that_could_not_show_an_error_are_told():
    varied = [[5, 9, 7, 11, 6], [9, 7, 11, 6, 5], [7, 11, 6, 5, 9]]
    assert not census.triviality(varied, gap=0.1)
    assert "tied" in census.triviality(varied, gap=1e-6)
    assert "for ever" in census.triviality([[5] * 5, [9] * 5, [7] * 5], gap=0.1)
    assert "for ever" in census.triviality([varied[0]] * 3, gap=0.1)


def test_a_class_that_plain_generate_fails_with_is_not_built(monkeypatch):
    def fail(*args):
        raise KeyError("no such thing")

    monkeypatch.setattr(census, "make_target", fail)
    entry = entry_of("LlamaForCausalLM")
    assert entry["specformer"] == {
        "kind": NOT_BUILT,
        "why": "it writes no text with plain generate(): KeyError: 'no such thing'",
    }


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        (
            "LlamaForCausalLM cannot be decoded speculatively: it needs cache layers that cannot take back tokens "
            "(DynamicIndexedLayer). Call generate() without custom_generate and assistant_model instead.",
            "it needs cache layers that cannot take back tokens",
        ),
        (
            "GPT2LMHeadModel cannot be decoded speculatively: a trial did not agree (ValueError: logits differ by 0.18 "
            "from plain decoding, where 3e-04 is usual). Call generate() without custom_generate and assistant_model.",
            "a trial did not agree (ValueError: logits differ by … from plain decoding, where … is usual)",
        ),
        (
            "GPTNeo cannot be decoded speculatively: a trial failed (ValueError: by keys (size a (96) is not b (4))). "
            "Call generate() without custom_generate.",
            "a trial failed (ValueError: by keys)",
        ),
        ("HrmText has no nn.ModuleList of 32 layers.", "the target has no nn.ModuleList of … layers"),
    ],
)
def test_refusals_are_grouped_by_reason(sentence: str, reason: str):
    assert census.reason_of(sentence) == reason
