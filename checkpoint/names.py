"""Names of the arrays in a pytree, and pytrees as nested dicts of arrays, the only shape that goes to disk.

A name is the path to an array joined with dots: ``layers.attention.wq`` for parameters, ``0.mu.layers.attention.wq``
in the first member of an optax chain. It is also the array's folder on disk, hence the characters refused below.
"""

import re
from collections.abc import Mapping
from typing import Any

from errors import UserError


def nest(tree: Any) -> dict[str, Any]:
    """The arrays of any pytree as nested dicts with string keys; nodes without arrays disappear.

    Fields of a NamedTuple or dataclass give their name, members of a tuple or list their position.

    Raises:
        UserError: a key that cannot be a folder name, two nodes with one name, or a bare array.
    """
    return from_flat(flat(tree))


def unnest(target: Any, nested: Mapping[str, Any]) -> Any:
    """The inverse of `nest`: ``nested``'s arrays in the structure of ``target``.

    Raises:
        UserError: ``nested`` lacks an array of ``target`` or has one more.
    """
    names, values = flat(target), flat(nested)
    if missing := sorted(names.keys() - values.keys()):
        raise UserError(f"missing {_few(missing)}: the structure asked for has them, the arrays given do not")
    if extra := sorted(values.keys() - names.keys()):
        raise UserError(f"unexpected {_few(extra)}: the structure asked for has no such arrays")
    import jax

    return jax.tree.unflatten(jax.tree.structure(target), [values[name] for name in names])


def flat(tree: Any) -> dict[str, Any]:
    """The arrays of any pytree by dotted name, in jax's order. Raises as `nest` does."""
    return {".".join(path): leaf for path, leaf in _paths(tree)}


def from_flat(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from values by dotted name: the inverse of `flat` where all nodes are dicts."""
    root: dict[str, Any] = {}
    for name, value in arrays.items():
        *path, leaf = name.split(".")
        node = root
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return root


def stacked(name: str) -> bool:
    """Whether an array holds one tensor of every layer, along its first axis: those below "layers" do."""
    return "layers" in name.split(".")[:-1]


def layer_of(name: str) -> tuple[str, int] | None:
    """``("layers.attention.wq", 7)`` for "layers.7.attention.wq"; None for a name without the number of a layer."""
    match = re.fullmatch(r"((?:.+\.)?layers)\.(\d+)(\..+)", name)
    return (match[1] + match[3], int(match[2])) if match else None


def _paths(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    import jax  # names alone, of a checkpoint on disk, need none of it

    found: dict[tuple[str, ...], Any] = {}
    for entries, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = tuple(_key(entry) for entry in entries)
        name = ".".join(path)
        if not path:
            raise UserError("an array without a name cannot be saved; put it in a dict")
        for key in path:
            # Orbax joins keys with dots and would restore {"a.b": x} and {"a": {"b": y}} as the same array.
            if not key or "." in key or "/" in key:
                raise UserError(
                    f"{name}: the key {key!r} cannot name a folder; it must not be empty or have '.' or '/'"
                )
        if path in found:
            raise UserError(f"{name}: two arrays of the tree have this name; rename one")
        found[path] = leaf
    return list(found.items())


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):  # dict and flattened keys, positions, fields
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise UserError(f"{entry}: this kind of pytree node does not name its children; use dicts, tuples or dataclasses")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
