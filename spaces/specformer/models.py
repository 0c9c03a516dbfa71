"""What the page generates with: a target, what drafts for it, and where the decoding comes from."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

NETWORK, ALONE, COPIES, ASSISTANT = "network and copies", "network alone", "copies of the text", "smaller model"


@dataclass
class Models:
    """
    Attributes:
        repository: folder or Hub id whose `custom_generate/` decodes.
        network: a drafter that reads the target's hidden states, loaded or by its folder; `None`: there is none.
        assistant: a smaller causal LM with the same tokenizer, if there is one.
        lock: held while something is generated. Sampling takes torch's one generator, and times are those of one run.
    """

    name: str
    target: Any
    tokenizer: Any
    repository: str
    network: Any = None
    assistant: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def drafters(self) -> list[str]:
        """What can draft here, the best first."""
        networks = [] if self.network is None else [NETWORK, ALONE]
        return [*networks, COPIES, *([] if self.assistant is None else [ASSISTANT])]

    def drafting(self, drafter: str, num_tokens: int, tree_size: int = 0) -> dict[str, Any]:
        """The arguments of generate() with which `drafter`, one of `drafters`, drafts `num_tokens` a round, or a tree
        of `tree_size` that is so deep."""
        decoding = dict(custom_generate=self.repository, trust_remote_code=True, num_assistant_tokens=num_tokens)
        if drafter == COPIES:
            return dict(decoding, prompt_lookup_num_tokens=num_tokens, tree_size=tree_size)
        if drafter == ASSISTANT:
            return dict(decoding, assistant_model=self.assistant)
        copies = {} if drafter == NETWORK else dict(prompt_lookup_num_tokens=0)
        return dict(decoding, assistant_model=self.network, tree_size=tree_size, **copies)

    def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Left-padded `input_ids` and `attention_mask` (rows, width), through the chat template where there is one."""
        how = dict(padding=True, return_tensors="pt", return_dict=True)
        if self.tokenizer.chat_template is None:
            inputs = self.tokenizer(prompts, padding=True, return_tensors="pt")
        else:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            inputs = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, **how)
        return {name: inputs[name].to(self.target.device) for name in ("input_ids", "attention_mask")}


def load(target: str, name: str, repository: str, drafter: str | None, assistant: str | None, dtype: str) -> Models:
    """
    Args:
        target, drafter, assistant: folders or Hub ids.
        name: what to call the target.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(target, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def causal_lm(place: str):
        return AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype)).eval().to(device)

    network: Any = drafter
    if drafter is not None and PreTrainedConfig.get_config_dict(drafter)[0].get("model_type") == "specformer":
        network = AutoModel.from_pretrained(drafter, trust_remote_code=True)
    models = Models(name, causal_lm(target), tokenizer, repository, network, assistant and causal_lm(assistant))
    inputs = models.encode(["Hello"])
    for each in models.drafters:  # what does not fit is told now, and the first run is not slower than the others
        models.target.generate(**inputs, max_new_tokens=8, do_sample=False, **models.drafting(each, 2))
    return models
