"""One device: greedy decoding with the key/value cache against running the whole prefix again for every token.

Both come from `inference.generate`, start from the same weights and prompt, take turns in one process, and must write
the same tokens. The one without a cache compiles once too: it always computes as many positions as prompt and
continuation have together, for a prefix that is `mean_prefix` long on average.

    python bench/generate.py [--prompt 256] [--new 256] [--repeats 5] [--out bench/results/NAME.json]
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from flax import nnx
from record import record

from inference.generate import generate
from inference.sampling import Sampling
from layers import params
from models import recipes
from parallel.mesh import MeshConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="amber_tiny")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if min(args.prompt, args.new, args.repeats) < 1 or args.recipe not in recipes():
        parser.error(f"numbers must be at least 1, and --recipe one of {', '.join(recipes())}")

    config = recipes()[args.recipe]()
    model = dataclasses.replace(config.model, context_length=args.prompt + args.new)
    mesh = MeshConfig().build(jax.devices()[:1])
    weights = nnx.to_pure_dict(nnx.split(model.build(jax.random.key(config.seed)))[1])
    weights = jax.device_put(weights, params.shardings(model.abstract, mesh))
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, args.prompt).tolist()
    sampling = Sampling(max_new_tokens=args.new)

    compiling: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)

    def write(use_cache: bool) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        # No id is -1: nothing ends early.
        tokens = generate(model, weights, [prompt], mesh, config.execution.region, sampling, -1, use_cache)
        return time.perf_counter() - start, tokens

    ways = {"cached": True, "prefix": False}
    texts, compile_s = {}, {}
    for name, use_cache in ways.items():
        compiling.clear()
        texts[name] = write(use_cache)[1]
        compile_s[name] = sum(compiling)
    if texts["cached"] != texts["prefix"]:
        sys.exit("the two write different tokens")
    compiling.clear()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(args.repeats):
        for name in ways if n % 2 else reversed(ways):  # neither is always the one after the other
            times[name].append(write(ways[name])[0])

    if compiling:
        sys.exit("something was compiled while it was timed")

    seconds = {name: statistics.median(t) for name, t in times.items()}
    result = {
        "recipe": config.recipe,
        "prompt_tokens": args.prompt,
        "new_tokens": args.new,
        "mean_prefix": args.prompt + (args.new - 1) / 2,
        "repeats": args.repeats,
        "seconds": seconds,
        "tokens_per_s": {name: args.new / s for name, s in seconds.items()},
        "ratio_cached_to_prefix": seconds["prefix"] / seconds["cached"],
        "ratio_of_pairs_median": statistics.median(p / c for p, c in zip(times["prefix"], times["cached"])),
        "compile_s": compile_s,
    }
    record(result, mesh.devices.flat[0], args.out)


if __name__ == "__main__":
    main()
