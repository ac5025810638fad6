import dataclasses

import jax
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
        ("pipeline=2", "no pipeline schedule"),
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
        ("data=16", r"data\*fsdp = 16 does not divide the 8 rows of a microbatch"),
    ],
)
def test_refuses_a_mesh_that_does_not_divide_the_model(tiny, mesh, message):
    with pytest.raises(UserError, match=message):
        tiny.check_mesh(MeshConfig.parse(mesh).degrees)


def test_refuses_a_sequence_that_tensor_does_not_divide(tiny):
    odd = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, sequence_length=31))
    with pytest.raises(UserError, match=r"tensor = 2 does not divide data.sequence_length=31"):
        odd.check_mesh(MeshConfig.parse("tensor=2").degrees)


def test_the_number_of_devices_is_what_the_tests_assume():
    assert jax.device_count() == 8
