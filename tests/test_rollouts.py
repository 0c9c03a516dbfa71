"""Rollouts inside a training: the same training with drafts, weights that change under what was kept, a drafter that
learns along."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_callers import tiny_tokenizer
from tiny import PAD, llama, ragged_batch
from transformers import LlamaForCausalLM

from specformer import Rollouts, SpecFormerConfig, SpecFormerModel, generate
from specformer.generation import backend_linear, backend_packed, draft_length_auto
from specformer.generation.backend_linear import fast_linears
from specformer.generation.draft_length_auto import Experience, experience_of
from specformer.generation.target_refusals import unwrapped

ROOT = Path(__file__).resolve().parents[1]
SLOW = pytest.mark.slow
SAMPLED = dict(do_sample=True, temperature=1.2, max_new_tokens=10)


def drafter_of(target, **fields) -> SpecFormerModel:
    torch.manual_seed(1)
    return SpecFormerModel(SpecFormerConfig.from_target_config(target.config, **fields)).float()


def train(target, steps: int, after_step=lambda: None) -> list[list[list[int]]]:
    """A few steps of policy gradient, by the optimizer that torch's count of changes does not see."""
    torch.manual_seed(7)
    optimizer, batch, found = torch.optim.AdamW(target.parameters(), lr=3e-3, fused=True), ragged_batch(), []
    target.train()
    for _ in range(steps):
        with torch.no_grad():
            sequences = target.generate(**batch, **SAMPLED)
        new = sequences[:, batch["input_ids"].shape[1] :]
        found.append(new.tolist())
        rewards = (new % 2 == 0).double().mean(dim=1)  # for even tokens
        mask = torch.cat([batch["attention_mask"], (new != PAD).long()], dim=1)
        logits = target(input_ids=sequences, attention_mask=mask).logits[:, -new.shape[1] - 1 : -1]
        chances = logits.log_softmax(-1).gather(2, new[..., None])[..., 0]
        optimizer.zero_grad()
        (-(rewards - rewards.mean())[:, None] * chances).mean().backward()
        optimizer.step()
        after_step()
    return found


KINDS = {
    "specformer": lambda target: drafter_of(target),
    "some tokens": lambda target: drafter_of(target, draft_vocab_size=24, previous_token_rank=8, num_candidates=5),
    "causal LM": lambda target: llama(torch.float64, seed=9, num_hidden_layers=1),
    "itself": lambda target: target,
}


@pytest.mark.parametrize(
    "kind", ["some tokens", *(pytest.param(kind, marks=SLOW) for kind in KINDS if kind[:2] != "so")]
)
def test_the_training_is_the_same(kind: str):
    plain, drafted = llama(), llama()
    expected = train(plain, steps=4)
    with Rollouts(drafted, KINDS[kind](drafted), num_assistant_tokens=3) as rollouts:
        assert train(drafted, steps=4) == expected
        assert sum(rollouts.statistics.drafted_per_slot) > 0
    assert "generate" not in vars(drafted)
    for ours, theirs in zip(drafted.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert expected[0] != expected[-1]


def test_refreshing_touches_nothing_else():
    plain, drafted = llama(), llama()
    expected, drafter = train(plain, steps=4), drafter_of(drafted)
    before = {name: value.clone() for name, value in drafter.state_dict().items()}
    with Rollouts(drafted, drafter, num_assistant_tokens=3, learning_rate=1e-3) as rollouts:

        def refresh() -> None:
            gradients = [parameter.grad.clone() for parameter in drafted.parameters()]
            state = torch.get_rng_state()
            assert rollouts.refresh(2) > 0
            assert torch.equal(torch.get_rng_state(), state)
            for parameter, gradient in zip(drafted.parameters(), gradients, strict=True):
                assert torch.equal(parameter.grad, gradient)

        assert train(drafted, 4, refresh) == expected
    assert any(not torch.equal(value, before[name]) for name, value in drafter.state_dict().items())
    assert len(rollouts.texts) == 4 * 5
    text, prompt_length = rollouts.texts[-4]  # of the second row, which is padded
    assert (text[:prompt_length], text[prompt_length:]) == (
        ragged_batch()["input_ids"][1, 3:].tolist(),
        until_end(expected[-1][1]),
    )


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(5) + 1] if 5 in tokens else tokens


def test_a_refreshed_drafter_drafts_better():
    target = llama(torch.float32)
    drafter = drafter_of(target)
    settings = dict(max_new_tokens=24, eos_token_id=None)
    with Rollouts(target, drafter, num_assistant_tokens=4, prompt_lookup_num_tokens=0, learning_rate=3e-3) as rollouts:
        reference = target.generate(**ragged_batch(), **settings)
        before = rollouts.statistics.tokens_per_pass
        first = rollouts.refresh()
        assert rollouts.refresh(50) < first / 2
        assert torch.equal(target.generate(**ragged_batch(), **settings), reference)
        assert rollouts.statistics.tokens_per_pass > before + 0.5


def test_what_was_accepted_before_a_refresh_is_forgotten():
    target = llama(torch.float32)
    with Rollouts(target, drafter := drafter_of(target)) as rollouts:
        target.generate(**ragged_batch(), max_new_tokens=24, eos_token_id=None)
        ways = draft_length_auto._experience[target][drafter]
        known = [each for each in ways.values() if isinstance(each, Experience)]
        assert any(each.promises for each in known)
        for each in known:
            each.of_trees = [0.5]
        timed = [each.passes.known() for each in known]
        rollouts.refresh()
        assert not any(each.promises or each.trust or each.of_trees for each in known)
        assert [each.passes.known() for each in known] == timed
        assert experience_of(target, drafter, next(iter(ways))) is next(iter(ways.values()))


def test_several_sequences_of_a_prompt_and_statistics():
    target = llama()
    expected = target.generate(**ragged_batch(), max_new_tokens=6)
    with Rollouts(target, drafter_of(target), num_assistant_tokens=2) as rollouts:
        batch = ragged_batch()
        mask = batch.pop("attention_mask")
        target.generate(batch["input_ids"], attention_mask=mask, num_return_sequences=2, **SAMPLED)
        lengths = [length for _, length in rollouts.texts]
        assert lengths == [length for length in mask.sum(1).tolist() for _ in range(2)]
        output = target.generate(**ragged_batch(), max_new_tokens=6, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected)
        assert output.statistics is rollouts.statistics


def test_what_cannot_be():
    target = llama(torch.float32)
    small = llama(torch.float32, num_hidden_layers=1)
    with Rollouts(target, small) as rollouts:
        assert unwrapped(target) is target
        with pytest.raises(ValueError, match="A LlamaForCausalLM cannot be refreshed: expected a SpecFormer"):
            rollouts.refresh()
        with pytest.raises(ValueError, match="was replaced already"), Rollouts(target, small):
            pass
        assert target.generate == rollouts.generate
    with pytest.raises(ValueError, match=r"its weights are torch.bfloat16\. Expected float32"):
        Rollouts(target, drafter_of(target).bfloat16()).refresh()
    with pytest.raises(ValueError, match="none of its weights requires gradients"):
        Rollouts(target, drafter_of(target).requires_grad_(False)).refresh()
    assert Rollouts(target, drafter_of(target)).refresh() != 0  # NaN: nothing was written yet


# ---- packed weights


def packed_texts(target, drafter) -> tuple[list, list]:
    """What is drafted and plain, with layers that go through oneDNN where they may."""
    batch, settings = ragged_batch(), dict(max_new_tokens=16, eos_token_id=None)
    with fast_linears(target) as entered:
        assert any(forward.packed is not None for forward in entered)
    return generate(target, drafter, **batch, **settings).tolist(), target.generate(**batch, **settings).tolist()


def step(target) -> None:
    parameters = list(target.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()


@pytest.mark.parametrize("is_checked", [True, pytest.param(False, marks=SLOW)], ids=["checked", "planted fault"])
def test_packed_weights_are_those_of_now(is_checked: bool, monkeypatch):
    monkeypatch.setattr(backend_linear, "gain", lambda *_, **__: 2.0)
    target = llama(torch.float32)
    drafter = drafter_of(target, draft_vocab_size=24)
    ours, plain = packed_texts(target, drafter)
    assert ours == plain
    if not is_checked:
        monkeypatch.setattr(backend_packed, "is_packed", lambda layer, sums: layer in backend_packed._packed)
    step(target)
    ours, plain_now = packed_texts(target, drafter)
    assert plain_now != plain
    assert (ours == plain_now) == is_checked


# ---- TRL


def text_blocks() -> str:
    page = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    return block


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_grpo_as_documented(tmp_path: Path, monkeypatch):
    """The page's own code, with drafts and without: the same rewards, rollouts and weights."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    code, seen = text_blocks(), {}
    for name, text in (
        ("drafted", code),
        ("plain", re.sub(r"^with Rollouts.*", "trainer.train()\n", code, flags=re.M | re.S)),
    ):
        target = llama(torch.float32)
        written = seen.setdefault(name, [])
        names = {"target": target, "tokenizer": tiny_tokenizer(), "drafter": drafter_of(target)}
        exec(
            compile(text.replace("-float(len(tokens))", "note(tokens)"), "rollouts.md", "exec"),
            {**names, "note": lambda tokens, written=written: written.append(list(tokens)) or -float(len(tokens))},
        )
        seen[name, "weights"] = target.state_dict()
    assert len(seen["plain"]) == 4 * 4
    assert seen["drafted"] == seen["plain"]
    for name, value in seen["plain", "weights"].items():
        assert torch.equal(value, seen["drafted", "weights"][name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["RLOO", "OnlineDPO"])
def test_other_trainers(kind: str, tmp_path: Path):
    """They call the same `model.generate`."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    if kind == "RLOO":
        config, make = trl.RLOOConfig, trl.RLOOTrainer
        more = dict(num_generations=4, max_completion_length=12)
    else:
        from trl.experimental.online_dpo import OnlineDPOConfig as config
        from trl.experimental.online_dpo import OnlineDPOTrainer as make

        more = dict(max_new_tokens=12)
    data = Dataset.from_dict({"prompt": ["the cat", "an owl and a rat", "it is", "other than that"] * 2})
    written: dict[str, list] = {}

    def weights(drafted: bool) -> dict:
        llama(torch.float32).save_pretrained(tmp_path / "target")  # the reference is loaded by its name
        target = LlamaForCausalLM.from_pretrained(tmp_path / "target")
        drafter, texts = drafter_of(target), written.setdefault(str(drafted), [])

        def reward(prompts, completions, **kwargs):
            texts.extend(completions)
            return [-float(len(str(completion))) for completion in completions]

        arguments = config(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            bf16=False,
            **more,
        )
        trainer = make(
            model=target, args=arguments, reward_funcs=reward, train_dataset=data, processing_class=tiny_tokenizer()
        )
        if drafted:
            with Rollouts(trainer.model, drafter, num_assistant_tokens=3) as rollouts:
                trainer.add_callback(rollouts.refresh_every(1, steps=1))
                trainer.train()
                assert sum(rollouts.statistics.drafted_per_slot) > 0
        else:
            trainer.train()
        return target.state_dict()

    plain, drafted = weights(False), weights(True)
    assert written["True"] == written["False"] and written["True"]
    assert all(torch.equal(plain[name], drafted[name]) for name in plain)
