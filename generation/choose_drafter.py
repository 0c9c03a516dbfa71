"""Which drafter a call to generate() means by what was passed to it."""

from __future__ import annotations

from transformers import GenerationMixin

from .assistant_drafter import AssistantDrafter
from .capabilities import unwrapped
from .draft_length import check_draft_length
from .drafter import Drafter, NoDrafter
from .prompt_lookup_drafter import PromptLookupDrafter
from .specformer_drafter import SpecFormerDrafter


def choose_drafter(
    model,
    assistant_model,
    num_assistant_tokens: int | None,
    prompt_lookup_num_tokens: int | None = None,
    max_matching_ngram_size: int | None = None,
    prefill_chunk_size: int | None = None,
) -> tuple[Drafter, int]:
    """The drafter that a call means, and how many tokens it drafts each round.

    `assistant_model` is a SpecFormer network, a causal LM, or an object that is a `Drafter` already.

    Raises:
        ValueError: none of them, more than one, or the drafter of another target.
    """
    assistant_model = unwrapped(assistant_model)
    check_draft_length(num_assistant_tokens)
    if num_assistant_tokens == 0:
        return NoDrafter(), 0
    if prompt_lookup_num_tokens is not None:
        if assistant_model is not None:
            raise ValueError("assistant_model and prompt_lookup_num_tokens were both given; pass one of them.")
        check_draft_length(prompt_lookup_num_tokens, "prompt_lookup_num_tokens")
        if max_matching_ngram_size is not None and (
            type(max_matching_ngram_size) is not int or max_matching_ngram_size < 1
        ):
            raise ValueError(f"max_matching_ngram_size is {max_matching_ngram_size!r}; expected a positive integer.")
        drafter = PromptLookupDrafter(max_matching_ngram_size or 2)
        num_assistant_tokens = prompt_lookup_num_tokens
    elif hasattr(assistant_model, "propose"):
        drafter = assistant_model
    elif hasattr(assistant_model, "borrow"):
        drafter = SpecFormerDrafter(assistant_model, model)
    elif isinstance(assistant_model, GenerationMixin):
        drafter = AssistantDrafter(assistant_model, model, prefill_chunk_size)
    elif assistant_model is None:
        raise ValueError(
            "Nothing was passed that drafts: give assistant_model=AutoModel.from_pretrained(<drafter>, "
            "trust_remote_code=True), a smaller causal LM as assistant_model, or prompt_lookup_num_tokens; or "
            "num_assistant_tokens=0 for plain decoding."
        )
    else:
        raise ValueError(
            f"assistant_model is a {type(assistant_model).__name__}; expected a SpecFormer drafter, loaded with "
            "AutoModel.from_pretrained(<drafter>, trust_remote_code=True), or a causal LM."
        )
    if num_assistant_tokens is None:
        num_assistant_tokens = drafter.default_num_assistant_tokens
    if num_assistant_tokens == 0:
        return NoDrafter(), 0
    return drafter, min(num_assistant_tokens, drafter.max_draft_tokens)
