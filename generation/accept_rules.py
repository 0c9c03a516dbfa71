"""Acceptance rules: which token the target takes at a position, and whether a draft is that token.

| rule | a row's text is |
|---|---|
| greedy | what plain generate() writes |
| "match" | what plain generate() samples with the same torch seed, whatever the drafter and the draft length |
| "coupled" | a function of its prompt and its own seed: not of its batch, padding, drafter or draft length |
| "rejection" | distributed as in plain generate(); which one, depends on the torch seed, the batch and the drafts |

"coupled" and "rejection" concern sampling only: greedy decoding has one text. Where a processor reads padding, as some
penalties do, a text depends on padding in plain generate() and under every rule here.
"""

from __future__ import annotations

import torch

from .accept_noise import HashedNoise, StepNoise
from .accept_sampling import best_tokens, reject_and_resample, sample_with_noise, with_confidence
from .accept_top_k import FewScores, sample_surely
from .argument import whole_number
from .text_positions import Positions

ACCEPTANCE_RULES = ("match", "coupled", "rejection")


class AcceptanceRule:
    """For N rows with q positions each; scores are processed, in float32.

    A rule is a context manager around the call that uses it.
    """

    text_depends_on_drafts = False
    takes_the_best = False
    """Whether a token is the one of the highest score."""
    takes_few = False
    """Whether it has `take_few`."""

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def draft(
        self,
        scores: torch.Tensor,
        positions: Positions,
        vocab_size: int,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where a drafter's scores (N, q, C), of `token_ids` (N, q, C) or of the vocabulary, have the drafts: (N, q).
        And the distributions (N, q, C) that they were sampled from, if `take` needs them."""
        raise NotImplementedError

    def chances(
        self,
        scores: torch.Tensor,
        positions: Positions,
        vocab_size: int,
        token_ids: torch.Tensor,
        confidence: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """How likely each of `token_ids` (N, q, C) is taken, for all that a drafter's scores of them say: logarithms,
        (N, q, C). Its `confidence` (N, q) in the best of them, if it tells, is about the target's best token."""
        return scores.log_softmax(dim=-1)

    def take(
        self,
        scores: torch.Tensor,
        drafts: torch.Tensor,
        proposals: torch.Tensor | None,
        positions: Positions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's tokens (N, q) for its scores (N, q, V), and which `drafts` (N, q) they accept, bool (N, q)."""
        raise NotImplementedError

    def take_few(self, few: FewScores, positions: Positions, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens (N, q) that `take` takes, from the few scores (N, q, C) that processors left, and where that is
        sure, bool (N, q)."""
        raise NotImplementedError

    def forget_before(self, step: int) -> None:
        """No row will ask for a position before `step` again."""

    def finish(self, steps: int, vocab_size: int) -> None:
        """The text is complete, with `steps` new tokens."""


class Greedy(AcceptanceRule):
    """The best token, and the draft if it is that one."""

    takes_the_best = True

    def draft(self, scores, positions, vocab_size, token_ids=None):
        return best_tokens(scores), None

    def take(self, scores, drafts, proposals, positions):
        tokens = best_tokens(scores)
        return tokens, tokens == drafts

    def chances(self, scores, positions, vocab_size, token_ids, confidence=None):
        chances = scores.log_softmax(dim=-1)
        return chances if confidence is None else with_confidence(chances, confidence)


class Match(AcceptanceRule):
    """A sample with the noise that belongs to the position, and the draft if it is that one ("match", "coupled").

    Drafts are sampled with the same noise: two distributions at total variation t then agree with a probability of at
    least (1 - t) / (1 + t), where argmax drafts agree with the probability of one token (Daliri, Musco, Suresh 2024).
    """

    takes_few = True

    def __init__(self, noise: StepNoise | HashedNoise):
        self.noise = noise

    def __enter__(self):
        self.noise.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.noise.__exit__(*exception)

    def draft(self, scores, positions, vocab_size, token_ids=None):
        noise = self.noise.gather(positions, vocab_size, token_ids)
        return sample_with_noise(scores, noise).clamp(min=0), None

    def take(self, scores, drafts, proposals, positions):
        tokens = sample_with_noise(scores, self.noise.gather(positions, scores.shape[-1]))
        return tokens, (tokens == drafts) & (drafts >= 0)

    def chances(self, scores, positions, vocab_size, token_ids, confidence=None):
        # what is taken is the best token of such numbers of the target's; its own are not far from the drafter's
        noise = self.noise.gather(positions, vocab_size, token_ids)
        return (scores.log_softmax(dim=-1) - noise.log()).log_softmax(dim=-1)

    def take_few(self, few, positions, vocab_size):
        return sample_surely(few, self.noise.gather(positions, vocab_size, few.token_ids))

    def forget_before(self, step) -> None:
        self.noise.forget_before(step)

    def finish(self, steps, vocab_size) -> None:
        self.noise.leave_after(steps, vocab_size)


class Rejection(AcceptanceRule):
    """Rejection sampling, with torch's generator. Where the drafter gave no distribution, its token is certain.

    So are the tokens of a tree, which are the likeliest ones and not sampled. The rule for several guesses (SpecInfer,
    arXiv 2305.09781, section 4.3) then accepts the first with the target's probability of it, the next with what it has
    of the rest, and so on: altogether the guess that one sample of the target is, if there is one.
    """

    text_depends_on_drafts = True

    def draft(self, scores, positions, vocab_size, token_ids=None):
        noise = torch.empty_like(scores).exponential_(1)
        return sample_with_noise(scores, noise).clamp(min=0), scores.softmax(dim=-1)

    def take(self, scores, drafts, proposals, positions):
        if proposals is None:
            proposals = torch.zeros_like(scores).scatter_(-1, drafts.clamp(min=0)[..., None], 1.0)
            proposals = proposals * (drafts >= 0)[..., None]
        uniform = torch.rand(drafts.shape, device=drafts.device)
        noise = scores.new_empty(len(scores), scores.shape[-1]).exponential_(1)
        return reject_and_resample(scores, drafts, proposals, uniform, noise)


def acceptance_rule(
    name: str, do_sample: bool, batch_size: int, device: torch.device, seed: int | list[int] | None
) -> AcceptanceRule:
    """The rule of one call.

    Raises:
        ValueError: as many seeds as the batch has rows are needed, or one.
    """
    if not do_sample:
        return Greedy()
    if name == "rejection":
        return Rejection()
    if name == "coupled":
        return Match(HashedNoise(row_seeds(seed, batch_size), device))
    return Match(StepNoise(batch_size, device))


def check_acceptance(name: str, seed) -> None:
    """Refuse what is no rule, and a seed that is none or belongs to another rule.

    Raises:
        ValueError: with what was given and what was expected.
    """
    if name not in ACCEPTANCE_RULES:
        raise ValueError(f"acceptance is {name!r}; expected one of {', '.join(map(repr, ACCEPTANCE_RULES))}.")
    if seed is None:
        return
    if name != "coupled":
        raise ValueError(
            f"seed is for acceptance='coupled', and acceptance is {name!r}. Call torch.manual_seed({seed!r}) before "
            "generate() instead."
        )
    whole_numbers(seed)


def whole_numbers(seed) -> int | list[int]:
    """`seed` as a Python integer, or a list of such.

    Raises:
        ValueError: it is neither.
    """
    given = getattr(seed, "tolist", lambda: seed)()  # of torch and NumPy
    if isinstance(given, (list, tuple)):
        numbers = [number for each in given if (number := whole_number(each)) is not None]
        if len(numbers) == len(given):
            return numbers
    elif (number := whole_number(given)) is not None:
        return number
    raise ValueError(f"seed is {seed!r}; expected an integer, or a list of one integer per row.")


def row_seeds(seed: int | list[int] | None, batch_size: int) -> list[int]:
    """One seed per row: those given, `seed` + row for a single one, and one from torch's generator for `None`."""
    numbers = int(torch.randint(2**62, (), device="cpu")) if seed is None else whole_numbers(seed)
    if isinstance(numbers, int):
        return [numbers + row for row in range(batch_size)]
    if len(numbers) != batch_size:
        raise ValueError(
            f"{len(numbers)} seeds were given for {batch_size} rows (prompts times num_return_sequences); expected one "
            "per row, or a single integer."
        )
    return numbers
