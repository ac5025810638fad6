"""Whether a run fits the memory that is there, asked before anything is compiled."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from errors import UserError
from parallel import planner
from parallel.mesh import MeshConfig
from parallel.plan import Plan
from parallel.planner import Prediction
from parallel.topology import Topology
from training import planning
from training.config import RunConfig

#: The planner's prediction is at most this much above what the compiler then needs (`parallel.planner`, assumptions):
#: what is beyond the memory by more is refused, what is beyond it by less is left to the compiler.
ABOVE = 0.14


class Memory(NamedTuple):
    """What one device may take."""

    bytes: float
    what: str
    """Where the figure is from."""


def available(devices: Sequence[jax.Device]) -> Memory | None:
    """Memory of each device, or None where it does not say. Of CPUs: an equal part of the machine's that is free."""
    first = next((d for d in devices if d.process_index == jax.process_index()), devices[0])
    if first.platform == "cpu":
        free = _free()
        local = sum(d.process_index == first.process_index for d in devices)
        return None if free is None else Memory(free / local, f"free on this machine, for {local} simulated devices")
    stats = first.memory_stats() or {}
    return Memory(stats["bytes_limit"], f"of {first.device_kind}") if "bytes_limit" in stats else None


def _free() -> float | None:
    """Bytes of this machine that are free, or of the container that this runs in."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError):
            return None
    try:
        group = Path("/sys/fs/cgroup")
        most, now = (float((group / name).read_text()) for name in ("memory.max", "memory.current"))
        return min(free, most - now)
    except (OSError, ValueError):  # no limit ("max"), or another kind of container
        return free


def check(config: RunConfig, mesh: Mesh) -> None:
    """Refuse what cannot fit, before the first compile.

    On CPU only what is certain is counted: parameters, optimizer state and gradients.

    Args:
        config: resolved, with the plan that it is to be carried out by.
        mesh: over the devices to use.

    Raises:
        UserError: saying what is needed, what is there, and what to change.
    """
    devices = list(mesh.devices.flat)
    there = available(devices)
    if there is None:
        return
    try:
        topology = Topology.of(devices)
    except UserError:  # a device that the table does not know: the compiler will say
        return
    work = planning.workload(config, topology.chip.platform)
    chosen = dataclasses.replace(config, mesh=MeshConfig(**dict(mesh.shape)))
    prediction = planner.predict(work, topology, planning.plan_of(chosen, topology.devices))
    sure = ("parameters", "moments", "gradients")
    lines = [line for line in prediction.memory if topology.chip.platform != "cpu" or line.what in sure]
    needed = sum(line.value for line in lines)
    if needed * (1 if topology.chip.platform == "cpu" else 1 - ABOVE) <= there.bytes:
        return
    parts = ", ".join(f"{line.what} {line.value / 1e9:.1f}" for line in sorted(lines, key=lambda x: -x.value)[:4])
    raise UserError(
        f"memory: {config.recipe} needs about {needed / 1e9:.1f} GB on each device with {prediction.plan} ({parts} GB, "
        f"…; predicted), and {there.bytes / 1e9:.1f} GB are there ({there.what}). "
        + _instead(config, topology, prediction)
    )


def _instead(config: RunConfig, topology: Topology, prediction: Prediction) -> str:
    """What to change: how the same mesh is used, else the mesh, else the devices."""
    if topology.chip.platform == "cpu":
        return "Take a smaller recipe, for example amber_tiny, or more memory; `plan` says what an accelerator needs"
    work = planning.workload(config, topology.chip.platform)
    for mesh in (prediction.plan.mesh, None):
        try:
            return f"This fits: {_flags(planner.rank(work, topology, only_mesh=mesh).best[0].plan)}"
        except UserError as e:
            why = str(e)
    return f"No plan for these devices does ({why})"


def _flags(plan: Plan) -> str:
    """A plan as flags of `train`."""
    words = [f"--mesh {plan.mesh}", f"--execution.microbatches {plan.microbatches}", f"--execution.remat {plan.remat}"]
    words += [f"--execution.gather {plan.gather}"] if plan.mesh.fsdp > 1 else []
    if plan.mesh.pipeline > 1:
        words += [f"--execution.schedule {plan.schedule}", f"--execution.repeats {plan.repeats}"]
    return " ".join([*words, *(["--execution.remat-stage"] if plan.remat_stage else [])])
