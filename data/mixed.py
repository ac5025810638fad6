"""A prepared data set read in other shares of its sources: another mixture without preparing anything again."""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import ChunkedData
from data.mixture import Interleave
from data.packing import permutation, split_samples
from data.sample import PhaseSamples, Sample
from errors import UserError

_ORDER = "mixed, version 2"  # which sample is read where; in the digest, for a run must not go on in another order
_SLOTS = 1 << 14  # of a mixture, found at a time: that is what finding one costs (`Interleave.at`)


@dataclass(frozen=True)
class MixedData:
    """A `TokenData`: as many samples as the data set has, drawn from its sources by weight, each source in its order.

    Each source has its share of them to one sample, and `mixture.Interleave` says where. A source's samples are read
    chunk after chunk, in the order in which the data set has them, so that each source has one chunk open at a time. A
    source that does not last is read again from its beginning, one with more than its share is not read to the end.
    Validation samples are the data set's own. Raises UserError for a source that is not there, and for data that is
    itself a mixture of phases.
    """

    data: ChunkedData
    weights: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if self.data.manifest.layout != "chunks":
            raise UserError(
                f"{self.data.directory}: prepared as the mixtures of {len(self.data.phases)} phases, which cannot be "
                "mixed again; prepare it with a recipe of the layout 'chunks', such as amber_tiny"
            )
        names = [name for name, _ in self.weights]
        if odd := [n for n in names if n not in self.data.sources or names.count(n) > 1]:
            raise UserError(
                f"--mixture: source {odd[0]!r} is not there, or named twice; {self.data.directory} has "
                f"{', '.join(self.data.sources)}"
            )
        if not all(0 < weight < math.inf for _, weight in self.weights):
            raise UserError("--mixture: weights are positive numbers; leave out a source that is not to be read")

    @classmethod
    def parse(cls, data: ChunkedData, text: str) -> "MixedData":
        """Return the view of `code=0.8,prose=0.2`."""
        weights = []
        for word in text.split(","):
            name, _, value = word.partition("=")
            try:
                weights.append((name.strip(), float(value)))
            except ValueError as error:
                raise UserError(f"--mixture {text!r}: write SOURCE=WEIGHT,SOURCE=WEIGHT,…") from error
        return cls(data, tuple(weights))

    @cached_property
    def _numbers(self) -> list[int]:
        """The data set's number of each mixed source."""
        return [self.data.sources.index(name) for name, _ in self.weights]

    @cached_property
    def _interleave(self) -> Interleave:
        counts = split_samples(self.data.phases[0].samples, [weight for _, weight in self.weights])
        return Interleave(counts, "mixed", self.data.manifest.seed)

    @property
    def directory(self) -> Path:
        """Of the data set."""
        return self.data.directory

    @property
    def sequence_length(self) -> int:
        """S."""
        return self.data.sequence_length

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return self.data.vocab_size

    @property
    def phases(self) -> tuple[PhaseSamples, ...]:
        """The data set's one phase: as many chunks of as many samples."""
        return self.data.phases

    @property
    def sources(self) -> tuple[str, ...]:
        """Those of the data set, mixed in or not: all have validation samples."""
        return self.data.sources

    @property
    def sha256(self) -> str:
        """SHA-256 of the data set's and the weights."""
        return hashlib.sha256(json.dumps([_ORDER, self.data.sha256, self.weights]).encode()).hexdigest()

    @property
    def tokenizer_file(self) -> Path | None:
        """The data set's."""
        return self.data.tokenizer_file

    @property
    def shares(self) -> dict[str, float]:
        """The part of all samples that each source gives."""
        return {name: n / len(self._interleave) for (name, _), n in zip(self.weights, self._interleave.counts)}

    @property
    def passes(self) -> dict[str, float]:
        """How many times the windows of each source that are in the chunks are read."""
        layout = self.data.manifest.chunk_layout
        windows = [layout.chunks * layout.sources[j].per_chunk for j in self._numbers]
        return {name: n / w for (name, _), n, w in zip(self.weights, self._interleave.counts, windows)}

    def origin(self, chunk: int, position: int) -> tuple[int, int]:
        """Return the (chunk, position) of the data set that is read at a position of the mixture."""
        layout = self.data.manifest.chunk_layout
        slot = chunk * self.phases[0].samples_per_chunk + position
        part, rank = (int(v) for v in self._slots(slot // _SLOTS)[:, slot % _SLOTS])
        source = self._numbers[part]
        chunk, number = divmod(
            rank % (layout.chunks * layout.sources[source].per_chunk), layout.sources[source].per_chunk
        )
        return chunk, int(self._positions(chunk)[sum(s.per_chunk for s in layout.sources[:source]) + number])

    def places(self, chunk: int, position: int) -> list[tuple[int, int]]:
        """Return every (chunk, position) of the mixture, in order, that reads a sample of the data set."""
        layout = self.data.manifest.chunk_layout
        ends = np.cumsum([s.per_chunk for s in layout.sources])
        element = int(np.flatnonzero(self._positions(chunk) == position)[0])
        source = int(np.searchsorted(ends, element, side="right"))
        if source not in self._numbers:
            return []
        part, per_chunk = self._numbers.index(source), layout.sources[source].per_chunk
        first = chunk * per_chunk + element - int(ends[source] - per_chunk)
        ranks = range(first, self._interleave.counts[part], layout.chunks * per_chunk)
        slots = [self._interleave.slot(part, rank) for rank in ranks]
        return sorted(divmod(s, self.phases[0].samples_per_chunk) for s in slots if s is not None)

    @cached_property
    def _slots(self) -> Any:
        def block(n: int) -> np.ndarray:
            return np.stack(self._interleave.at(np.arange(n * _SLOTS, min((n + 1) * _SLOTS, len(self._interleave)))))

        return lru_cache(4)(block)

    @cached_property
    def _positions(self) -> Any:
        """Of a chunk: the positions of its samples, source by source, in each in the order of the chunk; int32."""
        layout = self.data.manifest.chunk_layout
        ends = np.cumsum([s.per_chunk for s in layout.sources])

        def of_chunk(chunk: int) -> np.ndarray:
            source = np.searchsorted(ends, permutation(layout.samples_per_chunk, layout.seed, chunk), side="right")
            return np.argsort(source.astype(np.int16), kind="stable").astype(np.int32)

        return lru_cache(self._open_chunks)(of_chunk)

    @property
    def _open_chunks(self) -> int:
        """Sources are read at different speeds: each has a chunk of its own open, or two around an edge."""
        return 2 * len(self.weights)

    @cached_property
    def _samples(self) -> ChunkedData:
        return ChunkedData(self.directory, open_chunks=self._open_chunks)

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedData, (self.data, self.weights)  # without its caches

    def sample(self, chunk: int, position: int) -> Sample:
        """Return one sample; errors as in the data set."""
        return self._samples.sample(*self.origin(chunk, position))

    def validation(self, source: str, start: int = 0, stop: int | None = None, step: int = 1) -> Sample:
        """Return a source's held-out samples start .. stop-1, arrays of [V, S]."""
        return self.data.validation(source, start, stop, step)

    def check_files(self) -> None:
        """Raise RunError unless every file is there with its size; reads no content."""
        self.data.check_files()
