"""Data sets as a run reads them: random access to samples by chunk and position, from files or made up."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.chunks import DataManifest, FileRecord, SampleFile
from data.packing import sort_keys
from data.sample import PhaseSamples, Sample
from errors import RunError, UserError

_OPEN_CHUNKS = 4  # steps are read in order: one chunk at a time, two around an edge, a few for prefetching threads


class TokenData(Protocol):
    """Random access to the samples of all chunks."""

    @property
    def sequence_length(self) -> int:
        """S: a sample predicts S tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        ...

    @property
    def phases(self) -> tuple[PhaseSamples, ...]:
        """What each phase reads, in order; chunks are numbered through all of them."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that have validation samples."""
        ...

    @property
    def sha256(self) -> str:
        """Identifies the data, hexadecimal."""
        ...

    @property
    def tokenizer_file(self) -> Path | None:
        """SentencePiece model that made the tokens, None if they are no text."""
        ...

    def sample(self, chunk: int, position: int) -> Sample:
        """Return one sample, arrays of [S]; `chunk` is its number in the data set."""
        ...

    def validation(self, source: str, start: int = 0, stop: int | None = None, step: int = 1) -> Sample:
        """Return a source's held-out samples start .. stop-1, as far as there are, stacked: arrays of [V, S]."""
        ...

    def check_files(self) -> None:
        """Raise RunError when something is missing; cheap."""
        ...


class ChunkedData:
    """A prepared data directory. Raises UserError when its manifest cannot be used.

    `open_chunks`: files that stay open; opening one of Amber's size reads an index of megabytes.
    """

    def __init__(self, directory: str | Path, *, open_chunks: int = _OPEN_CHUNKS):
        self.directory = Path(directory)
        self._open_chunks = open_chunks
        self.manifest = DataManifest.load(directory)
        # A cache of this object, not of the class: a reader closes with the last object that uses it.
        self._chunk = lru_cache(maxsize=open_chunks)(self._open_chunk)

    def __reduce__(self) -> tuple[Any, ...]:
        # Reading workers get the path and open files of their own: a reader cannot be shared.
        return partial(ChunkedData, open_chunks=self._open_chunks), (self.directory,)

    @property
    def sequence_length(self) -> int:
        """S: a sample predicts S tokens."""
        return self.manifest.sequence_length

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return self.manifest.vocab_size

    @property
    def phases(self) -> tuple[PhaseSamples, ...]:
        """What each phase reads, in order."""
        return self.manifest.phase_samples

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in manifest order."""
        return tuple(s.name for s in self.manifest.sources)

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest."""
        return self.manifest.sha256

    @property
    def tokenizer_file(self) -> Path | None:
        """Tokenizer that made the tokens; None where the data came without one."""
        tokenizer = self.manifest.tokenizer
        return None if tokenizer is None else self.directory / tokenizer.file

    def sample(self, chunk: int, position: int) -> Sample:
        """Return one sample. RunError names the file that is missing, or the file and position of a corrupt record."""
        return self._chunk(chunk).read(position)

    def validation(self, source: str, start: int = 0, stop: int | None = None, step: int = 1) -> Sample:
        """Return held-out samples start .. stop-1, arrays of [V, S]; errors as in `sample`, UserError for the name."""
        record = next((s.validation_file for s in self.manifest.sources if s.name == source), None)
        if record is None:
            raise UserError(f"{self.directory} has no source {source!r}; it has {', '.join(self.sources)}")
        file, asked = self._open(record), range(record.samples)[start:stop:step]
        shape = (len(asked), self.sequence_length)
        stacked = Sample(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        for i, position in enumerate(asked):
            for values, row in zip(stacked, file.read(position)):
                values[i] = row
        return stacked

    def check_files(self) -> None:
        """Raise RunError unless every file is there with its size; reads no content but the tokenizer's."""
        for file in self.manifest.files:
            file.check_size(self.directory)
        self.check_tokenizer()

    def check_content(self) -> None:
        """Raise RunError unless every file has its SHA-256; reads everything."""
        for file in self.manifest.files:
            file.check_content(self.directory)
        self.check_tokenizer()

    def check_tokenizer(self) -> None:
        """Raise RunError unless the tokenizer has its SHA-256."""
        record = self.manifest.tokenizer
        if record is None:
            return
        path = self.directory / record.file
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror}); restore it or prepare again") from error
        if found != record.sha256:
            raise RunError(f"{path}: SHA-256 differs from the manifest; restore it or prepare again")

    def _open_chunk(self, chunk: int) -> SampleFile:
        files = self.manifest.chunk_files
        if not 0 <= chunk < len(files):
            raise UserError(f"{self.directory} has no chunk {chunk}, only 0..{len(files) - 1}")
        return self._open(files[chunk])

    def _open(self, record: FileRecord) -> SampleFile:
        return SampleFile(self.directory, record, sequence_length=self.sequence_length, vocab_size=self.vocab_size)


@dataclass(frozen=True)
class SyntheticData:
    """Random tokens without files, for benchmarks and tests: a pure function of (seed, chunk, position)."""

    vocab_size: int
    sequence_length: int
    phases: tuple[PhaseSamples, ...]
    seed: int

    def __post_init__(self) -> None:
        values = {"vocab_size": self.vocab_size, "sequence_length": self.sequence_length, "phases": len(self.phases)}
        for n, phase in enumerate(self.phases):
            values |= {f"phases.{n}.{name}": getattr(phase, name) for name in ("samples", "samples_per_chunk")}
        for name, value in values.items():
            if value < 1:
                raise UserError(f"synthetic data: {name} = {value}: at least 1 is needed")
        if [p.first_chunk for p in self.phases] != [0, *accumulate(p.chunks for p in self.phases)][:-1]:
            raise UserError("synthetic data: each phase must begin at the chunk after the last one of the phase before")

    @classmethod
    def of_chunks(
        cls, *, vocab_size: int, sequence_length: int, chunks: int, samples_per_chunk: int, seed: int
    ) -> "SyntheticData":
        """Return data of one phase, in equal chunks."""
        phase = PhaseSamples(0, chunks * samples_per_chunk, samples_per_chunk, carry=False)
        return cls(vocab_size, sequence_length, (phase,), seed)

    @property
    def sources(self) -> tuple[str, ...]:
        """No sources: there is nothing to validate on."""
        return ()

    @property
    def sha256(self) -> str:
        """SHA-256 of the parameters."""
        return hashlib.sha256(json.dumps(["synthetic", asdict(self)]).encode()).hexdigest()

    @property
    def tokenizer_file(self) -> None:
        """No tokenizer: random tokens are no text."""
        return None

    def sample(self, chunk: int, position: int) -> Sample:
        """Return the window of the high halves of sort_keys(S+1, "synthetic", seed, chunk, position), scaled."""
        last = self.phases[-1]
        if not 0 <= chunk < last.first_chunk + last.chunks:
            raise UserError(f"synthetic data has no chunk {chunk}, only 0..{last.first_chunk + last.chunks - 1}")
        samples = next(p for p in reversed(self.phases) if p.first_chunk <= chunk).chunk_samples(chunk)
        if not 0 <= position < samples:
            raise IndexError(f"position {position} is outside 0..{samples - 1}")
        keys = sort_keys(self.sequence_length + 1, "synthetic", self.seed, chunk, position) >> np.uint64(32)
        return Sample.of_tokens((keys * np.uint64(self.vocab_size)) >> np.uint64(32))

    def validation(self, source: str, start: int = 0, stop: int | None = None, step: int = 1) -> Sample:
        """Raise UserError: random tokens have no sources."""
        raise UserError(f"synthetic data has no validation source {source!r}; prepare real data for that")

    def check_files(self) -> None:
        """Do nothing: there are no files."""
