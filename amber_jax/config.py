"""Amber's architecture as numbers."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from errors import UserError
from layers.model import ModelConfig

if TYPE_CHECKING:
    import jax

    from layers.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class AmberConfig(ModelConfig):
    """LLaMA architecture (fact sheet 1.1 and 1.2); `amber_jax.recipes` has the sizes."""

    family: ClassVar[str] = "amber"

    norm_eps: float
    rope_base: float
    init_std: float
    """Standard deviation of every matrix and of the embedding at the start (fact sheet 1.4)."""
    padding_id: int | None
    """Embedding row that starts at zero and gets no gradient, or None (fact sheet 1.4)."""
    # What Llama 2 and 3 have and Amber has not; config.json names only what is set (`training.config.model_to_dict`).
    num_kv_heads: int | None = None
    """Heads of keys and values, each for as many query heads (grouped-query attention); None: one for each."""
    tied_embeddings: bool = False
    """The head multiplies by the embedding table and has no weights of its own."""
    rope_factor: float | None = None
    """Llama 3's scaling: long waves turn so many times slower; None: none do."""
    rope_low_freq_factor: float = 1.0
    """Waves longer than ``rope_original_context`` by this are long."""
    rope_high_freq_factor: float = 4.0
    """Waves shorter than ``rope_original_context`` by this turn as ever; between the two it is interpolated."""
    rope_original_context: int = 8192
    """Tokens of the context before it was extended."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise UserError(f"model: head_dim={self.head_dim} must be even, because rotary rotates pairs of dimensions")
        self.check_positive("norm_eps", "rope_base", "init_std", "rope_low_freq_factor", "rope_original_context")
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise UserError(
                f"model: num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}, and each head of "
                "keys and values serves as many heads of queries"
            )
        if self.rope_factor is not None:
            self.check_positive("rope_factor")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise UserError(
                f"model: rope_high_freq_factor={self.rope_high_freq_factor} must be above "
                f"rope_low_freq_factor={self.rope_low_freq_factor}"
            )
        if self.padding_id is not None and not 0 <= self.padding_id < self.vocab_size:
            raise UserError(f"model: padding_id={self.padding_id} is outside the vocabulary of {self.vocab_size}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def kv_width(self) -> int:
        """See `ModelConfig.kv_width`."""
        return self.kv_heads * self.head_dim

    @property
    def rope_scaling(self) -> tuple[float, float, float, float] | None:
        """Of `layers.rotary.angles`."""
        if self.rope_factor is None:
            return None
        return (
            self.rope_factor, self.rope_low_freq_factor, self.rope_high_freq_factor, float(self.rope_original_context),
        )  # fmt: skip

    def build(self, key: "jax.Array") -> "Decoder":
        """See `ModelConfig.build`."""
        from amber_jax.model import build  # the model imports this file for its type

        return build(self, key)
