"""Loss and gradients of one global batch inside the manual region: microbatch by microbatch, through a pipeline or not.

Gradients are taken by a float32 stand-in of the weights, zeros that need never exist: what is outside the layers by
`parallel.collectives.with_float32_gradient`, and the layers by `with_gradient_added`, so that sums over microbatches
are in float32 whatever the compute dtype, and each layer's gradient is added to them where it is made: there is one
float32 set of the layers' gradients, not one of all microbatches so far and one of the newest. They are sums on this
device alone: the caller's transpose of `Region.begin` brings them together over the mesh, once per step.
"""

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
            lambda model, n, x, into: _stage(model, region, pipeline.at(batch.inputs, n), x, into),
            lambda model, n, y: _loss(model, region, y, pipeline.at(batch, n)) / count,
            model,
            batch.inputs.shape[0],
            region.skip_idle,
        )

    zeros = jax.tree.map(lambda w: zeros_like(w.shape, w), model)

    def add(total: Any, batch: Batch) -> tuple[jax.Array, Any]:
        """The loss of some microbatches, and the gradients so far with theirs."""

        def through(stand_in: Any) -> tuple[jax.Array, Any]:
            loss, into = loss_sum(model, region, batch, stand_in)
            return loss / count, _with_layers(stand_in, into)

        (loss, _), pull_back = jax.vjp(through, zeros)
        return loss, pull_back((jnp.ones_like(loss), total))[0]

    if stages > 1 or batch.inputs.shape[0] == 1:
        return add(zeros, batch)

    def turn(carry: tuple[jax.Array, Any], part: Batch) -> tuple[tuple[jax.Array, Any], None]:
        loss, total = add(carry[1], jax.tree.map(lambda a: a[None], part))
        return (carry[0] + loss, total), None

    return lax.scan(turn, (vary(jnp.float32(0), BATCH_AXES), zeros), batch)[0]


def loss_sum(model: Decoder, region: Region, batch: Batch, stand_in: Any = None) -> tuple[jax.Array, Any]:
    """Weighted sum of ``-log p`` over this device's part of the batch, without schedules that need the gradient.

    With a pipeline each stage embeds its share of the microbatches, and computes the loss of its share: no stage waits
    for the ends of the model. Missing microbatches, where stages do not divide their number, count nothing.

    Args:
        model: as `Region.begin` returns it.
        region: how it runs.
        batch: this device's rows of all microbatches.
        stand_in: like the model, in float32: what the loss is to be differentiated by, or None.

    Returns:
        The sum, and the stand-in's layers, whose cotangent is what gradients of the layers are added to.
    """
    stages = lax.axis_size(PIPELINE)
    into = None if stand_in is None else stand_in.layers

    def ends() -> Any:
        """The model anew in each turn of a loop, so that gradients of what is outside the layers meet in float32."""
        return model if stand_in is None else _sunk(model, stand_in)

    if stages == 1 and batch.inputs.shape[0] == 1:
        return _whole(ends(), region, jax.tree.map(lambda a: a[0], batch), into)
    if stages == 1:

        def one(carry: tuple[jax.Array, Any], part: Batch) -> tuple[tuple[jax.Array, Any], None]:
            loss, into = _whole(ends(), region, part, carry[1])
            return (carry[0] + loss, into), None

        return lax.scan(one, (zeros_like((), batch.weights), into), batch)[0]
    batch = jax.tree.map(lambda a: jnp.pad(a, [(0, -a.shape[0] % stages)] + [(0, 0)] * (a.ndim - 1)), batch)
    share = batch.inputs.shape[0] // stages
    mine = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, axis_index(PIPELINE) * share, share), batch)
    # One microbatch at a time: before tensor parallelism splits it, the looked up stream is a whole [rows, S, D].
    _, x = lax.scan(lambda _, inputs: (None, vary(ends().embed(inputs, region))), None, mine.inputs)

    run = region.checkpoint_stage(lambda model, tokens, x, into, repeat: _stage(model, region, tokens, x, into, repeat))

    def stage(repeat: Any, n: Any, x: jax.Array, into: Any) -> tuple[jax.Array, Any]:
        return run(model, pipeline.at(batch.inputs, n), x, into, repeat if region.repeats > 1 else None)

    y, into = pipeline.gpipe(stage, all_gather(x, PIPELINE, 0), region.repeats, into)
    y = psum_scatter(y, PIPELINE, 0)
    end = region.checkpoint_stage(lambda model, y, part: _loss(model, region, y, part))
    first = zeros_like((), mine.weights)
    return lax.scan(lambda t, part: (t + end(ends(), *part), None), first, (y, mine))[0], into


def _whole(model: Any, region: Region, part: Batch, into: Any) -> tuple[jax.Array, Any]:
    """The loss of one microbatch, without a pipeline."""
    run = region.checkpoint_stage(lambda model, x, into: _stage(model, region, part.inputs, x, into))
    y, into = run(model, model.embed(part.inputs, region), into)
    return _loss(model, region, y, part), into


def _stage(
    model: Any, region: Region, tokens: jax.Array, x: jax.Array, into: Any, repeat: Any = None
) -> tuple[jax.Array, Any]:
    """What a stage makes of a microbatch [rows, S] of tokens, whose residual stream arrives as x."""
    y, _, into = model.stage(x, region, reach=region.reach(tokens), repeat=repeat, into=into)
    return y, into


def _loss(model: Any, region: Region, y: jax.Array, part: Batch) -> jax.Array:
    return model.loss(y, part.targets, part.weights, region)


def _sunk(model: Any, stand_in: Any) -> Any:
    """The model, its gradients outside the layers going to the stand-in."""
    return _with_layers(jax.tree.map(with_float32_gradient, model, stand_in), model.layers)


def _with_layers(model: Any, layers: Any) -> Any:
    """A model with other layers."""
    model = jax.tree.map(lambda w: w, model)
    model.layers = layers
    return model
