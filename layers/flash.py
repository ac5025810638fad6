"""Flash attention in plain `lax`: exact causal attention in memory linear in the length, on every platform, no Triton.

Dao et al. 2022 (arXiv:2205.14135) and 2023 (arXiv:2307.08691): scores exist one block at a time, the softmax is
rescaled as blocks come, and the backward pass makes each block again from the saved log of the softmax's denominator.
Blocks above the diagonal are never visited: one `lax.scan` runs over the list of the others, whose length is in the
program for all to count. Blocks are sliced from arrays as they are, and the loop's accumulators become the results.

In equations b is a row, h a head, d its width; q and k are the positions of a block of queries and of one of keys.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: Largest block of positions. Of 128, 256 and 512 the quickest at S=2048, H=2, K=128, float32, forward and backward:
#: 147, 143 and 147 ms of processor time (2 cores of an x86 machine, 2026-11-24; the differences are near the noise).
BLOCK = 256

_Three = tuple[jax.Array, jax.Array, jax.Array]

#: Written over masked scores. Finite, so that the difference of two of them is no NaN.
_MASKED = -1e30


class _Inputs(NamedTuple):
    """What both passes read; S is a whole number of blocks."""

    q: jax.Array
    """[B, S, H, K]; k and v too."""
    k: jax.Array
    v: jax.Array
    ids: jax.Array | None
    """[B, S]: the document of each position."""


def causal(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, ids: jax.Array | None) -> jax.Array:
    """See `layers.attention.Kernel`. Any length: the last block is padded at its end, where no real position reads."""
    length = q.shape[1]
    count = math.ceil(length / BLOCK)
    block = math.ceil(length / count)  # as equal as they can be: least padding
    rest = (0, count * block - length)
    q, k, v = (jnp.pad(x, ((0, 0), rest, (0, 0), (0, 0))) for x in (q, k, v))
    ids = None if ids is None else jnp.pad(ids, ((0, 0), rest))
    return _flash(scale, block, _Inputs(q, k, v, ids))[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(scale: float, block: int, inputs: _Inputs) -> jax.Array:
    return _forward(scale, block, inputs)[0]


def _forward(scale: float, block: int, inputs: _Inputs) -> tuple[jax.Array, tuple[_Inputs, jax.Array, jax.Array]]:
    """The result [B, S, H, K]; and with the inputs and itself the log of each softmax's denominator, [B, H, S]."""
    q, _, v, _ = inputs
    at, put = functools.partial(_at, block), functools.partial(_put, block)

    def step(carry: _Three, pair: tuple[jax.Array, jax.Array]) -> tuple[_Three, None]:
        i, j = pair
        top, total, out = carry
        scores = _scores(scale, block, inputs, i, j)
        old_top = at(top, i, 2)
        new_top = jnp.maximum(old_top, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(old_top - new_top)
        mixed = _dot("bhqk,bkhd->bqhd", weights.astype(v.dtype), at(v, j, 1))
        total = put(total, at(total, i, 2) * shrink + jnp.sum(weights, axis=-1), i, 2)
        out = put(out, at(out, i, 1) * _per_position(shrink) + mixed, i, 1)
        return (put(top, new_top, i, 2), total, out), None

    zeros = jnp.zeros_like(jnp.swapaxes(q[..., 0], 1, 2), jnp.float32)
    start = (zeros + _MASKED, zeros, jnp.zeros_like(q, jnp.float32))
    (top, total, out), _ = lax.scan(step, start, _pairs(q.shape[1] // block))
    out = (out / _per_position(total)).astype(v.dtype)
    return out, (inputs, out, top + jnp.log(total))


def _backward(
    scale: float, block: int, residuals: tuple[_Inputs, jax.Array, jax.Array], ct: jax.Array
) -> tuple[_Inputs]:
    inputs, out, log_total = residuals
    q, k, v, _ = inputs
    at, put = functools.partial(_at, block), functools.partial(_put, block)
    inner = jnp.swapaxes(jnp.sum(out.astype(jnp.float32) * ct.astype(jnp.float32), axis=-1), 1, 2)  # [B, H, S]

    def step(carry: _Three, pair: tuple[jax.Array, jax.Array]) -> tuple[_Three, None]:
        i, j = pair
        dq, dk, dv = carry
        weights = jnp.exp(_scores(scale, block, inputs, i, j) - at(log_total, i, 2)[..., None])
        dweights = _dot("bqhd,bkhd->bhqk", at(ct, i, 1), at(v, j, 1))
        dscores = (weights * (dweights - at(inner, i, 2)[..., None]) * scale).astype(q.dtype)
        dq = put(dq, at(dq, i, 1) + _dot("bhqk,bkhd->bqhd", dscores, at(k, j, 1)), i, 1)
        dk = put(dk, at(dk, j, 1) + _dot("bhqk,bqhd->bkhd", dscores, at(q, i, 1)), j, 1)
        dv = put(dv, at(dv, j, 1) + _dot("bhqk,bqhd->bkhd", weights.astype(v.dtype), at(ct, i, 1)), j, 1)
        return (dq, dk, dv), None

    dq, dk, dv = (jnp.zeros_like(x, jnp.float32) for x in (q, k, v))
    (dq, dk, dv), _ = lax.scan(step, (dq, dk, dv), _pairs(q.shape[1] // block))
    return (_Inputs(dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None),)


_flash.defvjp(_forward, _backward)


def _pairs(count: int) -> tuple[jax.Array, jax.Array]:
    """Blocks (i of queries, j of keys) on and under the diagonal. In each row the diagonal is first: every position
    reads itself, so that its largest score is real from then on, whatever documents leave of the other blocks.
    """
    i, j = np.array([(i, j) for i in range(count) for j in (i, *range(i))], np.int32).T
    return jnp.asarray(i), jnp.asarray(j)


def _scores(scale: float, block: int, inputs: _Inputs, i: jax.Array, j: jax.Array) -> jax.Array:
    """float32 [B, H, b, b] of the queries of block i and the keys of block j, masked."""
    q, k, _, ids = inputs
    scores = _dot("bqhd,bkhd->bhqk", _at(block, q, i, 1), _at(block, k, j, 1)) * scale
    index = jnp.arange(block)
    mask = (i - j) * block + index[:, None] >= index
    if ids is not None:
        mask = mask & (_at(block, ids, i, 1)[:, None, :, None] == _at(block, ids, j, 1)[:, None, None, :])
    return jnp.where(mask, scores, _MASKED)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Product accumulated in float32. Precision is said here: the backward pass is traced when a context around the
    forward pass (`layers.region.Region.precision`) is closed.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _per_position(x: jax.Array) -> jax.Array:
    """[B, H, S] -> [B, S, H, 1]."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def _at(block: int, x: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _put(block: int, x: jax.Array, part: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, i * block, axis)
