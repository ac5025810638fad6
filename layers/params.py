"""Parameters: shape, logical axes and initializer on one line, and the only reader of that metadata.

A `Param` carries the logical axes of one layer's tensor. Where layers are stacked the array has one more leading
dimension, whose logical axis is ``"layers"``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from parallel import axes as mesh_axes
from parallel.axes import FSDP
from parallel.collectives import gather_weight, vary

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
M = TypeVar("M", bound=nnx.Module)


def param(init: Initializer, key: jax.Array, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """A float32 parameter of ``shape`` with one logical axis per dimension."""
    if len(shape) != len(axes):
        raise ValueError(f"param: shape {tuple(shape)} and axes {tuple(axes)} differ in length")
    return nnx.Param(init(key, tuple(shape), jnp.float32), axes=tuple(axes))


def _axes(p: nnx.Variable) -> tuple[str, ...]:
    axes = p.get_metadata("axes")
    stacked = len(p.shape) - len(axes)
    return ("layers",) * stacked + tuple(axes)


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Param)


def logical_axes(module: nnx.Module) -> dict[str, Any]:
    """Nested dict like the parameters, each leaf the logical axes of its dimensions."""
    _, state = nnx.split(module)
    return jax.tree.map(_axes, nnx.to_pure_dict(state, extract_fn=lambda p: p), is_leaf=_is_param)


def shardings(module: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """Nested dict like the parameters, each leaf its NamedSharding on ``mesh``."""
    return jax.tree.map(lambda a: mesh_axes.sharding(mesh, *a), logical_axes(module), is_leaf=_is_axes)


def specs(shardings: Any) -> Any:
    """The PartitionSpec of every NamedSharding in a tree."""
    return jax.tree.map(lambda s: s.spec, shardings, is_leaf=lambda x: isinstance(x, NamedSharding))


def check_divides(module: nnx.Module, degrees: Mapping[str, int]) -> None:
    """Refuse a mesh that does not divide every parameter (UserError naming the tensor and the dimension)."""
    _, state = nnx.split(module)
    for path, p in nnx.to_flat_state(state):
        mesh_axes.check_divides(degrees, ".".join(map(str, path)), p.shape, _axes(p))


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(a, str) for a in x)


def gather(module: M, dtype: jnp.dtype) -> M:
    """The module with every weight whole over ``fsdp`` and ready for use; call inside the manual region.

    Matrices and biases are cast to ``dtype`` before they travel; norm gains stay float32. Every weight becomes
    varying over all live mesh axes here, so that the sum of its gradient over the mesh happens here too: once per
    call, not once per use.
    """

    def ready(p: nnx.Param) -> nnx.Variable:
        logical = _axes(p)
        target = p.dtype if "norm" in logical else dtype
        value = vary(p[...])
        sharded = [d for d, name in enumerate(logical) if FSDP in mesh_axes.mesh_axes_of(name)]
        value = gather_weight(value, FSDP, sharded[0], target) if sharded else value.astype(target)
        return p.replace(value)

    return jax.tree.map(ready, module, is_leaf=_is_param)


def count(module: nnx.Module) -> int:
    """Number of parameters; also of an abstract module (`jax.eval_shape`), which allocates nothing."""
    return sum(int(x.size) for x in jax.tree.leaves(module))


def abstract_arrays(module: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """Nested dict of `jax.ShapeDtypeStruct` with shardings on ``mesh``: the target of a restore."""
    pure = nnx.to_pure_dict(nnx.split(module)[1])
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), pure, shardings(module, mesh))
