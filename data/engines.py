"""Independent, restartable tasks, and the engines that perform them: this machine's processes, or Apache Beam's.

A task leaves a journal, a small JSON file, when all that it does is done. What has a journal is not done again, so a
run that was killed at any moment goes on where it was when the same command is given again. Results come in the order
of the tasks, whichever finishes first, so what is made of them is the same on any engine.
"""

import importlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from data.chunks import written
from errors import RunError, UserError

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")
_Engine = TypeVar("_Engine", bound="Engine")
Log = Callable[[str], object]

_LOG_EVERY_S = 10.0
_BEAM = "apache_beam"
_BEAM_LOCAL = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


class Task(ABC):
    """A piece of work that depends on no other piece that is done beside it. Subclasses are frozen dataclasses.

    A task is pickled to reach the process that runs it. It may be run again, from the start, when it was interrupted;
    then it must leave the same files.
    """

    @property
    @abstractmethod
    def journal(self) -> Path:
        """The JSON file that says that the task is done, and with what result. No other task's."""

    @property
    def weight(self) -> int:
        """How much work it is, about, beside the others (for example bytes to read); to tell the time left."""
        return 1

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Do the work and return a small result that JSON can hold.

        The numbers "documents", "samples", "tokens" and "bytes" in it are counted in the progress lines. Files are
        written so that each is complete or not there (`data.chunks.written`).
        """


def perform(task: Task) -> dict[str, Any]:
    """Return the result in the task's journal, or run the task and write its journal.

    The result is as JSON gives it back, whether it is new or not: lists for tuples, strings for keys. A journal that
    is torn or holds no JSON object counts for nothing. Raises what the task raises, and RunError when the journal
    cannot be written.
    """
    done = _journaled(task)
    if done is not None:
        return done
    text = json.dumps(task.run())
    with written(task.journal) as part:
        part.write_text(text + "\n")
    return json.loads(text)


def _journaled(task: Task) -> dict[str, Any] | None:
    try:
        result = json.loads(task.journal.read_bytes())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


class Engine(ABC):
    """Something that calls a function many times over. Used as a context, one set of processes serves all its calls."""

    @abstractmethod
    def map(self, function: Callable[[_Argument], _Result], arguments: Iterable[_Argument]) -> list[_Result]:
        """Return [function(a) for a in arguments], computed in any order.

        Function, arguments and results are pickled. Of the errors of several calls, the one that comes first in the
        order of arguments is raised, as it was raised there; calls after it may have run or not.
        """

    def __enter__(self: _Engine) -> _Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        return


def run_all(
    tasks: Sequence[Task], engine: Engine, log: Log, what: str, *, log_every_s: float = _LOG_EVERY_S
) -> list[dict[str, Any]]:
    """Perform the tasks that have no journal yet and return the results of all, in their order.

    Progress lines that begin with `what` go to `log`: while it lasts from another thread, and one at the end. Raises
    the error of the first task, in their order, that failed; what has finished keeps its journal.
    """
    if len({t.journal for t in tasks}) < len(tasks):
        raise ValueError(f"{what}: two tasks have the same journal")
    before = [_journaled(t) for t in tasks]
    pending = [t for t, result in zip(tasks, before) if result is None]
    if not pending:
        if tasks:
            log(f"{what}: all {len(tasks)} tasks were done before")
        return [r for r in before if r is not None]
    with _progress(what, len(tasks), pending, log, log_every_s):
        done = engine.map(perform, pending)
    new = iter(done)
    return [next(new) if result is None else result for result in before]


@contextmanager
def _progress(what: str, tasks: int, pending: Sequence[Task], log: Log, every_s: float) -> Iterator[None]:
    """Log how far the pending ones of a number of tasks are, every so often and when the block is left."""
    began, ended = time.monotonic(), threading.Event()
    results: list[dict[str, Any]] = []
    waiting = list(pending)

    def look() -> None:
        # The journals tell, whatever process of whatever machine runs the tasks. One that was found is not read again,
        # and folders are listed: to try tens of thousands of files would keep a network file system busy.
        there = {folder: _names(folder) for folder in {t.journal.parent for t in waiting}}
        found = [(t, _journaled(t) if t.journal.name in there[t.journal.parent] else None) for t in waiting]
        results.extend(r for _, r in found if r is not None)
        waiting[:] = [t for t, r in found if r is None]

    def report() -> None:
        while not ended.wait(every_s):
            look()
            log(line())

    def line() -> str:
        seconds = max(time.monotonic() - began, 1e-9)
        done, left = len(results), sum(t.weight for t in waiting)
        old = f" ({tasks - len(pending)} of them before)" if len(pending) < tasks else ""
        text = f"{what}: {tasks - len(waiting)} of {tasks} tasks{old}{_counts(results, seconds)}"
        if done and waiting:
            text += f", {_duration(seconds * left / max(sum(t.weight for t in pending) - left, 1))} left"
        return text

    thread = threading.Thread(target=report, name=f"progress of {what}", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        look()
        log(f"{what}: stopped; {tasks - len(waiting)} of {tasks} tasks are done and will not be done again")
        raise
    ended.set()
    thread.join()
    look()
    log(line())


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()  # no task has ended yet


def _counts(results: Sequence[dict[str, Any]], seconds: float) -> str:
    """Return ", 5 documents, 1.2 MB in 2.0 s (2 documents/s, 0.60 MB/s)", with what the results count."""
    totals = {
        key: sum(r[key] for r in results if type(r.get(key)) is int) for key in ("documents", "samples", "tokens")
    }
    megabytes = sum(r["bytes"] for r in results if type(r.get("bytes")) is int) / 1e6
    amounts = [f"{n:,} {key}" for key, n in totals.items() if n]
    rates = [f"{n / seconds:,.0f} {key}/s" for key, n in totals.items() if n]
    if megabytes:
        amounts.append(f"{megabytes:.1f} MB")
        rates.append(f"{megabytes / seconds:.2f} MB/s")
    text = f", {', '.join(amounts)}" if amounts else ""
    return f"{text} in {seconds:.1f} s" + (f" ({', '.join(rates)})" if rates else "")


def _duration(seconds: float) -> str:
    s = round(seconds)
    return f"{s // 3600}h{s % 3600 // 60:02}m" if s >= 3600 else f"{s // 60}m{s % 60:02}s" if s >= 60 else f"{s}s"


class Local(Engine):
    """Processes of this machine: this one alone, or a pool of spawned workers.

    Workers end when this process does, however it ends, and at once when its `with` block is left by an error.
    Outside of a `with` block every call has its own pool. Raises UserError when `workers` is less than 1.
    """

    def __init__(self, workers: int):
        if workers < 1:
            raise UserError(f"workers = {workers}: at least 1 is needed")
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._alive: tuple[Connection, ...] = ()

    def map(self, function: Callable[[_Argument], _Result], arguments: Iterable[_Argument]) -> list[_Result]:
        """As `Engine.map`; RunError when a worker process is lost."""
        if self.workers == 1:
            return [function(a) for a in arguments]
        if self._pool is None:
            with self:
                return self.map(function, arguments)
        futures: list[Future[_Result]] = []
        try:
            futures += [self._pool.submit(function, a) for a in arguments]
            return [f.result() for f in futures]
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process was lost (killed, or out of memory?); run the same command again, with fewer "
                "--workers if memory is short"
            ) from error
        finally:
            for future in futures:
                future.cancel()

    def __enter__(self) -> "Local":
        if self.workers > 1 and self._pool is None:
            # Spawned, not forked: the caller may hold JAX's threads, and a fork of those can hang.
            context = multiprocessing.get_context("spawn")
            self._alive = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(self.workers, context, _begin_work, (self._alive[0],))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pool, alive = self._pool, self._alive
        self._pool, self._alive = None, ()
        if pool is None:
            return
        if kind is not None:
            alive[1].close()
        pool.shutdown(cancel_futures=True)
        for end in alive:
            end.close()


def _begin_work(alive: Connection) -> None:
    """Leave Ctrl-C to the parent of this worker process, and end when the other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        # Only the parent holds the other end: closed on purpose, or by the system when the parent is killed, in which
        # case nobody else would tell a worker that waits for its next task.
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class Beam(Engine):
    """Apache Beam: any of its runners, chosen by its own pipeline options.

    `options` are Beam's, as on a command line (`--runner=FlinkRunner`, `--flink_master=…`); without a runner Beam's
    local one is used, in this process or, with `--direct_running_mode=multi_processing --direct_num_workers=N`, in
    others. That is for trying things: it waits for ever when one of its processes is killed (apache/beam#19674), which
    `Local` does not. `shared` is a folder by whose path this machine and all workers reach the same files, as they must
    those that the tasks read and write; the workers have this package installed. Results pass through it, because most
    runners have no way to return any; what is written there is removed again. Every call is a pipeline of its own.
    """

    options: tuple[str, ...]
    shared: Path

    def __enter__(self) -> "Beam":
        self._pipeline()
        return self

    def map(self, function: Callable[[_Argument], _Result], arguments: Iterable[_Argument]) -> list[_Result]:
        """As `Engine.map`; UserError when Beam or the options are not right, RunError when the pipeline fails."""
        calls = [(n, pickle.dumps((function, a))) for n, a in enumerate(arguments)]
        if not calls:
            return []
        pipeline, beam = self._pipeline(), _apache_beam()
        folder = self.shared.absolute() / f"beam-{uuid.uuid4().hex}"
        try:
            (folder / "errors").mkdir(parents=True)
            # The reshuffle lets every call go to another worker; without it all would be one bundle of one worker.
            _ = pipeline | beam.Create(calls) | beam.Reshuffle() | beam.Map(_attempt, str(folder))
            failure = _run(pipeline)
            if errors := sorted(int(p.name) for p in (folder / "errors").glob("*") if p.suffix != ".part"):
                raise pickle.loads((folder / "errors" / str(errors[0])).read_bytes())
            if failure is not None:
                reason = (str(failure).strip() or repr(failure)).splitlines()[-1]
                raise RunError(f"the Beam pipeline failed ({reason}); run the same command again") from failure
            return [pickle.loads(self._outcome(folder / str(n))) for n in range(len(calls))]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _pipeline(self) -> Any:
        beam, usage = _apache_beam(), io.StringIO()
        options_of = importlib.import_module(f"{_BEAM}.options.pipeline_options")
        try:
            with redirect_stderr(usage):  # the parser prints all of Beam's options, hundreds of lines
                options = options_of.PipelineOptions(list(self.options))
                options.get_all_options()
        except SystemExit as error:
            raise UserError(f"Beam's options {' '.join(self.options)}: {usage.getvalue().splitlines()[-1]}") from error
        standard = options.view_as(options_of.StandardOptions)
        if standard.runner in (None, "DirectRunner"):
            # Left alone, Beam's DirectRunner first tries to download another runner and to run that.
            standard.runner = _BEAM_LOCAL
        try:
            return beam.Pipeline(options=options)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"Beam's options {' '.join(self.options)}: {error}") from error

    def _outcome(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise RunError(
                f"{self.shared}: Beam finished, but its results are not there ({error}); it must be a folder that this "
                "machine shares with all of Beam's workers"
            ) from error


def _apache_beam() -> Any:
    try:
        return importlib.import_module(_BEAM)
    except ImportError as error:
        raise UserError(f"this needs Apache Beam ({error}): pip install '.[scale]'") from error


def _run(pipeline: Any) -> Exception | None:
    """Run a Beam pipeline to its end and return the error that ended it, if any did."""
    try:
        running = pipeline.run()
        try:
            running.wait_until_finish()
        except KeyboardInterrupt:
            running.cancel()  # a cluster would go on without us
            raise
    except Exception as error:
        return error
    return None


def _attempt(call: tuple[int, bytes], folder: str) -> None:
    """Make one call in a Beam worker and leave its result or its error in the folder.

    An error is not raised: Beam would try again, and in the end show a traceback of its own. Once there is one, calls
    that come after it in order are left out; those before it are not, since one of them may have an error to raise.
    """
    number, pickled = call
    errors = Path(folder) / "errors"
    if any(int(p.stem) < number for p in errors.iterdir()):
        return
    path = Path(folder) / str(number)
    try:
        function, argument = pickle.loads(pickled)
        outcome = pickle.dumps(function(argument))
    except Exception as error:
        path, outcome = errors / str(number), _pickled(error)
    with written(path) as part:
        part.write_bytes(outcome)


def _pickled(error: Exception) -> bytes:
    """Return the error pickled, as RuntimeError if it does not survive that; a bug has its traceback as a note."""
    note = "".join(traceback.format_exception(error))
    if not isinstance(error, UserError | RunError):
        error.add_note(note)
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        other = RuntimeError(f"{type(error).__name__}: {error}")
        other.add_note(note)
        return pickle.dumps(other)
    return pickled
