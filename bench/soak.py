"""Kill a training run again and again: it must end as if nobody had.

A small model is trained once in one go, and once more in a process (or two) that is killed with SIGKILL at random
moments and started again: while it starts, between two steps, in the middle of a save, and between the last byte of a
checkpoint and its manifest. Each life must go on from the newest committed checkpoint, clean away what the kill left
half-written, and log the losses of the uninterrupted run.

    python bench/soak.py [--kills 50] [--mesh fsdp=2] [--seed 0] [--out bench/results/NAME.json]

One mesh, held by one process or two by chance: losses, weights and optimizer state are equal bit for bit. With
--mesh any each life has a mesh by chance, and losses agree to 1e-5.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from checkpoint import digest
from checkpoint.manifest import FILE, Entry
from checkpoint.series import Series, verify_files
from checkpoint.tensors import Tensors
from training.metrics import read_lines

ROOT = Path(__file__).resolve().parent.parent
ANY = (
    "fsdp=2", "data=1", "data=2", "fsdp=4", "tensor=2", "pipeline=2,data=2", "fsdp=2,tensor=2", "pipeline=2,fsdp=2",
    "data=4",
)  # fmt: skip
TOLERANCE = 1e-5
"""Of losses on different meshes, relative."""

MODEL = (
    "--model.num-layers=2", "--model.vocab-size=64", "--model.context-length=16", "--model.embed=16",
    "--model.num-heads=2", "--model.head-dim=8", "--model.mlp=32", "--data.sequence-length=16",
    "--data.global-batch=8", "--execution.microbatches=2", "--optimizer.warmup-steps=5",
)  # fmt: skip
CHUNK_STEPS = 20  # a series checkpoint each
ROLLING_STEPS = 4
STEPS_PER_KILL = 12
_PATIENCE_S = 200.0
AIMS = {"start": 1, "step": 3, "save": 3, "hash": 2}
"""How often a kill is aimed at which moment: while the process starts; after some steps; when a checkpoint is being
written; when one is written whole and has no manifest yet."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is run, and where."""

    folder: Path
    """Scratch: the runs, what the compiler made, messages."""
    chunks: int
    meshes: tuple[str, ...]
    processes: tuple[int, ...] = (1, 2)
    """Counts to draw from; a mesh of one device has one."""

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.chunks * CHUNK_STEPS

    def command(self, run: Path, mesh: str, processes: int) -> list[list[str]]:
        """Of each process of a life."""
        data = ["--data=synthetic", f"--data.chunks={self.chunks}", f"--data.samples-per-chunk={8 * CHUNK_STEPS}"]
        every = [f"--series.rolling-every-steps={ROLLING_STEPS}"]
        command = [sys.executable, str(ROOT / "run.py"), "train", "amber_tiny", f"--run={run}", f"--mesh={mesh}"]
        command += [f"--simulate={devices(mesh) // processes}", *data, *MODEL, *every]
        if processes == 1:
            return [command]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            hosts = [f"--coordinator=localhost:{free.getsockname()[1]}", f"--processes={processes}"]
        return [[*command, *hosts, f"--process-id={k}"] for k in range(processes)]

    def start(self, run: Path, mesh: str, processes: int) -> list[subprocess.Popen[bytes]]:
        """Start a life; its messages go to FOLDER/messages."""
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles in half the time
            # All lives run one program: what one compiled, Python's modules too, the next ones read.
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPYCACHEPREFIX": str(self.folder / "modules"),
            "PYTHONDONTWRITEBYTECODE": "",
        }
        with open(self.folder / "messages", "ab") as out:
            return [
                subprocess.Popen(command, env=environment, stdout=out, stderr=out)
                for command in self.command(run, mesh, processes)
            ]


def devices(mesh: str) -> int:
    """How many a mesh like "data=2,fsdp=2" has."""
    return int(np.prod([int(axis.partition("=")[2]) for axis in mesh.split(",")]))


def half_written(run: Path) -> list[Path]:
    """Folders of checkpoints that have no manifest."""
    found = []
    for kind in ("series", "early", "rolling"):
        for path in _listed(run / kind):
            if path.is_dir() and not (path / FILE).exists():
                found.append(path)
    return found


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def left_from(run: Path, moment: float) -> list[Path]:
    """Files of half-written checkpoints that were there before a moment (unix seconds, of the disk's clock)."""
    found = []
    for folder in half_written(run):
        for path in folder.rglob("*"):
            try:
                if path.is_file() and path.stat().st_mtime < moment:
                    found.append(path)
            except FileNotFoundError:  # a save goes on meanwhile
                pass
    return found


def state(entry: Entry) -> dict[str, str]:
    """Digest of every array of a checkpoint, read back from its verified files."""
    return {
        f"{item}/{name}": digest.digest(name, array[...])
        for item in ("params", "optimizer")
        if entry.has(item)
        for name, array in Tensors(entry, item).items()
    }


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every logged step."""
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in read_lines(run / "metrics.jsonl") if r["kind"] == "train"}


def logged(run: Path) -> int:
    """Steps that are logged: a look that costs nothing beside the run."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def begins(run: Path) -> list[dict[str, Any]]:
    """The ledger's events with which lives begin."""
    return [e for e in read_lines(run / "ledger.jsonl") if e["event"] in ("start", "resume")]


class Died(Exception):
    """A life ended before it was killed."""


@dataclasses.dataclass
class Soak:
    """A run that is killed, and the one that it is compared with."""

    setting: Setting
    exact: bool
    random: random.Random
    say: Callable[[str], Any] = print
    wrong: list[str] = dataclasses.field(default_factory=list)
    """What should not have happened, one sentence each."""
    compared: int = 0
    """Logged losses."""
    largest: float = 0.0
    """Relative difference of two losses."""
    reference: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    startup_s: float = 8.0
    """How long a life takes to begin, about."""

    @property
    def run(self) -> Path:
        """The run that is killed."""
        return self.setting.folder / "run"

    @property
    def whole(self) -> Path:
        """The one that is not."""
        return self.setting.folder / "whole"

    def uninterrupted(self) -> None:
        """Make the run to compare with."""
        self.finish(self.whole, self.setting.meshes[0], 1)
        self.reference = losses(self.whole)

    def finish(self, run: Path, mesh: str, processes: int) -> None:
        """Let a life go on to the end."""
        running = self.setting.start(run, mesh, processes)
        with _ended(running):
            if codes := [code for p in running if (code := p.wait())]:
                raise Died(f"exit codes {codes}; see {self.setting.folder / 'messages'}")

    def live(self, number: int) -> dict[str, Any]:
        """One life and its end: start, look at what was restored, kill, look at what was logged and left."""
        mesh = self.random.choice(self.setting.meshes)
        processes = self.random.choice([n for n in self.setting.processes if n <= devices(mesh)])
        aim = self.random.choices([*AIMS], [*AIMS.values()])[0]
        before = self._before()
        running = self.setting.start(self.run, mesh, processes)
        life: dict[str, Any] = {"kill": number, "mesh": mesh, "processes": processes, "aim": aim, **before}
        with _ended(running):
            if aim == "start":
                time.sleep(self.random.uniform(0, self.startup_s))
            else:
                self._restored(running, before)
                more = self.random.randint(1, 2 * STEPS_PER_KILL - 8)
                self._until(lambda: logged(self.run) > before["step"] + more, running)
                if aim == "step":
                    time.sleep(self.random.uniform(0, 0.2))
                else:
                    whole = (lambda p: "." not in p.name) if aim == "hash" else (lambda p: True)
                    self._until(lambda: any(map(whole, half_written(self.run))), running)
                    time.sleep(self.random.uniform(0, 0.1) if aim == "save" else 0)
            for process in self.random.sample(running, len(running)):
                process.send_signal(signal.SIGKILL)
            if ended := [p.returncode for p in running if p.wait() != -signal.SIGKILL]:
                raise Died(f"exit codes {ended}; see {self.setting.folder / 'messages'}")
        life["reached"] = logged(self.run)
        life["left"] = self._left()
        if aim != "start":
            self.check_losses(f"kill {number}", before["step"])
        return life

    def _left(self) -> dict[str, str]:
        """How far what a kill left half-written had come."""
        newest = Series(self.run).newest()
        found = {}
        for path in half_written(self.run):
            rolling = path.parent.name == "rolling" and path.name.isdigit()
            gone = newest and rolling and int(path.name) <= newest.manifest.step
            found[path.relative_to(self.run).as_posix()] = (
                "half removed" if gone else "no manifest" if "." not in path.name else "half written"
            )
        return found

    def _before(self) -> dict[str, Any]:
        """What the next life finds: the checkpoint to go on from, verified, and what is half-written."""
        newest = Series(self.run).newest()
        if newest:
            verify_files(newest)
        return {
            "parent": newest and newest.manifest.name,
            "step": newest.manifest.step if newest else 0,
            "found": len(half_written(self.run)),
            "lives": len(begins(self.run)),
            "moment": time.time(),
        }

    def _restored(self, running: list[subprocess.Popen[bytes]], before: Mapping[str, Any]) -> None:
        """Wait until a life has its state, and look where it came from."""
        begun = time.monotonic()
        self._until(lambda: len(begins(self.run)) > before["lives"], running, every_s=0.02)
        self.startup_s = 0.5 * self.startup_s + 0.5 * (time.monotonic() - begun)
        event = begins(self.run)[-1]
        if left := left_from(self.run, before["moment"]):
            self.wrong.append(f"step {before['step']}: half-written and not cleaned: {left[0]} (of {len(left)} files)")
        told = ("resume" if before["parent"] else "start", before["step"], before["parent"])
        if (event["event"], event["step"], event["parent"]) != told:
            self.wrong.append(f"restored another state: expected {told}, the ledger says {event}")

    def _until(self, there: Callable[[], bool], running: list[subprocess.Popen[bytes]], every_s: float = 0.001) -> None:
        """Wait for something that the processes do."""
        deadline = time.monotonic() + _PATIENCE_S
        while not there():
            if any(p.poll() is not None for p in running):
                if Series(self.run).newest() and not any(p.poll() for p in running):
                    return  # it came to its end: too late for this kill
                raise Died(f"by itself; see {self.setting.folder / 'messages'}")
            if time.monotonic() > deadline:
                raise Died(f"of silence: nothing happened for {_PATIENCE_S} s")
            time.sleep(every_s)

    def check_losses(self, when: str, since: int = 0) -> None:
        """Compare what is logged from a step on, also what the next life will cut off."""
        for step, ours in losses(self.run).items():
            if step < since:
                continue
            theirs = self.reference[step]
            self.compared += 1
            self.largest = max(self.largest, abs(ours[0] - theirs[0]) / abs(theirs[0]))
            near = abs(ours[0] - theirs[0]) <= TOLERANCE * abs(theirs[0])
            if ours != theirs if self.exact else not near:
                self.wrong.append(f"{when}: loss and norm of step {step} are {ours}, uninterrupted {theirs}")

    def compare(self) -> dict[str, Any]:
        """The two finished runs: every checkpoint of the series, array by array."""
        ours, theirs = Series(self.run).entries(), Series(self.whole).entries()
        if [(e.manifest.name, e.manifest.step) for e in ours] != [(e.manifest.name, e.manifest.step) for e in theirs]:
            self.wrong.append(f"the series has {len(ours)} checkpoints, uninterrupted {len(theirs)}, or others")
        if left := half_written(self.run):
            self.wrong.append(f"half-written at the end: {left[0]}")
        if len((self.run / "series.jsonl").read_text().splitlines()) != len(ours):
            self.wrong.append("series.jsonl lists other checkpoints than there are")
        if sorted(losses(self.run)) != list(range(self.setting.steps)):
            self.wrong.append("not every step is logged")
        arrays = 0
        same_step = {e.manifest.step: e for e in theirs}
        for a in ours:
            verify_files(a)
            if self.exact and (b := same_step.get(a.manifest.step)):
                mine, other = state(a), state(b)
                arrays += len(mine)
                if changed := [n for n in mine.keys() | other.keys() if mine.get(n) != other.get(n)]:
                    self.wrong.append(f"series/{a.manifest.name}: {len(changed)} arrays differ, {changed[0]}")
        last = [Series(run).newest() for run in (self.run, self.whole)]
        if not all(e and e.has("optimizer") and e.manifest.step == self.setting.steps for e in last):
            self.wrong.append("the last checkpoint is not of the last step, or has no optimizer state")
        return {"series_checkpoints": len(ours), "arrays_compared_bit_for_bit": arrays}


@contextlib.contextmanager
def _ended(running: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Leave no process behind."""
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def soak(setting: Setting, kills: int, exact: bool, seed: int, say: Callable[[str], Any] = print) -> dict[str, Any]:
    """Kill a run so many times, let it finish, and compare it. Returns the result; "wrong" lists what was."""
    one = Soak(setting, exact, random.Random(seed), say)
    begun = time.perf_counter()
    one.uninterrupted()
    say(f"uninterrupted: {setting.steps} steps in {time.perf_counter() - begun:.0f} s")
    lives: list[dict[str, Any]] = []
    for number in range(1, kills + 1):
        life = one.live(number)
        lives.append(life)
        say(
            f"kill {number:3}/{kills}  {life['mesh']:18} {life['processes']} process(es)  found {life['found']} torn, "
            f"went on from {life['parent'] or 'nothing'} (step {life['step']}), killed at {life['aim']:5} after "
            f"{life['reached']} steps, left {life['left'] or 'nothing'}; wrong so far: {len(one.wrong)}"
        )
        if life["reached"] >= setting.steps:
            raise Died(f"the run ended after {number} kills; give it more chunks")
    one.finish(setting.folder / "run", setting.meshes[0], 1)
    one.check_losses("at the end")
    compared = one.compare()
    lost = [life["reached"] - nxt["step"] for life, nxt in itertools.pairwise(lives)]
    left = collections.Counter(what for life in lives for what in life["left"].values())
    return {
        "benchmark": "soak",
        "kills": kills,
        "meshes": list(setting.meshes),
        "claim": "the same bits" if exact else f"losses agree to {TOLERANCE}",
        "steps": setting.steps,
        "kills_by_aim": dict(collections.Counter(life["aim"] for life in lives)),
        "kills_of_two_processes": sum(life["processes"] == 2 for life in lives),
        "kills_that_left_something": sum(bool(life["left"]) for life in lives),
        "left_and_cleaned": dict(left),
        "steps_done_twice_median": statistics.median(lost) if lost else 0,
        "losses_compared": one.compared,
        "largest_relative_difference_of_a_loss": one.largest,
        **compared,
        "wrong": one.wrong,
        "seconds": time.perf_counter() - begun,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--mesh", default="fsdp=2", help='of all lives; "any": another for each')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="scratch, kept; by default a temporary one, removed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import jax
    from record import record

    exact = args.mesh != "any"
    chunks = 2 + -(-args.kills * STEPS_PER_KILL // CHUNK_STEPS)
    folder = args.dir or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    result = soak(Setting(folder, chunks, (args.mesh,) if exact else ANY), args.kills, exact, args.seed)
    record(result, jax.devices("cpu")[0], args.out)
    if not args.dir:
        shutil.rmtree(folder)
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
