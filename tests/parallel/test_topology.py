"""Topologies by name and from live devices, and the links that mesh axes travel over."""

import jax
import pytest

from errors import UserError
from parallel import topology
from parallel.mesh import MeshConfig
from parallel.topology import CHIPS, Topology


def links(name, mesh):
    return Topology.parse(name).links(MeshConfig.parse(mesh).degrees)


@pytest.mark.parametrize(
    ("text", "devices", "node"),
    [
        ("v5p:4x4x8", 128, 128),
        ("2*v5e:16x16", 512, 256),
        ("h100:4x8", 32, 8),
        ("a100:56x4@0.1", 224, 4),
        ("cpu:8", 8, 8),
    ],
)
def test_a_name_says_how_many_and_reads_back(text, devices, node):
    there = Topology.parse(text)
    assert (there.devices, there.node, str(there)) == (devices, node, text)
    assert Topology.parse(str(there)) == there


def test_ambers_own_cluster_has_its_own_network():
    amber = Topology.parse("amber")
    assert (str(amber), amber.devices, amber.chip.name) == ("amber:56x4", 224, "a100")
    assert amber.network_bandwidth * 4 == 2 * 200e9 / 8, "two ports of 200 Gb/s for four GPUs"
    assert Topology.parse("amber@0.1").network_bandwidth == pytest.approx(amber.network_bandwidth / 10)
    assert Topology.parse("amber:28x4").network_bandwidth == amber.network_bandwidth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5x:4x4", "unknown chip 'v5x'; .*did you mean .*v5"),
        ("h1000:4x8", "did you mean h100"),
        ("ambr", "did you mean amber"),
        ("v5p:4x4", "v5p takes 3 lengths of its torus"),
        ("h100:8", "h100 takes NODESxGPUS"),
        ("h100:0x8", "h100 takes NODESxGPUS"),
        ("cpu", "cpu takes a number of devices"),
        ("v5e:32x16", "the largest slice of v5e has 256 chips"),
        ("h100:2x16", "a node of h100 has at most 8 GPUs"),
        ("2*h100:4x8", "a number of slices, is for TPUs"),
        ("0*v5e:4x4", "a number of slices, is for TPUs and at least 1"),
        ("v5e:4x4@0", "@0 is no factor"),
        ("v5e:4x4@1.2.3", "@1.2.3 is no factor"),
        ("v5e:4x", "write CHIP:SHAPE"),
    ],
)
def test_refuses_what_it_cannot_read(text, message):
    with pytest.raises(UserError, match=message):
        Topology.parse(text)


def test_a_ring_counts_twice_and_dimensions_add_up():
    link = CHIPS["v5p"].link
    found = links("v5p:4x4x4", "fsdp=16,tensor=4")
    assert found["tensor"].bandwidth == 2 * link, "a ring of 4, both ways"
    assert found["fsdp"].bandwidth == 4 * link, "two rings"
    assert list(found) == ["fsdp", "tensor"], "axes of one device travel over nothing"


def test_what_is_no_whole_ring_is_a_line_and_strides_share_links():
    link = CHIPS["v5e"].link
    found = links("v5e:16x16", "fsdp=64,tensor=4")
    assert found["tensor"].bandwidth == link, "a part of a dimension is open"
    assert found["fsdp"].bandwidth == 2 * link + link / 4, "the other ring, and every fourth chip of this dimension"
    assert links("v5e:8x8", "fsdp=8,tensor=8")["tensor"].bandwidth == link, "only 16 close"
    assert links("v5p:2x4x4", "fsdp=8,tensor=4")["tensor"].bandwidth == CHIPS["v5p"].link, "only whole cubes close"


def test_only_an_axis_over_all_of_a_cube_is_the_whole_torus():
    assert links("v5p:4x4x4", "fsdp=64")["fsdp"].whole_torus
    assert not links("v5p:4x4x4", "fsdp=16,tensor=4")["fsdp"].whole_torus
    assert not links("v5e:16x16", "fsdp=256")["fsdp"].whole_torus


def test_a_node_uses_nvlink_and_its_members_share_the_network():
    chip = CHIPS["h100"]
    found = links("h100:4x8", "data=4,fsdp=2,tensor=4")
    assert found["tensor"].bandwidth == found["fsdp"].bandwidth == chip.link
    assert found["data"].bandwidth == chip.network, "one member in each node"
    assert links("h100:4x8", "fsdp=32")["fsdp"].bandwidth == 8 * chip.network, "eight members in each node"
    assert links("h100:4x8", "fsdp=2,tensor=16")["tensor"].bandwidth == 8 * chip.network


def test_slices_are_joined_by_the_network():
    found = links("2*v5e:16x16", "data=2,fsdp=256")
    assert found["data"].bandwidth == CHIPS["v5e"].network
    assert found["fsdp"].bandwidth == links("v5e:16x16", "fsdp=256")["fsdp"].bandwidth
    across = links("2*v5e:16x16", "fsdp=512")["fsdp"]
    inside = found["fsdp"].bandwidth
    assert across.bandwidth == pytest.approx(1 / (1 / inside + 1 / (256 * CHIPS["v5e"].network))), (
        "one hop, then the other"
    )
    assert (across.network, found["data"].network, found["fsdp"].network) == (True, True, False)


@pytest.mark.parametrize("name", ["v5p:4x4x4", "v5e:16x16", "amber", "2*v5e:4x4", "cpu:8"])
@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "fsdp=8", "pipeline=2,fsdp=2,tensor=2", "tensor=8"])
def test_a_slower_network_is_nowhere_faster(name, mesh):
    full = Topology.parse(name)
    mesh = MeshConfig.parse(mesh + f",{'pipeline' if 'pipeline' not in mesh else 'data'}={full.devices // 8}")
    slow = Topology.parse(f"{full}@0.25").links(mesh.degrees)
    for axis, link in full.links(mesh.degrees).items():
        assert 0 < slow[axis].bandwidth <= link.bandwidth


@pytest.mark.parametrize(
    ("name", "smaller", "larger"),
    [
        ("v5p:4x4x4", ["v5p:2x4x4", "v5p:2x2x4", "v5p:2x2x2", "v5p:2x2x1"], "v5p:4x4x8"),
        ("v5e:16x16", ["v5e:8x16", "v5e:8x8", "v5e:4x8", "v5e:4x4", "v5e:2x4", "v5e:2x2"], "2*v5e:16x16"),
        ("amber:8x4", ["amber:4x4", "amber:2x4", "amber:1x4"], "amber:16x4"),
        ("2*v5e:4x4", ["v5e:4x4", "v5e:2x4", "v5e:2x2"], "4*v5e:4x4"),
        ("cpu:4", ["cpu:2", "cpu:1"], "cpu:8"),
    ],
)
def test_other_sizes_of_a_topology(name, smaller, larger):
    there = Topology.parse(name)
    assert [str(t) for t in there.smaller] == smaller
    assert str(there.larger) == larger
    assert there.larger.devices == 2 * there.devices
    for other in (*there.smaller, there.larger):
        assert Topology.parse(str(other)) == other


def test_of_live_devices():
    assert Topology.of(jax.devices()) == Topology.parse("cpu:8")

    class Unknown:
        device_kind = "abacus"

    with pytest.raises(UserError, match="no figures for 'abacus'"):
        Topology.of([Unknown()])


def test_of_the_devices_of_a_slice():
    class Chip:
        def __init__(self, at, slice_index):
            self.device_kind, self.coords, self.slice_index = "TPU v5", at, slice_index

    boxes = [[(x, y, z) for x in range(2) for y in range(4) for z in range(4)] for _ in range(2)]
    devices = [Chip(at, n) for n, box in enumerate(boxes) for at in box]
    assert Topology.of(devices) == Topology.parse("2*v5p:2x4x4")
    assert Topology.of(devices[:31]).shape == (31, 1, 1), "what is no box counts as a line"


@pytest.mark.parametrize("hosts", [True, False])
def test_of_gpus_by_host_else_by_process(hosts):
    class Gpu:
        def __init__(self, process, host):
            self.device_kind, self.process_index, self.slice_index = "NVIDIA H200", process, host

    devices = [Gpu(n if hosts else n // 8, n // 8 if hosts else None) for n in range(16)]
    assert Topology.of(devices) == Topology.parse("h200:2x8")


def test_every_chip_says_where_its_figures_are_from():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.nominal or "docs.cloud" in chip.source or "NVIDIA" in chip.source
        assert {"bfloat16", "float32"} == chip.flops.keys()
        assert min(*chip.flops.values(), chip.hbm_bytes, chip.hbm_bandwidth, chip.link, chip.network, chip.host) > 0
    assert [c.name for c in CHIPS.values() if c.nominal] == ["cpu"]
    kinds = [k for c in CHIPS.values() for k in c.kinds]
    assert len(kinds) == len(set(kinds))


def test_a_cpu_has_no_peak_to_be_held_against():
    assert topology.peak(jax.devices()) is None


def test_peak_of_a_chip_is_its_data_sheets():
    class Device:
        device_kind, platform = "NVIDIA H200", "gpu"

    assert topology.peak([Device(), Device()]).flops == 2 * 989.4e12
    Device.device_kind = "abacus"
    assert topology.peak([Device()]) is None
