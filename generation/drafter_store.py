"""A folder of texts in which drafters look up how a text goes on.

Its files are written whole, named when they are complete, and never changed; so a reader has what it opened, a kill
leaves at most a file without a name, and processes that write at the same time write different files. Each is a
safetensors file of the texts and of their sorted places (`drafter_suffixes`), read as memory-mapped.

Texts that are added go into one new file together with the newest files that are not much larger, which they replace:
so files are few, their number grows as the logarithm of the tokens. Where two processes replace the same file, its
texts are there twice from then on.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .argument import whole_number
from .drafter_suffixes import SortedTexts, in_one, sorted_places
from .proposal import NO_TOKEN

FORMAT = "specformer texts 1"
BUILT, GROWN = "built", "grown"
"""Beginnings of names: files that were made of given texts, and those that grew from finished ones."""
MOST_TOKENS = 2**31 - 1
"""Of one file: places are 32-bit numbers."""


class File(NamedTuple):
    """One that is open.

    Attributes:
        largest: of its tokens.
        replaces: names of files whose texts it holds as well.
    """

    texts: SortedTexts
    largest: int
    replaces: list[str]


class AnswerStore:
    """Texts on disk, for any number of drafters, threads and processes.

    Args:
        folder: where they are. It is made if the store may grow.
        max_grown_tokens: how many tokens it may grow by; 0: not at all. The oldest that it grew by go first; what it
            was built of stays.

    Raises:
        FileNotFoundError: there are no texts, and it may not grow.
        ValueError: a file that is damaged, or a number that is none.
    """

    LARGER = 2  # times as large as what is added: files up to that are replaced

    def __init__(self, folder: str | Path, max_grown_tokens: int = 0):
        most = whole_number(max_grown_tokens)
        if most is None or not 0 <= most <= MOST_TOKENS:
            raise ValueError(
                f"max_grown_tokens is {max_grown_tokens!r}; expected an integer: how many tokens the store may grow "
                "by, and 0 not at all."
            )
        self.folder, self.max_grown_tokens = Path(folder), most
        self._lock = threading.Lock()
        self._files: dict[str, File] = {}  # the oldest first; replaced as a whole, so that others can read it meanwhile
        if most:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()
        if not most and not self._files:
            raise FileNotFoundError(
                f"{self.folder} holds no texts. Make them with `specformer store --data <answers> --output "
                f"{self.folder}`, or let the store grow: max_grown_tokens=1000000."
            )

    @property
    def num_tokens(self) -> int:
        return sum(len(file.texts) for file in self._files.values())

    @property
    def largest_token(self) -> int:
        return max((file.largest for file in self._files.values()), default=NO_TOKEN)

    def refresh(self) -> None:
        """Open what other processes have added, and forget what they have replaced."""
        names = {path.stem for path in self.folder.glob("*.safetensors")}
        if names == set(self._files):
            return
        with self._lock:
            self._open(names)

    def add(self, texts: list[list[int]], kind: str = GROWN) -> None:
        """Keep `texts`, lists of token ids, from now on.

        Raises:
            ValueError: what is no token, or a store that may not grow.
            OSError: it cannot be written. What was there before is safe.
        """
        if kind == GROWN and not self.max_grown_tokens:
            raise ValueError(f"The store {self.folder} was opened with max_grown_tokens=0, so it keeps no more texts.")
        new = in_one([text for text in texts if len(text) > 1])
        if not len(new):
            return
        if int((new == NO_TOKEN).sum()) != sum(len(text) > 1 for text in texts) or int(new.min()) < NO_TOKEN:
            raise ValueError("A text has negative token ids; expected ids of a vocabulary, without padding.")
        with self._lock:
            self._open({path.stem for path in self.folder.glob("*.safetensors")})
            replaced = []
            if kind == GROWN:
                grown = [name for name in self._files if name.startswith(GROWN)]
                for name in reversed(grown):
                    texts_there = self._files[name].texts
                    if len(texts_there) > self.LARGER * len(new):
                        break
                    replaced.append(name)
                    new = torch.cat([texts_there.tokens, new])
                new = self._bounded(new)
                dropped, size = grown[: len(grown) - len(replaced)], len(new)
                while dropped:  # the newest of those that are left are kept as long as there is room
                    size += len(self._files[dropped[-1]].texts)
                    if size > self.max_grown_tokens:
                        break
                    dropped.pop()
                replaced += dropped
            elif len(new) > MOST_TOKENS:
                raise ValueError(f"{len(new)} tokens are too many for one file; expected up to {MOST_TOKENS}.")
            self._write(f"{kind}-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}", new, replaced)
            for name in replaced:
                self._remove(name)
            self._open({path.stem for path in self.folder.glob("*.safetensors")})

    def grow(self, texts: list[list[int]]) -> None:
        """`add`, where the store may grow. What cannot be written is told in a warning: the texts are the caller's,
        and made already."""
        if not self.max_grown_tokens:
            return
        try:
            self.add(texts)
        except (OSError, ValueError) as error:
            warnings.warn(f"{self.folder} did not grow: {error}.", stacklevel=2)

    def find(self, suffixes: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How texts went on behind what agrees with most of `suffixes` (R, D): tokens (R, num_tokens), NO_TOKEN from
        where there are none, and how many tokens agree (R,). Of files in which as many do, the newest counts."""
        device, suffixes = suffixes.device, suffixes.cpu()
        matched = torch.zeros_like(suffixes[:, 0])
        copies = matched[:, None].expand(-1, num_tokens).clone().fill_(NO_TOKEN)
        for rows, texts, first, last in self._longest(suffixes, matched):
            copies[rows] = texts.continuations(first, last, num_tokens)
        return copies.to(device), (matched * (copies[:, 0] != NO_TOKEN)).to(device)

    def find_several(
        self, suffixes: torch.Tensor, num_tokens: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same for up to `count` ways in which texts went on there: tokens (R, count, num_tokens), of which share
        of them each token is what they went on with, once those in front of it are, of the same shape, and how many
        tokens agree (R,)."""
        device, suffixes = suffixes.device, suffixes.cpu()
        matched = torch.zeros_like(suffixes[:, 0])
        copies = matched[:, None, None].expand(-1, count, num_tokens).clone().fill_(NO_TOKEN)
        shares = torch.zeros(copies.shape, device="cpu")
        for rows, texts, first, last in self._longest(suffixes, matched):
            copies[rows], shares[rows] = texts.different(first, last, num_tokens, count)
        return copies.to(device), shares.to(device), (matched * (copies[:, 0, 0] != NO_TOKEN)).to(device)

    def _longest(
        self, suffixes: torch.Tensor, matched: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, SortedTexts, torch.Tensor, torch.Tensor]]:
        """File by file the rows of `suffixes` (R, D) of which more agrees than `matched` (R,) in newer ones, its texts,
        and from the first (N,) to before the last (N,) of its sorted places. `matched` follows."""
        for file in reversed([*self._files.values()]):
            first, last, agree = file.texts.find(suffixes)
            better = (agree > matched).nonzero()[:, 0]
            if len(better):
                matched[better] = agree[better]
                yield better, file.texts, first[better], last[better]

    def _bounded(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last whole texts that may be kept; of one that is longer its end."""
        if len(tokens) <= self.max_grown_tokens:
            return tokens
        tokens = tokens[-self.max_grown_tokens :]
        starts = (tokens == NO_TOKEN).nonzero()
        if len(starts):
            return tokens[int(starts[0]) :]
        tokens[0] = NO_TOKEN
        return tokens

    def _open(self, names: set[str]) -> None:
        files = {}
        for name in sorted(names, key=lambda name: name.partition("-")[2]):
            try:
                files[name] = self._files[name] if name in self._files else read_file(self.folder, name)
            except FileNotFoundError:  # another process replaced it just now
                continue
        replaced = {name for file in files.values() for name in file.replaces}
        self._files = {name: file for name, file in files.items() if name not in replaced}
        for name in replaced & set(files):  # by a process that did not come to it
            self._remove(name)

    def _remove(self, name: str) -> None:
        with suppress(OSError):  # in use, on Windows; it is known to be replaced
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def _write(self, name: str, tokens: torch.Tensor, replaced: list[str]) -> None:
        tensors = {"tokens": tokens.contiguous(), "places": sorted_places(tokens)}
        about = {"format": FORMAT, "largest": str(int(tokens.max())), "replaces": json.dumps(replaced)}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.part"
        try:
            save_file(tensors, temporary, about)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{name}.safetensors")
        except Exception as error:  # safetensors has errors of its own for a full disk
            temporary.unlink(missing_ok=True)
            raise OSError(f"{temporary} could not be written ({error}); what was there before is safe") from error


def read_file(folder: Path, name: str) -> File:
    """
    Raises:
        ValueError: it is damaged, or no file of a store.
    """
    path = folder / f"{name}.safetensors"
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, expected {FORMAT!r}")
            tokens, places = file.get_tensor("tokens"), file.get_tensor("places")
            largest, replaces = int(about["largest"]), json.loads(about["replaces"])
        for tensor in (tokens, places):
            if tensor.dtype != torch.int32 or tensor.ndim != 1:
                raise ValueError("its tensors are not lists of 32-bit integers")
        if len(places) > len(tokens):
            raise ValueError("it has more places than tokens")
    except Exception as error:
        if not path.exists():  # replaced by another process; safetensors opens a file more than once
            raise FileNotFoundError(str(path)) from error
        raise ValueError(f"{path} is no file of a store, or damaged ({error}). Delete it to go on without.") from error
    return File(SortedTexts(tokens, places), largest, replaces)
