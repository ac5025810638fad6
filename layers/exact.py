"""Operations whose gradients are sums over tokens, taken in float32 whatever the compute dtype.

A gradient has the dtype of what it belongs to, so that by itself JAX sums thousands of tokens' contributions to a
bfloat16 weight in bfloat16, which has 8 bits: a token that stands 1,000 times in a batch loses a tenth of its gradient.
Here contributions are widened before they are summed, and the sum is rounded once. In float32 JAX's own gradients are
as exact and were 8 % of a step faster on CPU (`bench/step.py`), so that they are taken there.
"""

import functools

import jax
import jax.numpy as jnp

from parallel.collectives import zeros_like


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table: [V, D], int [...] below V -> [..., D]."""
    return table[ids] if table.dtype == jnp.float32 else _lookup(table, ids)


@jax.custom_vjp
def _lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids]


def _lookup_forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table[ids], (ids, table)


def _lookup_backward(kept: tuple[jax.Array, jax.Array], ct: jax.Array) -> tuple[jax.Array, None]:
    ids, table = kept  # of the table only shape and dtype are looked at
    return zeros_like(table.shape, ct).at[ids].add(ct.astype(jnp.float32)).astype(table.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """``y + bias`` in y's dtype, ``bias`` float32 with the last dimensions: [..., *D] + [*D] -> [..., *D]."""
    return (y + bias).astype(y.dtype)


def _add_bias_forward(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return add_bias(y, bias), bias


def _add_bias_backward(bias: jax.Array, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = tuple(range(ct.ndim - bias.ndim))
    return ct, jnp.sum(ct, axis=rows, dtype=jnp.float32).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def project(equation: str, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """``einsum`` of a float32 stream, rounded to the matrix's dtype, and a matrix; float32, and so is x's gradient.

    For the head: the gradient of what goes into it is summed over all tokens in the last norm, and largely cancels.
    Rounded to bfloat16 before that, it left the norm's gradient 4.5 % off.

    Args:
        equation: with two operands, ``bsd,dv->bsv``.
        x: float32.
        matrix: in the compute dtype.
    """
    if matrix.dtype == jnp.float32:
        return jnp.einsum(equation, x, matrix)
    return _project(equation, x, matrix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(equation: str, x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x.astype(matrix.dtype), matrix, preferred_element_type=jnp.float32)


def _project_forward(equation: str, x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project(equation, x, matrix), (x.astype(matrix.dtype), matrix)


def _project_backward(equation: str, kept: tuple[jax.Array, jax.Array], ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    narrow, matrix = kept
    inputs, out = equation.split("->")
    of_x, of_matrix = inputs.split(",")
    dx = jnp.einsum(f"{out},{of_matrix}->{of_x}", ct, matrix, preferred_element_type=jnp.float32)
    dmatrix = jnp.einsum(f"{out},{of_x}->{of_matrix}", ct, narrow, preferred_element_type=jnp.float32)
    return dx, dmatrix.astype(matrix.dtype)


_project.defvjp(_project_forward, _project_backward)
