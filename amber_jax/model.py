"""Amber's forward pass (fact sheet 1.2): parameters and per-shard mathematics, to be run inside the manual region."""

import jax
import jax.numpy as jnp
from flax import nnx

from amber_jax.config import AmberConfig
from layers import attention, rotary, stack, vocabulary
from layers.attention import Cache, Documents, Slots
from layers.decoder import Block, Decoder
from layers.mlp import SwiGLU
from layers.norms import RMSNorm
from layers.params import param
from layers.region import Region


class Attention(nnx.Module):
    """Causal attention with rotary positions over all head dimensions; no biases. Of grouped keys and values each head
    serves several heads of queries, one after the other, as in Llama 2 and 3; the cache holds them repeated.
    """

    def __init__(self, config: AmberConfig, key: jax.Array):
        init = jax.nn.initializers.normal(config.init_std)
        shape = (config.embed, config.num_heads, config.head_dim)
        q, k, v, o = jax.random.split(key, 4)
        self.wq = param(init, q, shape, ("embed", "heads", "head_dim"))
        grouped = config.kv_heads < config.num_heads
        fewer = (config.embed, config.kv_heads, config.head_dim)
        self.wk = param(init, k, fewer, ("embed", "kv_heads" if grouped else "heads", "head_dim"))
        self.wv = param(init, v, fewer, ("embed", "kv_heads" if grouped else "heads", "head_dim"))
        self.wo = param(init, o, (*shape[1:], config.embed), ("heads", "head_dim", "embed"))
        self.rope_base, self.rope_scaling = config.rope_base, config.rope_scaling
        self.group = config.num_heads // config.kv_heads

    def __call__(
        self, x: jax.Array, region: Region, cache: Cache | None, reach: Slots | Documents | None
    ) -> tuple[jax.Array, Cache | None]:
        """Residual-stream shape in and out, and the cache with this call's keys and values."""
        x = region.enter(x)  # [B, S, D]
        q, k, v = (jnp.einsum("bsd,dhk->bshk", x, w[...]) for w in (self.wq, self.wk, self.wv))
        width = q.shape[3]
        cos, sin = rotary.angles(attention.positions(q.shape[1], reach), width, self.rope_base, self.rope_scaling)
        q, k = rotary.rotate_half(q, cos, sin), rotary.rotate_half(k, cos, sin)
        k, v = (attention.repeat_heads(x, q.shape[2], self.group) for x in (k, v))
        out, cache = attention.causal(q, k, v, width**-0.5, region.attention, cache, reach)
        return region.leave(jnp.einsum("bshk,hkd->bsd", out, self.wo[...])), cache


def block(config: AmberConfig, key: jax.Array) -> Block:
    """One decoder layer."""
    norm1, attention_key, norm2, mlp = jax.random.split(key, 4)
    return Block(
        RMSNorm(config.embed, config.norm_eps, norm1),
        Attention(config, attention_key),
        RMSNorm(config.embed, config.norm_eps, norm2),
        SwiGLU(config.embed, config.mlp, jax.nn.initializers.normal(config.init_std), mlp),
    )


def build(config: AmberConfig, key: jax.Array) -> Decoder:
    """The whole model, its weights a pure function of config and key."""
    init = jax.nn.initializers.normal(config.init_std)
    embedding, layers, norm, head = jax.random.split(key, 4)
    return Decoder(
        vocabulary.Embedding(config.vocab_size, config.embed, init, embedding, config.padding_id, multiplier=1.0),
        stack.stack(lambda k: block(config, k), config.num_layers, layers),
        RMSNorm(config.embed, config.norm_eps, norm),
        vocabulary.TiedHead(1.0)
        if config.tied_embeddings
        else vocabulary.Head(config.embed, config.vocab_size, init, head),
    )
