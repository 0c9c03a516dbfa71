"""What a drafter would do on given answers, exactly, from one teacher-forced pass of the target.

The drafts of all positions are known at once. Greedy decoding takes the answer itself, so the walk that decoding makes
can be read off: accept slots while they match, add the target's own token, go on from there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from specformer.configuration_specformer import SpecFormerConfig
from specformer.generation.accept_sampling import best_tokens
from specformer.generation.backend_linear import fast_linears
from specformer.generation.target_states import HiddenStates, stacked
from specformer.scripts.parts.answers import Answers
from specformer.scripts.parts.confidence import BINS, calibration, count_by_confidence
from specformer.scripts.parts.decoded import bootstrap_interval
from specformer.scripts.parts.losses import IGNORED, Verifiers, drafter_loss, slot_labels
from specformer.target_specformer import BorrowedTarget


def network_of(drafter: nn.Module) -> Any:
    """The SpecFormerModel in what accelerate may have wrapped it in."""
    return getattr(drafter, "module", drafter)


def drafter_config(drafter: nn.Module) -> SpecFormerConfig:
    return network_of(drafter).config


@torch.no_grad()
def target_states(borrowed: BorrowedTarget, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a drafter reads of the target over whole texts: (B, T, len(target_layer_ids), d)."""
    with HiddenStates(borrowed.target, borrowed.layer_ids) as hidden:
        borrowed.target.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
    return stacked(borrowed.target, borrowed.layer_ids, hidden.seen, borrowed.device)


class Drafts(NamedTuple):
    """Teacher-forced drafts of N positions.

    Attributes:
        states: from which tokens are chosen, corrected by the tokens in front of them where the drafter does that,
            (N, D, d).
        labels: (N, D), IGNORED past the end.
        first_states: before the correction, (N, D, d).
        verifiers: of the slots, where the drafter reads the target's last hidden states.
    """

    states: torch.Tensor
    labels: torch.Tensor
    first_states: torch.Tensor
    verifiers: Verifiers | None = None


def in_front(values: torch.Tensor, num_slots: int) -> torch.Tensor:
    """What slot j at position n has in front of it, which is at position n + 1 + j: (B, T) -> (B, T, D), 0 past the
    end."""
    return functional.pad(values, (0, num_slots))[:, 1:].unfold(1, num_slots, 1)


def drafts_of_text(
    drafter: nn.Module, borrowed: BorrowedTarget, batch: dict[str, torch.Tensor], position_share: float = 1.0
) -> Drafts:
    """Drafts of the positions of `batch` that have something to draft, or of a random share of them."""
    dtype, config = next(drafter.parameters()).dtype, drafter_config(drafter)
    hidden_states = batch["hidden_states"] if "hidden_states" in batch else target_states(borrowed, batch)
    anchors = None
    if config.reads_anchor_token:
        with torch.no_grad():
            anchors = borrowed.embed(functional.pad(batch["input_ids"][:, 1:], (0, 1))).to(dtype)
    slots = config.num_draft_tokens
    labels = slot_labels(batch["labels"], slots)
    wanted = (labels != IGNORED).any(dim=2)
    if position_share < 1:
        wanted = wanted & (torch.rand(wanted.shape, device=wanted.device) < position_share)
    previous = verifiers = None
    if config.previous_token_rank is not None:
        with torch.no_grad():
            previous = borrowed.embed(in_front(batch["input_ids"], slots)[wanted]).to(dtype)
    if config.reads_last_states:
        positions = torch.arange(wanted.numel(), device=wanted.device).view(wanted.shape)
        verifiers = Verifiers(hidden_states[:, :, -1].flatten(0, 1), in_front(positions, slots)[wanted])
    output = drafter(hidden_states.to(dtype), anchors, draft_positions=wanted, previous_embeds=previous)
    first, corrected = output.draft_hidden_states, output.corrected_hidden_states
    return Drafts(first if corrected is None else corrected, labels[wanted], first, verifiers)


@torch.no_grad()
def choices(drafts: Drafts, borrowed: BorrowedTarget, config: SpecFormerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots greedy decoding gets right once the tokens in front of them are, bool (N, D), and the logits of their
    candidates (N, D, C), 0 where there is no label."""
    kept, dtype = drafts.labels != IGNORED, borrowed.target.dtype
    tokens, logits = [], []
    chunks = (part[kept].to(dtype).split(1024) for part in (drafts.states, drafts.first_states))
    for states, first in zip(*chunks, strict=True):
        places = borrowed.candidates(first, config.num_candidates)  # the best one first
        tokens.append(borrowed.tokens_at(places[..., 0]))
        logits.append(borrowed.candidate_logits(states, places))
        if config.previous_token_rank is not None:
            tokens[-1] = best_tokens(logits[-1], borrowed.tokens_at(places))
    right, logits = torch.zeros_like(kept), torch.cat(logits)
    right[kept] = torch.cat(tokens) == drafts.labels[kept]
    return right, logits.new_zeros(*kept.shape, logits.shape[-1]).masked_scatter(kept[..., None], logits)


def confidences(
    drafter: nn.Module, drafts: Drafts, borrowed: BorrowedTarget, every: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a drafter's confidences, whether the drafts are right, and the labels, (N, D) each; of every so many of
    the positions. No gradient of them reaches the drafts: these are not bent to please them."""
    states, labels, first = (part[::every].detach() for part in drafts[:3])
    some = Drafts(states, labels, first)
    right, logits = choices(some, borrowed, drafter_config(drafter))
    return network_of(drafter).confidence_head(some.states, logits), right, some.labels


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


def evaluate_answers(
    drafter: nn.Module, borrowed: BorrowedTarget, answers: Answers, tasks: list[str], batch_size: int
) -> dict[str, dict]:
    """What `drafter` would do on `answers`, for every draft length: all of them, and those of each task.

    Args:
        tasks: of each answer.
    """
    from tqdm import tqdm

    lengths = list(range(1, drafter_config(drafter).num_draft_tokens + 1))
    progress, sums = tqdm(total=len(answers), unit="answer"), {}
    walks: dict[str, list[list[int]]] = {}
    with fast_linears(borrowed.target, drafter, borrowed.rows):
        for task in dict.fromkeys(tasks):
            rows = [index for index, other in enumerate(tasks) if other == task]
            rows.sort(key=lambda index: len(answers[index][0]))  # texts of one length waste no padding
            loader = torch.utils.data.DataLoader(
                torch.utils.data.Subset(answers, rows), batch_size, collate_fn=Answers.collate
            )
            walks[task] = []
            sums[task] = evaluate_offline(drafter, borrowed, loader, lengths, walks[task])
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
    drafter: nn.Module,
    borrowed: BorrowedTarget,
    loader,
    draft_lengths: list[int],
    walks: list[list[int]] | None = None,
) -> torch.Tensor:
    """Sums over `loader`, to be added up over processes and read by `summarise`.

    A vector: labels, their loss; positions and hits of each slot; of a drafter with `confidence_head` what
    `count_by_confidence` counts; tokens, passes of each draft length. The last of these is the number of slots. The
    tokens of each answer that passes write, and the passes of each draft length, are added to `walks`.
    """
    config = drafter_config(drafter)
    slots, device = config.num_draft_tokens, borrowed.device
    head = torch.zeros(2, dtype=torch.float64)
    counts, hits = torch.zeros(slots, dtype=torch.float64), torch.zeros(slots, dtype=torch.float64)
    decoded = torch.zeros(len(draft_lengths), 2, dtype=torch.float64)
    confident = torch.zeros(slots if config.confidence_head else 0, BINS, 3, dtype=torch.float64)
    for batch in loader:
        batch = {name: values.to(device) for name, values in batch.items()}
        drafts = drafts_of_text(drafter, borrowed, batch)
        kept = drafts.labels != IGNORED
        count = int((borrowed.draft_labels(drafts.labels) != IGNORED).sum())
        head += torch.tensor([count, count * float(drafter_loss(drafts.states, drafts.labels, borrowed))])
        if config.confidence_head:
            predicted, right, _ = confidences(drafter, drafts, borrowed)
            confident += count_by_confidence(predicted, right, drafts.labels)
        else:
            right, _ = choices(drafts, borrowed, config)
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
