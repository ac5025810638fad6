"""Gated feed-forward layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.params import Initializer, param
from layers.region import Region


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` without biases (fact sheet 1.2)."""

    def __init__(self, embed: int, mlp: int, init: Initializer, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        self.gate = param(init, gate, (embed, mlp), ("embed", "mlp"))
        self.up = param(init, up, (embed, mlp), ("embed", "mlp"))
        self.down = param(init, down, (mlp, embed), ("mlp", "embed"))

    def __call__(self, x: jax.Array, region: Region) -> jax.Array:
        """Residual-stream shape in and out; the branch's output, without the residual."""
        x = region.enter(x)  # [B, S, D]
        gate = jnp.einsum("bsd,df->bsf", x, self.gate[...])
        up = jnp.einsum("bsd,df->bsf", x, self.up[...])
        return region.leave(jnp.einsum("bsf,fd->bsd", jax.nn.silu(gate) * up, self.down[...]))
