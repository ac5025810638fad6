"""The order of all data, as arithmetic: no I/O, no state, and no library's random generator.

The documents of a source, each followed by `</s>`, are one stream of tokens. Window k of the stream is S+1 tokens from
k*(S+1) on, where windows do not overlap (Amber, fact sheet 3.2), or from k*S on, where neighbours share a token
(Crystal, fact sheet 3.5); a shorter last one is dropped. Some windows are held out for validation; the others, in
order, are the source's training windows 0, 1, 2, ... `Layout` says which window is read where (fact sheet 3.3),
`data.mixture` says the same for mixtures. The originals drew validation and order from unseeded or restart-dependent
generators; here both are functions of a seed, and their definition is short enough to be written again anywhere.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from hashlib import blake2b
from typing import Literal, TypeVar

import numpy as np

from errors import UserError

#: The formulas of this module, recorded in manifests. A change of them, or of those of data.mixture, is a new version.
ORDER = (
    "key_i = splitmix64(blake2b64(json(key)) + (i+1)*0x9E3779B97F4A7C15); permutation = argsort of keys; "
    "shuffle = 8 Feistel rounds l, r = r, (l + splitmix64(key_round + (r+1)*0x9E3779B97F4A7C15)) % m on i = l*m + r, "
    "m = ceil(sqrt(n)), walked until below n; version 2"
)
_BLOCK = 1 << 20  # keys made at a time where not all are kept
_PIECE = 1 << 16  # elements shuffled at a time, so that what is computed stays in the processor's cache
_ROUNDS = 8
_Windows = TypeVar("_Windows", int, np.ndarray)


def sort_keys(n: int, *key: int | str, start: int = 0) -> np.ndarray:
    """Return uint64[n] distinct pseudo-random numbers, for i = start .. start+n-1; all arithmetic is modulo 2**64.

    state = blake2b(json, digest_size=8) read as a little-endian integer, where json is the key parts as a JSON list
    without spaces in ASCII, e.g. `["order",7,0]`. Then, as in splitmix64:
    z = state + (i+1) * 0x9E3779B97F4A7C15;  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;  key_i = z ^ (z >> 31).
    Each line is a bijection, so keys never tie.
    """
    text = json.dumps(key, separators=(",", ":")).encode("ascii")
    return _splitmix64(int.from_bytes(blake2b(text, digest_size=8).digest(), "little"), n, start)


def _splitmix64(state: int, n: int, start: int = 0) -> np.ndarray:
    """Return uint64[n], the numbers start .. start+n-1 of splitmix64's sequence from a state."""
    z = np.uint64(state) + np.arange(start + 1, start + n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
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


class Shuffle:
    """A keyed permutation of 0 .. n-1, computed both ways without writing it down, for 1 <= n <= 2**40.

    A balanced Feistel network of 8 rounds over pairs of numbers below m, the smallest m with m*m >= n. Its round keys
    are k = sort_keys(8, *key), and F_k(x) is number x of splitmix64's sequence from state k, modulo m: with the mixing
    of `sort_keys`, mix(k + (x+1) * 0x9E3779B97F4A7C15) % m. Then at(i) is::

        while True:
            l, r = i // m, i % m
            for k in sort_keys(8, *key):
                l, r = r, (l + F_k(r)) % m
            i = l * m + r
            if i < n:  # else walk on along the cycle; seldom, as m*m is hardly larger than n
                return i

    Position i of the shuffled order holds element at(i), and inverse(at(i)) = i. Takes a table of 8*m numbers, made at
    the first use: 1 MiB for n = 2**28, 64 MiB for n = 2**40.
    """

    def __init__(self, n: int, *key: int | str) -> None:
        """Shuffle n elements by a key as in `sort_keys`."""
        if not 1 <= n <= 1 << 40:
            raise ValueError(f"cannot shuffle {n} elements: 1 to 2**40")
        self.n = n
        self.key = key
        self._side = np.uint64(math.isqrt(n - 1) + 1)

    def __len__(self) -> int:
        return self.n

    @cached_property
    def _tables(self) -> np.ndarray:
        """uint64[8, m]: F of each round."""
        return np.stack([_splitmix64(int(k), int(self._side)) % self._side for k in sort_keys(_ROUNDS, *self.key)])

    def at(self, i: int | np.ndarray) -> np.ndarray:
        """Return the elements at positions i, int64 of i's shape; IndexError outside 0 .. n-1."""
        check_range("position", i, self.n)
        return self._walk(i, self._forward)

    def inverse(self, j: int | np.ndarray) -> np.ndarray:
        """Return the positions of elements j, int64 of j's shape; IndexError outside 0 .. n-1."""
        check_range("element", j, self.n)
        return self._walk(j, self._backward)

    def _walk(self, numbers: int | np.ndarray, network: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        result = np.array(numbers, np.uint64, order="C")
        flat = result.reshape(-1)  # a view: result is a contiguous copy of ours
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE]
            piece[:] = network(piece)
            outside = np.flatnonzero(piece >= self.n)
            while len(outside):
                piece[outside] = network(piece[outside])
                outside = outside[piece[outside] >= self.n]
        return result.view(np.int64)

    def _forward(self, numbers: np.ndarray) -> np.ndarray:
        left = numbers // self._side
        right = numbers - left * self._side
        for table in self._tables:
            moved = left + table[right.view(np.int64)]
            left, right = right, np.minimum(moved, moved - self._side)  # modulo m: what is negative wraps to the top
        return left * self._side + right

    def _backward(self, numbers: np.ndarray) -> np.ndarray:
        left = numbers // self._side
        right = numbers - left * self._side
        for table in self._tables[::-1]:
            moved = right - table[left.view(np.int64)]
            left, right = np.minimum(moved, moved + self._side), left
        return left * self._side + right


def windows_in(tokens: int, sequence_length: int, overlap: int = 0) -> int:
    """Return how many windows of sequence_length + 1 tokens, neighbours sharing `overlap`, a stream holds whole."""
    window = sequence_length + 1
    return 0 if tokens < window else (tokens - window) // _stride(sequence_length, overlap) + 1


def window_start(window: _Windows, sequence_length: int, overlap: int = 0) -> _Windows:
    """Return where in the stream windows begin, in tokens."""
    return window * _stride(sequence_length, overlap)


def tokens_in(windows: int, sequence_length: int, overlap: int = 0) -> int:
    """Return the tokens of the shortest stream that holds so many windows, at least 1."""
    return window_start(windows - 1, sequence_length, overlap) + sequence_length + 1


def _stride(sequence_length: int, overlap: int) -> int:
    if not 0 <= overlap <= sequence_length:
        raise ValueError(f"overlap {overlap} is outside 0..{sequence_length}")
    return sequence_length + 1 - overlap


def training_window(k: int | np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return the windows that are training windows k, int64 of k's shape.

    held_out: int64[V], sorted: the windows held out for validation.
    """
    # The k-th window that is not held out is k + (how many are held out at or before it).
    return k + np.searchsorted(held_out - np.arange(len(held_out)), k, side="right")


def training_number(window: int | np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return which training windows windows are, int64 of window's shape, -1 where held out: undoes training_window."""
    before = np.searchsorted(held_out, window)
    is_held_out = np.searchsorted(held_out, window, side="right") > before
    return np.where(is_held_out, -1, window - before)


def split_samples(total: int, weights: Sequence[float]) -> list[int]:
    """Return `total` shared out in proportion to positive weights: whole numbers that add up to it.

    By largest remainder: each gets the whole part of its exact share total * weight / sum(weights), and those with the
    largest fractions one more; of equal fractions the earlier.
    """
    if total < 0 or not weights or not all(0 < w < math.inf for w in weights):
        raise ValueError(f"cannot split {total} samples by weights {list(weights)}")
    exact = [Fraction(w) for w in weights]
    shares = [total * w / sum(exact) for w in exact]
    counts = [int(s) for s in shares]
    by_remainder = sorted(range(len(shares)), key=lambda j: counts[j] - shares[j])  # stable: ties by position
    for j in by_remainder[: total - sum(counts)]:
        counts[j] += 1
    return counts


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
        if len(keys) > count:
            chosen = np.argpartition(keys, count)[:count]  # keys never tie
            windows, keys = windows[chosen], keys[chosen]
        best, best_keys = windows, keys
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
        cls,
        tokens: Sequence[tuple[str, int]],
        *,
        sequence_length: int,
        validation: int,
        chunks: int,
        seed: int,
        overlap: int = 0,
    ) -> "Layout":
        """Return the layout of sources given as (name, tokens in its stream); windows as in `windows_in`.

        Raises UserError for a source with fewer than `validation + chunks` windows of sequence_length + 1 tokens.
        """
        sources = []
        for name, count in tokens:
            windows = windows_in(count, sequence_length, overlap)
            if windows < validation + chunks:
                needed = tokens_in(validation + chunks, sequence_length, overlap)
                raise UserError(
                    f"source {name}: {count:,} tokens found, {needed:,} needed "
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
        check_range("chunk", chunk, self.chunks)
        check_range("position", position, self.samples_per_chunk)
        element = self._elements(chunk, position)
        ends = np.cumsum([s.per_chunk for s in self.sources])
        source = np.searchsorted(ends, element, side="right")
        starts = ends - [s.per_chunk for s in self.sources]
        k = chunk + self.chunks * (element - starts[source])
        window = np.empty_like(k)
        for j, held_out in enumerate(self.validation):
            window = np.where(source == j, training_window(k, held_out), window)
        return source, window

    def place_of(self, source: int, window: int) -> tuple[int, int] | Literal["validation", "unused"]:
        """Return the (chunk, position) where a window is read, or why it is not read: the inverse of window_of."""
        place = self.element_of(source, window)
        if isinstance(place, str):
            return place
        chunk, element = place
        keys = sort_keys(self.samples_per_chunk, "order", self.seed, chunk)
        return chunk, int(np.count_nonzero(keys < keys[element]))  # inverse(permutation(...))[element], without a sort

    def element_of(self, source: int, window: int) -> tuple[int, int] | Literal["validation", "unused"]:
        """Return the chunk that reads a window and which of its elements it is, or why it is not read."""
        check_range("source", source, len(self.sources))
        s = self.sources[source]
        check_range(f"window of source {s.name}", window, s.windows)
        if window >= s.validation + self.chunks * s.per_chunk:
            return "unused"
        k = int(training_number(window, self.validation[source]))
        if k < 0:
            return "validation"
        return k % self.chunks, sum(other.per_chunk for other in self.sources[:source]) + k // self.chunks

    def _elements(self, chunk: int, position: int | np.ndarray) -> np.ndarray:
        """permutation(samples_per_chunk, seed, chunk)[position]; of one position without sorting everything."""
        if np.ndim(position):
            return permutation(self.samples_per_chunk, self.seed, chunk)[position]
        keys = sort_keys(self.samples_per_chunk, "order", self.seed, chunk)
        return np.argpartition(keys, int(position))[position]  # keys never tie


def check_range(what: str, values: int | np.ndarray, stop: int) -> None:
    """Raise IndexError, naming `what` and the first wrong value, unless all values are in 0 .. stop-1."""
    values = np.asarray(values)
    outside = (values < 0) | (values >= stop)
    if outside.any():
        raise IndexError(f"{what} {values[outside].flat[0]} is outside 0..{stop - 1}")
