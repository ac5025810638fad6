"""The count of matrix products against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from parallel.flops import count, count_flops
from training import step as steps
from training.program import Program, abstract_batch, abstract_limits

SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
PRODUCT = 2 * 4**3


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x: x @ x, 1),
        (lambda x: jnp.tanh(x) + 1, 0),
        (lambda x: jax.jit(lambda y: y @ y)(x) @ x, 2),
        (lambda x: lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0], 5),
        (lambda x: lax.scan(lambda c, _: (lax.scan(lambda d, _: (d @ x, None), c, None, length=3)[0], None), x, None,
                            length=5)[0], 15),
        (lambda x: lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x), 2),
        (lambda x: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c + 1, x) @ x, 1),
        (jax.grad(lambda x: jnp.sum(jnp.sin(x @ x))), 3),
        (jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda y: jnp.sin(jnp.sin(y @ x)))(x))), 4),
        (lambda x: jnp.einsum("ij,kj->ik", x, x[:2]), 0.5),
    ],
)  # fmt: skip
def test_counts_products(function, products):
    assert count_flops(function, SQUARE) == products * PRODUCT


def test_counts_a_kernel_by_its_grid():
    from jax.experimental import pallas as pl

    def kernel(x, y):
        y[...] = x[...] @ x[...]

    block = pl.BlockSpec((4, 4), lambda i, j: (i, j))
    call = pl.pallas_call(
        kernel, jax.ShapeDtypeStruct((8, 12), jnp.float32), grid=(2, 3), in_specs=[block], out_specs=block
    )
    assert count_flops(call, jax.ShapeDtypeStruct((8, 12), jnp.float32)) == 6 * PRODUCT


def test_refuses_a_product_in_a_loop_of_unknown_length():
    with pytest.raises(ValueError, match="while loop"):
        count_flops(lambda x: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ c, x), SQUARE)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("mesh", ["data=1", "fsdp=8", "data=2,tensor=4"])
def test_a_step_has_the_flops_of_its_formula(tiny, mesh_of, mesh, remat):
    execution = dataclasses.replace(tiny.execution, remat=remat, attention="reference")
    config = dataclasses.replace(tiny, execution=execution)
    mesh = mesh_of(mesh)
    program = Program.plan(config.resolve(config.synthetic()), mesh)
    config = program.config
    step = steps.make_train_step(
        config.model, program.optimizer, program.learning_rate, config.execution.region, mesh, config.loss_over
    )
    model, tokens = config.model, config.data.tokens_per_step
    expected = tokens * model.train_flops_per_token(config.data.sequence_length, causal=False)
    if remat == "full":  # the layers' forward pass again, but for its last product, whose result nobody reads
        forward = expected / 3 - 2 * tokens * model.embed * model.vocab_size
        expected += forward - 2 * tokens * model.num_layers * model.mlp * model.embed
    assert (
        count(step.trace(program.abstract, abstract_batch(config, mesh), abstract_limits(mesh)).jaxpr)
        == expected / mesh.size
    )
