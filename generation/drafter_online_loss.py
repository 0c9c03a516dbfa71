"""How far a drafter's distributions are from those that the target had where it verified: the loss of OSD (arXiv
2310.07177, section 4), for the kinds of drafters that can learn while they serve.

OSD learns from the tokens that the target put right. Here all verified tokens count, which needs nothing more, and for
a SpecFormer network each slot from each position, also where another number of tokens was drafted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin

from .argument import name_of
from .drafter_online_texts import VerifiedText

POSITIONS_AT_ONCE = 64
"""Of which scores of the vocabulary are held."""
SLOT_DECAY = 0.8
"""What a slot weighs of what the one in front of it weighs, without which it is of no use."""


def loss_for(drafter) -> Callable:
    """The loss of a kind of drafter: from (network, target, text) to the sum over its drafts, and their number.

    Raises:
        ValueError: it is of no kind that can learn here.
    """
    config = getattr(drafter, "config", None)
    if getattr(config, "model_type", None) == "specformer":
        return loss_of_slots
    if isinstance(drafter, GenerationMixin) and getattr(config, "pard_token", None) is None:
        return loss_of_causal_lm
    raise ValueError(
        f"drafter is a {name_of(drafter)}; expected a SpecFormer drafter, loaded with AutoModel.from_pretrained("
        "<drafter>, trust_remote_code=True), or a causal LM. Others do not learn while they serve: train them with "
        "`specformer train`."
    )


def divergence(logits: torch.Tensor, places: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of a drafter's distribution from the target's, which are told apart by the target's
    likeliest tokens and all others together. Of the likeliest tokens those that the drafter cannot draft are left out:
    what is compared is how likely the others are among themselves, and it weighs as much as they do.

    Args:
        logits: (M, V').
        places: where in them the target's likeliest tokens are, (M, K), negative where they are not.
        chances: logarithms of how likely the target takes them, (M, K).

    Returns:
        (M,).
    """
    is_there = places >= 0
    scores = logits.log_softmax(dim=-1).gather(-1, places.clamp(min=0))
    chances = chances.to(scores)
    likely = chances.exp()
    others = (1 - likely.sum(dim=-1)).clamp(min=0)
    of_others = torch.log1p(-(scores.exp() * is_there).sum(dim=-1).clamp(max=1 - 1e-4))
    known = (likely * (chances - scores)).masked_fill(~is_there, 0.0).sum(dim=-1)
    all_compared = (likely * is_there).sum(dim=-1) + others
    return (
        known
        + torch.xlogy(others, others.clamp(min=1e-4))
        - others * of_others
        - torch.xlogy(all_compared, all_compared)
    )


def loss_of_causal_lm(network, target, text: VerifiedText) -> tuple[torch.Tensor, int]:
    """Of each verified token, what the network says in its place."""
    config = network.config.get_text_config(decoder=True)
    length = min(len(text.tokens) - 1, getattr(config, "max_position_embeddings", None) or len(text.tokens))
    count = length + 1 - text.first
    if count < 1:
        return text.chances.new_zeros(()), 0
    ids = text.tokens[None, :length].to(network.device).clamp(max=config.vocab_size - 1)
    few = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
    logits = network(input_ids=ids, use_cache=False, return_dict=True, **few).logits[0, -count:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    places, chances = (part[:count].to(logits.device) for part in (text.likely, text.chances))
    places = places.masked_fill(places >= logits.shape[-1], -1)
    return divergence(logits, places, chances).sum(), count


def loss_of_slots(network, target, text: VerifiedText) -> tuple[torch.Tensor, int]:
    """Of each slot from each position since the last one of the prompt, as far as what it drafts was verified."""
    borrowed, config = network.borrow(target), network.config
    device, dtype = borrowed.device, next(network.parameters()).dtype
    tokens, likely, chances = (part.to(device) for part in (text.tokens, text.likely, text.chances))
    assert text.states is not None  # the drafter reads them
    positions, slots = len(likely), config.num_draft_tokens
    start = text.first - 2  # the first of the positions: the slot after its next token is the first verified one
    if start < 0:
        return text.chances.new_zeros(()), 0
    drafted = torch.arange(positions, device=device)[:, None] + torch.arange(slots, device=device)  # (N, D), of the G
    is_known = drafted < positions
    at = torch.zeros(1, len(tokens) - 1, dtype=torch.bool, device=device)
    at[0, start : start + positions] = True
    in_front = tokens[(text.first - 1 + drafted).clamp(max=len(tokens) - 1)]  # of each slot's token
    with torch.no_grad():
        anchors = borrowed.embed(tokens[None, 1:]).to(dtype) if config.reads_anchor_token else None
        previous = borrowed.embed(in_front).to(dtype) if config.previous_token_rank is not None else None
    states = text.states.to(device, dtype)[None]
    output = network(states, anchors, draft_positions=at, previous_embeds=previous)
    first, corrected = output.draft_hidden_states, output.corrected_hidden_states  # (N, D, d)
    drafted = drafted.clamp(max=positions - 1)
    written = tokens[text.first + drafted]  # (N, D)

    def of_some(first, states, is_known, drafted, written) -> torch.Tensor:
        precise = torch.promote_types(dtype, torch.float32)
        logits = borrowed.draft_logits(states.to(target.dtype)).to(precise)  # (n, D, V')
        losses = divergence(
            logits.flatten(0, 1), borrowed.draft_labels(likely[drafted]).flatten(0, 1), chances[drafted].flatten(0, 1)
        ).view(is_known.shape)
        weights = SLOT_DECAY ** torch.arange(slots, device=device)
        total = (losses * weights * is_known).sum()
        if config.confidence_head:
            with torch.no_grad():
                places = borrowed.candidates(first.to(target.dtype), config.num_candidates)
                scores = logits.gather(-1, places)
                best = places.gather(-1, scores.argmax(dim=-1, keepdim=True))[..., 0]
                right = borrowed.tokens_at(best) == written
                reached = functional.pad(right.long().cumprod(dim=1)[:, :-1], (1, 0), value=1).bool() & is_known
            sure = network.confidence_head(states.detach(), scores.to(dtype)).to(precise)
            sure = functional.binary_cross_entropy_with_logits(sure, right.to(precise), reduction="none")
            total = total + (sure * reached).sum()
        return total

    parts = (first, first if corrected is None else corrected, is_known, drafted, written)
    blocks = zip(*(part.split(POSITIONS_AT_ONCE) for part in parts), strict=True)
    losses = [checkpoint(of_some, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.stack(losses).sum(), positions
