"""The target's hidden states of training texts, computed once and kept in a file.

The target is most of the work of an epoch on a CPU. The file takes 2 * S * d bytes per token (S hooked states of width
d, in bfloat16): 3.5 kB for a 135M target, so this is for small runs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.distilled_states import DistilledStates, digest_of_target
from specformer.scripts.parts.kinds.student import ReadTarget, target_states
from specformer.scripts.parts.runs import writing
from specformer.scripts.parts.some_weights import STORED


class StoredStates(torch.utils.data.Dataset):
    """Texts, labels and hidden states (T, S, d) of the texts of `answers`.

    Several processes may hold the same file; each fills its share. What an interrupted run has filled is kept. States
    that `distill` kept are taken from where they are.

    Args:
        answers: of the target.
        path: of the file; `path`.done notes which texts are in it.

    Raises:
        RuntimeError: the disk has no room for the file. Nothing was computed yet.
    """

    def __init__(self, answers: Answers, borrowed: ReadTarget, path: Path):
        self.answers, self.borrowed, self.distilled = answers, borrowed, DistilledStates(answers, borrowed)
        # nothing is reserved for those that `distill` kept
        lengths = [len(answers[index][0]) * self.is_read(index) for index in range(len(answers))]
        self.ends = list(accumulate(lengths))
        shape = max(1, self.ends[-1]), len(borrowed.layer_ids), borrowed.text_config.hidden_size
        self.states = map_file(path, shape, STORED)
        self.done = map_file(path.with_name(path.name + ".done"), (len(lengths),), torch.uint8)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, labels = self.answers[index]
        distilled = self.distilled.get(index)
        return tokens, labels, self._place(index) if distilled is None else distilled

    def fill(self, texts: Sequence[int], process_index: int = 0, num_processes: int = 1) -> None:
        """Compute what is missing of this process's share of `texts`. A text is read alone, so that its states are the
        same whatever was computed before an interruption."""
        mine = [index for index in texts[process_index::num_processes] if not self.done[index] and self.is_read(index)]
        for index in tqdm(mine, desc="read answers", unit="text", disable=process_index > 0 or not mine):
            batch = Answers.collate([self.answers[index]])
            batch = {name: values.to(self.borrowed.target.device) for name, values in batch.items()}
            self._place(index).copy_(target_states(self.borrowed, batch)[0])
            self.done[index] = 1

    def is_read(self, index: int) -> bool:
        """Whether the states of a text are those of a pass over it, and not what `distill` kept."""
        return self.distilled.get(index) is None

    def _place(self, index: int) -> torch.Tensor:
        return self.states[self.ends[index - 1] if index else 0 : self.ends[index]]


def shared_file(folder: Path, answers: Answers, borrowed: ReadTarget) -> Path:
    """Where in `folder` the states of just these texts are, read by just this target at these layers; of those that
    `distill` kept there are none."""
    distilled = DistilledStates(answers, borrowed)
    digest = hashlib.sha256(digest_of_target(borrowed.target, borrowed.layer_ids).encode())
    for index in range(len(answers)):
        digest.update(repr(answers[index][0].tolist() if distilled.get(index) is None else None).encode())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest.hexdigest()[:16]}.bin"


def map_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose memory is the file `path`, made with zeros where it is not there yet."""
    count = torch.Size(shape).numel()
    with writing(path), open(path, "ab") as file:
        size = count * dtype.itemsize
        if hasattr(os, "posix_fallocate"):
            # All at once: a full disk would otherwise end the process without a word when memory is written.
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # on macOS and Windows
            file.truncate(max(size, file.tell()))
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
