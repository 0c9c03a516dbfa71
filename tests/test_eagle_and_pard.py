"""EAGLE-3 drafters and causal LMs that draft in parallel (PARD): the drafts of their own definition, in any batch, and
plain generate()'s text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from exactness import check, plain
from foreign import assert_drafts, assert_rows_draft_as_alone, recorded, save
from test_exactness import NEW_TOKENS, SETTINGS, crossed, meaningful_target
from tiny import VOCAB, llama, ragged_batch
from torch.nn import functional

from specformer import generate
from specformer.generation.drafter_eagle import EagleDrafter
from specformer.generation.drafter_parallel import ParallelDrafter

WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, MASK = 32, 40, 4, 2, 8, 3


# ---- EAGLE-3


def layer_fields(**more) -> dict:
    return dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        hidden_act="silu",
        **more,
    )


def speculators_config(model_type: str = "llama", **more) -> dict:
    return dict(
        architectures=["Eagle3Speculator"],
        speculators_model_type="eagle3",
        transformer_layer_config=layer_fields(model_type=model_type, head_dim=HEAD_DIM),
        draft_vocab_size=24,
        eagle_aux_hidden_state_layer_ids=[1, 2, 4],
        **more,
    )


def eagle_weights(layer: str = "layers.0.", draft_vocab: int = 24, norms: tuple[str, ...] = (), seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    shapes = {
        "fc": (WIDTH, 3 * WIDTH),
        "lm_head": (draft_vocab, WIDTH),
        f"{layer}self_attn.q_proj": (HEADS * HEAD_DIM, 2 * WIDTH),
        f"{layer}self_attn.k_proj": (KV_HEADS * HEAD_DIM, 2 * WIDTH),
        f"{layer}self_attn.v_proj": (KV_HEADS * HEAD_DIM, 2 * WIDTH),
        f"{layer}self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        f"{layer}mlp.gate_proj": (INNER, WIDTH),
        f"{layer}mlp.up_proj": (INNER, WIDTH),
        f"{layer}mlp.down_proj": (WIDTH, INNER),
    }
    weights = {f"{name}.weight": normal(*shape) for name, shape in shapes.items()}
    names = ["norm", *(f"{layer}{norm}" for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"))]
    weights |= {f"{name}.weight": 1 + normal(WIDTH) for name in names}
    for name in norms:
        size = HEAD_DIM if "self_attn" in name else 3 * WIDTH if name == "input_norm" else WIDTH
        weights[f"{name}.weight"] = 1 + normal(size)
    ids = torch.randperm(VOCAB, generator=generator)[:draft_vocab].sort().values
    weights["d2t"] = ids - torch.arange(draft_vocab)
    weights["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True)
    return weights


HEAD_NORMS = ("layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm")
EAGLES: dict[str, tuple[dict, dict]] = {
    "SafeAILab": (
        dict(architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=24, **layer_fields()),
        eagle_weights("midlayer."),
    ),
    "speculators": (speculators_config(norm_before_residual=True), eagle_weights()),
    "speculators, more norms": (
        speculators_config("qwen3", norm_before_fc=True, norm_output=True),
        eagle_weights(norms=("input_norm", *HEAD_NORMS)),
    ),
    "speculators, a norm a state": (
        speculators_config(fc_norm=True),
        eagle_weights(norms=("fc_norm.0", "fc_norm.1", "fc_norm.2")),
    ),
    "layers in eagle_config": (
        dict(
            architectures=["LlamaForCausalLMEagle3"],
            draft_vocab_size=24,
            eagle_config=dict(eagle_aux_hidden_state_layer_ids=[0, 1, 2]),  # after them
            **layer_fields(),
        ),
        eagle_weights("midlayer."),
    ),
}


def eagle_by_loops(
    target, config: dict, weights: dict, text: list[int], count: int, begun: Sequence[int] = (), size: int = 1
) -> list[int]:
    """Greedy drafts after `text`, whose last token the target has not read, without a cache: all pairs of state and
    next token are read again for each draft. The first ones are those that were `begun` with. Of Falcon a block of
    `size` drafts from as many pairs, which see one another."""
    weights = {name.replace("midlayer.", "layers.0."): values.double() for name, values in weights.items()}
    layers = config.get("eagle_aux_hidden_state_layer_ids") or [2, 2, 1]  # of the four that the target has
    if "eagle_config" in config:
        layers = [layer + 1 for layer in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
    with torch.no_grad():
        read = target(input_ids=torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        return values / (values.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def turned(heads: torch.Tensor) -> torch.Tensor:  # (T, heads, HEAD_DIM)
        half = HEAD_DIM // 2
        angles = torch.outer(torch.arange(len(heads)).double(), 10000.0 ** (-torch.arange(half).double() / half))
        cos, sin, a, b = angles.cos()[:, None], angles.sin()[:, None], heads[..., :half], heads[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    fused = [read[layer][0].double() for layer in layers]
    if "fc_norm.0.weight" in weights:
        fused = [norm(states, f"fc_norm.{place}") for place, states in enumerate(fused)]
    fused = torch.cat(fused, dim=-1)
    if "input_norm.weight" in weights:
        fused = norm(fused, "input_norm")
    states = list(fused @ weights["fc.weight"].T)
    embeddings, drafts = target.get_input_embeddings().weight.detach().double(), []
    part, attention = "layers.0.", "layers.0.self_attn."
    while len(drafts) < count:
        tokens = [*text[1:], *drafts]
        hidden = torch.stack(states)
        normed = norm(hidden, part + "hidden_norm")
        both = torch.cat([norm(embeddings[tokens], part + "input_layernorm"), normed], dim=-1)
        query, key, value = (
            (both @ weights[f"{attention}{name}_proj.weight"].T).view(len(both), -1, HEAD_DIM) for name in "qkv"
        )
        if f"{attention}q_norm.weight" in weights:
            query, key = norm(query, attention + "q_norm"), norm(key, attention + "k_norm")
        query, key = turned(query), turned(key)
        heads = []
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = query[:, head] @ key[:, shared].T / HEAD_DIM**0.5
            hidden_from = torch.ones_like(scores).triu(1).bool()
            hidden_from[-size:] = False
            scores = scores.masked_fill(hidden_from, -torch.inf)
            heads.append(scores.softmax(-1) @ value[:, shared])
        around = normed if config.get("norm_before_residual") else hidden
        out = around + torch.cat(heads, dim=-1) @ weights[attention + "o_proj.weight"].T
        inner = norm(out, part + "post_attention_layernorm")
        gate = functional.silu(inner @ weights[part + "mlp.gate_proj.weight"].T)
        out = out + (gate * (inner @ weights[part + "mlp.up_proj.weight"].T)) @ weights[part + "mlp.down_proj.weight"].T
        for state in out[-size:]:
            last = norm(state, "norm")
            best = int((weights["lm_head.weight"] @ last).argmax())
            drafts.append(begun[len(drafts)] if len(drafts) < len(begun) else best + int(weights["d2t"][best]))
            states.append(last if config.get("norm_output") else state)
    return drafts[:count]


@pytest.mark.parametrize("kind", EAGLES)
def test_eagle_drafts_are_those_of_plain_loops(kind: str, tmp_path: Path, monkeypatch):
    target, (config, weights) = llama(), EAGLES[kind]
    folder, rounds = save(tmp_path, config, weights), recorded(monkeypatch, EagleDrafter)
    prompt = torch.tensor([[7, 30, 12, 9, 41, 22]])
    settings = dict(max_new_tokens=12, eos_token_id=None, do_sample=False)
    text = generate(target, folder, prompt, num_assistant_tokens=4, prompt_lookup_num_tokens=0, **settings)[0].tolist()
    assert_drafts(rounds, text, 7, 4, lambda so_far: eagle_by_loops(target, config, weights, so_far, 4))


@pytest.mark.parametrize("kind", ["SafeAILab", "speculators, more norms"])
def test_every_row_of_a_batch_drafts_as_it_does_alone(kind: str, tmp_path: Path):
    target, batch, folder = llama(), ragged_batch(), save(tmp_path, *EAGLES[kind])
    assert_rows_draft_as_alone(target, folder, batch)


@pytest.mark.parametrize(("name", "setting"), crossed("llama", "gemma3", "mistral-sliding"))
def test_the_text_under_eagle_is_that_of_plain_generate(name: str, setting: str, tmp_path: Path):
    target, batch, eos = meaningful_target(name)
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    folder = save(tmp_path, *EAGLES["speculators"])
    for k in (1, 3, "auto"):
        check(target, batch, reference, folder, k, **arguments)
    check(target, batch, reference, folder, 3, prompt_lookup_num_tokens=0, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_hidden_layers=2), "num_hidden_layers is 2; expected 1"),
        (dict(draft_vocab_size=25), r"lm_head.weight is \(24, 32\), not \(25, 32\)"),
        (dict(eagle_config=dict(eagle_aux_hidden_state_layer_ids=[])), "expected a list of layers"),
        (dict(eagle_config=dict(eagle_aux_hidden_state_layer_ids=[1, 2, 8])), "4 layers, and state 9 is read"),
        (dict(eagle_config=[1]), "holds no drafter that could be read"),
        (dict(eagle_config=dict(eagle_aux_hidden_state_layer_ids=5)), "is not that of an EAGLE-3 drafter"),
        (dict(layer_types=["sliding_attention"], sliding_window=4), "a sliding window, which is not built"),
        (dict(intermediate_size=None), "is not that of an EAGLE-3 drafter|do not fit"),
    ],
)
def test_eagle_configs_that_are_of_no_use(change: dict, message: str, tmp_path: Path):
    config, weights = EAGLES["SafeAILab"]
    folder = save(tmp_path, config | change, weights)
    with pytest.raises(ValueError, match=message):
        generate(llama(), folder, torch.tensor([[7]]), max_new_tokens=2)


# ---- PARD


def parallel_lm(seed: int = 11, **fields):
    assistant = llama(seed=seed, num_hidden_layers=2, **fields)
    assistant.config.pard_token = MASK
    return assistant


def test_parallel_drafts_are_those_of_one_pass_over_text_and_masks(monkeypatch):
    target, assistant, rounds = llama(), parallel_lm(), recorded(monkeypatch, ParallelDrafter)
    prompt = torch.tensor([[7, 30, 12, 9, 41, 22]])
    text = generate(target, assistant, prompt, num_assistant_tokens=4, max_new_tokens=14, eos_token_id=None)[0].tolist()

    def expected(so_far: list[int]) -> list[int]:
        with torch.no_grad():
            return assistant(torch.tensor([[*so_far, MASK, MASK, MASK]])).logits[0, -4:].argmax(-1).tolist()

    assert_drafts(rounds, text, 7, 4, expected)


@pytest.mark.parametrize(("name", "setting"), crossed("llama", "gemma3", "gpt2"))
def test_the_text_under_parallel_drafts_is_that_of_plain_generate(name: str, setting: str):
    target, batch, eos = meaningful_target(name)
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for k in (1, 2, 5, "auto"):
        check(target, batch, reference, parallel_lm(), k, **arguments)


def test_every_row_of_a_batch_drafts_in_parallel_as_it_does_alone():
    """Each with another number of tokens to read, among them those of rounds in which nothing was drafted."""
    target, batch = llama(), ragged_batch()
    assistant = llama(seed=0)  # the target itself, whose first draft is always right
    assistant.config.pard_token = MASK
    # nothing is drafted for the last token of a text, but where other rows go on
    together = assert_rows_draft_as_alone(target, assistant, batch, slice(-1), prompt_lookup_num_tokens=None)
    assert together.statistics.accepted_per_slot[0] == together.statistics.drafted_per_slot[0]


@pytest.mark.parametrize("token", [VOCAB, -1, "3", 1.5])
def test_a_mask_token_that_is_none(token):
    assistant = parallel_lm()
    assistant.config.pard_token = token
    with pytest.raises(ValueError, match=r"pard_token of .* expected one of its 64 tokens"):
        generate(llama(), assistant, torch.tensor([[7]]), max_new_tokens=2)
