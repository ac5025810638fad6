"""What a phase reads in which shares (fact sheet 3.4), as arithmetic: from a slot of the phase to a window, and back.

A phase is a row of *slots*, one sample each; a batch is the next slots of it. `Part` says what one data set of the
mixture is, `Rows` which training window each of its rows is, `Interleave` which part each slot belongs to, and
`Mixture` puts them together. Nothing is kept but one small table, made in one pass over the phase's slots; after it, a
slot's window and a window's slots are found in milliseconds in phases of any size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np

from data.packing import Shuffle, check_range
from errors import UserError

#: Only parts with more than this share of a phase decide how long its epoch is (fact sheet 3.4).
EPOCH_SHARE = Fraction(1, 20)
_BLOCK = 1 << 14  # slots for which one row of an Interleave's table stands
_PIECE = 1 << 18  # slots counted at a time


@dataclass(frozen=True)
class Part:
    """One data set of a phase's mixture: some windows of a source, in some order, and its share of the phase."""

    name: str
    """Of this part; LLM360's name where it has one."""
    weight: float
    """Share of the phase; weights need not add up to 1."""
    source: str = ""
    """The prepared source that it reads; empty = the part's own name."""
    half: Literal["all", "even", "odd"] = "all"
    """All files of the source's training windows, or every second one; a file is `file_samples` of them (fact sheet 3.4
    and 3.5)."""
    epochs: int = 1
    """The windows that many times over, each time with other draws of FIM."""
    fim_rate: float = 0.0
    """Probability that a document's piece of a window is rearranged to be filled in (fact sheet 3.6)."""
    shuffle: bool = False
    """Whether all its rows, epochs together, are in seeded random order (fact sheet 3.7), else in stream order."""
    start: float = 0.0
    """Rows int(n*start) .. int(n*stop)-1 of the order above are the part (`data_subset`, fact sheet 3.4)."""
    stop: float = 1.0

    def __post_init__(self) -> None:
        where = f"mixture: part {self.name!r}"
        if not 0 < self.weight < math.inf:
            raise UserError(f"{where}: weight {self.weight} must be a positive number")
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(f"{where}: rows from {self.start} to {self.stop}; give 0 <= start < stop <= 1")
        if self.half not in ("all", "even", "odd"):
            raise UserError(f"{where}: half {self.half!r} is not one of all, even, odd")
        if self.epochs < 1 or not 0 <= self.fim_rate <= 1:
            raise UserError(f"{where}: epochs {self.epochs} (at least 1), fim_rate {self.fim_rate} (0 to 1)")

    @property
    def reads(self) -> str:
        """Name of the source that it reads."""
        return self.source or self.name


@dataclass(frozen=True)
class Rows:
    """The rows of one part, in the order in which the part is read: which training window each is, and back.

    In this order:
    1. Half: training window k of the source is in file k // file_samples (the last file may be short); "even" and "odd"
       keep the windows of every second file, from the first or the second on. Kept windows count 0 .. n-1.
    2. Epochs: row e*n + i is kept window i in epoch e, so that epochs follow one another.
    3. Shuffle, if asked for: position p holds row Shuffle(epochs*n, "shuffle", seed, source, half, epochs).at(p): all
       epochs together (fact sheet 3.7). Parts that read the same data set, of two phases, say, see the same order.
    4. Subset: with N = epochs*n, positions int(N*start) .. int(N*stop)-1 are the part's rows 0, 1, 2, ...; the product
       is one of doubles, as in the original.
    """

    part: Part
    windows: int  # training windows of the part's source
    file_samples: int  # of them that count as one file
    seed: int

    def __post_init__(self) -> None:
        if self.windows < 0 or self.file_samples < 1:
            raise ValueError(f"{self.windows} windows in files of {self.file_samples}")
        p, where = self.part, f"mixture: part {self.part.name!r}"
        if not self._kept:
            files = "" if p.half == "all" else f" in {p.half} files of {self.file_samples:,}"
            raise UserError(
                f"{where}: source {p.reads} has {self.windows:,} training windows, none{files}; add documents, "
                "or leave the part out" + ("" if p.half == "all" else ", or lower file_samples")
            )
        if not len(self):
            raise UserError(
                f"{where}: none of its {p.epochs * self._kept:,} rows lies between {p.start} and {p.stop} of them; "
                "widen start and stop, or add documents"
            )

    def __len__(self) -> int:
        return int(self._kept * self.part.epochs * self.part.stop) - self._first

    @cached_property
    def _kept(self) -> int:
        """Windows of the half, in one epoch."""
        if self.part.half == "all":
            return self.windows
        pairs, rest = divmod(self.windows, 2 * self.file_samples)
        even = min(rest, self.file_samples)
        return pairs * self.file_samples + (even if self.part.half == "even" else rest - even)

    @cached_property
    def _first(self) -> int:
        return int(self._kept * self.part.epochs * self.part.start)

    @cached_property
    def _order(self) -> Shuffle:
        p = self.part
        return Shuffle(p.epochs * self._kept, "shuffle", self.seed, p.reads, p.half, p.epochs)

    def at(self, rows: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (epoch, training window) of rows, both int64 of rows' shape; IndexError outside 0 .. len-1."""
        check_range(f"row of part {self.part.name}", rows, len(self))
        position = np.asarray(rows, np.int64) + self._first
        epoch, kept = np.divmod(self._order.at(position) if self.part.shuffle else position, self._kept)
        if self.part.half == "all":
            return epoch, kept
        pair, sample = np.divmod(kept, self.file_samples)
        return epoch, (2 * pair + (self.part.half == "odd")) * self.file_samples + sample

    def of(self, window: int) -> list[int]:
        """Return the rows, sorted, that are a training window of the source, in any epoch; perhaps none."""
        check_range(f"training window of source {self.part.reads}", window, self.windows)
        kept = window
        if self.part.half != "all":
            file, sample = divmod(window, self.file_samples)
            if file % 2 != (self.part.half == "odd"):
                return []
            kept = file // 2 * self.file_samples + sample
        position = kept + self._kept * np.arange(self.part.epochs)
        rows = (self._order.inverse(position) if self.part.shuffle else position) - self._first
        return sorted(rows[(rows >= 0) & (rows < len(self))].tolist())


class Interleave:
    """Which part each slot of a row of slots belongs to, and which of that part's slots it is, in seeded order.

    There are sum(counts) slots; part i has the numbers of the i-th block of counts[i] numbers: 0 .. counts[0]-1 are of
    part 0, the next counts[1] of part 1, ... Slot t belongs to the part of number Shuffle(sum(counts), *key).at(t). Its
    *rank* is how many earlier slots belong to the same part: within a part the order stays (fact sheet 3.4).

    To know ranks takes one pass over all slots, at the first use; of it a table is kept: the slots of each part before
    every 16,384th slot. `stop` leaves out slots from there on, and so shortens the pass.
    """

    def __init__(self, counts: Sequence[int], *key: int | str, stop: int | None = None) -> None:
        """Interleave counts[i] slots of part i, by a key as in `sort_keys`; only slots < stop are ever asked for."""
        if not counts or min(counts) < 0 or sum(counts) < 1:
            raise ValueError(f"cannot interleave {list(counts)} slots")
        self.counts = tuple(counts)
        self.slots = sum(counts) if stop is None else min(stop, sum(counts))
        self._shuffle = Shuffle(sum(counts), *key)
        self._ends = np.cumsum(np.array(counts, np.int64))

    def __len__(self) -> int:
        return self.slots

    def at(self, slots: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (part, rank) of slots, both int64 of slots' shape; IndexError outside.

        Costs as much as all blocks of 16,384 slots that hold one: ask for many neighbours at once.
        """
        check_range("slot", slots, self.slots)
        asked = np.asarray(slots, np.int64)
        flat = asked.reshape(-1)
        part, rank = np.empty_like(flat), np.empty_like(flat)
        order = np.argsort(flat // _BLOCK, kind="stable")
        blocks, starts = np.unique(flat[order] // _BLOCK, return_index=True)
        for block, mine in zip(blocks.tolist(), np.split(order, starts[1:])):
            parts, ranks = self._block(block)
            part[mine] = parts[flat[mine] % _BLOCK]
            rank[mine] = ranks[flat[mine] % _BLOCK]
        return part.reshape(asked.shape), rank.reshape(asked.shape)

    def slot(self, part: int, rank: int) -> int | None:
        """Return the slot of a part's rank, None where it is at `stop` or later: the inverse of `at`."""
        check_range("part", part, len(self.counts))
        check_range(f"rank in part {part}", rank, self.counts[part])
        block = int(np.searchsorted(self._before[:, part], rank, side="right")) - 1
        if block == len(self._before) - 1:
            return None
        found = np.flatnonzero(self._parts(block * _BLOCK, (block + 1) * _BLOCK) == part)
        return block * _BLOCK + int(found[rank - self._before[block, part]])

    def before(self, slot: int) -> np.ndarray:
        """Return int64[parts]: how many slots before a slot (at most `stop`) belong to each part."""
        check_range("slot", slot, self.slots + 1)
        block = slot // _BLOCK
        return self._before[block] + np.bincount(self._parts(block * _BLOCK, slot), minlength=len(self.counts))

    def _parts(self, start: int, stop: int) -> np.ndarray:
        """int64: the parts of slots start .. stop-1, as far as there are."""
        return np.searchsorted(self._ends, self._shuffle.at(np.arange(start, min(stop, self.slots))), side="right")

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(part, rank) of each slot of a block, int64."""
        parts = self._parts(block * _BLOCK, (block + 1) * _BLOCK)
        counts = np.bincount(parts, minlength=len(self.counts))
        order = np.argsort(parts, kind="stable")  # part by part, and in a part slot by slot
        starts = np.cumsum(counts) - counts
        ranks = np.empty_like(parts)
        ranks[order] = np.arange(len(parts)) + (self._before[block] - starts)[parts[order]]
        return parts, ranks

    @cached_property
    def _before(self) -> np.ndarray:
        """int64[blocks+1, parts]: the slots of each part before each block, and in all."""
        n = len(self.counts)
        counts = [np.zeros((1, n), np.int64)]
        for start in range(0, self.slots, _PIECE):
            parts = self._parts(start, start + _PIECE)
            blocks = -(-len(parts) // _BLOCK)
            counts.append(
                np.bincount(np.arange(len(parts)) // _BLOCK * n + parts, minlength=blocks * n).reshape(blocks, n)
            )
        return np.cumsum(np.concatenate(counts), axis=0)


@dataclass(frozen=True)
class Mixture:
    """All slots of one phase: which part, epoch and training window each reads, and back.

    With w_i the weights divided by their sum and len_i the parts' numbers of rows, an epoch of the mixture is
    T = max(len_i / w_i) over the parts with w_i > 0.05 (over all parts if there is none), and part i has int(T * w_i)
    slots of it. All of this is exact arithmetic on the weights as given, which are doubles: int(T * w_i) is
    floor(len_m * weight_i / weight_m), where m is the part that gives the maximum. So part m has exactly len_m slots,
    every part above 0.05 is read whole in each epoch, and shares are right to one sample. (The original computes the
    same in doubles, and may lose a sample to rounding.)

    Slots of epoch e are laid out by Interleave(slots of each part, "mixture", seed, phase, e). The j-th slot of part i,
    counted through all epochs, reads its row j % len_i. `samples` slots are used: perhaps a fraction of an epoch, or
    several.
    """

    rows: tuple[Rows, ...]
    samples: int
    seed: int
    phase: int

    def __post_init__(self) -> None:
        names = [p.name for p in self.parts]
        where = f"mixture of phase {self.phase}"
        if not names:
            raise UserError(f"{where}: has no parts; give at least one")
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise UserError(f"{where}: two parts are named {twice!r}; give them names of their own, and `source`")
        if self.samples < 1:
            raise UserError(f"{where}: {self.samples} samples; at least 1 is needed")
        for part, slots in zip(self.parts, self.epoch_slots):
            if not slots:
                raise UserError(
                    f"{where}: the share of part {part.name!r} is less than one sample in an epoch of "
                    f"{self.epoch:,}; raise its weight, leave it out, or add documents to the large parts"
                )

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        windows: Mapping[str, int],
        *,
        samples: int | None,
        file_samples: int,
        seed: int,
        phase: int,
    ) -> "Mixture":
        """Return the mixture of parts, given the number of training windows of every source.

        samples: None = one epoch of the mixture. Raises UserError for a part that reads no source or has no rows or
        slots.
        """
        for part in parts:
            if part.reads not in windows:
                raise UserError(
                    f"mixture of phase {phase}: part {part.name!r} reads source {part.reads!r}, which is not one of "
                    f"{', '.join(windows)}; name one of these in `source`, or add it to the sources"
                )
        rows = tuple(Rows(part, windows[part.reads], file_samples, seed) for part in parts)
        one = cls(rows, 1, seed, phase)
        return cls(rows, one.epoch if samples is None else samples, seed, phase)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order in which they are given: their numbers are their places here."""
        return tuple(r.part for r in self.rows)

    @cached_property
    def epoch_slots(self) -> tuple[int, ...]:
        """Slots of each part in an epoch of the mixture."""
        weights = [Fraction(p.weight) for p in self.parts]
        large = [i for i, w in enumerate(weights) if w > EPOCH_SHARE * sum(weights)] or range(len(weights))
        epoch = max(len(self.rows[i]) / weights[i] for i in large)  # T / sum(weights)
        return tuple(int(epoch * w) for w in weights)

    @cached_property
    def epoch(self) -> int:
        """Slots in an epoch of the mixture."""
        return sum(self.epoch_slots)

    @property
    def passes(self) -> tuple[float, ...]:
        """How many times the phase reads each part's rows: exact for whole epochs, else the expectation."""
        return tuple(self.samples / self.epoch * n / len(r) for n, r in zip(self.epoch_slots, self.rows))

    @cached_property
    def _interleaves(self) -> tuple[Interleave, ...]:
        """One for each epoch that the phase begins."""
        return tuple(
            Interleave(self.epoch_slots, "mixture", self.seed, self.phase, e, stop=self.samples - e * self.epoch)
            for e in range(-(-self.samples // self.epoch))
        )

    def at(self, slots: int | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (part, epoch of the part, training window) of slots, int64 of slots' shape; IndexError outside.

        Ask for many neighbours at once, as in `Interleave.at`.
        """
        check_range(f"slot of phase {self.phase}", slots, self.samples)
        asked = np.asarray(slots, np.int64)
        flat = asked.reshape(-1)
        part, row, epoch, window = (np.empty_like(flat) for _ in range(4))
        epochs, within = np.divmod(flat, self.epoch)
        for e in np.unique(epochs).tolist():
            mine = np.flatnonzero(epochs == e)
            part[mine], rank = self._interleaves[e].at(within[mine])
            row[mine] = rank + e * np.array(self.epoch_slots)[part[mine]]
        for i, rows in enumerate(self.rows):
            mine = np.flatnonzero(part == i)
            epoch[mine], window[mine] = rows.at(row[mine] % len(rows))
        return part.reshape(asked.shape), epoch.reshape(asked.shape), window.reshape(asked.shape)

    def slots_of(self, part: int, window: int) -> list[int]:
        """Return the slots, sorted, in which a part reads a training window of its source: the inverse of `at`."""
        check_range("part", part, len(self.rows))
        rows, per_epoch = self.rows[part], self.epoch_slots[part]
        found = []
        for row in rows.of(window):
            for reading in range(row, per_epoch * len(self._interleaves), len(rows)):
                e, rank = divmod(reading, per_epoch)
                slot = self._interleaves[e].slot(part, rank)
                if slot is not None:
                    found.append(e * self.epoch + slot)
        return sorted(found)

    def counts(self, start: int, stop: int) -> np.ndarray:
        """Return int64[parts]: how many of the slots start .. stop-1 belong to each part."""
        check_range(f"slot of phase {self.phase}", np.array([start, stop]), self.samples + 1)
        return self._before(stop) - self._before(start)

    def _before(self, slot: int) -> np.ndarray:
        e, within = divmod(slot, self.epoch)
        whole = e * np.array(self.epoch_slots, np.int64)
        return whole + self._interleaves[e].before(within) if within else whole
