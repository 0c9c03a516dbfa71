"""An ordinary small causal LM as a drafter: it writes the drafts one token after the other, with a cache of its own."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from .backend_linear import fast_linears
from .drafter import Drafter, Prompts, Verified
from .proposal import Proposal
from .target import prefill, prompt_arguments, verify
from .target_attention import usable_attention
from .target_probe import probe_target
from .target_refusals import check_target, input_device


class AssistantDrafter(Drafter):
    """A causal LM with the target's tokenizer (Leviathan et al. 2023; what transformers calls an assistant).

    Args:
        assistant: the model. It stays in its dtype and on its device.
        target: the model it drafts for.
        chunk_size: tokens of one pass over the prompts; default all.

    Raises:
        UnsupportedTargetError: the assistant cannot keep one length per row.
        ValueError: its vocabulary is another one.
    """

    proposes_known_tokens = True
    sources = ("assistant",)

    def __init__(self, assistant, target, chunk_size: int | None = None):
        check_target(assistant)
        self.config = assistant.config.get_text_config(decoder=True)
        ours, theirs = self.config.vocab_size, target.config.get_text_config(decoder=True).vocab_size
        # Sizes of one family differ by padding: 151,936 and 152,064 entries for one tokenizer.
        if abs(ours - theirs) > 0.01 * theirs:
            raise ValueError(
                f"The assistant {assistant.name_or_path or type(assistant).__name__} has {ours} tokens and the target "
                f"{theirs}, so their tokenizers differ. Pass an assistant with the target's tokenizer. If tokens were "
                f"added to the target alone, call assistant.resize_token_embeddings({theirs}) as well."
            )
        self.assistant, self.chunk_size = assistant, chunk_size
        self.device = input_device(assistant)

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
        _, self.cache, _ = prefill(self.assistant, input_ids, layout, limit, None, kwargs, self.chunk_size)
        self.newest = self._known(prompts.first_tokens)  # (R, 1), not read yet

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        lengths, longest = self.cache.lengths, self.cache.longest
        tokens, drafts = self.newest, []
        for ahead in range(num_tokens):
            logits, _ = verify(self.assistant, self.cache, tokens)
            drafts.append(choose(logits[:, -1:], ahead))  # (R, 1)
            self.cache.advance(torch.full_like(lengths, tokens.shape[1]), self.cache.longest + tokens.shape[1])
            tokens = self._known(drafts[-1])
        self.cache.advance(lengths - self.cache.lengths, longest)
        return Proposal(torch.cat(drafts, dim=1))

    def update(self, verified: Verified) -> None:
        tokens, longest = verified.tokens, verified.longest
        # From the second round on, each begins by reading the newest two tokens of every row. Where all drafts of the
        # last round were right both are new; elsewhere one is read again, which changes nothing and keeps rows in step.
        counts, known = verified.counts.to(self.device), self.newest.shape[1]
        if tokens.shape[1] == 1:  # nothing was drafted: read it with the next drafts
            # Rows that were given no token read one again, so that all have as many to read.
            self.cache.advance((counts - 1).clamp(min=-self.cache.lengths), self.cache.longest)
            newest = torch.where(counts[:, None] > 0, self._known(tokens), self.newest[:, -1:])
            self.newest = torch.cat([self.newest, newest], dim=1)
            return
        self.cache.advance(counts + known - 2, longest - 1)
        tokens = torch.cat([self.newest, self._known(tokens)], dim=1)
        last_two = counts[:, None] + torch.arange(known - 2, known, device=self.device)
        self.newest = tokens.gather(1, last_two.clamp(min=0))  # (R, 2); rows that have finished may have none

    def select_rows(self, index, longest) -> None:
        index = index.to(self.device)
        self.cache.select_rows(index, longest + 1 - self.newest.shape[1])
        self.newest = self.newest[index]

    def _known(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens as the assistant can read them: after a wrong draft there may be none."""
        return tokens.to(self.device).clamp(min=0, max=self.config.vocab_size - 1)
