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
from checkpoint.series import Entry, Series
from data.loader import TokenData
from errors import RunError, UserError
from parallel.mesh import MeshConfig
from training.config import RunConfig
from training.guard import plain
from training.loop import make_loader, restore_state
from training.metrics import ProgressLine
from training.program import Program, no_limits
from training.record import RunRecord, Segment, made_by
from training.state import TrainState, shardings

#: Per 20 steps, by compute dtype: largest relative deviation of a loss, and absolute one of a parameter. Deviations
#: grow with the steps; those of float32 are contract 3's, those of bfloat16 are tested in `tests/crystal_jax`.
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 1e-2)}


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
        near = self.loss <= self.tolerance[0] and all(c.parameters <= self.tolerance[1] for c in self.checkpoints)
        return "within tolerance" if near and self.differs else "DIFFERS"

    def as_dict(self) -> dict[str, Any]:
        """For the ledger and for JSON."""
        compared = [{**dataclasses.asdict(c), "parameters": plain(c.parameters)} for c in self.checkpoints]
        values = dataclasses.asdict(self) | {"loss": plain(self.loss), "checkpoints": compared}
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
                found.append(
                    f"  {c.name} (step {c.step}): parameters deviate by up to {c.parameters:.1e}"
                    + (f", in {c.tensor}" if c.tensor else "")
                )
        if self.verdict != "bitwise":
            first = "none" if self.first_difference is None else f"step {self.first_difference}"
            found.append(
                f"  first step with other bits: {first}; losses deviate by up to {self.loss:.1e} (tolerance "
                f"{self.tolerance[0]:.1e}), parameters tolerance {self.tolerance[1]:.1e}"
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
        wanted = {e.manifest.step: e for e in self.entries if start.manifest.step < e.manifest.step <= last}
        comparison = _Comparison(self.record, self.config)
        differs: dict[str, None] = {}
        meshes: dict[str, None] = {}
        checkpoints: list[Compared] = []
        step, skipped, state, program, batches = first.manifest.step, 0, None, None, None
        segment: Segment | None = None
        while step < last:
            if (found := self._segment(step)) is not segment:
                segment, batches = found, None
                program = self._program(segment)
                state = restore_state(program, first) if state is None else _move(state, program)
                differs |= dict.fromkeys(self._differences(segment, program.mesh))
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
            state, values = program.train_step(state, next(batches), no_limits(program.mesh))
            comparison.step(step, values, line)
            step += 1
            if step in wanted:
                checkpoints.append(self._compare(wanted[step], program, state))
        comparison.flush(line)
        line.done()
        scale = max(1.0, (last - first.manifest.step) / 20)
        loss, parameters = TOLERANCE[self.config.execution.compute_dtype]
        return Replay(
            start=first.manifest.name,
            end=end.manifest.name,
            steps=last - first.manifest.step,
            skipped=skipped,
            meshes=tuple(meshes),
            losses=comparison.compared,
            first_difference=comparison.first,
            loss=comparison.largest,
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
        execution = segment.execution if segment.execution and self.mesh is None else self.config.execution
        config = dataclasses.replace(self.config, mesh=mesh, execution=execution)
        if config not in self._programs:
            devices = jax.devices()
            if -1 not in mesh.degrees.values() and mesh.size < len(devices) and jax.process_count() == 1:
                devices = devices[: mesh.size]
            if -1 not in mesh.degrees.values() and mesh.size > len(devices):
                raise UserError(
                    f"verify: the run was trained on {mesh}, and there are {len(devices)} {devices[0].platform} "
                    f"devices; give --simulate {mesh.size}, or another --mesh"
                )
            built = mesh.build(devices)
            config.check_mesh(built.shape)
            self._programs[config] = Program.plan(config, built).compile()
        return self._programs[config]

    def _differences(self, segment: Segment, mesh: Mesh) -> list[str]:
        """What may change bits and is not as it was."""
        found = []
        if dict(segment.mesh) != dict(mesh.shape):
            found.append(f"mesh {_text(mesh)} instead of {MeshConfig(**segment.mesh)}")
        now = made_by(mesh)
        for name, was in segment.made_by.items():
            if was is None:
                found.append(f"{name} of the run not known")
            elif isinstance(was, Mapping):
                names = was.keys() | now[name].keys()
                changed = sorted(n for n in names if was.get(n) != now[name].get(n))
                found += [f"{n} {now[name].get(n)} instead of {was.get(n)}" for n in changed]
            elif was != now[name]:
                found.append(f"{name} {now[name]} instead of {was}")
        return found

    def _compare(self, entry: Entry, program: Program, state: TrainState) -> Compared:
        """The arrays of a checkpoint, as they are on disk, against a state on the same mesh."""
        with_optimizer = entry.has("optimizer")
        stored = restore_state(program, entry, optimizer=with_optimizer)
        theirs = {"params": flat(nest(stored.params))}
        ours = {"params": flat(nest(state.params))}
        if with_optimizer:
            theirs["optimizer"], ours["optimizer"] = flat(nest(stored.optimizer)), flat(nest(state.optimizer))
        names = [(item, name) for item, arrays in theirs.items() for name in arrays]
        on_disk = digest.digests([(name, theirs[item][name]) for item, name in names])
        here = digest.digests([(name, ours[item][name]) for item, name in names])
        said = [entry.manifest.tensors[f"{item}/{name}"].get("digest") for item, name in names]
        false = [f"{i}/{n}" for (i, n), d, s in zip(names, on_disk, said, strict=True) if s is not None and s != d]
        deviations: dict[str, float] = {}
        if on_disk != here:
            determined = [n for n in theirs["params"] if n not in self.config.model.undetermined]
            deviations = {n: float(_deviation(theirs["params"][n], ours["params"][n])) for n in determined}
        largest = max(deviations, key=deviations.__getitem__, default=None)
        return Compared(
            name=entry.manifest.name,
            step=entry.manifest.step,
            bitwise=on_disk == here,
            parameters=deviations[largest] if largest else 0.0,
            tensor=largest,
            false_digests=tuple(false),
        )


class _Comparison:
    """What the steps report against what was logged of them, one step late, as in the loop."""

    def __init__(self, record: RunRecord, config: RunConfig):
        self._record, self._config = record, config
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self.compared, self.largest = 0, 0.0
        self.first: int | None = None

    def step(self, step: int, values: dict[str, jax.Array], line: ProgressLine) -> None:
        self.flush(line)
        self._pending = (step, values)

    def flush(self, line: ProgressLine) -> None:
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        found = {name: float(values[name]) for name in ("loss", "grad_norm", "learning_rate")}
        line.show(step, found | {"step_time_s": 0.0, "tokens_per_s": 0.0})
        logged = self._record.logged.get(step)
        if logged is None:
            return
        self.compared += 1
        if any(found[name] != logged[name] for name in found):
            self.first = step if self.first is None else self.first
            deviation = abs(found["loss"] - logged["loss"]) / max(abs(logged["loss"]), 1e-30)
            self.largest = max(self.largest, deviation if np.isfinite(deviation) else np.inf)


@jax.jit
def _deviation(a: jax.Array, b: jax.Array) -> jax.Array:
    difference = jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))
    return jnp.where(jnp.isnan(difference), jnp.inf, difference)


def _move(state: TrainState, program: Program) -> TrainState:
    """A state on the mesh of another program, bit for bit."""
    return jax.device_put(state, shardings(program.abstract))


def _text(mesh: Mesh) -> str:
    return str(MeshConfig(**dict(mesh.shape)))
