"""Arrays on disk: the one place that knows Orbax, and the format of every checkpoint.

An item ("params", "optimizer", "params_bfloat16") is a folder with one folder per array, named by
`checkpoint.names.flat`. Arrays are plain zarr 3, without OCDBT and compression: each can be hashed, compared and read
alone by any zarr reader, and a flipped bit damages one number. Orbax has no checksum on array data in any of its
formats; `checkpoint.manifest` has.
"""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from checkpoint import storage
from checkpoint.names import from_flat, stacked

ITEMS = ("params", "optimizer", "params_bfloat16")
"""The last is a copy of the first, rounded, for analyses that read half as much."""

_CHUNK_BYTES = 64 * 2**20
"""Largest file. Without it each shard is one file of one chunk, gigabytes when saved from few devices: hashed by one
thread, and read whole by whoever wants a part (two rows of a 512 MiB matrix: 537 MB read, with the limit 268 MB)."""


_SHARED_BYTES = 2**20
"""Smallest part of an array that replicas share to write, each its own. Below, one of them writes all of it: Orbax cuts
the parts one by one, which for the many small arrays of a model took longer than to write them."""


def start_save(path: Path, items: dict[str, Any]) -> ocp.AsyncCheckpointer:
    """Copy items to host memory and start to write them; pass the result to `finish_save`.

    Args:
        path: absolute; does not exist. Appears, whole, once the writing is done.
        items: nested dict of arrays by item. They may be donated or deleted after the return.
    """
    return _start(path, {item: (_handler(), tree) for item, tree in items.items()})


def _start(path: Path, items: dict[str, tuple[ocp.PyTreeCheckpointHandler, dict[str, Any]]]) -> ocp.AsyncCheckpointer:
    # If the folders cannot be made (a full disk), Orbax's other threads would wait for them for minutes, and the
    # process with them. Both classes have this option, for their own folders.
    wait = ocp.AsyncOptions(create_directories_asynchronously=False)
    handlers: dict[str, Any] = {item: handler for item, (handler, _) in items.items()}
    options = ocp.CompositeOptions(async_options=wait)
    saver = ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(composite_options=options, **handlers), async_options=wait
    )
    trees = {
        item: ocp.args.PyTreeSave(tree, save_args=jax.tree_util.tree_map_with_path(_save_args, tree))
        for item, (_, tree) in items.items()
    }
    try:
        saver.save(path, args=ocp.args.Composite(**trees))
    except BaseException:
        saver.close()
        raise
    return saver


def finish_save(saver: ocp.AsyncCheckpointer) -> None:
    """Wait until the checkpoint has its final name; raises what kept it from that."""
    try:
        saver.wait_until_finished()
    finally:
        saver.close()


def load(path: Path, item: str, target: dict[str, Any]) -> dict[str, Any]:
    """Read an item onto the devices of ``target``, a nested dict of `jax.ShapeDtypeStruct` with shardings.

    Names, shapes and dtypes must be those on disk: Orbax would cast another dtype without a word.
    """
    return _handler().restore(
        storage.absolute(path) / item,
        args=ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)),
    )


def declare(path: Path, item: str, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Make a checkpoint of one item whose arrays have no data yet: `chunks` says which files to add.

    Args:
        path: absolute; does not exist.
        item: "params".
        shapes: shape and dtype of each array by dotted name.
    """
    tree = from_flat({name: np.broadcast_to(np.zeros((), dtype), shape) for name, (shape, dtype) in shapes.items()})
    finish_save(_start(path, {item: (_handler(_Declared()), tree)}))


def chunks(name: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Shape of the chunks of a declared array, a file each: C order, little-endian, those at the edges padded.

    The chunk at (0, 2) is the file ``c/0/2``. Of a stacked array each layer has its own. Halved from the front until
    small enough, so that meshes of powers of two divide them and their files are runs of the array.
    """
    shape = (1, *shape[1:]) if stacked(name) else shape
    chunk = list(shape)
    for axis, size in enumerate(shape):
        parts = 1
        while math.prod(chunk) * dtype.itemsize > _CHUNK_BYTES and chunk[axis] > 1:
            parts *= 2
            chunk[axis] = -(-size // parts)
    return tuple(chunk)


def open_array(folder: Path) -> tensorstore.TensorStore:
    """An array on disk, to read parts of it. A missing file is an error, not zeros."""
    spec = {"driver": "zarr3", "kvstore": storage.kvstore(folder)}
    return tensorstore.open(spec | {"fill_missing_data_reads": False}, open=True, read=True).result()


class _Declared(ocp.type_handlers.NumpyHandler):
    """Lets Orbax write all that it wants to know of an array, and of the array itself only the metadata."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list[ocp.future.Future]:
        # Orbax makes the folder meanwhile, which this kind of future waits for.
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._create(values, infos), name="declare")]

    async def _create(self, values: Sequence[Any], infos: Sequence[Any]) -> None:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            chunk = chunks(info.name, value.shape, value.dtype)
            grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
            codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{info.path}/"},
                "metadata": {"shape": value.shape, "data_type": value.dtype.name, "chunk_grid": grid, "codecs": codecs},
            }
            await tensorstore.open(spec, create=True)


def _save_args(path: tuple[Any, ...], x: Any) -> ocp.SaveArgs:
    """Files of a limited size, and in a large stack none with parts of two layers."""
    apart = x.nbytes > _CHUNK_BYTES and stacked(".".join(str(entry.key) for entry in path))
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if apart else ())


def _handler(of_numpy: ocp.type_handlers.NumpyHandler | None = None) -> ocp.PyTreeCheckpointHandler:
    of_arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, of_arrays), (np.ndarray, of_numpy or ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, use_compression=False, type_handler_registry=registry
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Orbax off stderr: it warns about missing OCDBT folders at each save, and logs every error it also raises.

    When a save fails, Orbax closes its event loop while other writes are under way. Each of them then prints a
    traceback of its own: through absl from Orbax's threads, as an unraisable error from tensorstore's, and through
    asyncio when the garbage collector finds its task, for which that filter stays. The failure itself is raised to
    whoever waits for it.
    """
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    logging.getLogger("absl").addFilter(_not_of_orbax)
    before = sys.unraisablehook

    def hook(what: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            before(what)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        logging.getLogger("absl").removeFilter(_not_of_orbax)


def settle() -> None:
    """After a failed save, inside `quiet`: let its last writes fail."""
    time.sleep(0.5)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()
