"""CrystalCoder's forward pass (fact sheet 1.6): parameters and per-shard mathematics, run inside the manual region."""

import jax
import jax.numpy as jnp
from flax import nnx

from crystal_jax.config import CrystalConfig
from layers import attention, rotary, stack, vocabulary
from layers.attention import Cache, Documents, Slots
from layers.decoder import Block, Decoder
from layers.exact import add_bias
from layers.norms import LayerNorm
from layers.params import Initializer, param
from layers.region import Region

ZERO = jax.nn.initializers.zeros


def truncated_normal(std: float) -> Initializer:
    """Normal of this deviation cut off at twice that (fact sheet 1.8)."""
    return jax.nn.initializers.truncated_normal(std, lower=-2.0, upper=2.0)


class Attention(nnx.Module):
    """Causal multi-head attention: biases, rotary on the first dimensions of a head, scores divided by its width."""

    def __init__(self, config: CrystalConfig, key: jax.Array):
        init, out = truncated_normal(config.kernel_std), truncated_normal(config.output_std)
        heads = (config.num_heads, config.head_dim)
        q, k, v, o = jax.random.split(key, 4)
        self.wq = param(init, q, (config.embed, *heads), ("embed", "heads", "head_dim"))
        self.wk = param(init, k, (config.embed, *heads), ("embed", "heads", "head_dim"))
        self.wv = param(init, v, (config.embed, *heads), ("embed", "heads", "head_dim"))
        self.wo = param(out, o, (*heads, config.embed), ("heads", "head_dim", "embed"))
        self.bq = param(ZERO, q, heads, ("heads", "head_dim"))
        self.bk = param(ZERO, k, heads, ("heads", "head_dim"))
        self.bv = param(ZERO, v, heads, ("heads", "head_dim"))
        self.bo = param(ZERO, o, (config.embed,), ("replicated",))
        self.rope_base = config.rope_base
        self.rotary_dims = config.rotary_dims

    def __call__(
        self, x: jax.Array, region: Region, cache: Cache | None, reach: Slots | Documents | None
    ) -> tuple[jax.Array, Cache | None]:
        """Residual-stream shape in and out, and the cache with this call's keys and values."""
        x = region.enter(x)  # [B, S, D]
        weights = ((self.wq, self.bq), (self.wk, self.bk), (self.wv, self.bv))
        q, k, v = (add_bias(jnp.einsum("bsd,dhk->bshk", x, w[...]), b[...]) for w, b in weights)
        # By true positions: the original counts from the cache's length, so that left padding shifts them there.
        cos, sin = rotary.angles(attention.positions(q.shape[1], reach), self.rotary_dims, self.rope_base)
        q, k = rotary.rotate_pairs(q, cos, sin), rotary.rotate_pairs(k, cos, sin)
        out, cache = attention.causal(q, k, v, 1 / q.shape[3], region.attention, cache, reach)
        return region.leave(jnp.einsum("bshk,hkd->bsd", out, self.wo[...]), self.bo[...]), cache


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` with biases; the published names are c_fc2 (gate), c_fc (up), c_proj (down)."""

    def __init__(self, config: CrystalConfig, key: jax.Array):
        init, out = truncated_normal(config.kernel_std), truncated_normal(config.output_std)
        gate, up, down = jax.random.split(key, 3)
        self.gate = param(init, gate, (config.embed, config.mlp), ("embed", "mlp"))
        self.up = param(init, up, (config.embed, config.mlp), ("embed", "mlp"))
        self.down = param(out, down, (config.mlp, config.embed), ("mlp", "embed"))
        self.gate_bias = param(ZERO, gate, (config.mlp,), ("mlp",))
        self.up_bias = param(ZERO, up, (config.mlp,), ("mlp",))
        self.down_bias = param(ZERO, down, (config.embed,), ("replicated",))

    def __call__(self, x: jax.Array, region: Region) -> jax.Array:
        """Residual-stream shape in and out; the branch's output, without the residual."""
        x = region.enter(x)  # [B, S, D]
        gate = add_bias(jnp.einsum("bsd,df->bsf", x, self.gate[...]), self.gate_bias[...])
        up = add_bias(jnp.einsum("bsd,df->bsf", x, self.up[...]), self.up_bias[...])
        return region.leave(jnp.einsum("bsf,fd->bsd", jax.nn.silu(gate) * up, self.down[...]), self.down_bias[...])


def block(config: CrystalConfig, key: jax.Array) -> Block:
    """One decoder layer."""
    norm1, attention_key, norm2, mlp = jax.random.split(key, 4)
    return Block(
        LayerNorm(config.embed, config.norm_eps, norm1),
        Attention(config, attention_key),
        LayerNorm(config.embed, config.norm_eps, norm2),
        MLP(config, mlp),
    )


def build(config: CrystalConfig, key: jax.Array) -> Decoder:
    """The whole model, its weights a pure function of config and key."""
    embedding, layers, norm = jax.random.split(key, 3)
    init = truncated_normal(config.init_std)
    return Decoder(
        vocabulary.Embedding(config.vocab_size, config.embed, init, embedding, None, config.embedding_multiplier),
        stack.stack(lambda k: block(config, k), config.num_layers, layers),
        LayerNorm(config.embed, config.norm_eps, norm),
        vocabulary.TiedHead(config.output_multiplier * config.width_multiplier),
    )
