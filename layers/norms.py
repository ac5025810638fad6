"""Normalisation of the residual stream, in float32 whatever the compute dtype."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from layers.params import param


class RMSNorm(nnx.Module):
    """``x * rsqrt(mean(x^2) + eps) * scale`` in float32, then cast back to x's dtype (fact sheet 1.2)."""

    def __init__(self, width: int, eps: float, key: jax.Array):
        self.eps = eps
        self.scale = param(jax.nn.initializers.ones, key, (width,), ("norm",))

    def __call__(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype or another."""
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(dtype or x.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) * rsqrt(variance + eps) * scale + bias`` in float32, then cast back to x's dtype."""

    def __init__(self, width: int, eps: float, key: jax.Array):
        self.eps = eps
        self.scale = param(jax.nn.initializers.ones, key, (width,), ("norm",))
        self.bias = param(jax.nn.initializers.zeros, key, (width,), ("norm",))

    def __call__(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """[..., D] -> [..., D], in x's dtype or another."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(dtype or x.dtype)
