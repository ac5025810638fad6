"""What a run says of itself: its recipe, its ledger, and from both how each of its steps was made."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.manifest import code_version, environment
from errors import RunError, UserError
from training.config import ExecutionConfig, Family, RunConfig
from training.metrics import read_lines

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps of a run that one process, or one set of processes, trained in one go."""

    step: int
    """The first."""
    mesh: Mapping[str, int]
    """Degree of each axis."""
    execution: ExecutionConfig | None
    """None where older code did not say; then the recipe's."""
    made_by: Mapping[str, Any]
    """See `made_by`; None for what older code did not say."""


MADE_BY = ("processes", "device_kind", "host", "xla_flags", "versions", "code")


def made_by(mesh: "Mesh") -> dict[str, Any]:
    """What besides mesh and execution decides on the bits of a step, as far as it is known: for the ledger."""
    import jax

    device = mesh.devices.flat[0]
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    values = {
        "processes": jax.process_count(),
        "device_kind": device.device_kind,
        # XLA's CPU compiler makes code for the processor, and as many parts of work as there are cores.
        "host": f"{platform.machine()}, {os.cpu_count()} cores" if device.platform == "cpu" else platform.machine(),
        "xla_flags": " ".join(flags),
        "versions": environment(),
        "code": code_version(),
    }
    return {name: values[name] for name in MADE_BY}


@dataclasses.dataclass(frozen=True)
class Skip:
    """Steps ``step`` to ``until - 1``, whose updates were not applied."""

    step: int
    until: int


class RunRecord:
    """A run directory as a record of how it came to be.

    Args:
        run: run directory.
        families: config classes by family name.

    Raises:
        UserError: there is no run, or it is of other code; it holds imported checkpoints.
    """

    def __init__(self, run: Path, families: Mapping[str, Family]):
        self.run = run
        try:
            self.config = RunConfig.from_dict(json.loads((run / "config.json").read_text()), families)
        except (OSError, ValueError) as error:
            raise UserError(f"{run}: not a run that was trained here ({error})") from error

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The ledger."""
        return read_lines(self.run / "ledger.jsonl")

    @cached_property
    def segments(self) -> list[Segment]:
        """How the steps of the run were made, in order: of each what counts in the end.

        What a run trained and lost, because it was killed, counts for nothing.

        Raises:
            RunError: the ledger does not say.
        """
        found: list[Segment] = []
        for e in self.events:
            if e["event"] in ("start", "resume"):
                execution = e.get("execution")
                try:
                    how = ExecutionConfig(**execution) if execution else None
                except TypeError as error:
                    raise RunError(f"{self.run}/ledger.jsonl: execution of other code at step {e['step']}") from error
                found = [s for s in found if s.step < e["step"]]
                found.append(Segment(e["step"], e["mesh"], how, {name: e.get(name) for name in MADE_BY}))
        if not found:
            raise RunError(f"{self.run}/ledger.jsonl: names no start of the run; without it nothing can be replayed")
        return found

    @cached_property
    def skips(self) -> list[Skip]:
        """What was skipped, in order, and counts in the end."""
        found: list[Skip] = []
        for e in self.events:
            if e["event"] in ("start", "resume"):
                found = [s for s in found if s.step < e["step"]]
            if e["event"] == "skip":
                found.append(Skip(e["step"], e["until"]))
        return found

    def inside_skip(self, step: int) -> int:
        """First step to train of a run that goes on with this one: later if steps before it were skipped with it."""
        return max((s.until for s in self.skips if s.step < step < s.until), default=step)

    def skipped(self, step: int) -> int:
        """First step after those that were skipped together with this one; the step itself if it was not."""
        return max((s.until for s in self.skips if s.step <= step < s.until), default=step)

    @property
    def data(self) -> tuple[Path | None, tuple[tuple[str, float], ...]]:
        """The data directory that the ledger names last (None: synthetic), and the run's own shares of its sources.

        Raises:
            UserError: it names none.
        """
        named = [e for e in self.events if e.get("data")]
        if not named:
            raise UserError(f"{self.run}: its ledger names no data; give --data")
        mixture = tuple((str(name), float(weight)) for name, weight in named[-1].get("mixture") or [])
        return (None if named[-1]["data"] == "synthetic" else Path(named[-1]["data"])), mixture

    @cached_property
    def logged(self) -> dict[int, dict[str, Any]]:
        """What was logged of each training step that was applied."""
        return {r["step"]: r for r in read_lines(self.run / "metrics.jsonl") if r["kind"] == "train"}
