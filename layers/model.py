"""What the rest of the system asks of a model: training, inference and checkpoints take one by this, never by name."""

import abc
import dataclasses
import functools
from typing import ClassVar

import jax
from flax import nnx

from layers import params
from layers.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class ModelConfig(abc.ABC):
    """Interface: a frozen, validated description of an architecture."""

    family: ClassVar[str]
    """Name of the architecture in files: ``amber`` or ``crystal``."""

    vocab_size: int
    context_length: int
    num_layers: int

    @abc.abstractmethod
    def build(self, key: jax.Array) -> Decoder:
        """A new model, its weights a pure function of this config and ``key``."""

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
    def abstract(self) -> Decoder:
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
