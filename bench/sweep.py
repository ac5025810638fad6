"""A sweep over a hundred checkpoints: programs compiled, time against the reading of the weights, and kills.

    python bench/sweep.py [--run RUN] [--checkpoints 100] [--kills 5] [--out bench/results/NAME.json]

Without --run, the first checkpoints of the recipe `amber_360` are trained first. The study is a cheap one: the
log-probabilities of eight rows. Reading alone and sweeping are timed in turns, in one process, each file read before.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from record import record

from analysis import results
from analysis.results import Scored
from analysis.subject import Subject, Target
from analysis.sweep import Outcome, sweep
from models import families, recipes
from training.datasets import open_data

ROOT = Path(__file__).resolve().parent.parent
ROWS = 8
ROUNDS = 5


@dataclass(frozen=True, eq=False)
class Surprise:
    """Mean log-probability of a few fixed rows; says which checkpoint it scores, if asked to."""

    tell: bool = False
    kind: str = "surprise"
    needs_weights: bool = True

    def settings(self) -> dict[str, Any]:
        """What it depends on."""
        return {"rows": ROWS}

    def score(self, subject: Subject) -> Scored:
        """Of one checkpoint."""
        if self.tell:
            print(subject.entry.manifest.name, flush=True)
        model = subject.target.model
        rows = np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, model.context_length + 1))
        return Scored({"logprob": float(np.mean([s.logprobs.mean() for s in subject.score(rows)]))})


def target_of(run: Path, checkpoints: int) -> Target:
    """The first checkpoints of a run."""
    return Target(f"{run}@:{checkpoints}", families(), open_data)


def clear(run: Path) -> None:
    """Remove the results of the study."""
    for path in results.folder(run, "surprise").glob("*"):
        path.unlink()


def timed(run: Path, checkpoints: int) -> dict[str, Any]:
    """Reading and sweeping in turns, and what was compiled."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **more: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    target = target_of(run, checkpoints)
    entries = target.series.resolve(target.selector)
    for entry in entries:  # into the system's cache, so that both are timed alike
        target.load(entry)
    reads, sweeps, of_rounds = [], [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for entry in entries:
            target.load(entry)
        reads.append((time.perf_counter() - start) / len(entries))
        clear(run)
        before = len(compiled)
        outcome: Outcome = sweep(target, [Surprise()], lambda line: None)
        of_rounds.append(len(compiled) - before)
        sweeps.append(outcome.wall_s / len(entries))
        assert len(outcome.made) == len(entries)
    return {
        "checkpoints": len(entries),
        "parameters": target.model.num_parameters,
        "programs_compiled_in_the_first_sweep": of_rounds[0],
        "programs_compiled_in_the_others": sum(of_rounds[1:]),
        "seconds_to_read_one": statistics.median(reads),
        "seconds_of_the_sweep_for_one": statistics.median(sweeps[1:]),
        "ratio": statistics.median(s / r for s, r in zip(sweeps[1:], reads[1:], strict=True)),
        "ratio_with_compilation": sweeps[0] / reads[0],
        "rounds": ROUNDS,
    }


def killed(run: Path, checkpoints: int, kills: int) -> dict[str, Any]:
    """Kill sweeps at random moments, then let one finish: the same results, and none that was finished made again."""
    whole = {r.checkpoint["name"]: r.summary for r in results.of_kind(run, "surprise")}
    clear(run)
    chance, scored, repeats, kept_at_kills = random.Random(0), [], 0, []
    command = [sys.executable, __file__, "--run", str(run), "--checkpoints", str(checkpoints), "--child"]
    for life in range(kills + 1):
        done_before = {p.stem for p in results.folder(run, "surprise").glob("*.json")}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            seen: list[str] = []
            stop_after = chance.randrange(1, max(2, (checkpoints - len(done_before)) // 2)) if life < kills else None
            for line in process.stdout:
                seen.append(line.strip())
                if stop_after and len(seen) >= stop_after:
                    time.sleep(chance.random() * 0.05)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                    break
        repeats += len(set(seen) & done_before)
        scored += seen
        kept_at_kills.append(len({p.stem for p in results.folder(run, "surprise").glob("*.json")}))
    after = {r.checkpoint["name"]: r.summary for r in results.of_kind(run, "surprise")}
    return {
        "kills": kills,
        "results_at_each_end": kept_at_kills,
        "finished_results_made_again": repeats,
        "results_equal": after == whole,
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sweep(target_of(args.run, args.checkpoints), [Surprise(tell=True)], lambda line: None)
        return
    with tempfile.TemporaryDirectory() as scratch:
        run = args.run or Path(scratch, "run")
        if args.run is None:
            config = recipes()["amber_360"]()
            samples = config.data.samples_per_chunk
            steps = args.checkpoints * samples // config.data.global_batch
            train = ["train", "amber_360", "--data", "synthetic", "--run", str(run), "--steps", str(steps)]
            subprocess.run([sys.executable, str(ROOT / "run.py"), *train], check=True)
        result = timed(run, args.checkpoints)
        result["killed"] = killed(run, args.checkpoints, args.kills)
    record(result, jax.devices()[0], args.out)


if __name__ == "__main__":
    main()
