"""Causal attention: the reference softmax in plain XLA (no Triton, no custom call), and the key/value cache.

Faster kernels will be chosen from the mesh's platform; this one stays as the reference that they are tested against.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

#: Added nowhere, only written over masked scores. Finite, so that a fully masked row gives no NaN.
_MASKED = -1e30


class Cache(NamedTuple):
    """Keys and values of earlier positions (or their specs), one layer's or, with a leading L, all layers'.

    Each [B, T, H, K].
    """

    key: Any
    value: Any


class Slots(NamedTuple):
    """Where new positions go in a cache, the same for all layers (arrays, or their specs)."""

    next: Any
    """int32 scalar: first slot that is written now."""
    start: Any
    """int32 [B]: first slot that holds a real token; those before it are left padding."""

    def positions(self, length: int) -> jax.Array:
        """True position of each of ``length`` new slots, [B, length]; 0 where there is padding."""
        return jnp.maximum(self.next + jnp.arange(length) - self.start[:, None], 0)

    def mask(self, length: int, slots: int) -> jax.Array:
        """bool [B, length, slots]: which cache slots each new position may read."""
        slot = jnp.arange(slots)
        causal = slot <= self.next + jnp.arange(length)[:, None]
        return causal & (slot >= self.start[:, None, None])


def causal_mask(length: int) -> jax.Array:
    """bool [1, S, S]: position q may read position k <= q."""
    index = jnp.arange(length)
    return (index[:, None] >= index)[None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """Softmax attention, scores and softmax in float32.

    Args:
        q: [B, S, H, K].
        k: [B, T, H, K].
        v: [B, T, H, K].
        mask: bool [B or 1, S, T], True where a query may read a key.
        scale: multiplies the scores.

    Returns:
        [B, S, H, K] in v's dtype.
    """
    scores = jnp.einsum("bshk,bthk->bhst", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, _MASKED), axis=-1)
    return jnp.einsum("bhst,bthk->bshk", weights.astype(v.dtype), v)


def positions(length: int, slots: Slots | None) -> jax.Array:
    """True positions [B or 1, S] of new tokens: from 0 without a cache."""
    return jnp.arange(length)[None] if slots is None else slots.positions(length)


def causal(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, cache: Cache | None, slots: Slots | None
) -> tuple[jax.Array, Cache | None]:
    """Attention of new positions, all [B, S, H, K], to themselves and to the cache; and the cache with them in it."""
    length = q.shape[1]
    if cache is None or slots is None:
        return attend(q, k, v, causal_mask(length), scale), cache
    cache = append(cache, k, v, slots)
    return attend(q, *cache, slots.mask(length, cache.key.shape[1]), scale), cache


def append(cache: Cache, k: jax.Array, v: jax.Array, slots: Slots) -> Cache:
    """The cache with new keys and values [B, S, H, K] written from slot ``slots.next`` on."""
    at = (0, slots.next, 0, 0)
    return Cache(
        lax.dynamic_update_slice(cache.key, k.astype(cache.key.dtype), at),
        lax.dynamic_update_slice(cache.value, v.astype(cache.value.dtype), at),
    )
