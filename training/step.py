"""One optimizer step and one evaluation step as pure, jitted functions of (state, batch).

Gradients are taken *inside* the manual region: it returns loss and gradients, each where its parameter lives. Outside
it there is only the optimizer, elementwise on sharded arrays.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.batch import Batch
from layers import params
from layers.model import ModelConfig
from layers.region import Region
from parallel import axes
from parallel.axes import BATCH_AXES, PIPELINE
from parallel.collectives import psum
from training.gradients import loss_and_gradients, loss_sum
from training.state import TrainState, abstract_state, pass_over, shardings

Metrics = dict[str, jax.Array]
#: Every loss and gradient norm is within these, if it is finite.
NO_LIMITS = np.full(2, np.inf, np.float32)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the arrays of a `Batch`, [microbatches, rows, S], live."""
    return axes.sharding(mesh, "microbatch", "batch", "position")


def make_loss_and_gradients(
    model: ModelConfig,
    region: Region,
    mesh: Mesh,
    loss_over: Literal["targets", "positions"] = "targets",
    rows: int | None = None,
) -> Callable[[Any, Batch], tuple[jax.Array, Any]]:
    """``(params, batch) -> (loss, gradients)``: sum of weighted ``-log p`` over the global batch, divided.

    Divided by the sum of the weights (``targets``), or by the number of positions whatever their weights (fact sheet
    2.2), those of ``rows`` rows: what more the batch has is padding, of weight 0 (None: it has none). The batch is
    worked off microbatch by microbatch; the divisor is that of the whole batch, so how it is cut changes the result
    only by rounding. Gradients are summed in float32.
    """
    graphdef = model.graphdef()
    param_specs = params.specs(params.shardings(model.abstract, mesh))
    batch_spec = batch_sharding(mesh).spec
    exact = dataclasses.replace(region, compute_dtype="float32")
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def body(weights_in: Any, batch: Batch) -> tuple[jax.Array, Any]:
        count = psum(jnp.sum(batch.weights if loss_over == "targets" else jnp.ones_like(batch.weights)), BATCH_AXES)
        if loss_over == "positions" and rows not in (None, math.prod(batch.weights.shape[:2]) * ways):
            count = jnp.float32(rows * batch.weights.shape[-1])
        model = region.begin(nnx.merge(graphdef, weights_in))
        loss, gradients = loss_and_gradients(model, region, batch, count)
        # The way back, in float32: linear, so that where it is taken does not matter and nothing is computed forward.
        _, pull_back = jax.vjp(lambda w: exact.begin(nnx.merge(graphdef, w)), weights_in)
        return psum(loss, (PIPELINE, *BATCH_AXES)), pull_back(gradients)[0]

    return jax.shard_map(
        body, mesh=mesh, in_specs=(param_specs, batch_spec), out_specs=(PartitionSpec(), param_specs), check_vma=True
    )


def make_train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    region: Region,
    mesh: Mesh,
    loss_over: Literal["targets", "positions"] = "targets",
    rows: int | None = None,
) -> Any:
    """The jitted ``(state, batch, limits) -> (state, metrics)``. The old state is donated.

    ``loss_over`` and ``rows``: see `make_loss_and_gradients`.

    ``limits`` are float32 [2], of loss and gradient norm (`NO_LIMITS`). Where one is exceeded, or is not finite, the
    update does not land: `training.state.pass_over`.

    Metrics are float32 scalars: loss, grad_norm (true global norm, before clipping), learning_rate (of this update),
    applied (1 or 0).
    """
    loss_and_gradients = make_loss_and_gradients(model, region, mesh, loss_over, rows)
    where = shardings(abstract_state(model, optimizer, mesh))

    def train_step(state: TrainState, batch: Batch, limits: jax.Array) -> tuple[TrainState, Metrics]:
        loss, gradients = loss_and_gradients(state.params, batch)
        norm = optax.tree.norm(gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        after = TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments)
        applied = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limits[0]) & (norm <= limits[1])
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
            "applied": applied.astype(jnp.float32),
        }
        return jax.tree.map(lambda new, old: jnp.where(applied, new, old), after, pass_over(state)), metrics

    # out_shardings equal to the state's own: without them the second step would compile again.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(where, None))


def make_eval_step(model: ModelConfig, region: Region, mesh: Mesh) -> Any:
    """The jitted ``(params, batch) -> {"loss_sum", "weight"}``, summed over the global batch."""
    graphdef = model.graphdef()
    param_specs = params.specs(params.shardings(model.abstract, mesh))

    def body(weights_in: Any, batch: Batch) -> Metrics:
        model = region.begin(nnx.merge(graphdef, weights_in))
        total = psum(loss_sum(model, region, batch)[0], (PIPELINE, *BATCH_AXES))
        return {"loss_sum": total, "weight": psum(jnp.sum(batch.weights), BATCH_AXES)}

    return jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(param_specs, batch_sharding(mesh).spec),
            out_specs=PartitionSpec(),
            check_vma=True,
        )
    )
