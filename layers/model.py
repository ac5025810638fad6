"""What the rest of the system asks of a model: training, inference and checkpoints take one by this, never by name."""

import abc
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, ClassVar

from errors import UserError

if TYPE_CHECKING:  # a configuration is made, checked and written without JAX
    import jax
    from flax import nnx

    from layers.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class ModelConfig(abc.ABC):
    """Interface: a frozen, validated description of an architecture."""

    family: ClassVar[str]
    """Name of the architecture in files: ``amber`` or ``crystal``."""

    vocab_size: int
    """Rows of the embedding, and logits of a position."""
    context_length: int
    """Longest sequence, in tokens."""
    num_layers: int
    embed: int
    """Width of the residual stream."""
    num_heads: int
    head_dim: int
    mlp: int
    """Inner width of the SwiGLU."""

    def __post_init__(self) -> None:
        for field in ("vocab_size", "context_length", "num_layers", "embed", "num_heads", "head_dim", "mlp"):
            if getattr(self, field) < 1:
                raise UserError(f"model: {field}={getattr(self, field)} must be at least 1")

    @property
    def undetermined(self) -> tuple[str, ...]:
        """Names of parameters that change nothing, in part at least: rounding alone decides how they are trained."""
        return ()

    def check_positive(self, *fields: str) -> None:
        """Refuse fields that are not positive and finite (UserError)."""
        for name in fields:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model: {name}={getattr(self, name)} must be positive and finite")

    @abc.abstractmethod
    def build(self, key: "jax.Array") -> "Decoder":
        """A new model, its weights a pure function of this config and ``key``."""

    @property
    def cache_shape(self) -> tuple[int, int]:
        """(heads, head width) of the key/value cache."""
        return self.num_heads, self.head_dim

    @property
    def attention_width(self) -> int:
        """Heads times head width."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Heads of keys and values times head width: `attention_width`, but for grouped-query attention."""
        return self.attention_width

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: the matrices of attention, MLP and head, a tied one too."""
        per_layer = 2 * self.embed * (self.attention_width + self.kv_width) + 3 * self.embed * self.mlp
        return self.num_layers * per_layer + self.embed * self.vocab_size

    @functools.cached_property
    def abstract(self) -> "Decoder":
        """The module with shapes instead of arrays; allocates nothing."""
        import jax

        return jax.eval_shape(self.build, jax.random.key(0))

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        from layers import params

        return params.count(self.abstract)

    def graphdef(self) -> "nnx.GraphDef":
        """The module's structure; with a nested dict of arrays, `nnx.merge` makes a module of it."""
        from flax import nnx

        return nnx.split(self.abstract)[0]

    def train_flops_per_token(self, sequence_length: int, causal: bool) -> float:
        """FLOPs of forward and backward per token: 6 per matmul parameter, and attention's two products.

        ``causal=False`` is the convention of PaLM (arXiv 2204.02311, appendix B): 12 L H K S for attention as if every
        position read every other. ``causal=True`` counts only the half that a causal model needs.
        Recomputation is never counted.
        """
        attention = 12.0 * self.num_layers * self.attention_width * sequence_length
        return 6.0 * self.matmul_parameters + (attention / 2 if causal else attention)
