"""The text of a batch while it is written: every row as far as it has got."""

from __future__ import annotations

import torch

from .proposal import NO_TOKEN
from .text_positions import Positions
from .text_stops import RowStops

FIRST_WIDTH = 256
"""New tokens that the buffer has room for at first; it doubles."""


class Text:
    """Token ids of all rows of the original batch, and which of them still run.

    A row's text is its prompt, padding included, then its `generated` tokens; the pad token fills the rest. `rows`
    are the rows that the passes carry, in order: the running ones and those that finished since rows last left.

    Args:
        input_ids: prompts as generate() prepared them, (B, P).
        stops: where rows stop.
        pad_token_id: what to fill with; `None` where plain generate() has none either.
        streamer: receives what plain generate() would put into it, in the same order.
        pads_through_model: whether rows that have stopped are carried on to the end of the text, their pad tokens fed
            to the target as plain generate() feeds them. That is needed where its scores of them are wanted.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        stops: RowStops,
        pad_token_id: int | None,
        streamer=None,
        pads_through_model: bool = False,
    ):
        self.batch_size, self.prompt_width = input_ids.shape
        self.stops, self.rules, self.streamer = stops, stops.rules, streamer
        self.leaves_when_stopped = self.rules.pads and not pads_through_model
        self.pad_token_id = 0 if pad_token_id is None else pad_token_id
        self.ids = input_ids  # (B, width)
        self.rows = list(range(self.batch_size))
        self.generated = stops.generated
        self.finished = [False] * self.batch_size
        self.streamed = 0
        # the same on the device, for the rows that the passes carry
        self.device_rows = torch.arange(self.batch_size, device=input_ids.device)
        self.device_generated = torch.zeros_like(self.device_rows)
        self.device_running = torch.ones_like(self.device_rows, dtype=torch.bool)
        self.device_stopped = torch.zeros_like(self.device_running)  # and padded, but carried on

    @property
    def done(self) -> bool:
        return all(self.finished)

    @property
    def device_idle(self) -> torch.Tensor:
        """Carried rows that have stopped, bool (R,)."""
        return self.device_stopped | ~self.device_running

    def is_running(self, row: int) -> bool:
        return not self.finished[row]

    def has_ended(self, row: int) -> bool:
        """Whether nothing is written into this row any more, but padding."""
        return self.rules.pads and self.stops.stopped_at[row] is not None

    def running_lengths(self) -> list[int]:
        """Generated tokens of each running row."""
        return [length for length, finished in zip(self.generated, self.finished, strict=True) if not finished]

    def first_columns(self, generated: int) -> torch.Tensor:
        """All rows at the length of `generated` new tokens, as plain generate() would show them: (B, P + generated)."""
        return self.ids[:, : self.prompt_width + generated].contiguous()

    def last_tokens(self) -> torch.Tensor:
        """The newest token of each carried row, (R, 1)."""
        return self.ids[self.device_rows, self.prompt_width + self.device_generated - 1][:, None]

    def write_ahead(self, places: list[int], ahead: int, drafts: torch.Tensor) -> None:
        """Show drafts[places, ahead] to processors that read the text. `append` writes over them."""
        self._reserve(drafts.shape[1] + 1)
        rows = [self.rows[place] for place in places]
        columns = [self.prompt_width + self.generated[row] + ahead for row in rows]
        self.ids[rows, columns] = drafts[places, ahead]

    def positions(self, width: int, ahead: int | torch.Tensor = 0) -> Positions:
        """The `width` positions of each carried row from `ahead` tokens after its text on, one number or one of each
        row (R,): (R, width)."""
        oldest = min(self.running_lengths())  # rows that have finished are only carried along: any step will do
        aheads = ahead.tolist() if isinstance(ahead, torch.Tensor) else [ahead] * len(self.rows)
        steps = [max(self.generated[row], oldest) + more for row, more in zip(self.rows, aheads, strict=True)]
        rows, steps, offsets = (torch.tensor(numbers, device="cpu") for numbers in (self.rows, steps, range(width)))
        return Positions(rows[:, None].expand(-1, width), steps[:, None] + offsets)

    def pad_stopped(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (R, n), the pad token in rows that have stopped."""
        return tokens.masked_fill(self.device_stopped[:, None], self.pad_token_id)

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of `tokens` (R, n) end their row, bool."""
        return self.rules.is_eos(tokens) & ~self.device_stopped[:, None]

    def append(
        self, tokens: torch.Tensor, accepted: torch.Tensor, drafted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[tuple[int, int]], list[int]]:
        """Add each row's accepted drafts and the token after them, as far as its stopping rules let it.

        Args:
            tokens: the target's tokens, (R, q).
            accepted: how many of them were drafted, (R,), from 0 to q - 1.
            drafted: how many were proposed, (R,); default none.

        Returns:
            Tokens added per row, (R,), on the device; and for the host (accepted, added) of each row, padding left out,
            and how many were proposed.
            This is the one point of a greedy round where the host waits for the device.

        Raises:
            RuntimeError: a row could not be sampled, as in plain generate().
        """
        width = tokens.shape[1]
        self._reserve(width)
        room = self.stops.limit - self.device_generated
        if self.stops.is_read and not self.rules.pads:
            room = [self.stops.limit_of(row) - self.generated[row] for row in self.rows]
            room = torch.tensor(room, device=tokens.device)
        counts = torch.minimum(accepted + 1, room.clamp(min=0))
        first_end = (~self.ends(tokens)).long().cumprod(dim=1).sum(dim=1)  # width where there is none
        stopped = first_end < counts
        counts = torch.minimum(counts, first_end + 1) * self.device_running
        offsets = torch.arange(width, device=tokens.device)
        columns = self.prompt_width + self.device_generated[:, None] + offsets
        self.ids[self.device_rows[:, None], columns] = torch.where(offsets < counts[:, None], tokens, self.pad_token_id)
        missing = ((tokens == NO_TOKEN) & (offsets < counts[:, None])).any(dim=1)
        drafted = torch.zeros_like(accepted) if drafted is None else drafted
        accepted, added, ended, missing, drafted = to_host(
            torch.stack([accepted, counts, stopped.long(), missing.long(), drafted])
        )
        if any(missing):
            raise RuntimeError(
                "A row cannot be sampled: its scores contain NaN or inf, or no token is left above -inf."
            )
        length_before = [self.generated[row] for row in self.rows]
        is_padding = [self.has_ended(row) for row in self.rows]
        self.stops.close_round(self, added, ended)
        self._retire()
        for place, (row, before) in enumerate(zip(self.rows, length_before, strict=True)):
            if (kept := self.generated[row] - before) != added[place]:  # a criterion cut the row
                counts[place] = added[place] = kept
        self.device_generated = self.device_generated + counts
        self._stream()
        added = [0 if padding else count for count, padding in zip(added, is_padding, strict=True)]
        return counts, list(zip(accepted, added, strict=True)), drafted

    def drop_finished(self) -> torch.Tensor | None:
        """When at least half of the carried rows have finished: the places of the others (R',), else `None`."""
        places = [place for place, row in enumerate(self.rows) if not self.finished[row]]
        if 2 * len(places) > len(self.rows):
            return None
        index = torch.tensor(places, device=self.ids.device)
        self.rows = [self.rows[place] for place in places]
        self.device_rows = self.device_rows[index]
        self.device_generated = self.device_generated[index]
        self.device_running = self.device_running[index]
        self.device_stopped = self.device_stopped[index]
        return index

    def result(self) -> torch.Tensor:
        """What plain generate() returns: (B, P + generated tokens of the longest row)."""
        return self.ids[:, : self.prompt_width + self.stops.limit].clone()

    def _reserve(self, extra: int) -> None:
        """Make room for `extra` more tokens of the longest row."""
        needed = self.prompt_width + max(self.generated) + extra
        if needed > self.ids.shape[1]:
            width = max(needed, 2 * self.ids.shape[1] - self.prompt_width, self.prompt_width + FIRST_WIDTH)
            filling = self.ids.new_full((self.batch_size, width - self.ids.shape[1]), self.pad_token_id)
            self.ids = torch.cat([self.ids, filling], dim=1)

    def pad_behind(self, row: int, generated: int) -> None:
        """Take back what a row has after `generated` new tokens."""
        self.ids[row, self.prompt_width + generated :] = self.pad_token_id

    def _retire(self) -> None:
        """Take note of the rows that have nothing to write any more."""
        for place, row in enumerate(self.rows):
            if self.finished[row]:
                continue
            stopped = self.stops.stopped_at[row] is not None
            self.finished[row] = stopped if self.leaves_when_stopped else self.generated[row] >= self.stops.limit
            if self.finished[row]:
                self.device_running[place] = False
            elif stopped and self.rules.pads:
                self.device_stopped[place] = True

    def _stream(self) -> None:
        """Put every column that no running row can change any more."""
        if self.streamer is None:
            return
        upto = min([*self.running_lengths(), self.stops.limit])
        columns = self.ids[:, self.prompt_width + self.streamed : self.prompt_width + upto].cpu()
        for column in columns.unbind(dim=1):
            self.streamer.put(column)
        self.streamed = upto
        if self.done:
            self.streamer.end()


def to_host(packed: torch.Tensor) -> list[list[int]]:
    """The one transfer, and so the one wait, of a greedy round."""
    return packed.tolist()
