"""The manual region: how the per-shard mathematics of the layers meets the mesh.

The whole model runs inside one `jax.shard_map` that is manual over every mesh axis, for every mesh, one device
included (design section 7; measured reasons in the notes on parallelism). A `Region` says how: which dtype, when
weights are gathered, what is rematerialised, and whether the residual stream is sharded along the sequence.
"""

import contextlib
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from errors import UserError
from layers import params
from layers.attention import KERNELS, Documents, documents
from layers.exact import add_bias
from parallel.axes import BATCH_AXES, PIPELINE, TENSOR
from parallel.collectives import all_gather, all_gather_as, axis_index, deal, psum, psum_scatter, vary
from parallel.plan import Gather, Remat, Schedule, check_choices

M = TypeVar("M", bound=nnx.Module)

_STREAM = "residual stream into a layer"

#: Remat policy by name: what of a layer's forward pass is kept for its backward pass; None = everything.
REMAT: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_STREAM],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class Region:
    """Choices for one use of the manual region."""

    compute_dtype: str = "float32"
    """Dtype of matrices and activations: float32 or bfloat16. Norms, softmax, loss and the
    reductions of gradients over the mesh are float32; activations are summed over ``tensor`` in this dtype."""
    gather: Gather = "layer"
    """When weights are gathered over ``fsdp`` (`parallel.plan.Gather`)."""
    remat: Remat = "none"
    """What a layer keeps for its backward pass (`parallel.plan.Remat`)."""
    remat_stage: bool = False
    """A stage (a microbatch, without a pipeline) keeps only its input, and is run again for the backward pass."""
    schedule: Schedule = "gpipe"
    """How microbatches pass through the stages of a pipeline (`parallel.plan.Schedule`)."""
    repeats: int = 1
    """Times that a microbatch passes through every stage (`parallel.plan.Plan.repeats`)."""
    skip_idle: bool = True
    """"1f1b": a stage does nothing in the ticks where it has nothing to do. False: it computes what is thrown away,
    for platforms that cannot run collectives in a branch that only some stages take."""
    unroll: int = 1
    """Layers in one turn of the loop over them; all of them: no loop, and a compile time that grows with the layers."""
    attention: str = "reference"
    """Attention kernel, a name in `layers.attention.KERNELS`."""
    document_end: int | None = None
    """Token that closes a document: attention does not reach back beyond it. None: rows are read as one text, as they
    always are with a cache."""
    loss_chunks: int = 1
    """The loss is computed in this many pieces along the sequence, so that full logits never exist."""
    sequence_sharded: bool = True
    """Residual stream [B, S/tensor, D] (training) or [B, S, D] on every device (decoding one token at a time)."""

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UserError(f"compute_dtype {self.compute_dtype!r}: choose float32 or bfloat16")
        check_choices(self, "loss_chunks", "unroll")
        if self.attention not in KERNELS:
            raise UserError(f"attention {self.attention!r}: choose from {', '.join(KERNELS)}")

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.compute_dtype)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Around matrix products: float32 means float32. GPUs and TPUs would else multiply it in TF32 or bfloat16."""
        return jax.default_matmul_precision("highest") if self.compute_dtype == "float32" else contextlib.nullcontext()

    def begin(self, model: M) -> M:
        """Called once per training step, before any loop over microbatches; its transpose sums gradients over the mesh.

        Every weight becomes varying over all mesh axes, so that the sum of its gradient over the mesh is taken here
        too: once per step. In the circular schedule stages get their layers, and in mode ``once`` all are gathered.
        """
        model = jax.tree.map(vary, model)
        if self.repeats > 1 and lax.axis_size(PIPELINE) > 1:
            model.layers = jax.tree.map(lambda w: deal(w, self.repeats), model.layers)  # type: ignore[attr-defined]
        return self.prepare(model)

    def prepare(self, model: M) -> M:
        """Called once per use of a model: gathers all weights in mode ``once``."""
        return params.gather(model, self.dtype) if self.gather == "once" else model

    def use(self, module: M) -> M:
        """Called where an embedding, norm or head is used: gathers its weights, unless it was done before."""
        return module if self.gather == "once" else params.gather(module, self.dtype)

    def use_stage(self, layers: M) -> M:
        """Called where a stage of layers is used: gathers their weights in mode ``tick``."""
        return params.gather(layers, self.dtype) if self.gather == "tick" else layers

    def use_layer(self, layer: M) -> M:
        """Called where one layer is used: gathers its weights in mode ``layer``."""
        return params.gather(layer, self.dtype) if self.gather == "layer" else layer

    def reach(self, tokens: jax.Array) -> Documents | None:
        """What positions of rows of tokens [B, S] may read, besides nothing that comes after them."""
        return None if self.document_end is None else documents(tokens, self.document_end)

    def enter(self, x: jax.Array) -> jax.Array:
        """Residual stream -> whole rows, input of a column-parallel matrix. [B, S/tensor, D] -> [B, S, D]."""
        return all_gather(x, TENSOR, 1) if self.sequence_sharded else vary(x, (TENSOR,))

    def enter_exact(self, x: jax.Array) -> jax.Array:
        """`enter` of a float32 stream that travels in the compute dtype; its gradient comes back in float32."""
        return all_gather_as(x, TENSOR, 1, self.dtype) if self.sequence_sharded else vary(x, (TENSOR,))

    def leave(self, y: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Partial sums of a row-parallel matrix -> residual stream, plus a bias [D]. [B, S, D] -> [B, S/tensor, D]."""
        if self.sequence_sharded:
            y = psum_scatter(vary(y, (TENSOR,)), TENSOR, 1)
            return y if bias is None else add_bias(y, bias)
        # Added to one of the parts: added to their sum, a bias that varies in type would make the stream vary too.
        return psum(y if bias is None else add_bias(y, jnp.where(axis_index(TENSOR) == 0, bias, 0)), TENSOR)

    def residual(self, x: jax.Array) -> jax.Array:
        """Give the residual stream the varying type that it keeps through the layers."""
        return vary(x, (*BATCH_AXES, TENSOR) if self.sequence_sharded else BATCH_AXES)

    def checkpoint(self, f: Any) -> Any:
        """``f((x, …), …)``, a layer under `lax.scan`, rematerialised by the policy; x is the residual stream."""
        policy = REMAT[self.remat]
        if policy is None:
            return f

        def named(carry: tuple[jax.Array, Any], *rest: Any) -> Any:
            return f((checkpoint_name(carry[0], _STREAM), *carry[1:]), *rest)

        return jax.checkpoint(named if self.remat == "offload" else f, policy=policy, prevent_cse=self.unroll > 1)

    def checkpoint_stage(self, f: Any) -> Any:
        """``f``, a stage, rematerialised from its input if the plan says so."""
        return jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable) if self.remat_stage else f
