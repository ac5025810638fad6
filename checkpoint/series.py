"""The checkpoint series of a run: list, choose and check what is there.

    RUN/series/init/  000/ 001/ ...   checkpoints that are kept
    RUN/early/00000001/ 00000002/ ... extra ones before the first of those, if the recipe asks for them
    RUN/rolling/00001234/             the newest state, kept only to resume
    RUN/series.jsonl                  one line per series checkpoint, derived from the manifests

A checkpoint is a folder with items (`checkpoint.arrays`) and a manifest (`checkpoint.manifest`). It counts from the
moment its manifest is there, and the manifest is written last: whatever a crash leaves behind is without one. Adding to
a series is `checkpoint.writer`, its arrays on a mesh are `checkpoint.restore`; nothing here needs JAX.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import files, storage
from checkpoint.manifest import FILE, Entry, Kind, Manifest
from errors import RunError, UserError

if TYPE_CHECKING:
    from checkpoint.tensors import Tensors

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

    def __getitem__(self, index: int | str) -> "Tensors":
        """The parameters of one checkpoint, read where they are looked at: ``Series(run)[100]["norm.scale"][:8]``.

        Args:
            index: or any selector of one checkpoint, "latest".

        Raises:
            UserError: there is no such checkpoint, or more than one; RunError as `entries`.
        """
        from checkpoint.tensors import Tensors  # tensorstore: not needed to list what there is

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
