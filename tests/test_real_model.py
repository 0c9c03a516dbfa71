"""The default drafter on the real target: the same texts, in fewer target passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from specformer import generate
from specformer.scripts.demo import PROMPTS
from specformer.scripts.parts.prompts import encode

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.real
def test_eight_real_prompts(real_target):
    tokenizer = AutoTokenizer.from_pretrained(real_target)
    target = AutoModelForCausalLM.from_pretrained(real_target, dtype=torch.float32).eval()
    drafter = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    inputs = encode(tokenizer, PROMPTS)
    for sampling in (dict(do_sample=False), dict(do_sample=True, temperature=0.8, top_p=0.95)):
        torch.manual_seed(5)
        expected = target.generate(**inputs, max_new_tokens=24, **sampling)
        for k in ("auto", 4):
            torch.manual_seed(5)
            output = target.generate(
                **inputs,
                **sampling,
                max_new_tokens=24,
                num_assistant_tokens=k,
                assistant_model=drafter,
                custom_generate=str(ROOT),
                trust_remote_code=True,
                return_dict_in_generate=True,
            )
            assert output.sequences.tolist() == expected.tolist()
        assert output.statistics.tokens_per_pass > 1.2  # how much "auto" drafts depends on the machine


@pytest.mark.real
def test_stop_strings(real_target):
    """Also inside an accepted draft, and on another column in every row."""
    tokenizer = AutoTokenizer.from_pretrained(real_target)
    target = AutoModelForCausalLM.from_pretrained(real_target, dtype=torch.float32).eval()
    drafter = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    inputs = encode(tokenizer, PROMPTS[:4])
    settings = dict(max_new_tokens=24, do_sample=False, stop_strings=[" is", "ing", ":"], tokenizer=tokenizer)
    expected = target.generate(**inputs, **settings)
    for num_assistant_tokens in (1, 4):
        ours = generate(target, drafter, **inputs, **settings, num_assistant_tokens=num_assistant_tokens)
        assert ours.tolist() == expected.tolist()
