"""CrystalCoder's optimizer (fact sheet 2.2): AdamW with eps inside, muP groups, one linear schedule per phase."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from errors import UserError
from training.optimizer import OptimizerConfig, at_least

#: Last part of a parameter's name -> its group. All attention and MLP matrices are kernels; everything else has the
#: full learning rate, and biases and norms no decay.
GROUPS = {
    **dict.fromkeys(("wq", "wk", "wv", "wo", "gate", "up", "down"), "kernel"),
    **dict.fromkeys(("bq", "bk", "bv", "bo", "gate_bias", "up_bias", "down_bias"), "bias"),
    **dict.fromkeys(("scale", "bias"), "norm"),
    "table": "embedding",
}


@dataclasses.dataclass(frozen=True)
class LinearSchedule:
    """Learning rate of one phase: linear from exactly 0 to the peak, then linear to the final rate (fact sheet 2.2)."""

    peak: float
    final: float
    warmup_steps: int
    decay_steps: int | None
    """Steps from peak to final, or None: what the phase has left. The phase may end before they are over."""

    def __post_init__(self) -> None:
        for name in ("peak", "final", "warmup_steps", "decay_steps"):
            at_least(f"optimizer.schedules.{name}", getattr(self, name), 0)

    def make(self, steps: int) -> optax.Schedule:
        """Of a phase with this many steps, from its own step 0."""
        decay = self.decay_steps if self.decay_steps is not None else max(1, steps - self.warmup_steps)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.peak, self.warmup_steps),
                optax.linear_schedule(self.peak, self.final, decay),
            ],
            [self.warmup_steps],
        )


@dataclasses.dataclass(frozen=True)
class MupAdamWConfig(OptimizerConfig):
    """``u = m / (sqrt(v) + eps) * sqrt(1 - beta2^t) / (1 - beta1^t) + decay * p;  p -= rate * multiplier * u``.

    Each phase starts from weights alone: moments and t begin anew (fact sheet 2.3).
    """

    kernel_multiplier: float
    """Scales the learning rate, and so the decay, of attention and MLP matrices."""
    schedules: tuple[LinearSchedule, ...]
    """One per phase."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("optimizer.kernel_multiplier", self.kernel_multiplier, 0)

    def schedule(self, phase_steps: Sequence[int]) -> optax.Schedule:
        """Base learning rate: that of embedding, biases and norms."""
        if len(phase_steps) != len(self.schedules):
            raise UserError(f"config: {len(phase_steps)} phases, but optimizer.schedules has {len(self.schedules)}")
        pieces = [s.make(n) for s, n in zip(self.schedules, phase_steps, strict=True)]
        return optax.join_schedules(pieces, _starts(phase_steps)[1:])

    def make(self, phase_steps: Sequence[int]) -> optax.GradientTransformation:
        """See `OptimizerConfig.make`."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            scale_by_phased_adam(self.beta1, self.beta2, self.eps, _starts(phase_steps)),
            optax.add_decayed_weights(self.weight_decay, mask=in_groups("kernel", "embedding")),
            optax.masked(optax.scale(self.kernel_multiplier), in_groups("kernel")),
            optax.scale_by_learning_rate(self.schedule(phase_steps)),
        )


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


def _starts(phase_steps: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(phase_steps).tolist()[:-1]]
