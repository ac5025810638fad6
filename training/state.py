"""What a run carries from step to step, and how it comes to be: sharded from the first byte."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layers import params
from layers.model import ModelConfig


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Any
    """int32 scalar: updates done, which is also the index of the next step."""
    params: dict[str, Any]
    """Nested dict of float32 arrays."""
    optimizer: Any
    """optax state."""


def abstract_state(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct` leaves); allocates nothing."""
    weights = params.abstract_arrays(model.abstract, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    moments = jax.eval_shape(optimizer.init, weights)
    # Without this the moments would be replicated: optax's state does not know where its parameters live.
    moment_shardings = optax.tree_map_params(
        optimizer, lambda _, w: w.sharding, moments, weights, transform_non_params=lambda _: replicated
    )
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        weights,
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), moments, moment_shardings),
    )


def shardings(abstract: TrainState) -> TrainState:
    """The NamedSharding of every leaf."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def pass_over(state: TrainState) -> TrainState:
    """The state a step later without an update: counters go on, parameters and moments stay."""
    counters = lambda path, x: x + 1 if getattr(path[-1], "name", "") in _COUNTERS else x  # noqa: E731
    optimizer = jax.tree_util.tree_map_with_path(counters, state.optimizer)
    return TrainState(state.step + 1, state.params, optimizer)


#: Fields of optimizer states that count steps: optax's and ours.
_COUNTERS = ("count", "step")


def init_state(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """The state before the first step, each array made on the devices that hold it.

    Weights are a pure function of (model, seed), bit for bit the same on every mesh.
    """

    def init(key: jax.Array) -> TrainState:
        weights = nnx.to_pure_dict(nnx.split(model.build(key))[1])
        return TrainState(jnp.zeros((), jnp.int32), weights, optimizer.init(weights))

    where = shardings(abstract_state(model, optimizer, mesh))
    return jax.jit(init, out_shardings=where)(jax.random.key(seed))
