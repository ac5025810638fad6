"""What the training step asks of an optimizer, and AdamW as Amber uses it."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errors import UserError

if TYPE_CHECKING:
    import optax


def at_least(name: str, value: float | None, least: float) -> None:
    """Refuse a value of a config that is below ``least``, infinite or not a number (UserError)."""
    if value is not None and not least <= value < math.inf:
        raise UserError(f"config: {name}={value} must be at least {least}, and finite")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(abc.ABC):
    """Interface: a frozen, validated description of an optimizer and its learning rate."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    """Largest global norm of the gradient."""

    def __post_init__(self) -> None:
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"config: optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("eps", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"config: optimizer.{name}={getattr(self, name)} must be positive")

    def check_phases(self, phases: int) -> None:  # noqa: B027  most optimizers take any number
        """Refuse a number of phases that this has no schedule for (UserError)."""

    @abc.abstractmethod
    def schedule(self, phase_steps: Sequence[int]) -> "optax.Schedule":
        """Learning rate of a 0-based step of the run, given the number of steps of each of its phases."""

    @abc.abstractmethod
    def make(self, phase_steps: Sequence[int]) -> "optax.GradientTransformation":
        """The whole update: clipping, moments, decay, learning rate."""


@dataclasses.dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW as in torch, decay on every parameter, linear warm-up and cosine decay (fact sheet 2.1)."""

    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    """Steps from a learning rate of exactly 0 to the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("peak_learning_rate", "final_learning_rate", "warmup_steps"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)

    def schedule(self, phase_steps: Sequence[int]) -> "optax.Schedule":
        """Warm-up and one cosine over the whole run.

        Linear from exactly 0 to the peak over ``warmup_steps``, then ``final + (1 + cos(pi t)) / 2 * (peak - final)``
        with t from 0 to 1 at the last step, then constant. A run shorter than its warm-up only warms up.
        """
        import optax

        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.peak_learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=max(sum(phase_steps), self.warmup_steps + 1),
            end_value=self.final_learning_rate,
        )

    def make(self, phase_steps: Sequence[int]) -> "optax.GradientTransformation":
        """Clip, then AdamW as in torch: decoupled decay times the learning rate, eps outside the bias correction."""
        import optax

        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.schedule(phase_steps), b1=self.beta1, b2=self.beta2, eps=self.eps, weight_decay=self.weight_decay
            ),
        )
