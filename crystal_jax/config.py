"""CrystalCoder's architecture as numbers."""

import dataclasses
import math
from typing import ClassVar

import jax

from errors import UserError
from layers.decoder import Decoder
from layers.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class CrystalConfig(ModelConfig):
    """GPT-2-style pre-norm decoder with rotary positions, SwiGLU and muP (fact sheet 1.1 and 1.6)."""

    family: ClassVar[str] = "crystal"

    vocab_size: int
    """Rows of the embedding, which is the head too."""
    context_length: int
    """Longest sequence, in tokens."""
    num_layers: int
    embed: int
    """Width of the residual stream."""
    num_heads: int
    head_dim: int
    """Scores are divided by this, not by its root."""
    mlp: int
    """Inner width of the SwiGLU."""
    norm_eps: float
    rope_base: float
    rotary_dims: int
    """First dimensions of each head, which rotate in neighbouring pairs; the others carry no position."""
    embedding_multiplier: float
    """Scales what is looked up in the embedding."""
    output_multiplier: float
    """muP's output alpha: logits are scaled by this times ``width_multiplier``."""
    width_multiplier: float
    """muP's base width over this width: 256 / 4096 in CrystalCoder (fact sheet 1.8)."""
    init_std: float
    """Standard deviation of the embedding at the start; the other matrices follow from it by muP."""

    def __post_init__(self) -> None:
        for field in ("vocab_size", "context_length", "num_layers", "embed", "num_heads", "head_dim", "mlp"):
            if getattr(self, field) < 1:
                raise UserError(f"model: {field}={getattr(self, field)} must be at least 1")
        if self.rotary_dims % 2 or not 0 < self.rotary_dims <= self.head_dim:
            raise UserError(
                f"model: rotary_dims={self.rotary_dims} must be even, positive and at most head_dim={self.head_dim}"
            )
        positive = (
            "norm_eps",
            "rope_base",
            "embedding_multiplier",
            "output_multiplier",
            "width_multiplier",
            "init_std",
        )
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model: {name}={getattr(self, name)} must be positive and finite")

    @property
    def kernel_std(self) -> float:
        """Initial standard deviation of q, k, v and the MLP's two inner matrices (fact sheet 1.8: 0.01825)."""
        return self.init_std * self.width_multiplier**0.5

    @property
    def output_std(self) -> float:
        """That of the two matrices of a layer that write to the residual stream (fact sheet 1.8: 0.00228125)."""
        return self.kernel_std / (2 * self.num_layers) ** 0.5

    def build(self, key: jax.Array) -> Decoder:
        """See `ModelConfig.build`."""
        from crystal_jax.model import build  # the model imports this file for its type

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
        """Attention and MLP matrices, and the embedding, which multiplies as the head."""
        per_layer = 4 * self.embed * self.attention_width + 3 * self.embed * self.mlp
        return self.num_layers * per_layer + self.embed * self.vocab_size
