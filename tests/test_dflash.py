"""DFlash and DSpark drafters: the drafts of their own definition and of transformers' own decoding, in any batch, and
plain generate()'s text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from architectures import make_target
from dflash import MASK, WIDTH, drafts_by_loops, random_weights, raw_config, speculators_config
from exactness import check, plain
from foreign import assert_drafts, assert_rows_draft_as_alone, recorded, save
from test_exactness import NEW_TOKENS, SETTINGS, crossed, meaningful_target
from tiny import VOCAB, llama, llama_config, ragged_batch

from specformer import SpecFormerConfig, SpecFormerModel, generate
from specformer.generation.drafter_dflash import DFlashDrafter
from specformer.generation.drafter_loading import drafting_model


def checkpoints(target) -> dict[str, tuple[dict, dict, dict]]:
    """Config, weights, and what `drafts_by_loops` has to know, by kind."""
    markov = dict(markov_rank=6, enable_confidence_head=True, confidence_head_with_markov=True)
    return {
        "raw": (raw_config(target), random_weights(target), {}),
        "raw, tokens of its own": (
            raw_config(target, draft_vocab_size=24),
            random_weights(target, draft_vocab=24),
            {},
        ),
        "speculators": (speculators_config(target), random_weights(target), {}),
        "speculators, tokens of its own": (
            speculators_config(target, draft_vocab_size=24),
            random_weights(target, draft_vocab=24),
            {},
        ),
        "dspark": (
            speculators_config(target, "dspark", block_size=4, **markov),
            random_weights(target, markov="vanilla", confidence=WIDTH + 6),
            dict(from_anchor=True),
        ),
        "dspark, gated, tokens of its own": (
            speculators_config(target, "dspark", block_size=4, draft_vocab_size=24, markov_head_type="gated", **markov),
            random_weights(target, draft_vocab=24, markov="gated", confidence=WIDTH + 6),
            dict(from_anchor=True),
        ),
    }


KINDS = list(checkpoints(llama()))


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_those_of_plain_loops(kind: str, tmp_path: Path, monkeypatch):
    """One position, layer or slot off, and they would be others."""
    target = llama()
    config, weights, how = checkpoints(target)[kind]
    folder, rounds = save(tmp_path / "drafter", config, weights), recorded(monkeypatch, DFlashDrafter)
    prompt = torch.tensor([[7, 30, 12, 9, 41, 22]])
    settings = dict(max_new_tokens=10, eos_token_id=None, do_sample=False)
    text = generate(target, folder, prompt, num_assistant_tokens=4, prompt_lookup_num_tokens=0, **settings)[0].tolist()
    assert_drafts(
        rounds, text, 7, 4, lambda so_far: drafts_by_loops(target, weights, so_far, config["block_size"], **how)
    )


@pytest.mark.parametrize("kind", ["raw", "dspark"])
def test_every_row_of_a_batch_drafts_as_it_does_alone(kind: str, tmp_path: Path):
    target, batch = llama(), ragged_batch()
    config, weights, _ = checkpoints(target)[kind]
    folder = save(tmp_path / "drafter", config, weights)
    assert_rows_draft_as_alone(target, folder, batch)


@pytest.mark.parametrize(("name", "setting"), crossed("llama", "gemma3", "mistral-sliding"))
def test_the_text_is_that_of_plain_generate(name: str, setting: str, tmp_path: Path):
    target, batch, eos = meaningful_target(name)
    arguments = dict(SETTINGS[setting], eos_token_id=eos, max_new_tokens=NEW_TOKENS)
    reference = plain(target, batch, **arguments)
    for number, kind in enumerate(("raw", "dspark, gated, tokens of its own")):
        config, weights, _ = checkpoints(target)[kind]
        folder = save(tmp_path / str(number), config, weights)
        for k in (1, 3, "auto"):
            check(target, batch, reference, folder, k, **arguments)
        check(target, batch, reference, folder, 3, prompt_lookup_num_tokens=0, **arguments)


@pytest.mark.parametrize("block", ["both ways", "causal"])
def test_layers_with_a_window_see_no_further(block: str, tmp_path: Path):
    """A window as long as the text changes nothing, a short one does, and the text stays."""
    target, drafts = llama(), {}
    layers = dict(layer_types=["sliding_attention", "full_attention"])
    prompt = ragged_batch(padding=(0, 2))
    settings = dict(max_new_tokens=12, eos_token_id=None, num_assistant_tokens=4)
    for window in (None, 4, 200):
        config = speculators_config(
            target,
            layers={} if window is None else dict(layers, sliding_window=window, use_sliding_window=True),
            sliding_window_non_causal=block == "both ways",
        )
        folder = save(tmp_path / str(window), config, random_weights(target))
        network = drafting_model(str(folder), target)
        drafter = DFlashDrafter(network, target)
        kinds = list(network.config.layers.layer_types)
        assert kinds == (["full_attention"] * 2 if window is None else layers["layer_types"])
        seen = []
        propose = drafter.propose
        drafter.propose = lambda *given, propose=propose, seen=seen: seen.append(propose(*given)) or seen[-1]
        text = generate(target, drafter, **prompt, **settings)
        assert torch.equal(text, target.generate(**prompt, max_new_tokens=12, eos_token_id=None))
        drafts[window] = [proposal.tokens.tolist() for proposal in seen]
    assert drafts[4] != drafts[200]
    assert (drafts[None] == drafts[200]) == (block == "both ways")


def test_drafts_are_those_of_transformers_own_decoding(monkeypatch):
    """Token for token, at a batch of one, which is all that it takes."""
    if not hasattr(transformers, "MuseGlimmerAssistantModel"):
        pytest.skip(f"transformers {transformers.__version__} has no DFlash")
    from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

    target = llama(torch.float32)
    config = transformers.MuseGlimmerAssistantConfig(
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        block_size=5,
        mask_token_id=MASK,
        target_layer_ids=[0, 1, 2],
    )
    torch.manual_seed(3)
    theirs = transformers.MuseGlimmerAssistantModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    candidates, propose = [], DFlashTokenCandidateGenerator.get_candidates

    def noted(self, input_ids, *args, **kwargs):
        ids, logits = propose(self, input_ids, *args, **kwargs)
        if logits is not None:
            candidates.append(ids[0, input_ids.shape[1] :].tolist())
        return ids, logits

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", noted)
    prompt = torch.tensor([[7, 30, 12, 9, 41, 22, 17, 8]])
    settings = dict(max_new_tokens=16, eos_token_id=None, do_sample=False, attention_mask=torch.ones_like(prompt))
    text = target.generate(prompt, assistant_model=theirs, speculation_type="dflash", **settings)
    rounds = recorded(monkeypatch, DFlashDrafter)
    ours = generate(target, theirs, prompt, num_assistant_tokens=4, prompt_lookup_num_tokens=0, **settings)
    assert torch.equal(ours, text)
    assert len(candidates) > 5
    for mine, other in zip(rounds, candidates, strict=False):
        assert mine[0] == other[: len(mine[0])]


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_size=1), "nothing is drafted"),
        (dict(block_size=2**40), "block_size is .*whole number from 1"),
        (dict(hidden_size="32"), "is not that of a DFlash drafter|whole number"),
        (dict(num_hidden_layers=10**10), "num_hidden_layers is .*whole number from 1 to 64"),
        (dict(num_attention_heads=0), "num_attention_heads is 0"),
        (dict(layer_types=["full_attention", "chunked_attention"]), "expected full or sliding attention"),
        (dict(hidden_act="none of these"), "holds no drafter that could be read .*none of these"),
        (dict(rope_parameters={"rope_type": "none"}), "none"),
        (dict(dflash_config=dict(target_layer_ids=[0])), "mask_token_id"),
        (dict(dflash_config=dict(mask_token_id=VOCAB, target_layer_ids=[0, 1, 2])), "mask_token_id is 64"),
        (dict(dflash_config=dict(mask_token_id=3, target_layer_ids=[])), "expected a list of layers"),
        (dict(num_hidden_layers=3), "layers.2.* is missing"),
        (dict(intermediate_size=41), r"mlp.*\(40, 32\), not \(41, 32\)"),
        (dict(num_hidden_layers=1), "layers.1.* is unknown"),
        (dict(architectures=["Unheard"], model_type="unheard"), "unheard"),
        (dict(model_type="specformer"), "could not be loaded .* Pass a SpecFormer drafter loaded"),
    ],
)
def test_configs_that_are_of_no_use(change: dict, message: str, tmp_path: Path):
    target = llama()
    folder = save(tmp_path, raw_config(target) | change, random_weights(target))
    with pytest.raises(ValueError, match=message):
        generate(target, folder, torch.tensor([[7]]), max_new_tokens=2)


def test_damaged_files(tmp_path: Path):
    target = llama()
    with pytest.raises(ValueError, match=r"of which no config\.json could be read. Pass a folder"):
        generate(target, str(tmp_path), torch.tensor([[7]]), max_new_tokens=2)
    weights = random_weights(target)
    weights["norm.weight"][3] = torch.nan
    folder = save(tmp_path / "nan", raw_config(target), weights)
    with pytest.raises(ValueError, match=r"norm\.weight holds numbers that are not finite"):
        generate(target, folder, torch.tensor([[7]]), max_new_tokens=2)
    for d2t, message in (
        (torch.arange(24) * 0 - torch.arange(24), "does not name 24 different tokens"),
        (torch.zeros(24), "does not name 24 different tokens"),
        (torch.full((24,), -3), "does not name 24 different tokens"),
    ):
        other = save(
            tmp_path / "d2t",
            raw_config(target, draft_vocab_size=24),
            random_weights(target, draft_vocab=24) | {"d2t": d2t},
        )
        with pytest.raises(ValueError, match=message):
            generate(target, other, torch.tensor([[7]]), max_new_tokens=2)
    whole = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(whole[:200])
    with pytest.raises(ValueError, match="holds no drafter that could be read"):
        generate(target, other, torch.tensor([[7]]), max_new_tokens=2)
    (other / "model.safetensors").rename(other / "lost")
    (other / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no drafter that could be read .*weight_map"):
        generate(target, other, torch.tensor([[7]]), max_new_tokens=2)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        generate(target, folder, torch.tensor([[7]]), max_new_tokens=2)
    (folder / "config.json").write_text(json.dumps(["a"]), encoding="utf-8")
    with pytest.raises(ValueError, match="holds a list"):
        generate(target, folder, torch.tensor([[7]]), max_new_tokens=2)


def test_the_drafter_of_another_target(tmp_path: Path):
    folder = save(tmp_path, raw_config(llama()), random_weights(llama()))
    for other, message in (
        (llama(hidden_size=40), "hidden_size is 40 there and 32 here"),
        (llama(num_hidden_layers=2), "it has 2 layers, and state 3 is read"),
    ):
        with pytest.raises(ValueError, match=f"does not fit .*{message}"):
            generate(other, folder, torch.tensor([[7]]), max_new_tokens=2)
    weights = random_weights(llama(), draft_vocab=24)
    weights["d2t"][-1] = VOCAB
    folder = save(tmp_path / "ids", raw_config(llama(), draft_vocab_size=24), weights)
    with pytest.raises(ValueError, match="has 64 tokens, and token 87 is drafted"):
        generate(llama(), folder, torch.tensor([[7]]), max_new_tokens=2)


def test_folders_of_other_kinds(tmp_path: Path):
    """Those of a SpecFormer drafter and of a causal LM hold what would be passed loaded."""
    target, prompt = llama(torch.float32), torch.tensor([[7, 30, 12]])
    drafter = SpecFormerModel(SpecFormerConfig.from_target_config(target.config))
    drafter.init_from_target(target)
    drafter.save_pretrained(tmp_path / "specformer")
    small = llama(torch.float32, seed=11, num_hidden_layers=2)
    small.save_pretrained(tmp_path / "small")
    settings = dict(max_new_tokens=12, eos_token_id=None, num_assistant_tokens=3, return_dict_in_generate=True)
    for name, loaded in (("specformer", drafter), ("small", small)):
        by_name, by_model = (generate(target, one, prompt, **settings) for one in (str(tmp_path / name), loaded.eval()))
        assert torch.equal(by_name.sequences, by_model.sequences)
        assert by_name.statistics.was_drafted == by_model.statistics.was_drafted


def test_a_drafter_of_an_unknown_kind_is_no_random_causal_lm(tmp_path: Path):
    """Its config may well be that of a Llama."""
    target = llama(torch.float32)
    config = llama_config().to_dict() | dict(architectures=["NobodyKnowsThisDrafter"])
    folder = save(tmp_path, config, random_weights(target))
    with pytest.raises(ValueError, match=r"does not hold the weights of a LlamaForCausalLM: .* are known: DFlash"):
        generate(target, folder, torch.tensor([[7]]), max_new_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_were_added_to_the_target(kind: str, tmp_path: Path):
    """The drafter has no numbers for them, whether they are read or would be drafted."""
    config, weights, _ = checkpoints(llama())[kind]
    folder, target = save(tmp_path, config, weights), llama()
    target.resize_token_embeddings(VOCAB + 3)
    prompt = torch.tensor([[7, VOCAB + 1, 12, VOCAB + 2]])
    settings = dict(max_new_tokens=8, eos_token_id=None)
    text = generate(target, folder, prompt, num_assistant_tokens=4, prompt_lookup_num_tokens=0, **settings)
    assert torch.equal(text, target.generate(prompt, **settings))


def test_embeddings_are_those_that_the_format_has(tmp_path: Path):
    """z-lab's are what the target's module gives, factor and all; speculators' are rows of its table."""
    target = make_target("gemma3", seed=3)
    ids = torch.tensor([[7, 30]])
    module = target.get_input_embeddings()
    assert not torch.equal(module(ids), module.weight[ids])
    for config, expected in ((raw_config(target), module(ids)), (speculators_config(target), module.weight[ids])):
        folder = save(tmp_path / config["architectures"][0], config, random_weights(target))
        drafter = DFlashDrafter(drafting_model(folder, target), target)
        assert torch.equal(drafter.embed(ids), expected)


def test_what_is_kept_is_that_of_now(tmp_path: Path):
    """Other files in a folder, and other weights of a loaded model, are other drafters."""
    target = llama()
    folder = save(tmp_path, raw_config(target), random_weights(target))
    first = drafting_model(folder, target)
    save(tmp_path, raw_config(target), random_weights(target, seed=1))
    second = drafting_model(folder, target)
    assert not torch.equal(first.fc.weight, second.fc.weight)


def test_it_is_read_once(tmp_path: Path):
    target = llama()
    folder = save(tmp_path, raw_config(target), random_weights(target))
    network = drafting_model(folder, target)
    assert drafting_model(str(folder), target) is network
    assert network.dtype == target.dtype and not any(parameter.requires_grad for parameter in network.parameters())
