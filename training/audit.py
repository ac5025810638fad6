"""Whether the series of a run is whole: each checkpoint by itself, all together, and with config, ledger and data.

A checkpoint can be sound and still not be the one that was trained: put there from another run, written again with
other weights, out of place. Here everything that a run says of its checkpoints is compared with the checkpoints.
"""

import dataclasses
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkpoint import storage
from checkpoint.manifest import FILE, KINDS, Entry, Kind
from checkpoint.series import Series, line
from data.chunks import FileRecord
from data.dataset import ChunkedData
from data.mixed import MixedData
from errors import RunError, UserError
from parallel.mesh import MeshConfig
from training.config import Family, RunConfig
from training.metrics import read_lines
from training.record import RunRecord

_THREADS = 8  # hash files; more than cores hide the latency of network disks
_DIGESTS_SINCE = 3  # version of manifests
_ITEMS = ("params", "optimizer")  # whose sizes are listed


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found."""

    rows: dict[Kind, list[dict[str, Any]]]
    """Of each kind, as `row`, with "check": "ok" or "FAILED"."""
    problems: tuple[str, ...]
    """The run is not what it should be."""
    notes: tuple[str, ...]
    """What could not be compared, or is worth knowing, and is no fault."""


def audit(
    run: Path,
    families: Mapping[str, Family],
    open_data: Callable[[Path, RunConfig], Any],
    log: Callable[[str], None] = lambda _: None,
    content: bool = True,
) -> Audit:
    """Read and compare everything in a run directory but its logs and results, and the data it was trained on.

    Args:
        run: run directory.
        families: config classes by family name.
        open_data: gives the data set of a folder, as training reads it.
        log: told of each checkpoint, and of the data, when it was read.
        content: read all of the data too, not only its manifest.

    Raises:
        UserError: a manifest was written by a newer version of this code.
        RunError: a folder of the run cannot be read.
    """
    return _Auditor(run, families, open_data, log, content).audit()


def unchecked(series: Iterable[Entry], early: Iterable[Entry], rolling: Iterable[Entry]) -> Audit:
    """The same rows, without "check", when nothing was read."""
    return Audit({"series": [*map(row, series)], "early": [*map(row, early)], "rolling": [*map(row, rolling)]}, (), ())


class _Auditor:
    def __init__(
        self,
        run: Path,
        families: Mapping[str, Family],
        open_data: Callable[[Path, RunConfig], Any],
        log: Callable[[str], None],
        content: bool,
    ):
        self.content = content
        self.run, self.families, self.open_data, self.log = run, families, open_data, log
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.failed: set[Path] = set()
        self.params: dict[Path, str] = {}
        """Digests, as far as the parameters can be read."""

    def audit(self) -> Audit:
        # Everything that is listed at one time first: a run that is being trained goes on meanwhile.
        # The series last: a checkpoint is made after its parent, and must not be listed without it.
        try:
            listed = {kind: self._entries(kind) for kind in reversed(KINDS)}
            by_kind = {kind: listed[kind] for kind in KINDS}
        except OSError as e:
            raise RunError(f"{e.filename}: cannot be read ({e.strerror})") from e
        series, every = by_kind["series"], [e for kind in KINDS for e in by_kind[kind]]
        self._index(series)
        imported = bool(every) and all(e.manifest.origin for e in every)
        for entry in [] if imported else [e for e in every if e.manifest.origin]:
            self._wrong(entry, "was imported, among checkpoints that were trained; remove it")
        events = self._events(all(e.manifest.origin for e in every))
        record = self._record(every, imported)
        for entry in every:
            self._checkpoint(entry)
        if not imported:
            config = record.config if record else None
            self._parents(series, [*by_kind["early"], *by_kind["rolling"]], config)
            missing = self._positions(series, every, config) if config else set()
            if events is not None:
                self._saved(every, events, missing)
        elif events is not None:
            self._imported(every, events)
        self._same_parameters(every, imported, _idle(record, events is not None))
        if record and events is not None:
            self._data(record, every)
        rows = {kind: [row(e) | {"check": self._mark(e)} for e in entries] for kind, entries in by_kind.items()}
        return Audit(rows, tuple(self.problems), tuple(self.notes))

    def _problem(self, text: str, *entries: Entry) -> None:
        self.problems.append(text)
        self.failed |= {e.path for e in entries}

    def _wrong(self, entry: Entry, text: str) -> None:
        self._problem(f"{entry.path}: {text}", entry)

    def _mark(self, entry: Entry) -> str:
        return "FAILED" if entry.path in self.failed else "ok"

    # ---- what there is ---------------------------------------------------------------------------------------------

    def _entries(self, kind: Kind) -> list[Entry]:
        """Checkpoints of a kind by step; what else is in their folder is told."""
        parent, found = self.run / kind, []
        if not parent.exists():
            return []
        series = Series(self.run)
        for path in sorted(parent.iterdir()) if parent.is_dir() else [parent]:
            if not path.is_dir():
                self._problem(f"{path}: a file that belongs to no checkpoint; remove it")
            elif not (path / FILE).exists():
                self.notes.append(
                    f"{path}: not a finished checkpoint: being written, or left by a crash; the next train removes it"
                )
            else:
                try:
                    found.append(series.entry(path, kind))
                except RunError as e:
                    self._problem(str(e))
        return sorted((e for e in found if e), key=lambda e: (e.manifest.index, e.manifest.step))

    def _index(self, series: list[Entry]) -> None:
        """The list of the series says what the manifests say; in any order, and older code wrote fewer fields."""
        path = self.run / "series.jsonl"
        try:
            lines = read_lines(path)
            listed = {r["name"]: r for r in lines}
        except (RunError, OSError, ValueError, KeyError, TypeError) as e:
            self._problem(f"{path}: cannot be read ({e}); series --rebuild repairs it")
            return
        expected = {e.manifest.name: json.loads(line(e)) for e in series}
        for name, fields in listed.items():
            if name in expected and {"step", "manifest_sha256"} <= fields.keys() <= expected[name].keys():
                listed[name] = expected[name] | fields
        count, last = len(listed), series[-1].manifest.name if series else ""
        new = {n for n in listed.keys() - expected.keys() if (self.run / "series" / n / FILE).exists()}  # saved since
        listed = {n: fields for n, fields in listed.items() if n not in new}
        wrong = sorted(n for n in listed.keys() | expected.keys() if listed.get(n) != expected.get(n))
        if wrong == [last] and last not in listed and len(lines) == count:
            self.notes.append(f"{path}: does not name {last} (a crash just after it was saved); the next train adds it")
        elif wrong or len(lines) != count:
            self._problem(
                f"{path}: is not what the manifests say of {_few(wrong or listed)}; series --rebuild repairs it"
            )

    def _events(self, none_needed: bool) -> list[dict[str, Any]] | None:
        """The ledger; None if it cannot be read, empty where a run only began, or an import was killed."""
        path = self.run / "ledger.jsonl"
        try:
            if not path.exists() and none_needed:
                return []
            if not path.exists():
                raise RunError(f"{path}: is missing; put it back from a copy of the run")
            events = read_lines(path)
            if not all(isinstance(e, dict) and "event" in e for e in events):
                raise RunError(f"{path}: holds lines that are no events; the file was changed by something else")
        except (RunError, OSError, ValueError) as e:
            self._problem(str(e) if isinstance(e, RunError) else f"{path}: cannot be read ({e})")
            return None
        return events

    def _record(self, every: list[Entry], imported: bool) -> RunRecord | None:
        """Of a run that was trained by code whose configs are ours."""
        path = self.run / "config.json"
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            self._problem(f"{path}: cannot be read ({e}); put it back from a copy of the run")
            return None
        if imported:
            return None
        try:
            return RunRecord(self.run, self.families)
        except UserError as e:
            if isinstance(value, dict) and every and all(x.manifest.version < _DIGESTS_SINCE for x in every):
                self.notes.append(f"{path}: by older code; places in the run, and data, were not compared with it")
            else:
                self._problem(str(e))
        return None

    # ---- each by itself --------------------------------------------------------------------------------------------

    def _checkpoint(self, entry: Entry) -> None:
        from checkpoint.check import check  # reads arrays, with JAX and tensorstore; a listing needs neither

        begin, m = time.monotonic(), entry.manifest
        checked = check(entry)
        name = f"{m.kind}/{m.name}"
        if m.kind == "rolling" and not (entry.path / FILE).exists():
            self.notes.append(f"{entry.path}: was replaced by a newer one while it was read")
            return
        for problem in checked.problems:
            self._problem(problem, entry)
        if not checked.vouched and m.version >= _DIGESTS_SINCE and m.origin is None:
            self._wrong(entry, "its manifest has no digests, which the code that wrote it always saves")
        elif not checked.vouched:
            self.notes.append(f"{entry.path}: no digests (written by older code); only its files were compared")
        if "params" in checked.digests:
            self.params[entry.path] = checked.digests["params"]
        size = sum(f["bytes"] for f in m.files.values())
        self.log(f"{name}: {size / 1e6:,.1f} MB read in {time.monotonic() - begin:.1f} s, {self._mark(entry)}")

    # ---- all together ----------------------------------------------------------------------------------------------

    def _parents(self, series: list[Entry], others: list[Entry], config: RunConfig | None) -> None:
        """Each comes after the one of the series that it names, and goes on where that ended."""
        names = {e.manifest.name for e in series}
        for parent, entry in pairwise([None, *series]):
            assert entry is not None
            self._parent(entry, parent, names, config)
        for entry in others:
            before = [e for e in series if e.manifest.step < entry.manifest.step]
            self._parent(entry, before[-1] if before else None, names, config)

    def _parent(self, entry: Entry, parent: Entry | None, names: set[str], config: RunConfig | None) -> None:
        m = entry.manifest
        if m.parent_sha256 != (parent.sha256 if parent else None):
            if m.parent is not None and (parent is None or m.parent not in names):
                self._wrong(entry, f"its parent is {m.parent}, which is missing")
            elif parent is not None:
                self._wrong(entry, f"its parent is not {parent.path} as it is now")
            return
        p = parent.manifest if parent else None
        batch = config.data.global_batch if config else None
        stop = m.step * batch if batch else m.samples[1]
        tokens = m.step * config.data.tokens_per_step if config else m.tokens
        expected: dict[str, Any] = {"samples": (p.samples[1] if p else 0, stop), "tokens": tokens}
        if p:
            expected |= {"parent": p.name}
            if m.version >= _DIGESTS_SINCE:
                expected |= {"parent_index": p.index}
            if m.kind == "series":
                expected |= {"index": p.index + 1}
            if config is None and p.step:
                expected |= {"tokens": p.tokens * m.step / p.step}
        elif m.kind == "series":
            expected |= {"index": -1, "step": 0, "parent": None}
        for field, value in expected.items():
            if (found := getattr(m, field)) != value:
                after = f" after {p.name} at step {p.step}" if p else " at the beginning of a run"
                self._wrong(entry, f"its {field} is {found}, expected {value}{after}")
        if p and m.step <= p.step:
            self._wrong(entry, f"its step {m.step} is not after step {p.step} of its parent {p.name}")
        if p and m.wall_time < p.wall_time:
            self.notes.append(f"{entry.path}: is older than its parent {p.name} (the clock was moved back)")

    def _positions(self, series: list[Entry], every: list[Entry], config: RunConfig) -> set[str]:
        """Each is where the config says, and none is missing; return the names of those that are."""
        names = {-1: (0, 0, "init")} | {p.index: (p.phase, p.step, config.series.name_of(p)) for p in config.positions}
        for entry in series:
            m = entry.manifest
            if m.index not in names:
                self._wrong(entry, f"the run of config.json has no checkpoint of index {m.index}")
            elif (m.phase, m.step, m.name) != names[m.index]:
                phase, step, name = names[m.index]
                self._wrong(
                    entry,
                    f"is phase {m.phase}, step {m.step}; config.json says that index {m.index} is phase {phase}, "
                    f"step {step}, with the name {name}",
                )
        for entry in every:
            if entry.manifest.config_sha256 != config.sha256:
                self._wrong(entry, "was made by another config than config.json (config_sha256 differs)")
        # Of the step of a rolling checkpoint one of the series may be yet to come: it is saved right after.
        newest = max((e.manifest.step - (e.manifest.kind == "rolling") for e in every), default=-1)
        there = {e.manifest.index for e in series}
        missing = {name: step for n, (_, step, name) in names.items() if step <= newest and n not in there}
        if missing:
            shown = _few([f"{name} (step {step})" for name, step in missing.items()])
            self._problem(f"{self.run}/series: missing, up to step {newest}: {shown}; put them back from a copy")
        return set(missing)

    def _saved(self, every: list[Entry], events: list[dict[str, Any]], missing: set[str]) -> None:
        """Each is the one that was saved last under its name, as the ledger has it."""
        named = [e for e in events if e["event"] == "save" and {"kind", "name", "manifest_sha256"} <= e.keys()]
        saved = {(e["kind"], e["name"]): e for e in named}  # the last of each
        for entry in every:
            m = entry.manifest
            event = saved.pop((m.kind, m.name), None)
            if event is None and m.version >= _DIGESTS_SINCE:
                self.notes.append(f"{entry.path}: the ledger has no save of it (a crash just after it was saved)")
            elif event is not None and event["manifest_sha256"] != entry.sha256:
                self._wrong(
                    entry,
                    "is not what was saved: the ledger says that its manifest has the SHA-256 "
                    f"{event['manifest_sha256'][:12]}…, and it has {entry.sha256[:12]}…; put back what was saved",
                )
        for (kind, name), event in saved.items():
            if kind != "rolling" and name not in missing and not (self.run / kind / name / FILE).exists():
                self._problem(
                    f"{self.run / kind / name}: is gone, and the ledger says that it was saved, at step "
                    f"{event.get('step')}; put it back from a copy, or go on training from the one before"
                )

        rolling = [e for e in named if e["kind"] == "rolling"]
        newest = max((e.manifest.step for e in every if e.has("optimizer")), default=-1)
        path = self.run / "rolling" / rolling[-1]["name"] if rolling else None
        if path and rolling[-1]["step"] > newest and path.exists() and not (path / FILE).exists():
            self._problem(
                f"{path}: has lost its manifest, and is the newest state to go on from; put that back: the next train "
                f"removes the folder, and goes on from step {newest}"
            )

    def _imported(self, every: list[Entry], events: list[dict[str, Any]]) -> None:
        """Each holds what was imported last under its index, as the ledger has it."""
        noted = {e["index"]: e["digest"] for e in events if e["event"] == "import" and {"index", "digest"} <= e.keys()}
        for entry in every:
            was, now = noted.pop(entry.manifest.index, None), self.params.get(entry.path)
            if was is not None and now is not None and was != now:
                self._wrong(entry, f"holds other weights than were imported (digest {now[:12]}…, not {was[:12]}…)")
        for index in noted:
            self._problem(f"{self.run}/series: index {index} was imported, as the ledger says, and is gone")

    def _same_parameters(self, every: list[Entry], imported: bool, idle: Callable[[Entry, Entry], bool]) -> None:
        """Those of one step hold the same, those of different steps different parameters."""
        by_digest: dict[str, list[Entry]] = defaultdict(list)
        by_step: dict[int, list[Entry]] = defaultdict(list)
        for entry in sorted(every, key=lambda e: (e.manifest.step, e.manifest.index)):
            if entry.path in self.params:
                by_digest[self.params[entry.path]].append(entry)
                by_step[entry.manifest.step].append(entry)
        for a, b in (pair for same in by_digest.values() for pair in pairwise(same)):
            if imported:
                self.notes.append(f"{b.path}: holds the same parameters as {a.path}")
            elif a.manifest.step < b.manifest.step and not idle(a, b):
                self._problem(f"{b.path}: holds the same parameters as {a.path}, of another step", a, b)
        for a, b in (pair for same in by_step.values() for pair in pairwise(same)):
            if not imported and self.params[a.path] != self.params[b.path]:
                self._problem(f"{b.path}: holds other parameters than {a.path} of the same step", a, b)

    # ---- data ------------------------------------------------------------------------------------------------------

    def _tokenizer(self, data: ChunkedData) -> None:
        """The run's copy is the data's."""
        record = data.manifest.tokenizer
        copy = self.run / record.file if record else None
        if record and copy and copy.exists() and hashlib.sha256(storage.read(copy)).hexdigest() != record.sha256:
            self._problem(f"{copy}: is not the tokenizer of {data.directory} any more; copy that one here")

    def _data(self, record: RunRecord, every: list[Entry]) -> None:
        """What the run was trained on is what it was, where the ledger says that it lies."""
        try:
            folder, weights = record.data
        except UserError as e:
            self.notes.append(f"{e}; it was not looked at")
            return
        if folder is None:
            self.notes.append(f"{self.run}: was trained on synthetic data, of which there is nothing to check")
            return
        if not folder.is_dir():
            self.notes.append(f"{folder}: the data of the run is not there any more, and was not looked at")
            return
        begin = time.monotonic()
        try:
            data = self.open_data(folder, record.config)
            sha256 = (MixedData(data, weights) if weights else data).sha256
        except (UserError, RunError) as e:
            self._problem(str(e))
            return
        if other := [e for e in every if e.manifest.data_sha256 != sha256]:
            named = _few([f"{e.manifest.kind}/{e.manifest.name}" for e in other])
            self._problem(
                f"{folder}: its manifest is not of the data that {named} had read (data_sha256 differs)", *other
            )
        if not isinstance(data, ChunkedData):
            self.notes.append(
                f"{folder}: published files, which have no hashes that their content could be compared with"
            )
            return
        try:
            data.check_tokenizer()
            self._tokenizer(data)
        except RunError as e:
            self._problem(str(e))
        if not self.content:
            self.notes.append(f"{folder}: only its manifest was compared, as was asked for")
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            damage = [text for text in pool.map(lambda f: _damage(f, folder), data.manifest.files) if text]
        self.problems += damage
        size = sum(f.bytes for f in data.manifest.files)
        self.log(
            f"{folder}: {len(data.manifest.files)} files, {size / 1e6:,.1f} MB read in {time.monotonic() - begin:.1f} "
            f"s, {'FAILED' if damage else 'ok'}"
        )


def _damage(file: FileRecord, folder: Path) -> str | None:
    try:
        file.check_content(folder)
    except RunError as e:
        return str(e)
    return None


def _idle(record: RunRecord | None, ledger: bool) -> Callable[[Entry, Entry], bool]:
    """Whether no step between two checkpoints changed a parameter: each was skipped, or had a learning rate of 0.

    Without config only the learning rate of a last step is known, and without ledger nothing of what was skipped.
    """
    if record is None:
        return lambda a, b: b.manifest.learning_rate == 0 and b.manifest.step == a.manifest.step + 1
    skips = record.skips if ledger else []
    rate = record.config.optimizer.schedule(record.config.phase_steps)

    def idle(a: Entry, b: Entry) -> bool:
        steps = range(a.manifest.step, b.manifest.step)
        return all(any(s.step <= n < s.until for s in skips) or float(rate(n)) == 0 for n in steps)

    return idle


# ---- as a table ----------------------------------------------------------------------------------------------------


def row(entry: Entry) -> dict[str, Any]:
    """What the list of a series says of a checkpoint; None where it is not known."""
    m = entry.manifest
    sizes = {item: sum(f["bytes"] for n, f in m.files.items() if n.startswith(f"{item}/")) for item in _ITEMS}
    return {
        "name": m.name,
        "kind": m.kind,
        "index": m.index,
        "phase": m.phase if entry.is_placed else None,
        "step": m.step if entry.is_placed else None,
        "tokens": m.tokens if entry.is_placed else None,
        "loss_mean": m.loss.get("mean"),
        "learning_rate": m.learning_rate if entry.is_placed else None,
        "origin": m.origin and m.origin["folder"],
        "mesh": str(MeshConfig(**m.mesh)),
        "bytes": sum(f["bytes"] for f in m.files.values()),
        **{f"{item}_bytes": size if entry.has(item) else None for item, size in sizes.items()},
        "params_digest": m.digests.get("params"),
        "manifest_sha256": entry.sha256,
    }


def table(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Rows as a person reads them, names padded to a width."""
    columns = [("phase", "phase", 5, "d"), ("step", "step", 8, "d"), ("tokens", "tokens", 17, ",d")]
    columns += [("loss_mean", "mean loss", 10, ".4f"), ("learning_rate", "lr", 9, ".2e")]
    head = [f"{'':>{width}}", *(f"{title:>{n}}" for _, title, n, _ in columns)]
    lines = [" ".join([*head, f"{'params MB':>10} {'optim. MB':>10} digest    mesh"])]
    for r in rows:
        cells = [f"{'-' if r[name] is None else format(r[name], spec):>{n}}" for name, _, n, spec in columns]
        sizes = [r[f"{item}_bytes"] for item in _ITEMS]
        cells += [f"{'-' if size is None else format(size / 1e6, ',.1f'):>10}" for size in sizes]
        where = f"{r['origin'] or r['mesh']}  {r.get('check', '')}".rstrip()
        lines.append(" ".join([f"{r['name']:>{width}}", *cells, f"{(r['params_digest'] or '-')[:8]:8}  {where}"]))
    return lines


def listing(rows: Mapping[Kind, Sequence[Mapping[str, Any]]], run: Path) -> list[str]:
    """The series as a table, its size, and beneath it the other checkpoints."""
    width = max([5, *(len(r["name"]) for of_kind in rows.values() for r in of_kind)])
    lines = table(rows["series"], width)
    for kind, of_kind in rows.items():
        if of_kind and kind != "series":
            lines += [f"{kind}:", *table(of_kind, width)[1:]]
    count, size = len(rows["series"]), sum(r["bytes"] for of_kind in rows.values() for r in of_kind)
    return [*lines, f"{count} checkpoints in {run}, {size / 1e6:,.1f} MB in all"]


def _few(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:5]) + (f" (and {len(shown) - 5} more)" if len(shown) > 5 else "")
