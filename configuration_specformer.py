"""Configuration of a SpecFormer drafter (arXiv 2511.20340)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from reprlib import repr as short  # a hostile value may be as long as a file
from statistics import mode

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

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
    "num_draft_layers",
    "target_num_hidden_layers",
)
NAMES_OF_SIZES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "d_inner", "d_ff", "dff"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
    "target_num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
}
"""What configs of targets call the sizes of a drafter. Where a class of transformers has a name of its own, it mostly
answers to the first one here too; remote code need not."""
NEEDED_SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "target_num_hidden_layers")
LARGEST = 2**24
"""No size of a drafter comes near. Beyond it a config is damaged or hostile, and its memory must not be asked for."""
MOST_PARAMETERS = 20_000_000_000
MOST = {
    "num_candidates": 1024,  # every slot reads as many rows of the target's head, and again for every row of the batch
    "num_draft_layers": 64,  # each is made of modules, which take time even before they have weights
}
CONFIDENCE_WIDTH = 64
LIMITS = {"rms_norm_eps": (0.0, 1.0), "rope_theta": (1e-6, 1e30), "initializer_range": (0.0, 1e3)}
SWITCHES = (
    "use_anchor_token",
    "anchor_slot",
    "draft_attends_context",
    "causal_draft_attention",
    "use_positional_ffn",
    "confidence_head",
)
DTYPES = ("float32", "float16", "bfloat16", "float64")
REFUSED = (
    "attribute_map",
    "distributed_config",
    "fusion_config",
    "num_labels",
    "per_layer_config",
    "quantization_config",
    "transformers_weights",
)
"""Fields by which a config.json makes transformers patch classes, take memory, or read other files or fields."""
CODE = re.compile(r"(\w[\w.-]*(/\w[\w.-]*)?--)?\w+\.\w+")
"""`module.Class`, after `repository--` where transformers says whose module it is."""


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
        anchor_slot (`bool`, defaults to `False`): whether the embedding of that token is a slot of its own in front of
            the draft slots, which they see and which sees them.
        draft_attends_context (`bool`, defaults to `False`): whether the draft slots also see the keys and values of the
            context layer, those of the tokens up to the position drafted from. In the paper a slot sees other slots
            alone.
        causal_draft_attention (`bool`, defaults to `False`): whether a slot sees only the slots before it, where the
            paper's see one another.
        use_positional_ffn (`bool`, defaults to `True`): whether every slot has a linear layer of its own, as in the
            paper, or only an embedding that is added to what all slots share.
        num_draft_layers (`int`, defaults to 1): layers of attention over the draft slots and SwiGLU; one in the paper.
        previous_token_rank (`int`, *optional*): width of the network that corrects each slot by the token in front,
            chosen just before; `None` means there is none, as in the paper.
        num_candidates (`int`, defaults to 16): how many of the best tokens of each slot are scored again after the
            correction of `previous_token_rank`, and compared by `confidence_head`; at most 1,024.
        confidence_head (`bool`, defaults to `False`): whether each slot also says how likely its token is accepted,
            by which "auto" verifies no more than pays.
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
        ValueError: a field is of the wrong type or beyond all reason, or fields do not fit one another.
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
        anchor_slot: bool = False,
        draft_attends_context: bool = False,
        causal_draft_attention: bool = False,
        use_positional_ffn: bool = True,
        num_draft_layers: int = 1,
        previous_token_rank: int | None = None,
        num_candidates: int = 16,
        confidence_head: bool = False,
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
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.num_draft_tokens = num_draft_tokens
        self.default_num_assistant_tokens = default_num_assistant_tokens
        self.draft_vocab_size = draft_vocab_size
        self.use_anchor_token = use_anchor_token
        self.anchor_slot = anchor_slot
        self.draft_attends_context = draft_attends_context
        self.causal_draft_attention = causal_draft_attention
        self.use_positional_ffn = use_positional_ffn
        self.num_draft_layers = num_draft_layers
        self.previous_token_rank = previous_token_rank
        self.num_candidates = num_candidates
        self.confidence_head = confidence_head
        self.target_num_hidden_layers = target_num_hidden_layers
        self.target_name_or_path = target_name_or_path
        self.target_embeddings = target_embeddings
        self.format_version = format_version
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self._check_format()
        self._check_types()
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        if target_layer_ids is None:
            layers = target_num_hidden_layers
            # in shallow targets some of them coincide
            target_layer_ids = sorted({*([] if use_anchor_token else [0]), layers // 2, layers - 1, layers})
        self.target_layer_ids = target_layer_ids
        self._check_sizes()
        self._check_others(kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        try:
            super().__init__(**kwargs)
        except Exception as error:
            raise ValueError(f"SpecFormerConfig: transformers cannot use the value of a field ({error}).") from error

    @property
    def num_input_slices(self) -> int:
        """Vectors of width `hidden_size` that enter the drafter at each position."""
        return len(self.target_layer_ids) + int(self.use_anchor_token)

    @property
    def reads_last_states(self) -> bool:
        """Whether the last of its inputs are the states that the target's head reads."""
        return self.target_layer_ids[-1] == self.target_num_hidden_layers

    @property
    def reads_anchor_token(self) -> bool:
        """Whether the embedding of the token that follows each position enters the drafter somewhere."""
        return self.use_anchor_token or self.anchor_slot

    @property
    def num_parameters(self) -> int:
        """Of the drafter, by its sizes."""
        size, slices, slots = self.hidden_size, self.num_input_slices, self.num_draft_tokens
        attention = size + 2 * size * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        slot_layer = size + (size + 1) * slots * size if self.use_positional_ffn else slots * size
        anchor = size + size * size if self.anchor_slot else 0
        rank = self.previous_token_rank
        correction = 0 if rank is None else size + 3 * size * rank
        draft_layer = attention + size + 3 * size * self.intermediate_size
        layers = attention + self.num_draft_layers * draft_layer
        confidence = (size + 2) * CONFIDENCE_WIDTH + 1 + 2 * slots if self.confidence_head else 0
        return slices * size * (size + 1) + layers + slot_layer + anchor + size + correction + confidence

    @classmethod
    def from_target_config(cls, target_config: PreTrainedConfig, **overrides) -> SpecFormerConfig:
        """Derive the sizes of a drafter from the config of its target; `overrides` are fields of this class.

        Where the target's layers differ in a size, the drafter gets what most of them have.

        Raises:
            ValueError: the target is an encoder-decoder, or its config does not say how large it is.
        """
        if getattr(target_config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(target_config).__name__} describes an encoder-decoder, and only a decoder-only model can have "
                "a SpecFormer drafter."
            )
        config = target_config.get_text_config(decoder=True)
        sizes = {field: number_of(config, names, is_whole) for field, names in NAMES_OF_SIZES.items()}
        sizes |= {field: value for field, value in overrides.items() if field in sizes and is_whole(value)}
        if missing := [field for field in NEEDED_SIZES if sizes[field] is None]:
            raise ValueError(
                f"{type(config).__name__} does not say {', '.join(missing)}. A SpecFormer drafter is made for a "
                "decoder-only transformer, which state-space models, for example, are not. If it is one and calls them "
                "something else, give them as keywords: from_target_config(config, num_attention_heads=...)."
            )
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        head_dim = sizes["head_dim"] or max(width // heads, 1)
        rope = getattr(config, "rope_parameters", None) or {}
        if per_layer_type := [settings for settings in rope.values() if isinstance(settings, dict)]:
            rope = rope.get("full_attention") or per_layer_type[0]  # the drafter's context layer sees everything
        derived = {
            **sizes,
            "intermediate_size": sizes["intermediate_size"] or 4 * width,
            "num_key_value_heads": math.gcd(heads, sizes["num_key_value_heads"] or heads),  # layers may differ in both
            "head_dim": head_dim + head_dim % 2,
            "target_name_or_path": target_config.name_or_path or None,
            "rms_norm_eps": number_of(config, ["rms_norm_eps"], partial(is_within, LIMITS["rms_norm_eps"]), 1e-5),
            "rope_theta": rope.get("rope_theta", 10000.0),
            **{name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }
        return cls(**{**derived, **overrides})

    @classmethod
    def paper(cls, target_config: PreTrainedConfig, **overrides) -> SpecFormerConfig:
        """The drafter of arXiv 2511.20340, section 3: four hidden states of the target and no anchor token."""
        return cls.from_target_config(target_config, **{"use_anchor_token": False, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers, by which from_pretrained(<drafter>, FIELD=...) changes fields; but the size of the
        vocabulary is what the drafter was made for."""
        own, given = (fields.get("vocab_size") for fields in (config_dict, kwargs))
        if None not in (own, given) and own != given:
            raise ValueError(
                f"vocab_size={short(given)} was given, and the drafter was made for a vocabulary of {short(own)}. "
                "Leave it out: a target to which tokens were added, or whose embeddings are padded, works as it is."
            )
        return super().from_dict(config_dict, **kwargs)

    def _check_format(self) -> None:
        version = self.format_version
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"SpecFormerConfig: format_version is {short(version)}; expected a positive integer.")
        if version > FORMAT:
            raise ValueError(
                f"This drafter was saved in format {short(version)}, and this code reads formats up to {FORMAT}. "
                "Update specformer (pip install -U specformer), or load the repository's own code with "
                "trust_remote_code=True."
            )
        numbers = self.target_embeddings
        if numbers is not None and not (
            # NaN fails the comparison, and infinity and what overflows a float too
            isinstance(numbers, list)
            and len(numbers) == 64
            and all(type(number) in (int, float) and abs(number) < 1e30 for number in numbers)
        ):
            raise ValueError(
                f"SpecFormerConfig: target_embeddings is {short(numbers)}; expected 64 finite numbers, or None. "
                "Without them (None) the drafter works, but does not tell its target from others of its sizes."
            )

    def _check_types(self) -> None:
        sizes = [name for name in SIZES if name != "head_dim"]  # which follows from others, or is checked with them
        optional = [name for name in ("draft_vocab_size", "previous_token_rank") if getattr(self, name) is not None]
        for name in (*sizes, *optional):
            self._check_size(name)
        default = self.default_num_assistant_tokens
        if not is_whole(default, 0):
            raise ValueError(
                f"SpecFormerConfig: default_num_assistant_tokens is {short(default)}; expected an integer from 0 to "
                f"{LARGEST}."
            )
        for name, highest in MOST.items():
            value = getattr(self, name)
            if not is_whole(value, 1) or value > highest:
                raise ValueError(
                    f"SpecFormerConfig: {name} is {short(value)}; expected a positive integer up to {highest}."
                )
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"SpecFormerConfig: {name} is {short(getattr(self, name))}; expected true or false.")
        for name, (lowest, highest) in LIMITS.items():
            value = getattr(self, name)
            if not is_within((lowest, highest), value):
                raise ValueError(
                    f"SpecFormerConfig: {name} is {short(value)}; expected a number from {lowest:g} to {highest:g}."
                )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise ValueError(
                f"SpecFormerConfig: hidden_act is {short(self.hidden_act)}; expected the name of an activation in "
                "transformers, such as 'silu'."
            )
        name = self.target_name_or_path
        if name is not None and not (isinstance(name, str) and name.isprintable() and len(name) <= 4096):
            raise ValueError(
                f"SpecFormerConfig: target_name_or_path is {short(name)}; expected the target's id, in one line."
            )

    def _check_size(self, name: str) -> None:
        if not is_whole(value := getattr(self, name), 1):
            raise ValueError(
                f"SpecFormerConfig: {name} is {short(value)}; expected a positive integer up to {LARGEST}."
            )

    def _check_others(self, fields: dict) -> None:
        """The fields of every config that could do harm here."""
        for name, value in fields.items():
            method = name.startswith("__") or callable(getattr(type(self), name, None))
            if method or (name in REFUSED and value is not None):
                raise ValueError(f"SpecFormerConfig: a drafter has no field {short(name)}; remove it from config.json.")
        for name in ("attn_implementation", "experts_implementation"):
            if not re.fullmatch(r"\w+", str(fields.get(name))):  # others are downloaded and run
                raise ValueError(
                    f"SpecFormerConfig: {name} is {short(fields[name])}; expected the name of one in transformers, "
                    "such as 'sdpa'."
                )
        for name in ("dtype", "torch_dtype"):
            if str(fields.get(name)).removeprefix("torch.") not in (*DTYPES, "None"):
                raise ValueError(
                    f"SpecFormerConfig: {name} is {short(fields[name])}; expected one of {', '.join(DTYPES)}."
                )
        code = fields.get("auto_map") or {}
        if not isinstance(code, dict) or not all(isinstance(at, str) and CODE.fullmatch(at) for at in code.values()):
            raise ValueError(f"SpecFormerConfig: auto_map is {short(code)}; expected 'module.Class' for every entry.")

    def _check_sizes(self) -> None:
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"SpecFormerConfig: draft_vocab_size is {self.draft_vocab_size}, more than the {self.vocab_size} "
                "entries of the target's vocabulary."
            )
        self._check_size("head_dim")
        if self.head_dim % 2:
            raise ValueError(f"SpecFormerConfig: head_dim is {self.head_dim}; rotary embeddings need an even number.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"SpecFormerConfig: num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        ids, layers = self.target_layer_ids, self.target_num_hidden_layers
        if not isinstance(ids, list | tuple) or not all(is_whole(i, 0) and i <= layers for i in ids):
            raise ValueError(
                f"SpecFormerConfig: target_layer_ids is {short(ids)}; expected integers from 0 to {layers}."
            )
        if list(ids) != sorted(set(ids)) or not ids:
            raise ValueError(f"SpecFormerConfig: target_layer_ids is {short(ids)}; expected one or more, ascending.")
        if self.num_parameters > MOST_PARAMETERS:
            raise ValueError(
                f"SpecFormerConfig: these sizes make a drafter of {self.num_parameters:,} parameters, and drafters are "
                f"small: more than {MOST_PARAMETERS:,} are refused. One of {', '.join(SIZES)} and target_layer_ids is "
                "wrong."
            )


def is_whole(value, lowest: int = 1) -> bool:
    """Whether `value` is an integer that a size can be."""
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= LARGEST


def is_within(limits: tuple[float, float], value) -> bool:
    """Whether `value` is a number from the first of `limits` to the second."""
    return type(value) in (int, float) and limits[0] <= value <= limits[1]


def number_of(config: PreTrainedConfig, names: Iterable[str], is_usable: Callable[..., bool], default=None):
    """What `config` says under the first of `names` where that is usable: of several layers, what most of them have."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # by which transformers says that its layers differ
            value = [getattr(layer, name, None) for layer in config.per_layer_config]
        values = value if isinstance(value, list | tuple) else [value]
        if usable := [value for value in values if is_usable(value)]:
            return mode(usable)
    return default


SpecFormerConfig.register_for_auto_class()
