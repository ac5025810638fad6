"""The mesh: how many ways the work is split along each axis, checked against the devices that are there."""

import dataclasses
import difflib
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from errors import UserError
from parallel.axes import MESH_AXES


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Degrees of parallelism. One of them may be -1: it takes all the devices that the others leave.

    ``pipeline`` exists so that names, rules and files need not change when schedules arrive; until then it is 1.
    """

    pipeline: int = 1
    """Stages that the layers are split into."""
    data: int = 1
    """Replicas of the parameters, each with its part of the batch."""
    fsdp: int = 1
    """Shards of the parameters over the batch axis (ZeRO-3)."""
    tensor: int = 1
    """Ways that each matrix is split; activations between the matrices are split along the sequence."""

    def __post_init__(self) -> None:
        for axis, degree in self.degrees.items():
            if degree < 1 and degree != -1:
                raise UserError(f"mesh: {axis}={degree} is not a degree; give a positive number, or -1 for the rest")
        if list(self.degrees.values()).count(-1) > 1:
            raise UserError(f"mesh: only one axis may be -1, in {self}")
        if self.pipeline != 1:
            raise UserError(
                f"mesh: pipeline={self.pipeline}, but this version has no pipeline schedule; use data, fsdp and tensor"
            )

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """Read ``data=2,fsdp=2,tensor=2``; axes that are not named have degree 1.

        Raises:
            UserError: unknown axis (with the nearest name), repeated axis, or not a number.
        """
        degrees: dict[str, int] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            axis, _, value = (p.strip() for p in part.partition("="))
            if axis not in MESH_AXES:
                near = difflib.get_close_matches(axis, MESH_AXES, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"mesh: unknown axis {axis!r} in {text!r}; axes are {', '.join(MESH_AXES)}{hint}")
            if axis in degrees:
                raise UserError(f"mesh: axis {axis!r} is given twice in {text!r}")
            try:
                degrees[axis] = int(value)
            except ValueError:
                raise UserError(f"mesh: {part!r} is not AXIS=NUMBER; write for example data=2,tensor=4") from None
        return cls(**degrees)

    @property
    def degrees(self) -> dict[str, int]:
        """Mesh axis -> degree, in mesh order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def size(self) -> int:
        """Number of devices; only for a mesh without -1."""
        return math.prod(self.degrees.values())

    def __str__(self) -> str:
        return ",".join(f"{a}={d}" for a, d in self.degrees.items() if d != 1) or "data=1"

    def resolve(self, devices: int, platform: str = "") -> "MeshConfig":
        """This mesh with -1 replaced, and its product checked against the number of devices.

        Raises:
            UserError: the degrees do not multiply to the devices.
        """
        known = math.prod(d for d in self.degrees.values() if d != -1)
        free = [a for a, d in self.degrees.items() if d == -1]
        if free and devices % known == 0:
            return dataclasses.replace(self, **{free[0]: devices // known})
        if free or known != devices:
            product = f"{'*'.join(self.degrees)} = {'*'.join(str(d) for d in self.degrees.values())}"
            launch = f"simulate them with --simulate {known}" if platform == "cpu" else f"launch on {known} devices"
            raise UserError(
                f"mesh: {product}{'' if free else f' = {known}'} but {devices} "
                f"{platform + ' ' if platform else ''}device{'s are' if devices != 1 else ' is'} visible; "
                f"change a degree so that the product is {devices}, or {launch}"
            )
        return self

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The jax Mesh over ``devices`` (all visible ones if None), axes in MESH_AXES order.

        Raises:
            UserError: the degrees do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else list(devices)
        resolved = self.resolve(len(devices), devices[0].platform)
        shape = tuple(resolved.degrees.values())
        types = (AxisType.Auto,) * len(MESH_AXES)
        if devices[0].platform == "cpu":  # simulated devices have no topology to lay the axes over
            return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=types)
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)


def simulate(devices: int) -> None:
    """Make this process see ``devices`` CPU devices. Must run before anything asks JAX for a device.

    Raises:
        UserError: not positive, or JAX already started with other devices.
    """
    if devices < 1:
        raise UserError(f"--simulate {devices}: give the number of CPU devices to simulate, at least 1")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        pass  # the backend is already up; what counts is what it has
    if jax.default_backend() != "cpu" or jax.device_count() != devices:
        raise UserError(
            f"--simulate {devices}: JAX already runs on {jax.device_count()} {jax.default_backend()} device(s); "
            "unset JAX_PLATFORMS and XLA_FLAGS=--xla_force_host_platform_device_count"
        )
