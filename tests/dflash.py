"""Tiny DFlash checkpoints in the formats that projects write, and their drafts by plain loops."""

from __future__ import annotations

import torch

MASK = 3
HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER, LAYERS = 4, 2, 8, 32, 40, 2


def fields(target, **more) -> dict:
    """Sizes of the layers, as both formats name them."""
    config = target.config.get_text_config(decoder=True)
    return dict(
        vocab_size=config.vocab_size,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        hidden_act="silu",
        **more,
    )


def raw_config(target, block_size: int = 5, **more) -> dict:
    """z-lab's; states are read after the layers that it names."""
    own = dict(mask_token_id=MASK, target_layer_ids=[0, 1, 2])
    return dict(architectures=["DFlashDraftModel"], block_size=block_size, dflash_config=own, **fields(target, **more))


def speculators_config(target, kind: str = "dflash", block_size: int = 5, layers: dict | None = None, **more) -> dict:
    return {
        "architectures": ["DFlashSpeculator" if kind == "dflash" else "DSparkSpeculator"],
        "speculators_model_type": kind,
        "transformer_layer_config": {"model_type": "qwen3", **fields(target, **(layers or {}))},
        "aux_hidden_state_layer_ids": [1, 2, 3],
        "block_size": block_size,
        "mask_token_id": MASK,
        "draft_vocab_size": target.config.vocab_size,
        **more,
    }


def random_weights(
    target, draft_vocab: int | None = None, markov: str | None = None, confidence: int = 0, seed: int = 0
) -> dict:
    """Tensors by their names. `markov`: the kind of a head of rank 6; `confidence`: what that head reads."""
    generator = torch.Generator().manual_seed(seed)
    vocab = target.config.vocab_size

    def normal(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    def scale(size: int) -> torch.Tensor:
        return 1 + normal(size)

    weights = {"fc.weight": normal(WIDTH, 3 * target.config.hidden_size), "norm.weight": scale(WIDTH)}
    weights["hidden_norm.weight"] = scale(WIDTH)
    for layer in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }.items():
            weights[f"layers.{layer}.{name}.weight"] = normal(*shape)
        for name, size in {
            "self_attn.q_norm": HEAD_DIM,
            "self_attn.k_norm": HEAD_DIM,
            "input_layernorm": WIDTH,
            "post_attention_layernorm": WIDTH,
        }.items():
            weights[f"layers.{layer}.{name}.weight"] = scale(size)
    if draft_vocab:
        ids = torch.randperm(vocab, generator=generator)[:draft_vocab].sort().values
        weights["d2t"] = ids - torch.arange(draft_vocab)
        weights["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
        weights["lm_head.weight"] = normal(draft_vocab, WIDTH)
    if markov:
        weights["markov_head.markov_w1.weight"] = 5 * normal(vocab, 6)
        weights["markov_head.markov_w2.weight"] = 5 * normal(draft_vocab or vocab, 6)
        if markov == "gated":
            weights["markov_head.gate_proj.weight"] = normal(6, WIDTH + 6)
            weights["markov_head.gate_proj.bias"] = normal(6)
    if confidence:
        weights["confidence_head.proj.weight"], weights["confidence_head.proj.bias"] = normal(1, confidence), normal(1)
    return weights


def turn(head: torch.Tensor, position: int) -> torch.Tensor:
    """The rotary embedding of one head at one position, pair by pair."""
    half, turned = HEAD_DIM // 2, head.clone()
    for pair in range(half):
        angle = torch.tensor(position * 10000.0 ** (-pair / half), dtype=torch.float64)
        a, b = head[pair], head[pair + half]
        turned[pair] = a * angle.cos() - b * angle.sin()
        turned[pair + half] = b * angle.cos() + a * angle.sin()
    return turned


def drafts_by_loops(target, weights: dict, text: list[int], block_size: int, from_anchor: bool = False) -> list[int]:
    """Greedy drafts after `text`, whose last token the target has not read: one text, one head, one key at a time.

    Written from the papers and the formats' description, in double precision throughout.
    """
    weights = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    with torch.no_grad():
        states = target(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states
    known = len(text) - 1

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        return values / (values.pow(2).mean() + 1e-6).sqrt() * weights[f"{name}.weight"]

    context = []
    for place in range(known):
        fused = torch.cat([states[layer][0, place].double() for layer in (1, 2, 3)])
        context.append(norm(weights["fc.weight"] @ fused, "hidden_norm"))
    embeddings = target.get_input_embeddings().weight.detach().double()
    block = [embeddings[token] for token in [text[-1], *[MASK] * (block_size - 1)]]
    for layer in range(LAYERS):
        part = f"layers.{layer}."
        attention = part + "self_attn."

        def project(name: str, values: torch.Tensor, at: str = attention) -> torch.Tensor:
            return (weights[f"{at}{name}.weight"] @ values).view(-1, HEAD_DIM)

        normed = [norm(slot, part + "input_layernorm") for slot in block]
        seen = [*context, *normed]
        keys = [
            [turn(norm(head, attention + "k_norm"), place) for head in project("k_proj", values)]
            for place, values in enumerate(seen)
        ]
        values_of = [project("v_proj", values) for values in seen]
        for slot, values in enumerate(normed):
            heads = []
            for number, head in enumerate(project("q_proj", values)):
                query, shared = turn(norm(head, attention + "q_norm"), known + slot), number // (HEADS // KV_HEADS)
                scores = torch.stack([query @ key[shared] for key in keys]) / HEAD_DIM**0.5
                weighed = zip(scores.softmax(0), values_of, strict=True)
                heads.append(sum(share * value[shared] for share, value in weighed))
            block[slot] = block[slot] + weights[attention + "o_proj.weight"] @ torch.cat(heads)
        for slot, values in enumerate(block):
            inner = norm(values, part + "post_attention_layernorm")
            gate = torch.nn.functional.silu(weights[part + "mlp.gate_proj.weight"] @ inner)
            up = weights[part + "mlp.up_proj.weight"] @ inner
            block[slot] = values + weights[part + "mlp.down_proj.weight"] @ (gate * up)
    head = weights.get("lm_head.weight", target.get_output_embeddings().weight.detach().double())
    drafts, previous = [], text[-1]
    for slot in block if from_anchor else block[1:]:
        state = norm(slot, "norm")
        logits = head @ state
        if "markov_head.markov_w1.weight" in weights:
            bias = weights["markov_head.markov_w1.weight"][previous]
            if "markov_head.gate_proj.weight" in weights:
                both = torch.cat([state, bias])
                gate = weights["markov_head.gate_proj.weight"] @ both + weights["markov_head.gate_proj.bias"]
                bias = bias * gate.sigmoid()
            logits = logits + weights["markov_head.markov_w2.weight"] @ bias
        best = int(logits.argmax())
        previous = best + int(weights["d2t"][best]) if "d2t" in weights else best
        drafts.append(previous)
    return drafts
