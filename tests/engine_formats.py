"""What engines read of the tiny drafters of `test_export`: recorded names, shapes and fields.

The names and shapes of "speculators" are what save_pretrained() of speculators 0.9.0's own DFlashDraftModel,
DSparkDraftModel, Eagle3DraftModel and PEagleDraftModel wrote for configs of these sizes, and the fields what was in its
config.json, with `architectures` as its config classes have it by default. Left out are `auto_map` and
`transformers_version`, and the embeddings of EAGLE-3, which are a copy of the target's. "dflash" and "gguf-ready" are
what vLLM 0.32.0 (qwen3_dflash.py, llama_eagle3.py) and the converter of llama.cpp (conversion/qwen.py and llama.py in
the source distribution of llama-cpp-python 0.3.36) look up: DFlash's by the same names, EAGLE-3's layer as SafeAILab
calls it.
"""

from __future__ import annotations

VOCAB, DRAFTED, WIDTH, INNER, HEAD_DIM, RANK = 64, 24, 32, 40, 8, 6
QUERIES, KEYS = 4 * HEAD_DIM, 2 * HEAD_DIM
HEAD_NORMS = {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}


def layer(name: str, width: int = WIDTH, **more) -> dict:
    """`width`: of what queries, keys and values are made of."""
    shapes = {
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
        "mlp.gate_proj.weight": (INNER, WIDTH),
        "mlp.up_proj.weight": (INNER, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER),
        "self_attn.q_proj.weight": (QUERIES, width),
        "self_attn.k_proj.weight": (KEYS, width),
        "self_attn.v_proj.weight": (KEYS, width),
        "self_attn.o_proj.weight": (WIDTH, QUERIES),
        **more,
    }
    return {f"{name}.{part}": shape for part, shape in shapes.items()}


TOKENS = {"d2t": (DRAFTED,), "t2d": (VOCAB,), "lm_head.weight": (DRAFTED, WIDTH)}
DFLASH = {
    "fc.weight": (WIDTH, 3 * WIDTH),
    "hidden_norm.weight": (WIDTH,),
    "norm.weight": (WIDTH,),
    **layer("layers.0", **HEAD_NORMS),
    **layer("layers.1", **HEAD_NORMS),
}
DSPARK = {
    **DFLASH,
    **TOKENS,
    "markov_head.markov_w1.weight": (VOCAB, RANK),
    "markov_head.markov_w2.weight": (DRAFTED, RANK),
    "confidence_head.proj.weight": (1, WIDTH + RANK),
    "confidence_head.proj.bias": (1,),
}
EAGLE_NORM = {"hidden_norm.weight": (WIDTH,)}
EAGLE_REST = {"fc.weight": (WIDTH, 3 * WIDTH), "norm.weight": (WIDTH,), **TOKENS}
EAGLE = {**EAGLE_REST, **layer("layers.0", 2 * WIDTH, **EAGLE_NORM)}
MIDLAYER = {**EAGLE_REST, **layer("midlayer", 2 * WIDTH, **EAGLE_NORM)}
EAGLE_NORMS = {
    **EAGLE_REST,
    **layer("layers.0", 2 * WIDTH, **EAGLE_NORM, **HEAD_NORMS),
    "input_norm.weight": (3 * WIDTH,),
}

SHAPES: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("DFlash", "speculators"): DFLASH,
    ("DFlash", "dflash"): DFLASH,
    ("DFlash", "gguf-ready"): DFLASH,
    ("DFlash, tokens of its own", "speculators"): DFLASH | TOKENS,
    ("DFlash, tokens of its own", "dflash"): DFLASH | TOKENS,
    ("DFlash, tokens of its own", "gguf-ready"): DFLASH | TOKENS,
    ("DFlash of speculators", "speculators"): DFLASH,
    ("DFlash of speculators", "dflash"): DFLASH,
    ("DFlash of speculators", "gguf-ready"): DFLASH,
    ("DSpark", "speculators"): DSPARK,
    ("DSpark", "gguf-ready"): DSPARK,
    ("EAGLE-3 of SafeAILab", "speculators"): EAGLE,
    ("EAGLE-3 of SafeAILab", "gguf-ready"): MIDLAYER,
    ("EAGLE-3", "speculators"): EAGLE,
    ("EAGLE-3", "gguf-ready"): MIDLAYER,
    ("EAGLE-3, norms of heads", "speculators"): EAGLE_NORMS,
    ("ParallelSpec", "speculators"): EAGLE | {"mask_hidden": (1, 1, 3 * WIDTH)},
}

LAYER_FIELDS = {
    "attention_bias": False,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
LAYER_KIND = {
    "norms of heads": ("qwen3", 1),
    "EAGLE-3": ("llama", 1),
    "DFlash": ("qwen3", 2),
    "DSpark": ("qwen3", 2),
    "Parallel": ("llama", 1),
}
"""Type and number of the layers: EAGLE-3 without norms of queries and keys is a Llama."""


def speculators(kind: str, name: str, count: int, draft_vocab_size: int, **own) -> dict:
    greedy = {"proposal_type": "greedy", "speculative_tokens": count, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": [name],
        "draft_vocab_size": draft_vocab_size,
        "dtype": "float32",
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": {"architectures": ["LlamaForCausalLM"]},
        },
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        **own,
    }


BLOCK = {
    "aux_hidden_state_layer_ids": [1, 2, 3],
    "block_size": 5,
    "mask_token_id": 3,
    "sample_from_anchor": False,
    "sliding_window_non_causal": True,  # recorded as False: without windows it says nothing, but vLLM goes by it
}
MARKOV = {
    **BLOCK,
    "block_size": 4,
    "sample_from_anchor": True,
    "markov_rank": RANK,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
NORMS = {"fc_norm": False, "norm_before_fc": False, "norm_before_residual": False, "norm_output": False}
RAW = {
    "architectures": ["DFlashDraftModel"],
    "dtype": "float32",
    "block_size": 5,
    "num_target_layers": 4,
    "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 1, 2]},
}


def eagle(states: list[int], **norms: bool) -> dict:
    return {"eagle_aux_hidden_state_layer_ids": states, "embed_requires_grad": False, **NORMS, **norms}


def midlayer(states: list[int], **norms: bool) -> dict:
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "dtype": "float32",
        "draft_vocab_size": DRAFTED,
        "target_hidden_size": WIDTH,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [state - 1 for state in states]},  # SGLang looks there
        **eagle(states, **norms),
    }


ALL, SOME = ("dflash", "DFlashSpeculator", 4, VOCAB), ("dflash", "DFlashSpeculator", 4, DRAFTED)
EAGLES = ("eagle3", "Eagle3Speculator", 3, DRAFTED)
FIELDS: dict[tuple[str, str], dict] = {
    ("DFlash", "speculators"): speculators(*ALL, **BLOCK),
    ("DFlash", "dflash"): RAW,
    ("DFlash", "gguf-ready"): RAW,
    ("DFlash, tokens of its own", "speculators"): speculators(*SOME, **BLOCK),
    ("DFlash, tokens of its own", "dflash"): RAW | {"draft_vocab_size": DRAFTED},
    ("DFlash, tokens of its own", "gguf-ready"): speculators("dflash", "DSparkSpeculator", 4, DRAFTED, **BLOCK),
    ("DFlash of speculators", "speculators"): speculators(*ALL, **BLOCK),
    ("DFlash of speculators", "dflash"): RAW,
    ("DFlash of speculators", "gguf-ready"): RAW,
    ("DSpark", "speculators"): speculators("dspark", "DSparkSpeculator", 4, DRAFTED, **MARKOV),
    ("DSpark", "gguf-ready"): speculators("dspark", "DSparkSpeculator", 4, DRAFTED, **MARKOV),
    ("EAGLE-3 of SafeAILab", "speculators"): speculators(*EAGLES, **eagle([1, 2, 3])),
    ("EAGLE-3 of SafeAILab", "gguf-ready"): midlayer([1, 2, 3]),
    ("EAGLE-3", "speculators"): speculators(*EAGLES, **eagle([1, 2, 4], norm_before_residual=True)),
    ("EAGLE-3", "gguf-ready"): midlayer([1, 2, 4], norm_before_residual=True),
    ("EAGLE-3, norms of heads", "speculators"): speculators(
        *EAGLES, **eagle([1, 2, 4], norm_before_fc=True, norm_output=True)
    ),
    ("ParallelSpec", "speculators"): speculators(
        "peagle", "PEagleSpeculator", 3, DRAFTED, **eagle([1, 2, 4]), mask_token_id=3
    ),
}
