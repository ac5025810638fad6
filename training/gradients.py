"""Loss and gradients of one global batch inside the manual region: microbatch by microbatch, through a pipeline or not.

Gradients are taken by a float32 stand-in of the weights (`parallel.collectives.with_float32_gradient`), so that sums
over microbatches are in float32 whatever the compute dtype. They are sums on this device alone: the caller's transpose
of `Region.begin` brings them together over the mesh, once per step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from data.batch import Batch
from layers.decoder import Decoder
from layers.region import Region
from parallel import pipeline
from parallel.axes import BATCH_AXES, PIPELINE
from parallel.collectives import all_gather, axis_index, psum_scatter, vary, with_float32_gradient, zeros_like


def loss_and_gradients(model: Decoder, region: Region, batch: Batch, count: Any) -> tuple[jax.Array, Any]:
    """This device's part of the loss, and gradients like the model.

    Args:
        model: as `Region.begin` returns it.
        region: how it runs.
        batch: this device's rows of all microbatches, each array [M, rows, S].
        count: what the sum of the losses is divided by.
    """
    stages = lax.axis_size(PIPELINE)
    if stages > 1 and region.schedule == "1f1b":
        return pipeline.one_forward_one_backward(
            lambda model, n: model.embed(pipeline.at(batch.inputs, n), region),
            lambda model, n, x: _stage(model, region, pipeline.at(batch.inputs, n), x),
            lambda model, n, y: _loss(model, region, y, pipeline.at(batch, n)) / count,
            model,
            batch.inputs.shape[0],
            region.skip_idle,
        )

    def through(stand_in: Any, batch: Batch) -> jax.Array:
        return loss_sum(lambda: _sunk(model, stand_in), region, batch) / count

    zeros = jax.tree.map(lambda w: zeros_like(w.shape, w), model)
    if stages > 1 or batch.inputs.shape[0] == 1:
        return jax.value_and_grad(through)(zeros, batch)

    def add(carry: tuple[jax.Array, Any], part: Batch) -> tuple[tuple[jax.Array, Any], None]:
        loss, gradients = jax.value_and_grad(through)(zeros, jax.tree.map(lambda a: a[None], part))
        return (carry[0] + loss, jax.tree.map(jnp.add, carry[1], gradients)), None

    return lax.scan(add, (vary(jnp.float32(0), BATCH_AXES), zeros), batch)[0]


def loss_sum(model: Callable[[], Any], region: Region, batch: Batch) -> jax.Array:
    """Weighted sum of ``-log p`` over this device's part of the batch, without schedules that need the gradient.

    With a pipeline each stage embeds its share of the microbatches, and computes the loss of its share: no stage waits
    for the ends of the model. Missing microbatches, where stages do not divide their number, count nothing.

    Args:
        model: gives the weights anew in each turn of a loop, so that the gradients of the turns meet in float32.
        region: how it runs.
        batch: this device's rows of all microbatches.
    """
    stages = lax.axis_size(PIPELINE)
    if stages == 1 and batch.inputs.shape[0] == 1:
        return _whole(model(), region, jax.tree.map(lambda a: a[0], batch))
    if stages == 1:
        total = zeros_like((), batch.weights)
        return lax.scan(lambda t, part: (t + _whole(model(), region, part), None), total, batch)[0]
    batch = jax.tree.map(lambda a: jnp.pad(a, [(0, -a.shape[0] % stages)] + [(0, 0)] * (a.ndim - 1)), batch)
    share = batch.inputs.shape[0] // stages
    mine = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, axis_index(PIPELINE) * share, share), batch)
    # One microbatch at a time: before tensor parallelism splits it, the looked up stream is a whole [rows, S, D].
    _, x = lax.scan(lambda _, inputs: (None, vary(model().embed(inputs, region))), None, mine.inputs)

    run = region.checkpoint_stage(lambda model, tokens, x, repeat: _stage(model, region, tokens, x, repeat))

    def stage(repeat: Any, n: Any, x: jax.Array) -> jax.Array:
        return run(model(), pipeline.at(batch.inputs, n), x, repeat if region.repeats > 1 else None)

    y = pipeline.gpipe(stage, all_gather(x, PIPELINE, 0), region.repeats)
    y = psum_scatter(y, PIPELINE, 0)
    end = region.checkpoint_stage(lambda model, y, part: _loss(model, region, y, part))
    first = zeros_like((), mine.weights)
    return lax.scan(lambda t, part: (t + end(model(), *part), None), first, (y, mine))[0]


def _whole(model: Any, region: Region, part: Batch) -> jax.Array:
    """The loss of one microbatch, without a pipeline."""
    run = region.checkpoint_stage(lambda model, x: _stage(model, region, part.inputs, x))
    return _loss(model, region, run(model, model.embed(part.inputs, region)), part)


def _stage(model: Any, region: Region, tokens: jax.Array, x: jax.Array, repeat: Any = None) -> jax.Array:
    """What a stage makes of a microbatch [rows, S] of tokens, whose residual stream arrives as x."""
    return model.stage(x, region, reach=region.reach(tokens), repeat=repeat)[0]


def _loss(model: Any, region: Region, y: jax.Array, part: Batch) -> jax.Array:
    return model.loss(y, part.targets, part.weights, region)


def _sunk(model: Any, stand_in: Any) -> Any:
    return jax.tree.map(with_float32_gradient, model, stand_in)
