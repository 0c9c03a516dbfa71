"""An ordinary small causal LM as a drafter: it writes the drafts one token after the other, with a cache of its own."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from .accept_sampling import count_accepted
from .backend_linear import fast_linears
from .drafter import Drafter, Prompts, Verified
from .proposal import Proposal
from .target import prefill, prompt_arguments, verify
from .target_attention import usable_attention
from .target_mixers import keeps_states
from .target_probe import probe_target
from .target_refusals import check_target, input_device
from .target_states import StateReader


class AssistantDrafter(Drafter):
    """A causal LM with the target's tokenizer (Leviathan et al. 2023; what transformers calls an assistant).

    Args:
        assistant: the model. It stays in its dtype and on its device.
        target: the model it drafts for.
        chunk_size: tokens of one pass over the prompts; default all.

    Attributes:
        tokens: those of each row's text that it has not read yet, (R, q), of which the first `counts` (R,) are tokens:
            the newest one at least.
        read: what it has read behind each row's newest token in this round, (R, n), NO_TOKEN where it has not; `None`
            where it has not read the newest one either.

    Raises:
        UnsupportedTargetError: the assistant cannot keep one length per row.
        ValueError: its vocabulary is another one.
    """

    proposes_known_tokens = True
    sources = ("assistant",)
    states_of: StateReader | None = None
    """Passes of the assistant that give its states as well, if somebody reads them."""

    def __init__(self, assistant, target, chunk_size: int | None = None):
        check_target(assistant)
        self.config = assistant.config.get_text_config(decoder=True)
        check_vocabulary(assistant, target)
        self.assistant, self.chunk_size = assistant, chunk_size
        self.device = input_device(assistant)
        self.can_rewind = not keeps_states(assistant)  # of states only the last ones are kept

    def __enter__(self):
        with ExitStack() as stack:
            stack.enter_context(usable_attention(self.assistant))
            stack.enter_context(fast_linears(self.assistant))
            probe_target(self.assistant)
            self._attached = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._attached.__exit__(*exception)

    def begin(self, prompts: Prompts) -> None:
        self.read_prompts(prompts)

    def read_prompts(self, prompts: Prompts) -> list[torch.Tensor] | None:
        """Read them, and give the states that `states_of` reads, as `Prompts.hidden_states` has them."""
        input_ids, layout, max_length = prompts.input_ids, prompts.layout, prompts.max_length
        width = input_ids.shape[1]
        # Past its last position it goes on with clamped positions: the drafts are worse, the text is the same.
        last_position = getattr(self.config, "max_position_embeddings", None) or max_length
        if layout.longest >= last_position:
            raise ValueError(
                f"The assistant reads at most {last_position} tokens and the longest prompt has {layout.longest}. "
                "Pass another assistant, or shorter prompts."
            )
        layout, input_ids = layout.to(self.device), self._known(input_ids)
        kwargs = prompt_arguments(self.assistant, layout)
        limit = min(max_length, last_position + width - layout.longest)
        # rounds without a proposal are caught up with at once, however many there were
        _, self.cache, states = prefill(
            self.assistant, input_ids, layout, limit, None, kwargs, self.chunk_size, self.states_of
        )
        self.tokens = self._known(prompts.first_tokens)
        self.read: torch.Tensor | None = None
        self.counts = torch.ones_like(self.tokens[:, 0])
        return states

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        self.cache.keep_states(self.tokens.shape[1] + num_tokens + 1)  # from before what is read, to the last draft
        logits, _ = self.read_with(self.tokens[:, :0])  # (R, 1, V)
        self.cache.advance(self.counts, self.cache.longest + self.tokens.shape[1])
        lengths, longest = self.cache.lengths, self.cache.longest
        drafts: list[torch.Tensor] = []
        for ahead in range(num_tokens):
            if ahead:
                logits = self.read_draft(self._known(drafts[-1]))
                self.cache.advance(torch.ones_like(lengths), self.cache.longest + 1)
            drafts.append(choose(logits, ahead))  # (R, 1)
        self.cache.advance(lengths - 1 - self.cache.lengths, longest)
        self.leave_newest()
        self.read = self._known(torch.cat(drafts, dim=1))[:, :-1]
        return Proposal(torch.cat(drafts, dim=1))

    def read_with(self, behind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass over what it has not read of each row, and `behind` (R, n) after that: logits of the newest token
        and of those behind it, (R, n + 1, V), and the states that `states_of` reads, of all tokens (R, q + n, S, d)."""
        index, rows = torch.arange(behind.shape[1] + 1, device=self.device), len(behind)
        if self.tokens.shape[1] == 1:
            return verify(self.assistant, self.cache, torch.cat([self.tokens, behind], dim=1), self.states_of)
        block = spliced(self.tokens, self.counts, behind, torch.zeros_like(self.counts))
        logits, states = verify(self.assistant, self.cache, block, self.states_of)
        return logits[torch.arange(rows, device=self.device)[:, None], self.counts[:, None] - 1 + index], states

    def read_draft(self, token: torch.Tensor) -> torch.Tensor:
        """One pass over a draft (R, 1): logits of what follows it, (R, 1, V)."""
        return verify(self.assistant, self.cache, token)[0]

    def leave_newest(self) -> None:
        """All of its tokens are in the cache now, but for each row's newest one, which the next round begins with."""
        self.tokens = self.tokens.gather(1, self.counts[:, None] - 1)
        self.counts = torch.ones_like(self.counts)

    def update(self, verified: Verified) -> None:
        self.take_over(verified)

    def take_over(self, verified: Verified) -> torch.Tensor:
        """Go on with what was verified. Gives how many of each row's tokens it need not read, (R,): the newest one, and
        those behind it that it has proposed and read."""
        new, counts = self._known(verified.tokens), verified.counts.to(self.device)
        skipped = torch.zeros_like(counts)
        if self.read is not None:  # what the text goes on with need not be read again, but for the newest token
            width = min(self.read.shape[1], new.shape[1])
            known = count_accepted(self.read[:, :width] == new[:, :width])
            skipped = (1 + torch.minimum(known, counts - 1)) * (counts > 0)
        self.tokens = spliced(self.tokens, self.counts, new, skipped)
        self.counts, self.read = self.counts + counts - skipped, None
        self.cache.advance(skipped, verified.longest)  # no row has read more than the target
        self.tokens = self.tokens[:, : int(self.counts.amax())]
        return skipped

    def select_rows(self, index, longest) -> None:
        index = index.to(self.device)
        self.cache.select_rows(index, longest)
        self.tokens, self.counts = self.tokens[index], self.counts[index]

    def mark(self):
        return self.cache.lengths, self.cache.longest, self.tokens, self.counts, self.read

    def rewind(self, mark) -> None:
        self.cache.lengths, self.cache.longest, self.tokens, self.counts, self.read = mark
        # of what it read since then, other tokens may be in the cache now

    def _known(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens as the assistant can read them: after a wrong draft there may be none."""
        return tokens.to(self.device).clamp(min=0, max=self.config.vocab_size - 1)


def check_vocabulary(assistant, target) -> None:
    """
    Raises:
        ValueError: the two have different tokenizers, as far as their vocabularies' sizes tell.
    """
    ours, theirs = (model.config.get_text_config(decoder=True).vocab_size for model in (assistant, target))
    # Sizes of one family differ by padding: 151,936 and 152,064 entries for one tokenizer.
    if abs(ours - theirs) > 0.01 * theirs:
        raise ValueError(
            f"The assistant {assistant.name_or_path or type(assistant).__name__} has {ours} tokens and the target "
            f"{theirs}, so their tokenizers differ. Pass an assistant with the target's tokenizer. If tokens were "
            f"added to the target alone, call assistant.resize_token_embeddings({theirs}) as well."
        )


def spliced(tokens: torch.Tensor, counts: torch.Tensor, more: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """The first `counts` (R,) of `tokens` (R, q) and `more` (R, n) after them, without the first `skipped` (R,) of
    both: (R, q + n), behind which anything stands."""
    width = tokens.shape[1]
    place = torch.arange(width + more.shape[1], device=tokens.device) + skipped[:, None]
    index = torch.where(place < counts[:, None], place, place - counts[:, None] + width)
    return torch.cat([tokens, more], dim=1).gather(1, index.clamp(max=width + more.shape[1] - 1))
