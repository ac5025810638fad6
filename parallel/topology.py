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
    """One jax device's worth of hardware, but for ``link`` and ``most``. Bandwidths are bytes/s in one direction."""

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
    """TPU: of one link of a chip to a neighbour. GPU: of all NVLinks together."""
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
    efficiency: float
    """Share of the peak that the matrix products of a large layer reach while nothing else is waited for: what makes
    the predicted step of a 7B model as fast as published ones (``efficiency_source``). Nominal on CPU."""
    efficiency_source: str
    source: str
    nominal: bool = False
    """The figures describe no real device."""
    cores: int = 1
    """jax devices that one chip is, joined by a link of their own six times as fast as one to a neighbour."""


_TPU = (
    "Google Cloud TPU documentation (docs.cloud.google.com/tpu/docs/{0}): FLOP/s, HBM bandwidth, largest slice; "
    "memory: what the compiler of libtpu 0.0.42 says is available; links, network and PCIe: jax-ml.github.io/"
    "scaling-book/tpus, TPU specs"
)
_GPU = (
    "NVIDIA {0} data sheet, SXM: dense FLOP/s without sparsity (float32: CUDA cores), half of NVLink's and PCIe's sum "
    "of both directions; memory and its bandwidth: {1}, of the memory 0.92 "
    "(XLA_PYTHON_CLIENT_MEM_FRACTION=.92; by itself JAX takes .75); network: DGX {2}, one 2-port adapter per GPU"
)
_TPU7X = (
    "Google Cloud TPU documentation (docs.cloud.google.com/tpu/docs/tpu7x), per chip and halved, for JAX sees each of "
    "its two chiplets as a device: FLOP/s, HBM and its bandwidth, links (1200 GB/s, both ways, of six); that 1.5 % of "
    "the memory is not to be had, network and PCIe are assumed to be as the {0}'s predecessors'"
)
_GPU_PCIE = (
    "NVIDIA {0} PCIe data sheet: dense FLOP/s without sparsity (float32: CUDA cores), memory bandwidth, half of PCIe's "
    "sum of both directions, which is what joins the cards (bridges join two at most, and are not counted on); memory: "
    "{1}, of it 0.92; network: one adapter per GPU, assumed"
)
_GB200 = (
    "NVIDIA {0} NVL72 data sheet, per GPU: dense FLOP/s without sparsity, half of NVLink's and NVLink-C2C's sum of "
    "both directions, 72 GPUs in a domain; memory and its bandwidth: {1}, of "
    "the memory 0.92; network: 400 Gb/s a GPU"
)
#: Share of a GPU's memory that JAX is told to take, the rest being left to CUDA, NCCL and cuDNN. An assumption.
_GPU_SHARE = 0.92


#: What whole training steps of 7B and 8B models reach of a chip's peak, by "full" MFU, and where that is published: the
#: efficiency of its matrix products is set so that the planner's best plan comes out near it
#: (`tests/training/test_planning.py`).
_PUBLISHED = {
    "v4": "axlearn, Fuji-7B v1 on v4-1024, 2048 tokens: 42.1 % (experiments/text/gpt/fuji.py)",
    "v5e": "axlearn, Fuji-7B v2 on v5e-1024, 4096 tokens: 43.4 % (experiments/text/gpt/fuji.py)",
    "v5p": "axlearn (arXiv 2507.05411), Llama-2-7B on v5p-512, 4096 tokens: 65.8 %",
    "v6e": "MaxText performance docs, Llama-3.1-8B on v6e-256, 8192 tokens: 45.5 %",
    "a100": "fms-fsdp, Llama-2-7B on 128 A100, 4096 tokens: 54.7 % in a whole run, 67.2 % at best (README)",
    "h100": "JAX-Toolbox, MaxText Llama-2-7B on 8 H100, 4096 tokens: 52.9 %; OLMo-core, OLMo-2 7B: 46.6 %",
}


def _efficiency(value: float, of: str, own: bool = True) -> tuple[float, str]:
    """A chip's efficiency and its source; of a chip for which nothing was found, that of its nearest relative."""
    return value, _PUBLISHED[of] if own else f"nothing published was found for it; as {of}: {_PUBLISHED[of]}"


def _tpu(
    name: str, kinds: tuple[str, ...], bfloat16: float, gib: float, hbm: float, link: float, torus: int, most: int,
    network: float, host: float, efficiency: tuple[float, str], cores: int = 1, source: str = _TPU,
) -> Chip:  # fmt: skip
    # float32 is multiplied in six bfloat16 passes (`jax.lax.Precision.HIGHEST`).
    flops = {"bfloat16": bfloat16, "float32": bfloat16 / 6}
    wraps = 4 if torus == 3 else 16
    return Chip(
        name, "tpu", kinds, flops, gib * _GIB, hbm, link, torus, wraps, most, network, host, *efficiency,
        source.format(name), cores=cores,
    )  # fmt: skip


def _gpu(
    name: str, kinds: tuple[str, ...], bfloat16: float, float32: float, memory: float, hbm: float, link: float,
    network: float, host: float, spec: str, efficiency: tuple[float, str], most: int = 8, source: str = _GPU,
) -> Chip:  # fmt: skip
    flops = {"bfloat16": bfloat16, "float32": float32}
    board = name.split("-")[0].upper()
    memory_source = f"openxla/xla gpu/target_config/specs/{spec}.txtpb" if spec else "the data sheet"
    return Chip(
        name, "gpu", kinds, flops, memory * _GPU_SHARE, hbm, link, 0, 0, most, network, host, *efficiency,
        source.format(board, memory_source, board),
    )  # fmt: skip


#: By name, as topologies spell it.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", ("TPU v4",), 275e12, 30.75, 1.2e12, 4.5e10, 3, 4096, 6.25e9, 1.6e10, _efficiency(0.49, "v4")),
        _tpu(
            "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75, 8.19e11, 4.5e10, 2, 256, 3.125e9, 1.6e10,
            _efficiency(0.55, "v5e"),
        ),
        _tpu(
            "v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74, 2.765e12, 9e10, 3, 6144, 6.25e9, 1.6e10,
            _efficiency(0.7, "v5p"),
        ),
        _tpu(
            "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25, 1.638e12, 9e10, 2, 256, 1.25e10, 3.2e10,
            _efficiency(0.57, "v6e"),
        ),
        _tpu(
            "v7x", ("TPU7x",), 2307e12 / 2, 192 / 2 * 0.985, 7.38e12 / 2, 1e11, 3, 9216, 1.25e10 / 2, 3.2e10,
            _efficiency(0.57, "v6e", own=False), cores=2, source=_TPU7X,
        ),
        _gpu(
            "a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 19.5e12, 85100068864, 2.039e12, 3e11, 2.5e10, 3.2e10,
            "a100_sxm_80", _efficiency(0.65, "a100"),
        ),
        _gpu(
            "a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312e12, 19.5e12, 42331013120, 1.555e12, 3e11, 2.5e10, 3.2e10,
            "a100_sxm_40", _efficiency(0.65, "a100"),
        ),
        _gpu(
            "a100-pcie", ("NVIDIA A100 80GB PCIe",), 312e12, 19.5e12, 79050250240, 1.935e12, 3.2e10, 2.5e10, 3.2e10,
            "a100_pcie_80", _efficiency(0.65, "a100", own=False), source=_GPU_PCIE,
        ),
        _gpu(
            "h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 66.9e12, 84942979072, 3.352e12, 4.5e11, 5e10, 6.4e10,
            "h100_sxm", _efficiency(0.57, "h100"),
        ),
        _gpu(
            "h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 51e12, 84942979072, 2.039e12, 6.4e10, 5e10, 6.4e10,
            "h100_pcie", _efficiency(0.57, "h100", own=False), source=_GPU_PCIE,
        ),
        _gpu(
            "h100-nvl", ("NVIDIA H100 NVL",), 835.5e12, 60e12, 94e9, 3.9e12, 6.4e10, 5e10, 6.4e10,
            "", _efficiency(0.57, "h100", own=False), source=_GPU_PCIE,
        ),
        _gpu(
            "h200", ("NVIDIA H200",), 989.4e12, 66.9e12, 151397597184, 4.8e12, 4.5e11, 5e10, 6.4e10,
            "h200", _efficiency(0.57, "h100", own=False),
        ),
        _gpu(
            "b200", ("NVIDIA B200",), 2250e12, 75e12, 191514411008, 7.672e12, 9e11, 5e10, 6.4e10,
            "b200", _efficiency(0.57, "h100", own=False),
        ),
        _gpu(
            "gb200", ("NVIDIA GB200",), 2500e12, 80e12, 197897748480, 7.928e12, 9e11, 5e10, 4.5e11,
            "gb200", _efficiency(0.57, "h100", own=False), most=72, source=_GB200,
        ),
        _gpu(
            "l40s", ("NVIDIA L40S",), 362.05e12, 91.6e12, 48e9, 8.64e11, 3.2e10, 2.5e10, 3.2e10,
            "", _efficiency(0.57, "h100", own=False), source=_GPU_PCIE,
        ),
        Chip(
            name="cpu", platform="cpu", kinds=("cpu",), flops={"bfloat16": 1e10, "float32": 1e10},
            hbm_bytes=2 * _GIB, hbm_bandwidth=1e10, link=1e9, torus=0, wraps=0, most=4096, network=1e9, host=1e10,
            efficiency=1.0, efficiency_source="nominal",
            source="nominal: round numbers, so that plans for simulated devices can be compared; they describe none",
            nominal=True,
        ),
    )
}  # fmt: skip

#: LLM360's own cluster: 56 nodes of 4 A100, two InfiniBand ports of 200 Gb/s in each (fact sheet 5.1), so a quarter of
#: 50 GB/s for each GPU.
AMBER = "amber"
_AMBER_SHAPE, _AMBER_NETWORK = "56x4", 2 * 200e9 / 8 / 4


#: Times as fast as a link to a neighbour are the devices of one chip joined (TPU7x documentation).
INSIDE_CHIP = 6


@dataclasses.dataclass(frozen=True)
class Link:
    """What carries the collectives of one mesh axis."""

    bandwidth: float
    """Bytes/s that each chip sends while all chips of a group exchange what they have."""
    how: str
    """The arithmetic."""
    whole_torus: bool = False
    """The axis takes up all of a three-dimensional torus: see `planner.WHOLE_TORUS`."""
    network: bool = False
    """A part of the way leads over the network between slices or nodes."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips, and how they are wired."""

    chip: Chip
    shape: tuple[int, ...]
    """TPU: lengths of the torus of one slice, in chips. GPU: (nodes, GPUs of a node). CPU: (devices,)."""
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
            if math.prod(shape) * slices * chip.cores == count:
                return cls(chip, shape, slices)
            return cls(
                chip, (count // slices // chip.cores, *(1,) * (chip.torus - 1)), slices
            )  # no box: a line is the worst case
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
        """jax devices, all together."""
        return math.prod(self.shape) * self.slices * self.chip.cores

    @property
    def chips(self) -> int:
        """Chips, all together."""
        return self.devices // self.chip.cores

    @property
    def node(self) -> int:
        """Chips that reach each other without the network: a slice, a node."""
        return self.shape[1] if self.chip.platform == "gpu" else math.prod(self.shape) * self.chip.cores

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
        if local == 1:
            return Link(across, how, network=True)
        if self.chip.platform == "tpu":  # first inside each slice, then between slices: one hop waits for the other
            both = 1 / (1 / inside.bandwidth + 1 / across)
            return Link(both, f"{how}, and inside {inside.how}, one after the other", network=True)
        if (
            inside.bandwidth < across
        ):  # NCCL passes pieces on from NVLink to the network as they come: the slower counts
            return dataclasses.replace(inside, how=f"{inside.how} (slower than the {how})", network=True)
        return Link(across, how, network=True)

    def _inside(self, degrees: Mapping[str, int]) -> dict[str, Link]:
        """What carries the part of each axis that lies inside a node or slice."""
        chip = self.chip
        if not chip.torus:
            name = "NVLink" if chip.platform == "gpu" else "nominal link"
            return {axis: Link(chip.link, f"{name} {_rate(chip.link)}") for axis in MESH_AXES}
        free = [
            [length, 1] for length in self._lengths
        ]  # of each torus dimension: what is left, stride of what is left
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
            ring = taken == self._lengths[d] and self._rings[d]
            if d < len(self.shape):
                bandwidth += link * (2 if ring else 1) / stride / self.chip.cores  # which share their chip's links
            elif len(parts) == 1:
                bandwidth += link * INSIDE_CHIP
            how.append(f"{'ring' if ring else 'line'} of {taken}" + (f" at stride {stride}" if stride > 1 else ""))
            free[d] = [left // taken, stride * taken]
        whole_torus = self.chip.torus == 3 and len(parts) >= 3 and math.prod(t for _, t in parts) == self.node
        return Link(bandwidth or link, f"{' + '.join(how) or 'one link'}, {_rate(link)} a link and way", whole_torus)

    @property
    def _lengths(self) -> tuple[int, ...]:
        """Of the torus, and where a chip is several devices, of them."""
        return (*self.shape, self.chip.cores) if self.chip.cores > 1 else self.shape

    @functools.cached_property
    def _rings(self) -> tuple[bool, ...]:
        """Which torus dimensions are closed: of three, all or none (only whole cubes are); of two, each by itself."""
        closed = tuple(length % self.chip.wraps == 0 for length in self.shape)
        return (*((all(closed),) * len(closed) if self.chip.torus == 3 else closed), False)

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
