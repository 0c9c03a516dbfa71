"""Which tokens follow which two: counted from texts, and adapted while texts are written (ADED, arXiv 2407.12021).

As in ADED a successor's weight is its share of the counted ones, and each time that it is written it gains, up to a
bound. ADED adds 0.04 in every round in which a trigram is among the newest 16 tokens; here it gains about as much as
that sums to, once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .argument import whole_number
from .drafter_suffixes import in_one
from .proposal import NO_TOKEN

FORMAT = "specformer trigrams 1"
MOST_SUCCESSORS = 12
"""Of a pair of tokens: the likeliest are kept."""
SHIFT = 31
"""A pair is one number: its first token shifted by so many bits, and its second."""

Pair = tuple[int, int]


class Votes:
    """What was written behind pairs of tokens: weights that grow by `vote` each time, up to `MOST`.

    Args:
        most_pairs: how many are remembered: those that were written last.
    """

    MOST = 3.0

    def __init__(self, vote: float, most_pairs: int):
        self.vote, self.most_pairs = vote, most_pairs
        self.weights: dict[int, dict[int, float]] = {}  # the pair that was written last is the last one

    def add(self, text: list[int]) -> None:
        """For each token of `text` but the first two, behind these."""
        for first, second, token in zip(text, text[1:], text[2:], strict=False):
            pair = first << SHIFT | second
            weights = self.weights.pop(pair, {})
            weights[token] = min(weights.get(token, 0.0) + self.vote, self.MOST)
            if len(weights) > MOST_SUCCESSORS:
                del weights[min(weights, key=lambda token: weights[token])]
            self.weights[pair] = weights
            if len(self.weights) > self.most_pairs:
                del self.weights[next(iter(self.weights))]

    def get(self, pair: Pair) -> dict[int, float]:
        return self.weights.get(pair[0] << SHIFT | pair[1], {})


class TrigramTable:
    """What follows pairs of tokens.

    One object serves any number of calls and threads, all of which add to what it learns.

    Args:
        max_adapted_pairs: pairs of which it learns while texts are written; those that were written last are kept.
        frozen: whether it learns nothing; may be set at any time.

    Attributes:
        largest_token: of all that it holds, NO_TOKEN at first.
    """

    VOTE = 0.3

    def __init__(self, max_adapted_pairs: int = 2**16, frozen: bool = False):
        if (whole_number(max_adapted_pairs) or 0) < 1:
            raise ValueError(
                f"max_adapted_pairs is {max_adapted_pairs!r}; expected a positive integer. A table that is to learn "
                "nothing is made with frozen=True."
            )
        self.frozen = frozen
        self.pairs = torch.empty(0, dtype=torch.int64, device="cpu")  # (N,), sorted
        self.successors = torch.empty(0, MOST_SUCCESSORS, dtype=torch.int32, device="cpu")  # (N, 12), or NO_TOKEN
        self.shares = torch.empty(0, MOST_SUCCESSORS, device="cpu")  # (N, 12)
        self._votes = Votes(self.VOTE, int(max_adapted_pairs))
        self.largest_token = NO_TOKEN
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many pairs were counted."""
        return len(self.pairs)

    def check_fits(self, target) -> None:
        """
        Raises:
            ValueError: it is of another tokenizer than `target`.
        """
        size = target.config.get_text_config(decoder=True).vocab_size
        if self.largest_token >= size:
            raise ValueError(
                f"The table holds the token {self.largest_token}, and the target has {size} tokens: it is of another "
                "tokenizer. Pass a table that was counted from this target's answers."
            )

    def count(self, texts: list[list[int]]) -> None:
        """Count `texts`, lists of token ids, in place of what was counted before. What was learned stays.

        Raises:
            ValueError: what is no token.
        """
        tokens = in_one(texts).long()
        if len(tokens) and int((tokens < 0).sum()) != len(texts):
            raise ValueError("A text has negative token ids; expected ids of a vocabulary, without padding.")
        first, second, third = tokens[:-2], tokens[1:-1], tokens[2:]
        whole = (first >= 0) & (second >= 0) & (third >= 0)
        pairs, place = torch.unique((first[whole] << SHIFT) | second[whole], return_inverse=True)
        if not len(pairs):
            raise ValueError("There is no text of three tokens or more, so there is nothing to count.")
        size = int(third.max()) + 1
        trigrams, counts = torch.unique(place * size + third[whole], return_counts=True)
        of_pair, token = trigrams // size, trigrams % size
        order = counts.argsort(descending=True, stable=True)
        order = order[of_pair[order].argsort(stable=True)]  # pair by pair, the most frequent first
        of_pair, token, counts = of_pair[order], token[order], counts[order]
        totals = torch.zeros_like(pairs).index_add(0, of_pair, counts)
        rank = torch.arange(len(of_pair), device="cpu") - torch.searchsorted(of_pair, of_pair)
        kept = rank < MOST_SUCCESSORS
        of_pair, token, counts, rank = of_pair[kept], token[kept], counts[kept], rank[kept]
        successors = torch.full((len(pairs), MOST_SUCCESSORS), NO_TOKEN, dtype=torch.int32, device="cpu")
        shares = torch.zeros(len(pairs), MOST_SUCCESSORS, device="cpu")
        successors[of_pair, rank] = token.int()
        shares[of_pair, rank] = counts.float() / totals[of_pair]
        with self._lock:
            self.pairs, self.successors, self.shares = pairs, successors, shares
            self.largest_token = max(self.largest_token, int(tokens.max()))

    def learn(self, texts: Iterable[list[int]]) -> None:
        """Texts were written: for each of their tokens but the first two, what stands in front of it is known."""
        if self.frozen:
            return
        with self._lock:
            for text in texts:
                self._votes.add(text)
                self.largest_token = max(self.largest_token, *text)

    def forget(self) -> None:
        """What was learned; not what was counted."""
        with self._lock:
            self._votes = Votes(self.VOTE, self._votes.most_pairs)

    def after(self, pairs: list[Pair]) -> list[dict[int, float]]:
        """The weights of what follows each pair."""
        found: list[dict[int, float]] = [{} for _ in pairs]
        with self._lock:
            known, successors, shares = self.pairs, self.successors, self.shares
            votes = [dict(self._votes.get(pair)) for pair in pairs]
        if len(known):
            keys = torch.tensor([first << SHIFT | second for first, second in pairs], dtype=torch.int64, device="cpu")
            at = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
            for place in (known[at] == keys).nonzero()[:, 0].tolist():
                rows = successors[at[place]].tolist(), shares[at[place]].tolist()
                found[place] = {token: share for token, share in zip(*rows, strict=True) if token != NO_TOKEN}
        for weights, more in zip(found, votes, strict=True):
            for token, weight in more.items():
                weights[token] = weights.get(token, 0.0) + weight
        return found

    def save(self, path: str | Path) -> None:
        """Keep what was counted and learned in a file, in one step.

        Raises:
            OSError: it cannot be written. What was there before is safe.
        """
        path = Path(path)
        with self._lock:
            learned = [
                (pair, token, weight)
                for pair, weights in self._votes.weights.items()
                for token, weight in weights.items()
            ]
            tensors = {"pairs": self.pairs, "successors": self.successors, "shares": self.shares}
        pairs, tokens, weights = ([row[column] for row in learned] for column in range(3))
        tensors["learned_pairs"] = torch.tensor(pairs, dtype=torch.int64, device="cpu")
        tensors["learned_tokens"] = torch.tensor(tokens, dtype=torch.int32, device="cpu")
        tensors["learned_weights"] = torch.tensor(weights, dtype=torch.float32, device="cpu")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            about = {
                "format": FORMAT,
                "max_adapted_pairs": str(self._votes.most_pairs),
                "largest_token": str(self.largest_token),
            }
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, about)
            os.replace(temporary, path)
        except Exception as error:  # safetensors has errors of its own for a full disk
            temporary.unlink(missing_ok=True)
            raise OSError(f"{path} could not be written ({error}); what was there before is safe.") from error

    @classmethod
    def load(cls, path: str | Path, frozen: bool = False) -> TrigramTable:
        """What `save`, or `specformer store --trigrams`, left. What was counted is memory-mapped.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or no table.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there. Make it with `specformer store --trigrams --data <answers> --output {path}`."
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ValueError(f"its format is {about.get('format')!r}, expected {FORMAT!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            table = cls(int(about["max_adapted_pairs"]), frozen)
            table.pairs, table.successors, table.shares = (tensors[name] for name in ("pairs", "successors", "shares"))
            if not len(table.pairs) == len(table.successors) == len(table.shares):
                raise ValueError("its tensors are of different lengths")
            if table.successors.shape[1:] != (MOST_SUCCESSORS,) or table.shares.shape != table.successors.shape:
                raise ValueError(f"it has another number of successors than {MOST_SUCCESSORS}")
            names = ("learned_pairs", "learned_tokens", "learned_weights")
            for pair, token, weight in zip(*(tensors[name].tolist() for name in names), strict=True):
                table._votes.weights.setdefault(pair, {})[token] = weight
            table.largest_token = int(about["largest_token"])
        except Exception as error:
            raise ValueError(f"{path} is no table of trigrams, or damaged ({error}). Make it again.") from error
        return table
