import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from errors import UserError
from parallel import axes
from parallel.mesh import MeshConfig, simulate


def test_parse_and_print():
    mesh = MeshConfig.parse("data=2, tensor=4")
    assert mesh == MeshConfig(data=2, tensor=4)
    assert str(mesh) == "data=2,tensor=4"
    assert MeshConfig.parse("") == MeshConfig() == MeshConfig.parse(str(MeshConfig()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datta=2", "unknown axis 'datta'.*did you mean 'data'"),
        ("data=two", "'data=two' is not AXIS=NUMBER"),
        ("data", "'data' is not AXIS=NUMBER"),
        ("data=2,data=4", "'data' is given twice"),
        ("data=0", "data=0 is not a degree"),
        ("data=-1,fsdp=-1", "only one axis may be -1"),
    ],
)
def test_refuses_what_is_not_a_mesh(text, message):
    with pytest.raises(UserError, match=message):
        MeshConfig.parse(text)


def test_fills_the_free_axis():
    assert MeshConfig.parse("fsdp=-1,tensor=2").resolve(8) == MeshConfig(fsdp=4, tensor=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2,fsdp=4,tensor=2", r"1\*2\*4\*2 = 16 but 8 cpu devices are visible.*--simulate 16"),
        ("data=4", r"1\*4\*1\*1 = 4 but 8 cpu devices are visible"),
        ("tensor=3,data=-1", "but 8 cpu devices are visible"),
    ],
)
def test_refuses_a_mesh_that_does_not_fit_the_devices(text, message):
    with pytest.raises(UserError, match=message):
        MeshConfig.parse(text).build()


def test_simulate_says_when_it_is_too_late():
    simulate(8)  # what this process has already
    with pytest.raises(UserError, match="already runs on 8 cpu device"):
        simulate(4)
    with pytest.raises(UserError, match="at least 1"):
        simulate(0)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What of a device decides where it goes."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def test_tensor_lies_inside_a_host():
    """Two hosts of four GPUs, each with a process of its own, listed out of order."""
    gpus = [Gpu(id=n, process_index=n, slice_index=n // 4) for n in range(8)][::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesh = MeshConfig.parse("data=2,tensor=4").build(gpus)
    assert np.vectorize(lambda d: d.id)(mesh.devices).reshape(2, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.warns(UserWarning, match="tensor=8 does not divide the 4 devices of a host"):
        MeshConfig.parse("tensor=8").build(gpus)


#: Coordinates and slices of the devices of meshes over topologies that are not there.
TOPOLOGIES = """
import json, os, sys
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
import numpy as np
from jax.experimental import topologies
from errors import UserError
from parallel.mesh import MeshConfig

for topology, slices, text in json.loads(sys.argv[1]):
    options = {"num_slices": slices} if slices > 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    try:
        mesh = MeshConfig.parse(text).build(devices)
        where = np.vectorize(lambda d: json.dumps([getattr(d, "slice_index", 0), *d.coords]))(mesh.devices)
        print(json.dumps([mesh.axis_names, [json.loads(w) for w in where.flat]]))
    except UserError as e:
        print(json.dumps(str(e)))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_lays_axes_along_the_torus_and_what_talks_least_over_slices():
    asked = [
        ("v5p:4x4x4", 1, "fsdp=8,tensor=8"),  # axes that split those of the torus
        ("v5p:4x4x4", 1, "pipeline=4,fsdp=4,tensor=4"),
        ("v5e:4x4", 2, "pipeline=2,fsdp=4,tensor=4"),
        ("v5e:4x4", 2, "data=4,fsdp=2,tensor=4"),
        ("v5e:4x4", 2, "fsdp=8,tensor=4"),
        ("v5e:4x4", 2, "tensor=32"),
    ]
    root = Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, "-c", TOPOLOGIES, json.dumps(asked)]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=100)
    *laid, refusal = (json.loads(line) for line in done.stdout.splitlines())
    assert "tensor=32 cannot be laid over 2 slices without splitting tensor" in refusal
    for (_, slices, text), (names, where) in zip(asked, laid, strict=False):
        degrees = MeshConfig.parse(text).degrees
        assert names == list(degrees)
        places = np.array(where).reshape(*degrees.values(), 4)
        assert len(np.unique(places.reshape(-1, 4), axis=0)) == MeshConfig.parse(text).size
        outer = next(n for n, degree in enumerate(degrees.values()) if degree > 1)
        for n, degree in enumerate(degrees.values()):  # only the outermost axis leaves a slice
            line = np.moveaxis(places, n, 0).reshape(degree, -1, 4)[:, 0]
            assert len(set(line[:, 0])) == (slices if n == outer else 1)
    torus = np.array(laid[1][1]).reshape(4, 4, 4, 4)
    for n in range(3):  # each axis of the mesh is one of the torus
        line = np.moveaxis(torus, n, 0)[:, 0, 0]
        assert sorted(len(set(line[:, i])) for i in range(4)) == [1, 1, 1, 4]


def test_size_one_axes_are_in_no_spec(mesh_of):
    assert axes.spec(mesh_of("data=2,tensor=4"), "embed", "heads", "head_dim") == PartitionSpec(None, "tensor", None)
    assert axes.spec(mesh_of("data=2,fsdp=4"), "batch", "sequence") == PartitionSpec(("data", "fsdp"), None)


def test_an_axis_without_a_rule_or_used_twice_is_an_error(mesh_of):
    with pytest.raises(KeyError, match="no rule for logical axis 'colour'"):
        axes.spec(mesh_of("data=2"), "colour")
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        axes.spec(mesh_of("tensor=2"), "heads", "mlp")


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=3", r"tensor = 3 does not divide the 'vocab' dimension \(64\) of embedding.table \(64, 32\)"),
        ("fsdp=5", r"fsdp = 5 does not divide the 'embed' dimension \(32\)"),
        ("tensor=16", r"tensor = 16 does not divide .* choose a degree from \[1, 2, 4, 8\]"),
        ("pipeline=4", r"pipeline = 4 does not divide the 'layers' dimension \(2\)"),
        ("data=16", r"data\*fsdp = 16 devices share the rows of a batch, and data.global_batch=8 has fewer"),
    ],
)
def test_refuses_a_mesh_that_does_not_divide_the_model(tiny, mesh, message):
    with pytest.raises(UserError, match=message):
        tiny.check_mesh(MeshConfig.parse(mesh).degrees)


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        ({"repeats": 2, "microbatches": 2}, r"pipeline \* execution.repeats = 2\*2 does not divide the 2 layers"),
        ({"microbatches": 1}, r"pipeline = 2 does not divide execution.microbatches=1.*execution.schedule 1f1b"),
    ],
)
def test_refuses_a_pipeline_without_enough_to_do(tiny, execution, message):
    config = dataclasses.replace(tiny, execution=dataclasses.replace(tiny.execution, **execution))
    with pytest.raises(UserError, match=message):
        config.check_mesh(MeshConfig.parse("pipeline=2").degrees)


def test_refuses_a_sequence_that_tensor_does_not_divide(tiny):
    odd = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, sequence_length=31))
    with pytest.raises(UserError, match=r"tensor = 2 does not divide data.sequence_length=31"):
        odd.check_mesh(MeshConfig.parse("tensor=2").degrees)


def test_the_number_of_devices_is_what_the_tests_assume():
    assert jax.device_count() == 8
