"""A tiny target and drafters of each kind for it, taught its own texts for a moment: right now and then, and wrong
often enough that counts of accepted drafts say something."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from specformer.generation.drafter_dflash_network import DFlashConfig, DFlashNetwork
from specformer.generation.drafter_eagle_network import EagleConfig, EagleNetwork
from specformer.generation.drafter_foreign_network import ForeignNetwork
from specformer.generation.drafter_parallelspec_network import ParallelSpecConfig, ParallelSpecNetwork
from specformer.generation.target_head import logits_of_head

VOCAB, WIDTH, HEAD_DIM, HEADS, KV_HEADS, LAYERS = 512, 256, 64, 4, 2, 4
DRAFTED, MASK, FIRST_TOKEN = 4, 3, 4
STATES = [1, 2, 3]
"""Those of the target that drafters read."""
DRAFT_VOCAB = 448


def tiny_target() -> LlamaForCausalLM:
    """Weights of a standard deviation of 0.15: with the default one it writes one token for ever."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config).float().eval()


def tiny_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(FIRST_TOKEN, VOCAB, (n,), generator=generator).tolist() for n in (5, 9, 14, 3)]


def layer_fields(num_layers: int, model_type: str) -> dict:
    return dict(
        model_type=model_type,
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=3000.0,  # no engine would take it by itself
    )


def dflash() -> DFlashNetwork:
    """As z-lab describes one."""
    own = dict(mask_token_id=MASK, target_layer_ids=[state - 1 for state in STATES])
    fields = dict(**layer_fields(2, "qwen3"), block_size=DRAFTED + 1, dflash_config=own)
    return with_tokens(DFlashNetwork(DFlashConfig.from_dict(fields, "a tiny DFlash")))


def dflash_with_tokens() -> DFlashNetwork:
    """As speculators describes one, which drafts some tokens only."""
    fields = dict(
        speculators_model_type="dflash",
        transformer_layer_config=layer_fields(2, "qwen3"),
        aux_hidden_state_layer_ids=STATES,
        block_size=DRAFTED + 1,
        mask_token_id=MASK,
        draft_vocab_size=DRAFT_VOCAB,
    )
    return with_tokens(DFlashNetwork(DFlashConfig.from_dict(fields, "a tiny DFlash")))


def eagle(model_type: str, **switches: bool) -> EagleNetwork:
    fields = dict(
        transformer_layer_config=layer_fields(1, model_type),
        draft_vocab_size=DRAFT_VOCAB,
        eagle_aux_hidden_state_layer_ids=STATES,
        **switches,
    )
    return with_tokens(EagleNetwork(EagleConfig.from_dict(fields, "a tiny EAGLE-3")))


def parallelspec() -> ParallelSpecNetwork:
    fields = dict(
        transformer_layer_config=layer_fields(1, "llama"),
        draft_vocab_size=DRAFT_VOCAB,
        eagle_aux_hidden_state_layer_ids=STATES,
        mask_token_id=MASK,
        embed_requires_grad=False,
    )
    return with_tokens(ParallelSpecNetwork(ParallelSpecConfig.from_dict(fields, "a tiny ParallelSpec")))


def with_tokens(network):
    """Where it drafts some tokens only: which."""
    if network.d2t is not None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randperm(VOCAB, generator=generator)[: len(network.d2t)].sort().values
        network.d2t.copy_(ids - torch.arange(len(ids)))
    return network


def teach(network: ForeignNetwork, target, texts: list[list[int]], steps: int) -> ForeignNetwork:
    """Let `network` learn what comes next in `texts`, for so few `steps` that it gets a part of it."""
    torch.manual_seed(2)
    logits_of: Callable = dflash_logits if isinstance(network, DFlashNetwork) else eagle_logits
    if isinstance(network, ParallelSpecNetwork):
        logits_of = parallelspec_logits
    read = []
    for text in texts:
        with torch.no_grad():
            states = target(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states
        read.append(torch.stack([states[state] for state in STATES], dim=2))  # (1, T, S, d)
    place = torch.full((VOCAB,), -100)  # of each token among those that are drafted
    ids = network.draft_token_ids
    place[torch.arange(VOCAB) if ids is None else ids] = torch.arange(VOCAB if ids is None else len(ids))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(steps):
        parts = [logits_of(network, target, states, text) for states, text in zip(read, texts, strict=True)]
        loss = sum(functional.cross_entropy(logits.flatten(0, -2), place[labels.flatten()]) for logits, labels in parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def dflash_logits(network: DFlashNetwork, target, states: torch.Tensor, text: list[int]):
    """Of the slots behind each token of `text`, (A, k, V'), and the tokens that stand there, (A, k)."""
    tokens, width = torch.tensor(text), network.config.block_size
    anchors = torch.arange(1, len(text) - width + 1)
    positions = anchors[:, None] + torch.arange(width)  # (A, q)
    block = tokens[anchors, None].repeat(1, width)
    block[:, 1:] = MASK
    context = network.read(states, torch.arange(len(text))[None])
    rows = [tuple(part.expand(len(anchors), -1, -1, -1) for part in layer) for layer in context]
    visible = (torch.arange(len(text)) < anchors[:, None])[:, None, None]
    slots = network(target.get_input_embeddings()(block), positions, rows, visible)[:, -DRAFTED:]
    head = network.lm_head
    return (logits_of_head(target, slots) if head is None else head(slots)), tokens[positions[:, 1:]]


def eagle_logits(network: EagleNetwork, target, states: torch.Tensor, text: list[int]):
    """Of the tokens after next, from the target's states and then from its own one position before, (1, A, V'), and
    these tokens, (1, A)."""
    tokens = torch.tensor([text])
    embeds = target.get_input_embeddings()(tokens[:, 1:-1])
    positions = torch.arange(len(text) - 2)[None]
    given = network(network.fuse(states[:, :-2]), embeds, positions, DynamicCache())
    before = network.norm(given) if network.config.norm_output else given
    again = network(before[:, :-1], embeds[:, 1:], positions[:, 1:], DynamicCache())
    logits = network.lm_head(network.norm(torch.cat([given, again], dim=1)))
    return logits, torch.cat([tokens[:, 2:], tokens[:, 3:]], dim=1)


def parallelspec_logits(network: ParallelSpecNetwork, target, states: torch.Tensor, text: list[int]):
    """Of the token after next, and of the masks behind, (A, k, V'), and the tokens that stand there, (A, k)."""
    tokens, count, embed = torch.tensor(text), DRAFTED - 1, target.get_input_embeddings()
    positions, cache, rows = torch.arange(len(text) - 2)[None], DynamicCache(), DynamicCache()
    given = network(network.fuse(states[:, :-2]), embed(tokens[None, 1:-1]), positions, cache)[0]
    last = torch.arange(len(text) - 1 - DRAFTED)  # of the text, as each row has read it
    layer = cache.layers[0]
    rows.update(*(part.expand(len(last), -1, -1, -1) for part in (layer.keys, layer.values)), 0)
    places = last[:, None] + 1 + torch.arange(count)
    seen = (positions <= last[:, None])[:, None, None].expand(-1, 1, count, -1)
    own = torch.ones(count, count, dtype=torch.bool).tril().expand(len(last), 1, -1, -1)
    masks = embed(torch.full_like(places, MASK))
    behind = network(network.masks(*places.shape), masks, places, rows, torch.cat([seen, own], dim=-1))
    logits = network.lm_head(network.norm(torch.cat([given[last, None], behind], dim=1)))
    return logits, tokens[last[:, None] + 2 + torch.arange(DRAFTED)]


def parallel_lm(target: LlamaForCausalLM) -> nn.Module:
    """PARD: the target with noise in its weights, and a mask token, which it was not taught to read."""
    assistant = LlamaForCausalLM(target.config).float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for own, theirs in zip(assistant.parameters(), target.parameters(), strict=True):
            own.copy_(theirs + 0.006 * torch.randn(own.shape, generator=generator))
    assistant.config.pard_token = MASK
    return assistant
