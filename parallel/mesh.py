"""The mesh: how many ways the work is split along each axis, checked against the devices that are there."""

import collections
import dataclasses
import difflib
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errors import UserError
from parallel.axes import MESH_AXES, TENSOR

if TYPE_CHECKING:  # degrees are read and checked without JAX
    import jax
    import numpy as np
    from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Degrees of parallelism. One of them may be -1: it takes all the devices that the others leave.

    All of them -1 is "auto": the planner chooses (`training.planning`).
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
        if not self.is_auto and list(self.degrees.values()).count(-1) > 1:
            raise UserError(f"mesh: only one axis may be -1, in {self}")

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """Read ``data=2,fsdp=2,tensor=2``, axes that are not named having degree 1; or ``auto``.

        Raises:
            UserError: unknown axis (with the nearest name), repeated axis, or not a number.
        """
        if text.strip() == "auto":
            return cls(**dict.fromkeys(MESH_AXES, -1))
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
    def is_auto(self) -> bool:
        """Whether the planner is to choose all degrees."""
        return set(self.degrees.values()) == {-1}

    @property
    def degrees(self) -> dict[str, int]:
        """Mesh axis -> degree, in mesh order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def size(self) -> int:
        """Number of devices; only for a mesh without -1."""
        return math.prod(self.degrees.values())

    def __str__(self) -> str:
        return "auto" if self.is_auto else ",".join(f"{a}={d}" for a, d in self.degrees.items() if d != 1) or "data=1"

    def resolve(self, devices: int, platform: str = "") -> "MeshConfig":
        """This mesh with -1 replaced, and its product checked against the number of devices.

        Raises:
            UserError: the degrees do not multiply to the devices.
        """
        if self.is_auto:
            raise UserError(
                "mesh: auto is for train and plan, which choose one; give degrees, for example data=2,tensor=4"
            )
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

    def build(self, devices: "Sequence[jax.Device] | None" = None) -> "Mesh":
        """The jax Mesh over ``devices`` (all visible ones if None), axes in MESH_AXES order.

        TPUs: axes along the torus of a slice, and over several slices what talks least (`_over_slices`). Others: in the
        order of processes, so that ``tensor`` lies inside a host where its devices are enough; else a warning says so.

        Raises:
            UserError: the degrees do not multiply to the number of devices; slices would split ``tensor``.
        """
        import jax
        import numpy as np
        from jax.sharding import AxisType, Mesh

        devices = jax.devices() if devices is None else list(devices)
        resolved = self.resolve(len(devices), devices[0].platform)
        if devices[0].platform == "tpu":
            array = _on_torus(resolved, devices)
        else:
            hosts = collections.Counter(_host(d) for d in devices)
            smallest = min(hosts.values())
            if len(hosts) > 1 and smallest % resolved.tensor:
                warnings.warn(
                    f"mesh: tensor={resolved.tensor} does not divide the {smallest} devices of a host, so that every "
                    "layer's activations cross the network; a smaller tensor, with pipeline or fsdp instead, is faster",
                    stacklevel=2,
                )
            shape = tuple(resolved.degrees.values())
            array = np.array(sorted(devices, key=lambda d: (_host(d), d.id))).reshape(shape)
        return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _host(device: "jax.Device") -> tuple[int, int]:
    """What devices on one host have in common: on NVIDIA, where each may have a process of its own, the "slice"."""
    one = getattr(device, "slice_index", None) if device.platform in ("gpu", "cuda") else None
    return (one, 0) if one is not None else (0, device.process_index)


def _on_torus(mesh: MeshConfig, devices: "Sequence[jax.Device]") -> "np.ndarray":
    """TPU devices in the shape of the mesh."""
    from jax.experimental import mesh_utils

    slices = len({getattr(d, "slice_index", 0) for d in devices})
    outer = _over_slices(mesh, slices)
    inner = tuple(d // o for d, o in zip(mesh.degrees.values(), outer, strict=True))

    def lay(split: bool) -> "np.ndarray":
        if slices == 1:
            return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=split)

    try:
        return lay(split=False)  # whole axes of the torus: a ring for each
    except NotImplementedError:
        return lay(split=True)


def _over_slices(mesh: MeshConfig, slices: int) -> tuple[int, ...]:
    """How many ways each axis of the mesh is split over slices, whose network is slow: the axes that talk least first.

    Raises:
        UserError: ``tensor`` would have to be split as well.
    """
    outer, left = [], slices
    for axis, degree in mesh.degrees.items():
        outer.append(1 if axis == TENSOR else math.gcd(degree, left))
        left //= outer[-1]
    if left > 1:
        raise UserError(
            f"mesh: {mesh} cannot be laid over {slices} slices without splitting tensor between them; make "
            f"pipeline*data*fsdp a multiple of {slices}"
        )
    return tuple(outer)


def simulate(devices: int, check: bool = True) -> None:
    """Make this process see ``devices`` CPU devices. Must run before anything asks JAX for a device.

    Args:
        devices: how many.
        check: ask JAX whether they are there. Not where `parallel.distributed.start` comes next: it comes before that.

    Raises:
        UserError: not positive, or JAX already started with other devices.
    """
    import jax

    if devices < 1:
        raise UserError(f"--simulate {devices}: give the number of CPU devices to simulate, at least 1")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        pass  # the backend is already up; what counts is what it has
    if check and (jax.default_backend() != "cpu" or jax.device_count() != devices):
        raise UserError(
            f"--simulate {devices}: JAX already runs on {jax.device_count()} {jax.default_backend()} device(s); "
            "unset JAX_PLATFORMS and XLA_FLAGS=--xla_force_host_platform_device_count"
        )
