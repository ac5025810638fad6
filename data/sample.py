"""What a data set is made of, for whoever reads it: samples, and the phases that read them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from errors import UserError


class Sample(NamedTuple):
    """One sequence to predict, or several stacked in front: the names and meaning of `data.batch.Batch`."""

    inputs: np.ndarray  # int32 [..., S]
    targets: np.ndarray  # int32 [..., S]: what follows each input
    weights: np.ndarray  # float32 [..., S]: weight of each target in the loss, 0 or 1

    @classmethod
    def of_tokens(cls, tokens: np.ndarray) -> "Sample":
        """Return the sample of a window of S+1 ids, every target counted."""
        tokens = np.asarray(tokens, np.int32)
        return cls(tokens[..., :-1], tokens[..., 1:], np.ones(tokens[..., 1:].shape, np.float32))

    @property
    def tokens(self) -> np.ndarray:
        """int32 [..., S+1]: the inputs and the last target."""
        return np.concatenate([self.inputs, self.targets[..., -1:]], axis=-1)

    @property
    def is_window(self) -> bool:
        """Whether `tokens` is all of it: targets are the inputs' successors, and each counts."""
        return bool((self.inputs[..., 1:] == self.targets[..., :-1]).all() and (self.weights == 1).all())


@dataclass(frozen=True)
class PhaseSamples:
    """The samples that one phase of a run reads, in order, and the chunks of the data set that hold them."""

    first_chunk: int
    """Number, in the data set, of its first chunk."""
    samples: int
    """In the whole phase."""
    samples_per_chunk: int
    """In every chunk but the last, which may have fewer."""
    carry: bool
    """Whether a batch may begin in one chunk and end in the next (Crystal, fact sheet 3.4); else the samples of a chunk
    that fill no batch are not read (Amber, fact sheet 2.1: 1,706,976 = 762 * 2240 + 96)."""

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.samples // self.samples_per_chunk)

    def chunk_samples(self, chunk: int) -> int:
        """Return the samples in one chunk, by its number in the data set."""
        return min(self.samples_per_chunk, self.samples - (chunk - self.first_chunk) * self.samples_per_chunk)

    def steps(self, global_batch: int) -> int:
        """Return how many whole batches there are."""
        if self.carry:
            return self.samples // global_batch
        whole, rest = divmod(self.samples, self.samples_per_chunk)
        return whole * (self.samples_per_chunk // global_batch) + rest // global_batch

    def place(self, step: int, row: int, global_batch: int) -> tuple[int, int]:
        """Return (chunk, position) of one row of the batch of a step, both counted from the phase's first."""
        if self.carry:
            chunk, position = divmod(step * global_batch + row, self.samples_per_chunk)
        else:
            chunk, s = divmod(step, self.samples_per_chunk // global_batch)
            position = s * global_batch + row
        return self.first_chunk + chunk, position

    def reader(self, chunk: int, position: int, global_batch: int) -> tuple[int, int] | None:
        """Return (step, row) that reads a sample, None if no whole batch does: the inverse of `place`."""
        if self.carry:
            slot = (chunk - self.first_chunk) * self.samples_per_chunk + position
            step, row = divmod(slot, global_batch)
            return (step, row) if step < self.steps(global_batch) else None
        s, row = divmod(position, global_batch)
        if s >= self.chunk_samples(chunk) // global_batch:
            return None
        return (chunk - self.first_chunk) * (self.samples_per_chunk // global_batch) + s, row


@dataclass(frozen=True)
class Schedule:
    """Which sample each row of each step of a run reads: a function of the data's phases, the run's, and its batch.

    A run of several phases may read on through data of one phase; else it has the data's phases.
    """

    phases: tuple[PhaseSamples, ...]  # of the data
    phase_steps: tuple[int, ...]  # of the run
    global_batch: int

    def __post_init__(self) -> None:
        have = [p.steps(self.global_batch) for p in self.phases]
        want = [sum(self.phase_steps)] if len(have) == 1 else list(self.phase_steps)
        if len(have) != len(want):
            raise UserError(
                f"data: prepared for {len(have)} phases, and the run has {len(want)}; prepare it for this recipe"
            )
        for n, (there, asked) in enumerate(zip(have, want)):
            if asked > there:
                raise UserError(
                    f"data: phase {n} has {there:,} steps of {self.global_batch} samples, and the run's {asked:,}; "
                    f"prepare more, or set --phases.{n}.steps"
                )

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return sum(self.phase_steps)

    def place(self, step: int, row: int) -> tuple[int, int]:
        """Return the (chunk, position) of the sample that a row of the run's step reads."""
        phase = 0
        if len(self.phases) > 1:
            while step >= self.phase_steps[phase]:
                step -= self.phase_steps[phase]
                phase += 1
        return self.phases[phase].place(step, row, self.global_batch)

    def reader(self, chunk: int, position: int) -> tuple[int, int] | None:
        """Return the (step, row) of the run that reads a sample, None if none does: the inverse of `place`."""
        phase = next(n for n, p in enumerate(self.phases) if chunk < p.first_chunk + p.chunks)
        found = self.phases[phase].reader(chunk, position, self.global_batch)
        if found is None or found[0] >= (self.steps if len(self.phases) == 1 else self.phase_steps[phase]):
            return None
        return found[0] + sum(self.phase_steps[:phase]), found[1]
