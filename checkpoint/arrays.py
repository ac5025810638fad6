"""Arrays on disk: the one place that knows Orbax, and the format of every checkpoint.

An item ("params", "optimizer") is a folder with one folder per array, named by `checkpoint.names.flat`. Arrays are
plain zarr 3, without OCDBT and compression: each can be hashed, compared and read alone by any zarr reader, and a
flipped bit damages one number. Orbax has no checksum on array data in any of its formats; `checkpoint.manifest` has.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

ITEMS = ("params", "optimizer")

_CHUNK_BYTES = 64 * 2**20
"""Largest file. Without it each shard is one file of one chunk, gigabytes when saved from few devices: hashed by one
thread, and read whole by whoever wants a part (two rows of a 512 MiB matrix: 537 MB read, with the limit 268 MB)."""


def start_save(path: Path, items: dict[str, Any]) -> ocp.AsyncCheckpointer:
    """Copy items to host memory and start to write them; pass the result to `finish_save`.

    Args:
        path: absolute; does not exist. Appears, whole, once the writing is done.
        items: nested dict of arrays by item. They may be donated or deleted after the return.
    """
    saver = ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(**{item: _handler() for item in items}),
        # If the folders cannot be made (a full disk), Orbax's other threads would wait for them for minutes, and the
        # process with them.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    options = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
    trees = {
        item: ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda _: options, tree)) for item, tree in items.items()
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
        path.absolute() / item,
        args=ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)),
    )


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False)


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
