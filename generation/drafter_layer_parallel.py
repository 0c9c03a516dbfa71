"""Layer-parallel drafting (EasySpec, arXiv 2502.02493): an ordinary causal LM whose attention layers read, in groups,
the same input, so that those of a group need not wait for one another.

With what enters a group as h, the attention of each of its layers reads norm(h), as if the layers in front of it had
changed nothing, and what it gives is added where it always is; MLPs read what they always do. The first and the last
layer are exact, and so is the pass over what the target took, from which the first draft of a round comes and in which
keys and values of the text are computed: those of drafts are dropped each round.

Where several processes share the target and each has all of the assistant, they divide the layers of a group among
them (`drafter_layer_division`). A single process computes the attention of a group layer by layer, so that nothing is
faster by it: drafts are those that several would propose, at the time of an ordinary assistant and of what it reads
again.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import torch
from transformers import GenerationMixin

from .argument import name_of, whole_number
from .backend_compiled import is_compiled, uncompiled
from .backend_graphs import run_pass
from .cache_masks import attention_masks
from .drafter import Drafter
from .drafter_assistant import AssistantDrafter
from .drafter_layer_division import DividedGroups
from .drafter_layer_groups import Group, SameInput, groups_of
from .drafter_system import DraftingSystem, Parts
from .proposal import Proposal
from .ranks import Ranks, ranks_of
from .target import read_block


class LayerParallel(DraftingSystem):
    """An assistant that drafts with several attention layers at once.

    Args:
        assistant: a causal LM with the target's tokenizer.
        group_size: layers whose attention goes from the same input; 1: the ordinary assistant.

    Raises:
        ValueError: what is no causal LM or no number, or a model whose layers are not built in a way that is known.
    """

    def __init__(self, assistant, group_size: int = 4):
        if not isinstance(assistant, GenerationMixin):
            raise ValueError(
                f"assistant is a {name_of(assistant)}; expected a causal LM, loaded with AutoModelForCausalLM."
            )
        if (whole_number(group_size) or 0) < 1:
            raise ValueError(f"group_size is {group_size!r}; expected a positive integer: layers of a group.")
        self.assistant, self.group_size = assistant, int(group_size)
        self.groups = groups_of(assistant, self.group_size)

    def drafter_for(self, target, parts: Parts) -> Drafter:
        return LayerParallelDrafter(self.assistant, target, self.groups)


class LayerParallelDrafter(AssistantDrafter):
    """
    Args:
        assistant, target: the models.
        groups: of the layers of `assistant`.

    Attributes:
        ranks: the processes that divide the groups: those that share `target`, which all draft as often. `None` where
            there are none, or where the assistant is shared as well, so that each of them has a part of every layer.
    """

    def __init__(self, assistant, target, groups: list[Group]):
        super().__init__(assistant, target)
        self.groups = groups
        self.ranks = ranks_of(target) if ranks_of(assistant) is None else None

    def propose(self, num_tokens, choose) -> Proposal:
        proposal = super().propose(num_tokens, choose)
        if self.groups and self.read is not None:
            self.read = self.read[:, :0]  # all of it is read again, but for the newest token of each text
        return proposal

    def read_draft(self, token: torch.Tensor) -> torch.Tensor:
        if not self.groups:
            return super().read_draft(token)

        def one_pass(token: torch.Tensor) -> tuple[torch.Tensor]:
            position_ids = self.cache.prepare(1)
            masks = attention_masks(self.assistant.config, self.cache, position_ids, self.assistant.dtype)
            with in_parallel(self.assistant, self.groups, self.ranks):
                return (read_block(self.assistant, self.cache, token, position_ids, masks)[0],)

        return run_pass(self.cache, 1, ("layer-parallel",), one_pass, token)[0]


def in_parallel(assistant, groups: list[Group], ranks: Ranks | None = None) -> ExitStack:
    """A context in which `assistant` computes `groups`, divided among `ranks`; compiled code, which calls no new hooks,
    runs as written."""
    with ExitStack() as stack:
        stack.enter_context(uncompiled() if is_compiled(assistant) else nullcontext())
        stack.enter_context(SameInput(groups) if ranks is None else DividedGroups(groups, ranks))
        return stack.pop_all()
