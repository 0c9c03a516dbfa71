"""A masked diffusion LM with the target's tokenizer as a drafter: Dream, LLaDA, or any model that fills in mask tokens
and sees both sides (the drafter of DiffuSpec, arXiv 2510.02358).

One denoising step over each row's text and the masks behind it gives the logits of all drafts. The model keeps nothing
from round to round: what it has read of a text depends on what stands behind.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .argument import name_of, whole_number
from .draft_length_adaptive import AdaptiveDraftLength
from .drafter import Drafter, Prompts, Verified
from .drafter_assistant import check_vocabulary
from .drafter_prompt_lookup import PromptLookupDrafter
from .drafter_system import DraftingSystem, Parts
from .proposal import Proposal
from .target_refusals import input_device


class MaskedDiffusion(DraftingSystem):
    """With `PathSearch` around it, this is DiffuSpec.

    Args:
        model: takes `input_ids` and `attention_mask`, and returns `logits`. It stays in its dtype and on its device.
        mask_token_id: default, the one of its config.
        shifted: whether its logits are those of the next position, as Dream's are; default, by its config's model type.
        num_tokens: the least and the most tokens to draft where a call names no number, see `draft_length_adaptive`.

    Raises:
        ValueError: what is no model, or numbers that are none.
    """

    def __init__(
        self, model, mask_token_id: int | None = None, shifted: bool | None = None, num_tokens: tuple = (20, 30)
    ):
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise ValueError(f"model is a {name_of(model)}; expected a loaded masked diffusion LM.")
        config: Any = model.config
        config = config.get_text_config()
        given = getattr(config, "mask_token_id", None) if mask_token_id is None else mask_token_id
        mask = whole_number(given)
        if mask is None or not 0 <= mask < config.vocab_size:
            raise ValueError(
                f"mask_token_id is {given!r}; expected one of the {config.vocab_size} tokens of {type(model).__name__}."
            )
        bounds = [whole_number(number) or 0 for number in num_tokens] if isinstance(num_tokens, (tuple, list)) else []
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
            raise ValueError(f"num_tokens is {num_tokens!r}; expected two positive integers, the least and the most.")
        self.model, self.mask, (self.least, self.most) = model, mask, bounds
        self.shifted = str(config.model_type).lower() == "dream" if shifted is None else shifted

    def drafter_for(self, target, parts: Parts) -> Drafter:
        check_vocabulary(self.model, target)
        return DiffusionDrafter(self.model, self.mask, self.shifted, self.least, self.most)


class DiffusionDrafter(Drafter):
    """The arguments are those of `MaskedDiffusion`."""

    proposes_known_tokens = True
    sources = ("assistant",)

    def __init__(self, model, mask: int, shifted: bool, least: int, most: int):
        self.model, self.mask, self.shifted = model, mask, shifted
        self.max_draft_tokens = self.default_num_assistant_tokens = most
        self.own_draft_length = lambda: AdaptiveDraftLength(least, most)
        self.device = input_device(model)
        self.takes = inspect.signature(model.forward).parameters
        # LLaDA makes its own mask of which tokens are padding; others take one of what each token sees
        self.takes_padding = str(model.config.get_text_config().model_type).lower() == "llada"

    def begin(self, prompts: Prompts) -> None:
        self.text = PromptLookupDrafter()  # for what it keeps of each row
        self.text.begin(prompts)

    @torch.no_grad()
    def propose(self, num_tokens, choose) -> Proposal:
        text, lengths = self.text.ids[:, : self.text.longest].to(self.device), self.text.lengths.to(self.device)
        width = self.text.longest + num_tokens
        place, length = torch.arange(width, device=self.device), lengths[:, None]
        ids = functional.pad(text, (0, num_tokens)).masked_fill(place >= length, self.mask)  # (R, T + k)
        real = place < length + num_tokens
        logits = self.model(input_ids=ids, attention_mask=self._mask(real), **self._without_cache()).logits
        at = length - int(self.shifted) + torch.arange(num_tokens, device=self.device)
        logits = logits[torch.arange(len(ids), device=self.device)[:, None], at]  # (R, k, V)
        logits = logits.index_fill(2, torch.tensor([self.mask], device=self.device), -torch.inf)
        return Proposal(choose(logits))

    def _mask(self, real: torch.Tensor) -> torch.Tensor:
        """That all tokens see the real ones (R, T), in the form that the model takes."""
        if self.takes_padding:
            return real.long()
        dtype = self.model.dtype
        visible = torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill(~real, torch.finfo(dtype).min)
        return visible[:, None, None, :].expand(-1, 1, real.shape[1], -1)

    def _without_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if "use_cache" in self.takes else {}

    def update(self, verified: Verified) -> None:
        self.text.update(verified)

    def select_rows(self, index, longest) -> None:
        self.text.select_rows(index, longest)
