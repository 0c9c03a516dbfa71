"""Which drafter a call to generate() means by what was passed to it, and how much it is to draft."""

from __future__ import annotations

from transformers import GenerationMixin

from .accept_rules import AcceptanceRule
from .argument import whole_number
from .draft_length import AUTO, DraftLength, checked_draft_length
from .draft_length_auto import AutoDraftLength, experience_of
from .draft_length_confident import ConfidentDraftLength
from .drafter import Drafter, NoDrafter, is_drafter
from .drafter_assistant import AssistantDrafter
from .drafter_copying import MOST_COPIED, CopyingDrafter, CopyRates
from .drafter_prompt_lookup import PromptLookupDrafter
from .drafter_specformer import SpecFormerDrafter
from .target_refusals import unwrapped

MOST_WITHOUT_NUMBER = 16
"""A drafter without an end of its own, such as a causal LM, drafts no more than this where nobody names a number."""


def choose_drafter(
    model,
    assistant_model,
    num_assistant_tokens: int | str | None,
    prompt_lookup_num_tokens: int | None = None,
    max_matching_ngram_size: int | None = None,
    prefill_chunk_size: int | None = None,
) -> tuple[Drafter, int | str | None]:
    """The drafter that a call means, and how many tokens are asked of it: a number, "auto", or `None`.

    `assistant_model` is a SpecFormer network, a causal LM, or an object that is a `Drafter` already. A SpecFormer
    network leaves rows whose text repeats itself to copies of it, unless `prompt_lookup_num_tokens` is 0.

    Raises:
        ValueError: none of them, more than one, or the drafter of another target.
    """
    assistant_model = unwrapped(assistant_model)
    num_assistant_tokens = checked_draft_length(num_assistant_tokens)
    if num_assistant_tokens == 0:
        return NoDrafter(), 0
    prompt_lookup_num_tokens = checked_draft_length(prompt_lookup_num_tokens, "prompt_lookup_num_tokens")
    if max_matching_ngram_size is not None:
        given, max_matching_ngram_size = max_matching_ngram_size, whole_number(max_matching_ngram_size)
        if max_matching_ngram_size is None or max_matching_ngram_size < 1:
            raise ValueError(f"max_matching_ngram_size is {given!r}; expected a positive integer.")
    if model_type_of(assistant_model) == "specformer":
        drafter = SpecFormerDrafter(assistant_model, model)
        if prompt_lookup_num_tokens != 0:
            rates = experience_of(model, assistant_model, CopyingDrafter, CopyRates)
            drafter = CopyingDrafter(drafter, prompt_lookup_num_tokens or MOST_COPIED, rates, max_matching_ngram_size)
    elif prompt_lookup_num_tokens is not None:
        if assistant_model is not None:
            raise ValueError(
                "assistant_model and prompt_lookup_num_tokens were both given, and only a SpecFormer drafter goes "
                "together with copies from the text; pass one of them."
            )
        drafter = PromptLookupDrafter(max_matching_ngram_size or 2)
        num_assistant_tokens = prompt_lookup_num_tokens
    elif is_drafter(assistant_model):
        drafter = assistant_model
    elif isinstance(assistant_model, GenerationMixin):
        drafter = AssistantDrafter(assistant_model, model, prefill_chunk_size)
        if num_assistant_tokens is None:
            asked_of_it = getattr(assistant_model.generation_config, "num_assistant_tokens", None)
            num_assistant_tokens = checked_draft_length(asked_of_it)
    elif assistant_model is None:
        raise ValueError(
            "Nothing was passed that drafts: give assistant_model=AutoModel.from_pretrained(<drafter>, "
            "trust_remote_code=True), a smaller causal LM as assistant_model, or prompt_lookup_num_tokens; or "
            "num_assistant_tokens=0 for plain decoding."
        )
    else:
        raise ValueError(
            f"assistant_model is a {type(assistant_model).__name__}; expected a SpecFormer drafter, loaded with "
            "AutoModel.from_pretrained(<drafter>, trust_remote_code=True), a causal LM, or a Drafter."
        )
    if num_assistant_tokens is None and not drafter.default_num_assistant_tokens:
        num_assistant_tokens = 0
    return (NoDrafter() if num_assistant_tokens == 0 else drafter), num_assistant_tokens


def model_type_of(model) -> str | None:
    """What a model's config calls its kind."""
    return getattr(getattr(model, "config", None), "model_type", None)


def drafter_under(rule: AcceptanceRule, drafter: Drafter) -> Drafter:
    """`drafter`, without the copies where the text depends on what is drafted."""
    return drafter.drafter if rule.text_depends_on_drafts and isinstance(drafter, CopyingDrafter) else drafter


def choose_draft_length(
    requested: int | str | None, drafter: Drafter, model, assistant_model, rule: AcceptanceRule, cuda_graphs: bool
) -> DraftLength:
    """How much each round drafts; `drafter` and `requested` are what `call_drafter` returned."""
    if requested is None and rule.text_depends_on_drafts:  # and would depend on the clock
        requested = drafter.default_num_assistant_tokens
    if requested in (None, AUTO):
        most = min(drafter.max_draft_tokens, MOST_WITHOUT_NUMBER)
        if most == 0:
            return DraftLength(0)
        start = drafter.default_num_assistant_tokens or most
        kind = AutoDraftLength if rule.text_depends_on_drafts else ConfidentDraftLength
        experience = experience_of(model, unwrapped(assistant_model), (type(drafter), most))
        return kind(most, start, experience, (model.device, model.dtype, cuda_graphs))
    return DraftLength(min(requested, drafter.max_draft_tokens))
