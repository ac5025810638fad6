"""Replay the training of a run: train again from one checkpoint to another, and compare all on the way.

Every logged loss and every checkpoint is compared. Exit code 1: something differs.
"""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Annotated, Any

import tyro

from checkpoint import storage
from commands.flags import CompileCache, Json, RunDir, note, simulated
from errors import RunError, UserError
from models import families
from parallel.hosts import HostFlags
from training.datasets import of_run


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    dir: tyro.conf.Positional[RunDir]
    """Run directory, or gs://BUCKET/FOLDER."""
    from_: Annotated[str, tyro.conf.arg(name="from")] = "init"
    """Checkpoint to begin with: an index, a name, init, step=N. One without optimizer state: the nearest before it."""
    to: str = "latest"
    """Checkpoint to end with."""
    sample: int | None = None
    """Instead of all steps in one go: so many of the links between neighbouring checkpoints, each by itself, at random;
    all of them, if there are not more."""
    seed: int = 0
    """Of that choice."""
    mesh: str | None = None
    """Replay on this mesh: equal within a tolerance; by default on those of the run: equal bit for bit."""
    data: Path | None = None
    """Data directory of the run, if it is no longer where it was."""
    simulate: int | None = None
    """Replay on this many simulated CPU devices (of each process); by default as many as the run had."""
    hosts: Annotated[HostFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=HostFlags)
    compiled: Annotated[CompileCache, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompileCache)
    json: Json = False
    """Print one JSON object on stdout."""


def run(args: Args) -> tuple[dict[str, Any] | None, int]:
    """Verb `verify`: this process's part, if there are several."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # as in `train`
    from parallel import distributed
    from parallel.mesh import MeshConfig, simulate
    from training.record import RunRecord

    if args.sample is not None and args.sample < 1:
        raise UserError(f"--sample {args.sample}: must be at least 1")
    record = RunRecord(storage.reach(args.dir), families())
    mesh = None if args.mesh is None else MeshConfig.parse(args.mesh)
    devices = args.simulate
    if devices is None and all(s.made_by["device_kind"] == "cpu" for s in record.segments):
        # Each process has its part of them.
        meshes = [mesh] if mesh and -1 not in mesh.degrees.values() else [MeshConfig(**s.mesh) for s in record.segments]
        devices = max(m.size for m in meshes)
        devices = -(-devices // (args.hosts.processes or 1))
    args.compiled.enable()
    if devices is not None:
        simulate(devices, check=False)
    with distributed.start(args.hosts) as hosts:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX takes it for a notice, and nobody here would ask for it
        if hosts.processes == 1:
            simulated(devices)
        found, code = _verify(args, record, mesh, distributed.is_lead())
        return found if distributed.is_lead() else None, code


def _verify(args: Args, record: Any, mesh: Any, lead: bool) -> tuple[dict[str, Any], int]:
    from checkpoint.series import Series
    from training.metrics import Ledger
    from training.replay import Replayer

    replayer = Replayer(record, of_run(record, args.data), mesh)
    ends = []
    for flag, selector in (("from", args.from_), ("to", args.to)):
        entries = Series(args.dir).resolve(selector)
        if len(entries) != 1:
            raise UserError(f"--{flag} {selector}: names {len(entries)} checkpoints, expected one")
        ends.append(entries[0])
    pairs = [(ends[0], ends[1])]
    if args.sample is not None:
        pairs = replayer.sample(*pairs[0], args.sample, args.seed)
    found = []
    for start, end in pairs:
        replayed = replayer.replay(start, end)
        found.append(replayed.as_dict())
        if lead:
            if not args.json:
                print("\n".join(replayed.lines()), flush=True)
            try:
                Ledger(args.dir, tidy=False)("verify", **replayed.as_dict())
            except RunError as e:  # somebody else's run, which may be only read
                note(f"not written to the ledger: {e}")
    verdicts = [r["verdict"] for r in found]
    if lead and not args.json and len(found) > 1:
        print(f"{len(found)} links: " + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)))
    return {"run": str(args.dir), "replays": found}, 1 if "DIFFERS" in verdicts else 0
