"""Arrays of a checkpoint on the devices of any mesh."""

from typing import Any

import jax

from checkpoint import arrays, files
from checkpoint.manifest import Entry
from checkpoint.names import flat, nest, unnest
from checkpoint.series import verify_files
from errors import RunError, UserError


def restore(entry: Entry, *, params: Any | None, optimizer: Any | None, verify: bool = True) -> tuple[Any, Any]:
    """Arrays of a checkpoint, each read straight to the devices that its target names, on any mesh.

    Of several processes each verifies a part of the files; one that finds damage keeps all from going on. The dtypes
    must be those on disk, but for these: bfloat16 is read into float32 where that is asked for, exactly; and where
    bfloat16 is asked for, the checkpoint's copy in it is read, if it has one.

    Args:
        entry: the checkpoint.
        params: pytree of `jax.ShapeDtypeStruct` with shardings, or None to leave them out.
        optimizer: the same for the optimizer state.
        verify: compare every file to be read with the manifest first.

    Returns:
        (params, optimizer) with the structure of their targets; None for None.

    Raises:
        UserError: names, shapes or dtypes are not those of the checkpoint.
        RunError: a file is missing, changed or not part of the checkpoint.
    """
    weights = "params_bfloat16" if _asks_for_copy(entry, params) else "params"
    targets = {item: t for item, t in ((weights, params), ("optimizer", optimizer)) if t is not None}
    for item, target in targets.items():
        _check_target(entry, item, target)
    if verify:
        verify_files(entry, targets.keys(), (jax.process_index(), jax.process_count()))
    restored = {}
    for item, target in targets.items():
        try:
            nested = arrays.load(entry.path, item, nest(target))
        except Exception as e:  # tensorstore has no error type of its own
            raise RunError(f"{entry.path}: cannot be read: {files.reason(e)}") from e
        restored[item] = unnest(target, nested)
    return restored.get(weights), restored.get("optimizer")


def _asks_for_copy(entry: Entry, params: Any | None) -> bool:
    return entry.has("params_bfloat16") and all(x.dtype == jax.numpy.bfloat16 for x in jax.tree.leaves(params))


def _check_target(entry: Entry, item: str, target: Any) -> None:
    stored = {n.partition("/")[2]: t for n, t in entry.manifest.tensors.items() if n.startswith(item + "/")}
    if not stored:
        raise UserError(f"{entry.path}: holds no {item}, only {', '.join(i for i in arrays.ITEMS if entry.has(i))}")
    wanted = flat(target)
    describe = lambda t: f"{t['dtype']} {list(t['shape'])}"  # noqa: E731
    problems = [f"{name} is not in it" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"{name} is in it but was not asked for" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        asked = {"shape": list(wanted[name].shape), "dtype": wanted[name].dtype.name}
        found = {"shape": stored[name]["shape"], "dtype": stored[name]["dtype"]}
        widened = found | {"dtype": "float32"} if found["dtype"] == "bfloat16" else found
        if asked not in (found, widened):
            problems.append(f"{name} is {describe(found)}, expected {describe(asked)}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(f"{entry.path}: its {item} arrays are of another model: {'; '.join(problems[:5])}{more}")
