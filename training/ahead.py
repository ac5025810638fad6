"""The real train step of a run, compiled ahead of time for a slice that need not be there, and what that says of it."""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from parallel import compiler, flops, hlo
from parallel.compiler import Report, Request
from training.config import Family, RunConfig
from training.program import Program


def serve(families: Mapping[str, Family]) -> int:
    """Answer the one request on standard input: the process that `compiler.check` starts.

    Raises:
        UserError: as `compile_ahead`, and a config that cannot be read.
    """
    request = Request(**json.load(sys.stdin))
    report = compile_ahead(RunConfig.from_dict(request.config, families), request.topology)
    print(json.dumps(report.to_dict()))
    return 0


def compile_ahead(config: RunConfig, topology: str) -> Report:
    """Compile the train step of ``config`` for a topology; reads no data and makes no array.

    Raises:
        UserError: as `trace`.
    """
    start = time.perf_counter()
    config, mesh, traced = trace(config, topology)
    report = Report(Request(config.to_dict(), topology).plan, topology, compiler.versions(topology))
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refused = compiler.refusal(str(error))
        if refused is None:
            raise
        return dataclasses.replace(report, refused=refused[0], needed_bytes=refused[1])
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return dataclasses.replace(
        report,
        peak_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        flops=flops.count(traced.jaxpr),
        collectives=tuple(hlo.traffic(hlo.collectives(text, mesh.shape))),
        kernels=tuple(sorted(hlo.custom_calls(text))),
        compile_s=seconds,
    )


def trace(config: RunConfig, topology: str) -> tuple[RunConfig, Mesh, Any]:
    """The train step traced for a topology.

    Args:
        config: as a recipe returns it; what it leaves open for the data to say does not change the step.
        topology: see `compiler.devices`.

    Returns:
        The config with its mesh as it is laid over the topology, that mesh, and what `jax.jit(…).trace` returns.

    Raises:
        UserError: the config and the topology do not go together, or the topology's compiler is not installed.
    """
    devices = compiler.devices(topology)
    config = config.resolve(config.synthetic())
    config = dataclasses.replace(config, mesh=config.mesh.resolve(len(devices), topology))
    mesh = config.mesh.build(devices)
    config.check_mesh(mesh.shape)
    if devices[0].platform == "gpu":
        compiler.assume_cudnn(topology)
    return config, mesh, Program.plan(config, mesh).trace()
