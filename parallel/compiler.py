"""Asks the real compilers what a plan costs, without the hardware: libtpu for TPU, XLA's CUDA plugin for NVIDIA.

`devices` gives the devices of a slice by name; a program lowered for a mesh over them can be compiled, and then says
its memory and its collectives. `check` has that done for many plans, each in a process of its own, because libtpu
ends the process where others raise, and keeps the answers. What is compiled is not known here: the caller gives the
command of the process, which reads a `Request` on its standard input and writes a `Report` on its standard output.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from errors import UserError
from parallel.hlo import Traffic
from parallel.mesh import MeshConfig
from parallel.plan import Plan

#: Of the process that compiles. It must see no accelerator of this machine and simulate none; two of them may load
#: libtpu at once; and XLA shall look for a good program, not for the best: memory was within 2 % and the collectives
#: were the same at a third to a fifth of the time (Amber-7B on v5p:4x4x4, libtpu 0.0.42).
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
}

#: Would change what is compiled, and is not part of a report's key.
_UNSET = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


# ---- devices that are not there ------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """What XLA's GPU compiler must know of a card. Sizes in bytes; a core is a streaming multiprocessor."""

    name: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    shared_per_core: int
    shared_per_block: int
    """At most, when a kernel opts in."""
    l2: int
    clock_ghz: float
    memory: int
    bandwidth: int
    """Bytes per second."""


#: The numbers of XLA's own descriptions (openxla/xla, xla/backends/gpu/target_config/specs at 4336d12e, files
#: a100_sxm_80, h100_sxm (at 0774019d) and h200), which were read from the cards.
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 166912, 41943040, 1.41, 85100068864, 2039040000000
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 232448, 52428800, 1.98, 84942979072, 3352320000000
    ),
    "h200": Gpu(
        "NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 233472, 232448, 52428800, 1.98, 151397597184, 4800000000000
    ),
}  # fmt: skip

#: The cuDNN and CUDA that GPU programs are compiled for: those of XLA's description of the H200.
_CUDNN, _CUDA = (9, 10, 0), (12, 8, 0)

#: TPU generations, and what libtpu must be told besides: without it a v4 chip shows as two devices.
TPUS: Mapping[str, dict[str, Any]] = {
    "v4": {"chip_config_name": "megacore"},
    "v5e": {},
    "v5p": {},
    "v6e": {},
    "v7x": {},
}
#: What libtpu calls a generation, where that is not as Google's documentation does in topologies.
_LIBTPU = {"v7x": "tpu7x"}


def devices(topology: str) -> list[jax.Device]:
    """The devices of a slice that need not be there: good for a mesh to compile for, not to run on.

    Args:
        topology: a TPU slice by its torus, as ``v5p:4x4x4``, several as ``2*v5e:16x16``, or nodes times GPUs of each,
            as ``h100:4x8``.

    Raises:
        UserError: unknown name or shape, or the compiler is not installed.
    """
    slices, kind, shape = require(topology)
    try:
        if kind in TPUS:
            for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
                os.environ.setdefault(name, ENVIRONMENT[name])
            name, more = f"{_LIBTPU.get(kind, kind)}:{shape}", {"num_slices": slices} if slices > 1 else {}
            described = topologies.get_topology_desc(platform="tpu", topology_name=name, **TPUS[kind], **more)
        else:
            target = _target_config(GPUS[kind])
            described = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x{shape}")
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {topology!r}: the compiler does not know it: {essence(str(error))}") from error
    return list(described.devices)


def require(topology: str) -> tuple[int, str, str]:
    """Refuse a topology that no compiler here can be asked about; slices, kind and shape of one that can.

    Raises:
        UserError: unknown name or shape, or the compiler is not installed.
    """
    before, star, name = topology.rpartition("*")
    kind, _, shape = name.partition(":")
    if star and not (before.isdecimal() and int(before) and kind in TPUS):
        raise UserError(f"topology {topology!r}: N*, a number of slices, is for TPUs and at least 1")
    if kind not in TPUS and kind not in GPUS:
        raise UserError(
            f"topology {topology!r}: no compiler for {kind!r}; there are {', '.join([*TPUS, *GPUS])}, as in v5p:4x4x4 "
            "or h100:4x8"
        )
    if not re.fullmatch(r"\d+x\d+" if kind in GPUS else r"\d+(x\d+){1,2}", shape):
        raise UserError(f"topology {topology!r}: {shape!r} is not a shape; write v5e:4x4, v5p:4x4x4, h100:4x8")
    if module := missing(kind):
        extra = "tpu" if kind in TPUS else "cuda-check"
        raise UserError(
            f"topology: the compiler for {kind} is not installed ({module} is missing); pip install -e '.[{extra}]'"
        )
    return int(before or 1), kind, shape


def missing(kind: str) -> str | None:
    """The Python module that compiles for a TPU generation or a GPU, if it is not installed."""
    module = "libtpu" if kind in TPUS else "jax_plugins.xla_cuda12"
    try:
        return None if importlib.util.find_spec(module) else module
    except ModuleNotFoundError:
        return module


def _target_config(gpu: Gpu) -> str:
    """The card as a GpuTargetConfigProto in text; limits of threads and blocks are those of all CUDA cards."""
    major, minor = gpu.capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: {gpu.cores} fpus_per_core: {gpu.fpus_per_core} clock_rate_ghz: {gpu.clock_ghz}
          shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_per_core}
          shared_memory_per_block_optin: {gpu.shared_per_block} l2_cache_size: {gpu.l2}
          memory_bandwidth: {gpu.bandwidth} device_memory_size: {gpu.memory}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} patch: {_CUDNN[2]} }}
        runtime_version {{ major: {_CUDA[0]} minor: {_CUDA[1]} patch: {_CUDA[2]} }}
        device_description_str: "{gpu.name}"
        """


def assume_cudnn(topology: str) -> None:
    """Make jax trace cuDNN attention for GPUs that are not there; for a process that does nothing else.

    jax (0.10, 0.11) asks the first GPU of the machine what it can do, while it traces, and knows no other way. Its
    three questions are answered here for the card that is compiled for.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    capability = GPUS[topology.partition(":")[0]].capability

    def asked(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.split("."))

    cudnn.check_cudnn_version = lambda: _CUDNN[0] * 10000 + _CUDNN[1] * 100 + _CUDNN[2]
    cudnn.check_compute_capability = lambda text: capability >= asked(text)
    cudnn.is_cuda_compute_capability_equal = lambda text: capability == asked(text)


# ---- questions and answers -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """A question: this run's train step on that slice."""

    config: Mapping[str, Any]
    """``RunConfig.to_dict()``; its mesh and execution are the plan."""
    topology: str

    @property
    def plan(self) -> Plan:
        """The plan that the config describes."""
        fields = [f.name for f in dataclasses.fields(Plan) if f.name != "mesh"]
        return Plan(MeshConfig(**self.config["mesh"]), **{name: self.config["execution"][name] for name in fields})


@dataclasses.dataclass(frozen=True)
class Report:
    """The answer. Sizes and counts are of one device; they are None unless the program compiled."""

    plan: Plan
    topology: str
    versions: dict[str, str]
    """Of what decides the answer: jax, jaxlib, and the compiler."""
    peak_bytes: int | None = None
    """Memory that the step needs at its peak: state, batch and temporaries. By this the TPU compiler refuses."""
    argument_bytes: int | None = None
    """State and batch alone."""
    temp_bytes: int | None = None
    """Temporaries alone; of a TPU with the gaps between them, so that with the arguments they can exceed the peak."""
    flops: int | None = None
    """Of the matrix products of a step (`parallel.flops.count`)."""
    collectives: tuple[Traffic, ...] = ()
    kernels: tuple[str, ...] = ()
    """What the program calls from outside XLA, by XLA's names: attention kernels, matrix libraries, helpers."""
    compile_s: float | None = None
    """Seconds to trace, lower and compile the step."""
    refused: str | None = None
    """Why the compiler would not have it, in its words: out of memory, mostly."""
    needed_bytes: int | None = None
    """What it said that it needed, where it did: TPU compilers name the temporaries, without the state."""
    failed: str | None = None
    """There is no answer: a mistake in the request, an abort of the compiler, or no end within the time."""

    @property
    def compiled(self) -> bool:
        """Whether there is a program."""
        return self.refused is None and self.failed is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Report":
        """Inverse of `to_dict`, also after JSON."""
        plan = Plan(**{**value["plan"], "mesh": MeshConfig(**value["plan"]["mesh"])})
        traffic = tuple(Traffic(**{**t, "axes": tuple(t["axes"])}) for t in value["collectives"])
        return cls(**{**value, "plan": plan, "collectives": traffic, "kernels": tuple(value["kernels"])})


def versions(topology: str) -> dict[str, str]:
    """Versions of what makes the program for a topology; a compiler that is not installed is left out."""
    compiler = "libtpu" if topology.partition(":")[0] in TPUS else "jax-cuda12-plugin"
    found = {}
    for name in ("jax", "jaxlib", "flax", "optax", compiler):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def refusal(message: str) -> tuple[str, int | None] | None:
    """(its essential line, bytes needed) if a compiler's message says that the program does not fit; else None."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    line = essence(message[message.index("RESOURCE_EXHAUSTED") :])
    sizes = [float(n) * 1024 ** " KMGT".index(unit) for n, unit in re.findall(r"\b([\d.]+)([KMGT])\b", line)]
    return line, round(sizes[0]) if sizes else None


def essence(message: str) -> str:
    """The line of an error or of a log that says what went wrong: the fatal one, or else the last few."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4} |RESOURCE_EXHAUSTED|[\w.]+(Error|Exception): ", line)]
    return fatal[-1] if fatal else " | ".join(lines[-3:])


# ---- many questions ------------------------------------------------------------------------------------------------


def check(
    requests: Sequence[Request],
    command: Sequence[str],
    sources: Sequence[Path],
    cache: Path,
    timeout_s: float = 600,
    progress: Callable[[int, Report], None] = lambda index, report: None,
) -> list[Report]:
    """An answer for each request, in order; one that fails says so and the others go on.

    Answers of the compiler, its refusals too, are kept by what they depend on: config, topology, versions and code.
    Failures are not, since time and memory of this machine may be their cause.

    Args:
        requests: what to compile.
        command: starts a process that answers one request, read on its standard input, with a `Report` as JSON in the
            last line of its standard output. A mistake in the request: exit code 2 and a message on standard error.
        sources: files, and folders with the Python files, that make the program.
        cache: folder for the answers; made if it is not there.
        timeout_s: time for each, one after the other: a compilation uses all cores, and 1 to 2 GB for a 7B model.
        progress: called as answers come, with the index of the request.
    """
    cache.mkdir(parents=True, exist_ok=True)
    code = _digest(sources)

    def answer(request: Request) -> Report:
        kept = cache / f"{_key(request, code)}.json"
        if kept.exists() and (known := _read(kept.read_text())):
            return known
        report = _ask(request, command, timeout_s)
        if report.failed is None:
            partial = kept.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(report.to_dict(), indent=1))
            partial.replace(kept)
        return report

    reports = []
    for index, request in enumerate(requests):
        reports.append(answer(request))
        progress(index, reports[-1])
    return reports


def _read(text: str) -> Report | None:
    """A report from its JSON; None if it is none."""
    try:
        return Report.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError):
        return None


def _digest(sources: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(f"{file.relative_to(source.parent)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(request: Request, code: str) -> str:
    parts = [request.config, request.topology, versions(request.topology), ENVIRONMENT, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _ask(request: Request, command: Sequence[str], timeout_s: float) -> Report:
    kept = {n: v for n, v in os.environ.items() if n not in _UNSET and not n.startswith("JAX_")}
    environment = kept | ENVIRONMENT
    failed = Report(request.plan, request.topology, versions(request.topology))
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
    )
    try:
        out, err = process.communicate(json.dumps(dataclasses.asdict(request)), timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
        return dataclasses.replace(failed, failed=f"no answer after {timeout_s:g} s: {essence(err)}")
    except BaseException:
        process.kill()
        process.communicate()
        raise
    code = process.returncode
    if code == 0 and out.strip() and (report := _read(out.strip().splitlines()[-1])):
        return report
    after = f"after {time.monotonic() - start:.0f} s"
    if code < 0:
        why = f"the compiler ended its process ({signal.Signals(-code).name}) {after}: {essence(err)}"
    elif code == 0:
        why = f"no report in the answer: {essence(out)}"
    elif code == 2:
        why = essence(err)
    else:
        why = f"exit code {code} {after}: {essence(err)}"
    return dataclasses.replace(failed, failed=why)
