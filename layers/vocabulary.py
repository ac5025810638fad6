"""The two ends of a language model, with the vocabulary split over ``tensor``: lookup, logits, cross-entropy.

No device ever holds logits over the whole vocabulary while training (design section 7).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from layers.exact import lookup, project
from layers.params import Initializer, param
from layers.region import Region
from parallel.axes import TENSOR
from parallel.collectives import axis_index, pmax, psum, with_float32_gradient


class Embedding(nnx.Module):
    """Token table [V, D], and how it is used at both ends of a model.

    Row ``padding_id`` starts at zero and gets no gradient, as in torch (fact sheet 1.4). ``multiplier`` scales what is
    looked up (muP, fact sheet 1.6).
    """

    def __init__(
        self, vocab: int, embed: int, init: Initializer, key: jax.Array, padding_id: int | None, multiplier: float
    ):
        self.padding_id = padding_id
        self.multiplier = multiplier
        self.table = param(init, key, (vocab, embed), ("vocab", "embed"))
        if padding_id is not None:
            self.table[...] = self.table[...].at[padding_id].set(0.0)

    def __call__(self, tokens: jax.Array, region: Region) -> jax.Array:
        """int32 [B, S] -> residual stream."""
        table = self.table[...]  # [V/tensor, D]
        local, here = _localise(tokens, table.shape[0])
        x = jnp.where(here[..., None], lookup(table, local), 0)
        if self.padding_id is not None:
            x = jnp.where((tokens == self.padding_id)[..., None], lax.stop_gradient(x), x)
        x = region.residual(region.leave(x))
        # In float32: in bfloat16 muP's 14.6 would be 14.625.
        return x if self.multiplier == 1 else (x.astype(jnp.float32) * self.multiplier).astype(x.dtype)


class Head(nnx.Module):
    """Output projection [D, V]."""

    def __init__(self, embed: int, vocab: int, init: Initializer, key: jax.Array):
        self.kernel = param(init, key, (embed, vocab), ("embed", "vocab"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, S, D] -> this device's part of the logits, float32 [B, S, V/tensor]."""
        return project("bsd,dv->bsv", x, self.kernel[...])


class TiedHead(nnx.Module):
    """Output projection by the embedding table, without parameters of its own; ``multiplier`` scales the logits."""

    def __init__(self, multiplier: float):
        self.multiplier = multiplier

    def __call__(self, x: jax.Array, embedding: Embedding) -> jax.Array:
        """float32 [B, S, D] -> this device's part of the logits, float32 [B, S, V/tensor]."""
        return project("bsd,vd->bsv", x, embedding.table[...]) * self.multiplier


def cross_entropy(
    head: Callable[[Any, jax.Array], jax.Array],
    matrix: Any,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunks: int,
) -> jax.Array:
    """Weighted sum of ``-log p(target)`` over rows and positions, float32 scalar, equal on all of ``tensor``.

    Args:
        head: (matrix, [B, S, D]) -> [B, S, V/tensor] logits.
        matrix: what the head multiplies by, ready for use.
        x: float32 [B, S, D], whole rows.
        targets: int32 [B, S].
        weights: float32 [B, S].
        chunks: pieces along S; with more than one, each piece's logits are made again in the backward pass.
    """

    def piece(matrix: Any, x: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(_surprise(head(matrix, x), targets) * weights)

    if chunks == 1:
        return piece(matrix, x, targets, weights)

    wide = jax.tree.map(lambda w: w.astype(jnp.float32), matrix)  # for its gradient: the pieces' sum in float32

    def summed(*args: jax.Array) -> jax.Array:
        return piece(jax.tree.map(with_float32_gradient, matrix, wide), *args)

    step = jax.checkpoint(summed, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    # The carry starts as zeros made from the weights, so that it varies over the same mesh axes as what is added.
    total, _ = lax.scan(
        lambda total, a: (total + step(*a), None),
        jnp.sum(weights * 0.0),
        (_split(x, chunks), _split(targets, chunks), _split(weights, chunks)),
    )
    return total


def scores(
    head: Callable[[Any, jax.Array], jax.Array], matrix: Any, x: jax.Array, targets: jax.Array, chunks: int
) -> tuple[jax.Array, jax.Array]:
    """``log p(target)`` and the likeliest token (the lowest of equal ones) at each position.

    Args:
        head: (matrix, [B, S, D]) -> [B, S, V/tensor] logits.
        matrix: what the head multiplies by, ready for use.
        x: float32 [B, S, D], whole rows.
        targets: int32 [B, S].
        chunks: pieces along S: only one piece's logits exist at a time.

    Returns:
        float32 [B, S] and int32 [B, S], equal on all of ``tensor``.
    """

    def piece(x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = head(matrix, x)
        size, highest = logits.shape[-1], jnp.max(logits, axis=-1)
        likeliest = jnp.argmax(logits, axis=-1) + axis_index(TENSOR) * size
        # Of equal logits the lowest id, as argmax over the whole vocabulary has it.
        first = jnp.where(highest == pmax(highest, TENSOR), -likeliest, -size * lax.axis_size(TENSOR))
        return -_surprise(logits, targets), -pmax(first.astype(jnp.int32), TENSOR)

    if chunks == 1:
        return piece(x, targets)
    found = lax.map(lambda a: piece(*a), (_split(x, chunks), _split(targets, chunks)))  # [chunks, B, S/chunks]
    logprobs, likeliest = (jnp.moveaxis(a, 0, 1).reshape(targets.shape) for a in found)
    return logprobs, likeliest


def _surprise(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``-log p(target)``: [B, S, V/tensor], int32 [B, S] -> float32 [B, S], equal on all of ``tensor``."""
    highest = pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), TENSOR)
    total = psum(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1), TENSOR)
    local, here = _localise(targets, logits.shape[-1])
    chosen = jnp.take_along_axis(logits, local[..., None], axis=-1)[..., 0]
    chosen = psum(jnp.where(here, chosen, 0.0), TENSOR)
    return jnp.log(total) + highest - chosen


def _split(a: jax.Array, chunks: int) -> jax.Array:
    """[B, S, ...] -> [chunks, B, S/chunks, ...]."""
    return jnp.moveaxis(a.reshape(a.shape[0], chunks, a.shape[1] // chunks, *a.shape[2:]), 1, 0)


def _localise(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Ids as indices into this device's slice of ``size`` entries, and which of them lie in it."""
    local = ids - axis_index(TENSOR) * size
    return jnp.clip(local, 0, size - 1), (local >= 0) & (local < size)
