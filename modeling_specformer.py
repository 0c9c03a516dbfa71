"""The SpecFormer drafter (arXiv 2511.20340, section 3): a small non-autoregressive network on a target's hidden states.

    target hidden states (B, T, S, d)
        -> grouped RMSNorm, linear S*d -> d
        -> context causal attention over the T positions           (its keys and values are cached)
        -> positional FFN: one linear d -> D*d                      (B, T, D, d)
        -> draft bidirectional attention over the D slots, SwiGLU; `num_draft_layers` times
        -> final norm, and the target's own LM head

Slot j (0-based) at position n predicts token n + 2 + j; the target's own logits at n give token n + 1. With
`use_anchor_token` the embedding of token n + 1 is one of the S inputs at position n; with `anchor_slot` it is a slot of
its own in front of the D, up to the last attention over the slots. With `draft_attends_context` the slots also see
the keys and values that the context attention holds of tokens 0..n. With `draft_vocab_size` the head scores only the
tokens of `draft_token_ids`. With `previous_token_rank` a slot's state is corrected by the token in front of it, once
that is chosen. With `confidence_head` it is told how likely each slot's token is accepted.

Nothing of the decode loop is here: that is `generation/` (`custom_generate/` in a published repository).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import ModelOutput

from .configuration_specformer import SpecFormerConfig
from .context_specformer import SeenContext
from .layers_specformer import (
    AnchorSlot,
    ConfidenceHead,
    DraftLayer,
    PreviousTokenCorrection,
    SpecFormerAttention,
    SpecFormerMLP,
    SpecFormerRMSNorm,
)
from .loading_specformer import check_checkpoint, check_values
from .publishing_specformer import complete_repository, push
from .target_specformer import BorrowedTarget, final_norm_scale, some_embeddings

# transformers imports remote code without setting the module on its package. dill, by which `datasets` fingerprints the
# functions that it maps, then does not find this class by its name, and takes it apart, down to a function of
# huggingface_hub that it never finishes with.
setattr(import_module(__package__), __name__.rpartition(".")[2], sys.modules[__name__])

HOW_TO_GENERATE = (
    "A SpecFormer drafter does not generate by itself, and transformers' own assisted decoding cannot use it. "
    "Pass its folder or Hub id as the generation strategy: target.generate(**inputs, assistant_model=drafter, "
    "custom_generate=drafter.name_or_path, trust_remote_code=True), or, with the package installed, "
    "specformer.generate(target, drafter, **inputs). The strategy is a string: transformers passes over a Path, so "
    "give custom_generate=str(path)."
)


@dataclass
class SpecFormerOutput(ModelOutput):
    """
    Args:
        draft_hidden_states (`torch.Tensor`): normed states of every slot, ready for the target's LM head,
            `(batch_size, sequence_length, num_draft_tokens, hidden_size)`, or `(positions, num_draft_tokens,
            hidden_size)` where only some positions were asked for.
        corrected_hidden_states (`torch.Tensor`, *optional*): the same, corrected by the tokens in front of the
            slots, where they were given.
        context_states (`torch.Tensor`): output of the context layer, from which the slots are drafted,
            `(batch_size, sequence_length, hidden_size)`.
    """

    draft_hidden_states: torch.Tensor | None = None
    corrected_hidden_states: torch.Tensor | None = None
    context_states: torch.Tensor | None = None


class SpecFormerModel(PreTrainedModel):
    """Drafts `config.num_draft_tokens` tokens in one pass from hidden states of a frozen target."""

    config: SpecFormerConfig
    config_class = SpecFormerConfig
    base_model_prefix = "model"
    main_input_name = "hidden_states"
    _no_split_modules = ["SpecFormerAttention", "SpecFormerMLP"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: SpecFormerConfig):
        super().__init__(config)
        self.gradient_checkpointing = False  # gradient_checkpointing_enable() switches it
        size, slots = config.hidden_size, config.num_draft_tokens
        self.input_norm = SpecFormerRMSNorm(size, config.rms_norm_eps, groups=config.num_input_slices)
        self.input_proj = nn.Linear(config.num_input_slices * size, size, bias=False)
        self.context_attention = SpecFormerAttention(config)
        if config.use_positional_ffn:
            self.positional_norm = SpecFormerRMSNorm(size, config.rms_norm_eps)
            self.positional_ffn = nn.Linear(size, slots * size, bias=True)
        else:
            self.slot_embeddings = nn.Embedding(slots, size)
        if config.anchor_slot:
            self.anchor_slot = AnchorSlot(config)
        self.draft_attention = SpecFormerAttention(config)
        self.draft_mlp = SpecFormerMLP(config)
        self.more_draft_layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_draft_layers - 1))
        self.final_norm = SpecFormerRMSNorm(size, config.rms_norm_eps)
        if config.previous_token_rank is not None:
            self.previous_token_correction = PreviousTokenCorrection(config, config.previous_token_rank)
        if config.confidence_head:
            self.confidence_head = ConfidenceHead(config)
        # ascending; training chooses them (`choose_draft_tokens`)
        ids = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_token_ids", ids)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, SpecFormerRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, ConfidenceHead):
            nn.init.ones_(module.scale)
            nn.init.zeros_(module.shift)

    @property
    def draft_layers(self) -> list[tuple[SpecFormerAttention, SpecFormerMLP]]:
        more = cast("list[DraftLayer]", self.more_draft_layers)  # torch does not know what a ModuleList consists of
        return [(self.draft_attention, self.draft_mlp), *((layer.attention, layer.mlp) for layer in more)]

    def encode_context(
        self,
        hidden_states: torch.Tensor,
        anchor_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Fuse the inputs of every position and attend causally over the context (section 3, steps 1 and 2).

        Args:
            hidden_states: the target's states at `config.target_layer_ids`, (B, T, len(target_layer_ids), d).
            anchor_embeds: embeddings of the tokens that follow each position, (B, T, d), exactly where
                `config.use_anchor_token`.
            position_ids: positions without padding, (B or 1, T); default 0..T-1.
            attention_mask: bool, broadcasts to (B, heads, T, keys), True where visible; default causal over T.
            past_key_values: a cache of one layer, which then also supplies earlier keys and values.

        Returns:
            Context states (B, T, d).
        """
        self._check_anchors(anchor_embeds, "use_anchor_token")
        if anchor_embeds is not None:
            hidden_states = torch.cat([anchor_embeds[:, :, None], hidden_states], dim=2)  # (B, T, S, d)
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        fused = self.input_proj(self.input_norm(hidden_states).flatten(2))  # (B, T, d)
        return self.context_attention(
            fused, position_ids, attention_mask, is_causal=attention_mask is None, past_key_values=past_key_values
        )

    def draft(
        self,
        context_states: torch.Tensor,
        anchor_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        positions_per_row: list[int] | None = None,
    ) -> torch.Tensor:
        """Draft all slots from each of N context states (section 3, steps 3 and 4).

        Args:
            context_states: (N, d), or (..., d) for any number of states.
            anchor_embeds: embeddings of the tokens that follow them, (N, d), exactly where `config.anchor_slot`.

        What else a drafter with `draft_attends_context` needs, and no other one:
            position_ids: of the context states, (N, 1).
            attention_mask: which tokens of its row each of them saw in the context layer, bool (N, heads or 1, 1, K).
            past_key_values: the cache with which they were encoded, of N rows.
            positions_per_row: where the cache has other rows than the N, how many of these belong to each, in order.

        Returns:
            Normed states of every slot, (N, D, d), or (..., D, d).
        """
        self._check_anchors(anchor_embeds, "anchor_slot")
        if self.config.use_positional_ffn:
            slots = self.positional_ffn(self.positional_norm(context_states))
        else:
            slots = context_states[..., None, :] + self.slot_embeddings.weight
        slots = slots.view(-1, self.config.num_draft_tokens, self.config.hidden_size)  # (N, D, d)
        if anchor_embeds is not None:
            slots = torch.cat([self.anchor_slot(anchor_embeds).view(-1, 1, slots.shape[2]), slots], dim=1)
        slot_ids, context = torch.arange(slots.shape[1], device=slots.device)[None], None
        if self.config.draft_attends_context:
            if position_ids is None or attention_mask is None or past_key_values is None:
                raise ValueError(
                    "This drafter has draft_attends_context=True: draft() needs position_ids, attention_mask and "
                    "past_key_values."
                )
            layer, width = past_key_values.layers[0], attention_mask.shape[3]
            assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
            context = SeenContext(
                layer.keys[:, :, :width], layer.values[:, :, :width], attention_mask[:, :, 0], positions_per_row
            )
            slot_ids = position_ids + 1 + slot_ids  # (N, D), after the context; without it only distances count
        layers = self.draft_layers

        def run_layer(slots: torch.Tensor, number: int) -> torch.Tensor:
            attention, mlp = layers[number]
            slots = attention(slots, slot_ids, is_causal=self.config.causal_draft_attention, context=context)
            if number == len(layers) - 1:
                slots = slots[:, -self.config.num_draft_tokens :]  # the anchor's is not read any more
            return mlp(slots)

        for number in range(len(layers)):
            if self.gradient_checkpointing and self.training:
                slots = self._gradient_checkpointing_func(run_layer, slots, number)
            else:
                slots = run_layer(slots, number)
        slots = self.final_norm(slots)
        return slots.view(*context_states.shape[:-1], *slots.shape[1:])

    def forward(
        self,
        hidden_states: torch.Tensor,
        anchor_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        draft_positions: torch.BoolTensor | None = None,
        previous_embeds: torch.Tensor | None = None,
    ) -> SpecFormerOutput:
        """Draft from every position, or from the N where `draft_positions` (B, T) is True: the teacher-forced pass that
        training uses. `anchor_embeds` (B, T, d) are given exactly where `config.reads_anchor_token`. `previous_embeds`
        (B, T, D, d), or (N, D, d), are embeddings of the tokens in front of each slot's, to correct by. See
        `encode_context` for the other arguments."""
        config, (rows, length) = self.config, hidden_states.shape[:2]
        self._check_anchors(anchor_embeds, "reads_anchor_token")
        if config.draft_attends_context and past_key_values is None:
            past_key_values = DynamicCache()
        fused_anchors = anchor_embeds if config.use_anchor_token else None
        context = self.encode_context(hidden_states, fused_anchors, position_ids, attention_mask, past_key_values)

        at = context.new_ones(rows, length, dtype=torch.bool) if draft_positions is None else draft_positions
        seen: dict[str, Any] = {}
        if config.draft_attends_context:
            if position_ids is None:
                position_ids = torch.arange(length, device=at.device)[None]
            if attention_mask is None:
                attention_mask = at.new_ones(1, 1, length, length).tril()
            seen = dict(
                position_ids=position_ids.expand(rows, -1)[at][:, None],
                attention_mask=attention_mask.expand(rows, -1, length, -1).transpose(1, 2)[at][:, :, None],
                past_key_values=past_key_values,
                positions_per_row=at.sum(dim=1).tolist(),
            )
        slot_anchors = anchor_embeds[at] if config.anchor_slot and anchor_embeds is not None else None
        drafted = self.draft(context[at], slot_anchors, **seen)  # (N, D, d)
        if draft_positions is None:
            drafted = drafted.unflatten(0, (rows, length))
        corrected = None if previous_embeds is None else self.previous_token_correction(drafted, previous_embeds)
        return SpecFormerOutput(draft_hidden_states=drafted, corrected_hidden_states=corrected, context_states=context)

    def _check_anchors(self, anchor_embeds: torch.Tensor | None, field: str) -> None:
        wanted = getattr(self.config, field)
        if (anchor_embeds is not None) != wanted:
            raise ValueError(
                f"anchor_embeds is {'missing' if anchor_embeds is None else 'given'}, but this drafter has "
                f"{field}={wanted}."
            )

    def borrow(self, target: PreTrainedModel) -> BorrowedTarget:
        """What this drafter uses of `target`, checked for a fit. See [`BorrowedTarget`]."""
        return BorrowedTarget(target, self.config, self.draft_token_ids)

    @torch.no_grad()
    def choose_draft_tokens(self, counts: torch.Tensor) -> None:
        """Draft the `config.draft_vocab_size` tokens that are the most frequent by `counts` (vocab_size,)."""
        order = counts.argsort(descending=True, stable=True)
        self.draft_token_ids.copy_(order[: self.config.draft_vocab_size].sort().values)

    @torch.no_grad()
    def init_from_target(self, target: PreTrainedModel) -> None:
        """Start a new drafter near the target's own prediction, from which it learns much faster than from noise.

        The final norm becomes the target's, whatever its family calls it. The last hooked state, which the target's
        head would read, passes through to every slot; what is added to it starts small.
        """
        self.final_norm.weight.copy_(final_norm_scale(target).to(self.final_norm.weight))
        self.config.target_embeddings = some_embeddings(target, self.config.vocab_size)
        identity = torch.eye(self.config.hidden_size, device=self.device)
        of_draft_layers = (layer for attention, mlp in self.draft_layers for layer in (attention.o_proj, mlp.down_proj))
        for layer in (self.context_attention.o_proj, *of_draft_layers):
            layer.weight /= 2
        self.input_proj.weight /= 2
        self.input_proj.weight[:, -len(identity) :] += identity
        if self.config.use_positional_ffn:
            self.positional_ffn.weight /= 2
            self.positional_ffn.weight += identity.repeat(self.config.num_draft_tokens, 1)
        if self.config.previous_token_rank is not None:
            self.previous_token_correction.up_proj.weight.zero_()

    def save_pretrained(  # type: ignore[override]  # transformers' other arguments by their names alone
        self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, **kwargs
    ) -> None:
        """As in transformers, with what a repository needs besides: the generation strategy, and a model card where
        there is none."""
        if push_to_hub:  # transformers would upload before the folder is complete
            raise ValueError("save_pretrained(push_to_hub=True): call drafter.push_to_hub(repo_id) instead.")
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            complete_repository(self, Path(save_directory), kwargs.get("token"))

    def push_to_hub(self, repo_id: str, **kwargs):  # type: ignore[override]  # transformers' is a wrapper of any kind
        """Send what `save_pretrained` writes to the Hub, in one commit. See `publishing_specformer.push`."""
        return push(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but from safetensors alone, and a checkpoint that does not fit its config raises.

        Fields of the config may be given as well, as far as they fit the weights.

        Raises:
            ValueError: the files are damaged or not of one piece, or they are not what a drafter consists of.
            OSError: there is no such folder or repository, it holds no safetensors, or it cannot be downloaded.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors must be left at True: other weights are pickles, which can run any code.")
        try:
            check_checkpoint(cls, pretrained_model_name_or_path, **kwargs)
            model, info = super().from_pretrained(  # type: ignore[attr-defined]  # annotated as a model alone
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            check_values(model)
        except Exception as error:
            not_of_the_files = isinstance(error, OSError | ImportError | MemoryError | ValueError)
            if not_of_the_files and not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                raise
            raise ValueError(
                f"The drafter {str(pretrained_model_name_or_path)!r} cannot be read ({type(error).__name__}: {error}). "
                "If the connection broke, try again. If its files are damaged or not of one piece, download them "
                "again, or save them again with drafter.save_pretrained(...)."
            ) from error
        return (model, info) if output_loading_info else model

    def __getattr__(self, name: str):
        # Plain assisted decoding and pipelines look these up on an assistant; they then end in a sentence that helps.
        if name in ("generate", "generation_config"):
            raise AttributeError(HOW_TO_GENERATE)
        return super().__getattr__(name)


SpecFormerModel.register_for_auto_class("AutoModel")
