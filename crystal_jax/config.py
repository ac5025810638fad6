"""CrystalCoder's architecture as numbers."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from errors import UserError
from layers.model import ModelConfig

if TYPE_CHECKING:
    import jax

    from layers.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class CrystalConfig(ModelConfig):
    """GPT-2-style pre-norm decoder with rotary positions, SwiGLU and muP (fact sheet 1.1 and 1.6)."""

    family: ClassVar[str] = "crystal"

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
        super().__post_init__()
        if self.rotary_dims % 2 or not 0 < self.rotary_dims <= self.head_dim:
            raise UserError(
                f"model: rotary_dims={self.rotary_dims} must be even, positive and at most head_dim={self.head_dim}"
            )
        multipliers = ("embedding_multiplier", "output_multiplier", "width_multiplier")
        self.check_positive("norm_eps", "rope_base", *multipliers, "init_std")

    @property
    def kernel_std(self) -> float:
        """Initial standard deviation of q, k, v and the MLP's two inner matrices (fact sheet 1.8: 0.01825)."""
        return self.init_std * self.width_multiplier**0.5

    @property
    def output_std(self) -> float:
        """That of the two matrices of a layer that write to the residual stream (fact sheet 1.8: 0.00228125)."""
        return self.kernel_std / (2 * self.num_layers) ** 0.5

    @property
    def undetermined(self) -> tuple[str, ...]:
        """The bias of keys: where no position rotates it, it adds the same to every score of a query."""
        return ("layers.attention.bk",) if self.rotary_dims < self.head_dim else ()

    def build(self, key: "jax.Array") -> "Decoder":
        """See `ModelConfig.build`."""
        from crystal_jax.model import build  # the model imports this file for its type

        return build(self, key)
