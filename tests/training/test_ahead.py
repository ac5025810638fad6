"""Train steps compiled for slices that are not here, in processes as `plan --verify` starts them."""

import dataclasses
import sys
from pathlib import Path

import pytest

from amber_jax.recipes import amber_tiny
from errors import UserError
from parallel import compiler
from parallel.compiler import Request
from parallel.hlo import Traffic
from parallel.mesh import MeshConfig
from training import ahead

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from errors import UserError
from models import families
from training import ahead
try:
    sys.exit(ahead.serve(families()))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""

needs_libtpu = pytest.mark.skipif(compiler.missing("v5e") is not None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(compiler.missing("h100") is not None, reason="the CUDA plugin is not installed")


def config(mesh, model=None, data=None, **execution):
    recipe = amber_tiny()
    return dataclasses.replace(
        recipe,
        mesh=MeshConfig.parse(mesh),
        model=dataclasses.replace(recipe.model, **(model or {"num_layers": 2})),
        data=dataclasses.replace(recipe.data, **(data or {})),
        execution=dataclasses.replace(recipe.execution, compute_dtype="bfloat16", **execution),
    )


def check(tmp_path, *pairs):
    requests = [Request(c.to_dict(), topology) for c, topology in pairs]
    command = [sys.executable, "-c", CHILD, str(ROOT)]
    return compiler.check(requests, command, [ROOT / "training"], tmp_path, timeout_s=200)


@needs_libtpu
def test_a_tpu_says_what_a_step_needs(tmp_path):
    """Three in one go: one that compiles, one that the mesh does not divide, one that is too large."""
    too_large = config(
        "fsdp=8",
        model={"num_layers": 1, "num_heads": 32, "head_dim": 8, "context_length": 2048},
        data={"global_batch": 512, "sequence_length": 2048},
        attention="reference",
    )
    fits, odd, refused = check(
        tmp_path,
        (config("fsdp=4,tensor=2"), "v5e:2x4"),
        (config("fsdp=1,tensor=8"), "v5e:2x4"),
        (too_large, "v5e:2x4"),
    )
    parameters = config("fsdp=8").model.num_parameters
    assert fits.compiled
    assert fits.plan.mesh == MeshConfig(fsdp=4, tensor=2)
    assert set(fits.versions) == {"jax", "jaxlib", "flax", "optax", "libtpu"}
    assert fits.argument_bytes > 3 * 4 * parameters / 8  # weights and two moments, float32; and TPU's padding
    assert fits.peak_bytes > fits.argument_bytes
    assert fits.temp_bytes > 0
    assert fits.flops > config("fsdp=8").model.train_flops_per_token(256, causal=False) * 16 * 256 / 8 * 0.99
    assert {(t.kind, t.axes) for t in fits.collectives} >= {("all-gather", ("fsdp",)), ("all-gather", ("tensor",))}
    assert "tpu_custom_call" in fits.kernels  # attention "auto" is splash there

    assert not odd.compiled
    assert "tensor = 8 does not divide the 'heads' dimension" in odd.failed

    assert refused.failed is None
    assert refused.refused.startswith("RESOURCE_EXHAUSTED")
    assert refused.needed_bytes > 15.75 * 2**30
    assert refused.peak_bytes is None


@needs_cuda
def test_a_gpu_says_what_a_step_needs(tmp_path):
    (report,) = check(tmp_path, (config("fsdp=8"), "h100:1x8"))
    assert report.compiled
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= set(report.kernels)
    assert any(t.kind == "all-gather" and t.axes == ("fsdp",) for t in report.collectives)
    assert all(isinstance(t, Traffic) for t in report.collectives)


def test_a_mistake_is_that_request_s_failure(tmp_path):
    wrong = {**config("fsdp=8").to_dict(), "seeds": 1}
    command = [sys.executable, "-c", CHILD, str(ROOT)]
    requests = [Request(config("fsdp=8").to_dict(), "v9:2x4"), Request(wrong, "v5e:2x4")]
    unknown, misspelt = compiler.check(requests, command, [ROOT / "training"], tmp_path, timeout_s=200)
    assert "no compiler for 'v9'" in unknown.failed
    assert "'seeds'" in misspelt.failed


def test_refuses_an_unknown_slice():
    with pytest.raises(UserError, match="no compiler for 'v9'"):
        ahead.compile_ahead(config("fsdp=8"), "v9:2x4")
