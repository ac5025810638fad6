"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

JAX asks for the library while it traces, so that a program with this kernel can only be made where it is installed:
hence the static choice in `layers.attention.select`.
"""

import jax
import jax.numpy as jnp


def causal(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, ids: jax.Array | None) -> jax.Array:
    """See `layers.attention.Kernel`.

    With documents a mask of S x S per row is made and read (cuDNN's lengths per row tell padding, not documents; its
    packed layout is not in JAX's public interface): quadratic memory, one value for all heads. Without, there is none.
    """
    mask = None if ids is None else (ids[:, :, None] == ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True, implementation="cudnn")


def obstacle(platform: str, dtype: jnp.dtype, head_dim: int, length: int) -> str | None:
    """Why it cannot run there, or None (jax 0.10.2, ``jax/_src/cudnn/fused_attention_stablehlo.py``)."""
    if platform not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU, this mesh is on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {dtype}"
    if head_dim > 128 or head_dim % 8:
        return f"takes heads whose width is a multiple of 8 up to 128, not {head_dim}"
    if length % 2:
        return f"takes masks of even length only, not {length}"
    return None
