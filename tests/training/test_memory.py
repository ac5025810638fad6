"""Memory: what cannot fit is refused before anything is compiled, and what runs out says so in one message."""

import dataclasses
import json
import re
import types

import jax
import numpy as np
import pytest

import run as cli
from amber_jax.recipes import amber_7b, amber_tiny
from errors import UserError
from parallel.axes import MESH_AXES
from parallel.mesh import MeshConfig
from training import memory
from training.program import Program


class Gpu(types.SimpleNamespace):
    """An accelerator that is not there, as far as it is looked at."""

    platform, process_index, slice_index = "gpu", 0, 0

    def memory_stats(self):
        return {"bytes_limit": self.limit}


def gpus(mesh, kind="NVIDIA H200", limit=139.3e9):
    degrees = MeshConfig.parse(mesh).degrees
    devices = np.array([Gpu(device_kind=kind, limit=limit) for _ in range(MeshConfig.parse(mesh).size)], object)
    return types.SimpleNamespace(devices=devices.reshape(tuple(degrees.values())), shape=degrees)


def with_plan(config, **how):
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, **how))


def test_what_cannot_fit_is_refused_with_what_would():
    config = with_plan(amber_7b(), microbatches=8, remat="none")
    with pytest.raises(UserError) as error:
        memory.check(config, gpus("data=1"))
    said = str(error.value)
    assert re.search(r"amber_7b needs about \d+\.\d GB on each device with data=1 microbatches=8 .*moments 53.9", said)
    assert "139.3 GB are there (of NVIDIA H200)" in said
    (flags,) = re.findall(r"This fits: --mesh data=1 --execution.microbatches (\d+) --execution.remat (\w+)$", said)
    memory.check(with_plan(config, microbatches=int(flags[0]), remat=flags[1]), gpus("data=1"))


def test_another_mesh_is_named_where_this_one_has_no_plan():
    with pytest.raises(UserError, match=r"This fits: --mesh \S*(fsdp|tensor)=\S* "):
        memory.check(amber_7b(), gpus("data=8", "NVIDIA H100 80GB HBM3", 78e9))
    with pytest.raises(UserError, match=r"No plan for these devices does \(plan: nothing fits .* is enough"):
        memory.check(amber_7b(), gpus("data=1", "NVIDIA L40S", 44e9))


def test_what_may_fit_is_left_to_the_compiler_and_unknown_devices_too():
    """The prediction is up to 14 % too high, and of a device without figures there is none."""
    config = with_plan(amber_7b(), microbatches=32, remat="offload")
    assert memory.check(config, gpus("data=1", limit=125e9)) is None, "predicted: 133 GB"
    assert memory.check(amber_7b(), gpus("data=1", "NVIDIA of tomorrow", 1e9)) is None


def test_a_cpu_must_hold_the_state_at_least(monkeypatch):
    monkeypatch.setattr(memory, "_free", lambda: 8e9)
    mesh = MeshConfig(fsdp=8).build(jax.devices())
    with pytest.raises(
        UserError, match=r"needs about 13.5 GB .* and 1.0 GB are there \(free on this machine, for 8 sim"
    ):
        memory.check(amber_7b(), mesh)
    assert memory.check(amber_tiny(), mesh) is None


def test_this_machine_says_what_is_free():
    free = memory.available(jax.devices())
    assert 0 < free.bytes * len(jax.devices()) < 2**50


def refuse_to_compile(self):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\n" + "x\n" * 99
    )


def test_running_out_of_memory_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(Program, "compile", refuse_to_compile)
    words = ["train", "amber_tiny", "--data", "synthetic", "--steps", "1", "--mesh", "data=8", "--json"]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == 1
    (line,) = [text for text in err.splitlines() if text.startswith("error:")]
    assert re.search("a device's was not enough .*RESOURCE_EXHAUSTED: .*--execution.remat full.*--mesh", line)
    assert "Traceback" not in err


def test_other_errors_of_the_runtime_keep_their_traceback(monkeypatch):
    def fail(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(Program, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        cli.main(["train", "amber_tiny", "--data", "synthetic", "--steps", "1", "--mesh", "data=8"])


def test_the_mesh_axes_of_the_stand_in_are_ours():
    assert tuple(gpus("data=2").shape) == MESH_AXES
