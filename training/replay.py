"""Replay: train again from one checkpoint to another, and compare every logged loss and every checkpoint on the way.

Nothing but the run directory and its data decides what is done: the recipe, and from the ledger the mesh and execution
of every step and the steps that were skipped. On the platform, versions and meshes of the run the result must be the
same bits (contract 2); elsewhere it must be within a stated tolerance (contract 3).
"""

import dataclasses
import itertools
import random
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from checkpoint import digest
from checkpoint.names import flat, nest
from checkpoint.restore import restore
from checkpoint.series import Entry, Series
from data.dataset import TokenData
from errors import RunError, UserError
from parallel import distributed
from parallel.mesh import MeshConfig
from training.config import RunConfig
from training.guard import plain
from training.loop import make_loader, restore_state
from training.metrics import ProgressLine
from training.program import Program, no_limits
from training.record import RunRecord, Segment, made_by
from training.state import TrainState, shardings

#: Per 20 steps, by compute dtype: largest relative deviation of a loss, and absolute one of a parameter. Those of
#: float32 are contract 3's, those of bfloat16 are tested in `tests/crystal_jax`. Deviations grow with the steps, and so
#: do these, but only so many times: over more steps rounding alone may come to more, and who wants to know on another
#: mesh asks over fewer.
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 1e-2)}
LARGEST_SCALE = 10
#: Times the tolerance of a loss: gradient norms and learning rates, relative; optimizer state, relative to the largest
#: number of its array.
NORM, RATE, OPTIMIZER = 10, 0.1, 1000


@dataclasses.dataclass(frozen=True)
class Compared:
    """A checkpoint of the run against the state of the replay at its step."""

    name: str
    step: int
    bitwise: bool
    """Parameters, and the optimizer state where it was kept, have the same bits."""
    parameters: float
    """Largest absolute deviation of a parameter; those that the model calls undetermined left out."""
    tensor: str | None
    """Where that is; None if there is none."""
    optimizer: float
    """Largest deviation in an array of the optimizer state, relative to the largest number of that array."""
    false_digests: tuple[str, ...]
    """Arrays whose content is not what the checkpoint's own manifest says."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """What came of replaying the steps from one checkpoint to another."""

    start: str
    """Name of the checkpoint that it began with: the one asked for, or the nearest before with optimizer state."""
    end: str
    steps: int
    skipped: int
    """Of these, steps whose updates were not applied in the run, and so not here."""
    meshes: tuple[str, ...]
    losses: int
    """Number of logged steps that were compared: loss, gradient norm and learning rate of each."""
    first_difference: int | None
    """First step whose logged numbers are not the same bits."""
    loss: float
    """Largest relative deviation of a loss."""
    grad_norm: float
    """Of a gradient norm."""
    learning_rate: float
    """Of a learning rate."""
    checkpoints: tuple[Compared, ...]
    tolerance: tuple[float, float]
    """Of losses (relative) and parameters (absolute), over so many steps."""
    differs: tuple[str, ...]
    """What is not as it was in the run and may change bits: mesh, versions, device, …"""

    @property
    def verdict(self) -> Literal["bitwise", "within tolerance", "DIFFERS"]:
        """The answer; where nothing is known that may change bits, one that is not bitwise differs."""
        if any(c.false_digests for c in self.checkpoints):
            return "DIFFERS"
        if self.first_difference is None and all(c.bitwise for c in self.checkpoints):
            return "bitwise"
        loss, parameters = self.tolerance
        near = self.loss <= loss and self.grad_norm <= NORM * loss and self.learning_rate <= RATE * loss
        near &= all(c.parameters <= parameters and c.optimizer <= OPTIMIZER * loss for c in self.checkpoints)
        return "within tolerance" if near and self.differs else "DIFFERS"

    def as_dict(self) -> dict[str, Any]:
        """For the ledger and for JSON."""
        finite = lambda fields: {k: plain(v) if isinstance(v, float) else v for k, v in fields.items()}  # noqa: E731
        values = finite(dataclasses.asdict(self))
        values["checkpoints"] = [finite(dataclasses.asdict(c)) for c in self.checkpoints]
        return {"verdict": self.verdict, **values}

    def lines(self) -> list[str]:
        """For people."""
        skipped = f" ({self.skipped} skipped)" if self.skipped else ""
        found = [
            f"{self.start} -> {self.end}: {self.verdict}; {self.steps} steps{skipped} on {' then '.join(self.meshes)}, "
            f"{self.losses} losses and {len(self.checkpoints)} checkpoints compared"
        ]
        for c in self.checkpoints:
            if c.false_digests:
                found.append(f"  {c.name}: not what its own manifest says: {', '.join(c.false_digests[:5])}")
            elif not c.bitwise:
                where = f", in {c.tensor}" if c.tensor else ""
                found.append(
                    f"  {c.name} (step {c.step}): parameters deviate by up to {c.parameters:.1e}{where}; optimizer "
                    f"state by {c.optimizer:.1e} of its largest"
                )
        if self.verdict != "bitwise":
            first = "none" if self.first_difference is None else f"step {self.first_difference}"
            found.append(
                f"  first step with other bits: {first}; losses deviate by up to {self.loss:.1e} (tolerance "
                f"{self.tolerance[0]:.1e}), gradient norms by {self.grad_norm:.1e} ({NORM * self.tolerance[0]:.1e}), "
                f"learning rates by {self.learning_rate:.1e}; tolerance of parameters {self.tolerance[1]:.1e}, of "
                f"optimizer state {OPTIMIZER * self.tolerance[0]:.1e}"
            )
            found.append(f"  not as in the run: {'; '.join(self.differs) or 'nothing that is known to change bits'}")
        return found


class Replayer:
    """Replays links of a run's series; what was compiled for one is used for the next.

    Args:
        record: of the run.
        data: what it was trained on.
        mesh: replay on this one, if not on those of the run.

    Raises:
        UserError: it is other data.
    """

    def __init__(self, record: RunRecord, data: TokenData, mesh: MeshConfig | None = None):
        self.record, self.data, self.mesh = record, data, mesh
        self.config = record.config.resolve(data)
        self.entries = Series(record.run).entries()
        if not self.entries:
            raise UserError(f"{record.run}: no finished checkpoint in it")
        if {e.manifest.data_sha256 for e in self.entries} != {data.sha256}:
            raise UserError(
                f"{record.run}: was trained on data with manifest {str(self.entries[0].manifest.data_sha256)[:12]}…, "
                f"and this has {data.sha256[:12]}…; give --data the right one"
            )
        self._programs: dict[RunConfig, Program] = {}

    def origin(self, entry: Entry) -> Entry:
        """Where a replay from a checkpoint begins: there, or at the nearest before that has the optimizer state."""
        before = [e for e in self.entries if e.has("optimizer") and e.manifest.step <= entry.manifest.step]
        if not before:
            raise RunError(
                f"{entry.path}: neither it nor a checkpoint before it has the optimizer state to replay from"
            )
        return before[-1]

    def links(self, start: Entry, end: Entry) -> list[tuple[Entry, Entry]]:
        """All pairs of neighbouring checkpoints between two."""
        inside = [e for e in self.entries if start.manifest.step <= e.manifest.step <= end.manifest.step]
        return list(itertools.pairwise(inside))

    def sample(self, start: Entry, end: Entry, number: int, seed: int) -> list[tuple[Entry, Entry]]:
        """So many of the links, at random, in order; all if there are not more."""
        links = self.links(start, end)
        chosen = random.Random(seed).sample(range(len(links)), min(number, len(links)))
        return [links[k] for k in sorted(chosen)]

    def replay(self, start: Entry, end: Entry, progress: bool = True) -> Replay:
        """Train from ``start`` to ``end``, and compare all checkpoints from the one after ``start`` on.

        Raises:
            UserError: ``start`` is not before ``end``; not enough devices for the meshes of the run.
            RunError: a checkpoint or a data chunk is damaged; the ledger does not say how the steps were made.
        """
        first, last = self.origin(start), end.manifest.step
        if not start.manifest.step < last:
            raise UserError(f"verify: {start.manifest.name} is not before {end.manifest.name}")
        line = ProgressLine(last, writes=progress and jax.process_index() == 0)
        every = [*Series(self.record.run).early(), *self.entries]
        wanted = {e.manifest.step: e for e in every if start.manifest.step < e.manifest.step <= last}
        comparison = _Comparison(self.record)
        differs: dict[str, None] = {}
        meshes: dict[str, None] = {}
        checkpoints: list[Compared] = []
        step, skipped, state, program, batches = first.manifest.step, 0, None, None, None
        segment: Segment | None = None
        limits: Any = None
        while step < last:
            if (found := self._segment(step)) is not segment:
                segment, batches = found, None
                program = self._program(segment)
                state = restore_state(program, first) if state is None else _move(state, program)
                limits = no_limits(program.mesh)
                differs |= dict.fromkeys(self._differences(segment, program))
                meshes |= {_text(program.mesh): None}
            assert program is not None
            assert state is not None
            if (until := self.record.skipped(step)) > step:
                for _ in range(step, min(until, last)):
                    state, skipped, step, batches = program.pass_over(state), skipped + 1, step + 1, None
                    if step in wanted:
                        checkpoints.append(self._compare(wanted[step], program, state))
                continue
            if batches is None:
                batches = make_loader(program.config, self.data, program.mesh).batches(step, last)
            state, values = program.train_step(state, next(batches), limits)
            comparison.step(step, values, line)
            step += 1
            if step in wanted:
                checkpoints.append(self._compare(wanted[step], program, state))
        comparison.flush(line)
        line.done()
        scale = min(max(1.0, (last - first.manifest.step) / 20), LARGEST_SCALE)
        loss, parameters = TOLERANCE[self.config.execution.compute_dtype]
        return Replay(
            start=first.manifest.name,
            end=end.manifest.name,
            steps=last - first.manifest.step,
            skipped=skipped,
            meshes=tuple(meshes),
            losses=comparison.compared,
            first_difference=comparison.first,
            loss=comparison.largest["loss"],
            grad_norm=comparison.largest["grad_norm"],
            learning_rate=comparison.largest["learning_rate"],
            checkpoints=tuple(checkpoints),
            tolerance=(loss * scale, parameters * scale),
            differs=tuple(differs),
        )

    def _segment(self, step: int) -> Segment:
        before = [s for s in self.record.segments if s.step <= step]
        if not before:
            raise RunError(f"{self.record.run}/ledger.jsonl: does not say how step {step} was made")
        return before[-1]

    def _program(self, segment: Segment) -> Program:
        mesh = self.mesh or MeshConfig(**segment.mesh)
        config = dataclasses.replace(self.config, mesh=mesh, execution=segment.execution or self.config.execution)
        if config not in self._programs:
            devices = jax.devices()
            if -1 not in mesh.degrees.values() and mesh.size < len(devices) and jax.process_count() == 1:
                devices = devices[: mesh.size]
            if -1 not in mesh.degrees.values() and mesh.size > len(devices):
                raise UserError(
                    f"verify: the run was trained on {mesh}, and there are {len(devices)} {devices[0].platform} "
                    f"devices; give --simulate {mesh.size}, or another --mesh"
                )
            built, planned = mesh.build(devices), config
            try:
                planned.check_mesh(built.shape)
            except UserError:  # what suits the run's mesh need not suit another: then as the recipe has it
                planned = dataclasses.replace(config, execution=self.config.execution)
                planned.check_mesh(built.shape)
            self._programs[config] = Program.plan(planned, built).compile()
            distributed.together()
        return self._programs[config]

    def _differences(self, segment: Segment, program: Program) -> list[str]:
        """What may change bits and is not as it was."""
        found, mesh = [], program.mesh
        if segment.execution is None:
            found.append("execution of the run not known")
        elif (was := dataclasses.asdict(segment.execution)) != (now := dataclasses.asdict(program.config.execution)):
            found += [f"execution.{n} {now[n]} instead of {was[n]}" for n in was if was[n] != now[n]]
        if dict(segment.mesh) != dict(mesh.shape):
            found.append(f"mesh {_text(mesh)} instead of {MeshConfig(**segment.mesh)}")
        here = made_by(mesh)
        for name, was in segment.made_by.items():
            if was is None:
                found.append(f"{name} of the run not known")
            elif isinstance(was, Mapping):
                names = was.keys() | here[name].keys()
                changed = sorted(n for n in names if was.get(n) != here[name].get(n))
                found += [f"{n} {here[name].get(n)} instead of {was.get(n)}" for n in changed]
            elif was != here[name]:
                found.append(f"{name} {here[name]} instead of {was}")
        return found

    def _compare(self, entry: Entry, program: Program, state: TrainState) -> Compared:
        """The arrays of a checkpoint, as they are on disk, against a state on the same mesh; an item at a time."""
        bitwise, false, deviations = True, [], {"params": 0.0, "optimizer": 0.0}
        tensor = None
        for item in [item for item in deviations if entry.has(item)]:
            theirs, ours = flat(nest(self._stored(entry, program, item))), flat(nest(getattr(state, item)))
            names = list(theirs)
            version = entry.manifest.digest_version
            on_disk = digest.digests([(name, theirs[name]) for name in names], version)
            said = [entry.manifest.tensors[f"{item}/{name}"].get("digest") for name in names]
            false += [f"{item}/{n}" for n, d, s in zip(names, on_disk, said, strict=True) if s is not None and s != d]
            if on_disk == digest.digests([(name, ours[name]) for name in names], version):
                continue
            bitwise = False
            compare = _deviation if item == "params" else _relative
            undetermined = self.config.model.undetermined
            found = {n: float(compare(theirs[n], ours[n])) for n in names if not n.endswith(undetermined)}
            largest = max(found, key=found.__getitem__)
            deviations[item] = found[largest]
            tensor = largest if item == "params" else tensor
        return Compared(
            name=entry.manifest.name,
            step=entry.manifest.step,
            bitwise=bitwise,
            parameters=deviations["params"],
            tensor=tensor,
            optimizer=deviations["optimizer"],
            false_digests=tuple(false),
        )

    @staticmethod
    def _stored(entry: Entry, program: Program, item: str) -> Any:
        wanted = {"params": None, "optimizer": None} | {item: getattr(program.abstract, item)}
        params, optimizer = restore(entry, **wanted)
        return params if item == "params" else optimizer


class _Comparison:
    """What the steps report against what was logged of them, one step late, as in the loop."""

    def __init__(self, record: RunRecord):
        self._record = record
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self.compared, self.largest = 0, dict.fromkeys(("loss", "grad_norm", "learning_rate"), 0.0)
        self.first: int | None = None

    def step(self, step: int, values: dict[str, jax.Array], line: ProgressLine) -> None:
        self.flush(line)
        self._pending = (step, values)

    def flush(self, line: ProgressLine) -> None:
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        found = {name: float(values[name]) for name in self.largest}
        line.show(step, found)
        logged = self._record.logged.get(step)
        if logged is None:
            return
        self.compared += 1
        if any(found[name] != logged[name] for name in found):
            self.first = step if self.first is None else self.first
            for name, value in found.items():
                deviation = abs(value - logged[name]) / max(abs(logged[name]), 1e-30) if value != logged[name] else 0.0
                self.largest[name] = max(self.largest[name], deviation if np.isfinite(deviation) else np.inf)


@jax.jit
def _deviation(a: jax.Array, b: jax.Array) -> jax.Array:
    difference = jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))
    return jnp.where(jnp.isnan(difference), jnp.inf, difference)


@jax.jit
def _relative(a: jax.Array, b: jax.Array) -> jax.Array:
    return _deviation(a, b) / jnp.maximum(jnp.max(jnp.abs(a.astype(jnp.float32))), 1e-30)


def _move(state: TrainState, program: Program) -> TrainState:
    """A state on the mesh of another program, bit for bit."""
    return jax.device_put(state, shardings(program.abstract))


def _text(mesh: Mesh) -> str:
    return str(MeshConfig(**dict(mesh.shape)))
