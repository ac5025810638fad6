"""Adding checkpoints to the series of a run: arrays first, the manifest last, one writer at a time.

In a run of several processes, all call `SeriesWriter` alike.
"""

import contextlib
import dataclasses
import hashlib
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from checkpoint import arrays, digest, files, storage
from checkpoint.manifest import FILE, KINDS, Entry, Manifest
from checkpoint.names import flat, from_flat, nest
from checkpoint.series import Series, line
from checkpoint.stream import Stream
from errors import RunError, UserError

_BARRIER_MS = 20 * 60 * 1000  # hashing 100 GB on a slow disk, twice


class SeriesWriter:
    """Adds checkpoints to a run while it trains; the only writer of its directory. Use it in a ``with`` statement.

    Raises:
        UserError: another process writes in this run.
        RunError: the directory cannot be made or locked.
    """

    def __init__(self, run: Path):
        self.run = storage.absolute(storage.path(run))
        self._primary = jax.process_index() == 0
        self._made = self._primary and not self.run.exists()
        self._at_exit = contextlib.ExitStack()
        self._lock = files.lock(self.run) if self._primary else None
        if self._lock:
            self._at_exit.callback(self._lock.release)
        self._series = Series(self.run)
        self._thread: threading.Thread | None = None
        self._failure: RunError | None = None
        self._barriers = 0

    def __enter__(self) -> "SeriesWriter":
        self._at_exit.enter_context(arrays.quiet())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._at_exit:
            try:
                self.wait()
            except RunError as e:
                if error is None:
                    raise
                error.add_note(f"Besides: {e}")
            if error is not None and self._made and [p.name for p in self.run.iterdir()] == [".lock"]:
                storage.remove(self.run, ignore_errors=True)  # nothing came of it

    def clean(self) -> list[Path]:
        """Remove what a crash left: torn checkpoints, rolling ones that are not the newest; rebuild ``series.jsonl``.

        Returns:
            What was removed.
        """
        self.wait()
        removed: list[Path] = []
        if self._primary:
            removed = [p for kind in KINDS for p in storage.folders(self.run / kind) if not (p / FILE).exists()]
            for path in removed:
                files.remove(path, FILE)
            if newest := self._series.newest():
                removed += self._prune(newest.manifest)
            lines = "".join(map(line, self._series.entries()))
            index = self.run / "series.jsonl"
            if lines != (index.read_text() if index.exists() else ""):
                files.write_atomically(index, lines)
        self._barrier()
        return removed

    def save(
        self,
        manifest: Manifest,
        *,
        params: Any,
        optimizer: Any | None,
        copy: Any | None = None,
        then: Callable[[Entry], None] | None = None,
    ) -> None:
        """Save a state; returns once its arrays are copied to host memory. Waits for the save before this one.

        The digests of all arrays are computed where they are, and go into the manifest.

        Args:
            manifest: without ``tensors``, ``digests`` and ``files``.
            params: pytree of arrays; may be donated or deleted after the return.
            optimizer: the same, or None for a checkpoint that cannot be resumed from.
            copy: ``params`` in bfloat16, to be kept beside them.
            then: called with the checkpoint once it is committed, in another thread.

        Raises:
            RunError: the checkpoint exists, cannot be written, or the save before this one failed.
            UserError: names of arrays that cannot be folders.
        """
        self.wait()
        given = {"params": params, "optimizer": optimizer, "params_bfloat16": copy}
        items = {item: nest(tree) for item, tree in given.items() if tree is not None}
        for item, tree in items.items():
            if not tree:
                raise UserError(f"{manifest.name}: {item} holds no array; give None to save without")
        leaves = {f"{item}/{name}": x for item, tree in items.items() for name, x in flat(tree).items()}
        path = self._new(manifest, sum(x.nbytes for tree in items.values() for x in jax.tree.leaves(tree)))
        manifest = _describe(manifest, leaves, _digests(items))
        try:
            self._discard(path)
            saver = arrays.start_save(path, items)
        except Exception as e:
            self._discard(path)
            raise self._failed(path, e) from e
        self._thread = threading.Thread(
            target=self._commit, args=(saver, path, manifest, then), name=f"commit {path.name}"
        )
        self._thread.start()

    @contextlib.contextmanager
    def stream(self, manifest: Manifest, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> Iterator[Stream]:
        """Add a checkpoint of parameters that are never whole in memory, in a run of one process.

            with writer.stream(manifest, {"layers.attention.wq": ((32, 4096, 32, 128), "bfloat16")}) as target:
                target.write("layers.attention.wq", (7,), array)

        Leaving the block commits it; an error removes it, and the exception goes on.

        Args:
            manifest: without ``tensors`` and ``files``.
            shapes: shape and dtype of each array by dotted name; those below "layers" are stacked.

        Raises:
            RunError: the checkpoint exists, or cannot be written.
            UserError: a name that cannot be a folder; a part that was not written, or as `Stream.write`.
        """
        self.wait()
        if storage.is_remote(self.run):
            raise UserError(f"{self.run}: weights are imported piece by piece, which needs a run directory on a disk")
        if jax.process_count() > 1:
            raise UserError(f"{manifest.name}: {jax.process_count()} processes cannot stream a checkpoint; use one")
        described = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
        if not described or any(name.startswith(f"{other}.") for name in described for other in described):
            raise UserError(f"{manifest.name}: no arrays, or one named as a part of another: {', '.join(described)}")
        flat(from_flat(described))  # refuses what cannot be a folder
        if empty := [f"{name}: {list(x.shape)}" for name, x in described.items() if 0 in x.shape]:
            raise UserError(f"{manifest.name}: {empty[0]} holds no number; leave it out")
        tensors = {f"params/{name}": x for name, x in described.items()}
        path = self._new(manifest, sum(math.prod(x.shape) * x.dtype.itemsize for x in tensors.values()))
        manifest = _describe(manifest, tensors, {})
        try:
            self._discard(path)
            with contextlib.closing(Stream(Entry(path, manifest, sha256=""), self._failed)) as target:
                yield target
                found = target.finish()
            origin = target.origin or manifest.origin
            manifest = _describe(manifest, tensors, {"params": target.digests})
            manifest = dataclasses.replace(manifest, files=found, origin=origin)
            try:
                self._publish(path, manifest)
            except Exception as e:
                raise self._failed(path, e) from e
        except BaseException:
            self._discard(path)
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # if there is nothing else in it
            raise

    def wait(self) -> None:
        """Block until the last save is committed.

        Raises:
            RunError: it failed; or this process may write no longer.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure
        if self._lock:
            self._lock.check()

    def _commit(
        self, saver: ocp.AsyncCheckpointer, path: Path, manifest: Manifest, then: Callable[[Entry], None] | None
    ) -> None:
        try:
            arrays.finish_save(saver)
            if self._primary:
                manifest = dataclasses.replace(manifest, files=files.hashes(path, files.listing(path)))
                entry = self._publish(path, manifest)
                if then:
                    then(entry)
                if entry.has("optimizer"):
                    self._prune(manifest)
            self._barrier()
        except Exception as e:
            self._failure = self._failed(path, e)
            self._failure.__cause__ = e
            self._discard(path)

    def _new(self, manifest: Manifest, size: int) -> Path:
        """Folder of a checkpoint to be, of so many bytes."""
        path = self.run / manifest.kind / manifest.name
        if (path / FILE).exists():
            raise RunError(f"{path}: is finished, and a checkpoint is never overwritten; remove it to save it again")
        self._check_space(path, size)
        return path

    def _publish(self, path: Path, manifest: Manifest) -> Entry:
        """Write the manifest, from which moment the checkpoint counts, and its line in the index."""
        if self._lock:
            self._lock.check()
        text = manifest.to_json()
        files.write_atomically(path / FILE, text)
        entry = Entry(path, manifest, hashlib.sha256(text.encode()).hexdigest())
        if manifest.kind == "series":
            storage.append(self.run / "series.jsonl", line(entry))
        return entry

    def _prune(self, newest: Manifest) -> list[Path]:
        """Remove the rolling checkpoints that a newer one makes useless."""
        superseded = newest.step + (newest.kind == "series")
        old = [p for p in storage.folders(self.run / "rolling") if p.name.isdigit() and int(p.name) < superseded]
        for path in old:
            files.remove(path, FILE)
        return old

    def _discard(self, path: Path) -> None:
        """Remove what there is of an unfinished checkpoint; what cannot be removed now, `clean` removes."""
        if not self._lock or (path / FILE).exists():
            return
        try:
            self._lock.check()
        except RunError:  # it may be another's by now
            return
        names = re.compile(re.escape(path.name) + r"(\.orbax-checkpoint-tmp.*)?")
        for _ in range(50):  # writes that Orbax gave up may still be on their way and fill the folder again
            left = [p for p in storage.folders(path.parent) if names.fullmatch(p.name)]
            if not left:
                return
            for folder in left:
                storage.remove(folder, ignore_errors=True)
            time.sleep(0.05)

    def _failed(self, path: Path, error: Exception) -> RunError:
        what = "is saved, but not listed" if (path / FILE).exists() else "could not be saved"
        arrays.settle()
        remedy = "" if storage.is_remote(path) else "free some disk space and "
        return RunError(
            f"{path}: {what}: {files.reason(error)}. The finished checkpoints are untouched; {remedy}run the same "
            "command again"
        )

    def _check_space(self, path: Path, needed: int) -> None:
        """Refuse a save that the disk cannot hold before it half fills the disk. A bucket has no end."""
        if storage.is_remote(self.run):
            return
        free = shutil.disk_usage(self.run).free
        if self._primary and free < needed:
            raise RunError(
                f"{path}: could not be saved: it needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB "
                "left. The finished checkpoints are untouched; free some disk space and run the same command again"
            )

    def _barrier(self) -> None:
        """All processes pass together; safe in a thread, unlike a collective on the devices."""
        if jax.process_count() > 1:
            self._barriers += 1
            ocp.multihost.get_barrier_sync_fn()(key=f"checkpoint.series.{self._barriers}", timeout_ms=_BARRIER_MS)


def _digests(items: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Digests of all arrays by item and name. All processes call it alike."""
    leaves = [(item, name, x) for item, tree in items.items() for name, x in flat(tree).items()]
    values = digest.digests([(name, x) for _, name, x in leaves])
    found: dict[str, dict[str, str]] = {item: {} for item in items}
    for (item, name, _), value in zip(leaves, values, strict=True):
        found[item][name] = value
    return found


def _describe(manifest: Manifest, leaves: Mapping[str, Any], digests: Mapping[str, Mapping[str, str]]) -> Manifest:
    """The manifest with its ``tensors`` and ``digests``, those of each item by name."""
    known = {f"{item}/{name}": value for item, values in digests.items() for name, value in values.items()}
    if unknown := sorted(known.keys() - leaves.keys()):
        raise UserError(f"digests of {', '.join(unknown[:5])}, but the arrays are {', '.join(leaves)}")
    tensors = {
        name: {"shape": list(x.shape), "dtype": x.dtype.name} | ({"digest": known[name]} if name in known else {})
        for name, x in leaves.items()
    }
    wholes = {item: digest.whole(values) for item, values in digests.items() if values}
    return dataclasses.replace(manifest, tensors=tensors, digests=wholes, digest_version=digest.VERSION)
