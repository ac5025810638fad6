"""One device: our training step against a plain JAX step of the same mathematics, interleaved in one process.

The plain step is what one would write by hand for one device: a dictionary of arrays, `jax.grad`, `lax.scan` over the
layers, optax. It has no mesh, no manual region, no modules. Both start from the same weights and read the same batches,
and their losses must agree.

    python bench/step.py [--steps 30] [--recipe amber_tiny] [--out bench/results/NAME.json]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import optax
from jax import lax
from record import record

from data.batch import Batch
from data.loader import Loader
from models import recipes
from training.program import Program, no_limits, planned_bytes
from training.step import batch_sharding


def plain_loss(params, batch, config, dtype):
    """The same model and loss on one device, without our structure."""
    tokens, targets, weights = (a[0] for a in batch)
    width = config.head_dim

    def norm(x, scale):
        y = x.astype(jnp.float32)
        return (y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.norm_eps) * scale).astype(x.dtype)

    def rope(x):
        frequencies = config.rope_base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
        a, b = jnp.split(x.astype(jnp.float32), 2, -1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)

    def layer(x, w):
        attention, mlp = ({k: v.astype(dtype) for k, v in w[n].items()} for n in ("attention", "mlp"))
        h = norm(x, w["attention_norm"]["scale"])
        q, k, v = (jnp.einsum("bsd,dhk->bshk", h, attention[n]) for n in ("wq", "wk", "wv"))
        scores = jnp.einsum("bshk,bthk->bhst", rope(q), rope(k), preferred_element_type=jnp.float32) * width**-0.5
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
        mixed = jnp.einsum("bhst,bthk->bshk", jax.nn.softmax(scores, -1).astype(v.dtype), v)
        x = x + jnp.einsum("bshk,hkd->bsd", mixed, attention["wo"])
        h = norm(x, w["mlp_norm"]["scale"])
        return x + (jax.nn.silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"], None

    x = params["embedding"]["table"].astype(dtype)[tokens]
    x = jnp.where((tokens == config.padding_id)[..., None], lax.stop_gradient(x), x)
    x, _ = lax.scan(layer, x, params["layers"])
    x = norm(x, params["norm"]["scale"])
    logits = jnp.einsum("bsd,dv->bsv", x, params["head"]["kernel"].astype(dtype), preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, -1) - chosen) * weights) / jnp.sum(weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--recipe", default="amber_tiny")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps < 4 or args.recipe not in recipes():
        parser.error(f"--steps must be at least 4 and --recipe one of {', '.join(recipes())}")

    config = recipes()[args.recipe]()
    if config.execution.remat != "none" or config.execution.loss_chunks != 1 or config.execution.microbatches != 1:
        sys.exit("bench/step.py compares recipes without rematerialisation, loss chunks and microbatches")
    data = config.synthetic(args.steps)
    config = config.resolve(data)
    mesh = config.mesh.build(jax.devices()[:1])
    program = Program.plan(config, mesh).compile()
    optimizer = config.optimizer.make(config.phase_steps)

    def plain_step(params, moments, batch):
        loss, gradients = jax.value_and_grad(plain_loss)(params, batch, config.model, config.execution.region.dtype)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, loss, optax.tree.norm(gradients)

    ours = program.init()
    params = jax.device_put(jax.tree.map(jnp.array, ours.params), mesh.devices.flat[0])
    moments = optimizer.init(params)
    loader = Loader(
        data,
        phase_steps=config.phase_steps,
        global_batch=config.data.global_batch,
        microbatches=1,
        sharding=batch_sharding(mesh),
    )
    batches = list(loader.batches(0, args.steps))
    plain_batches = [Batch(*(jax.device_put(a, mesh.devices.flat[0]) for a in b)) for b in batches]
    plain = jax.jit(plain_step, donate_argnums=(0, 1)).lower(params, moments, plain_batches[0]).compile()

    limits = no_limits(mesh)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for n, (batch, plain_batch) in enumerate(zip(batches, plain_batches)):

        def run_ours(batch=batch):
            nonlocal ours
            ours, values = program.train_step(ours, batch, limits)
            return float(values["loss"])

        def run_plain(batch=plain_batch):
            nonlocal params, moments
            params, moments, loss, _ = plain(params, moments, batch)
            return float(loss)

        losses = {}
        turns = [("ours", run_ours), ("plain", run_plain)]
        for name, turn in turns if n % 2 else reversed(turns):  # neither is always the one after the other
            start = time.perf_counter()
            losses[name] = turn()
            times[name].append(time.perf_counter() - start)
        if abs(losses["ours"] - losses["plain"]) > 1e-4 * losses["plain"]:
            sys.exit(f"step {n}: the two disagree: {losses}")

    seconds = {name: statistics.median(t[2:]) for name, t in times.items()}
    result = {
        "recipe": config.recipe,
        "steps": args.steps,
        "tokens_per_step": config.data.tokens_per_step,
        "tokens_per_s": {name: config.data.tokens_per_step / s for name, s in seconds.items()},
        "ratio_ours_to_plain": seconds["plain"] / seconds["ours"],
        "ratio_of_pairs_median": statistics.median(p / o for p, o in zip(times["plain"][2:], times["ours"][2:])),
        "planned_peak_bytes": {"ours": program.peak_bytes, "plain": planned_bytes(plain)},
        **{k: v for k, v in program.throughput(seconds["ours"]).items() if k.startswith("mfu")},
    }
    record(result, mesh.devices.flat[0], args.out)


if __name__ == "__main__":
    main()
