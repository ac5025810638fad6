"""A run's config and mesh turned into compiled steps: everything that is known before the first batch is read."""

import dataclasses
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.batch import Batch
from data.dataset import TokenData
from data.sample import Sample
from layers.region import Region
from parallel import compile_cache, topology
from training import state as states
from training import step as steps
from training.config import RunConfig
from training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled train and evaluation steps of one config on one mesh."""

    config: RunConfig
    mesh: Mesh
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    abstract: TrainState
    """Shapes, dtypes and shardings of the state."""
    train_step: Any = None
    """Compiled ``(state, batch, limits) -> (state, metrics)``; donates the state."""
    pass_over: Any = None
    """Jitted ``state -> state``, a step later without an update; donates the state."""
    eval_step: Any = None
    """Jitted ``(params, batch) -> {"loss_sum", "weight"}``; compiles when first called."""
    compile_s: float = 0.0
    """Seconds to trace and compile the train step, or to find it compiled."""
    compile_cached: bool = False
    """Whether it was found in the compile cache (`parallel.compile_cache`)."""
    peak_bytes: int = 0
    """Memory of the train step on each device as the compiler plans it: state, batch and temporaries."""
    peak: topology.Peak | None = None
    """What the devices can do at best, or None where that is not known."""

    @classmethod
    def plan(cls, config: RunConfig, mesh: Mesh) -> "Program":
        """Everything but the compiled steps: enough to restore a state.

        Args:
            config: resolved with its data (`RunConfig.resolve`).
            mesh: over the devices to use; divides the model and the batch (`RunConfig.check_mesh`).
        """
        optimizer = config.optimizer.make(config.phase_steps)
        learning_rate = config.optimizer.schedule(config.phase_steps)
        return cls(config, mesh, optimizer, learning_rate, states.abstract_state(config.model, optimizer, mesh))

    def trace(self) -> Any:
        """The train step as `jax.jit(…).trace` returns it; nothing is compiled, and no device is touched."""
        config, rows = self.config, self.config.data.global_batch
        step = steps.make_train_step(
            config.model, self.optimizer, self.learning_rate, self.region, self.mesh, config.loss_over, rows
        )
        return step.trace(self.abstract, abstract_batch(self.config, self.mesh), abstract_limits(self.mesh))

    @property
    def region(self) -> Region:
        """How the model runs on the mesh's platform."""
        return self.config.region(self.mesh.devices.flat[0].platform)

    def compile(self) -> "Program":
        """This plan with its steps traced and compiled."""
        start, hits = time.perf_counter(), compile_cache.hits()
        compiled = self.trace().lower().compile()
        cached = compile_cache.hits() > hits
        return dataclasses.replace(
            self,
            train_step=compiled,
            pass_over=jax.jit(states.pass_over, donate_argnums=0, out_shardings=states.shardings(self.abstract)),
            eval_step=steps.make_eval_step(self.config.model, self.region, self.mesh),
            compile_s=time.perf_counter() - start,
            compile_cached=cached,
            peak_bytes=planned_bytes(compiled),
            peak=topology.peak(list(self.mesh.devices.flat)),
        )

    def init(self) -> TrainState:
        """The state before the first step."""
        return states.init_state(self.config.model, self.optimizer, self.mesh, self.config.seed)

    def throughput(self, step_time_s: float) -> dict[str, Any]:
        """tokens/s over the whole mesh and model FLOP utilisation under both conventions, of `peak` (None: no peak)."""
        tokens_per_s = self.config.data.tokens_per_step / float(step_time_s)
        result: dict[str, Any] = {"step_time_s": step_time_s, "tokens_per_s": tokens_per_s}
        for name, causal in (("mfu_causal", True), ("mfu_full", False)):
            flops = self.config.model.train_flops_per_token(self.config.data.sequence_length, causal)
            result[name] = tokens_per_s * flops / self.peak.flops if self.peak else None
        return result

    def validate(self, params: Any, data: TokenData) -> dict[str, float]:
        """Mean loss over each source's validation samples (`DataConfig.validation_every`), and over all."""
        sums, weights = {}, {}
        for source in data.sources:
            totals = self._totals(params, data, source)
            sums[source] = math.fsum(float(t["loss_sum"]) for t in totals)
            weights[source] = math.fsum(float(t["weight"]) for t in totals)
        losses = {f"loss/{s}": sums[s] / weights[s] for s in sums if weights[s]}
        total = math.fsum(weights.values())
        return {"loss": math.fsum(sums.values()) / total, **losses} if total else {}

    def _totals(self, params: Any, data: TokenData, source: str) -> list[Any]:
        """What the evaluation step says of each batch of a source's validation samples that are read.

        Two batches are in memory at a time: Amber holds out 102,400 samples of each source, which are gigabytes.
        """
        totals: list[Any] = []
        every = self.config.data.validation_every
        span = self.config.data.global_batch * every
        for start in itertools.count(0, span):
            samples = data.validation(source, start, start + span, every)
            if not len(samples.inputs):
                return totals
            totals.append(self.eval_step(params, self._batch(samples)))
            jax.block_until_ready(totals[-2:-1])
        return totals

    def _batch(self, samples: Sample) -> Batch:
        """At most a batch of samples, arrays of [n, S], in the training shape; what is missing has weight 0."""
        shape, sharding = self.config.batch_shape(self.mesh.shape), steps.batch_sharding(self.mesh)

        def array(values: np.ndarray) -> jax.Array:  # [at most rows, S]
            full = np.zeros((math.prod(shape), values.shape[1]), values.dtype)
            full[: len(values)] = values
            full = full.reshape(*shape, -1)
            return jax.make_array_from_callback(full.shape, sharding, full.__getitem__)

        return Batch(*map(array, samples))


def abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a training batch."""
    sharding = steps.batch_sharding(mesh)
    shape = (*config.batch_shape(mesh.shape), config.data.sequence_length)
    dtypes = (jnp.int32, jnp.int32, jnp.float32)
    return Batch(*(jax.ShapeDtypeStruct(shape, t, sharding=sharding) for t in dtypes))  # type: ignore[arg-type]


def abstract_limits(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a step's limits on loss and gradient norm."""
    return jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))


def no_limits(mesh: Mesh) -> jax.Array:
    """Limits that every finite step is within."""
    return jax.device_put(steps.NO_LIMITS, NamedSharding(mesh, PartitionSpec()))


def planned_bytes(compiled: Any) -> int:
    """Bytes on each device that a compiled program needs at its peak, as the compiler reports them."""
    stats = compiled.memory_analysis()
    if stats is None:
        return 0
    if not _on_cpu(compiled):
        return int(stats.peak_memory_in_bytes)
    # XLA's CPU compiler leaves temporaries out of its peak.
    return int(
        stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    )


def _on_cpu(compiled: Any) -> bool:
    first = jax.tree.leaves(compiled.input_shardings)[0]
    return next(iter(first.device_set)).platform == "cpu"
