"""Which tokens a drafter's logits propose, and which tokens the target takes at the drafted positions.

Logits become scores as in plain generate(), through its processors; the acceptance rule turns scores into tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from .accept_processors import Processors
from .accept_rules import AcceptanceRule
from .accept_sampling import best_tokens, count_accepted
from .argument import name_of
from .proposal import NO_TOKEN, Proposal, check_proposal, first_path
from .proposal_tree import DraftTree, along
from .ranks import shared_ranks
from .text import Text
from .text_outputs import StepOutputs
from .text_positions import Positions


@dataclass(frozen=True)
class BestDrafts:
    """What `TokenChoice.of_drafter` computes where the highest logit is the draft: a function of tensors alone."""

    vocab_size: int

    def __call__(
        self, logits: torch.Tensor, ahead: int | torch.Tensor = 0, token_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        if token_ids is None:
            logits = logits[..., : self.vocab_size]
        return best_tokens(logits.float(), token_ids)


class TokenChoice:
    """
    Args:
        logits, scores: where to keep the target's, if the caller wants them.
    """

    def __init__(
        self,
        rule: AcceptanceRule,
        processors: Processors,
        text: Text,
        logits: StepOutputs | None = None,
        scores: StepOutputs | None = None,
    ):
        self.rule, self.processors, self.text = rule, processors, text
        self.logits, self.scores = logits, scores
        self.vocab_size = 0  # of the target's logits, known from the first ones
        self.proposals: list[torch.Tensor | None] = []  # what this round's drafts were sampled from

    @property
    def for_drafter(self) -> Callable[..., torch.Tensor]:
        """What a drafter chooses with."""
        if self.rule.takes_the_best and not self.processors.prefix_free:
            return BestDrafts(self.vocab_size)
        return self.of_drafter

    def of_drafter(
        self, logits: torch.Tensor, ahead: int | torch.Tensor = 0, token_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draft tokens (R, n) from a drafter's logits (R, n, C), for the positions from `ahead` drafts on.

        The logits are of `token_ids`, (C,) or (R, n, C), or of the whole vocabulary, which may be padded to another
        size than the target's. Only prefix-free processors are applied: the others would have to be called row by row,
        and drafts need not be exact.
        """
        logits = logits.to(device=self.text.ids.device, dtype=torch.float32)
        if token_ids is None:
            logits = functional.pad(logits, (0, self.vocab_size - logits.shape[-1]), value=-torch.inf)
        else:
            token_ids = token_ids.to(logits.device).expand(logits.shape)
        if token_ids is not None and self.processors.know_tokens:
            # low, not -inf: a processor may forbid all of `token_ids`, and others fail where nothing is left
            everywhere = (logits.amin(dim=-1, keepdim=True) - 1e4).repeat(1, 1, self.vocab_size)
            logits, token_ids = everywhere.scatter_(-1, token_ids, logits), None
        positions = self.text.positions(logits.shape[1], ahead)
        if (few := self.processors.leave_few(logits)) is not None:
            scores = few.scores
            token_ids = few.token_ids if token_ids is None else token_ids.gather(-1, few.token_ids)
        else:
            scores = self.processors.warp(logits)
        drafts, proposals = self.rule.draft(scores, positions, self.vocab_size, token_ids)
        if token_ids is not None:
            drafts = token_ids.gather(-1, drafts[..., None])[..., 0]
            if proposals is not None:
                everywhere = proposals.new_zeros(*proposals.shape[:-1], self.vocab_size)
                proposals = everywhere.scatter_(-1, token_ids, proposals)
        self.proposals.append(proposals)
        return drafts

    def chances(
        self, logits: torch.Tensor, ahead: int, token_ids: torch.Tensor, confidence: torch.Tensor | None = None
    ) -> torch.Tensor:
        """How likely the target takes each of `token_ids` (R, w, C) at the position that `ahead` drafts are in front
        of, for all that a drafter's logits of them say after w beginnings: logarithms, (R, w, C). `confidence` (R, w):
        that the best of them is the target's best, if the drafter knows."""
        device = self.text.ids.device
        logits, token_ids = logits.to(device, torch.float32), token_ids.to(device).expand(logits.shape)
        scores = logits if self.processors.know_tokens else self.processors.warp(logits)
        positions = self.text.positions(1, ahead)
        positions = Positions(*(part.expand(-1, logits.shape[1]) for part in (positions.rows, positions.steps)))
        return self.rule.chances(scores, positions, self.vocab_size, token_ids, confidence)

    def checked(self, proposal: Proposal, drafter, num_tokens: int, tree_size: int = 0) -> Proposal:
        """What is verified of a `drafter`'s proposal for `num_tokens`, on the text's device: a chain, or a tree of up
        to `tree_size` tokens where one was asked for.

        Raises:
            ValueError: what a broken drafter gave, or a tree whose tokens this rule cannot tell from a chain's.
        """
        check_proposal(proposal, drafter, len(self.text.rows), tree_size or num_tokens, self.vocab_size)
        device, optional = self.text.ids.device, ("confidences", "probabilities", "parents", "depth", "sources")
        # it may be of another copy of its class
        proposal = Proposal(proposal.tokens.to(device), *(getattr(proposal, name, None) for name in optional))
        if proposal.parents is not None:
            proposal.parents = proposal.parents.to(device)
            if any(each is not None for each in self.proposals):
                raise ValueError(
                    f"The drafter {name_of(drafter)} proposed a tree, and acceptance='rejection' needs to know what "
                    "each token was sampled from: propose probabilities instead of calling choose(), or no parents."
                )
            if not tree_size:
                proposal = first_path(proposal)
        if proposal.probabilities is not None:
            self.proposals[:] = [proposal.probabilities.to(self.text.ids.device, torch.float32)]
        return proposal

    def readable(self, drafts: torch.Tensor) -> torch.Tensor:
        """Drafts as the target can read them: a token also where there is none."""
        return drafts.clamp(min=0, max=self.vocab_size - 1)

    def of_target(
        self, logits: torch.Tensor, drafts: torch.Tensor, tree: DraftTree | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The target's tokens (R, k + 1) from its logits (R, k + 1, V) after `drafts` (R, k), and how many drafts it
        accepts (R,): they are the first of its tokens. Tokens after a wrong draft mean nothing.

        Of a `tree` the target takes one path: tokens (R, depth + 1), or fewer where no row accepts as many, and the
        places of the block that it goes through, of the same shape.
        """
        self.vocab_size = logits.shape[-1]
        # generate() casts before processors and argmax, on the device of the text
        logits = logits.to(drafts.device)
        if tree is None or self.processors.need_prefix:
            logits = logits.float()
        if tree is not None:
            self.proposals.clear()
            descend = self._walk if self.processors.need_prefix else self._descend
            tokens, accepted, path = descend(logits, tree)
            if self.logits is not None:
                self.logits.write(along(logits, path).float(), self.text.positions(path.shape[1]))
            return tokens, count_accepted(accepted[:, :-1]), path
        if self.logits is not None:
            self.logits.write(logits, self.text.positions(logits.shape[1]))
        drafts = functional.pad(drafts, (0, 1), value=NO_TOKEN)
        proposals = None
        if sampled_from := [each for each in self.proposals if each is not None]:
            proposals = torch.cat(sampled_from, dim=1)[:, : drafts.shape[1] - 1]
            proposals = functional.pad(proposals, (0, 0, 0, 1))
        self.proposals.clear()
        if self.processors.need_prefix:
            tokens, accepted, _ = self._walk(logits, drafts, proposals)
        else:
            tokens, accepted = self._take(logits, drafts, proposals)
        return tokens, count_accepted(accepted[:, :-1]), None

    def finish(self) -> None:
        self.rule.finish(self.text.stops.limit, self.vocab_size)

    def _descend(self, logits, tree):
        """Down a tree, from the newest token on to the child that is the target's token: one position after the other,
        of all rows. Of most logits nothing is asked, so that they are left as they are."""
        nodes = torch.zeros_like(tree.parents[:, :1])
        tokens, accepted, path = [], [], []
        # a CPU tells at once that no row goes further; of several processes one alone may find that
        tells = nodes.device.type == "cpu" and shared_ranks() is None
        for ahead in range(tree.depth + 1):
            path.append(nodes)
            token, _ = self._take(along(logits, nodes).float(), torch.full_like(nodes, NO_TOKEN), None, ahead)
            children, found = tree.children(nodes, token)
            tokens.append(token)
            accepted.append(found)
            if tells and not found.any():
                break
            nodes = torch.where(found, children, nodes)
        return tuple(torch.cat(parts, dim=1) for parts in (tokens, accepted, path))

    def _take(self, logits, drafts, proposals, ahead=0):
        """All positions at once, from `ahead` tokens after the text on."""
        positions = self.text.positions(logits.shape[1], ahead)
        few = self.processors.leave_few(logits) if self.rule.takes_few and self.scores is None else None
        if few is not None:
            tokens, accepted = self._take_few(few, logits, drafts, positions)
        else:
            scores = self.processors.warp(logits)
            if self.scores is not None:
                self.scores.write(scores, positions)
            tokens, accepted = self.rule.take(scores, drafts, proposals, positions)
        return self.text.pad_stopped(tokens), accepted | self.text.device_stopped[:, None]

    def _take_few(self, few, logits, drafts, positions):
        """From a few scores, and from all of them where those are not sure."""
        tokens, sure = self.rule.take_few(few, positions, self.vocab_size)
        accepted = tokens == drafts
        if not sure.all():
            scores = self.processors.warp_all(logits[~sure])
            doubtful = positions[(~sure).cpu()][:, None]
            taken = self.rule.take(scores[:, None], drafts[~sure][:, None], None, doubtful)
            tokens[~sure], accepted[~sure] = (part[:, 0] for part in taken)
        return tokens, accepted

    def _walk(self, logits, drafts, proposals=None):
        """Position by position, for the rows whose drafts, a chain or a tree, were right so far: the target's tokens,
        whether they are drafts, and the places of the block where they were asked for.

        A processor that reads the text is only ever called on text that plain generate() would show it, one call per
        distinct length. This costs a synchronisation per position.
        """
        text, tree = self.text, drafts if isinstance(drafts, DraftTree) else None
        width = logits.shape[1] if tree is None else tree.depth + 1
        tokens = torch.zeros(len(text.rows), width, dtype=torch.long, device=logits.device)
        accepted, path = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens)
        if tree is None:
            path += torch.arange(width, device=path.device)
        full = logits.new_zeros(text.batch_size, logits.shape[-1])  # scores in the order of the original batch
        live = [
            place
            for place, row in enumerate(text.rows)
            if text.is_running(row) and text.generated[row] < text.stops.limit_of(row)
        ]
        for ahead in range(width):
            for length in sorted({text.generated[text.rows[place]] for place in live}):
                places = [place for place in live if text.generated[text.rows[place]] == length]
                rows = [text.rows[place] for place in places]
                positions = Positions.at(rows, length + ahead)
                full[rows] = logits[places, path[places, ahead]]
                with text.stops.in_step.watch(self.processors.unknown):
                    # plain generate() asks about rows that have stopped as well, and so about all that keep step
                    wanted = rows if text.stops.in_step.reason is None else None
                    scores = self.processors.read(text.first_columns(length + ahead), full.clone(), wanted)[rows]
                if self.scores is not None:
                    self.scores.write(scores[:, None], positions)
                here = slice(ahead, ahead + 1)
                proposal = None if proposals is None else proposals[places, here]
                drafted = tokens[places, here].fill_(NO_TOKEN) if tree is not None else drafts[places, here]
                taken = self.rule.take(scores[:, None], drafted, proposal, positions)
                tokens[places, here], accepted[places, here] = taken
            tokens[:, ahead] = text.pad_stopped(tokens[:, ahead : ahead + 1])[:, 0]
            if tree is not None:
                children, found = tree.children(path[:, ahead, None], tokens[:, ahead, None])
                accepted[:, ahead] = found[:, 0]
                path[:, ahead + 1 :] = torch.where(found, children, path[:, ahead, None])
            else:
                accepted[:, ahead] |= text.device_stopped
            if ahead + 1 < width:
                goes_on = (accepted[:, ahead] & ~text.ends(tokens[:, ahead : ahead + 1])[:, 0]).tolist()
                live = [
                    place
                    for place, row in enumerate(text.rows)
                    if place in live and goes_on[place] and text.generated[row] + ahead + 1 < text.stops.limit_of(row)
                ]
                text.write_ahead(live, ahead, tokens)
                live = text.stops.going_on(text, live, ahead)
        return tokens, accepted, path
