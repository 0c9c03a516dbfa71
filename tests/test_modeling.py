"""The drafter network, and what it borrows of its target."""

from __future__ import annotations

import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from architectures import make_target
from tiny import PRESETS, VOCAB, all_logits, llama, llama_config, ragged_batch
from torch.nn import functional
from transformers import DynamicCache

from specformer import SpecFormerConfig, SpecFormerModel, context_specformer
from specformer.generation.backend_versions import cache_argument, cache_of
from specformer.generation.target_states import HiddenStates
from specformer.layers_specformer import ConfidenceHead, SpecFormerRMSNorm, rotate
from specformer.target_specformer import final_norm_scale

B, T, D, SIZE = 2, 7, 5, 32


def make_config(preset: str = "anchor", **overrides) -> SpecFormerConfig:
    return PRESETS[preset](llama_config(), **{"num_draft_tokens": D, "initializer_range": 0.3, **overrides})


@pytest.fixture(params=PRESETS)
def network(request) -> SpecFormerModel:
    return SpecFormerModel(make_config(request.param)).to(torch.float64).eval()


def make_inputs(network: SpecFormerModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states and anchors."""
    hidden_states = torch.randn(B, T, len(network.config.target_layer_ids), SIZE, dtype=torch.float64)
    anchors = torch.randn(B, T, SIZE, dtype=torch.float64) if network.config.reads_anchor_token else None
    return hidden_states, anchors


# ---- the network


def test_gradient_checkpointing_changes_no_gradient(network):
    """Only training computes its layers again; a drafter that drafts does not."""
    inputs = make_inputs(network)
    computed = []
    for layer in network.draft_layers:
        layer[1].register_forward_pre_hook(lambda *_: computed.append(1))

    def gradients() -> tuple[int, list[torch.Tensor]]:
        network.zero_grad()
        computed.clear()
        network(*inputs).draft_hidden_states.square().sum().backward()
        return len(computed), [weight.grad for weight in network.parameters() if weight.grad is not None]

    once, expected = gradients()
    network.gradient_checkpointing_enable()
    assert gradients()[0] == once
    twice, found = network.train() and gradients()
    assert twice == 2 * once
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    network.gradient_checkpointing_disable()
    assert gradients()[0] == once


def draft_from(network, inputs, rows: list[int], position: int) -> torch.Tensor:
    """Drafts (R, D, d) from one position of some rows, with nothing behind it and no other row there."""
    hidden_states, anchors = (part if part is None else part[rows, : position + 1] for part in inputs)
    config, cache, seen = network.config, DynamicCache(), {}
    fused = anchors if config.use_anchor_token else None
    states = network.encode_context(hidden_states, fused, past_key_values=cache)[:, -1]
    if config.draft_attends_context:
        seen = dict(
            position_ids=torch.full((len(rows), 1), position),
            attention_mask=torch.ones(len(rows), 1, 1, position + 1, dtype=torch.bool),
            past_key_values=cache,
        )
    return network.draft(states, anchors[:, -1] if config.anchor_slot else None, **seen)


def test_shapes(network):
    inputs = make_inputs(network)
    output = network(*inputs)
    assert output.draft_hidden_states.shape == (B, T, D, SIZE)
    assert output.context_states.shape == (B, T, SIZE)
    assert draft_from(network, inputs, [0, 1], T - 1).shape == (B, D, SIZE)
    wanted = torch.zeros(B, T, dtype=torch.bool)
    wanted[1, 2:4] = True  # and none of the other row
    some = network(*inputs, draft_positions=wanted).draft_hidden_states
    torch.testing.assert_close(some, output.draft_hidden_states[wanted])


def test_a_draft_depends_on_its_row_up_to_its_position_only(network):
    inputs = make_inputs(network)
    drafted = network(*inputs).draft_hidden_states
    for position in range(T):
        torch.testing.assert_close(draft_from(network, inputs, [0, 1], position), drafted[:, position])
        torch.testing.assert_close(draft_from(network, inputs, [1], position)[0], drafted[1, position])


def test_padding_that_a_mask_hides_is_not_there(network):
    inputs, padding = make_inputs(network), 2
    expected = network(*(part if part is None else part[:, padding:] for part in inputs)).draft_hidden_states
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[:, :padding] = torch.eye(T, dtype=torch.bool)[:, :padding]  # padding sees itself, and nothing else does
    positions = (torch.arange(T)[None] - padding).clamp(min=0)
    drafted = network(*inputs, position_ids=positions, attention_mask=mask[None, None]).draft_hidden_states
    torch.testing.assert_close(drafted[:, padding:], expected)


def test_presets():
    paper, anchor = make_config("paper"), make_config("anchor")
    assert paper.target_layer_ids == [0, 2, 3, 4]
    assert not paper.use_anchor_token
    assert anchor.target_layer_ids == [2, 3, 4]
    assert anchor.use_anchor_token
    assert paper.num_input_slices == anchor.num_input_slices == 4
    assert make_config("paper", target_layer_ids=[1, 4]).num_input_slices == 2


@pytest.mark.parametrize("preset", ["anchor", "paper"])
def test_parameter_count(preset: str):
    config = make_config(preset, intermediate_size=40, num_attention_heads=6, num_key_value_heads=3, head_dim=4)
    d, slots, query, key_value = SIZE, D, 6 * 4, 3 * 4
    attention = d + d * query + 2 * d * key_value + query * d
    expected = (
        4 * d  # grouped norm
        + 4 * d * d  # fusion of four vectors
        + 2 * attention
        + d  # norm before the positional FFN
        + d * slots * d + slots * d
        + d + 3 * d * 40  # SwiGLU
        + d  # final norm
    )  # fmt: skip
    network = SpecFormerModel(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert not any("head" in name or "embed" in name for name, _ in network.named_parameters())


def test_new_weights_have_the_configured_spread():
    network = SpecFormerModel(make_config(initializer_range=0.05))
    assert network.input_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert not network.positional_ffn.bias.any()
    assert (network.input_norm.weight == 1).all()


def test_later_positions_never_change_earlier_drafts(network):
    hidden_states, anchors = make_inputs(network)
    before = network(hidden_states, anchors).draft_hidden_states
    for position in range(T):
        others = hidden_states.clone()
        others[:, position] += 1
        inputs = [(others, anchors, T)]
        if anchors is not None:
            moved = anchors.clone()
            moved[:, position] += 1
            end = T if network.config.use_anchor_token else position + 1  # a slot of its own leaves the context alone
            inputs.append((hidden_states, moved, end))
        for *pair, end in inputs:
            after = network(*pair).draft_hidden_states
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-12)
            assert ((after - before)[:, position:end].abs().amax(dim=(2, 3)) > 1e-6).all()
            torch.testing.assert_close(after[:, end:], before[:, end:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", ["anchor", "paper"])
def test_every_slot_sees_every_other(preset: str):
    network = SpecFormerModel(make_config(preset)).to(torch.float64).eval()
    context = torch.randn(3, SIZE, dtype=torch.float64)
    before = network.draft(context)
    for slot in range(D):
        with torch.no_grad():
            network.positional_ffn.bias.view(D, SIZE)[slot] += torch.randn(SIZE, dtype=torch.float64)
        after = network.draft(context)
        assert ((after - before).abs().amax(dim=2) > 1e-6).all()
        before = after


@pytest.mark.parametrize("causal", [False, True])
def test_slot_embeddings_and_causal_slots(causal: bool):
    """A slot's embedding changes that slot, and the others that see it."""
    config = make_config(use_positional_ffn=False, causal_draft_attention=causal)
    network = SpecFormerModel(config).to(torch.float64).eval()
    assert not any(name.startswith("positional") for name, _ in network.named_parameters())
    context = torch.randn(3, SIZE, dtype=torch.float64)
    for slot in range(D):
        before = network.draft(context)
        with torch.no_grad():
            network.slot_embeddings.weight[slot] += torch.randn(SIZE, dtype=torch.float64)
        moved = (network.draft(context) - before).abs().amax(dim=2) > 1e-9  # (3, D)
        assert moved[:, slot:].all()
        assert bool(moved[:, :slot].any()) is (slot > 0 and not causal)


# ---- slots that see more than one another


def reference_slots(network, hidden_states, anchors, row: int, position: int) -> torch.Tensor:
    """States (D, d) drafted from one position: each head and slot on its own, over a list of keys."""
    config, context = network.config, network.context_attention
    inputs = hidden_states[row]  # (T, S, d)
    if config.use_anchor_token:
        inputs = torch.cat([anchors[row][:, None], inputs], dim=1)
    fused = network.input_proj(network.input_norm(inputs).flatten(1))  # (T, d)
    state = context(fused[None], torch.arange(T)[None], is_causal=True)[0, position]
    slots = network.positional_ffn(network.positional_norm(state)).view(D, SIZE)
    if config.anchor_slot:
        slots = torch.cat([network.anchor_slot(anchors[row, position])[None], slots])

    def heads(layer, projection, states, at=None):  # (n, d) -> (heads, n, head_dim), rotated to the positions `at`
        parts = projection(layer.norm(states)).unflatten(1, (-1, config.head_dim)).transpose(0, 1)
        return parts if at is None else rotate(parts[None], at[None], config.rope_theta)[0]

    at = position + 1 + torch.arange(len(slots))
    before = torch.arange(position + 1)
    context_keys = heads(context, context.k_proj, fused[before], before)
    context_values = heads(context, context.v_proj, fused[before])
    for attention, mlp in network.draft_layers:
        queries = heads(attention, attention.q_proj, slots, at)
        keys, values = heads(attention, attention.k_proj, slots, at), heads(attention, attention.v_proj, slots)
        attended = torch.zeros(len(slots), config.num_attention_heads, config.head_dim, dtype=torch.float64)
        for head in range(config.num_attention_heads):
            shared = head * config.num_key_value_heads // config.num_attention_heads
            for slot in range(len(slots)):
                end = slot + 1 if config.causal_draft_attention else len(slots)
                seen, weighed = keys[shared, :end], values[shared, :end]
                if config.draft_attends_context:
                    seen = torch.cat([context_keys[shared], seen])
                    weighed = torch.cat([context_values[shared], weighed])
                chances = (seen @ queries[head, slot] / config.head_dim**0.5).softmax(dim=0)
                attended[slot, head] = chances @ weighed
        slots = mlp(slots + attention.o_proj(attended.flatten(1)))
    return network.final_norm(slots[-D:])


@torch.no_grad()
@pytest.mark.parametrize("at_once", [2, 16])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("anchor", ["none", "input", "slot", "both"])
@pytest.mark.parametrize("attends", [False, True])
def test_slots_are_those_of_plain_loops(
    attends: bool, anchor: str, causal: bool, layers: int, at_once: int, monkeypatch
):
    monkeypatch.setattr(context_specformer, "POSITIONS_AT_ONCE", at_once)
    fields = dict(use_anchor_token=anchor in ("input", "both"), anchor_slot=anchor in ("slot", "both"))
    others = dict(draft_attends_context=attends, causal_draft_attention=causal, num_draft_layers=layers)
    config = make_config(**fields, **others)
    network = SpecFormerModel(config).to(torch.float64).eval()
    inputs = make_inputs(network)
    drafted = network(*inputs).draft_hidden_states
    for row in range(B):
        for position in range(T):
            expected = reference_slots(network, *inputs, row, position)
            # rotation is computed in float32, and without the context slots are at 0, 1, ... instead
            tolerance = 1e-12 if attends else 1e-5
            torch.testing.assert_close(drafted[row, position], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("fields", [dict(draft_attends_context=True), dict(anchor_slot=True)], ids=str)
def test_the_same_weights_draft_otherwise_without_the_field(fields: dict):
    network = SpecFormerModel(make_config(**fields)).to(torch.float64).eval()
    without = SpecFormerModel(make_config()).to(torch.float64).eval()
    assert set(without.state_dict()) <= set(network.state_dict())
    without.load_state_dict(network.state_dict(), strict="anchor_slot" not in fields)
    inputs = make_inputs(network)
    drafted, plain = (each(*inputs).draft_hidden_states for each in (network, without))
    assert ((drafted - plain).abs().amax(dim=3) > 1e-6).all()


@torch.no_grad()
def test_slots_see_every_token_before_them_and_those_of_their_row():
    """Whatever their context state may say of it: that stays what it is here."""
    network = SpecFormerModel(make_config("context")).to(torch.float64).eval()
    cache, hidden_and_anchors = DynamicCache(), make_inputs(network)
    states = network.encode_context(*hidden_and_anchors, past_key_values=cache)[:, 4]
    layer, positions = cache.layers[0], torch.full((B, 1), 4)
    mask = (torch.arange(T) <= 4).expand(B, 1, 1, T)
    before = network.draft(states, None, positions, mask, cache)
    for buffer in (layer.keys, layer.values):
        for token in range(T):
            kept = buffer[0, :, token].clone()
            buffer[0, :, token] += 1
            moved = (network.draft(states, None, positions, mask, cache) - before).abs().amax(dim=2)  # (B, D)
            assert bool((moved[0] > 1e-9).all()) is (token <= 4)
            assert bool(moved[0].any()) is (token <= 4)
            assert not moved[1].any()
            buffer[0, :, token] = kept


@pytest.mark.parametrize("preset", ["context", "all of it"])
def test_gradients_do_not_depend_on_the_blocks(preset: str, monkeypatch):
    network = SpecFormerModel(make_config(preset)).to(torch.float64)
    inputs, wanted, gradients = make_inputs(network), torch.rand(B, T) < 0.7, []
    for at_once in (1, 3, 100):
        monkeypatch.setattr(context_specformer, "POSITIONS_AT_ONCE", at_once)
        drafted = network(*inputs, draft_positions=wanted).draft_hidden_states
        behind = ("previous_token_correction", "confidence_head")
        parameters = [weight for name, weight in network.named_parameters() if not name.startswith(behind)]
        gradients.append(torch.autograd.grad(drafted.square().sum() + drafted[..., 0].sum(), parameters))
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0])


def test_context_is_demanded_where_configured():
    network = SpecFormerModel(make_config("context")).to(torch.float64)
    with pytest.raises(ValueError, match=r"draft\(\) needs position_ids, .* and past_key_values"):
        network.draft(torch.randn(1, SIZE, dtype=torch.float64))


@torch.no_grad()
def test_only_some_tokens_are_drafted():
    """With the very scores that the whole head gives them."""
    target, states = llama(), torch.randn(2, 3, SIZE, dtype=torch.float64)
    every = SpecFormerModel(make_config()).borrow(target)
    network = SpecFormerModel(make_config("some tokens"))
    assert network.draft_token_ids.tolist() == list(range(24))
    counts = torch.zeros(VOCAB)
    counts[torch.arange(1, VOCAB, 2)] = 5.0
    network.choose_draft_tokens(counts)
    kept = network.draft_token_ids.tolist()
    assert kept == list(range(1, 48, 2))
    some = network.borrow(target)
    logits = all_logits(some, states)
    assert logits.shape == (2, 3, VOCAB)
    torch.testing.assert_close(logits[..., kept], every.draft_logits(states)[..., kept], rtol=0, atol=1e-12)
    assert logits.isinf().sum() == 2 * 3 * (VOCAB - len(kept))
    assert some.tokens_at(some.candidates(states, 1))[..., 0].tolist() == logits.argmax(-1).tolist()
    labels = some.draft_labels(torch.tensor([1, 2, 47, 49, -100, 0]))
    assert labels.tolist() == [0, -100, 23, -100, -100, -100]
    assert every.draft_labels(torch.tensor([1, -100])).tolist() == [1, -100]


def test_drafted_tokens_are_saved(tmp_path):
    network = SpecFormerModel(make_config("some tokens"))
    network.choose_draft_tokens(torch.rand(VOCAB))
    network.bfloat16().save_pretrained(tmp_path)
    loaded = SpecFormerModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.draft_token_ids.tolist() == network.draft_token_ids.tolist()
    assert loaded.draft_token_ids.dtype == torch.long


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bias", "another class", "a hook of accelerate"])
def test_a_head_that_is_no_plain_layer_is_called_as_it_is(kind: str):
    class Doubling(torch.nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    head = (Doubling if kind == "another class" else torch.nn.Linear)(SIZE, VOCAB, bias=kind == "bias")
    if kind == "a hook of accelerate":
        add_hook_to_module(head, ModelHook())
    target, states, ids = llama(torch.float32), torch.randn(4, SIZE), torch.arange(3, 51, 2)
    target.set_output_embeddings(head)
    network = SpecFormerModel(make_config("some tokens"))
    network.draft_token_ids.copy_(ids)
    borrowed = network.borrow(target)
    logits = head(states)[:, ids]
    torch.testing.assert_close(borrowed.draft_logits(states), logits)
    places = torch.tensor([[5, 0], [23, 22], [1, 1], [7, 9]])
    torch.testing.assert_close(borrowed.candidate_logits(states, places), logits.gather(1, places))
    shared = logits.gather(1, places[:1].expand(4, 2))
    torch.testing.assert_close(borrowed.candidate_logits(states, places[:1]), shared)
    every = SpecFormerModel(make_config()).borrow(target)
    torch.testing.assert_close(every.draft_logits(states), head(states))
    torch.testing.assert_close(every.candidate_logits(states, places), head(states).gather(1, places))


def test_anchors_are_given_exactly_where_configured(network):
    hidden_states, anchors = make_inputs(network)
    wrong = None if anchors is not None else torch.randn(B, T, SIZE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"anchor_embeds is (missing|given)"):
        network(hidden_states, wrong)


@pytest.mark.parametrize("preset", ["anchor", "paper", "anchor slot"])
def test_parts_take_anchors_only_where_they_are_theirs(preset: str):
    network = SpecFormerModel(make_config(preset)).to(torch.float64)
    hidden_states, _ = make_inputs(network)
    for call, states, field in (
        (network.encode_context, hidden_states, "use_anchor_token"),
        (network.draft, hidden_states[:, :, 0], "anchor_slot"),
    ):
        anchors = None if getattr(network.config, field) else torch.randn(B, T, SIZE, dtype=torch.float64)
        with pytest.raises(ValueError, match=f"anchor_embeds is .*{field}="):
            call(states, anchors)


def test_confidences_of_one_slot_after_several_beginnings():
    head = ConfidenceHead(make_config()).to(torch.float64)
    for parameter in (head.scale, head.shift):
        torch.nn.init.normal_(parameter)
    states, logits = (torch.randn(B, head.scale.numel(), size, dtype=torch.float64) for size in (SIZE, 5))
    for slot, expected in enumerate(head(states, logits).unbind(1)):
        found = head(states[:, slot, None].expand(-1, 3, -1), logits[:, slot, None].expand(-1, 3, -1), slot)
        torch.testing.assert_close(found, expected[:, None].expand(-1, 3))


def test_grouped_norm_is_a_loop_over_groups():
    norm = SpecFormerRMSNorm(6, 1e-5, groups=3).to(torch.float64)
    torch.nn.init.normal_(norm.weight)
    states = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    normed = norm(states)
    for group in range(3):
        part = states[:, :, group]
        expected = part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight[group]
        torch.testing.assert_close(normed[:, :, group], expected)


def test_rotation_depends_on_relative_positions():
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> float:
        rotated = [rotate(s, torch.tensor([[at]]), 100.0) for s, at in ((query, query_at), (key, key_at))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(0, 0) == pytest.approx(float((query * key).sum()))
    assert score(9, 4) == pytest.approx(score(5, 0), rel=1e-5)
    assert score(25, 31) == pytest.approx(score(0, 6), rel=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)
    states = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    per_row = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    for row in range(2):
        alone = rotate(states[row : row + 1], per_row[row : row + 1], 100.0)
        torch.testing.assert_close(rotate(states, per_row, 100.0)[row : row + 1], alone)


def test_save_and_load(network, tmp_path):
    network.save_pretrained(tmp_path)
    loaded = SpecFormerModel.from_pretrained(tmp_path, dtype=torch.float64)
    for name in ("target_layer_ids", "use_anchor_token", "num_draft_tokens", "head_dim", "target_num_hidden_layers"):
        assert getattr(loaded.config, name) == getattr(network.config, name)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, weight in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def test_loading_a_checkpoint_without_some_weights_raises(tmp_path):
    network = SpecFormerModel(make_config())
    weights = network.state_dict()
    del weights["final_norm.weight"]
    network.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"missing_keys.*final_norm\.weight"):
        SpecFormerModel.from_pretrained(tmp_path)


# ---- the target


@pytest.mark.parametrize(
    ("name", "scale_of"),
    [
        ("llama", lambda model: model.model.norm.weight),
        ("gemma3", lambda model: 1 + model.model.norm.weight),
        ("gpt2", lambda model: model.transformer.ln_f.weight),
        ("opt", lambda model: model.model.decoder.final_layer_norm.weight),
    ],
    ids=["llama", "gemma3", "gpt2", "opt"],
)
def test_final_norm_scale(name: str, scale_of):
    target = make_target(name)
    scale = scale_of(target)
    torch.nn.init.normal_(scale if scale.is_leaf else target.model.norm.weight)
    expected = scale_of(target).detach()
    torch.testing.assert_close(final_norm_scale(target), expected, rtol=2e-5, atol=1e-6)
    network = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))
    network.init_from_target(target)
    torch.testing.assert_close(network.final_norm.weight.detach().double(), expected, rtol=2e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_borrowed_states_are_the_output_hidden_states(name: str, pieces: int):
    target = make_target(name)
    network = SpecFormerModel(SpecFormerConfig.paper(target.config))
    input_ids = ragged_batch(padding=(0, 0))["input_ids"]
    expected = target(input_ids=input_ids, output_hidden_states=True).hidden_states
    expected = torch.stack([expected[layer_id] for layer_id in (0, 2, 3, 4)], dim=2)
    cache = None
    states = []
    for piece in input_ids.chunk(pieces, dim=1):
        with HiddenStates(target, network.config.target_layer_ids) as hidden:
            cache = cache_of(target(input_ids=piece, **cache_argument(target, cache), use_cache=True))
        states.append(hidden.result(target.device))
    torch.testing.assert_close(torch.cat(states, dim=1), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_last_state_is_what_the_head_reads():
    for name in ("llama", "gpt2", "gemma3", "opt"):
        target = make_target(name)
        network = SpecFormerModel(SpecFormerConfig.paper(target.config))
        input_ids = ragged_batch(padding=(0, 0))["input_ids"]
        with HiddenStates(target, network.config.target_layer_ids) as hidden:
            logits = target(input_ids=input_ids).logits
        last = hidden.result(target.device)[:, :, -1]
        torch.testing.assert_close(network.borrow(target).draft_logits(last), logits)


@torch.no_grad()
def test_passes_of_other_threads_are_not_seen():
    target, ids = llama(), ragged_batch(padding=(0, 0))["input_ids"]

    def in_another_thread():
        thread = threading.Thread(target=lambda: target(input_ids=ids.flip(1)))
        thread.start()
        thread.join()

    with HiddenStates(target, [0, 2, 4]) as hidden:
        in_another_thread()
        with pytest.raises(RuntimeError, match=r"did not go through its layers \[0, 2, 4\]"):
            hidden.result(target.device)
        target(input_ids=ids)
        in_another_thread()
    with HiddenStates(target, [0, 2, 4]) as again:
        target(input_ids=ids)
    assert torch.equal(hidden.result(target.device), again.result(target.device))


def count_hooks(target) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules())


def test_hooks_are_gone_after_an_exception():
    target = llama()
    before = count_hooks(target)
    with pytest.raises(ZeroDivisionError), HiddenStates(target, [0, 2, 4]):
        assert count_hooks(target) == before + 3
        raise ZeroDivisionError
    assert count_hooks(target) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(hidden_size=64), "hidden_size is 64 there and 32 here"),
        (dict(vocab_size=VOCAB - 1), "vocab_size is 63 there and 64 here"),
        (dict(num_hidden_layers=2), "num_hidden_layers is 2 there and 4 here"),
    ],
)
def test_a_target_of_another_size_is_refused(overrides: dict, message: str):
    network = SpecFormerModel(make_config(target_name_or_path="some/target"))
    with pytest.raises(ValueError, match=f"some/target.*{message}"):
        network.borrow(llama(**overrides))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gemma2", dict(final_logit_softcapping=2.0)),
        ("gemma2", dict(final_logit_softcapping=None)),
        ("cohere", dict(logit_scale=0.25)),
        ("cohere2", {}),
        ("granite", dict(logits_scaling=3.0)),
        ("llama", {}),
    ],
)
def test_logits_are_the_targets(name: str, overrides: dict):
    """Scales and soft caps behind the head apply to drafts as well."""
    target = make_target(name, **overrides)
    borrowed = SpecFormerModel(SpecFormerConfig.paper(target.config)).borrow(target)
    output = target(input_ids=ragged_batch(padding=(0, 0))["input_ids"], output_hidden_states=True)
    torch.testing.assert_close(borrowed.draft_logits(output.hidden_states[-1]), output.logits)
    if overrides.get("final_logit_softcapping") or name in ("cohere", "granite"):
        head_alone = functional.linear(output.hidden_states[-1], target.get_output_embeddings().weight)
        assert (head_alone - output.logits).abs().max() > 1e-3


@torch.no_grad()
def test_embeddings_are_the_targets():
    target = llama()
    borrowed = SpecFormerModel(make_config()).borrow(target)
    tokens = torch.tensor([[3, 5], [63, 0]])
    assert torch.equal(borrowed.embed(tokens), target.model.embed_tokens.weight[tokens])
    assert borrowed.device == torch.device("cpu")
