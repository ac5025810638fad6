"""Splash attention: the flash attention kernel for TPUs that JAX ships (Pallas)."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from parallel.collectives import vary

#: The kernel works on tiles of so many positions and lanes.
_LANES = 128


def causal(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, ids: jax.Array | None, interpret: bool = False
) -> jax.Array:
    """See `layers.attention.Kernel`. ``interpret`` runs the kernel's steps as plain JAX, on any platform, for tests."""

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        with jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else contextlib.nullcontext():
            return _kernel(q, k, v, scale, ids, interpret)

    @jax.custom_vjp
    def call(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        return _unchecked(kernel, q, k, v, ids)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> tuple[jax.Array, Any]:
        return _unchecked(lambda q, k, v, ids: jax.vjp(lambda q, k, v: kernel(q, k, v, ids), q, k, v), q, k, v, ids)

    def backward(pull: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
        # Traced when the context around the forward pass is closed.
        with jax.default_matmul_precision("highest") if ct.dtype == jnp.float32 else contextlib.nullcontext():
            return *_unchecked(lambda pull, ct: pull(ct), pull, ct), None

    call.defvjp(forward, backward)
    return call(q, k, v, ids)


def obstacle(platform: str, dtype: jnp.dtype, head_dim: int, length: int) -> str | None:
    """Why it cannot run there, or None. Any float dtype and width: libtpu 0.0.42 compiled widths of 32 to 256 for v5e,
    those that are no multiple of 128 too.
    """
    del dtype, head_dim
    if platform != "tpu":
        return f"needs a TPU, this mesh is on {platform}"
    if length % _LANES:
        return f"takes lengths that are a multiple of {_LANES}, not {length}"
    return None


def _kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, ids: jax.Array | None, interpret: bool
) -> jax.Array:
    # Importing it costs a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads = q.shape[1:3]
    block = max(b for b in range(_LANES, 4 * _LANES + 1, _LANES) if length % b == 0)
    mask = splash_attention_mask.CausalMask((length, length))
    mha = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel has no scale of its own
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, H, S, K]
    segments = None if ids is None else splash_attention_kernel.SegmentIds(ids, ids)
    return jnp.swapaxes(jax.vmap(mha)(q, k, v, segments), 1, 2)


def _unchecked(f: Callable[..., Any], *args: Any) -> Any:
    """``f(*args)`` without the types that say over which mesh axes values vary: the kernel does not know them.

    Calls `f` in a nested `jax.shard_map` over no axis, with ``check_vma=False``; its results vary as the arguments do
    together. Not to be differentiated: the caller says the derivative, and calls that in here as well.
    """

    def plain(*args: Any) -> Any:
        return f(*jax.tree.map(lambda x: x * 1, args))  # any operation drops the type

    axes = sorted({a for x in jax.tree.leaves(args) for a in jax.typeof(x).mat.varying})
    out = jax.shard_map(plain, in_specs=PartitionSpec(), out_specs=PartitionSpec(), axis_names=set(), check_vma=False)(
        *args
    )
    return jax.tree.map(lambda x: vary(x, axes), out)
