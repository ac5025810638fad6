"""The order of all data, as arithmetic: no I/O, no state, and no library's random generator.

The documents of a source, each followed by `</s>`, are one stream of tokens. Window k of the stream is tokens
[k*(S+1), (k+1)*(S+1)): windows do not overlap and a shorter last one is dropped (fact sheet 3.2). `Layout` says which
window is read where (fact sheet 3.3). The originals drew validation and order from unseeded or restart-dependent
generators; here both are functions of a seed, and their definition is short enough to be written again anywhere.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Literal

import numpy as np

from errors import UserError

ORDER = "argsort of splitmix64(blake2b64(json(key)) + (i+1)*0x9E3779B97F4A7C15), version 1"  # recorded in manifests
_BLOCK = 1 << 20  # keys made at a time where not all are kept


def sort_keys(n: int, *key: int | str, start: int = 0) -> np.ndarray:
    """Return uint64[n] distinct pseudo-random numbers, for i = start .. start+n-1; all arithmetic is modulo 2**64.

    state = blake2b(json, digest_size=8) read as a little-endian integer, where json is the key parts as a JSON list
    without spaces in ASCII, e.g. `["order",7,0]`. Then, as in splitmix64:
    z = state + (i+1) * 0x9E3779B97F4A7C15;  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;  key_i = z ^ (z >> 31).
    Each line is a bijection, so keys never tie.
    """
    text = json.dumps(key, separators=(",", ":")).encode("ascii")
    state = np.uint64(int.from_bytes(blake2b(text, digest_size=8).digest(), "little"))
    z = state + np.arange(start + 1, start + n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(n: int, seed: int, chunk: int) -> np.ndarray:
    """Return int64[n], the order of a chunk: argsort of sort_keys(n, "order", seed, chunk).

    Position p of the chunk holds element permutation[p]. Keyed by the chunk, so that the order does not depend on where
    a run was restarted (fact sheet 2.1, "Shuffle").
    """
    return np.argsort(sort_keys(n, "order", seed, chunk), kind="stable")


def inverse(perm: np.ndarray) -> np.ndarray:
    """Return int64[n] with inverse[perm[p]] = p."""
    result = np.empty_like(perm)
    result[perm] = np.arange(len(perm), dtype=perm.dtype)
    return result


def validation_windows(n: int, count: int, seed: int, source: str) -> np.ndarray:
    """Return int64[count], sorted: the windows i < n whose keys are the `count` smallest.

    The keys are sort_keys(n, "validation", seed, source): a draw without replacement. It
    takes memory for `count`, not for n: Amber's largest source has 3e8 windows.
    """
    if not 0 <= count <= n:
        raise ValueError(f"cannot draw {count} validation windows from {n}")
    best = np.empty(0, np.int64)
    best_keys = np.empty(0, np.uint64)
    for start in range(0, n, _BLOCK):
        keys = np.concatenate([best_keys, sort_keys(min(_BLOCK, n - start), "validation", seed, source, start=start)])
        windows = np.concatenate([best, np.arange(start, min(start + _BLOCK, n))])
        chosen = np.argsort(keys)[:count]
        best, best_keys = windows[chosen], keys[chosen]
    return np.sort(best)


@dataclass(frozen=True)
class SourceWindows:
    """How the windows of one source are used: `validation` of them drawn, per_chunk in each chunk, the rest unused."""

    name: str
    windows: int
    validation: int
    per_chunk: int


@dataclass(frozen=True)
class Layout:
    """Which window of which source stands at which position of which chunk, and back (fact sheet 3.3).

    Per source with N windows and V validation windows: per_chunk = (N - V) // chunks; the last
    N - V - chunks*per_chunk windows are unused; the V are drawn from the windows before those. Of the remaining
    windows, in order, the k-th goes to chunk k % chunks as its element k // chunks. Inside a chunk the elements stand
    source by source, numbered from 0 through all sources; position p of chunk c holds element
    permutation(samples_per_chunk, seed, c)[p].
    """

    sources: tuple[SourceWindows, ...]
    chunks: int
    seed: int

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ValueError(f"chunks = {self.chunks}: at least 1 is needed")
        for s in self.sources:
            if s.validation < 0 or s.per_chunk < 1 or s.per_chunk != (s.windows - s.validation) // self.chunks:
                raise ValueError(f"source {s.name}: {s} does not fit {self.chunks} chunks")

    @classmethod
    def of(
        cls, tokens: Sequence[tuple[str, int]], *, sequence_length: int, validation: int, chunks: int, seed: int
    ) -> "Layout":
        """Return the layout of sources given as (name, tokens in its stream).

        Raises UserError for a source with fewer than `validation + chunks` windows of sequence_length + 1 tokens.
        """
        sources = []
        for name, count in tokens:
            windows = count // (sequence_length + 1)
            if windows < validation + chunks:
                raise UserError(
                    f"source {name}: {count:,} tokens found, {(validation + chunks) * (sequence_length + 1):,} needed "
                    f"({validation} validation + {chunks} chunks, one window of {sequence_length + 1} tokens each at "
                    "the least); add documents, or lower chunks, validation_per_source or sequence_length"
                )
            sources.append(SourceWindows(name, windows, validation, (windows - validation) // chunks))
        return cls(tuple(sources), chunks, seed)

    @property
    def samples_per_chunk(self) -> int:
        """Samples in every chunk."""
        return sum(s.per_chunk for s in self.sources)

    @cached_property
    def validation(self) -> tuple[np.ndarray, ...]:
        """Per source, the sorted int64[V] windows held out for validation."""
        return tuple(
            validation_windows(s.validation + self.chunks * s.per_chunk, s.validation, self.seed, s.name)
            for s in self.sources
        )

    def window_of(self, chunk: int, position: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source index, window), int64 of position's shape, of the samples at positions of one chunk."""
        _check_range("chunk", chunk, self.chunks)
        element = permutation(self.samples_per_chunk, self.seed, chunk)[position]
        ends = np.cumsum([s.per_chunk for s in self.sources])
        source = np.searchsorted(ends, element, side="right")
        starts = ends - [s.per_chunk for s in self.sources]
        k = chunk + self.chunks * (element - starts[source])
        window = np.empty_like(k)
        for j, held_out in enumerate(self.validation):
            # The k-th window that is not held out is k + (how many are held out at or before it).
            before = np.searchsorted(held_out - np.arange(len(held_out)), k, side="right")
            window = np.where(source == j, k + before, window)
        return source, window

    def place_of(self, source: int, window: int) -> tuple[int, int] | Literal["validation", "unused"]:
        """Return the (chunk, position) where a window is read, or why it is not read: the inverse of window_of."""
        _check_range("source", source, len(self.sources))
        s, held_out = self.sources[source], self.validation[source]
        _check_range(f"window of source {s.name}", window, s.windows)
        if window >= s.validation + self.chunks * s.per_chunk:
            return "unused"
        before = int(np.searchsorted(held_out, window))
        if before < len(held_out) and held_out[before] == window:
            return "validation"
        k = window - before
        chunk = k % self.chunks
        element = sum(other.per_chunk for other in self.sources[:source]) + k // self.chunks
        return chunk, int(inverse(permutation(self.samples_per_chunk, self.seed, chunk))[element])


def _check_range(what: str, value: int, stop: int) -> None:
    if not 0 <= value < stop:
        raise IndexError(f"{what} {value} is outside 0..{stop - 1}")
