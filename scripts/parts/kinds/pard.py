"""Training of a small causal LM that drafts in parallel, as masks behind the text: PARD (arXiv 2504.18583). Saved as
the causal LM that it is, whose config names the mask token.

The masks of many positions of a text stand behind it in one pass. Later slots, which depend on those in front, are
learnt behind fewer positions (PARD's conditional drop of tokens).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from specformer.generation.argument import whole_number
from specformer.generation.drafter_parallel import ParallelDrafter
from specformer.generation.target_head import logits_of_head
from specformer.generation.target_states import HiddenStates
from specformer.scripts.parts.fewer_layers import keep_layers
from specformer.scripts.parts.kinds.fields import given_fields
from specformer.scripts.parts.kinds.mask_token import unused_token
from specformer.scripts.parts.kinds.student import Drafts, Student, with_something_to_draft
from specformer.scripts.parts.losses import IGNORED, slot_labels

USUAL_LAYERS, USUAL_SHARE, LEAST_SHARE = 2, 0.7, 0.2
MOST_COLUMNS = 256
"""Of a text, whose masks are in one pass of an evaluation, in which none is dropped."""


class LanguageModelHead:
    """The LM head of the drafter itself; see `losses.Head`."""

    draft_token_ids: torch.Tensor | None = None

    def __init__(self, network, target):
        self.network, self.target = network, target
        self.size = min(model.config.get_text_config(decoder=True).vocab_size for model in (network, target))

    def draft_labels(self, token_ids: torch.Tensor) -> torch.Tensor:
        return token_ids.masked_fill(token_ids >= self.size, IGNORED)

    def draft_logits(self, draft_hidden_states: torch.Tensor) -> torch.Tensor:
        return logits_of_head(self.network, draft_hidden_states.to(self.network.dtype))

    def target_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return logits_of_head(self.target, hidden_states)


class PardStudent(Student):
    """See the module, and `Student`.

    Args:
        slot_share: of the positions with some slot, the share that have the next one.

    Raises:
        ValueError: it is no such model, or its tokenizer is not the target's.
    """

    kind, title, about = "pard", "PARD", "a causal LM that drafts in parallel"
    means = ("slot_share", "gradient_checkpointing", "activation_checkpointing")
    network: Any  # a causal LM

    def __init__(self, network, target, num_draft_tokens: int, slot_share: float = USUAL_SHARE):
        ParallelDrafter(network, target)  # refuses what cannot be
        super().__init__(network, target, num_draft_tokens)
        self.head, self.slot_share = LanguageModelHead(network, target), slot_share
        self.head_weights = [weight for weight in network.get_output_embeddings().parameters() if weight.requires_grad]
        self.config = network.config.get_text_config(decoder=True)

    @classmethod
    def make_config(cls, arguments, target_config) -> dict[str, Any]:
        given = given_fields(arguments.config, {"num_hidden_layers", "mask_token_id"})
        most = target_config.get_text_config(decoder=True).num_hidden_layers
        layers = given.get("num_hidden_layers")
        if layers is not None and arguments.start_from:
            raise ValueError(
                "--config num_hidden_layers and --start-from were both given; the first is how many of the target's "
                "own layers to begin with. Give one of them."
            )
        if layers is not None and (whole_number(layers) is None or not 1 <= layers <= most):
            raise ValueError(f"--config num_hidden_layers is {layers!r}; expected a number from 1 to {most}.")
        share = USUAL_SHARE if arguments.slot_share is None else arguments.slot_share
        return {
            "num_hidden_layers": layers or min(USUAL_LAYERS, most),
            "mask_token_id": given.get("mask_token_id"),
            "num_draft_tokens": arguments.num_draft_tokens or 8,
            "slot_share": share,
        }

    @classmethod
    def make(cls, config, target, answers, arguments) -> PardStudent:
        if arguments.start_from:
            network = AutoModelForCausalLM.from_pretrained(
                arguments.start_from, dtype=torch.float32, trust_remote_code=arguments.trust_remote_code or None
            )
        else:
            network = keep_layers(target, config["num_hidden_layers"]).float()
        mask, known = config["mask_token_id"], getattr(network.config, "pard_token", None)
        if mask is None:
            mask = unused_token(target, answers) if known is None else known
        network.config.pard_token = mask
        network.requires_grad_(True).train()
        return cls(network, target, config["num_draft_tokens"], config["slot_share"])

    def of_checkpoint(self, folder: Path) -> PardStudent:
        network = type(self.network).from_pretrained(folder, dtype=torch.float32)
        return PardStudent(network, self.target, self.num_draft_tokens)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        self.network.config.use_cache = True  # which the Trainer switches off
        self.network.to(dtype).save_pretrained(folder)

    def drafts(self, model, batch, position_share=1.0) -> Drafts:
        labels = slot_labels(batch["labels"], self.num_draft_tokens)
        wanted = with_something_to_draft(labels, position_share)
        if torch.is_grad_enabled():
            parts = [wanted]
        else:
            columns = torch.arange(wanted.shape[1], device=wanted.device)
            parts = [wanted & (columns // MOST_COLUMNS == number) for number in columns[::MOST_COLUMNS] // MOST_COLUMNS]
            parts = [part for part in parts if part.any()] or [wanted]
        order = torch.full_like(wanted, -1, dtype=torch.long)
        order[wanted] = torch.arange(int(wanted.sum()), device=wanted.device)
        found = [self.behind(model, batch["input_ids"], labels, part) for part in parts]
        back = torch.cat([order[part] for part in parts]).argsort()
        states, labels = (torch.cat(some)[back] for some in zip(*found, strict=True))
        return Drafts(states, labels, states)

    def behind(
        self, model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (N, D, d) and labels (N, D) of the slots behind the N positions that are True in `wanted` (B, T)."""
        length, slots = input_ids.shape[1], self.num_draft_tokens
        texts, starts = wanted.nonzero(as_tuple=True)  # (N,)
        labels, slot = labels[wanted], torch.arange(slots, device=wanted.device)
        masks = ((labels != IGNORED) * slot).amax(dim=1) if len(labels) else starts  # of each, no more than have labels
        if model.training:
            shares = (self.slot_share**slot).clamp(min=LEAST_SHARE)[1:]
            masks = masks.minimum((torch.rand(len(masks), 1, device=masks.device) < shares).sum(dim=1))
        of_texts = torch.zeros(len(input_ids), dtype=torch.long, device=masks.device).index_add(0, texts, masks)
        before = masks.cumsum(0) - masks - (of_texts.cumsum(0) - of_texts)[texts]  # masks of its text before its own
        there = (slot > 0) & (slot <= masks[:, None])  # (N, D)
        places = (length + before[:, None] + slot - 1).where(there, starts[:, None] + 1)  # slot 0: the newest token's

        # of each column, text or mask: whose it is, which slot, and its position
        shape = len(input_ids), length + int(of_texts.max())
        owner, rank = (torch.full(shape, -1, device=masks.device) for _ in range(2))
        positions = torch.arange(shape[1], device=masks.device).expand(shape).clone()
        at = texts[:, None].expand_as(places)[there], places[there]
        owner[at] = torch.arange(len(texts), device=masks.device)[:, None].expand_as(places)[there]
        rank[at] = slot.expand_as(places)[there]
        positions[at] = (starts[:, None] + 1 + slot)[there]
        column = torch.arange(shape[1], device=masks.device)
        last = torch.where(owner >= 0, positions - rank, column)  # of the text, that each column sees
        of_text = (column < length) & (column <= last[:, :, None])
        own = (owner[:, :, None] == owner[:, None]) & (rank[:, :, None] >= rank[:, None]) & (owner >= 0)[:, None]
        visible = of_text | own | torch.eye(shape[1], dtype=torch.bool, device=masks.device)
        tokens = nn.functional.pad(input_ids, (0, shape[1] - length), value=self.network.config.pard_token)
        with HiddenStates(self.network, [self.config.num_hidden_layers]) as hidden:
            model(
                input_ids=tokens,
                attention_mask=self.masks(visible, positions),
                position_ids=positions.clamp(max=self.most_positions - 1),
                use_cache=False,
                logits_to_keep=1,
            )
        states = hidden.seen[self.config.num_hidden_layers][texts[:, None], places]
        return states, labels.masked_fill(~(there | (slot == 0)), IGNORED)

    @property
    def most_positions(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or 2**31

    def masks(self, visible: torch.Tensor, positions: torch.Tensor):
        """The `attention_mask` argument for what each column sees, bool (B, n, n): one, or one per type of layer."""
        window = getattr(self.config, "sliding_window", None)

        def for_layers(kind: str) -> torch.Tensor:
            seen = visible
            if kind == "sliding_attention" and window is not None:
                seen = seen & (positions[:, :, None] - positions[:, None] < window)
            seen = seen[:, None]
            if self.config._attn_implementation == "sdpa":
                return seen
            dtype = self.network.dtype
            return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

        if (kinds := getattr(self.config, "layer_types", None)) is not None:
            return {kind: for_layers(kind) for kind in set(kinds)}
        return for_layers("full_attention" if window is None else "sliding_attention")
