"""A whole language model, assembled from its parts: the same for both families, which differ in the parts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from layers import stack, vocabulary
from layers.attention import Cache, Documents, Slots
from layers.region import Region
from layers.vocabulary import Embedding, Head, TiedHead
from parallel import pipeline


class Block(nnx.Module):
    """Pre-norm decoder layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, attention_norm: Any, attention: Any, mlp_norm: Any, mlp: Any):
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, region: Region, cache: Cache | None, reach: Slots | Documents | None
    ) -> tuple[jax.Array, Cache | None]:
        """Residual stream and cache in and out."""
        y, cache = self.attention(self.attention_norm(x), region, cache, reach)
        x = x + y
        return x + self.mlp(self.mlp_norm(x), region), cache


class Decoder(nnx.Module):
    """Embedding, a stack of blocks, a norm and a head; methods are per-shard mathematics, for the manual region."""

    def __init__(self, embedding: Embedding, layers: nnx.Module, norm: nnx.Module, head: Head | TiedHead):
        """``layers`` is a stack (`layers.stack`) of `Block`."""
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head

    def embed(self, tokens: jax.Array, region: Region) -> jax.Array:
        """int32 [B, S] -> residual stream."""
        return region.use(self.embedding)(tokens, region)

    def stage(
        self,
        x: jax.Array,
        region: Region,
        cache: Cache | None = None,
        reach: Slots | Documents | None = None,
        keep_layers: bool = False,
        repeat: Any = None,
        into: Any = None,
    ) -> tuple[jax.Array, Any, Any]:
        """The layers that this device holds.

        Args:
            x: the residual stream.
            region: how the model runs.
            cache: keys and values of these layers, or None.
            reach: what positions may read (`layers.attention.causal`).
            keep_layers: return the stream after each layer instead of the cache.
            repeat: which of the runs of layers, where the circular schedule has several (`Region.begin`).
            into: where the gradients of all layers go (`layers.stack.run`), or None.

        Returns:
            The residual stream after them; the cache or the streams [layers, ...]; ``into``.
        """
        layers = self.layers
        if repeat is not None:
            layers = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, repeat, 0, keepdims=False), layers)

        def block(layer: Any, x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Any]:
            x, cache = layer(x, region, cache, reach)
            return x, x if keep_layers else cache

        with region.precision():
            return stack.run(block, layers, x, region, cache, into, repeat)

    def blocks(
        self,
        x: jax.Array,
        region: Region,
        cache: Cache | None = None,
        reach: Slots | Documents | None = None,
        keep_layers: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Residual stream -> (residual stream after the last layer of all, cache or per-layer streams [L, ...])."""
        return pipeline.in_turn(lambda x: self.stage(x, region, cache, reach, keep_layers)[:2], x)

    def hidden(
        self,
        tokens: jax.Array,
        region: Region,
        cache: Cache | None = None,
        reach: Slots | Documents | None = None,
        keep_layers: bool = False,
    ) -> tuple[jax.Array, Any]:
        """`embed`, then `blocks`."""
        return self.blocks(self.embed(tokens, region), region, cache, reach, keep_layers)

    def final(self, x: jax.Array, region: Region) -> jax.Array:
        """Residual stream after the final norm."""
        return region.use(self.norm)(x)

    def logits(self, x: jax.Array, region: Region) -> jax.Array:
        """Residual stream -> float32 [B, S, V/tensor]."""
        with region.precision():
            head, matrix = self._head(region)
            return head(matrix, self._into_head(x, region))

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, region: Region) -> jax.Array:
        """Residual stream -> weighted sum of ``-log p(target)`` over this device's rows, float32 scalar."""
        whole = self._into_head(x, region)
        with region.precision():
            return vocabulary.cross_entropy(*self._head(region), whole, targets, weights, region.loss_chunks)

    def scores(self, x: jax.Array, targets: jax.Array, region: Region) -> tuple[jax.Array, jax.Array]:
        """Residual stream -> ``log p(target)`` float32 [B, S], likeliest token int32 [B, S]."""
        whole = self._into_head(x, region)
        with region.precision():
            return vocabulary.scores(*self._head(region), whole, targets, region.loss_chunks)

    def _into_head(self, x: jax.Array, region: Region) -> jax.Array:
        """Residual stream -> whole rows after the final norm, float32, which the head rounds (`layers.exact`)."""
        return region.enter_exact(region.use(self.norm)(x, jnp.float32))

    def _head(self, region: Region) -> tuple[Any, Any]:
        """How logits are made, `(weights, stream) -> logits`, and the weights."""
        if isinstance(self.head, Head):
            return lambda head, x: head(x), region.use(self.head)
        return lambda embedding, x: self.head(x, embedding), region.use(self.embedding)
