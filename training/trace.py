"""Data provenance of a run: which documents a step read, and which steps and checkpoints had read a document or a text.

`data.trace` knows what a sample of a data set is; here a run's batch says which step reads it, and its series which
checkpoints come after that step.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from checkpoint.series import Series
from data.chunks import MANIFEST
from data.dataset import ChunkedData
from data.mixed import MixedData
from data.sample import Schedule
from data.tokenizer import Tokenizer, files_in, load
from data.trace import Origin, Piece, Place, Tracer, row_pieces
from errors import UserError
from training.config import Family, RunConfig
from training.record import RunRecord


class RunTracer:
    """Traces in a run, or in a data directory alone, whose steps are known only for a given batch.

    `open_data` gives the data set of a folder, as `train` reads it. Raises UserError where a run's data is not there,
    or is not what the run was trained on.
    """

    def __init__(
        self,
        folder: Path,
        families: Mapping[str, Family],
        open_data: Callable[[Path, RunConfig], Any],
        *,
        data: Path | None = None,
        global_batch: int | None = None,
    ):
        self.mixed: MixedData | None = None
        self.schedule: Schedule | None = None
        self.run = None if (folder / MANIFEST).exists() else folder
        if self.run is None:
            self.data: Any = ChunkedData(folder)
            if global_batch:
                steps = tuple(p.steps(global_batch) for p in self.data.phases)
                self.schedule = Schedule(self.data.phases, steps, global_batch)
            return
        record = RunRecord(folder, families)
        config, (named, weights) = record.config, record.data
        if named is None:
            raise UserError(f"{folder}: was trained on synthetic data, which is made of no documents")
        self.data = open_data(data or named, config)
        if weights:
            self.mixed = MixedData(self.data, weights)
        read = self.mixed or self.data
        if {e.manifest.data_sha256 for e in self._entries} - {read.sha256}:
            raise UserError(
                f"{read.directory}: is not the data that {folder} was trained on (its digest is {read.sha256[:12]}…); "
                "give --data the right one"
            )
        self.schedule = Schedule(read.phases, config.phase_steps, config.data.global_batch)

    @cached_property
    def _entries(self) -> list[Any]:
        return Series(self.run).entries() if self.run else []

    @cached_property
    def tracer(self) -> Tracer:
        """Of the data set; UserError for published files, of which only `step` and `sample` know something."""
        if not isinstance(self.data, ChunkedData):
            raise UserError(
                f"{self.data.directory}: published files can be asked only for steps; convert them (prepare "
                "--from-published) to look for documents and texts"
            )
        return Tracer(self.data)

    def step(self, step: int, row: int | None = None) -> list[dict[str, Any]]:
        """Return the samples of a step, or one row of it, with their documents."""
        if self.schedule is None:
            raise UserError("--step: a data directory has no steps; give --global-batch, or a run directory")
        batch = self.schedule.global_batch
        if not 0 <= step < self.schedule.steps:
            raise UserError(f"--step {step}: the run has steps 0 to {self.schedule.steps - 1}")
        if row is not None and not 0 <= row < batch:
            raise UserError(f"--row {row}: a batch has rows 0 to {batch - 1}")
        rows = range(batch) if row is None else [row]
        places = _places(self.mixed or self.data, self.schedule, step, rows)
        return [{**self._seen(step, r), **sample} for r, sample in zip(rows, self._samples(places))]

    def sample(self, chunk: int, position: int) -> list[dict[str, Any]]:
        """Return a sample of the data set, once for each step that reads it: where it came from, and its documents."""
        phases = self.data.phases
        if not 0 <= chunk < phases[-1].first_chunk + phases[-1].chunks:
            raise UserError(
                f"--chunk {chunk}: the data has chunks 0 to {phases[-1].first_chunk + phases[-1].chunks - 1}"
            )
        samples = next(p for p in phases if chunk < p.first_chunk + p.chunks).chunk_samples(chunk)
        if not 0 <= position < samples:
            raise UserError(f"--position {position}: chunk {chunk} has positions 0 to {samples - 1}")
        (sample,) = self._samples([(chunk, position)])
        return [{**reading, **sample} for reading in self._readings(chunk, position)]

    def document(self, document: str) -> list[dict[str, Any]]:
        """Return every document with this id: its text, and where each of its windows went."""
        found = []
        for source, number in self.tracer.find(document):
            windows = [w for place in self.tracer.places(source, number) for w in self._windows(place)]
            name = f"{source}/{self.tracer.document_id(source, number)}"
            found.append({"document": name, "text": self.tracer.text(source, number), "windows": windows})
        return found

    def text(self, text: str, most: int) -> list[dict[str, Any]]:
        """Return the first samples in which a text begins, in the order of chunks, with the document there."""
        found: list[dict[str, Any]] = []
        for chunk, position, pieces in self.tracer.search(text):
            hit = {"chunk": chunk, "position": position, "documents": [_piece(p) for p in pieces]}
            found += [{**reading, **hit} for reading in self._readings(chunk, position)]
            if len(found) >= most:
                break
        return found[:most]

    def _samples(self, places: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Samples of the data set with their documents, for places in order of chunks or not."""
        if not isinstance(self.data, ChunkedData):
            yield from (self._published(*place) for place in places)
            return
        for origin in _origins(self.tracer, places):
            pieces = [_piece(p) for p in self.tracer.pieces_of(origin)]
            yield {**dataclasses.asdict(origin), "documents": pieces}

    def _published(self, chunk: int, position: int) -> dict[str, Any]:
        """A sample of published files: its file and row, and the texts that its end-of-document tokens delimit."""
        *part, file, row = self.data.place(chunk, position)
        line = row + len(part)  # lines are counted from 1, rows of HDF5 files from 0
        pieces = row_pieces(self.data.sample(chunk, position), self._tokenizer, part[0] if part else "", file, line)
        return {"chunk": chunk, "position": position, "documents": [_piece(p) for p in pieces]}

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        found = [file for place in (self.run, self.data.directory) if place for file in files_in(place)]
        return load(found[0]) if found else None

    def _windows(self, place: Place) -> list[dict[str, Any]]:
        if place.chunk is None or place.position is None:
            return [{"window": place.window, "not_read": place.why}]
        at = {"window": place.window, "chunk": place.chunk, "position": place.position}
        return [{**at, **reading} for reading in self._readings(place.chunk, place.position)]

    def _readings(self, chunk: int, position: int) -> list[dict[str, Any]]:
        """Each step and row that reads a sample of the data set, with the checkpoints; at least one entry."""
        if self.schedule is None:
            return [{}]
        places = self.mixed.places(chunk, position) if self.mixed else [(chunk, position)]
        read = [found for place in places if (found := self.schedule.reader(*place))]
        return [self._seen(*found) for found in read] or [{"step": None, "row": None}]

    def _seen(self, step: int, row: int) -> dict[str, Any]:
        """A step and row, and of a run the first checkpoint, and the number of them, that had seen it."""
        if not self.run:
            return {"step": step, "row": row}
        after = [e.manifest.name for e in self._entries if e.manifest.step > step]
        return {"step": step, "row": row, "first_checkpoint": after[0] if after else None, "checkpoints": len(after)}


def documents(data: Any, schedule: Schedule, step: int) -> list[str]:
    """Names of the documents in a step's batch, each once, as `RunTracer.document` takes them.

    Of prepared data, also in other shares of its sources; of other data there is no index, and the list is empty.
    """
    prepared = data.data if isinstance(data, MixedData) else data
    if not isinstance(prepared, ChunkedData):
        return []
    places = _places(data, schedule, step, range(schedule.global_batch))
    tracer, names = Tracer(prepared), dict[str, None]()
    for origin in _origins(tracer, places):
        names |= dict.fromkeys(str(_piece(p)["document"]) for p in tracer.pieces_of(origin))
    return list(names)


def _places(data: Any, schedule: Schedule, step: int, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Where the samples of some rows of a step are in the data set itself: (chunk, position) of each."""
    places = [schedule.place(step, row) for row in rows]
    return [data.origin(*place) for place in places] if isinstance(data, MixedData) else places


def _origins(tracer: Tracer, places: Sequence[tuple[int, int]]) -> Iterator[Origin]:
    """What the samples at these places are; each run of one chunk is asked for at once."""
    for chunk, of_chunk in groupby(places, key=lambda place: place[0]):
        yield from tracer.origins(chunk, [position for _, position in of_chunk])


def _piece(piece: Piece) -> dict[str, Any]:
    document = None if piece.document is None else f"{piece.source}/{piece.document}"
    return {**dataclasses.asdict(piece), "document": document}


def lines(samples: list[dict[str, Any]], width: int = 100) -> list[str]:
    """Return samples as a person reads them: one line each, and one for each document."""
    text = []
    for s in samples:
        unread = "no step  " if "step" in s else ""  # the rest of a chunk that fills no batch
        step = unread if s.get("step") is None else f"step {s['step']} row {s['row']}  "
        origin = f"  {s['source']} window {s['window']}" if "window" in s and "source" in s else ""
        part = f" ({s['part']}, epoch {s['epoch']})" if s.get("part") else ""
        text.append(f"{step}chunk {s['chunk']} position {s['position']}{origin}{part}{seen(s)}")
        for d in s["documents"]:
            name = d["document"] or f"{d['source']} {d['file']}:{d['line']}"
            shown = " ".join(d["text"].split())
            shown = shown if len(shown) <= width else shown[: width - 1] + "…"
            text.append(f"  {name}  tokens {d['tokens'][0]}-{d['tokens'][1]}, from its token {d['skip']} on  {shown}")
    return text


def seen(place: Mapping[str, Any]) -> str:
    """Say which checkpoints had read it."""
    if not place.get("checkpoints"):
        return ""
    return f"; seen by {place['checkpoints']} checkpoints, first {place['first_checkpoint']}"


def document_lines(documents: list[dict[str, Any]], width: int = 400) -> list[str]:
    """Return documents and where they went as a person reads it."""
    text = []
    for d in documents:
        text.append(d["document"])
        for w in d["windows"]:
            if "not_read" in w:
                text.append(f"  window {w['window']}: {w['not_read']}")
            else:
                step = "" if w.get("step") is None else f", step {w['step']} row {w['row']}"
                text.append(f"  window {w['window']}: chunk {w['chunk']} position {w['position']}{step}{seen(w)}")
        if d["text"] is not None:
            text.append("  " + (d["text"] if len(d["text"]) <= width else d["text"][: width - 1] + "…"))
    return text
