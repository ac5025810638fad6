"""From a step number to the batch of that step, on every process of a run.

What is read at step n is a function of the data set and n alone: `Schedule.place` gives the chunk and the position of
each row of the global batch. A process reads the rows that its own devices hold, whatever the mesh, so the global batch
is the same for any number of processes and reading workers. The only state is the step.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags

from data.batch import Batch
from data.chunks import DataManifest, FileRecord, SampleFile
from data.packing import sort_keys
from data.sample import PhaseSamples, Sample, Schedule
from errors import RunError, UserError

_OPEN_CHUNKS = 4  # steps are read in order: one chunk at a time, two around an edge, a few for prefetching threads
_STATE = 1  # version of what `Loader.state` returns
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # in batches; grain's default holds 500


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


class _Rows:
    """Grain's random-access source: element i is row rows[i % n] of step start + i // n."""

    def __init__(self, data: TokenData, schedule: Schedule, rows: Sequence[int], start_step: int, stop_step: int):
        self._data, self._schedule, self._rows = data, schedule, list(rows)
        self._start_step, self._steps = start_step, stop_step - start_step

    def __len__(self) -> int:
        return self._steps * len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        step, i = divmod(int(index), len(self._rows))
        return self._data.sample(*self._schedule.place(self._start_step + step, self._rows[i]))


def local_batches(
    data: TokenData, schedule: Schedule, rows: Sequence[int], *, start_step: int, stop_step: int, workers: int = 0
) -> Iterator[Sample]:
    """Yield, for each step, the given rows of the global batch in the given order, stacked: arrays of [rows, S].

    workers > 0 reads in that many processes, a step each in turn; the result is the same.
    """
    source = _Rows(data, schedule, rows, start_step, stop_step)
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

    `phase_steps` are the steps of each phase of the run (`Schedule`). `sharding` is the NamedSharding of the
    [microbatches, rows, S] arrays; it may split any of the three axes over any devices of any processes. Raises
    UserError when the data has not the steps, or the batch does not fit the data or the microbatches.
    """

    def __init__(
        self,
        data: TokenData,
        *,
        phase_steps: Sequence[int],
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
        if workers < 0 or prefetch < 0:
            raise UserError(f"workers = {workers}, prefetch = {prefetch}: at least 0 is needed")
        if small := [p for p in data.phases if not p.carry and p.samples_per_chunk < global_batch]:
            raise UserError(
                f"a chunk has {small[0].samples_per_chunk} samples, fewer than one global batch of {global_batch}; "
                "lower the global batch, or prepare the data with fewer chunks"
            )
        self.schedule = Schedule(data.phases, tuple(phase_steps), global_batch)
        self.data, self._workers, self._prefetch = data, workers, prefetch
        self._shape = (microbatches, global_batch // microbatches, data.sequence_length)
        self._sharding = sharding
        self.rows = local_rows(sharding, self._shape)
        place = np.full(global_batch, -1)
        place[self.rows] = np.arange(len(self.rows))
        self._place = place.reshape(self._shape[:2])  # where a row of the batch stands among this process's rows

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.schedule.steps

    def state(self, step: int) -> dict[str, Any]:
        """Return all that it takes to go on after `step` steps: see `start`."""
        batch = self.schedule.global_batch
        return {"version": _STATE, "step": step, "data": self.data.sha256, "global_batch": batch}

    def start(self, state: Mapping[str, Any]) -> int:
        """Return the step to go on with; UserError when this loader would not read what `state`'s would have."""
        if state["version"] != _STATE:
            raise UserError(
                f"the loader's state has version {state['version']}, and this program reads {_STATE}; go on with the "
                "version that wrote it"
            )
        if state["data"] != self.data.sha256:
            raise UserError(
                f"the run was trained on data with manifest {str(state['data'])[:12]}…, and --data has "
                f"{self.data.sha256[:12]}…; give the run's own data, or another --run directory"
            )
        if state["global_batch"] != self.schedule.global_batch:
            raise UserError(
                f"the run's global batch is {state['global_batch']} samples, and {self.schedule.global_batch} are "
                "asked for, so that step numbers mean other samples; give the run's own, or another --run directory"
            )
        return int(state["step"])

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yield the batches of steps start_step .. stop_step-1 of the run; UserError when it has no such steps.

        Up to `prefetch` batches beyond the one in use are on their way to the devices.
        """
        if not 0 <= start_step <= stop_step <= self.steps:
            raise UserError(f"steps {start_step}..{stop_step} asked for, but the run has steps 0..{self.steps}")
        return self._batches(start_step, stop_step)

    def _batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        ahead: deque[Batch] = deque()
        for local in local_batches(
            self.data, self.schedule, self.rows, start_step=start_step, stop_step=stop_step, workers=self._workers
        ):
            ahead.append(self._global(local))
            if len(ahead) > self._prefetch:
                yield ahead.popleft()
        yield from ahead

    def _global(self, local: Sample) -> Batch:
        """Return the global batch from this process's rows, arrays of [len(self.rows), S]."""

        def array(values: np.ndarray) -> jax.Array:  # values [local rows, S]
            # Not make_array_from_process_local_data: it assembles a wrong batch, without an error, when processes
            # share rows (a pipeline or tensor axis across hosts).
            def block(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # only for arrays without a shape
                return values[self._place[index[:2]]][..., index[2]]

            return jax.make_array_from_callback(self._shape, self._sharding, block)

        return Batch(*map(array, local))


def local_rows(sharding: jax.sharding.NamedSharding, shape: tuple[int, int, int]) -> list[int]:
    """Return, sorted, the rows of the global batch that this process's devices hold; row = microbatch * rows + r."""
    numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({int(row) for index in indices if index is not None for row in numbers[index[:2]].flat})
