"""Trees of drafts that know the answer: the path of an oracle's drafts somewhere in a tree of any shape."""

from __future__ import annotations

import random

import torch
from oracles import Oracle
from tiny import VOCAB

from specformer.generation.proposal import NO_TOKEN, Proposal


class OracleTree(Oracle):
    """An `Oracle` whose drafts are a path through a tree that is another one in every row and round. All else in it is
    wrong, also where it follows the path."""

    proposes_trees = True

    def __init__(self, *args, knows_depth: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.knows_depth, self.random = knows_depth, random.Random(5)

    def propose_tree(self, num_tokens, tree_size, chances) -> Proposal:
        places = zip(self.rows.tolist(), self.generated.tolist(), strict=True)
        right = [set(self.answer[row, start : start + num_tokens].tolist()) for row, start in places]
        rows = [self.tree(*each, tree_size) for each in zip(self.drafts(num_tokens).tolist(), right, strict=True)]
        tokens, parents, depths = zip(*rows, strict=True)
        depth = max(max(row) for row in depths) if self.knows_depth else None
        return Proposal(torch.tensor(tokens), parents=torch.tensor(parents), depth=depth)

    def tree(self, path: list[int], right: set[int], size: int) -> tuple[list[int], list[int], list[int]]:
        """Tokens, parents and depths of `size` nodes, among which are the first of `path`; no other is `right`."""
        on_path = sorted(self.random.sample(range(size), min(self.random.randint(1, len(path)), size)))
        tokens, parents, depths, newest = [], [], [], -1
        for place in range(size):
            if place in on_path:
                parent, token = newest, path[on_path.index(place)]
                newest = place
            else:
                parent = self.random.randrange(-1, place)
                wrong = set(range(VOCAB)) - right - set(path)
                token = self.random.choice([NO_TOKEN, *sorted(wrong)])
            tokens.append(token)
            parents.append(parent)
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return tokens, parents, depths
