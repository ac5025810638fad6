"""What a run writes down while it trains: ``metrics.jsonl``, TensorBoard, one progress line, the ledger."""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from checkpoint import storage
from checkpoint.files import write_atomically
from errors import RunError


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and push it to the operating system, so that a killed process loses none.

    Raises:
        RunError: the disk is full or the directory is not writable.
    """
    _append(path, json.dumps(record, allow_nan=False) + "\n")


def _append(path: Path, text: str | bytes) -> None:
    try:
        storage.append(path, text)
    except OSError as e:
        raise RunError(f"{path}: cannot append ({e.strerror}); free some space and run the same command again") from e


def cut_torn_line(path: Path) -> None:
    """Remove a last line that was cut off by a kill or a full disk, so that the next one starts afresh."""
    if not path.exists():
        return
    raw = path.read_bytes()
    if raw and not raw.endswith(b"\n"):
        write_atomically(path, raw[: raw.rfind(b"\n") + 1])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise RunError(f"{path}:{number + 1}: not JSON; the file was changed by something else") from None
    return records


class Ledger:
    """The run's append-only record of events: start, resume, save, skip, guard, stop, finish, verify, import.

    Who has the run's lock makes it tidy first: a torn last line is cut off.

    Raises:
        RunError: its last line is torn, and somebody else has the lock.
    """

    def __init__(self, run: Path, writes: bool = True, tidy: bool = True):
        self.path = run / "ledger.jsonl"
        self.writes = writes
        self._turn = threading.Lock()  # saves are recorded by their own thread
        if writes and tidy:
            cut_torn_line(self.path)
        elif writes and self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            raise RunError(f"{self.path}: its last line is torn, until the next train cuts it off")

    def __call__(self, event: str, **fields: Any) -> None:
        """Append one event with the time (unix seconds), in the process that writes."""
        if self.writes:
            with self._turn:
                append_line(self.path, {"event": event, "time": time.time(), **fields})


class MetricsWriter:
    """``metrics.jsonl`` and TensorBoard, both cut back to the step that a run resumes from (None: to nothing).

    Lines are ``{"kind": "train", "step": n, ...}`` with n the 0-based index of the step whose loss it is, and
    ``{"kind": "validation", "step": n, ...}`` with n the number of updates done; and ``"skipped"``, as "train", of a
    step that was not applied. Of a run's processes one ``writes``; to the others nothing was ever logged.

    A line is on the disk at once. To an object store, where every write makes a new object, lines go once a minute and
    before each checkpoint (`push`): a kill loses those since, all of steps that the run will do again.
    """

    _EVERY_S = 60.0

    def __init__(self, run: Path, resume_step: int | None, writes: bool = True):
        self.path = run / "metrics.jsonl"
        self.writes = writes
        kept = self._cut(-1 if resume_step is None else resume_step) if writes else []
        trained = [r for r in kept if r["kind"] == "train"]
        self.losses = {r["step"]: r["loss"] for r in trained}
        self.applied = [(r["step"], r["loss"], r["grad_norm"]) for r in trained]
        self.validated = {r["step"] for r in kept if r["kind"] == "validation"}
        self.board = Board(run / "tensorboard", kept) if writes else None
        self._waiting: list[str] | None = [] if storage.is_remote(run) else None
        self._pushed = time.monotonic()

    def _cut(self, step: int) -> list[dict[str, Any]]:
        records = read_lines(self.path)
        kept = [r for r in records if r["step"] < step or (r["kind"] == "validation" and r["step"] <= step)]
        cut_torn_line(self.path)
        if len(kept) < len(records):
            write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        return kept

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line in the file and one event on the board. Raises RunError where neither can be written."""
        if self.board is not None:
            record = {"kind": kind, "step": step, **values}
            if self._waiting is None:
                append_line(self.path, record)
            else:
                self._waiting.append(json.dumps(record, allow_nan=False) + "\n")
            self.board.write(record)
            if time.monotonic() - self._pushed > self._EVERY_S:
                self.push()

    def push(self) -> None:
        """Send what waits to an object store. Raises RunError where it cannot be written."""
        if self._waiting:
            _append(self.path, "".join(self._waiting))
            self._waiting.clear()
        if self.board is not None:
            self.board.push()
        self._pushed = time.monotonic()

    def close(self) -> None:
        """Push what waits and close the board's file."""
        self.push()
        if self.board is not None:
            self.board.close()


class Board:
    """A TensorBoard event file that says what ``metrics.jsonl`` says; made anew from it whenever a run goes on.

    Written synchronously: tensorboardX's own `SummaryWriter` writes from a thread, and when that dies of a full disk
    the training waits for it for ever. For a run in an object store it is written on the disk and pushed.
    """

    def __init__(self, folder: Path, records: list[dict[str, Any]]):
        from tensorboardX.event_file_writer import EventsWriter  # slow to import; only a training process needs it

        storage.remove(folder, ignore_errors=True)
        self._scratch = tempfile.TemporaryDirectory() if storage.is_remote(folder) else None
        here = Path(self._scratch.name) if self._scratch else folder
        here.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(here / "events"))
        self._sent, self._folder = 0, folder
        for record in records:
            self._add(record)
        self._writer.flush()
        self.push()

    def _add(self, record: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{record['kind']}/{name}", simple_value=value)
            for name, value in record.items()
            if name not in ("kind", "step") and isinstance(value, (int, float))
        ]
        event = Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
        self._writer.write_event(event)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record of ``metrics.jsonl``. Raises RunError if the file cannot be written."""
        try:
            self._add(record)
            self._writer.flush()
        except OSError as e:
            raise RunError(f"tensorboard: cannot write ({e}); free some space and run the same command again") from e

    def push(self) -> None:
        """Send what is new to an object store."""
        if self._scratch:
            file = next(Path(self._scratch.name).iterdir())
            with file.open("rb") as stream:
                stream.seek(self._sent)
                new = stream.read()
            if new:
                _append(self._folder / file.name, new)
                self._sent += len(new)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
        if self._scratch:
            self._scratch.cleanup()


def duration(seconds: float) -> str:
    """``1h02m``, ``3m20s`` or ``12s``."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class ProgressLine:
    """One line per logged step on stderr: rewritten in place on a terminal, every few seconds elsewhere."""

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        writes: bool = True,
        peak: object | None = None,
    ):
        self.total = total_steps
        self.peak = peak
        self.writes = writes
        self.stream = stream or sys.stderr
        self.in_place = writes and self.stream.isatty()
        self.every_s = every_s
        self.last = 0.0

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the step just done, in the process that writes."""
        now = time.monotonic()
        last_step = step + 1 >= self.total
        if not self.writes:
            return
        if not self.in_place and not last_step and now - self.last < self.every_s:
            return
        self.last = now
        mfu = values.get("mfu_causal")
        line = (
            f"step {step + 1}/{self.total}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"grad {values['grad_norm']:.2f}"
        )
        if "tokens_per_s" in values:  # a replay is not timed
            of_peak = "-" if mfu is None else f"{mfu:.1%} (causal, of {self.peak})"
            left = duration((self.total - step - 1) * values["step_time_s"])
            line += f"  {values['tokens_per_s']:,.0f} tokens/s  MFU {of_peak}  left {left}"
        print(f"\r\x1b[K{line}" if self.in_place else line, end="" if self.in_place else "\n", file=self.stream)
        self.stream.flush()

    def done(self) -> None:
        """End the line."""
        if self.in_place:
            print(file=self.stream)
