"""Two whole series, of 360 and of 143 checkpoints, by one command each: made, checked, and trained again.

    python bench/series.py [--dir FOLDER] [--demo RUN] [--out bench/results/NAME.json]

With --demo, a finished run (`run.py demo`) too: every link of its series alone on its own meshes, and all of it on
another one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OTHER_MESH = "tensor=4"


def call(*words: Any) -> tuple[dict[str, Any], float]:
    """JSON and seconds of a command; shown, and its failure with it."""
    print("$ run.py", *words, flush=True)
    begin = time.perf_counter()
    command = [sys.executable, str(ROOT / "run.py"), *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - begin
    print(f"  exit code {done.returncode}, {seconds:.1f} s", flush=True)
    return json.loads(done.stdout) | {"exit_code": done.returncode}, seconds


def whole_series(recipe: str, run: Path) -> dict[str, Any]:
    """Make a series, check it, replay it."""
    trained, train_s = call("train", recipe, "--data", "synthetic", "--run", run)
    checked, check_s = call("series", run, "--check")
    replayed, verify_s = call("verify", run)
    (replay,) = replayed["replays"]
    names = [c["name"] for c in checked["checkpoints"]]
    return {
        "recipe": recipe,
        "reason": trained["reason"],
        "steps": trained["step"],
        "checkpoints": len(names) - 1,
        "besides": names[0],
        "first_and_last": [names[1], names[-1]],
        "train_seconds": train_s,
        "problems": checked["problems"],
        "check_seconds": check_s,
        "bytes": checked["bytes"],
        "verdict": replay["verdict"],
        "losses_compared": replay["losses"],
        "checkpoints_compared": len(replay["checkpoints"]),
        "verify_seconds": verify_s,
    }


def links_of(run: Path) -> dict[str, Any]:
    """Every link of a run alone, on the run's meshes; and all of it in one go on another."""
    alone, alone_s = call("verify", run, "--sample", 1000)
    other, other_s = call("verify", run, "--mesh", OTHER_MESH)
    verdicts = [r["verdict"] for r in alone["replays"]]
    (replay,) = other["replays"]
    return {
        "links": len(verdicts),
        "bitwise": verdicts.count("bitwise"),
        "losses_compared": sum(r["losses"] for r in alone["replays"]),
        "seconds": alone_s,
        "other_mesh": OTHER_MESH,
        "other_verdict": replay["verdict"],
        "other_steps": replay["steps"],
        "other_loss_deviation": replay["loss"],
        "other_parameter_deviation": max(c["parameters"] for c in replay["checkpoints"]),
        "other_tolerance": replay["tolerance"],
        "other_seconds": other_s,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the runs go; by default a folder that is removed")
    parser.add_argument("--demo", type=Path, help="a finished run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import jax
    from record import record

    with tempfile.TemporaryDirectory(prefix="series-") as scratch:
        folder = args.dir or Path(scratch)
        result: dict[str, Any] = {"benchmark": "series"}
        result["series"] = [whole_series(recipe, folder / recipe) for recipe in ("amber_360", "crystal_143")]
        if args.demo:
            result["demo"] = links_of(args.demo)
    record(result, jax.devices("cpu")[0], args.out)


if __name__ == "__main__":
    main()
