"""One accelerator: the whole training step, optimizer included, in several ways; each in a process of its own.

    python bench/gpu.py [--recipe amber_7b] [--batch 8] [--steps 8] [--only auto,flash] [--out bench/results/NAME.json]

Compares attention kernels, rematerialisation and the loop over layers. On a machine without a GPU it runs at
small size: --recipe amber_tiny.
"""

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Name -> what differs from the first.
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "flash": {"attention": "flash"},
    "reference": {"attention": "reference"},
    "remat dots": {"remat": "dots"},
    "remat none": {"remat": "none"},
    "remat offload": {"remat": "offload"},
    "two layers a turn": {"unroll": 2},
    "no loop over layers": {"unroll": 0},
    "two microbatches": {"microbatches": 2},
}


def one(recipe, batch, steps, way):
    """Time one way in this process; prints JSON."""
    from models import recipes
    from parallel.mesh import MeshConfig
    from training import loop

    config = recipes()[recipe]()
    changed = WAYS[way] | ({"unroll": config.model.num_layers} if WAYS[way].get("unroll") == 0 else {})
    asked: dict[str, Any] = {"remat": "full", "microbatches": 1, **changed}
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(),
        data=dataclasses.replace(config.data, global_batch=batch, workers=0),
        execution=dataclasses.replace(config.execution, **asked),
    )
    print(json.dumps(loop.time_steps(config, config.synthetic(steps), steps, lambda n: None)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="amber_7b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", help="names from WAYS, with commas between", default=",".join(WAYS))
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each way")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [w for w in args.only.split(",") if w not in WAYS]:
        parser.error(f"--only: unknown {unknown}; known: {', '.join(WAYS)}")
    if args.way:
        return one(args.recipe, args.batch, args.steps, args.way)

    results = {}
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.97"}
    for way in args.only.split(","):
        command = [sys.executable, __file__, "--way", way, "--recipe", args.recipe, "--batch", str(args.batch)]
        command += ["--steps", str(args.steps)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, env=environment)
            results[way] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failure(done.stderr)
        except subprocess.TimeoutExpired:
            results[way] = {"failed": f"not done in {args.timeout:.0f} s"}
        print(way, line(results[way]), flush=True)
        if args.out:  # what is finished is kept, whatever becomes of the rest
            save(results, args)


def failure(text):
    """The line of an error that says what went wrong."""
    lines = [line for line in text.splitlines() if line.strip()]
    return {
        "failed": next((line for line in reversed(lines) if "Error" in line or "error" in line), "no message")[:400]
    }


def line(result):
    """A result in one line."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    mfu = {k: f"{result[k]:.1%}" if result[k] else "?" for k in ("mfu_causal", "mfu_full")}
    used = result["peak_bytes_per_device_measured"] or result["peak_bytes_per_device_planned"]
    return (
        f"{result['tokens_per_s']:,.0f} tokens/s, MFU {mfu['mfu_causal']} causal {mfu['mfu_full']} full, "
        f"{used / 1e9:.1f} GB, compiled in {result['compile_s']:.0f} s"
    )


def save(results, args):
    """Write what there is so far."""
    from checkpoint.manifest import environment

    value = {"recipe": args.recipe, "batch": args.batch, "steps": args.steps, "ways": results}
    value |= {"versions": environment(), "date": datetime.date.today().isoformat()}
    args.out.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
