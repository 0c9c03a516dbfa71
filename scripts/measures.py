"""The measures by which the SpecFormer paper compares drafters (arXiv 2511.20340, equations 1 to 5 and table 3).

A target pass adds `a` tokens to the text on average, the target's own included, after `k` tokens were drafted for it in
a sequence of length `l_d`. The target has `M` parameters; the drafter has `m_p` that belong to one slot of the draft
and `m_s` that all slots share.

    kappa = a l_d / k                 tokens per target pass, if all that is drafted lies on one chain (l_d = k)
    p     = 1 + (m_s + l_d m_p) / M   computation with drafting, in units of computation without
    r1    = a / p                     tokens for the same computation, in units of plain decoding
    r2    = k                         growth of the work per byte read; should not exceed rho / batch size
    rho   = peak FLOP/s / bandwidth   the batch that would keep the device's arithmetic busy without drafting
    theta = kappa / speed-up          what of kappa is lost on the way to tokens per second; 1 is nothing

The paper writes r1 and rho with the arithmetic intensity of the target, AI_m. As in the paper, weights here are of
16 bit: 2 FLOP on 2 bytes for each parameter, so AI_m is 1 FLOP per byte and does not show.
"""

from __future__ import annotations

MAY_BE_ZERO = ("shared_parameters", "slot_parameters")


def paper_measures(
    tokens: int,
    passes: int,
    drafted_per_slot: list[int],
    accepted_per_slot: list[int],
    *,
    draft_length: float | None = None,
    target_parameters: float | None = None,
    shared_parameters: float | None = None,
    slot_parameters: float | None = None,
    peak_flops: float | None = None,
    memory_bandwidth: float | None = None,
    batch_size: float | None = None,
    tokens_per_second: float | None = None,
    plain_tokens_per_second: float | None = None,
) -> dict[str, float | list[float | None]]:
    """What was counted while decoding, as the paper's measures.

    Counts are sums over rows and rounds, and leave out the prompt pass and the token it writes.

    Args:
        tokens: tokens added to the texts.
        passes: target passes, one for each row of each batch that was running.
        drafted_per_slot: tokens drafted at slot j, or at depth j of a tree.
        accepted_per_slot: how many of them were accepted.
        draft_length: l_d; `None` means the mean number of drafted tokens, as in a chain. The depth of a tree is less.
        target_parameters: M.
        shared_parameters: m_s, parameters of the drafter that a draft of any length needs.
        slot_parameters: m_p, parameters of the drafter for each further slot.
        peak_flops: the device's FLOP/s in 16 bit.
        memory_bandwidth: the device's bytes/s.
        batch_size: rows per pass.
        tokens_per_second: with drafting.
        plain_tokens_per_second: the same without.

    Returns:
        "kappa", "r2" and "acceptance_per_slot", `None` for slots that were never drafted. With the three numbers of
        parameters "p" and "r1", with device and batch size "rho" and "r2_limit" = rho / batch size, and with both
        speeds "theta".

    Raises:
        ValueError: counts contradict each other, a number is out of range, or some of those that belong together are
            missing.
    """
    _check_counts(tokens, passes, drafted_per_slot, accepted_per_slot)
    accepted_length, drafted = tokens / passes, sum(drafted_per_slot) / passes  # a, k
    if draft_length is None:
        draft_length, kappa = drafted, accepted_length
    elif 0 < draft_length <= drafted:
        kappa = accepted_length * draft_length / drafted
    else:
        raise ValueError(
            f"draft_length is {draft_length}, and {drafted:g} tokens were drafted per pass; expected the length of the "
            "longest branch, more than 0 and not more than that. Leave it out where the draft is a chain."
        )
    measures: dict[str, float | list[float | None]] = {
        "kappa": kappa,
        "r2": drafted,
        "acceptance_per_slot": [
            accepted / drafted if drafted else None
            for accepted, drafted in zip(accepted_per_slot, drafted_per_slot, strict=True)
        ],
    }
    if parameters := _all_given(
        "p and r1",
        target_parameters=target_parameters,
        shared_parameters=shared_parameters,
        slot_parameters=slot_parameters,
    ):
        of_target, shared, of_slot = parameters
        measures["p"] = p = 1 + (shared + draft_length * of_slot) / of_target
        measures["r1"] = accepted_length / p
    if device := _all_given(
        "rho and r2_limit", peak_flops=peak_flops, memory_bandwidth=memory_bandwidth, batch_size=batch_size
    ):
        flops, bandwidth, rows = device
        measures["rho"] = rho = flops / bandwidth
        measures["r2_limit"] = rho / rows
    if speeds := _all_given(
        "theta", tokens_per_second=tokens_per_second, plain_tokens_per_second=plain_tokens_per_second
    ):
        ours, plain = speeds
        measures["theta"] = kappa / (ours / plain)
    return measures


def _check_counts(tokens: int, passes: int, drafted_per_slot: list[int], accepted_per_slot: list[int]) -> None:
    if passes < 1:
        raise ValueError(f"passes is {passes}; expected at least one target pass after the prompt's.")
    if len(drafted_per_slot) != len(accepted_per_slot):
        raise ValueError(
            f"drafted_per_slot has {len(drafted_per_slot)} entries and accepted_per_slot {len(accepted_per_slot)}; "
            "expected one entry per slot in both."
        )
    for slot, (drafted, accepted) in enumerate(zip(drafted_per_slot, accepted_per_slot, strict=True)):
        if not 0 <= accepted <= drafted:
            raise ValueError(
                f"Slot {slot}: {accepted} of {drafted} drafted tokens were accepted; expected a number from 0 to "
                f"{drafted}. Were drafted_per_slot and accepted_per_slot swapped?"
            )
    # Accepted drafts behind the end of a text are not added to it.
    most = passes + sum(accepted_per_slot)
    if not 0 < tokens <= most:
        raise ValueError(
            f"{tokens} tokens in {passes} passes that accepted {most - passes} drafts; expected from 1 to {most}, as a "
            "pass adds what it accepts and one token of the target. Leave out the tokens of the prompt passes."
        )


def _all_given(what: str, **values: float | None) -> list[float]:
    """All of `values`, in range, or none where none is there; some of them alone are an error."""
    given = {name: value for name, value in values.items() if value is not None}
    missing = [name for name in values if name not in given]
    if given and missing:
        raise ValueError(f"{what}: {', '.join(missing)} missing. Give all of {', '.join(values)}, or none of them.")
    for name, value in given.items():
        if name in MAY_BE_ZERO and not value >= 0:
            raise ValueError(f"{name} is {value}; expected a number from 0 up.")
        if name not in MAY_BE_ZERO and not value > 0:
            raise ValueError(f"{name} is {value}; expected a positive number.")
    return list(given.values())
