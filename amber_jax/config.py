"""Amber's architecture as numbers."""

import dataclasses
import math
from typing import ClassVar

import jax

from errors import UserError
from layers.decoder import Decoder
from layers.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class AmberConfig(ModelConfig):
    """LLaMA architecture (fact sheet 1.1 and 1.2); `amber_jax.recipes` has the sizes."""

    family: ClassVar[str] = "amber"

    vocab_size: int
    """Rows of the embedding and columns of the head."""
    context_length: int
    """Longest sequence, in tokens."""
    num_layers: int
    embed: int
    """Width of the residual stream."""
    num_heads: int
    head_dim: int
    mlp: int
    """Inner width of the SwiGLU."""
    norm_eps: float
    rope_base: float
    init_std: float
    """Standard deviation of every matrix and of the embedding at the start (fact sheet 1.4)."""
    padding_id: int | None
    """Embedding row that starts at zero and gets no gradient, or None (fact sheet 1.4)."""

    def __post_init__(self) -> None:
        for field in ("vocab_size", "context_length", "num_layers", "embed", "num_heads", "head_dim", "mlp"):
            if getattr(self, field) < 1:
                raise UserError(f"model: {field}={getattr(self, field)} must be at least 1")
        if self.head_dim % 2:
            raise UserError(f"model: head_dim={self.head_dim} must be even, because rotary rotates pairs of dimensions")
        for name in ("norm_eps", "rope_base", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model: {name}={getattr(self, name)} must be positive and finite")
        if self.padding_id is not None and not 0 <= self.padding_id < self.vocab_size:
            raise UserError(f"model: padding_id={self.padding_id} is outside the vocabulary of {self.vocab_size}")

    def build(self, key: jax.Array) -> Decoder:
        """See `ModelConfig.build`."""
        from amber_jax.model import build  # the model imports this file for its type

        return build(self, key)

    @property
    def cache_shape(self) -> tuple[int, int]:
        """(heads, head width)."""
        return self.num_heads, self.head_dim

    @property
    def attention_width(self) -> int:
        """Heads times head width."""
        return self.num_heads * self.head_dim

    @property
    def matmul_parameters(self) -> int:
        """Attention, MLP and head matrices."""
        per_layer = 4 * self.embed * self.attention_width + 3 * self.embed * self.mlp
        return self.num_layers * per_layer + self.embed * self.vocab_size
