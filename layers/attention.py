"""Causal attention: which kernel, masks of documents, and the key/value cache with its plain softmax.

`select` chooses a kernel from where it shall run, once, before anything is traced. None of them is Triton. The
reference is the softmax as one would write it; the others are tested against it.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from errors import UserError
from layers import cudnn, flash, splash
from parallel.axes import TENSOR
from parallel.collectives import axis_index

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


class Documents(NamedTuple):
    """Which positions of packed rows belong together: a position reads only those of its own document."""

    ids: Any
    """int32 [B, S] (or its spec), equal where the document is the same."""


def documents(tokens: jax.Array, end: int) -> Documents:
    """Documents of packed rows [B, S], in which the token ``end`` closes a document and belongs to it."""
    closes = (tokens == end).astype(jnp.int32)
    return Documents(jnp.cumsum(closes, axis=1) - closes)


class Kernel(Protocol):
    """Causal self-attention of whole rows: position q reads position k <= q of the same document."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, scale: float, ids: jax.Array | None) -> jax.Array:
        """Softmax in float32.

        Args:
            q: [B, S, H, K], this device's rows and heads; k and v too, all of one dtype.
            k: keys.
            v: values.
            scale: multiplies the scores.
            ids: int32 [B, S], see `Documents`; None = each row is one document.

        Returns:
            [B, S, H, K] in v's dtype.
        """
        ...


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


def reference(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, ids: jax.Array | None) -> jax.Array:
    """See `Kernel`. All scores exist at once: memory is quadratic in the length."""
    index = jnp.arange(q.shape[1])
    mask = (index[:, None] >= index)[None]
    if ids is not None:
        mask = mask & (ids[:, :, None] == ids[:, None, :])
    return attend(q, k, v, mask, scale)


KERNELS: dict[str, Kernel] = {
    "reference": reference,
    "flash": flash.causal,
    "splash": splash.causal,
    "cudnn": cudnn.causal,
}

#: Length from which flash is faster than the reference, forward and backward, float32. The reference's time over that
#: of flash: at 256 0.93 and 0.95, at 512 1.3 and 1.8, at 1024 2.8 and 2.4 (8 or 4 heads of 128; 4 of 32; medians of 15,
#: 2 cores of an x86 machine under other load, 2026-11-24).
FLASH_FROM = 512


def select(name: str, *, platform: str, dtype: str, head_dim: int, length: int) -> str:
    """The kernel to use: ``name``, or of "auto" the best that can run there.

    Args:
        name: "auto" or one of KERNELS.
        platform: of the mesh's devices, in jax's words: cpu, tpu, gpu or cuda.
        dtype: of queries, keys and values.
        head_dim: width of a head.
        length: positions in a row.

    Raises:
        UserError: no such kernel, or it cannot run there.
    """
    where = (platform, jnp.dtype(dtype), head_dim, length)
    obstacles = {"splash": splash.obstacle(*where), "cudnn": cudnn.obstacle(*where)}
    if name == "auto":
        fused = next((kernel for kernel, obstacle in obstacles.items() if obstacle is None), None)
        return fused or ("flash" if length >= FLASH_FROM else "reference")
    if name not in KERNELS:
        raise UserError(f"attention {name!r}: choose from auto, {', '.join(KERNELS)}")
    if obstacles.get(name):
        raise UserError(f"attention {name!r}: {obstacles[name]}; choose flash or reference, or auto")
    return name


def positions(length: int, reach: Slots | Documents | None) -> jax.Array:
    """Positions [B or 1, S] of new tokens: their own in a cache; else from 0 along the row, whatever its documents,
    for rotary scores depend on differences alone.
    """
    return reach.positions(length) if isinstance(reach, Slots) else jnp.arange(length)[None]


def repeat_heads(x: jax.Array, heads: int, group: int) -> jax.Array:
    """Keys or values [B, S, KV, K] for each of this device's query heads: [B, S, heads, K].

    Where ``tensor`` divides the heads of keys and values, this device has those of its own query heads; else it has all
    of the model (`layers.params`), and takes those that its query heads need.

    Args:
        x: keys or values.
        heads: query heads of this device.
        group: query heads that share a head of keys and values.
    """
    if group == 1:
        return x
    if x.shape[2] * group == heads:
        return jnp.repeat(x, group, axis=2)
    mine = axis_index(TENSOR) * heads + jnp.arange(heads)
    return jnp.take(x, mine // group, axis=2)


def causal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    kernel: str,
    cache: Cache | None,
    reach: Slots | Documents | None,
) -> tuple[jax.Array, Cache | None]:
    """Attention of new positions, all [B, S, H, K], to themselves and to the cache; and the cache with them in it.

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: multiplies the scores.
        kernel: a name in KERNELS, for whole rows; with a cache it is always the plain softmax.
        cache: keys and values of earlier positions, or None.
        reach: with a cache, the slots of the new positions; without, the documents of the rows, or None.
    """
    if cache is None:
        return KERNELS[kernel](q, k, v, scale, reach.ids if isinstance(reach, Documents) else None), None
    assert isinstance(reach, Slots), "a cache has slots"
    cache = append(cache, k, v, reach)
    return attend(q, *cache, reach.mask(q.shape[1], cache.key.shape[1]), scale), cache


def append(cache: Cache, k: jax.Array, v: jax.Array, slots: Slots) -> Cache:
    """The cache with new keys and values [B, S, H, K] written from slot ``slots.next`` on."""
    at = (0, slots.next, 0, 0)
    return Cache(
        lax.dynamic_update_slice(cache.key, k.astype(cache.key.dtype), at),
        lax.dynamic_update_slice(cache.value, v.astype(cache.value.dtype), at),
    )
