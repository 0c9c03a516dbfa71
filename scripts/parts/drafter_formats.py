"""Drafters in the formats that engines read: the config and the tensors of a network that is loaded here.

    speculators   what speculators 0.9 saves: config.json alone tells vLLM which target it is for
    dflash        z-lab's DFlash: what SGLang takes, and vLLM beside the target
    gguf-ready    what llama.cpp's convert_hf_to_gguf.py takes: z-lab's DFlash, DSpark in speculators' format, or
                  SafeAILab's EAGLE-3, which SGLang takes as well

A format says more, or less, than another. What one cannot say is an obstacle, a sentence, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Qwen3Config

from specformer.generation.drafter_dflash_network import DFlashNetwork
from specformer.generation.drafter_eagle import states_read
from specformer.generation.drafter_eagle_network import SWITCHES, EagleNetwork
from specformer.generation.drafter_foreign import check_fit
from specformer.generation.drafter_foreign_network import LARGEST, LAYER_FIELDS, ForeignNetwork, kinds_of_layers
from specformer.generation.drafter_parallelspec_network import ParallelSpecNetwork

SPECULATORS_VERSION = "0.9.0"
"""Whose fields and names these are."""
Written = tuple[dict, dict[str, torch.Tensor]]
"""A config, and tensors by their names."""
EAGLE_DRAFTS = 3
"""An EAGLE-3 drafter has no number of its own; speculators trains it with so many."""


@dataclass
class Checkpoint:
    """What is written, config.json and tensors by their names; in which format; and how many tokens a round drafts."""

    form: str
    num_tokens: int
    config: dict
    tensors: dict[str, torch.Tensor]


def checkpoint_of(
    network: ForeignNetwork,
    target,
    target_name: str,
    form: str,
    num_tokens: int | None = None,
    usual_tokens: int | None = None,
) -> Checkpoint:
    """`network` in the format `form`.

    Args:
        target: the model that it drafts for; its weights are not read, and may be on the meta device.
        target_name: what an engine is to load it by: Hub id or folder.
        num_tokens: that an engine drafts each round where it is not told; default: all slots of a block, or
            `usual_tokens` of a drafter that has none.

    Raises:
        ValueError: it is the drafter of another model, the format cannot carry it, or it has fewer slots.
    """
    check_fit(network, target, states_of(network, target))
    if problems := obstacles(network, target, form):
        fitting = [other for other in FORMATS if not obstacles(network, target, other)]
        advice = f"Use --format {' or '.join(fitting)}" if fitting else "specformer.generate() runs it as it is"
        raise ValueError(f"--format {form} cannot carry this {network.kind} drafter: {'; '.join(problems)}. {advice}.")
    most = most_tokens(network)
    if num_tokens is not None and not 0 < num_tokens <= (most or LARGEST):
        raise ValueError(f"{num_tokens} tokens were asked for each round; this drafter has 1 to {most or LARGEST:,}.")
    count = num_tokens or most or usual_tokens or EAGLE_DRAFTS
    return Checkpoint(form, count, *FORMATS[form](network, target, target_name, count))


def most_tokens(network: ForeignNetwork) -> int | None:
    """How many tokens a pass of it drafts; `None`: one after the other, as many as one likes."""
    return network.config.num_draft_tokens if isinstance(network, DFlashNetwork) else None


def states_of(network: ForeignNetwork, target) -> list[int]:
    """Which of the target's hidden states it reads: i is what enters layer i."""
    return states_read(network, target) if isinstance(network, EagleNetwork) else network.config.target_states


# ---- what a format cannot carry


def obstacles(network: ForeignNetwork, target, form: str) -> list[str]:
    """Why `form` cannot carry `network`: one sentence each, none if it can."""
    if type(network) not in (
        DFlashNetwork,
        EagleNetwork,
        ParallelSpecNetwork,
    ):  # one that is made of them drafts in another way
        return ["it is of a kind that no format here has"]
    theirs = target.config.get_text_config(decoder=True)
    layers, states = layers_of(network), states_of(network, target)
    found = []
    if layers.vocab_size not in (theirs.vocab_size, LARGEST):  # LARGEST: its config does not say
        found.append(f"its config has {layers.vocab_size:,} tokens and the target {theirs.vocab_size:,}")
    if states != sorted(set(states)):
        found.append(f"it reads the target's states {states}, and engines give each once, in ascending order")
    if form == "gguf-ready":
        if layers.attention_bias:
            found.append("its attention has biases, which llama.cpp does not read")
        if layers.hidden_act != "silu":
            found.append(f"its activation is {layers.hidden_act}, and llama.cpp has silu")
    if isinstance(network, EagleNetwork):
        return found + eagle_obstacles(network, states, form)
    assert isinstance(network, DFlashNetwork)
    return found + dflash_obstacles(network, target, form)


def eagle_obstacles(network: EagleNetwork, states: list[int], form: str) -> list[str]:
    config, is_parallel, found = network.config, isinstance(network, ParallelSpecNetwork), []
    if is_parallel and form != "speculators":
        return ["it drafts from masks behind EAGLE-3's layer, which speculators' P-EAGLE alone has"]
    if form == "dflash":
        return ["it drafts one token after the other, and DFlash a block at once"]
    if is_parallel and (config.fc_norm or config.norm_output):
        found.append("it norms each state or its output, which vLLM's P-EAGLE does not")
    if len(states) != 3:
        found.append(f"it reads {len(states)} of the target's states, and engines expect three")
    if form == "gguf-ready":
        if config.has_head_norms:
            found.append("it norms queries and keys, which llama.cpp's EAGLE-3 does not")
        if config.fc_norm or config.norm_output:
            found.append("it norms each state or its output, which llama.cpp's EAGLE-3 does not")
    return found


def dflash_obstacles(network: DFlashNetwork, target, form: str) -> list[str]:
    config, found = network.config, []
    how, begin = {True: "with", False: "without"}, {True: "the newest token", False: "each slot"}
    is_scaled, scales = type(target.get_input_embeddings()) is not nn.Embedding, form == "dflash"
    if is_scaled and config.scales_embeddings != scales:
        found.append(
            f"it reads the target's embeddings {how[config.scales_embeddings]} the factor that they have, and this "
            f"format {how[scales]}"
        )
    if "sliding_attention" in kinds_of_layers(config.layers):
        of_block = form == "speculators"
        if form == "gguf-ready":
            found.append("it has layers with a sliding window, which are not translated for llama.cpp")
        elif config.window_is_of_the_block != of_block:
            found.append(
                f"its windows are counted from {begin[config.window_is_of_the_block]}, and this format's from "
                f"{begin[of_block]}"
            )
    if form == "dflash":
        if config.sample_from_anchor:
            found.append("its first draft comes from the newest token's slot, and DFlash's from the one after it")
        if config.markov_rank or config.confidence_head:
            found.append("DFlash has no Markov head and no confidence head")
        return found
    if config.markov_rank and config.markov_head_type != "vanilla":
        found.append(f"its Markov head is {config.markov_head_type!r}, and engines have 'vanilla' alone")
    if not config.markov_rank and (config.sample_from_anchor or config.confidence_head):
        found.append("engines have drafts of the newest token's slot, and a confidence head, with a Markov head only")
    if form == "gguf-ready":
        if config.target_hidden_size != config.layers.hidden_size:
            found.append("it is of another width than the target, and llama.cpp has one for both")
        if config.confidence_head and not config.confidence_reads_token:
            found.append("its confidence head does not read the token in front, and llama.cpp's does")
    return found


def needs_dspark_class(network: DFlashNetwork) -> bool:
    """Whether llama.cpp's converter knows its tensors under the name of DSpark only."""
    return bool(network.config.markov_rank or network.config.draft_vocab_size)


# ---- what is written


def layers_of(network: ForeignNetwork) -> Qwen3Config:
    config = network.config
    return config.layer if isinstance(network, EagleNetwork) else config.layers


def layer_fields(network: ForeignNetwork, target, model_type: str) -> dict:
    """The sizes of the layers, by the names that every engine reads."""
    layers = layers_of(network)
    rope = layers.rope_parameters or {}
    names = (*LAYER_FIELDS, "hidden_act", "rms_norm_eps", "attention_bias")
    fields = {"model_type": model_type, **{name: getattr(layers, name) for name in names}}
    fields |= {
        "vocab_size": target.config.get_text_config(decoder=True).vocab_size,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],  # for those that do not know the other
        "tie_word_embeddings": False,
    }
    if "sliding_attention" in kinds_of_layers(layers):
        fields |= {
            "layer_types": kinds_of_layers(layers),
            "sliding_window": layers.sliding_window,
            "use_sliding_window": True,
        }
    return fields


def target_width(network: ForeignNetwork) -> int | None:
    """The width of the target's states, where it is another one than the drafter's."""
    width = network.config.target_hidden_size
    return None if width == layers_of(network).hidden_size else width


def dtype_of(network: ForeignNetwork) -> str:
    return str(network.dtype).removeprefix("torch.")


def tensors_of(network: ForeignNetwork, target) -> dict[str, torch.Tensor]:
    """By speculators' names, which are those of the network here; and which tokens of the target it can draft."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    if (ids := network.draft_token_ids) is not None:
        drafted = torch.zeros(target.config.get_text_config(decoder=True).vocab_size, dtype=torch.bool)
        tensors["t2d"] = drafted.index_fill(0, ids.cpu(), True)
    return tensors


def in_speculators_format(network: ForeignNetwork, target, target_name: str, num_tokens: int) -> Written:
    config = network.config
    if isinstance(network, EagleNetwork):
        kind, name, model_type = "eagle3", "Eagle3Speculator", "qwen3" if config.has_head_norms else "llama"
        own = {
            "eagle_aux_hidden_state_layer_ids": states_of(network, target),
            "embed_requires_grad": config.has_own_embeddings,
            **{switch: getattr(config, switch) for switch in SWITCHES},  # vLLM's defaults are others
        }
        if isinstance(network, ParallelSpecNetwork):
            kind, name, own = "peagle", "PEagleSpeculator", own | {"mask_token_id": config.mask_token_id}
    else:
        kind, name, model_type = "dflash", "DFlashSpeculator", "qwen3"
        has_window = "sliding_attention" in kinds_of_layers(config.layers)
        own = {
            "aux_hidden_state_layer_ids": config.target_states,
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "sample_from_anchor": config.sample_from_anchor,
            # where no layer has a window it means nothing, but vLLM takes it for all layers
            "sliding_window_non_causal": not (has_window and config.sliding_block_is_causal),
        }
        if config.markov_rank:
            kind, name = "dspark", "DSparkSpeculator"
            own |= {
                "markov_rank": config.markov_rank,
                "markov_head_type": config.markov_head_type,
                "enable_confidence_head": config.confidence_head,
                "confidence_head_with_markov": config.confidence_reads_token,
            }
    fields = layer_fields(network, target, model_type)
    greedy = {"proposal_type": "greedy", "speculative_tokens": num_tokens}
    return (
        {
            "architectures": [name],
            "dtype": dtype_of(network),
            "speculators_model_type": kind,
            "speculators_version": SPECULATORS_VERSION,
            "speculators_config": {
                "algorithm": kind,
                "default_proposal_method": "greedy",
                "proposal_methods": [{**greedy, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
                "verifier": {"name_or_path": target_name, "architectures": target.config.architectures or []},
            },
            "transformer_layer_config": fields,
            "draft_vocab_size": config.draft_vocab_size or fields["vocab_size"],
            "target_hidden_size": target_width(network),
            "tie_word_embeddings": False,
            **own,
        },
        tensors_of(network, target),
    )


def in_dflash_format(network: ForeignNetwork, target, target_name: str, num_tokens: int) -> Written:
    config = network.config
    fields = {
        "architectures": ["DFlashDraftModel"],
        "dtype": dtype_of(network),
        **layer_fields(network, target, "qwen3"),
        "block_size": config.block_size,
        "num_target_layers": target.config.get_text_config(decoder=True).num_hidden_layers,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": [state - 1 for state in config.target_states],  # after which states are read
        },
    }
    if config.draft_vocab_size is not None:
        fields["draft_vocab_size"] = config.draft_vocab_size
    if (width := target_width(network)) is not None:
        fields["target_hidden_size"] = width
    return fields, tensors_of(network, target)


def in_gguf_ready_format(network: ForeignNetwork, target, target_name: str, num_tokens: int) -> Written:
    if isinstance(network, EagleNetwork):
        config = network.config
        tensors = tensors_of(network, target)
        return (
            {
                "architectures": ["LlamaForCausalLMEagle3"],
                "dtype": dtype_of(network),
                **layer_fields(network, target, "llama"),
                "draft_vocab_size": config.draft_vocab_size,
                "target_hidden_size": config.target_hidden_size,
                "eagle_aux_hidden_state_layer_ids": states_of(network, target),
                "eagle_config": {  # where SGLang looks, by the layers after which states are read
                    "eagle_aux_hidden_state_layer_ids": [state - 1 for state in states_of(network, target)]
                },
                "embed_requires_grad": config.has_own_embeddings,
                **{switch: getattr(config, switch) for switch in SWITCHES},
            },
            {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()},
        )
    assert isinstance(network, DFlashNetwork)
    if not needs_dspark_class(network):
        return in_dflash_format(network, target, target_name, num_tokens)
    config, tensors = in_speculators_format(network, target, target_name, num_tokens)
    return {**config, "architectures": ["DSparkSpeculator"]}, tensors


FORMATS: dict[str, Callable[..., Written]] = {
    "speculators": in_speculators_format,
    "dflash": in_dflash_format,
    "gguf-ready": in_gguf_ready_format,
}
