"""Which token the target takes at each verified position, and which token a drafter's logits propose.

Both are taken the way plain generate() takes tokens: processors, then argmax, or a sample with the noise of that step.
Drafts sampled with the noise that the target will use there are accepted far more often than argmax drafts.
"""

from __future__ import annotations

import torch

from .noise import StepNoise
from .processors import PrefixFunctionForWantedRows, Processors
from .text import Text
from .verification import sample_with_noise


class TokenChoice:
    def __init__(
        self,
        processors: Processors,
        noise: StepNoise | None,
        text: Text,
        prefix_function: PrefixFunctionForWantedRows | None = None,
    ):
        """`noise=None` is greedy decoding."""
        self.processors, self.noise, self.text = processors, noise, text
        self.prefix_function = prefix_function

    def of_drafter(self, logits: torch.Tensor) -> torch.Tensor:
        """Draft tokens from a drafter's logits (R, k, V): (R, k)."""
        if self.noise is None:
            return logits.argmax(dim=-1)
        return self._take(self.processors.warp(logits.to(device=self.text.ids.device, dtype=torch.float32)))

    def of_target(self, logits: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        """The target's tokens (R, k + 1) from its logits (R, k + 1, V) behind `drafts` (R, k).

        Tokens behind a wrong draft mean nothing.
        """
        # generate() casts before processors and argmax, on the device of the text
        logits = logits.to(device=drafts.device, dtype=torch.float32)
        if self.processors.need_prefix:
            return self._walk(logits, drafts)
        return self._take(self.processors.warp(logits))

    def _take(self, scores: torch.Tensor) -> torch.Tensor:
        """One token per position of `scores` (R, q, V), position i being i steps ahead of the row's text."""
        if self.noise is None:
            return scores.argmax(dim=-1)
        width = scores.shape[1]
        rows = [row for row in self.text.rows for _ in range(width)]
        oldest = min(self.text.running_lengths())  # rows that have finished are only carried along: any noise will do
        steps = [max(self.text.generated[row], oldest) + ahead for row in self.text.rows for ahead in range(width)]
        noise = self.noise.gather(rows, steps, scores.shape[-1])
        return sample_with_noise(scores, noise.view(scores.shape))

    def _walk(self, logits: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        """Position by position, for the rows whose drafts were right so far.

        A processor that reads the text is only ever called on text that plain generate() would show it, one call per
        distinct length. This costs a synchronisation per position.
        """
        text, width = self.text, logits.shape[1]
        tokens = drafts.new_zeros(len(text.rows), width)
        full = logits.new_zeros(text.batch_size, logits.shape[-1])  # scores in the order of the original batch
        live = [place for place, row in enumerate(text.rows) if text.is_running(row)]
        for ahead in range(width):
            for length in sorted({text.generated[text.rows[place]] for place in live}):
                places = [place for place in live if text.generated[text.rows[place]] == length]
                rows = [text.rows[place] for place in places]
                full[rows] = logits[places, ahead]
                if self.prefix_function is not None:
                    self.prefix_function.wanted = set(rows)
                scores = self.processors.all(text.first_columns(length + ahead), full.clone())[rows]
                if self.noise is None:
                    taken = scores.argmax(dim=-1)
                else:
                    noise = self.noise.gather(rows, [length + ahead] * len(rows), scores.shape[-1])
                    taken = sample_with_noise(scores, noise)
                tokens[places, ahead] = taken
            if ahead + 1 < width:
                goes_on = (tokens[:, ahead] == drafts[:, ahead]) & ~text.rules.is_eos(tokens[:, ahead])
                goes_on = goes_on.tolist()
                room = text.max_new_tokens - ahead - 1
                live = [place for place in live if goes_on[place] and text.generated[text.rows[place]] < room]
                text.write_ahead(live, ahead, drafts)
        return tokens
