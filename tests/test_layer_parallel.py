"""Layer-parallel drafts (EasySpec): which they are, that one layer a group is the ordinary assistant, and all texts."""

from __future__ import annotations

import pytest
import torch
from architectures import FAMILIES, make_target
from exactness import check, plain, texts_of_threads
from foreign import recorded
from test_exactness import NEW_TOKENS, SAMPLING, SETTINGS, meaningful_target
from test_hierarchy import middle_of
from tiny import VOCAB, llama, ragged_batch
from transformers import DynamicCache

from specformer import Hierarchy, LayerParallel, Reader, generate
from specformer.generation import drafter_layer_parallel as layer_parallel
from specformer.generation.backend_versions import cache_argument, cache_name
from specformer.generation.drafter_assistant import AssistantDrafter
from specformer.generation.drafter_layer_groups import Group, members_of
from specformer.generation.drafter_layer_parallel import LayerParallelDrafter
from specformer.generation.target_states import find_decoder

ENDLESS = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)


def deep(**overrides):
    return llama(seed=4, num_hidden_layers=8, **overrides)


@torch.no_grad()
def drafts_by_the_paper(assistant, text: list[int], num_tokens: int, group_size: int) -> list[int]:
    """Written down anew, of a Llama: attention of a group from one input, then its MLPs; the cache of a text exact."""
    cache = DynamicCache(config=assistant.config)
    ids = torch.tensor([text])
    logits = assistant(input_ids=ids, **cache_argument(assistant, cache), use_cache=True).logits
    drafts = [int(logits[0, -1].argmax())]
    decoder = assistant.model
    layers, last = list(decoder.layers), len(decoder.layers) - 1
    groups = [[0], *([*range(at, min(at + group_size, last))] for at in range(1, last, group_size)), [last]]
    while len(drafts) < num_tokens:
        states = decoder.embed_tokens(torch.tensor([drafts[-1:]]))
        place = torch.tensor([[len(text) + len(drafts) - 1]])
        rotary = decoder.rotary_emb(states, position_ids=place)
        for group in groups:
            attended = []
            for number in group:
                layer = layers[number]
                cached = {cache_name(layer.self_attn.forward): cache}
                attended.append(
                    layer.self_attn(
                        hidden_states=layer.input_layernorm(states),
                        position_embeddings=rotary,
                        attention_mask=None,
                        **cached,
                    )[0]
                )
            for number, part in zip(group, attended, strict=True):
                states = states + part
                states = states + layers[number].mlp(layers[number].post_attention_layernorm(states))
        drafts.append(int(assistant.lm_head(decoder.norm(states))[0, -1].argmax()))
    return drafts


def rounds_of(monkeypatch, target, batch, system, reference, drafter=LayerParallelDrafter, k: int = 5, **arguments):
    with monkeypatch.context() as patch:
        rounds = recorded(patch, drafter)
        statistics = check(target, batch, reference, system, k, **arguments)
    return rounds, statistics


@pytest.mark.parametrize("group_size", [4, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3, 9))])
def test_drafts_are_those_of_the_paper(group_size: int, monkeypatch):
    """Of a batch that is ragged in its prompts and in what it accepts."""
    target = llama(seed=4, num_hidden_layers=8)
    assistant, batch = middle_of(target), ragged_batch(padding=(0, 5))
    arguments = dict(max_new_tokens=14, eos_token_id=None)
    reference = plain(target, batch, **arguments)
    padding = (batch["attention_mask"] == 0).sum(1).tolist()

    def are_right(changed=None) -> list[bool]:
        same, propose = [], LayerParallelDrafter.propose

        def noted(self, num_tokens, choose):
            lengths = (self.cache.lengths + self.counts).tolist()
            proposal = propose(self, num_tokens, choose)
            if changed is not None:
                changed(self, proposal)
            for row, (length, drafts) in enumerate(zip(lengths, proposal.tokens.tolist(), strict=True)):
                text = reference.sequences[row, padding[row] :].tolist()
                if length < len(text):  # it has not ended
                    same.append(drafts == drafts_by_the_paper(assistant, text[:length], num_tokens, group_size))
            return proposal

        with monkeypatch.context() as patch:
            patch.setattr(LayerParallelDrafter, "propose", noted)
            statistics = check(target, batch, reference, LayerParallel(assistant, group_size), 5, **arguments)
        assert 0 < sum(statistics.accepted_per_slot) < sum(statistics.drafted_per_slot)
        return same

    same = are_right()
    assert len(same) > 10 and all(same)

    def keep_what_drafts_left(self, proposal) -> None:
        self.read = proposal.tokens[:, :-1]

    assert not all(are_right(keep_what_drafts_left))  # this can fail: the cache has to be computed again


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_one_layer_a_group_is_the_ordinary_assistant(sampling: dict, monkeypatch):
    """Bit by bit, also where the passes are those of groups, in which each layer then reads what it always reads."""
    target, batch, eos = meaningful_target("llama")
    assistant = middle_of(target)
    arguments = dict(sampling, eos_token_id=eos, max_new_tokens=16)
    reference = plain(target, batch, **arguments)
    passes: list[list[torch.Tensor]] = []
    read_draft = AssistantDrafter.read_draft

    def noted(self, token):
        logits = read_draft(self, token)
        passes[-1].append(logits)
        return logits

    found = []
    monkeypatch.setattr(AssistantDrafter, "read_draft", noted)
    for system in (assistant, LayerParallel(assistant, 1)):
        passes.append([])
        kind = AssistantDrafter if system is assistant else LayerParallelDrafter
        found.append(rounds_of(monkeypatch, target, batch, system, reference, kind, **arguments))
    (alone, before), (ours, after) = found
    assert alone == ours and len(alone) > 3
    assert before.accepted_per_slot == after.accepted_per_slot
    assert len(passes[0]) == len(passes[1]) > 3
    assert all(torch.equal(one, other) for one, other in zip(*passes, strict=True))
    other, _ = rounds_of(monkeypatch, target, batch, LayerParallel(deep(), 4), reference, **arguments)
    assert other != alone


def test_groups_of_one_layer_compute_what_the_model_computes():
    """The hooks themselves change no bit where a group's layers read what they would read anyway."""
    assistant = deep()
    members = members_of(assistant, list(find_decoder(assistant)[1]))
    ids = ragged_batch(padding=(0, 0))["input_ids"]
    groups = [Group(layer, [member]) for layer, member in zip(assistant.model.layers, members, strict=True)]
    with torch.no_grad():
        plainly = assistant(input_ids=ids).logits
        with layer_parallel.in_parallel(assistant, groups):
            assert torch.equal(assistant(input_ids=ids).logits, plainly)
        with layer_parallel.in_parallel(assistant, [Group(assistant.model.layers[1], members[1:4])]):
            assert not torch.allclose(assistant(input_ids=ids).logits, plainly, atol=1e-3)
        assert torch.equal(assistant(input_ids=ids).logits, plainly)  # nothing stays
    assert not any(module._forward_pre_hooks for module in assistant.modules())


def test_layers_that_hardly_change_their_input_draft_what_the_assistant_drafts():
    """Where what a group's layers add is small, so is what they do not see of one another."""
    target, batch = deep(), ragged_batch()
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight *= 0.03
            layer.mlp.down_proj.weight *= 0.03
    reference = plain(target, batch, **ENDLESS)
    rates = []
    for group_size in (1, 4):
        statistics = check(target, batch, reference, LayerParallel(target, group_size), 4, **ENDLESS)
        rates.append(sum(statistics.accepted_per_slot) / sum(statistics.drafted_per_slot))
    assert rates[0] > 0.9 and rates[1] > rates[0] - 0.07


# ---- divided among processes: test_ranks.py has several


class AsOneOf:
    """In the place of `Ranks`: one of so many processes, whose results are those of all."""

    share, device = 0, torch.device("cpu")

    def __init__(self, share_of: int):
        self.share_of = share_of

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize(
    "name", [name if name in ("gemma3", "gpt2") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_attention_that_is_computed_where_its_group_begins(name: str, monkeypatch):
    """Where a single process has to compute all of it, drafts are the same; where it has half, they are others, but of
    groups whose layers have different masks."""
    target, batch, eos = meaningful_target(name)
    assistant = make_target(name, seed=3)
    (group,) = LayerParallel(assistant, 4).groups
    arguments = dict(eos_token_id=eos, max_new_tokens=10)
    reference = plain(target, batch, **arguments)

    def drafts(ranks: AsOneOf | None) -> list:
        with monkeypatch.context() as patch:
            patch.setattr(layer_parallel, "ranks_of", lambda model: ranks if model is target else None)
            return rounds_of(patch, target, batch, LayerParallel(assistant, 4), reference, **arguments)[0]

    alone = drafts(None)
    assert len(alone) > 2
    assert drafts(AsOneOf(1)) == alone
    assert (drafts(AsOneOf(2)) == alone) == (group.members[0].kind != group.members[1].kind)
    assert not any("forward" in vars(module) for module in assistant.modules())


# ---- texts


IN_EVERY_RUN = ["sampling with a penalty", "num_return_sequences"]
IN_LONG_RUNS = [pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name not in IN_EVERY_RUN]


@pytest.mark.parametrize("setting", [*IN_EVERY_RUN, *IN_LONG_RUNS])
def test_the_text_does_not_depend_on_it(setting: str):
    target, batch, eos = meaningful_target("llama")
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    system = LayerParallel(middle_of(target), 2)
    for k in (None, 6):
        check(target, batch, reference, system, k, **arguments)


OTHERS = ["gpt2", "olmo2", "falcon"]
OF_LONG_RUNS = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in OTHERS]


@pytest.mark.parametrize("name", [*OTHERS, *OF_LONG_RUNS])
def test_other_families(name: str):
    """Norms in front of attention, behind it, and one for attention and MLP."""
    target, batch, eos = meaningful_target(name)
    assert LayerParallel(target, 2).groups
    for sampling, assistant in (({}, target), (SAMPLING, make_target(name, seed=3))):
        arguments = dict(sampling, eos_token_id=eos, max_new_tokens=NEW_TOKENS)
        check(target, batch, plain(target, batch, **arguments), LayerParallel(assistant, 2), 5, **arguments)


def test_together_with_copies_and_in_a_hierarchy():
    target, batch, eos = meaningful_target("llama")
    arguments = dict(eos_token_id=eos, max_new_tokens=12)
    reference = plain(target, batch, **arguments)
    small = LayerParallel(middle_of(target), 2)
    for system in (Reader(drafter=small), Hierarchy(small, middle_of(target))):
        check(target, batch, reference, system, 5, **arguments)


def test_calls_in_threads_share_an_assistant():
    target, batch, _ = meaningful_target("llama")
    arguments, assistant = dict(max_new_tokens=8, eos_token_id=None), middle_of(target)
    expected = plain(target, batch, **arguments).sequences.tolist()
    found = texts_of_threads(target, LayerParallel(assistant, 2), batch, **arguments, num_assistant_tokens=4)
    assert len(found) == 9 and all(text == expected for text in found)
    assert not any(module._forward_pre_hooks for module in assistant.modules())


@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_other_rules_run_in_batches(acceptance: str):
    target, batch, eos = meaningful_target("llama")
    settings = dict(SAMPLING, acceptance=acceptance, eos_token_id=eos, max_new_tokens=12)
    texts = []
    for assistant in (middle_of(target), target):
        torch.manual_seed(3)
        system = LayerParallel(assistant, 2)
        texts.append(generate(target, system, **batch, **settings, num_assistant_tokens=4).tolist())
    if acceptance == "coupled":
        assert texts[0] == texts[1]


# ---- bad input


class Reordered(torch.nn.Module):
    """A layer whose attention reads what no module has given."""

    def __init__(self, layer):
        super().__init__()
        self.self_attn, self.input_layernorm = layer.self_attn, layer.input_layernorm
        self.mlp, self.post_attention_layernorm = layer.mlp, layer.post_attention_layernorm

    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states) + 1, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def test_layers_of_another_build_are_refused():
    assistant = deep()
    assistant.model.layers[3] = Reordered(assistant.model.layers[3])
    with pytest.raises(ValueError, match=r"cannot be told what their attention reads.*group_size=1, or another"):
        LayerParallel(assistant, 4)
    LayerParallel(assistant, 1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LayerParallel("small"), r"assistant is a builtins.str; expected a causal LM"),
        (lambda: LayerParallel(llama(), 0), r"group_size is 0; expected a positive integer"),
        (lambda: LayerParallel(llama(), 2.5), r"group_size is 2.5; expected a positive integer"),
        (lambda: LayerParallel(llama(vocab_size=VOCAB + 16), 2), r"The assistant LlamaForCausalLM has 80 tokens"),
    ],
)
def test_bad_arguments(make, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        generate(llama(), make(), **ragged_batch(), max_new_tokens=2)
