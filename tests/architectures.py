"""Tiny random targets of many families: float64, and float32 where a family has eager attention only.

Eager attention computes its softmax in float32, where float64's lowest number is -inf and a padded query all NaN.
"""

from __future__ import annotations

import torch
import transformers
from tiny import BOS, PAD, VOCAB

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=8,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=None,
)
GPT2_LIKE = dict(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=4,
    n_head=4,
    n_positions=64,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=None,
)
MIXED = dict(layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"])
ROUTED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)

# name -> (prefix of the classes, what differs from COMMON); a head_dim of None is the family's own
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=0)),
    "qwen3": ("Qwen3", {}),
    "qwen3-moe": ("Qwen3Moe", ROUTED),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral-sliding": ("Mistral", dict(sliding_window=6)),
    "gemma": ("Gemma", dict(tie_word_embeddings=False)),
    "gemma2": (
        "Gemma2",
        dict(tie_word_embeddings=False, sliding_window=6, query_pre_attn_scalar=8, final_logit_softcapping=200.0),
    ),
    "gemma3": ("Gemma3", dict(sliding_window=6, query_pre_attn_scalar=8, **MIXED)),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", dict(sliding_window=None)),
    "phi3-sliding": ("Phi3", dict(sliding_window=6)),
    "gpt2": ("GPT2", GPT2_LIKE),
    "gptj": ("GPTJ", dict(GPT2_LIKE, rotary_dim=4)),
    "gpt-neox": ("GPTNeoX", {}),
    "opt": ("OPT", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "falcon": ("Falcon", dict(alibi=False, new_decoder_architecture=True, num_kv_heads=2, head_dim=None)),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", dict(sliding_window=6, **MIXED)),
    "granite": ("Granite", dict(logits_scaling=2.0)),
    "cohere": ("Cohere", dict(logit_scale=0.5)),
    "cohere2": ("Cohere2", dict(sliding_window=6, logit_scale=0.5, **MIXED)),
    "starcoder2": ("Starcoder2", dict(sliding_window=6)),
    "stablelm": ("StableLm", {}),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 1, 0, 1])),
    "glm4": ("Glm4", {}),
    "deepseek-v3": (
        "DeepseekV3",
        dict(
            MLA,
            num_key_value_heads=4,
            head_dim=None,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
        )
        | dict(moe_intermediate_size=24, first_k_dense_replace=1, n_shared_experts=1),
    ),
    "gpt-oss": ("GptOss", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=6, **MIXED)),
}

FLOAT32 = {"gemma2", "gpt-oss"}


def make_target(name: str, seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """A tiny random target, its weights of standard deviation 0.15 and its biases and norms not trivial either."""
    prefix, fields = FAMILIES[name]
    fields = fields if "n_embd" in fields else {**COMMON, **fields}
    fields = {key: value for key, value in {**fields, **overrides}.items() if (key, value) != ("head_dim", None)}
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    model_class = next(
        getattr(transformers, f"{prefix}{suffix}")
        for suffix in ("ForCausalLM", "LMHeadModel")
        if hasattr(transformers, f"{prefix}{suffix}")
    )
    torch.manual_seed(seed)
    model = model_class(config_class(**fields)).to(torch.float32 if name in FLOAT32 else torch.float64).eval()
    model.set_experts_implementation("eager")  # the grouped kernels do not take float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
