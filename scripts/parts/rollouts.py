"""Rollouts of a trainer, drafted, with a drafter that learns along with its target.

Trainers that write rollouts with transformers call `model.generate(...)`: TRL's GRPO, RLOO and online DPO, where they
do without vLLM, and others. Inside of `Rollouts` that call drafts. The texts are those that it would give anyway, seed
for seed, so the training is the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from specformer.generation.call_settings import CallSettings
from specformer.generation.call_statistics import GenerationStatistics
from specformer.generation.draft_length_auto import forget_promises
from specformer.generation.drafter_loading import drafting_model
from specformer.generation.drafter_system import finished_texts
from specformer.generation.generate import generate
from specformer.generation.prompt import PromptLayout
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.kinds.all import kind_of_student, student_of
from specformer.scripts.parts.losses import IGNORED, drafter_loss

HALF = (torch.bfloat16, torch.float16)


class Rollouts:
    """As a context manager around a training: `model.generate(...)` drafts inside.

    The target's weights may change between calls in any way. Each process of several has a drafter of its own, which
    learns from the rollouts of that process.

    Args:
        model: the model that is trained, as it is given to the trainer.
        drafter: `assistant_model` of `specformer.generate`.
        learning_rate: of the drafter, where `refresh` is called.
        batch_size: rollouts of one of its steps.
        max_rollouts: that are remembered, the newest; 0: none.
        arguments: further ones of `specformer.generate`, such as `num_assistant_tokens`.

    Attributes:
        statistics: of the last call.

    Raises:
        ValueError: two of them were entered for one model.
    """

    def __init__(
        self,
        model,
        drafter=None,
        learning_rate: float = 1e-4,
        batch_size: int = 8,
        max_rollouts: int = 256,
        **arguments,
    ):
        self.model, self.drafter = model, drafting_model(drafter, model)
        self.learning_rate, self.batch_size, self.arguments = learning_rate, batch_size, arguments
        self.texts: deque[tuple[list[int], int]] = deque(maxlen=max_rollouts)  # and how many tokens are the prompt
        self.statistics: GenerationStatistics | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.order = torch.Generator().manual_seed(0)  # not torch's own, which the rollouts are sampled with

    def __enter__(self) -> Rollouts:
        if "generate" in vars(self.model):
            raise ValueError(
                f"The generate() of this {type(self.model).__name__} was replaced already. Leave the other Rollouts "
                "first, or delete what replaced it."
            )
        self.model.generate = self.generate
        return self

    def __exit__(self, *exception) -> None:
        del self.model.generate

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        """`model.generate(...)`, drafted."""
        settings = CallSettings(kwargs, generation_config, self.model.generation_config)
        wants_all = settings.get("return_dict_in_generate")
        output: Any = generate(
            self.model,
            self.drafter,
            inputs,
            generation_config,
            **{**self.arguments, **kwargs, "return_dict_in_generate": True},
        )
        self.statistics = output.statistics
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if self.texts.maxlen and input_ids is not None:
            self._remember(output, input_ids, kwargs.get("attention_mask"))
        return output if wants_all else output.sequences

    def _remember(self, output, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        width, counts = input_ids.shape[1], output.statistics.tokens_per_row
        returned = len(output.sequences) // len(input_ids)  # sequences of a prompt
        mask = None if mask is None else mask.repeat_interleave(returned, dim=0)
        layout = PromptLayout.from_mask(mask, output.sequences[:, :width])
        texts = finished_texts(output.sequences, layout, counts)
        self.texts.extend(zip(texts, layout.host_lengths, strict=True))

    def refresh(self, steps: int = 1) -> float:
        """Let the drafter learn from the remembered rollouts, as the target of now reads them: the newest ones first,
        and others by chance. No gradient of the target, and none of torch's random numbers, is touched.

        Args:
            steps: of the optimizer.

        Returns:
            The loss of the last step; NaN where nothing was written yet.

        Raises:
            ValueError: a drafter that cannot learn.
        """
        if kind_of_student(self.drafter) is None:
            raise ValueError(
                f"A {type(self.drafter).__name__} cannot be refreshed: expected a SpecFormer, DFlash, EAGLE-3, "
                "ParallelSpec or PARD drafter. It still drafts without that."
            )
        student = student_of(self.drafter, self.model)  # anew, since what it has of the target's head is a copy
        weights = [parameter for parameter in student.network.parameters() if parameter.requires_grad]
        if not weights or any(weight.dtype in HALF for weight in weights):
            found = f"its weights are {weights[0].dtype}" if weights else "none of its weights requires gradients"
            raise ValueError(
                f"The drafter cannot be refreshed: {found}. Expected float32, in which small steps are not lost "
                "(it drafts in the target's dtype anyway), and drafter.requires_grad_(True)."
            )
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0)
        device, dtype = self.model.device, self.model.dtype
        loss = torch.tensor(float("nan"))
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, dtype=dtype if dtype in HALF else None, enabled=dtype in HALF),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            for step in range(steps if self.texts else 0):
                batch = {name: values.to(device) for name, values in self._batch(newest=step == 0).items()}
                loss = student.loss(student.network, batch, drafter_loss, 1.0, step, steps)
                # not backward(), which would leave gradients in the target as well
                for weight, gradient in zip(
                    weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True
                ):
                    weight.grad = gradient
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        forget_promises(self.model, self.drafter)
        return float(loss.detach())

    def _batch(self, newest: bool) -> dict[str, torch.Tensor]:
        count = min(self.batch_size, len(self.texts))
        places = list(range(len(self.texts) - count, len(self.texts)))
        if not newest:
            places = torch.randperm(len(self.texts), generator=self.order)[:count].tolist()
        rows = []
        for place in places:
            text, prompt_length = self.texts[place]
            tokens = torch.tensor(text)
            labels = tokens.clone()
            labels[:prompt_length] = IGNORED
            rows.append((tokens, labels))
        return Answers.collate(rows)

    def refresh_every(self, training_steps: int, steps: int = 4) -> TrainerCallback:
        """A callback of transformers' Trainer, and so of TRL's: `refresh(steps)` after so many training steps."""
        return EveryFewSteps(training_steps, partial(self.refresh, steps))


class EveryFewSteps(TrainerCallback):
    """Calls `call` after each so many steps of a training."""

    def __init__(self, every: int, call: Callable[[], object]):
        self.every, self.call = every, call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.call()
