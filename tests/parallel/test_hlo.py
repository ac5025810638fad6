"""The reader of compiled programs, on programs whose communication is known and on lines of other compilers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel import hlo
from parallel.hlo import Array, Collective, Traffic

MESH = {"data": 2, "tensor": 4}


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh, body, shape, spec, out=None):
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(spec,), out_specs=out or spec, check_vma=False)
    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(mapped).lower(argument).compile().as_text()


@pytest.mark.parametrize(
    ("kind", "axis", "body", "held"),
    [
        ("all-gather", "tensor", lambda x: lax.all_gather(x, "tensor", tiled=True).sum(0, keepdims=True), (16, 8)),
        ("all-gather", "data", lambda x: lax.all_gather(x, "data", tiled=True).sum(0, keepdims=True), (8, 8)),
        ("reduce-scatter", "tensor", lambda x: lax.psum_scatter(x * 2, "tensor", tiled=True), (1, 8)),
        ("all-reduce", "data", lambda x: lax.psum(x * 2, "data"), (4, 8)),
        ("all-to-all", "tensor", lambda x: lax.all_to_all(x * 2, "tensor", 0, 1, tiled=True), None),
        (
            "collective-permute",
            "tensor",
            lambda x: lax.ppermute(x * 2, "tensor", [(i, (i + 1) % 4) for i in range(4)]),
            (4, 8),
        ),
    ],
)
def test_reads_every_kind_on_this_machine(mesh, kind, axis, body, held):
    text = compiled(mesh, body, (32, 8), P(("data", "tensor")), P(("data", "tensor")))
    (found,) = hlo.collectives(text, MESH)
    assert (found.kind, found.axes, found.loops) == (kind, (axis,), ())
    assert found.group == (2 if kind == "collective-permute" else MESH[axis])
    if held:
        assert found.bytes == np.prod(held) * 4
    else:  # CPU programs hold the parts of an all-to-all one by one
        assert found.bytes == 4 * 8 * 4


def test_counts_loops_inside_loops(mesh):
    def layer(x, _):
        return jnp.tanh(lax.psum(x, "tensor")), None

    def step(x, _):
        return lax.ppermute(lax.scan(layer, x, None, length=5)[0], "data", [(0, 1), (1, 0)]), None

    text = compiled(mesh, lambda x: lax.scan(step, x, None, length=3)[0], (16, 8), P("data"))
    found = {c.kind: c for c in hlo.collectives(text, MESH)}
    assert found["all-reduce"] == Collective("all-reduce", ("tensor",), 4, (Array("f32", (8, 8)),), (3, 5))
    assert found["collective-permute"].loops == (3,)
    assert hlo.traffic(list(found.values())) == [
        Traffic("all-reduce", ("tensor",), 1, 15, 15 * 256),
        Traffic("collective-permute", ("data",), 1, 3, 3 * 256),
    ]


def test_counts_every_branch(mesh):
    def body(x):
        index = lax.axis_index("data")
        return lax.cond(index == 0, lambda y: lax.psum(y, "tensor"), lambda y: lax.psum(y * 2, "tensor") * 3, x)

    found = hlo.collectives(compiled(mesh, body, (16, 8), P("data")), MESH)
    assert [(c.kind, c.axes, c.executions) for c in found] == [("all-reduce", ("tensor",), 1)] * 2


def test_a_collective_over_both_axes(mesh):
    text = compiled(mesh, lambda x: lax.psum(x, ("data", "tensor")), (16, 8), P("data"), P())
    (found,) = hlo.collectives(text, MESH)
    assert (found.axes, found.group) == (("data", "tensor"), 8)


def test_lists_arrays(mesh):
    text = compiled(mesh, lambda x: jnp.tanh(x @ jnp.ones((8, 24))) @ jnp.ones((24, 8)), (16, 8), P("data"))
    assert Array("f32", (8, 24)) in set(hlo.arrays(text))
    assert not any(a.shape and a.shape[-1] == 25 for a in hlo.arrays(text))
    assert list(hlo.arrays("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[], f8e4m3fn[7])")) == [
        Array("bf16", (2, 3)),
        Array("pred", ()),
        Array("f8e4m3fn", (7,)),
    ]
    assert [Array(t, (3, 5)).nbytes for t in ("s4", "pred", "f8e4m3fn", "bf16", "f32", "c64")] == [
        8, 15, 15, 30, 60, 120,
    ]  # fmt: skip


# ---- other compilers -----------------------------------------------------------------------------------------------


def program(*lines, more=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\n{more}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def groups(text, mesh):
    line = f"%r = f32[8]{{0}} all-reduce(%p), channel_id=1, {text}, use_global_device_ids=true, to_apply=%add"
    (found,) = hlo.collectives(program(line), mesh)
    return found.axes, found.group


@pytest.mark.parametrize(
    ("text", "axes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("tensor",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),  # half of the axis
        ("replica_groups={}", ("data", "tensor"), 8),
        ("replica_groups=[2,4]<=[8]", ("tensor",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("tensor",), 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",), 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", ("data", "tensor"), 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ("tensor",), 4),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",), 2),  # the outer half of one axis of 8
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("tensor",), 4),  # its inner four
    ],
)
def test_reads_groups_in_every_form(text, axes, size):
    assert groups(text, MESH) == (axes, size)


def test_refuses_groups_that_it_cannot_read():
    with pytest.raises(ValueError, match="no groups of devices"):
        groups("replica_groups=everyone", MESH)
    with pytest.raises(ValueError, match="two parts of one axis"):
        groups("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", MESH)


def test_gpu_pairs_start_and_done_and_splits_what_was_merged():
    """As the CUDA compiler of jaxlib 0.10.2 writes it: a tuple of operands and results, and an all-reduce without."""
    text = program(
        "%ag = ((bf16[4,32]{1,0}, bf16[2,8]{1,0}), (bf16[16,32]{1,0}, /*index=1*/bf16[8,8]{1,0})) "
        "all-gather-start(%a, %b), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
        "%agd = (bf16[16,32]{1,0}, bf16[8,8]{1,0}) all-gather-done(%ag)",
        "%rs = ((f32[8,4]{1,0}), f32[2,4]{1,0}) reduce-scatter-start(%c), channel_id=1, "
        "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add",
        "%rsd = f32[2,4]{1,0} reduce-scatter-done(%rs)",
        "%ar = f32[6]{0} all-reduce-start(%d), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add",
        "%ard = f32[6]{0} all-reduce-done(%ar)",
        "%cp = (f32[3]{0}, f32[3]{0}, u32[]) collective-permute-start(%e), channel_id=2, "
        "source_target_pairs={{0,4},{4,0},{1,5},{5,1}}",
        "%cpd = f32[3]{0} collective-permute-done(%cp)",
    )
    assert hlo.collectives(text, MESH) == [
        Collective("all-gather", ("tensor",), 4, (Array("bf16", (16, 32)), Array("bf16", (8, 8))), ()),
        Collective("reduce-scatter", ("tensor",), 4, (Array("f32", (2, 4)),), ()),
        Collective("all-reduce", ("data",), 2, (Array("f32", (6,)),), ()),
        Collective("collective-permute", ("data",), 2, (Array("f32", (3,)),), ()),
    ]


#: A loop as the TPU compiler (libtpu 0.0.42) writes it: how often it runs is only in its condition.
TPU_LOOP = """\
%cond (c: (s32[], bf16[4,2048,2048])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32), metadata={op_name="jit(f)/while"}
  %c = (s32[]{:T(128)}, bf16[4,2048,2048]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt.64 = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%all-reduce-scatter.2.clone.1 (input.9: bf16[4,2048,2048]) -> bf16[4,512,2048] {
  %input.9 = bf16[4,2048,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.37 = bf16[4,2048,2048]{2,1,0:T(8,128)(2,1)} all-reduce(%input.9), channel_id=24, \
replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add.1.clone
  %at = u32[] constant(0)
  ROOT %part = bf16[4,512,2048]{2,1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.37, %at, %at, %at), \
dynamic_slice_sizes={4,512,2048}
}

%body (b: (s32[], bf16[4,2048,2048])) -> (s32[], bf16[4,2048,2048]) {
  %b = (s32[]{:T(128)}, bf16[4,2048,2048]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,2048,2048]{2,1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %fusion.829 = bf16[4,512,2048]{2,1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2.clone.1
  ROOT %out = (s32[]{:T(128)}, bf16[4,2048,2048]{2,1,0:T(8,128)(2,1)}) tuple(%b, %x)
}
"""


def tpu_loop(carry, more=TPU_LOOP):
    return program(
        "%zero = s32[]{:T(128)} constant(2)",
        "%copy.327 = s32[]{:T(128)} copy(%zero)",
        f"%tuple.145 = (s32[]{{:T(128)}}, bf16[4,2048,2048]{{2,1,0:T(8,128)(2,1)}}) {carry}",
        "%while.44 = (s32[]{:T(128)}, bf16[4,2048,2048]{2,1,0:T(8,128)(2,1)}) while(%tuple.145), condition=%cond, "
        'body=%body, metadata={op_name="jit(f)/while"}',
        more=more,
    )


def test_tpu_reduce_scatter_and_trips():
    (found,) = hlo.collectives(tpu_loop("tuple(%copy.327, /*index=1*/%p)"), MESH)
    part = Array("bf16", (4, 512, 2048))
    assert found == Collective("reduce-scatter", ("tensor",), 4, (part,), (30,))  # from 2 to 32
    assert found.bytes == 30 * 4 * 512 * 2048 * 2


@pytest.mark.parametrize(
    ("carry", "more"),
    [
        ("custom-call(%p)", TPU_LOOP),
        ("tuple(%p, %p)", TPU_LOOP.replace("direction=LT", "direction=NE")),
        ("tuple(%copy.327, %p)", TPU_LOOP.replace("constant(32)", "add(%c, %c)")),
    ],
)
def test_refuses_a_loop_whose_trips_it_cannot_read(carry, more):
    with pytest.raises(ValueError, match=r"all-reduce\.37 is in a loop whose trips are not known"):
        hlo.collectives(tpu_loop(carry, more), MESH)


def test_reads_a_pipelined_collective_once():
    """One collective that is spread over several fusions, all of them with its channel and chain."""
    start = (
        "all-gather(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, "
        'backend_config={"async_collective_config":{"chain_id":"3"}}'
    )
    text = program(f"%a = f32[32]{{0}} {start}", f"%b = f32[32]{{0}} {start}", f"%c = f32[32]{{0}} {start}".replace(
        '"3"', '"4"'
    ))  # fmt: skip
    assert [c.bytes for c in hlo.collectives(text, MESH)] == [128, 128]


def test_follows_an_asynchronous_computation_once():
    inner = (
        "%wrapped (q: f32[8]) -> f32[2] {\n  %q = f32[8]{0} parameter(0)\n"
        "  ROOT %rs = f32[2]{0} reduce-scatter(%q), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, "
        "to_apply=%add\n}\n"
    )
    text = program(
        "%s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[8]{0}), f32[2]{0}, u32[]) async-update(%s), calls=%wrapped",
        "%d = f32[2]{0} async-done(%u), calls=%wrapped",
        more=inner,
    )
    assert [(c.kind, c.bytes) for c in hlo.collectives(text, MESH)] == [("reduce-scatter", 8)]


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%one, %two}", "true_computation=%one, false_computation=%two"],
)
def test_follows_conditionals(branches):
    def computation(name, count):
        line = "all-reduce(%q), channel_id=1, replica_groups={}, to_apply=%add"
        lines = "\n".join(f"  %r{n} = f32[8]{{0}} {line}" for n in range(count))
        return f"%{name} (q: f32[8]) -> f32[8] {{\n{lines}\n}}\n"

    text = program(
        f"%c = f32[8]{{0}} conditional(%i, %p, %p), {branches}", more=computation("one", 1) + computation("two", 2)
    )
    assert len(hlo.collectives(text, MESH)) == 3


def test_reads_past_a_kernel_whose_attributes_span_lines():
    text = program(
        '%k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="x"',
        '}}, backend_config={"y"}',
        "%r = f32[8]{0} all-reduce(%k), channel_id=1, replica_groups={}, to_apply=%add",
    ).replace("\n  }}", "\n}}")
    assert len(hlo.collectives(text, MESH)) == 1
    assert hlo.custom_calls(text) == {"tpu_custom_call"}
