"""Variants of the drafter and of its training that `ablations` compares."""

from __future__ import annotations

from pathlib import Path

CORRECTED, SMOOTHED = "previous_token_rank=256", ["--slot-decay", "1", "--acceptance-weights", "0.5"]


def variants(target_config, other_data: Path | None = None) -> dict[str, list[str]]:
    """Name and training options of each variant."""
    text_config = target_config.get_text_config(decoder=True)
    layers, few = text_config.num_hidden_layers, text_config.vocab_size // 24
    # each differs from "paper" in one thing
    of_paper = {
        "paper": [],
        "causal draft attention": ["--config", "causal_draft_attention=true"],
        "no positional FFN": ["--config", "use_positional_ffn=false"],
        "twice as wide": ["--config", f"intermediate_size={2 * text_config.intermediate_size}"],
    }
    if other_data:
        of_paper["other text than the target's"] = ["--data", str(other_data)]
    # each differs from "with the anchor token" in one thing, but those that combine what others have
    beyond = {
        "with the anchor token": [],
        "anchor as a slot": ["--config", "use_anchor_token=false", "anchor_slot=true"],
        "anchor as input and slot": ["--config", "anchor_slot=true"],
        "anchor beside HS[0]": [
            "--config",
            f"target_layer_ids={sorted({0, layers // 2, layers - 1, layers})}".replace(" ", ""),
        ],
        "slots see the context": ["--config", "draft_attends_context=true"],
        "two draft layers": ["--config", "num_draft_layers=2"],
        "slot embeddings": ["--config", "use_positional_ffn=false"],
        "corrected by the previous token": ["--config", CORRECTED],
        "corrected, base loss first": ["--config", CORRECTED, "--base-loss", "1"],
        "weighed by acceptance": SMOOTHED,
        "distance from the target": ["--distance-loss", "0.9"],
        "all tokens drafted": ["--draft-vocab-size", str(2**24)],
        f"{few:,} tokens drafted": ["--draft-vocab-size", str(few)],
        "default": ["--config", CORRECTED, "confidence_head=true", *SMOOTHED],
        "stacked": ["--config", CORRECTED, "num_draft_layers=2", "draft_attends_context=true", *SMOOTHED],
    }
    return {name: ["--paper", *options] for name, options in of_paper.items()} | beyond
