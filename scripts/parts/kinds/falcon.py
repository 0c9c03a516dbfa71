"""Training of a Falcon network (arXiv 2412.12639): blocks of k tokens, one after the other, behind many positions of a
text, by coupled sequential glancing distillation (section 3.2).

First the network drafts alone, from its own states and its own tokens. Of as many tokens as a share of those that were
wrong, the true ones and the target's own states stand in the place of its own when it drafts again, whole blocks of
them; that is what it learns from. The share falls to 0 over the steps. Saved in a format of its own, EAGLE-3's with a
block size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from specformer.generation.drafter_falcon_network import FalconNetwork
from specformer.scripts.parts.kinds.eagle3 import EagleStudent
from specformer.scripts.parts.kinds.groups import Groups
from specformer.scripts.parts.kinds.speculators import SWITCHES
from specformer.scripts.parts.kinds.student import Drafts, with_something_to_draft
from specformer.scripts.parts.losses import IGNORED, slot_labels

GLANCING = 0.4
"""Share of the wrong tokens whose number is shown at first."""

Shown = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""What the network reads for the tokens that it drafted from slot s on, by the states that it gave for them and those
that it reads of these, (R, G * k, d) each: tokens (R, G * k), and states (R, G * k, d)."""


class FalconStudent(EagleStudent):
    """It reads texts as an EAGLE-3 network does; see the module.

    Attributes:
        glancing: share of the wrong tokens whose number is shown in the first step, see `GLANCING`; 0: it always drafts
            behind the true tokens and from its own states, as an EAGLE-3 network learns.
    """

    kind, name, title = "falcon", "FalconSpeculator", "Falcon"
    about = "a Falcon drafter"
    algorithm = "falcon"
    switches = SWITCHES | {"block_size"}
    means = (*EagleStudent.means, "glancing")
    network: FalconNetwork
    glancing: float = GLANCING

    @classmethod
    def make_fields(cls, layers, drafted, states, num_draft_tokens, target, switches) -> dict[str, Any]:
        fields = super().make_fields(layers, drafted, states, num_draft_tokens, target, switches)
        return {"block_size": 2, **fields}

    @classmethod
    def make(cls, config, target, answers, arguments) -> FalconStudent:
        student = super().make(config, target, answers, arguments)
        assert isinstance(student, cls)
        student.glancing = GLANCING if arguments.glancing is None else arguments.glancing
        return student

    def drafts(self, model, batch, position_share=1.0) -> Drafts:
        return Text(self, model, batch, position_share).drafts()

    def loss(self, model, batch, of_slots, position_share, step, num_steps) -> torch.Tensor:
        text = Text(self, model, batch, position_share)
        share = self.glancing * (1 - step / num_steps)
        drafts = text.glanced(share) if self.glancing else text.drafts()
        return of_slots(drafts.states, labels=drafts.labels, borrowed=self.head, weights=self.head_weights)


class Text:
    """Texts of a batch that the network has read, with a group of draft slots at each of some positions.

    Args:
        model: the student's network, or what accelerate has wrapped it in.
    """

    def __init__(self, student: FalconStudent, model, batch: dict[str, torch.Tensor], position_share: float):
        self.student, self.network, self.size = student, student.network, student.network.config.block_size
        labels = slot_labels(batch["labels"], student.num_draft_tokens)
        wanted = with_something_to_draft(labels, position_share)
        self.labels, self.groups = labels[wanted], Groups.at(wanted, self.size)
        self.fused = self.network.fuse(student.read_states(batch))  # (B, T, d)
        self.next_tokens = functional.pad(batch["input_ids"][:, 1:], (0, 1))  # (B, T)
        self.length, cache = self.fused.shape[1], DynamicCache()
        positions = torch.arange(self.length, device=self.fused.device)[None]
        model(self.fused, student.embed(self.next_tokens), positions, cache)  # for its keys and values
        self.read: Any = cache.layers[0]

    def drafts(self) -> Drafts:
        """From its own states, behind the true tokens."""
        return self._drafts(lambda slot, _, states: (self.true(self.next_tokens, slot), states))

    def glanced(self, share: float) -> Drafts:
        """From its own states and tokens, but where it is shown others, as many as `share` of those that are wrong."""
        head, tokens = self.student.head, self.network.draft_token_ids

        def best(normed: torch.Tensor) -> torch.Tensor:
            places = head.draft_logits(normed).argmax(dim=-1)
            return places if tokens is None else tokens[places]

        chosen: list[torch.Tensor] = []

        def alone(slot: int, given: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            chosen.append(best(self.network.norm(given)))
            return chosen[-1], states

        with torch.no_grad():
            wrong = (best(self._drafts(alone).states) != self.labels) & (self.labels != IGNORED)  # (N, D)
            is_shown = self._shown(share * wrong.sum(dim=1), len(chosen))

        def shown(slot: int, _, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            block = slot // self.size
            here = is_shown[block].repeat_interleave(self.size, dim=1)  # (R, G * k)
            read = torch.where(here, self.true(self.next_tokens, slot), chosen[block])
            return read, torch.where(here[..., None], self.true(self.fused, slot), states)

        return self._drafts(shown)

    def _shown(self, number: torch.Tensor, blocks: int) -> torch.Tensor:
        """Which of the drafted `blocks` that are read again are shown in each group, bool (blocks, R, G): so many that
        their tokens are the `number` (N,) on average."""
        groups = self.groups
        shown = torch.zeros(blocks, *groups.real.shape, dtype=torch.bool, device=number.device)
        count = number / self.size + torch.rand(number.shape, device=number.device)  # the rest by chance
        order = torch.rand(len(number), blocks, device=number.device).argsort(dim=1).argsort(dim=1)
        shown[:, groups.real] = (order < count.floor()[:, None]).T
        return shown

    def true(self, values: torch.Tensor, slot: int) -> torch.Tensor:
        """What `values` (B, T, ...) have at the positions of the tokens that are drafted from `slot` on, (R, G * k)."""
        return self.groups.of_texts(values, self.groups.places(self.size, 1 + slot))

    def _drafts(self, shown: Shown) -> Drafts:
        groups, size, slots = self.groups, self.size, self.student.num_draft_tokens
        cache = DynamicCache()
        cache.update(self.read.keys[groups.texts], self.read.values[groups.texts], 0)
        seen, own = groups.visible(size, self.length), groups.own(size, causal=False)
        hidden = torch.zeros_like(own)  # the text has these tokens
        places = groups.places(size, 1 - size).clamp(min=0)
        given, tokens = groups.of_texts(self.fused, places), groups.of_texts(self.next_tokens, places)
        steps: list[torch.Tensor] = []
        for slot in range(0, slots, size):
            if slot:
                places = groups.places(size, 1 + slot - size)
                states = self.network.norm(given) if self.network.config.norm_output else given
                tokens, given = shown(slot - size, given, states)
            seen = torch.cat([seen, (own if slot else hidden).expand(len(seen), 1, -1, -1)], dim=-1)
            given = self.network(given, self.student.embed(tokens), places, cache, seen)
            steps.append(groups.taken(given))
        drafted = self.network.norm(torch.cat(steps, dim=1)[:, :slots])
        return Drafts(drafted, self.labels, drafted)
