"""config.json of one-layer networks in the format of speculators."""

from __future__ import annotations

from typing import Any

VERSION = "0.9.0"
"""Of speculators, whose format it is."""
SWITCHES = frozenset({"norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"})


def speculators_fields(
    kind: str, name: str, layers: dict, drafted: int, states: list[int], num_draft_tokens: int, target: dict
) -> dict[str, Any]:
    """See `ForeignStudent.make_fields`. `kind`: what speculators calls it."""
    return {
        "architectures": [name],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "transformer_layer_config": {"model_type": "llama", **layers, "attention_bias": False},
        "draft_vocab_size": drafted,
        "eagle_aux_hidden_state_layer_ids": states,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [proposal(num_draft_tokens)],
            "default_proposal_method": "greedy",
            "verifier": {name: target[name] for name in ("name_or_path", "architectures")},
        },
    }


def proposal(num_draft_tokens: int) -> dict[str, Any]:
    return {"proposal_type": "greedy", "speculative_tokens": num_draft_tokens, "verifier_accept_k": 1}


def speculative_tokens(fields: dict, default: int) -> int:
    """How many tokens a drafter of such `fields` is meant to draft."""
    methods = (fields.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return methods[0].get("speculative_tokens") or default


def with_speculative_tokens(fields: dict, num_draft_tokens: int | None) -> dict[str, Any]:
    """`fields` with that number, if any."""
    if num_draft_tokens is None:
        return fields
    settings = {**(fields.get("speculators_config") or {}), "proposal_methods": [proposal(num_draft_tokens)]}
    return {**fields, "speculators_config": settings}
