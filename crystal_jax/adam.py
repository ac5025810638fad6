"""Adam as CrystalCoder ran it, for optax: eps inside, moments that begin anew with each phase; and muP's groups."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

#: Last part of a parameter's name -> its group. All attention and MLP matrices are kernels; everything else has the
#: full learning rate, and biases and norms no decay.
GROUPS = {
    **dict.fromkeys(("wq", "wk", "wv", "wo", "gate", "up", "down"), "kernel"),
    **dict.fromkeys(("bq", "bk", "bv", "bo", "gate_bias", "up_bias", "down_bias"), "bias"),
    **dict.fromkeys(("scale", "bias"), "norm"),
    "table": "embedding",
}


class PhasedAdamState(NamedTuple):
    """State of `scale_by_phased_adam`."""

    step: jax.Array
    """int32 scalar: steps done in the whole run."""
    since: jax.Array
    """int32 scalar: the start that the moments count from."""
    mu: Any
    nu: Any


def scale_by_phased_adam(b1: float, b2: float, eps: float, starts: Sequence[int]) -> optax.GradientTransformation:
    """Adam with eps added before the bias correction, its moments and t reset at each step in ``starts``.

    ``m / (sqrt(v) + eps) * sqrt(1 - b2^t) / (1 - b1^t)`` with t counted from the last start (fact sheet 2.2).

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the *uncorrected* second moment.
        starts: 0-based steps, ascending, the first 0.
    """

    def init(params: Any) -> PhasedAdamState:
        zero = jnp.zeros((), jnp.int32)
        return PhasedAdamState(zero, zero, optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates: Any, state: PhasedAdamState, params: Any = None) -> tuple[Any, PhasedAdamState]:
        del params
        known = jnp.asarray(starts, jnp.int32)
        start = jnp.max(jnp.where(known <= state.step, known, 0))
        t = (state.step - start + 1).astype(jnp.float32)
        kept = jnp.where(state.since == start, 1.0, 0.0)  # not step == start: the first step may have been skipped
        mu = jax.tree.map(lambda m, g: b1 * kept * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * kept * v + (1 - b2) * g * g, state.nu, updates)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps) * correction, mu, nu)
        return scaled, PhasedAdamState(optax.safe_increment(state.step), start, mu, nu)

    return optax.GradientTransformation(init, update)


def in_groups(*groups: str) -> Any:
    """A mask for optax: parameters -> bool tree, True in these groups.

    Raises:
        KeyError: a parameter that is in no group (our bug: each has one).
    """

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: GROUPS[path[-1].key] in groups, params)

    return mask
