"""Contamination: benchmark items whose words stand in the data that a run was trained on, and which steps read them.

An item is found where n of its words in a row (13, as in GPT-3; of an item that is shorter, all its words) stand in one
row of the training data, within one document; `analysis.ngrams` says what words are.

The data is read once, chunk by chunk; what was found is kept in ``RUN/results/contamination/scan-…``, so that a scan
that was killed goes on, and later checkpoints cost nothing.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from analysis import results
from analysis.ngrams import Grams, Hits, normalised, scan, token_pieces
from analysis.results import Result, Scored, estimate
from analysis.subject import Subject, Target
from checkpoint.manifest import Entry
from data.sources import SourceSpec, read
from errors import RunError, UserError

KIND = "contamination"
VERSION = 2  # of what a result holds
_SCAN = 1  # of what is kept of a scan
_NEVER = np.iinfo(np.int64).max
_TENTHS = 10
_NO_TABLE = "its results have no table of items"


@dataclass(frozen=True)
class Contamination:
    """Which benchmark items stand in the training data, from which step on, and what scores are without them."""

    tasks: tuple[str, ...] = ()
    """Evaluation tasks whose items are looked for; by default all that have their files in the folder."""
    benchmarks: Path | None = None
    """Folder with the files of the tasks: that of `evaluate`."""
    items: tuple[str, ...] = ()
    """NAME=PATH: items of a file or folder, each a line of JSONL, a row of Parquet or a text file; if the run has
    results of ``evaluate/NAME``, hashes of the text name its items."""
    text_field: str | None = None
    """Field with the text of --items; by default `text`, else `content`."""
    n: int = 13
    """Words in a row that make an overlap."""
    shortest: int = 8
    """Items with fewer words than n but so many are looked for as a whole; shorter ones are not tested."""
    share: float = 0.0
    """Share of its n-grams that makes an item contaminated; 0 = a single one does (GPT-3). PaLM: n = 8, share 0.7."""
    workers: int = 1
    """Processes that read the data."""

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.n <= 1000:
            raise UserError(f"--n {self.n}, --shortest {self.shortest}: needed is 1 <= shortest <= n <= 1000")
        if not 0 <= self.share <= 1:
            raise UserError(f"--share {self.share}: must be between 0 and 1")
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1 is needed")
        if self.benchmarks is None and not self.items:
            raise UserError("give what to look for: --benchmarks DIR (and --tasks NAME …), or --items NAME=PATH …")
        if self.tasks and self.benchmarks is None:
            raise UserError("--tasks: give the folder of their files with --benchmarks")

    def open(self, target: Target, note: Callable[[str], None]) -> list["Overlaps"]:
        """Scan the data, or what is left of it, and return the one study.

        Raises:
            UserError: no items; a run that was not trained here; data that is synthetic, published files that were not
                converted, or not the run's.
            RunError: a damaged data file, a full disk, a lost worker.
        """
        tracer = target.tracer
        found_in = tracer.tracer
        tokenizer = found_in.tokenizer or target.tokenizer
        items = self._read(note)
        grams = Grams.of([item.text for item in items], self.n, self.shortest)
        digest = results.sha256_of([_SCAN, found_in.data.sha256, tokenizer.sha256, self.n, self.shortest, items])
        folder = results.folder(target.run, KIND) / f"scan-{digest[:16]}"
        pieces = token_pieces(tokenizer, found_in.data.vocab_size)
        hits, scanned = scan(found_in.data, grams, pieces, folder, self.workers, note)
        study = Overlaps(self, target, items, tokenizer.sha256, Readings(target, grams, hits), scanned)
        study.drop_stale(target, note)
        return [study]

    def _read(self, note: Callable[[str], None]) -> list["Item"]:
        items: list[Item] = []
        tasks = self._tasks(note)
        for task in tasks:
            from analysis.suites import documents  # reads the harness's rows

            assert self.benchmarks is not None
            items += [Item(task, doc_hash, text) for doc_hash, text in documents(task, self.benchmarks)]
        for given in self.items:
            name, equals, location = given.partition("=")
            if not equals:
                raise UserError(f"--items {given}: write NAME=PATH")
            spec = SourceSpec(name, location, self.text_field)
            items += [Item(name, hashlib.sha256(d.text.encode()).hexdigest(), d.text) for d in read(spec)]
        names = [*tasks, *(given.partition("=")[0] for given in self.items)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{twice[0]}: named twice among --tasks and --items; name each once")
        return items

    def _tasks(self, note: Callable[[str], None]) -> tuple[str, ...]:
        if self.tasks or self.benchmarks is None:
            return self.tasks
        from analysis.suites import TASKS

        found = {name: task for name, task in TASKS.items() if task.files}
        missing = [name for name, task in found.items() if task.missing(self.benchmarks)]
        if len(missing) == len(found):
            raise UserError(f"{self.benchmarks}: has the files of no task; give the folder that `evaluate` reads")
        if missing:
            note(f"left out, since their files are missing: {', '.join(missing)}")
        return tuple(name for name in found if name not in missing)


class Item(NamedTuple):
    """What is looked for."""

    task: str
    doc_hash: str
    text: str


# ---- who read it -----------------------------------------------------------------------------------------------------


class Readings:
    """When a run read the n-grams that were found. Batches whose update was skipped were not read.

    Args:
        target: the run.
        grams: what was looked for.
        hits: what was found.
    """

    def __init__(self, target: Target, grams: Grams, hits: Hits):
        self.grams, self._tracer = grams, target.tracer
        samples, sample = np.unique(np.stack([hits.chunk, hits.position]), axis=1, return_inverse=True)
        self._samples = samples.T
        steps = [[step for step, _ in target.readers(int(c), int(p))] for c, p in self._samples]
        first = np.array([min(s, default=_NEVER) for s in steps], np.int64)
        read_first = np.full(len(grams.at), _NEVER)
        np.minimum.at(read_first, hits.gram, first[sample])
        # An item's n-grams by the step that first read each.
        order = np.lexsort((read_first[grams.gram], grams.item))
        item, step = grams.item[order], read_first[grams.gram][order]
        self.item, self.step = item[step < _NEVER], step[step < _NEVER]
        """int64 each, sorted: item, and the step that first read one of its n-grams, for each that was read."""
        which, pair = _expand(grams.gram, hits.gram)
        found = np.stack([grams.item[pair], first[sample[which]], sample[which], hits.gram[which]])
        found = found[:, np.lexsort(found[::-1])]
        self.found = np.unique(found[0])
        """Items of which something was found, whether a step read it or not."""
        self._example = found[:, np.searchsorted(found[0], self.found)].T
        counts = np.array([len(s) for s in steps], np.int64)
        held = np.unique(found[[0, 2]], axis=1)
        flat = np.array([n for s in steps for n in s], np.int64)
        ends = np.cumsum(counts)
        again = np.repeat(np.arange(held.shape[1]), counts[held[1]])
        within = np.arange(len(again)) - np.repeat(np.cumsum(counts[held[1]]) - counts[held[1]], counts[held[1]])
        at = (ends - counts)[held[1][again]] + within
        self.steps = np.unique(np.stack([held[0][again], flat[at]]), axis=1)
        """int64 [2, …]: (item, step that read some of it)."""

    def examples(self) -> dict[int, tuple[int, int, str | None]]:
        """Of each item found: (chunk, position, document) that was read first, as `trace` has them."""
        names: dict[int, tuple[int, int, str | None]] = {}
        example = self._example[np.argsort(self._samples[self._example[:, 2], 0], kind="stable")]
        for chunk in np.unique(self._samples[example[:, 2], 0]).tolist() if len(example) else ():
            here = example[self._samples[example[:, 2], 0] == chunk]
            positions = self._samples[here[:, 2], 1].tolist()
            origins = self._tracer.tracer.origins(chunk, positions)
            for (item, _, _, gram), position, origin in zip(here.tolist(), positions, origins):
                text = f" {self.grams.text(gram)} "
                pieces = self._tracer.tracer.pieces_of(origin)
                document = None
                for piece in pieces:
                    if text in f" {normalised(piece.text)} ":
                        name = f"{piece.file}:{piece.line}" if piece.document is None else piece.document
                        document = f"{piece.source}/{name}"
                        break
                names[item] = chunk, position, document
        return names


def _expand(ascending: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (number of a key, place in `ascending` of one that equals it), all there are."""
    start, stop = (np.searchsorted(ascending, keys, side=side) for side in ("left", "right"))
    which = np.repeat(np.arange(len(keys)), stop - start)
    within = np.arange(len(which)) - np.repeat(np.cumsum(stop - start) - (stop - start), stop - start)
    return which, start[which] + within


# ---- the study -------------------------------------------------------------------------------------------------------


class Overlaps:
    """What of the items each checkpoint had seen."""

    kind = KIND
    needs_weights = False

    def __init__(
        self,
        asked: Contamination,
        target: Target,
        items: list[Item],
        tokenizer_sha256: str,
        readings: Readings,
        scanned: dict[str, Any],
    ):
        self._asked, self._run, self._items, self._readings = asked, target.run, items, readings
        self._scanned = {name: value for name, value in scanned.items() if name != "seconds"}
        self._entries = sorted(target.series.entries(), key=lambda e: e.manifest.step)
        self._examples = readings.examples()
        grams, tracer = readings.grams, target.tracer
        self._ngrams = grams.counts
        self._needed = np.maximum(1, np.ceil(asked.share * self._ngrams - 1e-9).astype(np.int64))
        self._of_run = np.bincount(readings.item, minlength=len(items))
        self._contaminated = self._of_run >= self._needed
        at = np.searchsorted(readings.item, np.arange(len(items))) + self._needed - 1
        self._first = np.where(self._contaminated, np.append(readings.step, 0)[np.minimum(at, len(readings.step))], -1)
        self._task = np.array([item.task for item in items])
        self._tasks = list(dict.fromkeys(item.task for item in items))
        self._settings = {
            "version": VERSION,
            "n": asked.n,
            "shortest": asked.shortest,
            "share": asked.share,
            "data": (tracer.mixed or tracer.data).sha256,
            "tokenizer": tokenizer_sha256,
            "items": {task: results.sha256_of([i for i in items if i.task == task]) for task in self._tasks},
            "skipped": [[skip.step, skip.until] for skip in target.record.skips],
        }

    def settings(self) -> Mapping[str, Any]:
        """Data, items, n, and the steps that the guard skipped.

        With what settings a task was evaluated, a result says itself: see `drop_stale`.
        """
        return self._settings

    def drop_stale(self, target: Target, note: Callable[[str], None]) -> None:
        """Remove results that this study would keep but that are no longer true, so that a sweep makes them anew.

        Such are those of whose tasks one has been evaluated, or evaluated otherwise, since, and those that name
        another first checkpoint than a series that has grown has now.

        Raises:
            RunError: a result cannot be read.
        """
        for task in self._tasks:
            found = results.of_kind(self._run, f"evaluate/{task}")
            if found and not any(results.table_path(r.path, "items").exists() for r in found):
                note(f"{task}: {_NO_TABLE}, so that there are no scores with and without what was seen")
        kinds = [k for k in results.kinds(self._run) if re.fullmatch(f"{KIND}(-[A-Za-z0-9_.]+)?", k)]
        now = results.sha256_of(self._settings)
        own = [r for k in kinds for r in results.of_kind(self._run, k) if results.sha256_of(r.settings) == now]
        chosen = {e.manifest.name: e for e in target.series.resolve(target.selector)} if own else {}
        for result in own:
            entry = chosen.get(result.path.stem)
            if entry and (why := self._stale(result, entry)):
                note(f"{result.path}: {why}; made anew")
                for path in (result.path, results.table_path(result.path, "items")):
                    path.unlink(missing_ok=True)

    def _stale(self, result: Result, entry: Entry) -> str | None:
        """Why a result is no longer true, None if it is."""
        for task in self._tasks:
            evaluated = _evaluated(self._run, task, entry)
            if result.summary["tasks"][task]["evaluation"] != _settings_of(evaluated):
                return f"{task} has been evaluated since" if evaluated else f"{task} is not evaluated any more"
        try:
            table = result.table("items")
        except RunError as error:
            return str(error)
        after = [None if step is None else self._checkpoint_after(step) for step in table["first_step"].to_pylist()]
        return None if table["first_checkpoint"].to_pylist() == after else "the series has other checkpoints now"

    def score(self, subject: Subject) -> Scored:
        """Say what a checkpoint had seen.

        Summary, of each task: items; testable, too_short; contaminated, by a batch that the run reads at any step;
        unread, in the data but in no batch that the run reads; seen, by this checkpoint; seen_share, of the testable;
        shares, counts of the seen items by tenths of their n-grams seen (0-0.1, …, 0.9-1); scores, for each metric of
        the checkpoint's own ``evaluate/TASK`` "all", "without_seen" and "only_seen" items, value, stderr and n each;
        scores_missing, why there are none, or None; evaluation, the SHA-256 of the settings of that ``evaluate/TASK``
        (None: not evaluated). Items that are too short count as not seen.

        Table ``items``: items of which something is in the data: task, doc_hash, ngrams, found (seen by this
        checkpoint), found_in_run, share (of its n-grams seen), seen, first_step (that made it contaminated; null:
        none), first_checkpoint, steps (that read some of it before this checkpoint), and the sample that was read
        first: chunk, position, document.

        Raises:
            RunError: an evaluation's table cannot be read.
        """
        m, readings, count = subject.entry.manifest, self._readings, len(self._items)
        found = np.bincount(readings.item[readings.step < m.step], minlength=count)
        share = found / np.maximum(self._ngrams, 1)
        seen = found >= self._needed
        in_data = np.zeros(count, bool)
        in_data[readings.found] = True
        tasks = {}
        for task in self._tasks:
            of_task = self._task == task
            testable = int((self._ngrams[of_task] > 0).sum())
            evaluated = _evaluated(self._run, task, subject.entry)
            scores, missing = self._scores(evaluated, of_task, seen)
            tasks[task] = {
                "items": int(of_task.sum()),
                "testable": testable,
                "too_short": int(of_task.sum()) - testable,
                "contaminated": int((of_task & self._contaminated).sum()),
                "unread": int((of_task & in_data & (self._of_run == 0)).sum()),
                "seen": int((of_task & seen).sum()),
                "seen_share": int((of_task & seen).sum()) / testable if testable else None,
                "shares": np.histogram(share[of_task & seen], _TENTHS, (0, 1))[0].tolist(),
                "scores": scores,
                "scores_missing": missing,
                "evaluation": _settings_of(evaluated),
            }
        summary = {
            "headline": "seen_share",
            "n": self._asked.n,
            "step": m.step,
            "scanned": self._scanned,
            "tasks": tasks,
        }
        return Scored(summary, {"items": self._table(m.step, found, share, seen)})

    def _table(self, step: int, found: np.ndarray, share: np.ndarray, seen: np.ndarray) -> pa.Table:
        read = self._readings.steps
        steps = np.bincount(read[0][read[1] < step], minlength=len(self._items))
        which = self._readings.found.tolist()
        first = [int(self._first[i]) for i in which]
        return pa.table(
            {
                "task": pa.array([self._items[i].task for i in which], pa.string()),
                "doc_hash": pa.array([self._items[i].doc_hash for i in which], pa.string()),
                "ngrams": self._ngrams[which],
                "found": found[which],
                "found_in_run": self._of_run[which],
                "share": share[which],
                "seen": seen[which],
                "first_step": pa.array([f if f >= 0 else None for f in first], pa.int64()),
                "first_checkpoint": pa.array([self._checkpoint_after(f) for f in first], pa.string()),
                "steps": steps[which],
                **{
                    name: pa.array([self._examples[i][n] for i in which], kind)
                    for n, (name, kind) in enumerate(
                        {"chunk": pa.int64(), "position": pa.int64(), "document": pa.string()}.items()
                    )
                },
            }
        )

    def _checkpoint_after(self, step: int) -> str | None:
        return next((e.manifest.name for e in self._entries if e.manifest.step > step), None) if step >= 0 else None

    def _scores(
        self, evaluated: Result | None, of_task: np.ndarray, seen: np.ndarray
    ) -> tuple[dict[str, Any], str | None]:
        """Scores, and if there are none, why."""
        if evaluated is None:
            return {}, "the checkpoint has no results of the task"
        if not results.table_path(evaluated.path, "items").exists():
            return {}, _NO_TABLE
        table = evaluated.table("items")
        known_items = {self._items[i].doc_hash for i in np.flatnonzero(of_task)}
        seen_items = {self._items[i].doc_hash for i in np.flatnonzero(of_task & seen)}
        hashes = table["doc_hash"].to_pylist()
        if others := sum(h not in known_items for h in hashes):
            return {}, f"{others} of the {len(hashes)} items that were evaluated are not those that were looked for"
        tainted = np.array([h in seen_items for h in hashes], bool)
        scores = {}
        for name, values in _metrics(evaluated, table):
            known = np.isfinite(values)
            groups = {"all": known, "without_seen": known & ~tainted, "only_seen": known & tainted}
            scores[name] = {group: estimate(values[chosen]) for group, chosen in groups.items()}
        return scores, None if scores else "the results of the task have no metric that is a mean over items"


def _metrics(result: Result, table: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the items' float64 values (NaN: none) of each metric that is a mean over items.

    Another one, as a perplexity, is not what its items' values would give. MMLU's is the mean over subjects: over the
    items it is called ``NAME_pooled``.
    """
    for name in table.column_names:
        if isinstance(figure := result.summary.get(name), dict) and "value" in figure:
            values = np.array([math.nan if v is None else float(v) for v in table[name].to_pylist()])
            figure = result.summary.get(f"{name}_pooled", figure)
            if np.isfinite(values).any() and math.isclose(np.nanmean(values), figure["value"], rel_tol=1e-6):
                yield name, values


def _evaluated(run: Path, task: str, entry: Entry) -> Result | None:
    """A checkpoint's own result of a task."""
    found = results.read(results.folder(run, f"evaluate/{task}") / f"{entry.manifest.name}.json")
    return found if found and found.checkpoint["digest"] == results.digest_of(entry) else None


def _settings_of(evaluated: Result | None) -> str | None:
    return None if evaluated is None else results.sha256_of(evaluated.settings)
