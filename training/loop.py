"""The training loop: build, restore, then for each step: batch, step, log, validate, save."""

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from checkpoint.files import write_atomically
from checkpoint.manifest import Kind, Manifest, checkpoint_name, code_version, environment
from checkpoint.restore import restore
from checkpoint.series import Entry, Series
from checkpoint.writer import SeriesWriter
from data.dataset import SyntheticData, TokenData
from data.loader import Loader
from data.mixed import MixedData
from errors import RunError, UserError
from parallel import distributed
from training import memory
from training import step as steps
from training.config import Family, RunConfig, SeriesConfig
from training.guard import Fault, Guard, plain
from training.metrics import Ledger, MetricsWriter, ProgressLine
from training.program import Program, no_limits
from training.record import RunRecord, made_by
from training.state import TrainState
from training.trace import documents

Families = Mapping[str, Family]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    reason: Literal["finished", "stopped", "interrupted"]
    """All steps done; stopped early on request (``stop_at``); or told to stop by a signal."""
    step: int
    """Updates done."""
    tokens: int
    """Tokens seen."""
    loss: float | None
    """Loss of the last step of this call, None if there was none."""
    validation_loss: float | None
    """Newest validation loss of this call, None if it reached no end of a chunk."""
    resumed_from: int | None
    """Step that this call continued from, None for a new run."""
    compile_s: float
    """Seconds to trace and compile the train step, or to find it compiled."""
    compile_cached: bool
    """Whether it was found in the compile cache."""
    peak_bytes_per_device: int
    """Planned by the compiler."""
    median_step_time_s: float | None
    tokens_per_s: float | None
    """From the median step."""
    mfu_causal: float | None
    """Model FLOP utilisation that counts the half of attention which a causal model needs; None: no peak is known."""
    mfu_full: float | None
    """The same, counting attention as if every position read every other."""


def train(
    config: RunConfig,
    run: Path,
    data: TokenData,
    families: Families,
    stop_at: int | None = None,
    faults: Sequence[Fault] = (),
) -> Outcome:
    """Train, or continue, the run in a directory. Several processes call it alike, inside `distributed.start`.

    Args:
        config: the recipe; resolved here with the data.
        run: run directory; made if it is not there. The same call resumes.
        data: `data.dataset.ChunkedData` or `SyntheticData`.
        families: config classes by family name, to read ``config.json``.
        stop_at: stop after this many updates in all, with a checkpoint to resume from.
        faults: damage to the batches of some steps, to see what the guard does.

    Raises:
        UserError: the directory belongs to another recipe or data; the mesh does not divide; a process was started
            with another recipe, data or code than process 0.
        RunError: a checkpoint is corrupt, the disk is full; or the guard stopped the run.
    """
    config = config.resolve(data)
    mesh = _mesh(config)
    loader = make_loader(config, data, mesh)
    data.check_files()
    lead = distributed.is_lead()
    distributed.check_same(
        str(run), {"config": config.to_dict(), "data manifest": data.sha256, "--steps": stop_at, "code": code_version()}
    )
    if lead:
        _check_directory(run)
    with SeriesWriter(run) as writer, StopRequest() as stop:
        if lead:
            _refuse_imported(Series(run).entries(), run)
            _claim(config, run, families)
        writer.clean()
        parent = Series(run).newest()
        distributed.check_same(str(run), {"checkpoint to go on from": parent and parent.sha256})
        begin = loader.start(_loader_state(parent.manifest, loader)) if parent else 0
        if stop_at is not None and stop_at < begin:
            raise UserError(f"--steps {stop_at}: the run has {begin} steps already; give more, or leave it out")
        end = config.total_steps if stop_at is None else min(config.total_steps, stop_at)
        if parent is None and lead:
            _keep_tokenizer(data, run)
        plan = Program.plan(config, mesh)
        state = restore_state(plan, parent) if parent else plan.init()
        program = plan.compile()
        distributed.together()

        skipping, skipped = distributed.from_lead(
            _skips(RunRecord(run, families), begin) if lead and parent else [0, 0]
        )
        _refuse_what_comes_later(Series(run), begin)
        metrics, ledger = MetricsWriter(run, begin if parent else None, lead), Ledger(run, lead)
        ledger(
            "resume" if parent else "start",
            step=begin,
            mesh=dict(mesh.shape),
            **({"mesh_before": parent.manifest.mesh} if parent else {}),
            execution=dataclasses.asdict(config.execution),
            parent=parent and parent.manifest.name,
            parent_sha256=parent and parent.sha256,
            peak=program.peak and dataclasses.asdict(program.peak),
            **made_by(mesh),
            **_read_from(data),
        )
        past = distributed.from_lead(metrics.applied[-config.guard.window - 2 :])
        guard = Guard(config.guard, mesh, [tuple(step) for step in past], skipping, skipped)
        log = Log(program, metrics, Watch(guard, loader, ledger))
        save = Saver(program, loader, writer, ledger, run)
        due = Rolling(config.series, mesh)
        stop_now = distributed.Vote(mesh)
        kept = {0, *(p.step for p in config.positions)}
        save.what_is_missing(state, begin, log)
        if distributed.from_lead(begin in kept and begin not in metrics.validated):
            log.validation(begin, program.validate(state.params, data))

        done, batches, previous = begin, None, None
        stopping = stop_now(stop.requested)
        while done < end and not stopping:
            if done < guard.until:
                log.flush()
                state, batches, previous = program.pass_over(state), None, None
            else:
                batches = batches or loader.batches(done, end)
                batch = next(batches)
                for fault in faults:
                    batch = fault.damage(batch) if fault.step == done else batch
                state, values = program.train_step(state, batch, guard.limits(done, log.waits_for(done, previous)))
                previous = values["applied"]
                log.step(done, values)
            done += 1
            stopping, keep = stop_now(distributed.preempted() or stop.requested), done in kept
            if not save.what_is_missing(state, done, log) and (due(done) or stopping or done == end):
                save(state, "rolling", log)
            if keep and (done == config.total_steps or not stopping):  # one that is missing then is made up for later
                log.validation(done, program.validate(state.params, data))
        log.close()
        writer.wait()
        finished = done == config.total_steps
        reason: Any = "finished" if finished else "interrupted" if done < end else "stopped"
        ledger("finish" if finished else "stop", step=done, reason=reason)
        return log.outcome(reason, done, begin if parent else None)


def _mesh(config: RunConfig) -> Mesh:
    """The mesh of a resolved config, over all devices; UserError, before any compile, where the run cannot be on it."""
    mesh = config.mesh.build()
    config.check_mesh(mesh.shape)
    config.region(mesh.devices.flat[0].platform)  # refuses an attention kernel that cannot run there
    memory.check(config, mesh)
    return mesh


def make_loader(config: RunConfig, data: TokenData, mesh: Mesh) -> Loader:
    """The batches of a resolved config on a mesh."""
    microbatches, rows = config.batch_shape(mesh.shape)
    return Loader(
        data,
        phase_steps=config.phase_steps,
        global_batch=config.data.global_batch,
        microbatches=microbatches,
        rows=rows,
        sharding=steps.batch_sharding(mesh),
        workers=config.data.workers,
    )


def _read_from(data: TokenData) -> dict[str, Any]:
    """Where the data lies, for the ledger: its folder, and the shares of its sources if the run has its own."""
    if isinstance(data, SyntheticData):
        return {"data": "synthetic"}
    folder = getattr(data, "directory", None)  # not part of how samples are read: a TokenData need not have one
    where = {"data": str(Path(folder).resolve())} if folder is not None else {}
    return {**where, "mixture": data.weights} if isinstance(data, MixedData) else where


def _check_directory(run: Path) -> None:
    """Refuse a directory that is somebody else's, before anything is written in it."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; give a --run directory")
    if not run.exists() or (run / "config.json").exists():
        return
    if any(p.name not in (".lock", "config.json.part") for p in run.iterdir()):
        raise UserError(f"{run}: not empty and not a run directory (no config.json); give another --run directory")


def _claim(config: RunConfig, run: Path, families: Families) -> None:
    """Make the run directory this config's, or refuse it. Called under the writer's lock."""
    path = run / "config.json"
    if not path.exists():
        write_atomically(path, json.dumps(config.to_dict(), indent=2) + "\n")
        return
    value = None
    try:
        value = json.loads(path.read_text())
        there = RunConfig.from_dict(value, families)
    except ValueError as e:
        if isinstance(value, dict) and "recipe" in value and (missing := _not_yet(value)):
            raise UserError(
                f"{run}: was begun by code in which runs had no {missing} yet; go on with the code_version that its "
                "manifests name, or give another --run directory"
            ) from e
        raise UserError(f"{path}: not a run's configuration ({e}); give another --run directory") from e
    config.check_same_run(there, run)


def _not_yet(config: dict[str, Any]) -> str | None:
    """What a run's ``config.json`` lacks because it is older than that, if anything."""
    if "phases" not in config:
        return "phases"
    parts = {
        "layouts of data": ("data", "layout"),
        "schedules of execution": ("execution", "unroll"),
        "names of checkpoints": ("series", "name"),
    }
    for what, (part, field) in parts.items():
        if isinstance(config.get(part), dict) and field not in config[part]:
            return what
    return None


def _refuse_imported(entries: list[Entry], run: Path) -> None:
    """A series of other people's checkpoints must not get ours among them."""
    if entries and entries[0].manifest.origin is not None:
        raise UserError(
            f"{run}: holds checkpoints imported from elsewhere, to be studied; give another --run directory"
        )


def _skips(record: RunRecord, begin: int) -> list[int]:
    """First step to train, and how many skips there are directly before it, of a run that goes on with a step."""
    count, reached = 0, begin
    for skip in reversed(record.skips):
        if skip.step < begin and skip.until >= reached:
            count, reached = count + 1, skip.step
    return [record.inside_skip(begin), count]


def _refuse_what_comes_later(series: Series, begin: int) -> None:
    """What is kept must not be from a way that the run then did not go."""
    later = [e for e in [*series.entries(), *series.early()] if e.manifest.step > begin]
    if later:
        raise UserError(
            f"{later[0].path}: is of step {later[0].manifest.step}, and the newest state that the run can go on from "
            f"is of step {begin}: its rolling checkpoint is gone. Put that back, or remove all {len(later)} "
            "checkpoints after it, which the run would make again"
        )


def _loader_state(parent: Manifest, loader: Loader) -> dict[str, Any]:
    """What `Loader.state` returned when a checkpoint was saved: its manifest holds all of it."""
    state = loader.state(parent.step) | {"data": parent.data_sha256}
    return state | ({"global_batch": parent.samples[1] // parent.step} if parent.step else {})


def _keep_tokenizer(data: TokenData, run: Path) -> None:
    """Copy the data's tokenizer beside the checkpoints, so that a run can write text wherever it is taken."""
    if data.tokenizer_file is not None:
        write_atomically(run / data.tokenizer_file.name, data.tokenizer_file.read_bytes())


def restore_state(program: Program, entry: Entry) -> TrainState:
    """The state of a checkpoint on this mesh."""
    abstract = program.abstract
    params, optimizer = restore(entry, params=abstract.params, optimizer=abstract.optimizer)
    step = jax.device_put(np.int32(entry.manifest.step), abstract.step.sharding)
    return TrainState(step, params, optimizer)


class Rolling:
    """When to save what is kept only to resume: by steps, by time, or both."""

    def __init__(self, config: SeriesConfig, mesh: Mesh):
        self._steps, self._minutes = config.rolling_every_steps, config.rolling_every_minutes
        self._since = time.monotonic()
        self._late = distributed.Vote(mesh)  # clocks differ

    def __call__(self, done: int) -> bool:
        """Whether it is time after this many steps. All processes ask alike, after every step."""
        late = self._minutes is not None and self._late(time.monotonic() - self._since >= 60 * self._minutes)
        if late:
            self._since = time.monotonic()
            self._late.forget()  # this step asked too, before it knew the answer
        return late or (self._steps is not None and done % self._steps == 0)


class Saver:
    """Says what a checkpoint is (its manifest) and hands it to the series writer."""

    def __init__(self, program: Program, loader: Loader, writer: SeriesWriter, ledger: Ledger, run: Path):
        self.program, self.loader, self.writer, self.ledger = program, loader, writer, ledger
        self.series = Series(run)
        self.versions, self.code = environment(), code_version()
        self.by_step = {p.step: p for p in program.config.positions}
        self.early = set(program.config.early_steps)
        self._round = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype("bfloat16"), tree))

    def what_is_missing(self, state: TrainState, step: int, log: "Log") -> bool:
        """Save what is kept for ever of this step, if anything, and is not there; whether there was something.

        What is saved without optimizer state is saved to resume from first: so a run never has to go on from a step
        before one that is kept, and would come to it a second time.
        """
        kind: Kind = "series" if step == 0 or step in self.by_step else "early"
        if kind == "early" and step not in self.early:
            return False
        there = self.series.entries() if kind == "series" else self.series.early()
        if distributed.from_lead(any(e.manifest.step == step for e in there)):
            return False
        newest = self.series.newest()
        resumable = distributed.from_lead(newest is not None and newest.manifest.step >= step)
        if not resumable and (kind == "early" or not self._keeps_optimizer(step)):
            self(state, "rolling", log)
        self(state, kind, log)
        return True

    def _keeps_optimizer(self, step: int) -> bool:
        index = self.by_step[step].index if step else -1
        return self.program.config.keeps_optimizer(index)

    def __call__(self, state: TrainState, kind: Kind, log: "Log") -> None:
        """Save asynchronously; the arrays may be donated once this returns."""
        log.flush()
        config, step = self.program.config, int(state.step)
        self.writer.wait()  # the parent's manifest must be there to be named
        log.metrics.push()  # a checkpoint must not know more than they do
        before = [e for e in self.series.entries() if e.manifest.step < step]
        parent = before[-1] if before else None
        since = parent.manifest.step if parent else 0
        batch = config.data.global_batch
        index = sum(p.step <= step for p in config.positions) - 1
        name = checkpoint_name(kind, index, step)
        if kind == "series" and step:
            name = config.series.name_of(self.by_step[step])
        device = self.program.mesh.devices.flat[0]
        optimizer = kind == "rolling" or (kind == "series" and self._keeps_optimizer(step))
        copy = self._round(state.params) if kind == "series" and config.series.bfloat16_copy else None
        manifest = Manifest(
            index=index,
            name=name,
            kind=kind,
            phase=config.phase_of(step - 1) if step else 0,
            step=step,
            tokens=step * config.data.tokens_per_step,
            chunk=self.loader.schedule.place(step - 1, batch - 1)[0] if step else None,
            samples=(since * batch, step * batch),
            parent=parent.manifest.name if parent else None,
            parent_index=parent.manifest.index if parent else None,
            parent_sha256=parent.sha256 if parent else None,
            config_sha256=config.sha256,
            data_sha256=self.loader.data.sha256,
            mesh=dict(self.program.mesh.shape),
            device_kind=device.device_kind,
            process_count=jax.process_count(),
            code_version=self.code,
            versions=self.versions,
            learning_rate=float(self.program.learning_rate(step - 1)) if step else 0.0,
            loss=log.loss_since(since),
            wall_time=time.time(),
        )

        def committed(entry: Entry) -> None:
            self.ledger("save", step=step, kind=kind, name=name, manifest_sha256=entry.sha256)

        self.writer.save(
            manifest,
            params=state.params,
            optimizer=state.optimizer if optimizer else None,
            copy=copy,
            then=committed,
        )


class Watch:
    """Deals with steps that were not applied, as the recipe says: the guard knows what goes on, the ledger what was."""

    def __init__(self, guard: Guard, loader: Loader, ledger: Ledger):
        self.guard, self.loader, self.ledger = guard, loader, ledger

    def chunk(self, step: int) -> int:
        """The chunk that a step begins in."""
        return self.loader.schedule.place(step, 0)[0]

    def next_chunk(self, step: int) -> int:
        """The first step that begins in another chunk than this one."""
        later = range(step + 1, self.loader.steps)
        return next((n for n in later if self.chunk(n) != self.chunk(step)), self.loader.steps)

    def _documents(self, step: int) -> dict[str, Any]:
        """Of the process that writes; an index that cannot be read must not end the run."""
        try:
            return {"documents": documents(self.loader.data, self.loader.schedule, step) if self.ledger.writes else []}
        except (UserError, RunError, OSError) as e:
            return {"documents": [], "documents_unknown": str(e)}

    def trouble(self, step: int, loss: float, norm: float) -> None:
        """Skip what is to be skipped.

        Raises:
            RunError: the recipe says to stop, or it was skipped too often.
        """
        policy, why = self.guard.config.on_trouble, self.guard.why(step, loss, norm)
        until = {"stop": step, "skip_batch": step + 1, "skip_chunk": self.next_chunk(step)}[policy]
        go_on = policy != "stop" and self.guard.skip(until)
        batch = self.loader.schedule.global_batch
        what = {
            "step": step,
            "chunk": self.chunk(step),
            "samples": [step * batch, (step + 1) * batch],
            "reason": why,
            "loss": plain(loss),
            "grad_norm": plain(norm),
            "policy": policy,
            **self._documents(step),
        }
        if go_on:
            self.ledger("skip", until=until, **what)
            return
        self.ledger("guard", **what)
        often = f" (after {self.guard.config.most} that were skipped)" if policy != "stop" else ""
        raise RunError(
            f"step {step}: {why}{often}. Its update was not applied, and nothing of it was saved; the ledger names its "
            "documents. The same command goes on from the checkpoint before: lower the learning rate, or let it skip "
            "with --guard.on-trouble skip_batch or skip_chunk"
        )


class Log:
    """Collects what the steps report, one step late so that the devices never wait for the host."""

    def __init__(self, program: Program, metrics: MetricsWriter, watch: Watch):
        self.program, self.metrics, self.watch = program, metrics, watch
        self.progress = ProgressLine(program.config.total_steps, peak=program.peak, writes=metrics.writes)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.clock = time.perf_counter()
        self.times: list[float] = []
        self.losses = dict(metrics.losses)
        self.last_loss: float | None = None
        self.validation_loss: float | None = None

    def step(self, step: int, values: dict[str, jax.Array]) -> None:
        """Take the metrics of a step that was just dispatched; write those of the step before."""
        self.flush()
        if step >= self.watch.guard.until:  # else the step before was not applied, and this one was held back with it
            self.pending = (step, values)

    def waits_for(self, step: int, applied: jax.Array | None) -> jax.Array | None:
        """``applied``, of the step before this one, if this one must not be applied where that was not."""
        policy = self.watch.guard.config.on_trouble
        together = policy == "stop" or (policy == "skip_chunk" and self.watch.chunk(step) == self.watch.chunk(step - 1))
        return applied if applied is not None and self.pending is not None and together else None

    def flush(self) -> None:
        """Wait for the pending step and write it."""
        if self.pending is None:
            self.clock = time.perf_counter()
            return
        step, values = self.pending
        self.pending = None
        record: dict[str, Any] = {name: float(v) for name, v in values.items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.times.append(seconds)
        if not record.pop("applied"):
            found = {name: plain(value) for name, value in record.items()}
            self.metrics.write("skipped", step, found)
            self.watch.trouble(step, record["loss"], record["grad_norm"])
            return
        self.watch.guard.applied(step, record["loss"], record["grad_norm"])
        record |= {"tokens": (step + 1) * self.program.config.data.tokens_per_step, **self.program.throughput(seconds)}
        self.losses[step] = self.last_loss = record["loss"]
        self.metrics.write("train", step, record)
        self.progress.show(step, record)

    def validation(self, step: int, losses: dict[str, float]) -> None:
        """Write validation losses after ``step`` updates."""
        self.flush()
        if losses:
            self.validation_loss = losses["loss"]
            self.metrics.write("validation", step, losses)
        self.clock = time.perf_counter()

    def loss_since(self, step: int) -> dict[str, float]:
        """Mean and last loss of the steps from ``step`` on."""
        values = [v for s, v in sorted(self.losses.items()) if s >= step]
        return {"mean": float(np.mean(values)), "last": values[-1]} if values else {}

    def close(self) -> None:
        """Write what is pending."""
        self.flush()
        self.progress.done()
        self.metrics.close()

    def outcome(self, reason: Any, step: int, resumed_from: int | None) -> Outcome:
        """Summary of this call."""
        median = float(np.median(self.times)) if self.times else None
        speed = self.program.throughput(median) if median else {}
        return Outcome(
            reason=reason,
            step=step,
            tokens=step * self.program.config.data.tokens_per_step,
            loss=self.last_loss,
            validation_loss=self.validation_loss,
            resumed_from=resumed_from,
            compile_s=self.program.compile_s,
            compile_cached=self.program.compile_cached,
            peak_bytes_per_device=self.program.peak_bytes,
            median_step_time_s=median,
            tokens_per_s=speed.get("tokens_per_s"),
            mfu_causal=speed.get("mfu_causal"),
            mfu_full=speed.get("mfu_full"),
        )


class StopRequest:
    """Turns the first SIGINT or SIGTERM into ``requested``; a second one acts as usual.

    Of several processes SIGTERM is left to JAX's own service (`distributed.preempted`), which tells all of them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT,) if distributed.takes_notice() else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._before[number])

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def time_steps(config: RunConfig, data: TokenData, num_steps: int, on_step: Callable[[int], None]) -> dict[str, Any]:
    """Time ``num_steps`` training steps without touching the disk: compile time, step time, tokens/s, MFU, memory."""
    config = config.resolve(data)
    mesh = _mesh(config)
    distributed.check_same("train", {"config": config.to_dict(), "data manifest": data.sha256, "--steps": num_steps})
    program = Program.plan(config, mesh).compile()
    distributed.together()
    state, limits = program.init(), no_limits(mesh)
    times, losses = [], []
    for index, batch in enumerate(make_loader(config, data, mesh).batches(0, num_steps)):
        start = time.perf_counter()
        state, values = program.train_step(state, batch, limits)
        losses.append(float(values["loss"]))
        times.append(time.perf_counter() - start)
        on_step(index)
    median = float(np.median(times[1:] or times))  # the first step also pages memory in
    stats = program.mesh.local_devices[0].memory_stats() or {}
    return {
        "recipe": config.recipe,
        "mesh": dict(program.mesh.shape),
        "device_kind": program.mesh.devices.flat[0].device_kind,
        "devices": program.mesh.size,
        "parameters": config.model.num_parameters,
        "compute_dtype": config.execution.compute_dtype,
        "global_batch": config.data.global_batch,
        "sequence_length": config.data.sequence_length,
        "steps": num_steps,
        "compile_s": program.compile_s,
        "compile_cached": program.compile_cached,
        "median_step_time_s": median,
        **{k: v for k, v in program.throughput(median).items() if k != "step_time_s"},
        "peak_flops": program.peak and program.peak.flops,
        "peak_flops_source": program.peak and program.peak.source,
        "peak_bytes_per_device_planned": program.peak_bytes,
        "peak_bytes_per_device_measured": stats.get("peak_bytes_in_use"),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
