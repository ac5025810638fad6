"""From a step number to the batch of that step, on every process of a run.

What is read at step n is a function of the data set and n alone: `Schedule.place` gives the chunk and the position of
each row of the global batch. A process reads the rows that its own devices hold, whatever the mesh, so the global batch
is the same for any number of processes and reading workers. The only state is the step.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from data.batch import Batch
from data.dataset import TokenData
from data.sample import Sample, Schedule
from errors import UserError

_STATE = 1  # version of what `Loader.state` returns
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # in batches; grain's default holds 500


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
    if not rows:  # a process whose devices hold nothing but padding
        none = Sample.of_tokens(np.zeros((0, data.sequence_length + 1), np.int32))
        yield from itertools.repeat(none, stop_step - start_step)
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
    [microbatches, rows, S] arrays; it may split any of the three axes over any devices of any processes. `rows` are
    those of a microbatch, None = as many as it takes; what the batch does not fill is padding (`data.batch.Batch`).
    Raises UserError when the data has not the steps, or the batch does not fit the data or the microbatches.
    """

    def __init__(
        self,
        data: TokenData,
        *,
        phase_steps: Sequence[int],
        global_batch: int,
        microbatches: int,
        rows: int | None = None,
        sharding: jax.sharding.NamedSharding,
        workers: int = 0,
        prefetch: int = 2,
    ):
        if not 1 <= microbatches <= global_batch:
            raise UserError(
                f"a global batch of {global_batch} samples cannot be split into {microbatches} microbatches; "
                "choose a number from 1 to the samples that there are"
            )
        rows = -(-global_batch // microbatches) if rows is None else rows
        if microbatches * rows < global_batch:
            raise UserError(
                f"{microbatches} microbatches of {rows} rows do not hold a global batch of {global_batch} samples"
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
        self._shape = (microbatches, rows, data.sequence_length)
        self._sharding = sharding
        self.rows = [row for row in local_rows(sharding, self._shape) if row < global_batch]
        self._padded = microbatches * rows > global_batch
        place = np.full(microbatches * rows, len(self.rows))  # padding: the row of zeros after the last (`_global`)
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
            if self._padded:
                values = np.concatenate([values, np.zeros_like(values, shape=(1, values.shape[1]))])

            # Not make_array_from_process_local_data: it assembles a wrong batch, without an error, when processes
            # share rows (a pipeline or tensor axis across hosts).
            def block(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # only for arrays without a shape
                return values[self._place[index[:2]]][..., index[2]]

            return jax.make_array_from_callback(self._shape, self._sharding, block)

        return Batch(*map(array, local))


def local_rows(sharding: jax.sharding.NamedSharding, shape: tuple[int, int, int]) -> list[int]:
    """Return, sorted, the rows that this process's devices hold, padding too; row = microbatch * rows + r."""
    numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({int(row) for index in indices if index is not None for row in numbers[index[:2]].flat})
