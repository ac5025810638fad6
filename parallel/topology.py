"""Chips, how they are wired, and which links a mesh axis travels over: what planning and utilisation are reckoned by.

Figures are the vendors' own, each with its source. Times that follow from them are predictions, never measurements.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from errors import UserError
from parallel.axes import MESH_AXES

if TYPE_CHECKING:
    import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device's worth of hardware. Bandwidths are bytes/s in one direction, and of one chip."""

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    kinds: tuple[str, ...]
    """jax's ``device_kind``."""
    flops: Mapping[str, float] = dataclasses.field(hash=False)
    """Dense matrix FLOP/s by compute dtype."""
    hbm_bytes: float
    """Memory that one program may use."""
    hbm_bandwidth: float
    link: float
    """TPU: of one link to a neighbour. GPU: of all NVLinks together."""
    torus: int
    """Dimensions of the torus of links; 0 = every chip of a node reaches every other at full speed."""
    wraps: int
    """A torus dimension closes to a ring where its length is a multiple of this (of three, if all are)."""
    most: int
    """Chips of the largest slice (TPU), or of a node that is usual (GPU)."""
    network: float
    """Between slices or nodes."""
    host: float
    """Between the chip and its host's memory, for what is offloaded."""
    source: str
    nominal: bool = False
    """The figures describe no real device."""


_TPU = (
    "Google Cloud TPU documentation (docs.cloud.google.com/tpu/docs/{0}): FLOP/s, HBM bandwidth, largest slice; "
    "memory: what the compiler of libtpu 0.0.42 says is available; links, network and PCIe: jax-ml.github.io/"
    "scaling-book/tpus, TPU specs"
)
_GPU = (
    "NVIDIA {0} data sheet, SXM: dense FLOP/s without sparsity (float32: CUDA cores), half of NVLink's and PCIe's sum "
    "of both directions; memory and its bandwidth: openxla/xla gpu/target_config/specs/{1}.txtpb, of the memory 0.92 "
    "(XLA_PYTHON_CLIENT_MEM_FRACTION=.92; by itself JAX takes .75); network: DGX {2}, one 2-port adapter per GPU"
)
#: Share of a GPU's memory that JAX is told to take, the rest being left to CUDA, NCCL and cuDNN. An assumption.
_GPU_SHARE = 0.92


def _tpu(
    name: str, kinds: tuple[str, ...], bfloat16: float, gib: float, hbm: float, link: float, torus: int, most: int,
    network: float, host: float,
) -> Chip:  # fmt: skip
    # float32 is multiplied in six bfloat16 passes (`jax.lax.Precision.HIGHEST`).
    flops = {"bfloat16": bfloat16, "float32": bfloat16 / 6}
    wraps = 4 if torus == 3 else 16
    source = _TPU.format(name)
    return Chip(name, "tpu", kinds, flops, gib * _GIB, hbm, link, torus, wraps, most, network, host, source)


def _gpu(
    name: str, kinds: tuple[str, ...], bfloat16: float, float32: float, memory: float, hbm: float, link: float,
    network: float, host: float, spec: str,
) -> Chip:  # fmt: skip
    flops = {"bfloat16": bfloat16, "float32": float32}
    board = name.split("-")[0].upper()
    source = _GPU.format(board, spec, board)
    return Chip(name, "gpu", kinds, flops, memory * _GPU_SHARE, hbm, link, 0, 0, 8, network, host, source)


#: By name, as topologies spell it.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", ("TPU v4",), 275e12, 30.75, 1.2e12, 4.5e10, 3, 4096, 6.25e9, 1.6e10),
        _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75, 8.19e11, 4.5e10, 2, 256, 3.125e9, 1.6e10),
        _tpu("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74, 2.765e12, 9e10, 3, 6144, 6.25e9, 1.6e10),
        _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25, 1.638e12, 9e10, 2, 256, 1.25e10, 3.2e10),
        _gpu(
            "a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 19.5e12, 85100068864, 2.039e12, 3e11, 2.5e10, 3.2e10,
            "a100_sxm_80",
        ),
        _gpu(
            "a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312e12, 19.5e12, 42331013120, 1.555e12, 3e11, 2.5e10, 3.2e10,
            "a100_sxm_40",
        ),
        _gpu(
            "h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 66.9e12, 84942979072, 3.352e12, 4.5e11, 5e10, 6.4e10,
            "h100_sxm",
        ),
        _gpu(
            "h200", ("NVIDIA H200",), 989.4e12, 66.9e12, 151397597184, 4.8e12, 4.5e11, 5e10, 6.4e10,
            "h200",
        ),
        Chip(
            name="cpu", platform="cpu", kinds=("cpu",), flops={"bfloat16": 1e10, "float32": 1e10},
            hbm_bytes=2 * _GIB, hbm_bandwidth=1e10, link=1e9, torus=0, wraps=0, most=4096, network=1e9, host=1e10,
            source="nominal: round numbers, so that plans for simulated devices can be compared; they describe none",
            nominal=True,
        ),
    )
}  # fmt: skip

#: LLM360's own cluster: 56 nodes of 4 A100, two InfiniBand ports of 200 Gb/s in each (fact sheet 5.1), so a quarter of
#: 50 GB/s for each GPU.
AMBER = "amber"
_AMBER_SHAPE, _AMBER_NETWORK = "56x4", 2 * 200e9 / 8 / 4


@dataclasses.dataclass(frozen=True)
class Link:
    """What carries the collectives of one mesh axis."""

    bandwidth: float
    """Bytes/s that each chip sends while all chips of a group exchange what they have."""
    how: str
    """The arithmetic."""
    whole_torus: bool = False
    """The axis takes up all of a three-dimensional torus: see `planner.WHOLE_TORUS`."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips, and how they are wired."""

    chip: Chip
    shape: tuple[int, ...]
    """TPU: lengths of the torus of one slice. GPU: (nodes, GPUs of a node). CPU: (devices,)."""
    slices: int = 1
    """Slices that the data center's network joins (TPU)."""
    network: float = 0.0
    """Bytes/s of each chip between nodes or slices; 0 = the chip's own."""
    factor: float = 1.0
    """Scales what leaves a node: the network, and on TPUs the links too."""
    name: str = ""
    """What it is called, where that is not by its chip."""

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Read ``v5p:4x4x8``, ``2*v5e:16x16`` (slices), ``h100:4x8`` (nodes x GPUs), ``cpu:8`` or ``amber``.

        The last is LLM360's own cluster, also with fewer or more nodes: ``amber:28x4``. ``@0.1`` after it scales the
        network, on TPUs the links too.

        Raises:
            UserError: unknown chip (with the nearest name), or a shape that this chip does not come in.
        """
        where = f"topology {text!r}"
        match = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9-]+)(?::(\d+(?:x\d+)*))?(?:@([0-9.]+))?", text.strip().lower())
        if match is None:
            raise UserError(f"{where}: write CHIP:SHAPE, for example {_EXAMPLES}")
        slices, name, shape, factor = match.groups()
        try:
            scale = float(factor or 1)
        except ValueError:
            scale = 0.0
        if not 0 < scale < math.inf:
            raise UserError(f"{where}: @{factor} is no factor; give a positive number, for example @0.1")
        if name not in CHIPS and name != AMBER:
            near = difflib.get_close_matches(name, [*CHIPS, AMBER], n=3, cutoff=0.3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"{where}: unknown chip {name!r}; known are {', '.join([*CHIPS, AMBER])}{hint}")
        own = name == AMBER
        sizes = tuple(int(n) for n in (shape or (_AMBER_SHAPE if own else "0")).split("x"))
        result = cls(CHIPS["a100" if own else name], sizes, int(slices or 1), factor=scale)
        if own:
            result = dataclasses.replace(result, network=_AMBER_NETWORK, name=AMBER)
        result._check(where)
        return result

    @classmethod
    def of(cls, devices: "Sequence[jax.Device]") -> "Topology":
        """What live devices form: their torus by their coordinates, their nodes by their hosts.

        Raises:
            UserError: a kind of device that the table does not know.
        """
        kind = devices[0].device_kind
        chip = next((c for c in CHIPS.values() if kind in c.kinds), None)
        if chip is None:
            known = ", ".join(k for c in CHIPS.values() for k in c.kinds)
            raise UserError(f"topology: no figures for {kind!r}, so that nothing can be planned for it; known: {known}")
        count = len(devices)
        if chip.platform == "tpu":
            slices = len({getattr(d, "slice_index", 0) for d in devices})
            coordinates = list(zip(*(d.coords for d in devices), strict=True))
            shape = tuple(max(c) - min(c) + 1 for c in coordinates)[: chip.torus]
            if math.prod(shape) * slices == count:
                return cls(chip, shape, slices)
            return cls(chip, (count // slices, *(1,) * (chip.torus - 1)), slices)  # no box: a line is the worst case
        if chip.platform == "cpu":
            return cls(chip, (count,))
        hosts = {getattr(d, "slice_index", None) for d in devices}  # on NVIDIA a host, however many processes it has
        nodes = len({d.process_index for d in devices} if None in hosts else hosts)
        return cls(chip, (nodes, count // nodes))

    def _check(self, where: str) -> None:
        chip, dims = self.chip, {"tpu": self.chip.torus, "gpu": 2, "cpu": 1}[self.chip.platform]
        what = {"tpu": f"{chip.torus} lengths of its torus", "gpu": "NODESxGPUS", "cpu": "a number of devices"}
        if len(self.shape) != dims or min(self.shape) < 1:
            raise UserError(f"{where}: {chip.name} takes {what[chip.platform]}; for example {_EXAMPLES}")
        if self.slices < 1 or (self.slices > 1 and chip.platform != "tpu"):
            raise UserError(f"{where}: N*, a number of slices, is for TPUs and at least 1")
        if chip.platform == "tpu" and math.prod(self.shape) > chip.most:
            raise UserError(
                f"{where}: the largest slice of {chip.name} has {chip.most} chips; join slices, as in 2*{chip.name}:…"
            )
        if chip.platform == "gpu" and self.shape[1] > chip.most:
            raise UserError(f"{where}: a node of {chip.name} has at most {chip.most} GPUs; write NODESxGPUS")

    @property
    def devices(self) -> int:
        """Chips, all together."""
        return math.prod(self.shape) * self.slices

    @property
    def node(self) -> int:
        """Chips that reach each other without the network: a slice, a node."""
        return self.shape[1] if self.chip.platform == "gpu" else math.prod(self.shape)

    @property
    def network_bandwidth(self) -> float:
        """Bytes/s of each chip between nodes or slices."""
        return (self.network or self.chip.network) * self.factor

    def __str__(self) -> str:
        name = f"{self.name or self.chip.name}:{'x'.join(map(str, self.shape))}"
        return (f"{self.slices}*" if self.slices > 1 else "") + name + (f"@{self.factor:g}" if self.factor != 1 else "")

    # ---- links -------------------------------------------------------------------------------------------------

    def links(self, degrees: Mapping[str, int]) -> dict[str, Link]:
        """What each mesh axis of more than one device travels over.

        Devices are taken in mesh order, ``tensor`` innermost. The part of an axis inside a node or slice goes over its
        links; for what lies across, all members of a group in one node share the work and so add up their network.

        Args:
            degrees: mesh axis -> degree; their product is the number of chips.
        """
        key = tuple(degrees[axis] for axis in MESH_AXES)
        if key not in self._links:
            self._links[key] = self._find_links(degrees)
        return self._links[key]

    @functools.cached_property
    def _links(self) -> dict[tuple[int, ...], dict[str, Link]]:
        """What was found before: a plan is one of thousands on few meshes."""
        return {}

    def _find_links(self, degrees: Mapping[str, int]) -> dict[str, Link]:
        found: dict[str, Link] = {}
        stride, inside = 1, self._inside(degrees)
        for axis in reversed(MESH_AXES):
            degree = degrees[axis]
            if degree > 1:
                local = math.gcd(self.node, stride * degree) // math.gcd(self.node, stride)
                found[axis] = self._link(inside[axis], local, degree)
            stride *= degree
        return {axis: found[axis] for axis in MESH_AXES if axis in found}

    def _link(self, inside: Link, local: int, degree: int) -> Link:
        """Of an axis with ``degree`` members, ``local`` of which are in one node."""
        if local == degree:
            return inside
        across = local * self.network_bandwidth
        how = f"network: {local} x {_rate(self.network_bandwidth)}"
        if local > 1 and inside.bandwidth < across:
            return dataclasses.replace(inside, how=f"{inside.how} (slower than the {how})")
        return Link(across, how)

    def _inside(self, degrees: Mapping[str, int]) -> dict[str, Link]:
        """What carries the part of each axis that lies inside a node or slice."""
        chip = self.chip
        if not chip.torus:
            name = "NVLink" if chip.platform == "gpu" else "nominal link"
            return {axis: Link(chip.link, f"{name} {_rate(chip.link)}") for axis in MESH_AXES}
        free = [[length, 1] for length in self.shape]  # of each torus dimension: what is left, stride of what is left
        found: dict[str, Link] = {}
        for axis in reversed(MESH_AXES):
            found[axis] = self._on_torus(degrees[axis], free)
        return found

    def _on_torus(self, degree: int, free: list[list[int]]) -> Link:
        """Take ``degree`` out of what is left of the torus: whole dimensions where it can be, else parts of them.

        As jax's `mesh_utils` does: of whole dimensions as many as fit, inner axes first. A whole ring carries two
        streams, one each way; a line, or a part of a dimension, one; strides share their links.
        """
        link = self.chip.link * self.factor
        whole = [d for d, (left, stride) in enumerate(free) if left > 1 and stride == 1]
        parts: list[tuple[int, int]] = []  # (torus dimension, length taken)
        for count in range(len(whole), 0, -1):
            chosen = itertools.combinations(whole, count)
            fitting = [c for c in chosen if math.prod(free[d][0] for d in c) == degree]
            if fitting:
                parts = [(d, free[d][0]) for d in fitting[0]]
                break
        else:
            need = degree
            for d in sorted(range(len(free)), key=lambda d: (free[d][1] == 1, -free[d][0])):
                taken = math.gcd(need, free[d][0])
                if taken > 1:
                    parts.append((d, taken))
                    need //= taken
        bandwidth, how = 0.0, []
        for d, taken in parts:
            left, stride = free[d]
            ring = taken == self.shape[d] and self._rings[d]
            bandwidth += link * (2 if ring else 1) / stride
            how.append(f"{'ring' if ring else 'line'} of {taken}" + (f" at stride {stride}" if stride > 1 else ""))
            free[d] = [left // taken, stride * taken]
        whole_torus = len(parts) == 3 and math.prod(t for _, t in parts) == math.prod(self.shape)
        return Link(bandwidth or link, f"{' + '.join(how) or 'one link'}, {_rate(link)} a link and way", whole_torus)

    @functools.cached_property
    def _rings(self) -> tuple[bool, ...]:
        """Which torus dimensions are closed: of three, all or none (only whole cubes are); of two, each by itself."""
        closed = tuple(length % self.chip.wraps == 0 for length in self.shape)
        return (all(closed),) * len(closed) if self.chip.torus == 3 else closed

    # ---- other sizes -------------------------------------------------------------------------------------------

    @functools.cached_property
    def smaller(self) -> tuple["Topology", ...]:
        """Topologies of the same chip with fewer, largest first: fewer slices or nodes, halves of a torus down to 4."""
        if self.chip.platform != "tpu":
            counts = [n for n in _divisors(self.shape[0]) if n < self.shape[0]]
            return tuple(dataclasses.replace(self, shape=(n, *self.shape[1:])) for n in reversed(counts))
        found = [dataclasses.replace(self, slices=n) for n in reversed(_divisors(self.slices)) if n < self.slices]
        shape = self.shape
        while math.prod(shape) > 4 and max(shape) % 2 == 0:
            longest = max(range(len(shape)), key=lambda d: shape[d])
            shape = _named(n // 2 if d == longest else n for d, n in enumerate(shape))
            found.append(dataclasses.replace(self, shape=shape, slices=1))
        return tuple(found)

    @functools.cached_property
    def larger(self) -> "Topology":
        """Twice as many chips of the same kind."""
        if self.chip.platform != "tpu":
            return dataclasses.replace(self, shape=(self.shape[0] * 2, *self.shape[1:]))
        if self.slices > 1 or math.prod(self.shape) * 2 > self.chip.most:
            return dataclasses.replace(self, slices=self.slices * 2)
        shortest = min(range(len(self.shape)), key=lambda d: self.shape[d])
        return dataclasses.replace(self, shape=_named(n * 2 if d == shortest else n for d, n in enumerate(self.shape)))


_EXAMPLES = "v5p:4x4x8, 2*v5e:16x16, h100:4x8, cpu:8 or amber"


def _named(shape: Iterable[int]) -> tuple[int, ...]:
    """As slices are named: lengths ascending, dimensions of length 1 last."""
    return tuple(sorted(shape, key=lambda n: (n == 1, n)))


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.4g} GB/s"


# ---- peak of live devices ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peak:
    """Dense matrix throughput of all devices of a mesh together, by their vendor's data sheet."""

    flops: float
    """FLOP/s in bfloat16, whatever a run computes in."""
    source: str
    """The data sheet."""

    def __str__(self) -> str:
        return f"{self.flops / 1e12:,.4g} bfloat16 TFLOP/s"


def peak(devices: "Sequence[jax.Device]") -> Peak | None:
    """Peak of these devices together; None for CPUs, and for an accelerator that the table does not know.

    A CPU has no figure to hold a run against: no data sheet says what this machine gives to this process, and a matrix
    product that is timed at the start says only how busy the machine was then (utilisations of 292 % came of it).
    """
    kind = devices[0].device_kind
    chip = next((c for c in CHIPS.values() if kind in c.kinds and devices[0].platform != "cpu"), None)
    return None if chip is None else Peak(chip.flops["bfloat16"] * len(devices), chip.source)
