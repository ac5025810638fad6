"""Steps that must not be applied: found by the device before the update lands, by limits made of what was logged.

The training step takes two limits, on loss and gradient norm, and leaves the state as it is where one is exceeded or a
number is not finite (`training.step`). Limits of step n follow from what was logged of the steps before n - 1 alone, so
that they are the same in a run that was interrupted; the ledger says what was skipped, so that a replay need not know.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.batch import Batch
from errors import UserError
from training.config import GuardConfig


class Guard:
    """Limits of each step, and what is skipped.

    Args:
        config: the recipe's.
        mesh: of the training step.
        past: (step, loss, norm) of the steps that were applied, in order; of the last `GuardConfig.window` is enough.
        until: first step to be trained, where the run goes on within steps that are skipped.
        skipped: how many skips there were directly before.
    """

    def __init__(
        self,
        config: GuardConfig,
        mesh: Mesh,
        past: Iterable[tuple[int, float, float]],
        until: int = 0,
        skipped: int = 0,
    ):
        self.config = config
        self.until = until
        """Steps before this one are not trained."""
        self._past = deque(past, maxlen=config.window + 2)
        self._skipped = skipped
        self._sharding = NamedSharding(mesh, PartitionSpec())
        self._gate = jax.jit(lambda limits, applied: jnp.where(applied > 0, limits, -jnp.inf))

    def limits(self, step: int, previous: jax.Array | None = None) -> jax.Array:
        """Largest loss and gradient norm of a step, float32 [2], for the training step.

        Args:
            step: 0-based.
            previous: "applied" of the step before: if it is 0, which nobody knows yet, this one is not applied either.
        """
        values = np.full(2, np.inf, np.float32)
        known = [(loss, norm) for s, loss, norm in self._past if s < step - 1][-self.config.window :]
        if len(known) == self.config.window:
            loss, norm = (math.fsum(column) / len(known) for column in zip(*known))
            if self.config.loss_margin is not None:
                values[0] = loss + self.config.loss_margin
            if self.config.norm_factor is not None:
                values[1] = norm * self.config.norm_factor
        limits = jax.make_array_from_callback((2,), self._sharding, values.__getitem__)
        return limits if previous is None else self._gate(limits, previous)

    def applied(self, step: int, loss: float, norm: float) -> None:
        """Take the loss and gradient norm of a step that was applied."""
        self._past.append((step, loss, norm))
        self._skipped = 0

    def skip(self, until: int) -> bool:
        """Go on with another step; whether that may be: not if it was too often, one after the other."""
        self.until = until
        self._skipped += 1
        return self._skipped <= self.config.most

    def why(self, step: int, loss: float, norm: float) -> str:
        """What is wrong with a step that was not applied."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}: not finite"
        limits = np.asarray(self.limits(step).addressable_data(0))
        loss_limit, norm_limit = (float(x) for x in limits)
        what = f"loss {loss:.4f} (limit {loss_limit:.4f}), gradient norm {norm:.4f} (limit {norm_limit:.4f})"
        return f"{what}: a spike over the last {self.config.window} steps"


@dataclasses.dataclass(frozen=True)
class Fault:
    """Damage to the batch of one step, to see what the guard does with it."""

    kind: Literal["nan", "spike"]
    """The loss is not a number; or some targets count against others, so that the gradient is many times too large."""
    step: int

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """From ``nan@12`` or ``spike@12``. Raises UserError."""
        kind, _, step = text.partition("@")
        if kind not in ("nan", "spike") or not step.isdigit():
            raise UserError(f"--fault {text!r}: write nan@STEP or spike@STEP")
        return cls(kind, int(step))  # type: ignore[arg-type]

    def damage(self, batch: Batch) -> Batch:
        """The batch with this fault."""
        if self.kind == "nan":
            return batch._replace(weights=batch.weights * np.float32("nan"))
        signs = np.where(np.arange(batch.weights.shape[-1]) % 2, -0.9, 1.0).astype(np.float32)
        return batch._replace(weights=batch.weights * signs)


def plain(value: float) -> Any:
    """A number as JSON has it: text where it is not finite."""
    return value if math.isfinite(value) else str(value)
