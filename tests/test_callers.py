"""The ways in which people call generate(): each gives what the same call gives without speculation."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Event, Thread, current_thread

import pytest
import torch
from exactness import Recorder
from tiny import BOS, EOS, PAD, PRESETS, VOCAB, llama, ragged_batch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    dynamic_module_utils,
    pipeline,
)
from transformers.utils import logging as library_logging

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation.backend_versions import cache_of

NEW_TOKENS = 12
PATIENCE = 20
"""Seconds after which a thread that waits for another one gives up, and its test fails."""

SAMPLING = dict(do_sample=True, temperature=1.3, top_k=20)
PROMPTS = ["the cat", "an owl and a rat", "it is", "other than that: "]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs over the vocabulary of the tiny targets: 6 special tokens, 32 characters, 26 merged pieces."""
    special = ["<pad>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "</s>"]
    assert (special[PAD], special[BOS], special[EOS]) == ("<pad>", "<s>", "</s>")
    merges = "t+h,h+e,th+e,i+n,in+g,a+n,an+d, +t, +th, +the,e+r,r+e,o+n,a+t,o+r,e+n,e+s,e+d,i+s,i+t,a+l,a+r,s+t,t+o"
    merges = [tuple(merge.split("+")) for merge in f"{merges},n+t,o+u".split(",")]
    pieces = [*special, *"abcdefghijklmnopqrstuvwxyz .,:?\n", *map("".join, merges)]
    assert len(set(pieces)) == len(pieces) == VOCAB
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


class Speculation:
    """What a call needs to speculate, and a count of drafting passes, which shows that it did."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.drafter = AutoModel.from_pretrained(folder, trust_remote_code=True)
        self.passes = 0
        self.drafter.positional_ffn.register_forward_hook(self._count)

    def _count(self, *_) -> None:
        self.passes += 1

    @property
    def strategy(self) -> dict:
        return dict(custom_generate=str(self.folder), trust_remote_code=True)

    @property
    def arguments(self) -> dict:
        return dict(assistant_model=self.drafter, **self.strategy)

    @contextmanager
    def expected(self) -> Iterator[None]:
        before = self.passes
        yield
        assert self.passes > before, "nothing was drafted"

    def same(self, call: Callable, *args, **arguments):
        """Demand that a call returns the same with speculation, and leaves torch's generator in the same state."""
        torch.manual_seed(3)
        reference = call(*args, **arguments)
        state = torch.get_rng_state()
        torch.manual_seed(3)
        with self.expected():
            result = call(*args, **arguments, **self.arguments)
        assert listed(result) == listed(reference)
        assert torch.equal(torch.get_rng_state(), state)
        return reference


def listed(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def hooks_of(target: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def target() -> PreTrainedModel:
    model = llama(torch.float32)
    model.generation_config.num_assistant_tokens = 3  # "auto" may rightly draft nothing in a later call
    return model


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A drafter as it is published: weights, remote code, and the strategy as files."""
    folder = tmp_path_factory.mktemp("published") / "tiny-specformer"
    torch.manual_seed(0)
    SpecFormerModel(SpecFormerConfig.from_target_config(llama().config)).save_pretrained(folder)
    return folder


@pytest.fixture
def speculation(repository: Path) -> Speculation:
    return Speculation(repository)


# ---- the tokenizer of these tests


def test_tokenizer(tokenizer: PreTrainedTokenizerFast):
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert len(ids) < len(prompt)
        assert tokenizer.decode(ids) == prompt


# ---- pipelines


@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(SAMPLING, num_return_sequences=2)], ids=str)
@pytest.mark.parametrize(
    ("inputs", "batch_size"),
    [(PROMPTS[0], 1), (PROMPTS, 1), (PROMPTS, 3), (CHATS[0], 1), (CHATS, 3)],
    ids=["prompt", "prompts", "batch of prompts", "chat", "batch of chats"],
)
def test_pipeline(target, tokenizer, speculation: Speculation, inputs: list | str, batch_size: int, sampling: dict):
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer)
    texts = speculation.same(pipe, inputs, batch_size=batch_size, max_new_tokens=NEW_TOKENS, **sampling)
    assert len({str(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(return_full_text=False),
        dict(return_tensors=True),
        dict(stop_sequence="n"),
        dict(stop_strings=["gih", "qq"]),
        dict(return_dict_in_generate=True),
        dict(generation_config=GenerationConfig(do_sample=True, max_new_tokens=9, eos_token_id=EOS, pad_token_id=PAD)),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_pipeline_options(target, tokenizer, speculation: Speculation, arguments: dict):
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer)
    if "stop_strings" in arguments:
        arguments = dict(arguments, tokenizer=tokenizer)
    if "generation_config" not in arguments:
        arguments = dict(arguments, max_new_tokens=NEW_TOKENS, do_sample=False)
    speculation.same(pipe, PROMPTS[0], **arguments)


def test_pipeline_over_a_dataset(target, tokenizer, speculation: Speculation):
    datasets = pytest.importorskip("datasets")
    from transformers.pipelines.pt_utils import KeyDataset

    rows = KeyDataset(datasets.Dataset.from_dict({"text": PROMPTS}), "text")
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer)

    def texts(**arguments) -> list:
        return list(pipe(rows, batch_size=2, max_new_tokens=NEW_TOKENS, do_sample=False, **arguments))

    assert len(speculation.same(texts)) == len(PROMPTS)


def test_pipeline_of_a_drafter_speculates_in_every_call(target, tokenizer, speculation: Speculation):
    """What the constructor takes: all but `trust_remote_code`, which pipeline() keeps for loading."""
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
    reference = plain(PROMPTS, batch_size=3, **settings)
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=speculation.drafter)
    for _ in range(2):
        with speculation.expected():
            assert pipe(PROMPTS, batch_size=3, **settings, **speculation.strategy) == reference
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, **speculation.arguments, **settings)
    for _ in range(2):
        with speculation.expected():
            assert pipe(PROMPTS, batch_size=3, trust_remote_code=True) == reference


def test_pipeline_of_a_drafter_without_the_strategy(target, tokenizer, speculation: Speculation):
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=speculation.drafter)
    with pytest.raises((AttributeError, ValueError)) as caught:
        pipe(PROMPTS[0], max_new_tokens=NEW_TOKENS)
    for part in ("custom_generate", "trust_remote_code=True", "specformer.generate"):
        assert part in str(caught.value)


def test_pipeline_needs_trust_in_the_call(target, tokenizer, speculation: Speculation, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)  # otherwise it asks the terminal
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, **speculation.arguments)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipe(PROMPTS[0])


def test_pipeline_given_the_folder_of_a_drafter(target, tokenizer, speculation: Speculation, monkeypatch):
    """pipeline() would load it as a causal LM, which it is not, and without trust. Where the package is imported its
    config is known, and only the model is not."""
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)
    arguments = dict(speculation.arguments, assistant_model=str(speculation.folder))
    with pytest.raises(
        ValueError, match=r"trust_remote_code=True|cannot infer suitable model classes from .*tiny-spec"
    ):
        pipeline("text-generation", model=target, tokenizer=tokenizer, **arguments)


def test_pipeline_with_other_special_tokens(target, tokenizer, speculation: Speculation):
    """If they are not those of the drafter's config, pipeline() wants the drafter's tokenizer, and passes it on."""
    speculation.drafter.config.eos_token_id = EOS + 1
    arguments = dict(model=target, tokenizer=tokenizer, assistant_model=speculation.drafter)
    with pytest.raises(ValueError, match="pass the assistant tokenizer"):
        pipeline("text-generation", **arguments)
    pipe = pipeline("text-generation", **arguments, assistant_tokenizer=tokenizer)
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
    reference = pipeline("text-generation", model=target, tokenizer=tokenizer)(PROMPTS, batch_size=2, **settings)
    with speculation.expected():
        assert pipe(PROMPTS, batch_size=2, **settings, **speculation.strategy) == reference


# ---- chat templates and data sets


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=str)
def test_chat_template(target, tokenizer, speculation: Speculation, sampling: dict):
    chats = [*CHATS, [*CHATS[0], {"role": "assistant", "content": "in the hat"}, *CHATS[1]]]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, padding=True, return_tensors="pt"
    )
    assert inputs["attention_mask"].sum(1).unique().numel() > 2
    speculation.same(target.generate, **inputs, max_new_tokens=NEW_TOKENS, **sampling)


def test_dataset_map(target, tokenizer, speculation: Speculation):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": [*PROMPTS, *reversed(PROMPTS)]})

    def answers(**arguments) -> list[str]:
        def answer(rows: dict) -> dict:
            inputs = tokenizer(rows["text"], padding=True, return_tensors="pt")
            sequences = target.generate(**inputs, max_new_tokens=NEW_TOKENS, **arguments)
            return {"answer": tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :])}

        return list(dataset.map(answer, batched=True, batch_size=3)["answer"])

    assert len(set(speculation.same(answers))) > 2


# ---- generation configs


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generation-config")
    GenerationConfig(
        **SAMPLING,
        num_assistant_tokens=3,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ).save_pretrained(folder)
    return folder


OVERRIDES = [
    ({}, 3),
    (dict(num_assistant_tokens=1), 1),
    (dict(num_assistant_tokens=0), 0),
    (dict(do_sample=False, max_new_tokens=NEW_TOKENS + 5), 3),
    (dict(temperature=0.5, repetition_penalty=1.3), 3),
    (dict(eos_token_id=None, num_return_sequences=2), 3),
]


def assert_settings_are_used(target, speculation: Speculation, drafted: int, overrides: dict, **arguments) -> None:
    arguments = dict(ragged_batch(), **arguments)
    torch.manual_seed(3)
    plainly = {name: value for name, value in overrides.items() if name != "num_assistant_tokens"}
    reference = target.generate(**arguments, **plainly)
    torch.manual_seed(3)
    output = target.generate(**arguments, **overrides, **speculation.arguments, return_dict_in_generate=True)
    assert output.sequences.tolist() == reference.tolist()
    assert len(output.statistics.drafted_per_slot) == drafted


@pytest.mark.parametrize(("overrides", "drafted"), OVERRIDES, ids=str)
def test_generation_config_from_a_file(
    target, speculation: Speculation, config_folder: Path, overrides: dict, drafted: int
):
    config = GenerationConfig.from_pretrained(config_folder)
    before = config.to_dict()
    assert_settings_are_used(target, speculation, drafted, overrides, generation_config=config)
    assert config.to_dict() == before


@pytest.mark.parametrize(("overrides", "drafted"), OVERRIDES, ids=str)
def test_generation_config_of_the_target(
    target, speculation: Speculation, config_folder: Path, tmp_path: Path, overrides: dict, drafted: int
):
    """As most models on the Hub have one: sampling is on because their file says so."""
    target.save_pretrained(tmp_path)
    shutil.copy(config_folder / "generation_config.json", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.generation_config.do_sample
    before = loaded.generation_config.to_dict()
    assert_settings_are_used(loaded, speculation, drafted, overrides)
    assert loaded.generation_config.to_dict() == before


def test_generation_config_goes_before_the_targets(target, speculation: Speculation, config_folder: Path):
    target.generation_config.update(num_assistant_tokens=2, do_sample=False, max_new_tokens=5)
    config = GenerationConfig.from_pretrained(config_folder)
    assert_settings_are_used(target, speculation, 3, {}, generation_config=config)
    assert_settings_are_used(target, speculation, 2, {})
    silent = GenerationConfig(temperature=1.3, do_sample=True)
    assert_settings_are_used(target, speculation, 2, {}, generation_config=silent)


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.add(record.getMessage())


def messages_of(call: Callable, **arguments) -> set[str]:
    """What transformers logs during a call, the warnings that it gives once included."""
    library_logging.warning_once.cache_clear()
    logger, messages = logging.getLogger("transformers"), Messages()
    logger.addHandler(messages)
    try:
        call(**arguments)
    finally:
        logger.removeHandler(messages)
    return messages.texts


@pytest.mark.parametrize("passed", [True, False], ids=["passed", "the target's"])
def test_no_warnings_that_plain_generate_does_not_give(
    target, speculation: Speculation, config_folder: Path, passed: bool
):
    config = GenerationConfig.from_pretrained(config_folder)
    arguments = dict(ragged_batch(), generation_config=config) if passed else dict(ragged_batch(), max_new_tokens=4)
    plain = messages_of(target.generate, **arguments)
    assert messages_of(target.generate, **arguments, **speculation.arguments) <= plain
    loud = messages_of(target.generate, **arguments, max_length=40)
    assert loud, "no message was seen where there must be one"


@pytest.mark.parametrize("place", ["argument", "config", "the target's"])
def test_auto_is_no_reason_to_warn(target, speculation: Speculation, place: str):
    arguments, auto = dict(ragged_batch(), max_new_tokens=4), dict(num_assistant_tokens="auto")
    if place == "config":
        arguments["generation_config"] = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    plain = messages_of(target.generate, **arguments)
    if place == "argument":
        arguments |= auto
    elif place == "config":
        arguments["generation_config"] = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, **auto)
    else:
        target.generation_config.num_assistant_tokens = "auto"
    with warnings.catch_warnings(), speculation.expected():
        warnings.simplefilter("error")
        assert messages_of(target.generate, **arguments, **speculation.arguments) <= plain


@pytest.mark.parametrize("drafter", ["network", "assistant", "copies", "none"])
def test_nothing_that_transformers_will_remove(target, speculation: Speculation, drafter: str):
    """A first call, with the trial on the target, and another one; nor does plain generate() warn."""
    arguments = dict(ragged_batch(), max_new_tokens=NEW_TOKENS, eos_token_id=None)
    given = dict(speculation.strategy, assistant_model=speculation.drafter)
    if drafter == "assistant":
        given.update(assistant_model=llama(torch.float32, seed=1, num_hidden_layers=2))
    elif drafter != "network":
        number = dict(prompt_lookup_num_tokens=3) if drafter == "copies" else dict(num_assistant_tokens=0)
        given = dict(speculation.strategy, **number)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        for more in ({}, dict(SAMPLING, prefill_chunk_size=3, return_dict_in_generate=True)):
            target.generate(**arguments, **more)
            target.generate(**arguments, **more, **given)


# ---- inputs


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=str)
def test_no_inputs_at_all(target, speculation: Speculation, sampling: dict):
    """generate() starts from the BOS token."""
    for inputs in ({}, dict(input_ids=None, attention_mask=None), dict(inputs=None, bos_token_id=9)):
        speculation.same(target.generate, **inputs, max_new_tokens=NEW_TOKENS, **sampling)


def test_positional_inputs(target, speculation: Speculation):
    input_ids = ragged_batch(padding=(0, 0, 0))["input_ids"]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, pad_token_id=PAD, eos_token_id=EOS)
    speculation.same(target.generate, input_ids, max_new_tokens=NEW_TOKENS)
    speculation.same(target.generate, input_ids, config)


def test_inputs_without_a_mask(target, speculation: Speculation):
    """generate() finds the padding by its token, if there is no mask."""
    input_ids = ragged_batch()["input_ids"]
    reference = speculation.same(target.generate, input_ids=input_ids, max_new_tokens=NEW_TOKENS)
    assert reference.tolist() == target.generate(**ragged_batch(), max_new_tokens=NEW_TOKENS).tolist()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_mask_of_another_dtype(target, speculation: Speculation, dtype: torch.dtype):
    batch = ragged_batch()
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    speculation.same(target.generate, **batch, max_new_tokens=NEW_TOKENS)


def test_int32_inputs(target, speculation: Speculation):
    """NumPy on Windows makes such; plain generate() takes them, and returns int64."""
    batch = ragged_batch()
    batch["input_ids"] = batch["input_ids"].int()
    assert speculation.same(target.generate, **batch, max_new_tokens=NEW_TOKENS).dtype == torch.int64
    assert target.generate(**batch, max_new_tokens=NEW_TOKENS, **speculation.arguments).dtype == torch.int64


@pytest.mark.parametrize("holes", [[(0, 4)], [(1, 7), (2, 6), (2, 7)], [(row, 7) for row in range(5)]], ids=str)
def test_masks_with_holes(target, speculation: Speculation, holes: list[tuple[int, int]]):
    batch = ragged_batch(padding=(0, 3, 5, 1, 6))
    without = target.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    for row, column in holes:
        batch["attention_mask"][row, column] = 0
    reference = speculation.same(target.generate, **batch, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    changed = (reference != without).any(1)
    assert changed.any(), "the holes make no difference to this target"


@pytest.mark.parametrize("chunk", [1, 16, 69, 70, 71])
def test_long_prompts_in_chunks(target, speculation: Speculation, chunk: int):
    """Some rows are padding only in the first chunks."""
    batch = ragged_batch(padding=(0, 30, 61, 7), width=70)
    speculation.same(target.generate, **batch, max_new_tokens=NEW_TOKENS, prefill_chunk_size=chunk)


def test_inputs_embeds_are_refused(target, speculation: Speculation):
    batch = ragged_batch(padding=(0, 0))
    embeds = target.get_input_embeddings()(batch["input_ids"])
    for inputs in (dict(inputs_embeds=embeds), dict(batch, inputs_embeds=embeds)):
        with pytest.raises(ValueError, match=r"inputs_embeds is not supported.*input_ids"):
            target.generate(**inputs, max_new_tokens=4, **speculation.arguments)
    assert hooks_of(target) == 0


def test_package_function_as_custom_generate(target, speculation: Speculation):
    """generate() takes functions as well, but of another kind. What they get is no call of ours."""
    with pytest.raises((TypeError, ValueError)) as caught:
        target.generate(
            **ragged_batch(), max_new_tokens=4, assistant_model=speculation.drafter, custom_generate=generate
        )
    assert "custom_generate" in str(caught.value) and "past_key_values was passed" not in str(caught.value)


def test_path_as_custom_generate(target, speculation: Speculation):
    """transformers passes over it, and then asks the drafter to generate: the message says what to do."""
    arguments = dict(ragged_batch(), max_new_tokens=4, assistant_model=speculation.drafter, trust_remote_code=True)
    with pytest.raises(AttributeError, match=r"passes over a Path, so give custom_generate=str\(path\)"):
        target.generate(**arguments, custom_generate=speculation.folder)
    with pytest.raises(ValueError, match=r"model\.generate\(\.\.\., custom_generate=<string>\)"):
        generate(target, speculation.drafter, **ragged_batch(), custom_generate=speculation.folder)
    with speculation.expected():
        target.generate(**arguments, custom_generate=str(speculation.folder))


# ---- streamers


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=str)
@pytest.mark.parametrize("options", [{}, dict(skip_prompt=True, skip_special_tokens=True)], ids=str)
def test_text_streamer(target, tokenizer, speculation: Speculation, capsys, options: dict, sampling: dict):
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")

    def printed(**arguments) -> str:
        capsys.readouterr()
        target.generate(
            **inputs, **sampling, max_new_tokens=30, streamer=TextStreamer(tokenizer, **options), **arguments
        )
        return capsys.readouterr().out

    text = speculation.same(printed)
    assert len(text) > 20 and text.endswith("\n")
    assert text.startswith(PROMPTS[1]) != bool(options)


def test_text_iterator_streamer(target, tokenizer, speculation: Speculation):
    """Chunks equal plain generate()'s, and the first ones are there while the last tokens are still to come."""
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    width, space = inputs["input_ids"].shape[1], tokenizer.convert_tokens_to_ids(" ")

    def words(row: int, input_ids: torch.Tensor) -> list[int]:
        """Every second token is a space: text is streamed up to the last one."""
        return [space] if len(input_ids) % 2 else list(range(6, 32))

    def chunks(**arguments) -> list[str]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=PATIENCE)
        received = Event()

        def wait(input_ids, scores, **kwargs):
            if input_ids.shape[1] == width + 14:
                assert received.wait(PATIENCE), "no text arrived before the 14th token"
            return torch.zeros(len(input_ids), dtype=torch.bool)

        settings = dict(max_new_tokens=24, prefix_allowed_tokens_fn=words, eos_token_id=None, stopping_criteria=[wait])
        errors = []

        def call() -> None:
            try:
                target.generate(**inputs, **settings, streamer=streamer, **arguments)
            except BaseException as error:
                errors.append(error)
                streamer.end()  # or the loop below would wait for it

        thread = Thread(target=call)
        thread.start()
        texts = []
        for text in streamer:
            texts.append(text)
            if text:
                received.set()
        thread.join(PATIENCE)
        assert not errors, repr(errors)
        return texts

    texts = speculation.same(chunks)
    assert len([text for text in texts if text]) in (12, 24)  # one a word, and since transformers 5.24 one a token


# ---- threads


class Meeting(Recorder):
    """A streamer that calls `at[n]` when it gets its nth columns, the prompt being the 0th."""

    def __init__(self, at: dict[int, Callable]):
        super().__init__()
        self.at = at

    def put(self, value: torch.Tensor) -> None:
        if (event := self.at.get(len(self.calls))) is not None:
            event()
        super().put(value)


def in_threads(*calls: Callable) -> list:
    """Results of the calls, or what they raised."""
    results: list = [None] * len(calls)

    def run(place: int) -> None:
        try:
            results[place] = calls[place]()
        except BaseException as error:
            results[place] = error

    threads = [Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.fixture
def drafters(target: PreTrainedModel) -> list[SpecFormerModel]:
    """Different ones: they read different hidden states, and draft different numbers of tokens."""
    configs = (
        SpecFormerConfig.from_target_config(target.config, num_draft_tokens=3),
        SpecFormerConfig.paper(target.config, num_draft_tokens=5, target_layer_ids=[0, 1, 3]),
    )
    return [SpecFormerModel(config).eval() for config in configs]


BATCHES = [ragged_batch(seed=4), ragged_batch(padding=(2, 0, 0), width=6, seed=5)]


def watched(target, drafter: SpecFormerModel, batch: dict, streamer=None) -> tuple[list, list]:
    """The text of a call, and the states of the target that the drafter read for it."""
    read, owner = [], current_thread()

    def note(module, args) -> None:
        if current_thread() is owner:
            read.append(args[0].clone())

    handle = drafter.input_norm.register_forward_pre_hook(note)
    try:
        settings = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None, prompt_lookup_num_tokens=0)
        return generate(target, drafter, **batch, **settings, streamer=streamer).tolist(), read
    finally:
        handle.remove()


@pytest.mark.parametrize("shared", [False, True], ids=["two drafters", "one drafter"])
def test_two_threads_on_one_target(target, drafters: list[SpecFormerModel], shared: bool):
    """They are inside their decoding loops at the same time, and meet there twice. Each drafter reads the states of its
    own thread's passes, whose hooks are there for them alone."""
    settings = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)
    recorders = [Recorder() for _ in BATCHES]
    references = [
        target.generate(**batch, **settings, streamer=recorder).tolist()
        for batch, recorder in zip(BATCHES, recorders, strict=True)
    ]
    used = [drafters[0], drafters[0] if shared else drafters[1]]
    alone = [watched(target, drafter, batch)[1] for drafter, batch in zip(used, BATCHES, strict=True)]
    barrier, hooks = Barrier(2, timeout=PATIENCE), []

    def meet() -> None:
        barrier.wait()
        hooks.append(hooks_of(target))
        barrier.wait()

    streamers = [Meeting({1: meet, 8: meet}) for _ in BATCHES]
    results = in_threads(
        *(
            lambda arguments=arguments: watched(target, *arguments)
            for arguments in zip(used, BATCHES, streamers, strict=True)
        )
    )
    assert [text for text, _ in results] == references
    assert [streamer.calls for streamer in streamers] == [recorder.calls for recorder in recorders]
    for (_, read), expected in zip(results, alone, strict=True):
        torch.testing.assert_close(read, expected)
    assert hooks == [0] * 4
    assert hooks_of(target) == 0


def test_thread_beside_plain_generate(target, drafters: list[SpecFormerModel]):
    """Plain generate() and its hidden states are not seen by the drafter of another thread."""
    settings = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)
    references = [target.generate(**batch, **settings).tolist() for batch in BATCHES]
    alone = watched(target, drafters[0], BATCHES[0])[1]
    barrier = Barrier(2, timeout=PATIENCE)
    streamers = [Meeting({1: barrier.wait, 5: barrier.wait, 9: barrier.wait}) for _ in BATCHES]
    (text, read), plain_text = in_threads(
        lambda: watched(target, drafters[0], BATCHES[0], streamers[0]),
        lambda: target.generate(**BATCHES[1], **settings, streamer=streamers[1]).tolist(),
    )
    assert [text, plain_text] == references
    torch.testing.assert_close(read, alone)
    assert hooks_of(target) == 0


def test_thread_that_raises(target, drafters: list[SpecFormerModel]):
    """Its error arrives, its hooks are gone, and the other thread goes on as if nothing had been."""
    settings = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)
    reference = target.generate(**BATCHES[0], **settings).tolist()
    barrier, raised = Barrier(2, timeout=PATIENCE), Event()

    def fail() -> None:
        raise OSError("the connection is closed")

    def wait() -> None:
        assert raised.wait(PATIENCE)

    def failing_call() -> None:
        try:
            streamer = Meeting({1: barrier.wait, 4: fail})
            generate(target, drafters[1], **BATCHES[1], **settings, streamer=streamer)
        finally:
            raised.set()

    streamer = Meeting({1: barrier.wait, 4: wait})
    result, error = in_threads(
        lambda: generate(target, drafters[0], **BATCHES[0], **settings, streamer=streamer).tolist(), failing_call
    )
    assert isinstance(error, OSError), repr(error)
    assert result == reference
    assert hooks_of(target) == 0
    assert generate(target, drafters[1], **BATCHES[0], **settings).tolist() == reference


def test_thread_that_leaves_during_a_pass_of_another(target, drafters: list[SpecFormerModel]):
    """A pass that has begun calls the hooks that were there, also those that have been removed since."""
    drafter = drafters[0]
    passing, left = Event(), Event()

    def hold(module, args) -> None:
        if current_thread() is main:
            passing.set()
            assert left.wait(PATIENCE)

    main = current_thread()
    layer = target.model.layers[drafter.config.target_layer_ids[0]]
    reference = target(**BATCHES[0], use_cache=False).logits
    handle = layer.register_forward_pre_hook(hold)
    inside = Event()

    def enter() -> None:
        inside.set()
        assert passing.wait(PATIENCE)

    def call() -> None:
        try:
            generate(target, drafter, **BATCHES[1], max_new_tokens=4, eos_token_id=None, streamer=Meeting({1: enter}))
        finally:
            left.set()

    thread = Thread(target=call)
    thread.start()
    try:
        assert inside.wait(PATIENCE)
        assert torch.equal(target(**BATCHES[0], use_cache=False).logits, reference)
    finally:
        passing.set()
        thread.join(PATIENCE)
        handle.remove()


# ---- modes of torch


def test_inference_mode(target, speculation: Speculation):
    for _ in range(2):
        with torch.inference_mode():
            speculation.same(target.generate, **ragged_batch(), max_new_tokens=NEW_TOKENS)
            speculation.same(target.generate, **ragged_batch(), max_new_tokens=NEW_TOKENS, **SAMPLING)
        speculation.same(target.generate, **ragged_batch(), max_new_tokens=NEW_TOKENS)


def test_drafter_that_moved_in_inference_mode_can_be_trained(target, speculation: Speculation):
    """A copy of it computes in the target's dtype; it stays an ordinary module."""
    drafter = speculation.drafter
    drafter.to(torch.bfloat16)
    with torch.inference_mode():
        target.generate(**ragged_batch(), max_new_tokens=4, **speculation.arguments)
    assert {parameter.dtype for parameter in drafter.parameters()} == {torch.bfloat16}
    drafter.float()
    assert not any(parameter.is_inference() for parameter in drafter.parameters())
    states = torch.randn(1, 3, len(drafter.config.target_layer_ids), drafter.config.hidden_size)
    drafter(states, torch.randn(1, 3, drafter.config.hidden_size)).draft_hidden_states.sum().backward()


@pytest.mark.parametrize("first_call", ["before", "inside"])
def test_autocast(target, speculation: Speculation, first_call: str):
    """Half precision, in which texts need not be equal; nor does the probe expect more than that."""
    batch = ragged_batch()
    if first_call == "before":
        target.generate(**batch, max_new_tokens=2, **speculation.arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = target.generate(**batch, max_new_tokens=NEW_TOKENS)
        sequences = target.generate(**batch, max_new_tokens=NEW_TOKENS, **speculation.arguments)
    assert sequences[:, :10].tolist() == plain[:, :10].tolist()  # the prompt pass is the same computation
    speculation.same(target.generate, **batch, max_new_tokens=NEW_TOKENS)


@pytest.fixture
def default_device():
    """Whatever is made on it holds no values: what a call computes with must not be."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


RULES = [
    {},
    SAMPLING,
    dict(do_sample=True, acceptance="coupled"),
    dict(do_sample=True, acceptance="rejection"),
    dict(repetition_penalty=1.2, suppress_tokens=[9, 8], eos_token_id=[EOS, 7], prefill_chunk_size=3),
]


@pytest.mark.parametrize("kind", ["anchor", "all of it", "assistant", "copies"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("number", [3, "auto"])
def test_another_default_device(kind: str, rule: dict, number: int | str, request):
    """The target and its inputs are elsewhere: plain generate() works."""
    target, drafter, batch = llama(), None, ragged_batch()
    arguments = dict(rule, max_new_tokens=NEW_TOKENS)
    if kind in PRESETS:
        drafter = SpecFormerModel(PRESETS[kind](target.config)).eval()
        drafter.init_from_target(target)
    elif kind == "assistant":
        drafter = llama(seed=1, num_hidden_layers=2)
    request.getfixturevalue("default_device")
    assert torch.zeros(()).is_meta
    number = dict(prompt_lookup_num_tokens=3) if kind == "copies" else dict(num_assistant_tokens=number)
    torch.manual_seed(3)
    output = generate(target, drafter, **batch, **arguments, **number, return_dict_in_generate=True)
    assert sum(output.statistics.drafted_per_slot) > 0
    if "acceptance" in rule:
        return
    torch.manual_seed(3)
    assert output.sequences.tolist() == target.generate(**batch, **arguments).tolist()


@pytest.mark.parametrize("trained", ["target", "drafter", "both"])
def test_train_mode(target, speculation: Speculation, trained: str):
    """As after an epoch of fine-tuning: no dropout here, so it makes no difference, and the mode stays."""
    modes = trained in ("target", "both"), trained in ("drafter", "both")
    target.train(modes[0])
    speculation.drafter.train(modes[1])
    reference = speculation.same(target.generate, **ragged_batch(), max_new_tokens=NEW_TOKENS)
    assert (target.training, speculation.drafter.training) == modes
    assert not reference.requires_grad
    assert all(parameter.grad is None for parameter in target.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated")
@pytest.mark.parametrize("trained", [False, True])
def test_gradient_checkpointing(target, speculation: Speculation, trained: bool):
    """It may switch the cache off while a model is trained (before transformers 5.24): the message says what to do."""
    arguments = dict(ragged_batch(), max_new_tokens=NEW_TOKENS, eos_token_id=None)
    reference = target.generate(**arguments).tolist()
    target.gradient_checkpointing_enable()
    target.train(trained)
    try:
        assert target.generate(**arguments, **speculation.arguments).tolist() == reference
    except (RuntimeError, ValueError) as error:
        assert trained and "model.eval()" in str(error)
        assert not cache_of(target(**ragged_batch(), use_cache=True))  # it is not said without a reason
        target.eval()
        assert target.generate(**arguments, **speculation.arguments).tolist() == reference


def test_processor_that_runs_the_target_itself(target, speculation: Speculation):
    """Its passes are not those that the drafter reads."""

    def guidance(input_ids, scores):
        return scores + 0.3 * target(input_ids=input_ids[:, -3:]).logits[:, -1]

    speculation.same(target.generate, **ragged_batch(), max_new_tokens=NEW_TOKENS, logits_processor=[guidance])
