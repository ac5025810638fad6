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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise UserError(f"model: head_dim={self.head_dim} must be even, because rotary rotates pairs of dimensions")
        self.check_positive("norm_eps", "rope_base", "init_std")
        if self.padding_id is not None and not 0 <= self.padding_id < self.vocab_size:
            raise UserError(f"model: padding_id={self.padding_id} is outside the vocabulary of {self.vocab_size}")

    def build(self, key: "jax.Array") -> "Decoder":
        """See `ModelConfig.build`."""
        from amber_jax.model import build  # the model imports this file for its type

        return build(self, key)
