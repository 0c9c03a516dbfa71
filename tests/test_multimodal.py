"""Models that also read images, with text alone: plain generate()'s text, and images refused in a sentence."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from exactness import check, choose_eos, oracle, plain
from shrunken import make_target
from test_exactness import SAMPLING
from tiny import llama, ragged_batch

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation import target_states
from specformer.generation.target_refusals import UnsupportedTargetError
from specformer.generation.target_states import find_decoder

IN_EVERY_RUN = [
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "LlavaForConditionalGeneration",
]
IN_LONG_RUNS = [
    *("Qwen2VLForConditionalGeneration", "Qwen3VLForConditionalGeneration", "Glm4vForConditionalGeneration"),
    *("Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration", "MllamaForConditionalGeneration"),
    *("Idefics3ForConditionalGeneration", "InternVLForConditionalGeneration", "Lfm2VlForConditionalGeneration"),
]
FAMILIES = [name for name in IN_EVERY_RUN if hasattr(transformers, name)]
FAMILIES += [pytest.param(name, marks=pytest.mark.slow) for name in IN_LONG_RUNS if hasattr(transformers, name)]
NEW_TOKENS = 20


@cache
def multimodal(name: str):
    """A target in float64, a ragged batch of text, and a token that ends rows of it."""
    target, batch = make_target(name, torch.float64, 0, 0.15), ragged_batch()
    texts = target.generate(**batch, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    assert len(texts[:, 9:].unique()) > 8, "degenerate texts"
    return target, batch, choose_eos(texts, 9)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone(name: str):
    target, batch, eos = multimodal(name)
    config = SpecFormerConfig.from_target_config(target.config, initializer_range=0.3)
    network = SpecFormerModel(config).double()
    for arguments in (dict(eos_token_id=eos), dict(eos_token_id=None, **SAMPLING)):
        arguments = dict(arguments, max_new_tokens=NEW_TOKENS)
        reference = plain(target, batch, **arguments)
        for kind, k in (("sometimes", 1), ("adversarial", 3), ("always", 8)):
            check(target, batch, reference, oracle(reference, batch, kind, eos), k, **arguments)
        check(target, batch, reference, network, 3, **arguments)


def test_after_a_call_with_an_image():
    """What a call with an image leaves in the model is of no later text."""
    target, batch, eos = multimodal("Qwen2_5_VLForConditionalGeneration")
    arguments = dict(eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    target.model.rope_deltas = torch.full((5, 1), 7)
    check(target, batch, reference, oracle(reference, batch, "sometimes", eos), 3, **arguments)


def test_images_are_refused():
    target, batch, _ = multimodal("Qwen2_5_VLForConditionalGeneration")
    images = dict(pixel_values=torch.randn(4, 24), image_grid_thw=torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match=r"The inputs \['image_grid_thw', 'pixel_values'\] are not .* for text alone"):
        generate(target, None, **batch, **images, prompt_lookup_num_tokens=2, max_new_tokens=4)
    types = torch.zeros_like(batch["input_ids"])
    types[0, 2] = 1
    with pytest.raises(ValueError, match="it marks tokens of another kind, such as images"):
        generate(target, None, **batch, mm_token_type_ids=types, prompt_lookup_num_tokens=2, max_new_tokens=4)


@pytest.mark.slow
def test_layers_that_text_alone_does_not_go_through_have_no_states():
    target, batch, _ = multimodal("MllamaForConditionalGeneration")
    (skipped,) = target.config.text_config.cross_attention_layers
    config = SpecFormerConfig.from_target_config(target.config, target_layer_ids=[skipped, 4])
    with pytest.raises(RuntimeError, match=rf"layers \[{skipped}\], whose states .* other target_layer_ids"):
        generate(target, SpecFormerModel(config).double(), **batch, max_new_tokens=4)


def test_positions_that_differ_by_axis_are_refused():
    target, batch, _ = multimodal("Qwen2_5_VLForConditionalGeneration")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0).repeat(4, 1, 1)
    positions[2, 0, -1] += 1
    with pytest.raises(UnsupportedTargetError, match="its positions differ by axis"):
        generate(target, None, **batch, position_ids=positions, prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_positions_that_do_not_count_from_zero_are_refused():
    with pytest.raises(UnsupportedTargetError, match="does not number a prompt's positions from 0"):
        target = make_target("PaliGemmaForConditionalGeneration", torch.float32, 0, 0.15)
        generate(target, None, **ragged_batch(), prompt_lookup_num_tokens=2, max_new_tokens=4)


@pytest.mark.parametrize("name", ["GitForCausalLM", "LlavaForConditionalGeneration"])
def test_a_vision_tower_is_not_taken_for_the_decoder(name: str):
    """Also where it has as many layers as there are for text."""
    target = make_target(name, torch.float32, 0, 0.15)
    layers = find_decoder(target)[1]
    towers = [module for module in target.modules() if "Vision" in type(module).__name__]
    assert towers and not any(layer in tower.modules() for tower in towers for layer in layers)
    seen = []
    layers[0].register_forward_hook(lambda *_: seen.append(True))
    target(**ragged_batch())
    assert seen


def test_the_decoder_is_found_without_a_walk_through_all_modules(monkeypatch):
    """Each pass looks for it."""
    target, walked, walk = llama(torch.float32), [], target_states.text_modules

    def counted(module, model):
        for found in walk(module, model):
            walked.append(found)
            yield found

    monkeypatch.setattr(target_states, "text_modules", counted)
    assert find_decoder(target)[1] is target.model.layers
    assert walked == [target.model]
