"""ParallelSpec drafters: the drafts of their definition, in any batch, and plain generate()'s text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dflash import turn
from exactness import check, plain
from foreign import assert_drafts, assert_rows_draft_as_alone, recorded, save
from test_eagle_and_pard import HEAD_DIM, HEADS, KV_HEADS, MASK, WIDTH, eagle_weights, speculators_config
from test_exactness import NEW_TOKENS, SETTINGS, crossed, meaningful_target
from tiny import VOCAB, llama, ragged_batch
from torch.nn import functional

from specformer import generate
from specformer.generation.drafter_parallelspec import ParallelSpecDrafter


def checkpoint(seed: int = 0, own_embeddings: bool = False, **switches) -> tuple[dict, dict]:
    """Config and weights. `own_embeddings`: as P-EAGLE's are by default."""
    norms = ("fc_norm.0", "fc_norm.1", "fc_norm.2") if switches.get("fc_norm") else ()
    config = speculators_config(**switches) | dict(
        architectures=["PEagleSpeculator"], speculators_model_type="peagle", mask_token_id=MASK
    )
    generator = torch.Generator().manual_seed(seed + 9)
    weights = eagle_weights(norms=norms, seed=seed)
    weights["mask_hidden"] = torch.randn(1, 1, 3 * WIDTH, generator=generator)
    if own_embeddings:
        weights["embed_tokens.weight"] = torch.randn(VOCAB, WIDTH, generator=generator)
    else:
        config["embed_requires_grad"] = False
    return config, weights


CHECKPOINTS = {
    "the target's embeddings": checkpoint(),
    "its own": checkpoint(own_embeddings=True, norm_before_residual=True),
    "a norm a state": checkpoint(fc_norm=True),
}


def drafts_by_loops(target, config: dict, weights: dict, text: list[int], count: int) -> list[int]:
    """Greedy drafts after `text`, whose last token the target has not read, without a cache: one slot and one head at a
    time, in double precision."""
    weights = {name: values.double() for name, values in weights.items()}
    with torch.no_grad():
        read = target(input_ids=torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        return values / (values.pow(2).mean() + 1e-6).sqrt() * weights[f"{name}.weight"]

    table = weights.get("embed_tokens.weight", target.get_input_embeddings().weight.detach().double())
    inputs = [
        ([read[layer][0, place].double() for layer in config["eagle_aux_hidden_state_layer_ids"]], text[place + 1])
        for place in range(len(text) - 1)
    ]
    inputs += [(list(weights["mask_hidden"][0, 0].split(WIDTH)), MASK)] * (count - 1)
    part, attention = "layers.0.", "layers.0.self_attn."
    hidden, keys, values = [], [], []
    drafts = []
    for place, (states, token) in enumerate(inputs):
        if "fc_norm.0.weight" in weights:
            states = [norm(state, f"fc_norm.{number}") for number, state in enumerate(states)]
        hidden.append(weights["fc.weight"] @ torch.cat(states))
        normed = norm(hidden[-1], part + "hidden_norm")
        both = torch.cat([norm(table[token], part + "input_layernorm"), normed])
        query, key, value = ((weights[f"{attention}{name}_proj.weight"] @ both).view(-1, HEAD_DIM) for name in "qkv")
        keys.append([turn(head, place) for head in key])
        values.append(value)
        if place < len(text) - 2:
            continue
        heads = []
        for number, head in enumerate(query):
            shared = number // (HEADS // KV_HEADS)
            scores = torch.stack([turn(head, place) @ key[shared] for key in keys]) / HEAD_DIM**0.5
            heads.append(sum(w * value[shared] for w, value in zip(scores.softmax(0), values, strict=True)))
        around = normed if config.get("norm_before_residual") else hidden[-1]
        out = around + weights[attention + "o_proj.weight"] @ torch.cat(heads)
        inner = norm(out, part + "post_attention_layernorm")
        gate = functional.silu(weights[part + "mlp.gate_proj.weight"] @ inner)
        out = out + weights[part + "mlp.down_proj.weight"] @ (gate * (weights[part + "mlp.up_proj.weight"] @ inner))
        best = int((weights["lm_head.weight"] @ norm(out, "norm")).argmax())
        drafts.append(best + int(weights["d2t"][best]))
    return drafts


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_drafts_are_those_of_plain_loops(kind: str, tmp_path: Path, monkeypatch):
    target, (config, weights) = llama(), CHECKPOINTS[kind]
    folder, rounds = save(tmp_path, config, weights), recorded(monkeypatch, ParallelSpecDrafter)
    prompt = torch.tensor([[7, 30, 12, 9, 41, 22]])
    settings = dict(max_new_tokens=12, eos_token_id=None, do_sample=False)
    text = generate(target, folder, prompt, num_assistant_tokens=4, prompt_lookup_num_tokens=0, **settings)[0].tolist()
    assert_drafts(rounds, text, 7, 4, lambda so_far: drafts_by_loops(target, config, weights, so_far, 4))


def test_every_row_of_a_batch_drafts_as_it_does_alone(tmp_path: Path):
    assert_rows_draft_as_alone(llama(), save(tmp_path, *CHECKPOINTS["its own"]), ragged_batch())


@pytest.mark.parametrize(("name", "setting"), crossed("llama", "gemma3", "mistral-sliding"))
def test_the_text_is_that_of_plain_generate(name: str, setting: str, tmp_path: Path):
    target, batch, eos = meaningful_target(name)
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    folder = save(tmp_path, *CHECKPOINTS["the target's embeddings"])
    for k in (1, 3, "auto"):
        check(target, batch, reference, folder, k, **arguments)
    check(target, batch, reference, folder, 3, prompt_lookup_num_tokens=0, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask_token_id=None), "mask_token_id is None; expected a token of the 64"),
        (dict(mask_token_id=VOCAB), "mask_token_id is 64; expected a token"),
        (dict(embed_requires_grad=True), r"embed_tokens\.weight is missing"),
        (dict(eagle_aux_hidden_state_layer_ids=[1, 2, 3, 4]), r"do not fit .*is missing"),
        (dict(transformer_layer_config={"num_hidden_layers": 2}), "is not that of|expected 1"),
    ],
)
def test_configs_that_are_of_no_use(change: dict, message: str, tmp_path: Path):
    config, weights = CHECKPOINTS["the target's embeddings"]
    with pytest.raises(ValueError, match=message):
        generate(llama(), save(tmp_path, config | change, weights), torch.tensor([[7]]), max_new_tokens=2)
