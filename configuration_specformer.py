"""Configuration of a SpecFormer drafter (arXiv 2511.20340)."""

from __future__ import annotations

from transformers import PreTrainedConfig

FORMAT = 1
"""Of config.json and the weights. It goes up when older code cannot use them any more."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_draft_tokens",
    "target_num_hidden_layers",
)


class SpecFormerConfig(PreTrainedConfig):
    r"""
    Sizes of a SpecFormer drafter and the target it belongs to.

    Use [`~SpecFormerConfig.from_target_config`] to derive the sizes from a target model, or
    [`~SpecFormerConfig.paper`] for the network of the paper exactly.

    Args:
        vocab_size (`int`, defaults to 49152): entries of the target's vocabulary.
        hidden_size (`int`, defaults to 576): width `d` of the target's hidden states, and of the drafter.
        intermediate_size (`int`, defaults to 1536): width of the SwiGLU in the draft layer.
        num_attention_heads (`int`, defaults to 9): query heads of both attention layers.
        num_key_value_heads (`int`, *optional*): key/value heads; `None` means `num_attention_heads`.
        head_dim (`int`, *optional*): width of one head, even; `None` means `hidden_size / num_attention_heads`.
        num_draft_tokens (`int`, defaults to 8): draft slots `l_d`, the most tokens that one pass can draft.
        default_num_assistant_tokens (`int`, defaults to 4): how many of them are drafted when the caller does not say.
        draft_vocab_size (`int`, *optional*): how many tokens of the vocabulary can be drafted; which ones is kept with
            the weights. `None` means all of them, as in the paper. Fewer cost less time and are rarely missed.
        use_anchor_token (`bool`, defaults to `True`): whether the embedding of the token that follows each position
            is an input. It is known when drafting starts, and the paper's drafter does not see it (`False`).
        causal_draft_attention (`bool`, defaults to `False`): whether a slot sees only the slots before it, where the
            paper's see one another.
        use_positional_ffn (`bool`, defaults to `True`): whether every slot has a linear layer of its own, as in the
            paper, or only an embedding that is added to what all slots share.
        target_layer_ids (`list[int]`, *optional*): which of the target's hidden states are inputs: `i` is the state
            that enters layer `i`, and `target_num_hidden_layers` the last one, after the final norm. `None` means the
            paper's `[0, L/2, L-1, L]`, without the first where the anchor token takes its place.
        target_num_hidden_layers (`int`, defaults to 30): layers `L` of the target.
        target_name_or_path (`str`, *optional*): id of the target that the drafter was trained for, for messages.
        target_embeddings (`list[float]`, *optional*): a few numbers of the target's input embeddings, by which it is
            told from other models of its sizes. `None`: it is not.
        format_version (`int`, *optional*): of a saved drafter; what newer code wrote is refused.
        hidden_act (`str`, defaults to `"silu"`): activation of the SwiGLU.
        rms_norm_eps (`float`, defaults to 1e-5): epsilon of all norms.
        rope_theta (`float`, defaults to 10000.0): base of the rotary embeddings over positions and over slots.
        initializer_range (`float`, defaults to 0.02): standard deviation of new weights.

    Raises:
        ValueError: a size is not a positive integer, or sizes do not fit one another.
    """

    model_type = "specformer"

    def __init__(
        self,
        vocab_size: int = 49152,
        hidden_size: int = 576,
        intermediate_size: int = 1536,
        num_attention_heads: int = 9,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        num_draft_tokens: int = 8,
        default_num_assistant_tokens: int = 4,
        draft_vocab_size: int | None = None,
        use_anchor_token: bool = True,
        causal_draft_attention: bool = False,
        use_positional_ffn: bool = True,
        target_layer_ids: list[int] | None = None,
        target_num_hidden_layers: int = 30,
        target_name_or_path: str | None = None,
        target_embeddings: list[float] | None = None,
        format_version: int = FORMAT,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads if num_key_value_heads is not None else num_attention_heads
        self.head_dim = head_dim if head_dim is not None else hidden_size // max(num_attention_heads, 1)
        self.num_draft_tokens = num_draft_tokens
        self.default_num_assistant_tokens = default_num_assistant_tokens
        self.draft_vocab_size = draft_vocab_size
        self.use_anchor_token = use_anchor_token
        self.causal_draft_attention = causal_draft_attention
        self.use_positional_ffn = use_positional_ffn
        self.target_num_hidden_layers = target_num_hidden_layers
        if target_layer_ids is None:
            layers = target_num_hidden_layers
            # in shallow targets some of them coincide
            target_layer_ids = sorted({*([] if use_anchor_token else [0]), layers // 2, layers - 1, layers})
        self.target_layer_ids = target_layer_ids
        self.target_name_or_path = target_name_or_path
        self.target_embeddings = target_embeddings
        self.format_version = format_version
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self._check_format()
        self._check_sizes()
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def num_input_slices(self) -> int:
        """Vectors of width `hidden_size` that enter the drafter at each position."""
        return len(self.target_layer_ids) + int(self.use_anchor_token)

    @classmethod
    def from_target_config(cls, target_config: PreTrainedConfig, **overrides) -> SpecFormerConfig:
        """Derive the sizes of a drafter from the config of its target; `overrides` are fields of this class."""
        text_config = target_config.get_text_config(decoder=True)
        heads = text_config.num_attention_heads
        head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        rope = getattr(text_config, "rope_parameters", None) or {}
        derived = {
            "vocab_size": text_config.vocab_size,
            "hidden_size": text_config.hidden_size,
            "intermediate_size": getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(text_config, "num_key_value_heads", None) or heads,
            "head_dim": head_dim + head_dim % 2,
            "target_num_hidden_layers": text_config.num_hidden_layers,
            "target_name_or_path": target_config.name_or_path or None,
            "rms_norm_eps": getattr(text_config, "rms_norm_eps", 1e-5),
            "rope_theta": rope.get("rope_theta", 10000.0),
            "bos_token_id": text_config.bos_token_id,
            "eos_token_id": text_config.eos_token_id,
            "pad_token_id": text_config.pad_token_id,
        }
        return cls(**{**derived, **overrides})

    @classmethod
    def paper(cls, target_config: PreTrainedConfig, **overrides) -> SpecFormerConfig:
        """The drafter of arXiv 2511.20340, section 3: four hidden states of the target and no anchor token."""
        return cls.from_target_config(target_config, **{"use_anchor_token": False, **overrides})

    def _check_format(self) -> None:
        version = self.format_version
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"SpecFormerConfig: format_version is {version!r}; expected a positive integer.")
        if version > FORMAT:
            raise ValueError(
                f"This drafter was saved in format {version}, and this code reads formats up to {FORMAT}. Update "
                "specformer (pip install -U specformer), or load the repository's own code with trust_remote_code=True."
            )
        numbers = self.target_embeddings
        if numbers is not None and not (
            isinstance(numbers, list) and len(numbers) == 64 and all(isinstance(n, int | float) for n in numbers)
        ):
            raise ValueError("SpecFormerConfig: target_embeddings is no list of 64 numbers, nor None.")

    def _check_sizes(self) -> None:
        for name in (*SIZES, *(("draft_vocab_size",) if self.draft_vocab_size is not None else ())):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"SpecFormerConfig: {name} is {value!r}; expected a positive integer.")
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"SpecFormerConfig: draft_vocab_size is {self.draft_vocab_size}, more than the {self.vocab_size} "
                "entries of the target's vocabulary."
            )
        default = self.default_num_assistant_tokens
        if not isinstance(default, int) or isinstance(default, bool) or default < 0:
            raise ValueError(
                f"SpecFormerConfig: default_num_assistant_tokens is {default!r}; expected an integer from 0."
            )
        if self.head_dim % 2:
            raise ValueError(f"SpecFormerConfig: head_dim is {self.head_dim}; rotary embeddings need an even number.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"SpecFormerConfig: num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        ids, layers = self.target_layer_ids, self.target_num_hidden_layers
        if not isinstance(ids, list | tuple) or not all(isinstance(i, int) and 0 <= i <= layers for i in ids):
            raise ValueError(f"SpecFormerConfig: target_layer_ids is {ids!r}; expected integers from 0 to {layers}.")
        if list(ids) != sorted(set(ids)) or not ids:
            raise ValueError(f"SpecFormerConfig: target_layer_ids is {ids!r}; expected one or more, ascending.")


SpecFormerConfig.register_for_auto_class()
