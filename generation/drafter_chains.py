"""Drafts without a model: the likeliest chain or tree of tokens by what followed each two (ADED, arXiv 2407.12021).

ADED searches a tree by visits and verifies the best of its paths as a tree; here a beam finds the likeliest tokens, or
the chain of the most expected ones: both are one and the same for the same table and text, so that no rule's text
depends on chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .argument import name_of
from .drafter import Drafter, Prompts, Verified
from .drafter_copying import MOST_COPIED
from .drafter_system import DraftingSystem, Parts
from .drafter_trigrams import Pair, TrigramTable, Votes
from .proposal import NO_TOKEN, Proposal


class TrigramChains(DraftingSystem):
    """Drafts what followed the newest two tokens, by a table that many calls share and adapt.

    Args:
        table: of the target's own answers, or an empty one; by default an empty one of its own.
    """

    def __init__(self, table: TrigramTable | None = None):
        if table is not None and not callable(getattr(table, "after", None)):
            raise ValueError(f"table is a {name_of(table)}; expected a TrigramTable.")
        self.table = TrigramTable() if table is None else table

    def drafter_for(self, target, parts: Parts) -> Drafter:
        self.table.check_fits(target)
        return ChainDrafter(self.table)


class RowTexts:
    """The rows' texts as trigrams see them: their newest two tokens, and votes of what each has written itself, prompt
    included. What is new is also learned by the table.

    Attributes:
        newest: the last two tokens of each row, fewer where it has fewer.
    """

    OWN_VOTE = 1.0  # beside the table's 0.3: a text repeats itself more than others
    MOST_PAIRS = 2**14  # of one row

    def __init__(self, table: TrigramTable, prompts: Prompts):
        self.table = table
        layout = prompts.layout
        rows = torch.cat([layout.compact(prompts.input_ids), prompts.first_tokens], dim=1).tolist()
        texts = [[*row[:length], row[-1]] for row, length in zip(rows, layout.host_lengths, strict=True)]
        self.votes = [Votes(self.OWN_VOTE, self.MOST_PAIRS) for _ in texts]
        for votes, text in zip(self.votes, texts, strict=True):
            votes.add(text)
        self.newest = [text[-2:] for text in texts]

    def update(self, verified: Verified) -> None:
        new = []
        rows = zip(verified.tokens.tolist(), verified.counts.tolist(), strict=True)
        for row, (tokens, count) in enumerate(rows):
            new.append([*self.newest[row], *tokens[:count]])
            self.votes[row].add(new[-1])
            self.newest[row] = new[-1][-2:]
        self.table.learn(new)

    def select_rows(self, index: torch.Tensor) -> None:
        kept = index.tolist()
        self.votes, self.newest = [self.votes[row] for row in kept], [self.newest[row] for row in kept]

    def chances(self, rows: list[int], pairs: list[Pair]) -> list[dict[int, float]]:
        """How likely tokens follow `pairs` in the texts of `rows`."""
        found = []
        for row, pair, weights in zip(rows, pairs, self.table.after(pairs), strict=True):
            for token, weight in self.votes[row].get(pair).items():
                weights[token] = weights.get(token, 0.0) + weight
            total = sum(weights.values()) + DOUBT
            found.append({token: weight / total for token, weight in weights.items()})
        return found


DOUBT = 0.25
"""Weight of all tokens that were never seen behind a pair."""


@dataclass
class Chain:
    """
    Attributes:
        pair: the last two tokens, of which the next one follows.
        reached: how likely all of it is.
        expected: how many of its tokens are accepted.
        before: the one that its last token was added to, `None` for an empty chain.
    """

    pair: Pair
    tokens: list[int]
    chances: list[float]
    reached: float = 1.0
    expected: float = 0.0
    before: Chain | None = None


class ChainDrafter(Drafter):
    """
    Args:
        table: what it draws on, and adapts.
    """

    WIDTH = 4  # chains that are gone on with
    sources = ("trigrams",)
    proposes_trees = True
    default_num_assistant_tokens = MOST_COPIED

    def __init__(self, table: TrigramTable):
        self.table = table

    def begin(self, prompts: Prompts) -> None:
        self.texts = RowTexts(self.table, prompts)
        self.device = prompts.input_ids.device

    def propose(self, num_tokens, choose) -> Proposal:
        chains = self._search(num_tokens)
        width = max(len(chain.tokens) for chain in chains)
        tokens = [chain.tokens + [NO_TOKEN] * (width - len(chain.tokens)) for chain in chains]
        chances = [chain.chances + [0.0] * (width - len(chain.tokens)) for chain in chains]
        shape = len(chains), width  # also where there is nothing
        return Proposal(
            torch.tensor(tokens, dtype=torch.long, device=self.device).view(shape),
            torch.tensor(chances, dtype=torch.float32, device=self.device).view(shape),
        )

    def propose_tree(self, num_tokens, tree_size, chances) -> Proposal:
        likeliest: list[list[Chain]] = [[] for _ in self.texts.newest]
        for row, chains in self._levels(num_tokens, tree_size):
            likeliest[row] = sorted([*likeliest[row], *chains], key=lambda chain: -chain.reached)[:tree_size]
        width = max(map(len, likeliest))
        tokens, told, parents = [], [], []
        for chains in likeliest:
            places, missing = {id(chain): place for place, chain in enumerate(chains)}, width - len(chains)
            tokens.append([chain.tokens[-1] for chain in chains] + [NO_TOKEN] * missing)
            told.append([chain.chances[-1] for chain in chains] + [0.0] * missing)
            parents.append([places.get(id(chain.before), -1) for chain in chains] + [-1] * missing)
        shape = len(likeliest), width
        return Proposal(
            torch.tensor(tokens, dtype=torch.long, device=self.device).view(shape),
            torch.tensor(told, dtype=torch.float32, device=self.device).view(shape),
            parents=torch.tensor(parents, dtype=torch.long, device=self.device).view(shape),
            depth=max((len(chain.tokens) for chains in likeliest for chain in chains), default=0),
        )

    def _search(self, num_tokens: int) -> list[Chain]:
        """The chain of the most expected tokens of each row, up to `num_tokens`."""
        best = [Chain((0, 0), [], []) for _ in self.texts.newest]
        for row, chains in self._levels(num_tokens, self.WIDTH):
            best[row] = max([best[row], *chains], key=lambda chain: chain.expected)
        return best

    def _levels(self, num_tokens: int, width: int) -> Iterator[tuple[int, list[Chain]]]:
        """Rows, and the `width` likeliest chains of each, by one token longer up to `num_tokens` times."""
        live: list[tuple[int, Chain]] = [
            (row, Chain((newest[0], newest[1]), [], []))
            for row, newest in enumerate(self.texts.newest)
            if len(newest) == 2
        ]
        for _ in range(num_tokens):
            found = self.texts.chances([row for row, _ in live], [chain.pair for _, chain in live]) if live else []
            longer: dict[int, list[Chain]] = {}
            for (row, chain), chances in zip(live, found, strict=True):
                longer.setdefault(row, []).extend(gone_on(chain, token, chance) for token, chance in chances.items())
            live = []
            for row, chains in longer.items():
                chains.sort(key=lambda chain: chain.reached, reverse=True)
                live += [(row, chain) for chain in chains[: self.WIDTH]]
                yield row, chains[:width]

    def update(self, verified: Verified) -> None:
        self.texts.update(verified)

    def select_rows(self, index, longest) -> None:
        self.texts.select_rows(index)


def gone_on(chain: Chain, token: int, chance: float) -> Chain:
    reached = chain.reached * chance
    return Chain(
        (chain.pair[1], token),
        [*chain.tokens, token],
        [*chain.chances, chance],
        reached,
        chain.expected + reached,
        chain,
    )
