"""Every causal LM class of the installed transformers as a tiny random model, its config shrunken from the default one.

Sizes are small, and so is whatever counts keys or positions, so that a short text goes past every window, chunk and
threshold that a family has. The layers are some of the default config's: at least one of every kind.
"""

from __future__ import annotations

import torch
import transformers
from tiny import BOS, PAD, VOCAB
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

NUM_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks"),
    *("encoder_layers", "num_encoder_layers", "depth", "num_mem_blocks"),
)
SIZES = {
    4: (
        *NUM_LAYERS,
        # heads
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "swa_num_attention_heads"),
        *("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"),
        *("num_encoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_heads"),
        *("linear_num_value_heads",),
        # experts
        *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"),
        # widths inside heads and layers
        *("qk_rope_head_dim", "rotary_dim", "hidden_size_per_layer_input", "laurel_rank"),
    ),
    2: (
        *("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads", "index_n_heads"),
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "n_group"),
        *("num_expert_group", "altup_num_inputs", "n_groups", "mamba_n_groups"),
    ),
    1: (
        *("topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"),
        *("num_dense_layers", "mamba_ngroups"),
    ),
    8: (
        *("head_dim", "d_head", "kv_channels", "swa_head_dim", "dim_head", "linear_head_dim", "attention_head_size"),
        *("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "qk_nope_head_dim", "v_head_dim"),
        *("mamba_d_head", "mamba_head_dim", "mamba_d_state", "state_size", "ssm_state_size", "query_pre_attn_scalar"),
    ),
    12: ("qk_head_dim",),
    16: ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "router_hidden_size"),
    24: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
        *("expert_ffn_hidden_size", "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"),
    ),
    32: (
        *("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim", "lru_width"),
        *("word_embed_proj_dim", "input_embedding_size", "output_embedding_size"),
        *("mamba_d_ssm", "embed_dim", "backbone_hidden_size"),
    ),
    48: (
        *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "d_inner", "dff"),
        *("dim_ff", "intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size"),
        *("feed_forward_size",),
    ),
    VOCAB: ("vocab_size", "vocab_size_per_layer_input"),
}
COUNTS = {
    # of keys or positions, the first ones by four or more: short texts go past all of them but the last ones, which
    # are tables. Longer than what the probe reads, as in real models.
    2: ("index_topk_blocks",),
    4: ("index_block_size",),
    13: (
        *("sliding_window", "window_size", "sliding_window_size", "local_attention", "attention_window_size"),
        *("index_topk", "rel_extent", "local_attention_window_len"),
    ),
    16: (
        *("attention_chunk_size", "chunk_size", "mamba_chunk_size", "block_size", "floor_scale", "keep_window_size"),
        *("log_scaling_n_floor", "original_max_position_embeddings", "relative_max_distance"),
        *("position_bias_max_distance", "position_bias_num_buckets", "num_buckets"),
    ),
    96: (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "model_max_length"),
        *("max_target_positions",),
    ),
}
STRONG = {"attn_scale": 1.0, "llama_4_scaling_beta": 1.0, "log_scaling_alpha": 1.0}
"""How much attention changes past a threshold: enough to show in the text."""
COUNTED = {name: value for value, names in COUNTS.items() for name in names} | STRONG
TINY = COUNTED | {name: value for value, names in SIZES.items() for name in names}
EVEN_IF_NONE = ("head_dim", "num_key_value_heads", "sliding_window", "log_scaling_n_floor")
STDS = (0.15, 0.3, 0.6)
"""Of weights. With the usual ones the logits are so flat that every model writes one token for ever."""
TOKENS = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)

# class -> fields that the tables above cannot know; of a sub-config behind its name and a dot
NEEDED = {
    "Gemma4AssistantConfig": dict(
        text_config=dict(model_type="gemma4_text", hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    ),
}
HALF = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
CONV = ["conv", "conv", "full_attention", "full_attention"]
GEMMA3N = dict(
    intermediate_size=48,
    layer_types=[*HALF[1:3], *HALF[1:3]],
    num_kv_shared_layers=2,
    activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
)
MROPE = {"text_config.rope_parameters": dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])}
OVERRIDES: dict[str, dict] = {
    "BambaForCausalLM": dict(mamba_d_head="auto", attn_layer_indices=[1, 3]),
    "BltForCausalLM": dict(encoder_hash_byte_group_vocab=VOCAB),
    "CohereCompassForCausalLM": dict(
        layer_types=HALF,
        rope_parameters=dict(
            full_attention=None, sliding_attention=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
        ),
    ),
    "DbrxForCausalLM": {
        "attn_config.rope_theta": 1e4,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.moe_top_k": 2,
    },
    "DeepseekV2ForCausalLM": dict(num_experts_per_tok=2),
    "DeepseekV4ForCausalLM": dict(compress_rates=dict(compressed_sparse_attention=2, heavily_compressed_attention=8)),
    "DoryForCausalLM": dict(
        num_hidden_layers=4, layer_types=HALF[1:3] * 2, n_input_layers=1, n_recurrent_layers=2, n_output_layers=1
    ),
    "Dots3NoteForCausalLM": dict(
        layer_types=["indexed_attention", "sliding_attention"] * 2,
        mlp_layer_types=["dense", *["sparse"] * 3],
        head_dim=12,
        num_hidden_layers=4,
        per_layer_config={layer: dict(num_attention_heads=2, num_key_value_heads=2) for layer in (1, 3)},
    ),
    "Gemma3nForCausalLM": GEMMA3N,
    "Gemma3nForConditionalGeneration": {f"text_config.{name}": value for name, value in GEMMA3N.items()},
    "Cosmos3EdgeForConditionalGeneration": MROPE,
    "Glm46VForConditionalGeneration": MROPE,
    "Glm4vForConditionalGeneration": MROPE,
    "Glm5NextForConditionalGeneration": {"text_config.index_topk": 16},
    "GlmOcrForConditionalGeneration": MROPE,
    "PaddleOCRVLForConditionalGeneration": MROPE,
    "Qwen2VLForConditionalGeneration": MROPE,
    "Qwen2_5_VLForConditionalGeneration": MROPE,
    "GitForCausalLM": {"vision_config.num_hidden_layers": 3},  # as in the real one, not as many as for text
    "Gemma4AssistantForCausalLM": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0,
        "text_config.num_kv_shared_layers": 4,
    },
    "Gemma4UnifiedAssistantForCausalLM": {"text_config.num_kv_shared_layers": 4},
    "Dots1ForCausalLM": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, layer_types=HALF),
    "GraniteMoeHybridForCausalLM": dict(mamba_d_head="auto", layer_types=["linear_attention", "full_attention"] * 2),
    "Inkling2ForCausalLM": dict(unpadded_vocab_size=VOCAB),
    "Inkling2LoopForCausalLM": dict(unpadded_vocab_size=VOCAB),
    "JambaForCausalLM": dict(attn_layer_period=2, attn_layer_offset=1),
    "LagunaForCausalLM": dict(layer_types=HALF, num_attention_heads_per_layer=[4, 4, 2, 2]),
    "Lfm2ForCausalLM": dict(layer_types=CONV),
    "Lfm2MoeForCausalLM": dict(layer_types=CONV),
    "Mamba2ForCausalLM": dict(head_dim=16),
    "MellumForCausalLM": dict(layer_types=HALF),
    "Llama4ForCausalLM": dict(moe_layers=[1, 3]),
    "MllamaForCausalLM": dict(cross_attention_layers=[1]),
    "MllamaForConditionalGeneration": {"text_config.cross_attention_layers": [1]},  # none of the last two, as really
    "MiniMaxForCausalLM": dict(sliding_window=None),  # as in the real one
    "MiniMaxM3VLForCausalLM": dict(layer_types=["full_attention", "minimax_m3_sparse"] * 2),
    "NemotronForCausalLM": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "Qwen3_5MoeForCausalLM": dict(num_experts=8),  # a text in which something stands twice, so that copies are right
    "Qwen4ExpForCausalLM": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2
    ),
    "ReformerModelWithLMHead": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 12]),
    "RoCBertForCausalLM": dict(
        enable_shape=False, enable_pronunciation=False, shape_vocab_size=VOCAB, pronunciation_vocab_size=VOCAB
    ),
    "XLMWithLMHeadModel": dict(causal=True),
    "xLSTMForCausalLM": dict(hidden_size=128, embedding_dim=128),
    "XmodForCausalLM": dict(default_language="en_XX"),
    "ZambaForCausalLM": dict(
        attention_hidden_size=64,
        attention_head_dim=16,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
    "ZayaForCausalLM": dict(num_experts_per_tok=1, layer_types=["hybrid", "hybrid_sliding"] * 2),
}


def make_target(class_name: str, dtype: torch.dtype, seed: int, std: float) -> PreTrainedModel:
    """A tiny random target, its weights of this standard deviation and its biases and norms not trivial either."""
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(tiny_config(class_name)).to(dtype).eval()
    model.generation_config.update(**TOKENS, decoder_start_token_id=BOS)
    model.set_experts_implementation("eager")  # the grouped kernels do not take float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def class_names() -> list[str]:
    """Classes that AutoModelForCausalLM makes, as the installed transformers has them."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def image_text_names() -> list[str]:
    """Classes that AutoModelForImageTextToText makes and AutoModelForCausalLM does not."""
    return sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()) - set(class_names()))


def model_types(class_name: str) -> list[str]:
    types = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted(kind for kind, name in types.items() if name == class_name)


def tiny_config(class_name: str) -> PreTrainedConfig:
    model_class = getattr(transformers, class_name)
    return shrunken(model_class.config_class, OVERRIDES.get(class_name, {}))


def shrunken(config_class: type[PreTrainedConfig], overrides: dict) -> PreTrainedConfig:
    """A config of few and small layers."""
    real = real_fields(config_class)
    fields = {
        name: TINY[name] for name, value in real.items() if name in TINY and (value is not None or name in EVEN_IF_NONE)
    }
    if "kv_lora_rank" in fields:  # latent attention: a key for each head, and rotated by a part of them
        fields.update(num_key_value_heads=4, head_dim=fields["qk_rope_head_dim"])
    if real.get("rope_parameters"):
        fields["rope_parameters"] = shrunken_rope(real["rope_parameters"])
    if "is_decoder" in real:
        fields["is_decoder"] = True
    if "tie_word_embeddings" in real:
        fields["tie_word_embeddings"] = False
    fields.update(some_layers(real))
    if "use_sliding_window" in real:
        fields.update(use_sliding_window=True, max_window_layers=2, layer_types=None)
    own = {name: value for name, value in overrides.items() if "." not in name}
    for name, value in real.items():
        if isinstance(value, PreTrainedConfig) and name not in own:
            inner = {
                key.removeprefix(f"{name}."): inner for key, inner in overrides.items() if key.startswith(f"{name}.")
            }
            fields[name] = shrunken(type(value), inner)
    tokens = TOKENS if "vocab_size" in real or not config_class.base_config_key else {}
    return config_class(**{**fields, **tokens, **own})


def real_fields(config_class: type[PreTrainedConfig]) -> dict:
    """The fields of a config as they are for the real model, configs of parts as such."""
    default = config_class(**NEEDED.get(config_class.__name__, {}))
    parts = {name: part for name, part in vars(default).items() if isinstance(part, PreTrainedConfig)}
    return {**default.to_dict(), **parts}


def shrunken_rope(parameters: dict) -> dict:
    """Rotary settings, also one for each type of layers, that change at a position short texts get to."""
    return {
        name: shrunken_rope(value) if isinstance(value, dict) else COUNTED.get(name, value)
        for name, value in parameters.items()
    }


def some_layers(real: dict) -> dict:
    """The fields that have an entry for each layer, cut to a few layers, with one of every kind among them."""
    number = next((real[name] for name in NUM_LAYERS if isinstance(real.get(name), int)), None)
    each = {
        name: value
        for name, value in real.items()
        if isinstance(value, list) and len(value) == number and value != list(range(number))
    }
    own = {int(layer): fields for layer, fields in (real.get("per_layer_config") or {}).items()}
    if not each and not own:
        return {}
    kinds = [repr([*(value[layer] for value in each.values()), own.get(layer)]) for layer in range(number)]
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    kept = sorted([*kept, *(layer for layer in range(number) if layer not in kept)][: max(4, len(kept))])
    fields = {name: [value[layer] for layer in kept] for name, value in each.items()}
    if own:  # as much more or less than the other layers as in the real model
        fields["per_layer_config"] = {
            new: {name: value * TINY[name] // real[name] if name in TINY else value for name, value in own[old].items()}
            for new, old in enumerate(kept)
            if old in own
        }
    return {**fields, next(name for name in NUM_LAYERS if name in real): len(kept)}
