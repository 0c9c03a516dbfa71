"""Logits processors under speculation, sorted by what they need to see.

Prefix-free ones map each row of scores on its own and run once over all drafted positions. Every other one is called
as plain generate() calls it: with the whole original batch in its original order, all rows at one length, since some
are bound to the batch they were made for. The library's own that remember their earlier calls are refused; those of
other people are watched (`text_in_step`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LogitsProcessorList

from .accept_top_k import FewScores, TopK
from .backend_versions import rows_of_a_prompt

SCORES_ALONE = {
    "TemperatureLogitsWarper",
    "TopPLogitsWarper",
    "TopKLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
}
"""Those of the prefix-free ones that do not know which token a score is of."""

PREFIX_FREE = SCORES_ALONE | {
    "SuppressTokensLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor",
    "VibeVoiceTokenConstraintProcessor",
}

READS_TEXT = {
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
    "WatermarkLogitsProcessor",
    "AlternatingCodebooksLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "UnlimitedOcrSlidingWindowNoRepeatNgramLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
}
"""Pure functions of text and scores."""

STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config (SynthID)",
    "WhisperNoSpeechDetection": "no-speech detection",
    "ClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "DiaClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "DiaEOSDelayPatternLogitsProcessor": "Dia's delay pattern",
    "HiggsAudioV2DelayPatternLogitsProcessor": "Higgs Audio's delay pattern",
    "LinearTemperatureScheduleLogitsProcessor": "a schedule over denoising steps",
}


def library_name(processor) -> str | None:
    """Class name of a processor of transformers; `None` for anybody else's."""
    kind = type(processor)
    return kind.__name__ if kind.__module__.startswith("transformers.") else None


class Processors:
    """The processors of one call.

    Args:
        prefix_function: `prefix_allowed_tokens_fn`, which one of them calls.

    Attributes:
        unknown: what may keep state between calls, for all that is known of it.

    Raises:
        ValueError: one of them keeps state between calls.
    """

    def __init__(self, processors: LogitsProcessorList, prefix_function: PrefixFunctionForWantedRows | None = None):
        for processor in processors:
            if (name := library_name(processor)) in STATEFUL:
                raise ValueError(
                    f"{name} (from {STATEFUL[name]}) remembers its earlier calls, so it cannot be evaluated on drafted "
                    "tokens that may be rejected. Switch it off, or call generate() without custom_generate."
                )
        self.all, self.prefix_function = processors, prefix_function
        self.unknown = [p for p in processors if library_name(p) not in PREFIX_FREE | READS_TEXT]
        if prefix_function is not None:
            self.unknown.append(prefix_function.function)
        self.prefix_free = LogitsProcessorList(p for p in processors if library_name(p) in PREFIX_FREE)
        self.need_prefix = len(self.prefix_free) < len(processors)
        self.know_tokens = any(library_name(p) not in SCORES_ALONE for p in self.prefix_free)
        self.top_k = TopK.among(self.prefix_free)

    @property
    def rows_of_a_prompt(self) -> int:
        """Rows that a rule of `prefix_allowed_tokens_fn` is applied to together."""
        constraints = [p for p in self.all if library_name(p) == "PrefixConstrainedLogitsProcessor"]
        return max(map(rows_of_a_prompt, constraints), default=1)

    def read(self, input_ids: torch.Tensor, scores: torch.Tensor, wanted: list[int] | None) -> torch.Tensor:
        """All processors on the whole batch (B, T), (B, V), of which the rows `wanted` are looked at; `None`: all."""
        if self.prefix_function is not None:
            self.prefix_function.begin(wanted)
        return self.all(input_ids, scores)  # type: ignore[arg-type]  # transformers says LongTensor, which none is

    def warp(self, scores: torch.Tensor) -> torch.Tensor:
        """Apply the prefix-free processors to scores (..., V), or to those of some tokens if none of them must know
        which (`know_tokens`)."""
        few = self.leave_few(scores)
        if few is None:
            return self.warp_all(scores.flatten(0, -2)).view(scores.shape)
        warped = torch.full_like(scores, -torch.inf).scatter_(-1, few.token_ids, few.scores)
        if not few.sure.all():
            warped[~few.sure] = self.warp_all(scores[~few.sure])
        return warped

    def warp_all(self, scores: torch.Tensor) -> torch.Tensor:
        """`warp` of scores (N, V), by the processors themselves."""
        return self.prefix_free(None, scores)  # type: ignore[arg-type]  # these read no text, and transformers does not know

    def leave_few(self, scores: torch.Tensor) -> FewScores | None:
        """What the prefix-free processors leave of scores (..., V), if that can be only a few: see `accept_top_k`."""
        return None if self.top_k is None else self.top_k.leave(scores)


class PrefixFunctionForWantedRows:
    """`prefix_allowed_tokens_fn`, asked only about the rows whose answer is used.

    The other rows of a call hold text of another length. A constraint such as a trie may not know it, and plain
    generate() would never ask. The processor asks about all rows in their order; what it calls them depends on the
    version of transformers: the row, or since 5.24 the prompt, of which there may be several rows.
    """

    def __init__(self, function: Callable[[int, torch.Tensor], list[int]]):
        self.function = function
        self.begin(None)

    def begin(self, wanted: list[int] | None) -> None:
        """The processor is about to ask, and the rows `wanted` count; `None`: all."""
        self.wanted, self.asked = wanted, 0

    def __call__(self, batch_id: int, input_ids: torch.Tensor) -> list[int]:
        row, self.asked = self.asked, self.asked + 1
        if self.wanted is not None and row not in self.wanted:
            return [0]
        return self.function(batch_id, input_ids)
