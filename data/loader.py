"""From a step number to the batch of that step, on every process of a run.

What is read at step n is a function of the data set and n alone: `position` gives the chunk and the sample of each row
of the global batch. A process reads the rows that its own devices hold, whatever the mesh, so the global batch is the
same for any number of processes and reading workers. The only state is the step.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import grain
import jax
import numpy as np
from absl import flags

from data.batch import Batch
from data.chunks import DataManifest, FileRecord, SampleFile
from data.packing import sort_keys
from errors import UserError

_OPEN_CHUNKS = 4  # steps are read in order: one chunk at a time, two around an edge, a few for prefetching threads
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # in batches; grain's default holds 500


class TokenData(Protocol):
    """Random access to the samples of all chunks."""

    @property
    def sequence_length(self) -> int:
        """S: a sample holds S+1 tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        ...

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        ...

    @property
    def samples_per_chunk(self) -> int:
        """Number of samples in each."""
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

    def sample(self, chunk: int, position: int) -> np.ndarray:
        """Return int32[S+1]."""
        ...

    def validation(self, source: str) -> np.ndarray:
        """Return int32[V, S+1]."""
        ...

    def check_files(self) -> None:
        """Raise RunError when something is missing; cheap."""
        ...


class ChunkedData:
    """A prepared data directory. Raises UserError when its manifest cannot be used."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = DataManifest.load(directory)
        # A cache of this object, not of the class: a reader closes with the last object that uses it.
        self._chunk = lru_cache(maxsize=_OPEN_CHUNKS)(self._open_chunk)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        # Reading workers get the path and open files of their own: a reader cannot be shared.
        return ChunkedData, (self.directory,)

    @property
    def sequence_length(self) -> int:
        """S: a sample holds S+1 tokens."""
        return self.manifest.sequence_length

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return self.manifest.vocab_size

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return self.manifest.chunks

    @property
    def samples_per_chunk(self) -> int:
        """Number of samples in each."""
        return self.manifest.samples_per_chunk

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in manifest order."""
        return tuple(s.name for s in self.manifest.sources)

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest."""
        return self.manifest.sha256

    @property
    def tokenizer_file(self) -> Path:
        """SentencePiece model that made the tokens."""
        return self.directory / self.manifest.tokenizer.file

    def sample(self, chunk: int, position: int) -> np.ndarray:
        """Return int32[S+1]. RunError names the file that is missing, or the file and position of a corrupt record."""
        return self._chunk(chunk).read(position)

    def validation(self, source: str) -> np.ndarray:
        """Return int32[V, S+1], the held-out samples of a source; errors as in `sample`, UserError for the name."""
        record = next((s.validation_file for s in self.manifest.sources if s.name == source), None)
        if record is None:
            raise UserError(f"{self.directory} has no source {source!r}; it has {', '.join(self.sources)}")
        file = self._open(record)
        rows = [file.read(i) for i in range(record.samples)]
        return np.array(rows, np.int32).reshape(record.samples, self.sequence_length + 1)

    def check_files(self) -> None:
        """Raise RunError unless every file is there with its size; reads no content."""
        for file in self.manifest.files:
            file.check_size(self.directory)

    def check_content(self) -> None:
        """Raise RunError unless every file has its SHA-256; reads everything."""
        for file in self.manifest.files:
            file.check_content(self.directory)

    def _open_chunk(self, chunk: int) -> SampleFile:
        if not 0 <= chunk < self.chunks:
            raise UserError(f"{self.directory} has no chunk {chunk}, only 0..{self.chunks - 1}")
        return self._open(self.manifest.chunk_files[chunk])

    def _open(self, record: FileRecord) -> SampleFile:
        return SampleFile(self.directory, record, tokens=self.sequence_length + 1, vocab_size=self.vocab_size)


@dataclass(frozen=True)
class SyntheticData:
    """Random tokens without files, for benchmarks and tests: a pure function of (seed, chunk, position)."""

    vocab_size: int
    sequence_length: int
    chunks: int
    samples_per_chunk: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sequence_length", "chunks", "samples_per_chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"synthetic data: {name} = {getattr(self, name)}: at least 1 is needed")

    @property
    def sources(self) -> tuple[str, ...]:
        """No sources: there is nothing to validate on."""
        return ()

    @property
    def sha256(self) -> str:
        """SHA-256 of the parameters."""
        values = [self.vocab_size, self.sequence_length, self.chunks, self.samples_per_chunk, self.seed]
        return hashlib.sha256(json.dumps(["synthetic", *values]).encode()).hexdigest()

    @property
    def tokenizer_file(self) -> None:
        """No tokenizer: random tokens are no text."""
        return None

    def sample(self, chunk: int, position: int) -> np.ndarray:
        """Return int32[S+1]: the high halves of sort_keys(S+1, "synthetic", seed, chunk, position), scaled."""
        if not 0 <= chunk < self.chunks:
            raise UserError(f"synthetic data has no chunk {chunk}, only 0..{self.chunks - 1}")
        if not 0 <= position < self.samples_per_chunk:
            raise IndexError(f"position {position} is outside 0..{self.samples_per_chunk - 1}")
        keys = sort_keys(self.sequence_length + 1, "synthetic", self.seed, chunk, position) >> np.uint64(32)
        return ((keys * np.uint64(self.vocab_size)) >> np.uint64(32)).astype(np.int32)

    def validation(self, source: str) -> np.ndarray:
        """Raise UserError: random tokens have no sources."""
        raise UserError(f"synthetic data has no validation source {source!r}; prepare real data for that")

    def check_files(self) -> None:
        """Do nothing: there are no files."""


def position(step: int, row: int, *, global_batch: int, samples_per_chunk: int) -> tuple[int, int]:
    """Return the (chunk, sample position) of one row of the global batch of a step.

    A chunk has samples_per_chunk // global_batch steps; step s of it reads positions s*B .. s*B+B-1, and the samples
    after the last whole step are not read (fact sheet 2.1: 1,706,976 // 2240 = 762 steps, 96 samples left).
    """
    chunk, s = divmod(step, samples_per_chunk // global_batch)
    return chunk, s * global_batch + row


class _Rows:
    """Grain's random-access source: element i is row rows[i % n] of step start + i // n."""

    def __init__(self, data: TokenData, rows: Sequence[int], global_batch: int, start_step: int, stop_step: int):
        self._data, self._rows, self._global_batch = data, list(rows), global_batch
        self._start_step, self._steps = start_step, stop_step - start_step

    def __len__(self) -> int:
        return self._steps * len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        step, i = divmod(int(index), len(self._rows))
        chunk, place = position(
            self._start_step + step,
            self._rows[i],
            global_batch=self._global_batch,
            samples_per_chunk=self._data.samples_per_chunk,
        )
        return self._data.sample(chunk, place)


def local_batches(
    data: TokenData, rows: Sequence[int], *, global_batch: int, start_step: int, stop_step: int, workers: int = 0
) -> Iterator[np.ndarray]:
    """Yield, for each step, int32[len(rows), S+1]: the given rows of the global batch, in the given order.

    workers > 0 reads in that many processes, a step each in turn; the result is the same.
    """
    source = _Rows(data, rows, global_batch, start_step, stop_step)
    if not len(source):
        return
    dataset = grain.MapDataset.source(source).batch(len(rows)).to_iter_dataset(_READ_AHEAD)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which only absl's own main parses
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    yield from dataset


class Loader:
    """Batches of a data set as global arrays with one sharding.

    `sharding` is the NamedSharding of the [microbatches, rows, S] arrays; it may split any of the three axes over any
    devices of any processes. Raises UserError when the batch does not fit the data or the microbatches.
    """

    def __init__(
        self,
        data: TokenData,
        *,
        global_batch: int,
        microbatches: int,
        sharding: jax.sharding.NamedSharding,
        workers: int = 0,
        prefetch: int = 2,
    ):
        if microbatches < 1 or global_batch < 1 or global_batch % microbatches:
            raise UserError(
                f"a global batch of {global_batch} samples cannot be split into {microbatches} microbatches; "
                "choose a number that divides it"
            )
        if data.samples_per_chunk < global_batch:
            raise UserError(
                f"a chunk has {data.samples_per_chunk} samples, fewer than one global batch of {global_batch}; "
                "lower the global batch, or prepare the data with fewer chunks"
            )
        if workers < 0 or prefetch < 0:
            raise UserError(f"workers = {workers}, prefetch = {prefetch}: at least 0 is needed")
        self._data, self._global_batch, self._workers, self._prefetch = data, global_batch, workers, prefetch
        self._shape = (microbatches, global_batch // microbatches, data.sequence_length)
        self._sharding = sharding
        self.rows = local_rows(sharding, self._shape)
        place = np.full(global_batch, -1)
        place[self.rows] = np.arange(len(self.rows))
        self._place = place.reshape(self._shape[:2])  # where a row of the batch stands among this process's rows

    @property
    def steps_per_chunk(self) -> int:
        """Whole global batches in a chunk."""
        return self._data.samples_per_chunk // self._global_batch

    @property
    def steps(self) -> int:
        """Whole global batches in the data set."""
        return self.steps_per_chunk * self._data.chunks

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yield the batches of steps start_step .. stop_step-1; UserError when the data does not reach that far.

        Up to `prefetch` batches beyond the one in use are on their way to the devices.
        """
        if not 0 <= start_step <= stop_step <= self.steps:
            raise UserError(
                f"steps {start_step}..{stop_step} asked for, but the data holds steps 0..{self.steps} "
                f"({self._data.chunks} chunks of {self.steps_per_chunk} batches); lower the steps or prepare more data"
            )
        return self._batches(start_step, stop_step)

    def _batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        ahead: deque[Batch] = deque()
        for local in local_batches(
            self._data,
            self.rows,
            global_batch=self._global_batch,
            start_step=start_step,
            stop_step=stop_step,
            workers=self._workers,
        ):
            ahead.append(self._global(local))
            if len(ahead) > self._prefetch:
                yield ahead.popleft()
        yield from ahead

    def _global(self, local: np.ndarray) -> Batch:
        """Return the global batch from this process's rows, int32[len(self.rows), S+1]."""

        def array(values: np.ndarray) -> jax.Array:  # values [local rows, S]
            # Not make_array_from_process_local_data: it assembles a wrong batch, without an error, when processes
            # share rows (a pipeline or tensor axis across hosts).
            def block(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # only for arrays without a shape
                return values[self._place[index[:2]]][..., index[2]]

            return jax.make_array_from_callback(self._shape, self._sharding, block)

        inputs, targets = local[:, :-1], local[:, 1:]
        return Batch(array(inputs), array(targets), array(np.ones(inputs.shape, np.float32)))


def local_rows(sharding: jax.sharding.NamedSharding, shape: tuple[int, int, int]) -> list[int]:
    """Return, sorted, the rows of the global batch that this process's devices hold; row = microbatch * rows + r."""
    numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({int(row) for index in indices if index is not None for row in numbers[index[:2]].flat})
