"""What a drafter uses of its target, its embeddings and LM head, and whether it is the right target."""

from __future__ import annotations

import threading
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .configuration_specformer import SpecFormerConfig

RELATED = 0.7
"""Least cosine of two models' embeddings at which they are taken for relatives."""


class BorrowedTarget:
    """What a drafter uses of its target: token embeddings and the LM head.

    Args:
        draft_token_ids: the only tokens that are drafted, ascending; `None` means all.

    Attributes:
        rows: the LM head's rows of the drafted tokens, as a layer; `None` where they cannot be taken out.

    Raises:
        ValueError: the target is another model than the drafter was made for. It may have more tokens.
    """

    def __init__(self, target: PreTrainedModel, config: SpecFormerConfig, draft_token_ids: torch.Tensor | None = None):
        text_config = target.config.get_text_config(decoder=True)
        made_for = {
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "num_hidden_layers": config.target_num_hidden_layers,
        }
        sizes = {name: getattr(text_config, name) for name in made_for}
        # tokens that were added to the target, or that pad its embeddings, are after those of the drafter
        sizes["vocab_size"] = min(sizes["vocab_size"], config.vocab_size)
        differences = [
            f"{name} is {sizes[name]} there and {size} here" for name, size in made_for.items() if sizes[name] != size
        ]
        if differences:
            raise ValueError(
                f"This drafter was made for {config.target_name_or_path or 'another target'} and does not fit "
                f"{target.name_or_path or type(target).__name__}: {'; '.join(differences)}. Load the drafter of this "
                "target, or train one for it."
            )
        check_embeddings(target, config)
        self.target, self.text_config, self.layer_ids = target, text_config, list(config.target_layer_ids)
        self.head: nn.Module = target.get_output_embeddings()
        if self.head is None:
            raise ValueError(f"{type(target).__name__} has no LM head (get_output_embeddings() is None).")
        self.draft_token_ids = None if draft_token_ids is None else draft_token_ids.to(self.device)
        self.rows: nn.Linear | None = kept_rows(self.head, self.draft_token_ids) if is_plain_linear(self.head) else None

    @property
    def device(self) -> torch.device:
        """Where the drafter computes: on the device of the LM head that it shares."""
        return device_of(self.head)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The target's input embeddings of `token_ids` (B, T), (B, T, d)."""
        embeddings = self.target.get_input_embeddings()
        return embeddings(token_ids.to(device_of(embeddings))).to(self.device)

    def tokens_at(self, places: torch.Tensor) -> torch.Tensor:
        """The tokens that `draft_logits` has at `places`, of any shape."""
        return places if self.draft_token_ids is None else self.draft_token_ids[places]

    def draft_labels(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Where `draft_logits` has the tokens `token_ids`: -100, which losses ignore, if they are never drafted."""
        if self.draft_token_ids is None:
            return token_ids
        places = torch.searchsorted(self.draft_token_ids, token_ids).clamp(max=len(self.draft_token_ids) - 1)
        return torch.where(self.draft_token_ids[places] == token_ids, places, -100)

    def draft_logits(self, draft_hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens that are drafted, with the family's scale and soft cap: (..., d) -> (..., V')."""
        if self.draft_token_ids is None:
            return self.target_logits(draft_hidden_states)
        if self.rows is None:
            return self._scaled(self.head(draft_hidden_states)[..., self.draft_token_ids])
        return self._scaled(self.rows(draft_hidden_states))

    def target_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The target's logits of all tokens, of its last hidden states or of what resembles them: (..., d) ->
        (..., V)."""
        return self._scaled(self.head(hidden_states))

    def candidates(self, draft_hidden_states: torch.Tensor, count: int) -> torch.Tensor:
        """The places of the highest `draft_logits`, `count` of them or all that there are: (..., d) -> (..., C)."""
        logits = self.draft_logits(draft_hidden_states)
        return logits.topk(min(count, logits.shape[-1])).indices

    def candidate_logits(self, draft_hidden_states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """What `draft_logits` of states (..., w, d) has at `places` (..., w, C), or (..., 1, C) that all of them share,
        without the others where the head allows: (..., w, C)."""
        if self.rows is None:
            logits = self.draft_logits(draft_hidden_states)
            return logits.gather(-1, places.expand(*logits.shape[:-1], -1))
        return self._scaled(outputs_at(self.rows, draft_hidden_states, places))

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        if (scale := getattr(self.text_config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (divisor := getattr(self.text_config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(self.text_config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits


def some_embeddings(target: PreTrainedModel, vocab_size: int, rows: int = 8, columns: int = 8) -> list[float]:
    """A few of the target's input embeddings, spread over the first `vocab_size` tokens, to know it by."""
    embeddings = target.get_input_embeddings()
    # whole numbers: torch.linspace rounds as the device does, and would read other rows on a GPU
    ids = torch.tensor([row * (vocab_size - 1) // (rows - 1) for row in range(rows)], device=device_of(embeddings))
    with torch.no_grad():
        values = called_alone(embeddings, ids[None])[0].cpu().double()
    values = values[:, [column * (values.shape[1] - 1) // (columns - 1) for column in range(columns)]]
    values = values.nan_to_num(0.0, 0.0, 0.0)  # rows that are never used may hold anything
    return [float(f"{value:.4g}") for value in values.flatten().tolist()]


def called_alone(module: Any, *inputs: torch.Tensor) -> torch.Tensor:
    """What `module`, a layer of a target, makes of `inputs`, also before the target's first pass: under FSDP2 the first
    call has to be one of the whole target, and this is none."""
    if not callable(getattr(module, "unshard", None)):
        return module(*inputs)
    module.unshard()
    try:
        return module.forward(*inputs)
    finally:
        module.reshard()


def check_embeddings(target: PreTrainedModel, config: SpecFormerConfig) -> None:
    """Tell another model of the same sizes (an error) and a relative (a warning) from the drafter's own target."""
    if config.target_embeddings is None:
        return
    theirs, ours = (
        torch.tensor(numbers, dtype=torch.float64, device="cpu")  # whatever the default device is: not all have float64
        for numbers in (some_embeddings(target, config.vocab_size), config.target_embeddings)
    )
    if torch.allclose(theirs, ours, rtol=0.02, atol=1e-3 * float(ours.abs().max())):
        return
    name, own = target.name_or_path or type(target).__name__, config.target_name_or_path or "another target"
    likeness = float(functional.cosine_similarity(theirs, ours, dim=0))
    if likeness <= RELATED:
        raise ValueError(
            f"This drafter was made for {own}, and {name} is another model of the same sizes: of their embeddings, a "
            f"few were compared, whose likeness is {likeness:.2f} (1 is equal). Load the drafter of this target, or "
            "train one for it."
        )
    if name != own:
        warnings.warn(
            f"This drafter was made for {own}. {name} is related to it (likeness of embeddings {likeness:.4f}), as a "
            "fine-tune or another quantisation is: the text stays the target's own, but fewer drafts may be accepted.",
            stacklevel=2,
        )


def is_plain_linear(head: nn.Module) -> bool:
    """Whether its rows can be taken out; not so if it is quantised, sharded, offloaded, or has adapters."""
    hook = getattr(head, "_hf_hook", None)  # of accelerate, on every module where there is a device_map
    is_there = hook is None or getattr(hook, "offload", True) is False
    return type(head) is nn.Linear and type(head.weight.data) is torch.Tensor and is_there


_rows: WeakKeyDictionary = WeakKeyDictionary()
"""LM head -> its rows that were taken out last, and which they were. The next call mostly needs the same."""
_rows_lock = threading.Lock()


def kept_rows(head: nn.Linear, rows: torch.Tensor | None) -> nn.Linear:
    """`some_rows` as the layer of the last call, if its rows are the same: what other code keeps of a layer, such as
    its weights in another order, is of use again. The rows are compared: torch's own count of changes misses those of
    fused optimizers."""
    part = some_rows(head, rows)
    if rows is None:  # it is the head itself, which must not keep itself alive
        return part
    with _rows_lock:
        kept, which = _rows.get(head, (None, None))
        if kept is None or not same_weights(kept, part) or not torch.equal(which, rows):
            kept = part
            _rows[head] = kept, rows.clone()
    return kept


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers of one class have the same numbers, on the same device."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def some_rows(head: nn.Linear, rows: torch.Tensor | None = None) -> nn.Linear:
    """Some rows of a linear layer as a layer of their own, which is not trained; itself if `rows` is `None`."""
    if rows is None:
        return head
    part = nn.Linear(head.in_features, len(rows), bias=head.bias is not None, device="meta")
    for name, parameter in head.named_parameters():
        setattr(part, name, nn.Parameter(parameter.detach()[rows], requires_grad=False))
    return part


def outputs_at(layer: nn.Linear, states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The outputs of a linear layer at `places` alone: (..., w, d) and (..., w, C) or (..., 1, C) -> (..., w, C)."""
    weight, are_shared = layer.weight[places], places.shape[-2] == 1
    outputs = states @ weight.squeeze(-3).mT if are_shared else (weight @ states[..., None])[..., 0]
    return outputs if layer.bias is None else outputs + layer.bias[places]


def device_of(module: nn.Module) -> torch.device:
    """Where `module` computes. Weights that accelerate offloads are on the meta device between its passes."""
    device = next(module.parameters()).device
    hook: Any = module._hf_hook if device.type == "meta" else None  # of accelerate
    return device if hook is None else torch.device(hook.execution_device)


def final_norm_scale(target: PreTrainedModel) -> torch.Tensor:
    """Per-channel scale (d,) that the target's final norm applies; ones where it has none.

    Measured rather than read, since some families store weight - 1: a vector of alternating signs has unit RMS and
    zero mean, so the odd part of the norm's answer to it is the scale, for RMSNorm and LayerNorm alike.
    """
    config = target.config.get_text_config(decoder=True)
    size = config.hidden_size
    # get_decoder() may return something else that is called `decoder`, such as the head
    modules = (*target.get_decoder().modules(), *target.modules())
    lists = [
        (module, child)
        for module in modules
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    decoder, layers = lists[0] if lists else (target, nn.ModuleList())
    inside_layers = set(layers.modules())
    norms = [
        module
        for module in decoder.modules()
        if module not in inside_layers
        and "norm" in type(module).__name__.lower()
        and sum(parameter.numel() for parameter in module.parameters()) in (size, 2 * size)
    ]
    if not norms:
        return torch.ones(size, device="cpu")
    dtype = next(norms[-1].parameters()).dtype
    signs = 1.0 - 2.0 * (torch.arange(size, device=device_of(norms[-1])) % 2).to(dtype)
    with torch.no_grad():
        return signs * (norms[-1](signs) - norms[-1](-signs)) / 2
