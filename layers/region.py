"""The manual region: how the per-shard mathematics of the layers meets the mesh.

The whole model runs inside one `jax.shard_map` that is manual over every mesh axis, for every mesh, one device
included (design section 7; measured reasons in the notes on parallelism). A `Region` says how: which dtype, when
weights are gathered, what is rematerialised, and whether the residual stream is sharded along the sequence.
"""

import contextlib
import dataclasses
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from errors import UserError
from layers import params
from parallel.axes import BATCH_AXES, TENSOR
from parallel.collectives import all_gather, axis_index, psum, psum_scatter, vary

M = TypeVar("M", bound=nnx.Module)

#: Remat policy by name: what of a layer's forward pass is kept for its backward pass; None = everything.
REMAT: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Region:
    """Choices for one use of the manual region."""

    compute_dtype: str = "float32"
    """Dtype of matrices and activations: float32 or bfloat16. Norms, softmax, loss and reductions are float32."""
    gather: Literal["once", "layer"] = "layer"
    """When weights are gathered over ``fsdp``: once per step (whole weights stay live) or in each layer (ZeRO-3)."""
    remat: str = "none"
    """A name in REMAT."""
    loss_chunks: int = 1
    """The loss is computed in this many pieces along the sequence, so that full logits never exist."""
    sequence_sharded: bool = True
    """Residual stream [B, S/tensor, D] (training) or [B, S, D] on every device (decoding one token at a time)."""

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UserError(f"compute_dtype {self.compute_dtype!r}: choose float32 or bfloat16")
        if self.gather not in ("once", "layer"):
            raise UserError(f"gather {self.gather!r}: choose once or layer")
        if self.remat not in REMAT:
            raise UserError(f"remat {self.remat!r}: choose from {', '.join(REMAT)}")
        if self.loss_chunks < 1:
            raise UserError(f"loss_chunks {self.loss_chunks}: must be at least 1")

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.compute_dtype)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Around matrix products: float32 means float32. GPUs and TPUs would else multiply it in TF32 or bfloat16."""
        return jax.default_matmul_precision("highest") if self.compute_dtype == "float32" else contextlib.nullcontext()

    def prepare(self, model: M) -> M:
        """Called once per step, before any loop over microbatches: gathers all weights in mode ``once``."""
        return params.gather(model, self.dtype) if self.gather == "once" else model

    def use(self, module: M) -> M:
        """Called where a module is used: gathers its weights in mode ``layer``."""
        return module if self.gather == "once" else params.gather(module, self.dtype)

    def enter(self, x: jax.Array) -> jax.Array:
        """Residual stream -> whole rows, input of a column-parallel matrix. [B, S/tensor, D] -> [B, S, D]."""
        return all_gather(x, TENSOR, 1) if self.sequence_sharded else vary(x, (TENSOR,))

    def leave(self, y: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Partial sums of a row-parallel matrix -> residual stream, plus a bias [D]. [B, S, D] -> [B, S/tensor, D]."""
        if self.sequence_sharded:
            y = psum_scatter(vary(y, (TENSOR,)), TENSOR, 1)
            return y if bias is None else y + bias
        # Added to one of the parts: added to their sum, a bias that varies in type would make the stream vary too.
        return psum(y if bias is None else y + jnp.where(axis_index(TENSOR) == 0, bias, 0), TENSOR)

    def residual(self, x: jax.Array) -> jax.Array:
        """Give the residual stream the varying type that it keeps through the layers."""
        return vary(x) if self.sequence_sharded else vary(x, BATCH_AXES)

    def checkpoint(self, f: Any) -> Any:
        """``f`` rematerialised by the policy."""
        policy = REMAT[self.remat]
        return f if policy is None else jax.checkpoint(f, policy=policy, prevent_cse=False)
