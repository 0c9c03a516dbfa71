"""Which drafter a call to generate() means by what was passed to it, and how much it is to draft."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import GenerationMixin

from .accept_rules import AcceptanceRule
from .argument import name_of, whole_number
from .call_settings import CallSettings
from .draft_length import AUTO, DraftLength, checked_count, checked_draft_length
from .draft_length_auto import AutoDraftLength, experience_of
from .draft_length_tree import LONGEST_CHAIN, AutoTreeSize
from .drafter import Drafter, NoDrafter, is_drafter
from .drafter_assistant import AssistantDrafter
from .drafter_copying import MOST_COPIED, CopyingDrafter, CopyRates
from .drafter_dflash import DFlashDrafter
from .drafter_dflash_network import DFlashNetwork
from .drafter_eagle import EagleDrafter
from .drafter_eagle_network import EagleNetwork
from .drafter_falcon import FalconDrafter
from .drafter_falcon_network import FalconNetwork
from .drafter_loading import drafting_model
from .drafter_mtp import MtpDrafter, MtpModel, mtp_layers
from .drafter_parallel import ParallelDrafter
from .drafter_parallelspec import ParallelSpecDrafter
from .drafter_parallelspec_network import ParallelSpecNetwork
from .drafter_prompt_lookup import PromptLookupDrafter
from .drafter_specformer import SpecFormerDrafter
from .drafter_system import Parts, is_system
from .target_probe import tree_obstacle
from .target_refusals import UnsupportedTargetError, unwrapped

MOST_WITHOUT_NUMBER = 16
"""A drafter without an end of its own, such as a causal LM, drafts no more than this where no number is given."""
MOST_IN_TREE = 15
"""Tokens of a tree where no number is given."""


@dataclass
class DraftSettings:
    """What a call says about drafting.

    Attributes:
        assistant_model: a SpecFormer or DFlash network, the target's MTP layers, a causal LM, an object that is a
            `Drafter` already, a `DraftingSystem`, or `None`.
        num_assistant_tokens: to draft each round: a number, "auto", or `None` if not given.
        prompt_lookup_num_tokens: to copy from the text; `None` if not given, 0: none.
        max_matching_ngram_size: of what has to be found in the text before it is copied.
        prefill_chunk_size: tokens of one pass over prompts, for a causal LM.
        tree_size: tokens to draft each round as a tree; `None` if not given, 0: a chain.
    """

    assistant_model: object
    num_assistant_tokens: int | str | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    prefill_chunk_size: int | None
    tree_size: int | None = None

    @classmethod
    def of_call(cls, model, assistant_model, num_assistant_tokens, tree_size, settings: CallSettings) -> DraftSettings:
        """
        Raises:
            ValueError: a number that is none, or a checkpoint that is of no use.
            OSError: a checkpoint that is not there.
        """
        if num_assistant_tokens is None:
            num_assistant_tokens = settings.get("num_assistant_tokens")
        ngram = settings.get("max_matching_ngram_size")
        if ngram is not None and (whole_number(ngram) or 0) < 1:
            raise ValueError(f"max_matching_ngram_size is {ngram!r}; expected a positive integer.")
        if settings.take("use_mtp"):
            if assistant_model is not None:
                raise ValueError("assistant_model and use_mtp were both given; pass one of them.")
            assistant_model = mtp_layers(model)
        return cls(
            drafting_model(unwrapped(assistant_model), model),
            checked_draft_length(num_assistant_tokens),
            checked_count(settings.take("prompt_lookup_num_tokens"), "prompt_lookup_num_tokens"),
            whole_number(ngram),
            settings.get("prefill_chunk_size"),
            checked_count(tree_size, "tree_size"),
        )


def choose_drafter(model, drafts: DraftSettings, rule: AcceptanceRule) -> Drafter:
    """The drafter that a call means.

    A network that reads the target's states leaves rows whose text repeats itself to copies of it, unless
    `prompt_lookup_num_tokens` is 0, or the text depends on what is drafted: which row is copied follows from that.

    Raises:
        ValueError: nothing that drafts, more than one, or the drafter of another target.
    """
    assistant_model, copied = drafts.assistant_model, drafts.prompt_lookup_num_tokens
    if drafts.num_assistant_tokens == 0:
        return NoDrafter()
    # of trees all guesses count as certain, so that nothing follows from what was sampled
    chains_decide = rule.text_depends_on_drafts and not drafts.tree_size
    if (drafter := drafter_of_network(assistant_model, model)) is not None:
        if copied == 0 or chains_decide:
            return drafter
        rates = experience_of(model, assistant_model, CopyingDrafter, CopyRates)
        return CopyingDrafter(drafter, copied or MOST_COPIED, rates, drafts.max_matching_ngram_size)
    if copied and assistant_model is not None:
        raise ValueError(
            "assistant_model and prompt_lookup_num_tokens were both given, and only drafters that read the target's "
            "hidden states go together with copies from the text; pass one of them."
        )
    if copied is not None and assistant_model is None:
        if not copied:
            return NoDrafter()
        if drafts.tree_size or (drafts.num_assistant_tokens == AUTO and not chains_decide):
            rates = experience_of(model, model, CopyingDrafter, CopyRates)
            return CopyingDrafter(NoDrafter(), copied, rates, drafts.max_matching_ngram_size)
        return PromptLookupDrafter(drafts.max_matching_ngram_size or 2, copied)
    if is_drafter(assistant_model):
        return assistant_model
    if is_system(assistant_model):
        return assistant_model.drafter_for(
            model, Parts(lambda part, of: drafter_of_part(part, of, drafts, rule), chains_decide)
        )
    if isinstance(assistant_model, GenerationMixin):
        is_parallel = getattr(getattr(assistant_model, "config", None), "pard_token", None) is not None
        kind = ParallelDrafter if is_parallel else AssistantDrafter
        return kind(assistant_model, model, drafts.prefill_chunk_size)
    if assistant_model is None:
        raise ValueError(
            "Nothing was passed that drafts: give assistant_model=AutoModel.from_pretrained(<drafter>, "
            "trust_remote_code=True), a smaller causal LM as assistant_model, or prompt_lookup_num_tokens; or "
            "num_assistant_tokens=0 for plain decoding."
        )
    raise ValueError(
        f"assistant_model is a {type(assistant_model).__name__}; expected a SpecFormer drafter, loaded with "
        "AutoModel.from_pretrained(<drafter>, trust_remote_code=True), the folder or Hub id of a DFlash, DSpark, "
        "EAGLE-3, Falcon or ParallelSpec drafter, a causal LM, or a Drafter."
    )


def drafter_of_part(part, target, drafts: DraftSettings, rule: AcceptanceRule) -> Drafter:
    """The drafter of what a system drafts with, without copies from the text."""
    part = drafting_model(unwrapped(part), target)
    if (drafter := drafter_of_network(part, target)) is not None:
        return drafter
    alone = replace(drafts, assistant_model=part, num_assistant_tokens=None, prompt_lookup_num_tokens=None)
    return choose_drafter(target, alone, rule)


def drafter_of_network(network, model) -> Drafter | None:
    """The drafter of a network that reads the hidden states of `model`; `None` where it is none."""
    if model_type_of(network) == "specformer":
        return SpecFormerDrafter(network, model)
    if isinstance(network, DFlashNetwork):
        return DFlashDrafter(network, model)
    if isinstance(network, ParallelSpecNetwork):
        return ParallelSpecDrafter(network, model)
    if isinstance(network, FalconNetwork):
        return FalconDrafter(network, model)
    if isinstance(network, EagleNetwork):
        return EagleDrafter(network, model)
    if isinstance(network, MtpModel):
        return MtpDrafter(network, model)
    return None


def model_type_of(model) -> str | None:
    """What a model's config calls its kind."""
    return getattr(getattr(model, "config", None), "model_type", None)


def choose_draft_length(
    model, drafts: DraftSettings, rule: AcceptanceRule, drafter: Drafter, cuda_graphs: bool
) -> DraftLength:
    """How much each round drafts.

    Raises:
        ValueError: a tree is wanted where there can be none.
        UnsupportedTargetError: the same, for what the target does.
    """
    requested, tree_size = requested_length(drafts, drafter), drafts.tree_size
    if requested is None and tree_size is None and (make := getattr(drafter, "own_draft_length", None)) is not None:
        return make()
    if requested is None:
        if not drafter.default_num_assistant_tokens:
            requested = 0
        elif rule.text_depends_on_drafts:  # and would depend on the clock
            requested = drafter.default_num_assistant_tokens
    if tree_size and requested != 0:
        check_tree_size(model, drafts, drafter)
    if isinstance(requested, int):
        most = min(requested, drafter.max_draft_tokens)
        return DraftLength(most, tree_size or 0 if most else 0)
    most = min(drafter.max_draft_tokens, MOST_WITHOUT_NUMBER)
    if most == 0:
        return DraftLength(0)
    if (
        tree_size is None
        and getattr(drafter, "proposes_trees", False)
        and not rule.text_depends_on_drafts
        and not cuda_graphs
    ):
        tree_size = MOST_IN_TREE if tree_obstacle(model) is None else 0
    start = drafter.default_num_assistant_tokens or most
    source = model if drafts.assistant_model is None else drafts.assistant_model
    may_cut = not rule.text_depends_on_drafts
    # what times and drafts depend on
    way = type(drafter), most, may_cut, model.device, model.dtype, cuda_graphs, tree_size
    experience = experience_of(model, source, way)
    if tree_size:
        return AutoTreeSize(most, tree_size, start, experience, LONGEST_CHAIN if drafts.tree_size is None else 0)
    return AutoDraftLength(most, start, experience, may_cut)


def check_tree_size(model, drafts: DraftSettings, drafter: Drafter) -> None:
    """
    Raises:
        ValueError: the drafter proposes no trees.
        UnsupportedTargetError: the target does not verify them as it verifies chains.
    """
    if not getattr(drafter, "proposes_trees", False):
        raise ValueError(
            f"tree_size is {drafts.tree_size}, and {name_of(drafter)} proposes chains; expected a SpecFormer, DFlash, "
            "DSpark, EAGLE-3, Falcon or ParallelSpec drafter, copies or trigrams, or no tree_size."
        )
    if (obstacle := tree_obstacle(model)) is not None:
        raise UnsupportedTargetError(f"{obstacle} Leave out tree_size.")


def requested_length(drafts: DraftSettings, drafter: Drafter) -> int | str | None:
    """How many tokens a call asks of its drafter. Copies alone are `prompt_lookup_num_tokens`, or "auto" up to that
    number; a causal LM may have a number of its own."""
    if drafts.assistant_model is None and isinstance(drafter, PromptLookupDrafter | CopyingDrafter):
        return AUTO if drafts.num_assistant_tokens == AUTO else drafts.prompt_lookup_num_tokens
    if drafts.num_assistant_tokens is None and isinstance(drafter, AssistantDrafter):
        generation_config = getattr(drafts.assistant_model, "generation_config", None)
        return checked_draft_length(getattr(generation_config, "num_assistant_tokens", None))
    return drafts.num_assistant_tokens
