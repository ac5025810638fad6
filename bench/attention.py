"""Attention on one device: our flash against the reference softmax, forward and backward, interleaved in one process.

python bench/attention.py [--length 2048] [--seconds 30] [--out bench/results/NAME.json]
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from record import record

from layers import attention

ROWS, HEADS, HEAD_DIM = 1, 2, 128  # two of Amber's heads
KERNELS = ("reference", "flash")


def value_and_gradients(kernel, q, k, v, ct):
    out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, HEAD_DIM**-0.5, None), q, k, v)
    return out, *pull(ct)


def temporary_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.length < 1:
        parser.error("--length must be at least 1")

    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (ROWS, args.length, HEADS, HEAD_DIM)) for key in keys]
    steps = {
        name: jax.jit(functools.partial(value_and_gradients, attention.KERNELS[name])).lower(*arrays).compile()
        for name in KERNELS
    }

    results = {name: jax.block_until_ready(step(*arrays)) for name, step in steps.items()}
    error = max(
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(results["flash"], results["reference"])
    )
    if error > 1e-5:
        sys.exit(f"the two disagree by {error:.1e} of the largest")

    times: dict[str, list[float]] = {name: [] for name in KERNELS}
    until = time.perf_counter() + args.seconds
    while time.perf_counter() < until or len(times["flash"]) < 3:
        for name in KERNELS if len(times["flash"]) % 2 else reversed(KERNELS):  # neither always comes after the other
            start = time.perf_counter()
            jax.block_until_ready(steps[name](*arrays))
            times[name].append(time.perf_counter() - start)

    temporary = {name: temporary_bytes(step) for name, step in steps.items()}
    result = {
        "shape": {"rows": ROWS, "length": args.length, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32"},
        "runs": len(times["flash"]),
        "seconds_median": {name: statistics.median(t) for name, t in times.items()},
        "seconds_least": {name: min(t) for name, t in times.items()},
        "speedup_of_pairs_median": statistics.median(r / f for r, f in zip(times["reference"], times["flash"])),
        "temporary_bytes": temporary,
        "temporary_bytes_ratio": temporary["flash"] / temporary["reference"],
        "largest_error": error,
    }
    record(result, arrays[0].devices().pop(), args.out)


if __name__ == "__main__":
    main()
