"""Which rows of a padded batch read their prompts together: those of similar length, so that little padding is read."""

from __future__ import annotations

PASS_ON_CPU = 48
"""Tokens that a CPU reads in the time that a pass takes besides: mostly that of loading the weights, so it hardly
depends on the model."""
LAYERS_PER_SECOND, OPERATIONS_PER_SECOND = 2e3, 2e14
"""Of an accelerator, by order of magnitude: a layer takes some 0.5 ms to launch, however few its tokens."""
LEAST_ON_ACCELERATOR = 256
"""Tokens that it computes while it loads the weights."""


def tokens_of_a_pass(model) -> int:
    """How much padding a pass of its own must save, in tokens, so that it is worth the time."""
    if model.device.type == "cpu":
        return PASS_ON_CPU
    launching = model.config.get_text_config(decoder=True).num_hidden_layers / LAYERS_PER_SECOND
    weights = sum(weight.numel() for weight in model.parameters())
    return max(LEAST_ON_ACCELERATOR, int(launching * OPERATIONS_PER_SECOND / (2 * weights)))


def group_rows(widths: list[int], pass_tokens: int | None) -> list[list[int]]:
    """Divide rows into groups, each padded to its longest, so that they take the least time together.

    Args:
        widths: tokens of each row's prompt.
        pass_tokens: what one more group costs, in tokens. `None` puts all rows into one.

    Returns:
        Indices of the rows of each group, both in order.
    """
    everything = [list(range(len(widths)))]
    if pass_tokens is None or max(widths) * len(widths) - sum(widths) <= pass_tokens:
        return everything
    order = sorted(range(len(widths)), key=lambda row: -widths[row])
    # In the best division each group is a stretch of this order that begins where the width changes: costs[n] is that
    # of its first n rows, and the last group of these begins at begins[n].
    changes = [place for place in range(1, len(order)) if widths[order[place]] != widths[order[place - 1]]]
    places = [0, *changes, len(order)]
    costs, begins = {0: 0}, {}
    for number, end in enumerate(places[1:], 1):
        cost, begins[end] = min(
            (costs[begin] + widths[order[begin]] * (end - begin), begin) for begin in places[:number]
        )
        costs[end] = cost + pass_tokens
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return sorted(groups)
