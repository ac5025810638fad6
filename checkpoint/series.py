"""The checkpoint series of a run: list, choose, restore and check what is there, and add to it.

    RUN/series/init/  000/ 001/ ...   checkpoints that are kept
    RUN/early/00000001/ 00000002/ ... extra ones before the first of those, if the recipe asks for them
    RUN/rolling/00001234/             the newest state, kept only to resume
    RUN/series.jsonl                  one line per series checkpoint, derived from the manifests

A checkpoint is a folder with items (`checkpoint.arrays`) and a manifest (`checkpoint.manifest`). It counts from the
moment its manifest is there, and the manifest is written last: whatever a crash leaves behind is without one. In a run
of several processes, all call `SeriesWriter` and `restore` alike.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from checkpoint import arrays, digest, files, storage
from checkpoint.manifest import FILE, KINDS, Entry, Kind, Manifest
from checkpoint.names import flat, from_flat, nest, unnest
from checkpoint.stream import Stream
from checkpoint.tensors import Tensors
from errors import RunError, UserError

_BARRIER_MS = 20 * 60 * 1000  # hashing 100 GB on a slow disk, twice
REF_SYNTAX = "DIR@K, DIR@NAME, DIR@init, DIR@latest, DIR@A:B:C, DIR@all or DIR@step=N"


class Series:
    """The committed checkpoints of a run directory, as they are at each call.

    Args:
        run: run directory.
        damaged: if it is given, checkpoints with a damaged manifest are left out, and this says why, by their name.
    """

    def __init__(self, run: Path, damaged: dict[str, str] | None = None):
        self.run = storage.path(run)
        self._damaged = damaged
        self._known: dict[Path, tuple[tuple[int, ...], Entry]] = {}

    def entries(self) -> list[Entry]:
        """Series checkpoints by index, "init" first.

        Raises:
            RunError: a manifest is damaged or not of its folder.
            UserError: a manifest was written by a newer version.
        """
        return sorted(self._read("series"), key=lambda e: e.manifest.index)

    def early(self) -> list[Entry]:
        """The extra checkpoints before the first of the series, by step. Raises as `entries` does."""
        return sorted(self._read("early"), key=lambda e: e.manifest.step)

    def rolling(self) -> Entry | None:
        """The newest rolling checkpoint. Raises as `entries` does."""
        return max(self._read("rolling"), key=lambda e: e.manifest.step, default=None)

    def newest(self) -> Entry | None:
        """The checkpoint to resume from: of the furthest step with optimizer state. Raises as `entries` does."""
        both = [*self._read("rolling"), *self.entries()]
        rank = lambda e: (e.manifest.step, e.manifest.kind == "series")  # noqa: E731
        return max((e for e in both if e.has("optimizer")), key=rank, default=None)

    def resolve(self, selector: str) -> list[Entry]:
        """The checkpoints that a selector, the part of a reference after "@", names; at least one.

        ``K`` an index, a checkpoint's name, ``init``, ``latest``, ``all``, ``step=N`` (also of an early one), or a
        Python slice over the indices from 0 (``0:360:10``, ``-5:``); "init" is in no slice.

        Raises:
            UserError: nothing has this name, or it is not a selector; says what there is.
        """
        entries = self.entries()
        if not entries:
            raise UserError(f"{self.run}: no finished checkpoint in it")
        by_index = {e.manifest.index: e for e in entries}
        chosen: list[Entry | None]
        if selector == "all":
            chosen = [*entries]
        elif selector == "latest":
            chosen = [entries[-1]]
        elif selector == "init":
            chosen = [by_index.get(-1)]
        elif re.fullmatch(r"\d+", selector):
            chosen = [by_index.get(int(selector))]
        elif match := re.fullmatch(r"step=(\d+)", selector):
            every = [*entries, *self.early()]
            chosen = [next((e for e in every if e.manifest.step == int(match[1]) and e.is_placed), None)]
        elif re.fullmatch(r"(-?\d+)?:(-?\d+)?(:(-?\d+)?)?", selector):
            bounds = [int(part) if part else None for part in selector.split(":")]
            if bounds[2:] == [0]:
                raise UserError(f"{self.run}@{selector}: a slice cannot step by 0")
            chosen = [by_index.get(i) for i in range(*slice(*bounds).indices(entries[-1].manifest.index + 1))]
            chosen = [e for e in chosen if e]  # a pruned series has gaps
        elif named := [e for e in entries if e.manifest.name == selector]:
            chosen = [*named]
        else:
            names = [e.manifest.name for e in entries if not e.manifest.name.isdigit()]
            near = difflib.get_close_matches(selector, [*names, "init", "latest", "all", "step="], 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{self.run}@{selector}: not a checkpoint selector{hint}; write {REF_SYNTAX}")
        found = [e for e in chosen if e]
        if not found:
            raise UserError(f"{self.run}@{selector}: no such checkpoint; there are {_overview(entries, selector)}")
        return found

    def __getitem__(self, index: int | str) -> Tensors:
        """The parameters of one checkpoint, read where they are looked at: ``Series(run)[100]["norm.scale"][:8]``.

        Args:
            index: or any selector of one checkpoint, "latest".

        Raises:
            UserError: there is no such checkpoint, or more than one; RunError as `entries`.
        """
        entries = self.resolve(str(index))
        if len(entries) > 1:
            raise UserError(f"{self.run}@{index}: names {len(entries)} checkpoints, expected one")
        return Tensors(entries[0])

    def _read(self, kind: Kind) -> list[Entry]:
        parent = self.run / kind

        def entry(path: Path) -> Entry | None:
            try:
                return self.entry(path, kind)
            except RunError as e:
                if self._damaged is None:
                    raise
                self._damaged[path.name] = str(e)
                return None

        return [entry for entry in storage.each(parent, entry, storage.folders(parent)) if entry]

    def entry(self, path: Path, kind: Kind) -> Entry | None:
        """The checkpoint in a folder, None if it has no manifest. Raises as `entries` does."""
        file = path / FILE
        try:
            stamp = storage.stamp(file)
            if path in self._known and self._known[path][0] == stamp:
                return self._known[path][1]
            raw = storage.read(file)
        except FileNotFoundError:  # torn, or being written or removed just now
            return None
        except OSError as e:
            raise RunError(f"{file}: cannot be read ({e.strerror})") from e
        manifest = Manifest.from_json(raw, str(file))
        if (manifest.kind, manifest.name) != (kind, path.name):
            raise RunError(f"{path}: holds the manifest of {manifest.kind}/{manifest.name}; remove this copied folder")
        entry = Entry(path, manifest, hashlib.sha256(raw).hexdigest())
        self._known[path] = (stamp, entry)
        return entry


def parse_ref(ref: str) -> tuple[Path, str]:
    """Run directory and selector of a checkpoint reference.

    Raises:
        UserError: no "@", nothing after it, or no such directory; or where it is cannot be reached.
    """
    directory, at, selector = ref.rpartition("@")
    if not at or not directory or not selector:
        raise UserError(f"{ref!r}: not a checkpoint reference; write {REF_SYNTAX}")
    run = storage.reach(storage.path(directory))
    if not run.is_dir():
        raise UserError(f"{ref!r}: there is no directory {directory}; write {REF_SYNTAX}")
    return run, selector


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


def verify_files(entry: Entry, items: Collection[str] | None = None, share: tuple[int, int] = (0, 1)) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Args:
        entry: the checkpoint.
        items: leave out the files of other items.
        share: (k, n): look at the k-th of n parts of the files.

    Raises:
        RunError: names the files that are missing, changed or not part of it.
    """

    def concerned(name: str) -> bool:
        item, slash, _ = name.partition("/")
        return items is None or not slash or item in items

    try:
        found = [name for name in files.listing(entry.path) if concerned(name)]
        expected = {name: f for name, f in entry.manifest.files.items() if concerned(name)}
        mine = set(sorted({*found, *expected} - {FILE})[share[0] :: share[1]])
        expected = {name: f for name, f in expected.items() if name in mine}
        problems = files.differences(entry.path, expected, [name for name in found if name in mine])
        if FILE not in found or files.hashes(entry.path, [FILE])[FILE]["sha256"] != entry.sha256:
            problems.insert(0, f"{FILE} has changed")
    except OSError as e:
        raise RunError(f"{entry.path}: cannot be read: {e}") from e
    if problems:
        raise files.damaged(entry.path, problems)


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
    return dataclasses.replace(manifest, tensors=tensors, digests=wholes)


def line(entry: Entry) -> str:
    """The line of a checkpoint in ``series.jsonl``."""
    m = entry.manifest
    fields = ("name", "index", "phase", "step", "tokens", "learning_rate", "loss", "wall_time")
    record = {field: getattr(m, field) for field in fields} | {"digest": m.digests.get("params")}
    record |= {"bytes": sum(f["bytes"] for f in m.files.values()), "manifest_sha256": entry.sha256}
    return json.dumps(record, sort_keys=True) + "\n"


def _overview(entries: list[Entry], selector: str) -> str:
    """The checkpoints there are, near the number in a selector."""
    value = lambda e: e.manifest.step if "step" in selector else e.manifest.index  # noqa: E731
    number = re.search(r"\d+", selector)
    aim = int(number[0]) if number else 0
    near = sorted(sorted(entries, key=lambda e: abs(value(e) - aim))[:5], key=value)
    names = ", ".join(f"{'init' if e.manifest.index < 0 else e.manifest.index} (step {e.manifest.step})" for e in near)
    return f"{len(entries)}, the nearest {names}" if len(entries) > 5 else names
