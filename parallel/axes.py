"""Names of logical and mesh axes, and the one table that maps the first to the second.

A weight or activation says what its dimensions *are* (logical axes: ``("embed", "heads", "head_dim")``); this table
says where they go. Nothing else in the project spells a mesh axis next to a weight, and there is no catch-all: a
logical axis that is not in the table is an error, not a silent replication.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from errors import UserError

if TYPE_CHECKING:  # configuration and the command line read this table without JAX
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

PIPELINE, DATA, FSDP, TENSOR = "pipeline", "data", "fsdp", "tensor"

#: Outermost first. ``tensor`` is last because it talks most and so should lie on the fastest, innermost links.
MESH_AXES = (PIPELINE, DATA, FSDP, TENSOR)

#: The mesh axes over which the rows of a batch are spread (``fsdp`` is data parallelism that also shards the weights).
BATCH_AXES = (DATA, FSDP)

#: Logical axis -> mesh axis or axes; None = never sharded.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # activations
    "microbatch": None,
    "batch": BATCH_AXES,
    "sequence": TENSOR,  # the residual stream between the matrix multiplications is sequence-sharded
    "position": None,  # a sequence axis that is whole on every device
    "replicated": None,  # any other dimension that stays whole
    # weights
    "layers": PIPELINE,
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,  # of grouped-query attention
    "whole_kv_heads": None,  # the same where ``tensor`` does not divide them: every device has all
    "mlp": TENSOR,
    "embed": FSDP,
    "head_dim": None,
    "norm": None,  # norm gains: replicated, and kept in float32 when matrices are cast to the compute dtype
    # the same weights where ``tensor`` does not divide the MLP's width: see `layers.params.stored_axes`
    "whole_mlp": None,
    "spread_embed": (FSDP, TENSOR),
}


def mesh_axes_of(logical: str) -> tuple[str, ...]:
    """Mesh axes that shard a logical axis, possibly none.

    Raises:
        KeyError: the logical axis is not in the table (our bug: every axis has a rule).
    """
    if logical not in RULES:
        raise KeyError(f"axes: no rule for logical axis {logical!r}; add it to parallel/axes.py RULES")
    rule = RULES[logical]
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)


def stored(logical: Sequence[str], shape: Sequence[int], tensor: int) -> tuple[str, ...]:
    """The logical axes by which a weight is stored where ``tensor`` has this degree: see `layers.params`.

    An MLP width that it does not divide is whole, and the other dimension spread over it; heads of keys and values that
    it does not divide are on every device.
    """
    uneven = {name for name, size in zip(logical, shape, strict=True) if size % tensor}
    swap: dict[str, str] = {}
    if "mlp" in uneven:
        swap |= {"mlp": "whole_mlp", "embed": "spread_embed"}
    if "kv_heads" in uneven:
        swap |= {"kv_heads": "whole_kv_heads"}
    return tuple(swap.get(name, name) for name in logical)


def spec(mesh: "Mesh", *logical: str) -> "PartitionSpec":
    """PartitionSpec for one array, a logical axis per dimension.

    Axes of size 1 are left out: inside the manual region they must exist neither in specs nor in types, because a
    collective over them is at best a wasted operation and on libtpu 0.0.42 an abort of the process.
    """
    from jax.sharding import PartitionSpec

    entries: list[tuple[str, ...]] = []
    for name in logical:
        entries.append(tuple(a for a in mesh_axes_of(name) if mesh.shape[a] > 1))
    used = [a for entry in entries for a in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"axes: {logical} would place two dimensions on one mesh axis: {entries}")
    return PartitionSpec(*[None if not e else e[0] if len(e) == 1 else e for e in entries])


def sharding(mesh: "Mesh", *logical: str) -> "NamedSharding":
    """NamedSharding of `spec`."""
    from jax.sharding import NamedSharding

    return NamedSharding(mesh, spec(mesh, *logical))


def check_divides(degrees: Mapping[str, int], what: str, shape: Sequence[int], logical: Sequence[str]) -> None:
    """Refuse a mesh whose degrees do not divide an array, before anything is compiled.

    Args:
        degrees: mesh axis -> degree.
        what: how to name the array in the message.
        shape: its global shape.
        logical: its logical axes, one per dimension.

    Raises:
        UserError: names the array, the dimension, the degree, and degrees that would do.
    """
    for size, name in zip(shape, logical, strict=True):
        axes = mesh_axes_of(name)
        degree = 1
        for a in axes:
            degree *= degrees[a]
        if size % degree:
            good = [d for d in range(1, min(size, 64) + 1) if size % d == 0]
            raise UserError(
                f"mesh: {'*'.join(axes)} = {degree} does not divide the {name!r} dimension ({size}) of {what} "
                f"{tuple(shape)}; choose a degree from {good}"
            )
