"""All kernels compute the same attention, inside the manual region, with and without documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from errors import UserError
from layers import attention, flash, splash
from layers.attention import Documents, Slots, documents
from parallel import axes
from parallel.mesh import MeshConfig

ON_CPU = {  # "cudnn" needs a GPU even to be traced
    "flash": attention.KERNELS["flash"],
    "splash": functools.partial(splash.causal, interpret=True),
}


def inputs(rows, length, heads, width):
    """q, k, v and a cotangent."""
    return np.random.default_rng(0).standard_normal((4, rows, length, heads, width), np.float32)


def value_and_gradients(kernel, scale, ids, q, k, v, ct):
    out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, scale, ids), q, k, v)
    return out, *pull(ct)


def assert_close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def in_region(mesh, f, results):
    """``f(ids, *arrays)`` with rows over ``data`` and heads over ``tensor``, types checked."""
    row, whole = axes.spec(mesh, "batch", "position"), axes.spec(mesh, "batch", "position", "heads", "head_dim")

    def region(ids, *arrays):
        specs = (row, *(whole for _ in arrays))
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=(whole,) * results, check_vma=True)(ids, *arrays)

    return jax.jit(region)


@pytest.mark.parametrize(
    ("name", "length", "width", "mesh", "packed"),
    [
        ("flash", 7, 8, "data=2,tensor=2", False),  # less than a block
        ("flash", 515, 5, "data=2,tensor=2", True),  # three blocks, padded
        ("flash", 512, 16, "data=1", False),
        ("splash", 128, 40, "data=2", False),
        ("splash", 640, 128, "tensor=2", True),  # five blocks
    ],
)
def test_kernels_equal_the_reference(mesh_of, name, length, width, mesh, packed):
    arrays = inputs(2, length, 2, width)
    ids = np.sort(np.random.default_rng(1).integers(0, 5, (2, length), np.int32)) if packed else None
    scale = 1 / width if packed else width**-0.5  # Crystal's and Amber's
    expected = jax.jit(functools.partial(value_and_gradients, attention.reference, scale))(ids, *arrays)
    step = functools.partial(value_and_gradients, ON_CPU[name], scale)
    assert_close(in_region(mesh_of(mesh), step, 4)(ids, *arrays), expected)


@pytest.mark.parametrize("name", ON_CPU)
def test_bfloat16_stays_near_the_reference_in_float32(mesh_of, name):
    arrays = [x.astype(jnp.bfloat16) for x in inputs(1, 128, 1, 32)]
    step = functools.partial(value_and_gradients, ON_CPU[name], 0.3)
    got = in_region(mesh_of("data=1"), step, 4)(None, *arrays)
    exact = jax.jit(functools.partial(value_and_gradients, attention.reference, 0.3))
    expected = exact(None, *(x.astype(np.float32) for x in arrays))
    assert_close(got, [np.asarray(x, jnp.bfloat16) for x in expected], tolerance=2e-2)


@pytest.mark.parametrize("kernel", [attention.reference, flash.causal])
def test_packed_equals_unpacked(kernel):
    run = jax.jit(functools.partial(value_and_gradients, kernel, 0.3))
    arrays = inputs(3, 100, 2, 8)
    alone = run(None, *arrays)
    packed = run(np.arange(300, dtype=np.int32)[None] // 100, *(x.reshape(1, 300, 2, 8) for x in arrays))
    assert_close([x.reshape(3, 100, 2, 8) for x in packed], alone)


def test_the_end_token_closes_its_document():
    tokens = np.array([[5, 0, 6, 7, 0, 0, 8], [5, 6, 7, 8, 9, 9, 0]], np.int32)
    ids = jax.jit(documents, static_argnums=1)(tokens, 0).ids
    assert ids.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0] * 7]
    assert ids.dtype == jnp.int32


def test_reach_is_slots_or_documents():
    q, k, v, _ = inputs(2, 6, 1, 4)
    reach = Documents(np.array([[0, 0, 0, 1, 1, 1]] * 2, np.int32))
    causal = jax.jit(attention.causal, static_argnums=(3, 4))
    packed, none = causal(q, k, v, 0.5, "flash", None, reach)
    alone, _ = causal(q[:, 3:], k[:, 3:], v[:, 3:], 0.5, "reference", None, None)
    assert none is None
    assert_close([packed[:, 3:]], [alone])
    positions = jax.jit(attention.positions, static_argnums=0)
    assert positions(6, reach).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert positions(2, Slots(np.int32(4), np.array([0, 3], np.int32))).tolist() == [[4, 5], [1, 2]]


def test_flash_visits_no_block_above_the_diagonal():
    arrays = inputs(1, 4 * flash.BLOCK, 1, 8)
    program = str(jax.make_jaxpr(functools.partial(value_and_gradients, flash.causal, 1.0, None))(*arrays))
    assert program.count(" scan[") == 2
    assert program.count("length=10\n") == 2


@pytest.mark.parametrize("name", ON_CPU)
def test_float32_is_multiplied_as_float32_in_the_backward_pass_too(mesh_of, name):
    def kernel(*args):  # the context that the region puts around the forward pass only
        with jax.default_matmul_precision("highest"):
            return ON_CPU[name](*args)

    step = in_region(mesh_of("data=1"), functools.partial(value_and_gradients, kernel, 1.0), 4)
    program = str(step.trace(None, *inputs(1, 128, 1, 128)).jaxpr)
    products = program.count("dot_general[")
    assert products >= 7  # two forward, five backward
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_memory_of_flash_is_under_two_percent_of_the_reference():
    shape = jax.ShapeDtypeStruct((1, 8192, 1, 128), jnp.float32)

    def temporary(kernel):
        step = functools.partial(value_and_gradients, kernel, 0.1, None)
        return jax.jit(step).lower(*(shape,) * 4).compile().memory_analysis().temp_size_in_bytes

    assert temporary(flash.causal) < 0.02 * temporary(attention.reference)


def training_step(name, ids, x):
    """Gradient through two rematerialised layers of attention in a scan."""

    def layer(x, _):
        return x + attention.causal(x, x, x, 0.1, name, None, Documents(ids))[0], None

    def loss(x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, None, length=2)[0].astype(jnp.float32) ** 2)

    return (jax.grad(loss)(x),)


@pytest.mark.parametrize(
    ("platform", "name", "call"),
    [
        *((platform, name, None) for platform in ("cpu", "tpu", "cuda") for name in ("reference", "flash")),
        ("tpu", "splash", "tpu_custom_call"),
        ("cuda", "cudnn", "__cudnn$fmha"),
    ],
)
def test_no_program_calls_triton(mesh_of, monkeypatch, platform, name, call):
    if name == "cudnn":  # let JAX write the call down without a GPU; it is not compiled here
        checks = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
        answers = {"check_cudnn_version": 91000, "check_compute_capability": True}
        for check, answer in {**answers, "is_cuda_compute_capability_equal": False}.items():
            if not hasattr(checks, check):
                pytest.skip(f"this JAX has no {check} to answer for a GPU")
            monkeypatch.setattr(checks, check, lambda *_, answer=answer: answer)
    step = in_region(mesh_of("data=2,tensor=2"), functools.partial(training_step, name), 1)
    ids, x = jax.ShapeDtypeStruct((2, 512), jnp.int32), jax.ShapeDtypeStruct((2, 512, 2, 128), jnp.bfloat16)
    program = step.trace(ids, x).lower(lowering_platforms=(platform,)).as_text()
    assert [found for found in ("tpu_custom_call", "__cudnn$fmha") if found in program] == ([call] if call else [])
    assert "triton" not in program.lower()


@pytest.mark.parametrize("width", [128, 40])
def test_splash_compiles_for_tpu(monkeypatch, width):
    pytest.importorskip("libtpu", reason="the TPU compiler is in the package libtpu (extra: tpu)")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # ask no metadata server what machine this is
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = MeshConfig(data=2, tensor=2).build(devices)
    step = in_region(mesh, functools.partial(training_step, "splash"), 1)
    row, whole = (
        axes.sharding(mesh, *names) for names in (("batch", "position"), ("batch", "position", "heads", "head_dim"))
    )
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=row)
    x = jax.ShapeDtypeStruct((2, 256, 2, width), jnp.bfloat16, sharding=whole)
    program = step.lower(ids, x).compile().as_text()
    # Forward; forward again, for the layers are rematerialised; two kernels backward. Not a third time forward.
    assert program.count('custom_call_target="tpu_custom_call"') == 4


@pytest.mark.parametrize(
    ("where", "best"),
    [
        (("tpu", "bfloat16", 128, 2048), "splash"),
        (("tpu", "float32", 32, 256), "splash"),
        (("tpu", "bfloat16", 128, 2000), "flash"),
        (("gpu", "bfloat16", 128, 2048), "cudnn"),
        (("cuda", "bfloat16", 64, 256), "cudnn"),
        (("cuda", "float32", 128, 2048), "flash"),
        (("gpu", "bfloat16", 256, 2048), "flash"),
        (("gpu", "bfloat16", 128, 2049), "flash"),
        (("cpu", "bfloat16", 128, 2048), "flash"),
        (("cpu", "float32", 32, 256), "reference"),
    ],
)
def test_auto_takes_the_best_that_can_run(where, best):
    platform, dtype, head_dim, length = where
    chosen = functools.partial(attention.select, platform=platform, dtype=dtype, head_dim=head_dim, length=length)
    assert chosen("auto") == best
    assert chosen(best) == best
    assert chosen("flash") == "flash"
    assert chosen("reference") == "reference"


@pytest.mark.parametrize(
    ("name", "where", "message"),
    [
        (
            "cudnn",
            ("cpu", "bfloat16", 128, 2048),
            "needs an NVIDIA GPU, this mesh is on cpu; choose flash or reference",
        ),
        ("cudnn", ("gpu", "float32", 128, 2048), "bfloat16 or float16, not float32"),
        ("cudnn", ("gpu", "bfloat16", 256, 2048), "multiple of 8 up to 128, not 256"),
        ("cudnn", ("gpu", "bfloat16", 100, 2048), "multiple of 8 up to 128, not 100"),
        ("cudnn", ("gpu", "bfloat16", 128, 2049), "even length only, not 2049"),
        ("splash", ("cpu", "bfloat16", 128, 2048), "needs a TPU, this mesh is on cpu"),
        ("splash", ("tpu", "bfloat16", 128, 2000), "multiple of 128, not 2000"),
        ("triton", ("gpu", "bfloat16", 128, 2048), "choose from auto, reference, flash, splash, cudnn"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(name, where, message):
    platform, dtype, head_dim, length = where
    with pytest.raises(UserError, match=message) as error:
        attention.select(name, platform=platform, dtype=dtype, head_dim=head_dim, length=length)
    assert name in str(error.value)
