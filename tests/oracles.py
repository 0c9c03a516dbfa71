"""Drafters that know the answer, and are right never, always, sometimes, or just where it could do harm."""

from __future__ import annotations

import torch
from tiny import VOCAB

from specformer.generation.drafter import Drafter, Prompts, Verified
from specformer.generation.proposal import Proposal


class Oracle(Drafter):
    """Draws its proposals from the text that plain generate() wrote.

    Args:
        answer: plain generate()'s sequences, (B, P + T).
        prompt_width: P.
        kind: "never", "always", "sometimes" (0.7 per token), or "adversarial": right, wrong, right again, with
            end-of-sequence tokens as the wrong ones, at another offset in every row.
    """

    max_draft_tokens = 8
    default_num_assistant_tokens = 0

    def __init__(self, answer: torch.Tensor, prompt_width: int, kind: str, eos_token_id: int = 0):
        self.answer, self.kind, self.eos = answer[:, prompt_width:], kind, eos_token_id
        self.generator = torch.Generator().manual_seed(7)  # its own: the default one belongs to generate()
        self.rows = torch.arange(len(answer))
        self.generated = torch.ones(len(answer), dtype=torch.long)
        self.rounds = 0

    def begin(self, prompts: Prompts) -> None:
        assert torch.equal(prompts.first_tokens[:, 0], self.answer[:, 0])

    def propose(self, num_tokens, choose) -> Proposal:
        return Proposal(self.drafts(num_tokens))

    def drafts(self, num_tokens: int) -> torch.Tensor:
        """Draft tokens (R, num_tokens)."""
        self.rounds += 1
        steps = self.generated[:, None] + torch.arange(num_tokens)
        truth = self.answer[self.rows[:, None], steps.clamp(max=self.answer.shape[1] - 1)]
        wrong = (truth + 1) % VOCAB
        if self.kind == "always":
            return truth
        if self.kind == "never":
            return wrong
        if self.kind == "sometimes":
            return torch.where(torch.rand(truth.shape, generator=self.generator) < 0.7, truth, wrong)
        bad = (self.rows + self.rounds) % (num_tokens + 1)
        is_bad = torch.arange(num_tokens) == bad[:, None]
        return torch.where(is_bad, torch.where(truth == self.eos, wrong, self.eos), truth)

    def update(self, verified: Verified) -> None:
        self.generated += verified.counts

    def select_rows(self, index, longest) -> None:
        self.rows, self.generated = self.rows[index], self.generated[index]
