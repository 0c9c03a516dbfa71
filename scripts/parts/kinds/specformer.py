"""Training of a SpecFormer network (arXiv 2511.20340, section 3)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from specformer.configuration_specformer import SpecFormerConfig
from specformer.generation.accept_sampling import best_tokens
from specformer.generation.backend_linear import fast_linears
from specformer.modeling_specformer import SpecFormerModel
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.confidence import calibrate, confidence_loss
from specformer.scripts.parts.kinds.fields import given_fields
from specformer.scripts.parts.kinds.student import Drafts, Student, target_states, with_something_to_draft
from specformer.scripts.parts.losses import IGNORED, Verifiers, base_share, slot_labels
from specformer.target_specformer import BorrowedTarget

CONFIDENCE_EVERY = 4
"""Positions, of which one teaches the confidence head, which is small. Each takes another pass of the LM head."""


class SpecFormerStudent(Student):
    """See `Student`.

    Args:
        base_loss: see `base_share`.
    """

    kind, title, about = "specformer", "SpecFormer", "a SpecFormer drafter"
    means = (
        *("paper", "default_num_assistant_tokens", "distance_loss", "base_loss", "draft_vocab_size"),
        *("store_hidden_states", "gradient_checkpointing", "activation_checkpointing", "fsdp", "deepspeed"),
    )
    network: Any  # a SpecFormerModel, of whatever copy of its code

    def __init__(self, network, target, base_loss: float = 0.0):
        super().__init__(network, target, network.config.num_draft_tokens)
        self.borrowed: BorrowedTarget = network.borrow(target)
        self.head, self.layer_ids, self.rows = self.borrowed, self.borrowed.layer_ids, self.borrowed.rows
        self.has_confidence, self.base_loss = network.config.confidence_head, base_loss

    @property
    def device(self) -> torch.device:
        return self.borrowed.device

    @classmethod
    def make_config(cls, arguments, target_config) -> SpecFormerConfig:
        overrides = {
            key: getattr(arguments, key)
            for key in ("num_draft_tokens", "default_num_assistant_tokens", "draft_vocab_size")
            if getattr(arguments, key) is not None
        }
        if (arguments.draft_vocab_size or 0) >= target_config.get_text_config(decoder=True).vocab_size:
            del overrides["draft_vocab_size"]  # all of them are drafted: a recipe suits small vocabularies too
        overrides |= given_fields(arguments.config, SpecFormerConfig)
        overrides["target_name_or_path"] = arguments.target_id or arguments.target
        if arguments.start_from:
            if arguments.paper:
                raise ValueError(
                    "--paper and --start-from were both given; the fields of --start-from stay what they are."
                )
            fields, _ = SpecFormerConfig.get_config_dict(arguments.start_from)
            fields.pop("dtype", None)  # of its file
            return SpecFormerConfig(**{**fields, **overrides})
        make = SpecFormerConfig.paper if arguments.paper else SpecFormerConfig.from_target_config
        return make(target_config, **overrides)

    @classmethod
    def check_loss(cls, arguments, config: SpecFormerConfig) -> None:
        if arguments.distance_loss and not config.reads_last_states:
            raise ValueError(
                f"--distance-loss is {arguments.distance_loss} and target_layer_ids {config.target_layer_ids}; "
                f"expected {config.target_num_hidden_layers} among these, the states that the target's distribution "
                "comes from."
            )
        if arguments.base_loss and config.previous_token_rank is None:
            raise ValueError(
                f"--base-loss is {arguments.base_loss} and previous_token_rank null; expected --config "
                "previous_token_rank=256 or the like as well: the base is what that corrects."
            )

    @classmethod
    def make(cls, config: SpecFormerConfig, target, answers: Answers, arguments) -> SpecFormerStudent:
        """A new drafter with the target's final norm, which drafts the most frequent tokens of the answers; or one that
        goes on from the weights of another, and where it has more than that one, begins there as a new one."""
        drafter, start_from = SpecFormerModel(config), arguments.start_from
        drafter.init_from_target(target)
        chosen = False
        if start_from:
            other = SpecFormerModel.from_pretrained(start_from, dtype=torch.float32)
            other.borrow(target)  # refuses the drafter of another target
            own, learnt = drafter.state_dict(), other.state_dict()
            if misfits := [name for name in learnt if name not in own or own[name].shape != learnt[name].shape]:
                raise ValueError(
                    f"--start-from {start_from}: {', '.join(misfits)} do not fit the drafter that is asked for. Leave "
                    "out the options that change these, or --start-from."
                )
            drafter.load_state_dict(learnt, strict=False)
            chosen = "draft_token_ids" in learnt
        if drafter.draft_token_ids is not None and not chosen:
            drafter.choose_draft_tokens(answers.token_counts(drafter.config.vocab_size))
        return cls(drafter, target, arguments.base_loss or 0.0)

    def of_checkpoint(self, folder: Path) -> SpecFormerStudent:
        return SpecFormerStudent(SpecFormerModel.from_pretrained(folder, dtype=torch.float32), self.target)

    def calibrate(self, answers, batch_size: int) -> None:
        if self.has_confidence:
            with fast_linears(self.target, self.network.to(self.device), self.rows):
                calibrate_drafter(self.network, self.borrowed, answers, batch_size)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        self.network.to(dtype).save_pretrained(folder)

    def drafts(self, model, batch, position_share=1.0) -> Drafts:
        return drafts_of_text(model, self.borrowed, batch, position_share)

    def loss(self, model, batch, of_slots, position_share, step, num_steps) -> torch.Tensor:
        drafts = self.drafts(model, batch, position_share)
        loss_of = partial(of_slots, labels=drafts.labels, borrowed=self.borrowed, verifiers=drafts.verifiers)
        loss = loss_of(drafts.states)
        # of the Trainer's own count of steps, which goes on where it was
        if share := base_share(self.base_loss, step, num_steps):
            loss = (1 - share) * loss + share * loss_of(drafts.first_states)
        if self.has_confidence:
            loss = loss + confidence_loss(*confidences(model, drafts, self.borrowed, CONFIDENCE_EVERY))
        return loss

    def right(self, drafts: Drafts) -> torch.Tensor:
        return choices(drafts, self.borrowed, self.network.config)[0]

    def confidences(self, drafts: Drafts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return confidences(self.network, drafts, self.borrowed)


def network_of(drafter: nn.Module) -> Any:
    """The SpecFormerModel in what accelerate may have wrapped it in."""
    return getattr(drafter, "module", drafter)


def in_front(values: torch.Tensor, num_slots: int) -> torch.Tensor:
    """What slot j at position n has in front of it, which is at position n + 1 + j: (B, T) -> (B, T, D), 0 past the
    end."""
    return functional.pad(values, (0, num_slots))[:, 1:].unfold(1, num_slots, 1)


def drafts_of_text(
    drafter: nn.Module, borrowed: BorrowedTarget, batch: dict[str, torch.Tensor], position_share: float = 1.0
) -> Drafts:
    """Drafts of the positions of `batch` that have something to draft, or of a random share of them."""
    dtype, config = next(drafter.parameters()).dtype, network_of(drafter).config
    hidden_states = batch["hidden_states"] if "hidden_states" in batch else target_states(borrowed, batch)
    anchors = None
    if config.reads_anchor_token:
        with torch.no_grad():
            anchors = borrowed.embed(functional.pad(batch["input_ids"][:, 1:], (0, 1))).to(dtype)
    slots = config.num_draft_tokens
    labels = slot_labels(batch["labels"], slots)
    wanted = with_something_to_draft(labels, position_share)
    previous = verifiers = None
    if config.previous_token_rank is not None:
        with torch.no_grad():
            previous = borrowed.embed(in_front(batch["input_ids"], slots)[wanted]).to(dtype)
    if config.reads_last_states:
        positions = torch.arange(wanted.numel(), device=wanted.device).view(wanted.shape)
        verifiers = Verifiers(hidden_states[:, :, -1].flatten(0, 1), in_front(positions, slots)[wanted])
    output = drafter(hidden_states.to(dtype), anchors, draft_positions=wanted, previous_embeds=previous)
    first, corrected = output.draft_hidden_states, output.corrected_hidden_states
    return Drafts(first if corrected is None else corrected, labels[wanted], first, verifiers)


@torch.no_grad()
def choices(drafts: Drafts, borrowed: BorrowedTarget, config: SpecFormerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots greedy decoding gets right once the tokens in front of them are, bool (N, D), and the logits of their
    candidates (N, D, C), 0 where there is no label."""
    kept, dtype = drafts.labels != IGNORED, borrowed.target.dtype
    tokens, logits = [], []
    chunks = (part[kept].to(dtype).split(1024) for part in (drafts.states, drafts.first_states))
    for states, first in zip(*chunks, strict=True):
        places = borrowed.candidates(first, config.num_candidates)  # the best one first
        tokens.append(borrowed.tokens_at(places[..., 0]))
        logits.append(borrowed.candidate_logits(states, places))
        if config.previous_token_rank is not None:
            tokens[-1] = best_tokens(logits[-1], borrowed.tokens_at(places))
    right, logits = torch.zeros_like(kept), torch.cat(logits)
    right[kept] = torch.cat(tokens) == drafts.labels[kept]
    return right, logits.new_zeros(*kept.shape, logits.shape[-1]).masked_scatter(kept[..., None], logits)


def confidences(
    drafter: nn.Module, drafts: Drafts, borrowed: BorrowedTarget, every: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a drafter's confidences, whether the drafts are right, and the labels, (N, D) each; of every so many of
    the positions. No gradient of them reaches the drafts: these are not bent to please them."""
    states, labels, first = (part[::every].detach() for part in drafts[:3])
    some = Drafts(states, labels, first)
    network = network_of(drafter)
    right, logits = choices(some, borrowed, network.config)
    return network.confidence_head(some.states, logits), right, some.labels


@torch.no_grad()
def calibrate_drafter(drafter: SpecFormerModel, borrowed: BorrowedTarget, answers, batch_size: int) -> None:
    """Fit the drafter's confidences to what it gets right on `answers`."""
    outcomes = []
    for batch in torch.utils.data.DataLoader(answers, batch_size, collate_fn=Answers.collate):
        batch = {name: values.to(borrowed.device) for name, values in batch.items()}
        drafts = drafts_of_text(drafter, borrowed, batch)
        outcomes.append(confidences(drafter, drafts, borrowed))
    calibrate(drafter.confidence_head, outcomes)
