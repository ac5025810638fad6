"""Parameters: shape, logical axes and initializer on one line, and the only reader of that metadata.

A `Param` carries shape and logical axes of one layer's tensor. Where layers are stacked the array has one more leading
dimension, whose logical axis is ``"layers"``.

An MLP width need not be a multiple of the ``tensor`` degree (Crystal's is 10922 = 2 * 43 * 127, fact sheet 1.1). Its
weights are then stored at their true shape, the other dimension spread over ``fsdp`` and ``tensor``, and change hands
on their way into the layer, padded with zeros there: an all-to-all of the shard, which is small beside the gather over
``fsdp``. The padding multiplies to zero and gets no gradient; state, checkpoints and digests never hold it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding

from parallel import axes as mesh_axes
from parallel.axes import FSDP, TENSOR
from parallel.collectives import Exchange, Gather, axis_index, move_weight

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
M = TypeVar("M", bound=nnx.Module)


def param(init: Initializer, key: jax.Array, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """A float32 parameter of ``shape`` with one logical axis per dimension."""
    if len(shape) != len(axes):
        raise ValueError(f"param: shape {tuple(shape)} and axes {tuple(axes)} differ in length")
    return nnx.Param(init(key, tuple(shape), jnp.float32), axes=tuple(axes), sizes=tuple(shape))


def _axes(p: nnx.Variable) -> tuple[str, ...]:
    axes = p.get_metadata("axes")
    stacked = len(p.shape) - len(axes)
    return ("layers",) * stacked + tuple(axes)


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Param)


def stored_axes(p: nnx.Variable, degrees: Mapping[str, int]) -> tuple[str, ...]:
    """The logical axes by which a parameter is stored on a mesh of these degrees (see the top of this file)."""
    return mesh_axes.stored(_axes(p), p.shape, degrees[TENSOR])


def _uneven(p: nnx.Variable, degree: int) -> int | None:
    """Dimension, counted from the last (negative), that is an MLP width not divided by ``degree``."""
    axes, sizes = p.get_metadata("axes"), p.get_metadata("sizes")
    return next((d - len(axes) for d, name in enumerate(axes) if name == "mlp" and sizes[d] % degree), None)


def shardings(module: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """Nested dict like the parameters, each leaf its NamedSharding on ``mesh``."""
    pure = nnx.to_pure_dict(nnx.split(module)[1], extract_fn=lambda p: p)
    return jax.tree.map(lambda p: mesh_axes.sharding(mesh, *stored_axes(p, mesh.shape)), pure, is_leaf=_is_param)


def specs(shardings: Any) -> Any:
    """The PartitionSpec of every NamedSharding in a tree."""
    return jax.tree.map(lambda s: s.spec, shardings, is_leaf=lambda x: isinstance(x, NamedSharding))


def check_divides(module: nnx.Module, degrees: Mapping[str, int]) -> None:
    """Refuse a mesh that does not divide every parameter (UserError naming the tensor and the dimension)."""
    _, state = nnx.split(module)
    for path, p in nnx.to_flat_state(state):
        mesh_axes.check_divides(degrees, ".".join(map(str, path)), p.shape, stored_axes(p, degrees))


def gather(module: M, dtype: jnp.dtype) -> M:
    """The module with every weight whole over ``fsdp`` and ready for use; call inside the manual region.

    Matrices, which are what has an ``embed`` axis, are cast to ``dtype`` before they travel. Gains and biases stay
    float32: their gradients are sums over tokens, and a compiler may take the sum in the dtype of its result.
    """

    def ready(p: nnx.Param) -> nnx.Variable:
        logical = _axes(p)
        target = dtype if "embed" in logical else p.dtype
        value = p[...]
        embed = next((d for d, name in enumerate(logical) if FSDP in mesh_axes.mesh_axes_of(name)), None)
        moves: list[Exchange | Gather] = [] if embed is None else [Gather(FSDP, embed)]
        if (uneven := _uneven(p, degree := lax.axis_size(TENSOR))) is not None:
            dim = value.ndim + uneven
            width = value.shape[dim]
            part = -(-width // degree)
            value = jnp.pad(value, [(0, part * degree - width if d == dim else 0) for d in range(value.ndim)])
            if embed is None:
                value = lax.dynamic_slice_in_dim(value, axis_index(TENSOR) * part, part, dim)
            else:
                moves.insert(0, Exchange(TENSOR, embed, dim))
        return p.replace(move_weight(value, tuple(moves), target) if moves else value.astype(target))

    return jax.tree.map(ready, module, is_leaf=_is_param)


def count(module: nnx.Module) -> int:
    """Number of parameters; also of an abstract module (`jax.eval_shape`), which allocates nothing."""
    return sum(int(x.size) for x in jax.tree.leaves(module))


def abstract_arrays(module: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """Nested dict of `jax.ShapeDtypeStruct` with shardings on ``mesh``: the target of a restore."""
    pure = nnx.to_pure_dict(nnx.split(module)[1])
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), pure, shardings(module, mesh))
