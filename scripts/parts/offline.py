"""What a drafter would do on given answers, exactly, from one teacher-forced pass of the target.

The drafts of all positions are known at once. Greedy decoding takes the answer itself, so the walk that decoding makes
can be read off: accept slots while they match, add the target's own token, go on from there.
"""

from __future__ import annotations

import torch

from specformer.generation.backend_linear import fast_linears
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.confidence import BINS, calibration, count_by_confidence
from specformer.scripts.parts.decoded import bootstrap_interval
from specformer.scripts.parts.kinds.student import Student
from specformer.scripts.parts.losses import IGNORED, drafter_loss, slot_labels


def walk(matches: list[int], first: int, length: int, num_assistant_tokens: int) -> list[int]:
    """Drafts accepted in each pass of greedy decoding.

    Args:
        matches: how many leading slots are right at each position of the text.
        first: position of the answer's first token, which the prompt pass writes.
        length: tokens of the answer.
    """
    accepted, written = [], 1
    while written < length:
        read = first + written - 2  # the target has read all but the newest token
        count = min(matches[read], num_assistant_tokens, length - written - 1)
        accepted.append(count)
        written += count + 1
    return accepted


def evaluate_answers(student: Student, answers, tasks: list[str], batch_size: int) -> dict[str, dict]:
    """What the network of `student` would do on `answers`, for every draft length: all of them, and those of each task.

    Args:
        tasks: of each answer.
    """
    from tqdm import tqdm

    lengths = list(range(1, student.num_draft_tokens + 1))
    progress, sums = tqdm(total=len(answers), unit="answer"), {}
    walks: dict[str, list[list[int]]] = {}
    with fast_linears(student.target, student.network, student.rows):
        for task in dict.fromkeys(tasks):
            rows = [index for index, other in enumerate(tasks) if other == task]
            rows.sort(key=lambda index: len(answers[index][0]))  # texts of one length waste no padding
            loader = torch.utils.data.DataLoader(
                torch.utils.data.Subset(answers, rows), batch_size, collate_fn=Answers.collate
            )
            walks[task] = []
            sums[task] = evaluate_offline(student, loader, lengths, walks[task])
            progress.update(len(rows))
    progress.close()

    def figures(sums: torch.Tensor, walks: list[list[int]], count: int) -> dict:
        tokens, *passes = zip(*walks, strict=True)
        intervals = {
            f"tokens_per_pass_k{k}_95": bootstrap_interval(tokens, of_k)
            for k, of_k in zip(lengths, passes, strict=True)
        }
        return {**summarise(sums, lengths), **intervals, "answers": count}

    everything = sum(sums.values(), torch.zeros((), device="cpu"))
    return {
        "all": figures(everything, [walk for each in walks.values() for walk in each], len(tasks)),
        "tasks": {task: figures(sums[task], walks[task], tasks.count(task)) for task in sums},
    }


@torch.no_grad()
def evaluate_offline(
    student: Student, loader, draft_lengths: list[int], walks: list[list[int]] | None = None
) -> torch.Tensor:
    """Sums over `loader`, to be added up over processes and read by `summarise`.

    A vector: labels, their loss; positions and hits of each slot; of a student that `has_confidence` what
    `count_by_confidence` counts; tokens, passes of each draft length. The last of these is the number of slots. The
    tokens of each answer that passes write, and the passes of each draft length, are added to `walks`.
    """
    slots, device = student.num_draft_tokens, student.device
    head = torch.zeros(2, dtype=torch.float64)
    counts, hits = torch.zeros(slots, dtype=torch.float64), torch.zeros(slots, dtype=torch.float64)
    decoded = torch.zeros(len(draft_lengths), 2, dtype=torch.float64)
    confident = torch.zeros(slots if student.has_confidence else 0, BINS, 3, dtype=torch.float64)
    for batch in loader:
        batch = {name: values.to(device) for name, values in batch.items()}
        drafts = student.drafts(student.network, batch)
        kept = drafts.labels != IGNORED
        count = int((student.head.draft_labels(drafts.labels) != IGNORED).sum())
        head += torch.tensor([count, count * float(drafter_loss(drafts.states, drafts.labels, student.head))])
        if student.has_confidence:
            predicted, right, _ = student.confidences(drafts)
            confident += count_by_confidence(predicted, right, drafts.labels)
        else:
            right = student.right(drafts)
        counts += kept.sum(dim=0).cpu()
        hits += right.sum(dim=0).cpu()
        answer = batch["labels"] != IGNORED
        matches = torch.zeros_like(batch["labels"])
        matches[(slot_labels(batch["labels"], slots) != IGNORED).any(dim=2)] = right.long().cumprod(1).sum(1)
        matches = matches.tolist()
        for row, first, length in zip(matches, answer.long().argmax(1).tolist(), answer.sum(1).tolist(), strict=True):
            if length > 1:
                passes = [len(walk(row, first, length, k)) for k in draft_lengths]
                decoded += torch.tensor([[length - 1, count] for count in passes], dtype=torch.float64)
                if walks is not None:
                    walks.append([length - 1, *passes])
    return torch.cat([head, counts, hits, confident.flatten(), decoded.flatten()])


def summarise(sums: torch.Tensor, draft_lengths: list[int]) -> dict[str, float]:
    """Loss, share of right choices per slot, tokens per target pass of greedy decoding per draft length, and how good
    confidences are, where the drafter has them."""
    decoded, slots = 2 * len(draft_lengths), draft_lengths[-1]
    sizes = [2, slots, slots, len(sums) - 2 - 2 * slots - decoded, decoded]
    head, counts, hits, confident, decoded = sums.double().cpu().split(sizes)
    accuracy = (hits / counts.clamp(min=1)).tolist()
    return {
        "loss": float(head[1] / head[0].clamp(min=1)),
        **{f"accuracy_slot_{slot}": value for slot, value in enumerate(accuracy)},
        **{
            f"tokens_per_pass_k{k}": float(tokens / passes.clamp(min=1))
            for k, (tokens, passes) in zip(draft_lengths, decoded.view(-1, 2), strict=True)
        },
        **calibration(confident.view(-1, BINS, 3)),
    }
