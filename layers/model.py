"""What the rest of the system asks of a model: an interface for its config and one for the module it builds.

Training, inference and checkpoints take a model by these, never by name.
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar, Protocol

import jax
from flax import nnx

from layers import params
from layers.attention import Cache, Slots
from layers.region import Region


class LanguageModel(Protocol):
    """A decoder whose methods are per-shard mathematics, called inside the manual region."""

    def hidden(
        self,
        tokens: jax.Array,
        region: Region,
        cache: Cache | None = None,
        slots: Slots | None = None,
        keep_layers: bool = False,
    ) -> tuple[jax.Array, Any]:
        """int32 [B, S] -> (residual stream after the last layer, cache or per-layer streams [L, ...])."""

    def loss(self, x: jax.Array, targets: jax.Array, weights: jax.Array, region: Region) -> jax.Array:
        """Residual stream -> weighted sum of ``-log p(target)`` over this device's rows, float32 scalar."""

    def logits(self, x: jax.Array, region: Region) -> jax.Array:
        """Residual stream -> float32 [B, S, V/tensor]."""

    def final(self, x: jax.Array, region: Region) -> jax.Array:
        """Residual stream after the final norm."""


@dataclasses.dataclass(frozen=True)
class ModelConfig(abc.ABC):
    """Interface: a frozen, validated description of an architecture."""

    family: ClassVar[str]
    """Name of the architecture in files: ``amber`` or ``crystal``."""

    vocab_size: int
    context_length: int
    num_layers: int

    @abc.abstractmethod
    def build(self, key: jax.Array) -> Any:
        """A new `LanguageModel` (an nnx.Module), its weights a pure function of this config and ``key``."""

    @property
    @abc.abstractmethod
    def cache_shape(self) -> tuple[int, int]:
        """(heads, head width) of the key/value cache."""

    @property
    @abc.abstractmethod
    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: all but the embedding table and the norms."""

    @property
    @abc.abstractmethod
    def attention_width(self) -> int:
        """Heads times head width."""

    @functools.cached_property
    def abstract(self) -> Any:
        """The module with shapes instead of arrays; allocates nothing."""
        return jax.eval_shape(self.build, jax.random.key(0))

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return params.count(self.abstract)

    def graphdef(self) -> nnx.GraphDef:
        """The module's structure; with a nested dict of arrays, `nnx.merge` makes a module of it."""
        return nnx.split(self.abstract)[0]

    def train_flops_per_token(self, sequence_length: int, causal: bool) -> float:
        """FLOPs of forward and backward per token: 6 per matmul parameter, and attention's two products.

        ``causal=False`` is the convention of PaLM (arXiv 2204.02311, appendix B): 12 L H K S for attention as if every
        position read every other. ``causal=True`` counts only the half that a causal model needs.
        Recomputation is never counted.
        """
        attention = 12.0 * self.num_layers * self.attention_width * sequence_length
        return 6.0 * self.matmul_parameters + (attention / 2 if causal else attention)
