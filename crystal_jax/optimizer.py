"""CrystalCoder's optimizer (fact sheet 2.2): AdamW with eps inside, muP groups, one linear schedule per phase."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errors import UserError
from training.optimizer import OptimizerConfig, at_least

if TYPE_CHECKING:
    import optax


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

    def make(self, steps: int) -> "optax.Schedule":
        """Of a phase with this many steps, from its own step 0."""
        import optax

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

    def check_phases(self, phases: int) -> None:
        """See `OptimizerConfig.check_phases`."""
        if phases != len(self.schedules):
            raise UserError(f"config: {phases} phases, but optimizer.schedules has {len(self.schedules)}")

    def schedule(self, phase_steps: Sequence[int]) -> "optax.Schedule":
        """Base learning rate: that of embedding, biases and norms."""
        import optax

        self.check_phases(len(phase_steps))
        pieces = [s.make(n) for s, n in zip(self.schedules, phase_steps, strict=True)]
        return optax.join_schedules(pieces, _starts(phase_steps)[1:])

    def make(self, phase_steps: Sequence[int]) -> "optax.GradientTransformation":
        """See `OptimizerConfig.make`."""
        import optax

        from crystal_jax.adam import in_groups, scale_by_phased_adam

        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            scale_by_phased_adam(self.beta1, self.beta2, self.eps, _starts(phase_steps)),
            optax.add_decayed_weights(self.weight_decay, mask=in_groups("kernel", "embedding")),
            optax.masked(optax.scale(self.kernel_multiplier), in_groups("kernel")),
            optax.scale_by_learning_rate(self.schedule(phase_steps)),
        )


def _starts(phase_steps: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(phase_steps)][:-1]
