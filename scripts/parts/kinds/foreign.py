"""What training of networks in the formats of other projects has in common: they read some of the target's hidden
states, their embeddings are the target's, and so is their LM head, which stays as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from specformer.configuration_specformer import SpecFormerConfig
from specformer.generation.drafter_foreign import check_fit
from specformer.generation.drafter_foreign_network import LAYER_FIELDS, ForeignNetwork
from specformer.generation.drafter_loading import KINDS, file_of, kind_of, load_network, read_json
from specformer.generation.target_head import embed_tokens, logits_of_head
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.kinds.fields import given_fields
from specformer.scripts.parts.kinds.mask_token import unused_token
from specformer.scripts.parts.kinds.student import Student, target_states
from specformer.scripts.parts.losses import IGNORED
from specformer.target_specformer import final_norm_scale

LAYER_OPTIONS = {*LAYER_FIELDS, "hidden_act", "rms_norm_eps", "rope_theta"} - {"vocab_size", "hidden_size"}
INITIAL_STD = 0.02


def head_of(network: ForeignNetwork) -> nn.Linear | None:
    """Its own LM head."""
    return getattr(network, "lm_head", None)


class NetworkHead:
    """The LM head of a network, or the target's where it has none; see `losses.Head`."""

    def __init__(self, network: ForeignNetwork, target):
        self.network, self.target, self.draft_token_ids = network, target, network.draft_token_ids
        self.size = target.config.get_text_config(decoder=True).vocab_size

    def draft_labels(self, token_ids: torch.Tensor) -> torch.Tensor:
        ids, lm_head = self.draft_token_ids, head_of(self.network)
        places = torch.full((self.size,), IGNORED, device=token_ids.device)
        if ids is None:
            count = self.size if lm_head is None else min(self.size, lm_head.out_features)
            ids = torch.arange(count, device=token_ids.device)
        places[ids.to(token_ids.device)] = torch.arange(len(ids), device=token_ids.device)
        return places[token_ids.clamp(min=0)].masked_fill(token_ids == IGNORED, IGNORED)

    def draft_logits(self, draft_hidden_states: torch.Tensor) -> torch.Tensor:
        lm_head = head_of(self.network)
        if lm_head is None:
            return self.target_logits(draft_hidden_states.to(self.target.dtype))
        return lm_head(draft_hidden_states.to(lm_head.weight.dtype))

    def target_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return logits_of_head(self.target, hidden_states)


class ForeignStudent(Student):
    """See the module, and `Student`.

    Args:
        states: which hidden states of the target the network reads, in its order.
        fields: of its config.json, where it will be saved.

    Attributes:
        name: what `architectures` of its config.json says.
        switches: fields of its own that `--config` may set.
    """

    means: ClassVar[tuple[str, ...]] = ("draft_vocab_size", "store_hidden_states")
    name: ClassVar[str]
    switches: ClassVar[frozenset[str]]
    most_draft_tokens: ClassVar[int] = 64
    network: ForeignNetwork

    def __init__(
        self, network: ForeignNetwork, target, num_draft_tokens: int, states: Sequence[int], fields: dict | None = None
    ):
        check_fit(network, target, states)
        super().__init__(network, target, num_draft_tokens)
        self.head, self.fields = NetworkHead(network, target), fields
        self.layer_ids = sorted(set(states))
        self.order = [self.layer_ids.index(state) for state in states]

    # ---- made, kept and read again

    @classmethod
    def make_config(cls, arguments, target_config) -> dict[str, Any]:
        """The fields of config.json; the mask token is chosen later."""
        own = {"num_draft_tokens": arguments.num_draft_tokens} if arguments.num_draft_tokens else {}
        sizes = SpecFormerConfig.from_target_config(target_config, **own)
        if sizes.num_draft_tokens > cls.most_draft_tokens:
            raise ValueError(
                f"--num-draft-tokens is {sizes.num_draft_tokens}; {cls.kind} drafts {cls.most_draft_tokens} at most."
            )
        given = given_fields(arguments.config, LAYER_OPTIONS | cls.switches | {"target_layer_ids"})
        if arguments.start_from:
            if given or arguments.draft_vocab_size:
                raise ValueError(
                    "--start-from was given together with --config or --draft-vocab-size; the sizes of a drafter that "
                    "is gone on with stay what they are. Leave these out, or --start-from."
                )
            fields = read_json(file_of(arguments.start_from, "config.json"), f"{arguments.start_from}/config.json")
            if kind_of(fields.get("architectures") or []) != KINDS[cls.name]:
                raise ValueError(
                    f"--start-from {arguments.start_from}: architectures is {fields.get('architectures')}; expected "
                    f"the drafter of a kind that --drafter {cls.kind} makes, such as {cls.name}."
                )
            return cls.gone_on_with(fields, arguments.num_draft_tokens)
        names = ("vocab_size", "hidden_size", *sorted(LAYER_OPTIONS))
        layers = {name: getattr(sizes, name) for name in names if hasattr(sizes, name)}
        text_config = target_config.get_text_config(decoder=True)
        layers["max_position_embeddings"] = getattr(text_config, "max_position_embeddings", None) or 2**16
        layers["num_hidden_layers"] = 1
        layers |= {name: value for name, value in given.items() if name in LAYER_OPTIONS}
        if type(layers["head_dim"]) is int and layers["head_dim"] % 2:
            raise ValueError(f"--config head_dim is {layers['head_dim']}; expected an even number, for rotations.")
        drafted = min(arguments.draft_vocab_size or sizes.vocab_size, sizes.vocab_size)
        if drafted < 1:
            raise ValueError(f"--draft-vocab-size is {drafted}; expected at least 1.")
        states = given.get("target_layer_ids", spread_states(text_config.num_hidden_layers))
        if not isinstance(states, list) or not states or any(type(state) is not int or state < 1 for state in states):
            raise ValueError(f"--config target_layer_ids is {states!r}; expected a list of layers, from 1 on.")
        switches = {name: value for name, value in given.items() if name in cls.switches}
        about = {
            "name_or_path": arguments.target_id or arguments.target,
            "architectures": target_config.architectures or [],
            "num_hidden_layers": text_config.num_hidden_layers,
        }
        fields = cls.make_fields(layers, drafted, states, sizes.num_draft_tokens, about, switches)
        cls.check_fields(fields)
        return fields

    @classmethod
    def make_fields(
        cls, layers: dict, drafted: int, states: list[int], num_draft_tokens: int, target: dict, switches: dict
    ) -> dict[str, Any]:
        """config.json of a new network of such `layers`, which drafts `drafted` tokens of the vocabulary of a `target`
        with that name_or_path, these architectures and num_hidden_layers."""
        raise NotImplementedError

    @classmethod
    def gone_on_with(cls, fields: dict, num_draft_tokens: int | None) -> dict[str, Any]:
        """config.json of a network that goes on from one of such `fields`, with another number of slots if any."""
        raise NotImplementedError

    @classmethod
    def slots_of(cls, fields: dict) -> int:
        """How many tokens a network of such `fields` drafts."""
        raise NotImplementedError

    @classmethod
    def with_mask(cls, fields: dict, token: int) -> dict[str, Any]:
        """`fields` with the mask token, where there is one and it has not been chosen."""
        return fields

    @classmethod
    def check_fields(cls, fields: dict) -> None:
        """
        Raises:
            ValueError: there can be no such network.
        """
        try:
            with torch.device("meta"):
                cls.build(cls.with_mask(fields, 0))
        except (KeyError, TypeError, RuntimeError, ZeroDivisionError, AssertionError) as error:
            raise ValueError(f"--config: no {cls.kind} drafter can be so ({type(error).__name__}: {error}).") from error

    @classmethod
    def build_config(cls, fields: dict) -> Any:
        return KINDS[cls.name][0].from_dict(fields, "--config")

    @classmethod
    def build(cls, fields: dict) -> ForeignNetwork:
        return KINDS[cls.name][1](cls.build_config(fields))

    @classmethod
    def make(cls, config: dict, target, answers: Answers, arguments) -> ForeignStudent:
        if arguments.start_from:
            network = load_network(arguments.start_from, config, arguments.start_from).float().requires_grad_(True)
        else:
            config = cls.with_mask(config, unused_token(target, answers))
            network = cls.build(config)
            start(network, target, answers)
        if (lm_head := head_of(network)) is not None:
            lm_head.requires_grad_(False)
        return cls.of_fields(network.train(), target, config)

    @classmethod
    def of_fields(cls, network: ForeignNetwork, target, fields: dict) -> ForeignStudent:
        return cls(network, target, cls.slots_of(fields), fields=fields)  # type: ignore[call-arg]  # each has its own

    def of_checkpoint(self, folder: Path) -> ForeignStudent:
        assert self.fields is not None  # it was made here
        network = self.build(self.fields)
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return self.of_fields(network.eval(), self.target, self.fields)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        weights = {name: weight.contiguous() for name, weight in self.network.to(dtype).cpu().state_dict().items()}
        if (ids := self.network.draft_token_ids) is not None:
            drafted = torch.zeros(self.text_config.vocab_size, dtype=torch.bool)
            weights["t2d"] = drafted.index_fill(0, ids, True)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        fields = {**(self.fields or {}), "dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    # ---- what it reads of a text

    def read_states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The target's states (B, T, S, d_t), in the network's order and dtype."""
        states = batch["hidden_states"] if "hidden_states" in batch else target_states(self, batch)
        self.network.rotate_on(self.device)
        return states[:, :, self.order].to(self.network.dtype)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of `tokens` (R, n), (R, n, d), as its drafter reads them."""
        embeddings = self.network.embed_tokens or self.target.get_input_embeddings()
        embedded = embed_tokens(embeddings, tokens, self.network.config.scales_embeddings)
        return embedded.to(self.device, self.network.dtype)


def spread_states(num_layers: int) -> list[int]:
    """Which states a new network reads: near the beginning, in the middle and near the end. What the head reads is none
    of them, where there are several layers: engines have that before its norm."""
    first, last = (2, num_layers - 3) if num_layers >= 8 else (1, max(1, num_layers - 1))
    return sorted({first, max(1, num_layers // 2), last})


@torch.no_grad()
def start(network: ForeignNetwork, target, answers: Answers) -> None:
    """Begin near the target: with its final norm and, where the network has a head of its own, with rows of its head,
    for the tokens that are the most frequent in the answers."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INITIAL_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    norm: Any = network.norm
    norm.weight.copy_(final_norm_scale(target))
    if (head := head_of(network)) is None:
        return
    text_config = target.config.get_text_config(decoder=True)
    ids = torch.arange(head.out_features)
    if network.draft_token_ids is not None:
        offsets = network.get_buffer("d2t")
        counts = answers.token_counts(text_config.vocab_size)
        ids = counts.argsort(descending=True, stable=True)[: len(offsets)].sort().values
        offsets.copy_(ids - torch.arange(len(ids)))
    rows = target.get_output_embeddings().weight
    scale = getattr(text_config, "logit_scale", None) or 1 / (getattr(text_config, "logits_scaling", None) or 1)
    head.weight.copy_(scale * rows[ids.to(rows.device)])
