"""From a sample of the training order to the documents in it, and from a document or a text to its samples.

Everything follows from the manifest and the document index; the only tokens read are those of the samples asked for,
and only a search for a text reads all of them. `data.sample.Schedule` says which step reads a sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from data.chunks import FileRecord, SampleFile, SourceRecord
from data.dataset import ChunkedData
from data.fim import Fim, reassemble
from data.index import DocumentIndex, read_rows
from data.packing import training_number, training_window, window_start
from data.sample import Sample
from data.tokenizer import Tokenizer, load
from errors import RunError, UserError

_SEARCHED_AT_ONCE = 256  # samples


@dataclass(frozen=True)
class Origin:
    """What a sample is: window `window` of a source, for the `epoch`-th time in this part of the mixture."""

    chunk: int
    position: int
    source: str
    window: int
    part: str | None
    epoch: int


@dataclass(frozen=True)
class Piece:
    """Part of a document in a sample: its tokens `tokens` of the sample are the document's own from `skip` on.

    In rearranged samples (fill in the middle) they are those of the window before it was rearranged, and the text is
    put in order again, as far as the sample holds it.
    """

    source: str
    document: str | None
    """Its id; None in published rows, whose documents have no names."""
    file: str
    line: int
    """In the file, from 1; 0 if the file is the document. Of published rows: the row."""
    tokens: tuple[int, int]
    skip: int
    text: str


@dataclass(frozen=True)
class Place:
    """Where a window of a document went: to a chunk and position, or nowhere (`why`)."""

    window: int
    chunk: int | None
    position: int | None
    why: str | None
    part: str | None = None
    """Of the mixture that reads it there."""


class Tracer:
    """Traces in one prepared data set."""

    def __init__(self, data: ChunkedData):
        self.data, self.manifest = data, data.manifest
        self._numbers = {s.name: j for j, s in enumerate(self.manifest.sources)}
        self._index = lru_cache(maxsize=None)(self._checked_index)
        self._file = lru_cache(maxsize=4)(self._open)

    def _checked_index(self, name: str) -> DocumentIndex:
        """The index of a source; RunError if it is not what was written: read once, as nothing else would tell."""
        for record in self.manifest.sources[self._numbers[name]].index_files:
            record.check_content(self.data.directory)
        return DocumentIndex(self.data.directory, name)

    def _open(self, record: FileRecord) -> SampleFile:
        sizes = {"sequence_length": self.manifest.sequence_length, "vocab_size": self.manifest.vocab_size}
        return SampleFile(self.data.directory, record, **sizes)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The data's own, None if it came without one."""
        return load(self.data.tokenizer_file) if self.data.tokenizer_file else None

    @cached_property
    def _fim(self) -> Fim:
        assert self.tokenizer is not None
        return Fim.of(self.tokenizer)

    @cached_property
    def _marks(self) -> np.ndarray:
        """The ids that are no text."""
        assert self.tokenizer is not None
        return np.array(sorted({self.tokenizer.eos_id, *self.tokenizer.special.values()}), np.int32)

    # ---- from a sample to documents ----------------------------------------------------------------------------

    def origin(self, chunk: int, position: int) -> Origin:
        """Return what the sample at a position of a chunk is; IndexError outside the data set."""
        return self.origins(chunk, [position])[0]

    def origins(self, chunk: int, positions: Sequence[int]) -> list[Origin]:
        """Return what the samples at positions of one chunk are: many cost hardly more than one."""
        if self.manifest.layout == "chunks":
            asked = positions[0] if len(positions) == 1 else np.array(positions, np.int64)  # one needs no sorted chunk
            found = map(np.atleast_1d, self.manifest.chunk_layout.window_of(chunk, asked))
            names = [s.name for s in self.manifest.sources]
            return [Origin(chunk, p, names[j], int(w), None, 0) for p, j, w in zip(positions, *found)]
        n = self._phase(chunk)
        phase, mixture = self.manifest.phase_samples[n], self.manifest.mixtures[n]
        slots = (chunk - phase.first_chunk) * phase.samples_per_chunk + np.array(positions, np.int64)
        origins = []
        for position, which, epoch, number in zip(positions, *mixture.at(slots)):
            part = self.manifest.phases[n].parts[which]
            window = int(training_window(number, self.manifest.held_out[self._numbers[part.reads]]))
            origins.append(Origin(chunk, position, part.reads, window, part.name, int(epoch)))
        return origins

    def pieces(self, chunk: int, position: int) -> list[Piece]:
        """Return the documents in a sample, in order; RunError when the sample or the index is corrupt."""
        return self.pieces_of(self.origin(chunk, position))

    def pieces_of(self, origin: Origin) -> list[Piece]:
        """Return the documents in the sample of an origin; see `pieces`."""
        sample = self.data.sample(origin.chunk, origin.position)
        source = self._source(origin.source)
        if not source.documents:
            return row_pieces(sample, self.tokenizer, source.label, *self.published_row(origin))
        start = window_start(origin.window, self.manifest.sequence_length, self.manifest.overlap)
        index = self._index(source.name)
        spans = index.spans(start, start + self.manifest.sequence_length + 1)
        texts = self._texts(sample, [((s.start, s.stop), s.skip) for s in spans], self._rearranged(origin))
        return [
            Piece(source.name, index.id(s.number), *index.where(s.number), (s.start, s.stop), s.skip, text)
            for s, text in zip(spans, texts)
        ]

    def _rearranged(self, at: Origin | Place) -> bool:
        if at.chunk is None or at.part is None:
            return False
        parts = self.manifest.phases[self._phase(at.chunk)].parts
        return any(p.name == at.part and p.fim_rate > 0 for p in parts)

    def _text(self, tokens: np.ndarray, begins: bool) -> str:
        assert self.tokenizer is not None
        return text_of(tokens, self.tokenizer, begins)

    def _texts(self, sample: Sample, spans: list[tuple[tuple[int, int], int]], rearranged: bool) -> list[str]:
        if self.tokenizer is None:
            return [""] * len(spans)
        if rearranged:
            row = sample.inputs[sample.inputs != self.tokenizer.bos_id]  # in no other text here is it shown
            found = dict(zip(self._kept([span for span, _ in spans]), reassemble(row, self.tokenizer, self._fim)))
            return [found.get(i, "") for i in range(len(spans))]
        tokens = sample.tokens
        return [self._text(tokens[a:b], begins=not skip) for (a, b), skip in spans]

    def _kept(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Which of a window's documents are in its rearranged row: the originals lost a `</s>` that stood alone."""
        lost = self.manifest.compat == "original"
        return [i for i, (start, stop) in enumerate(spans) if not lost or stop - start > 1 or i == len(spans) - 1]

    def published_row(self, origin: Origin) -> tuple[str, int]:
        """Return (file, row from 1) of a sample of converted data."""
        if self.manifest.layout == "chunks":
            place = self.manifest.chunk_layout.element_of(self._numbers[origin.source], origin.window)
            assert not isinstance(place, str)  # it is the window of a sample
            return self.manifest.published[origin.chunk], place[1] + 1
        row = origin.window
        for file, rows in read_rows(self.data.directory, origin.source):
            if row < rows:
                return file, row + 1
            row -= rows
        raise RunError(f"{self.data.directory}: source {origin.source} has no row {origin.window}; prepare it again")

    # ---- from a document to samples ----------------------------------------------------------------------------

    def find(self, document: str) -> list[tuple[str, int]]:
        """Return (source, number) of the documents with this id; it may be written `source/id` to name one of several.

        Raises UserError when there is none.
        """
        found = []
        for source in self.manifest.sources:
            for name in {document, document.removeprefix(f"{source.name}/")} if source.documents else ():
                if (number := self._index(source.name).find(name)) is not None:
                    found.append((source.name, number))
        if not found:
            example = next((f"{s.name}/{self._index(s.name).id(0)}" for s in self.manifest.sources if s.documents), "")
            raise UserError(
                f"{self.data.directory}: no document {document!r}; ids look like {example!r}"
                if example
                else f"{self.data.directory}: published rows have no document ids; ask with --text or --step"
            )
        return found

    def document_id(self, source: str, number: int) -> str:
        """Return the id of a document by its number in its source's stream."""
        return self._index(source).id(number)

    def text(self, source: str, number: int) -> str | None:
        """Return a document's text, put together from the samples that hold it; None where one is not in the data."""
        record, index = self._source(source), self._index(source)
        begin, end = index.offsets[number : number + 2].tolist()
        parts = []
        for window in index.windows(number, self.manifest.sequence_length, self.manifest.overlap):
            tokens = self._window(record, window)
            start = window_start(window, self.manifest.sequence_length, self.manifest.overlap)
            if not len(tokens):
                return None
            if begin < start + len(tokens):
                parts.append(tokens[begin - start : end - start])
                begin = start + len(tokens)
        return self._text(np.concatenate(parts), begins=True) if begin >= end and self.tokenizer else None

    def places(self, source: str, number: int) -> list[Place]:
        """Return where every window with tokens of a document went, in stream order."""
        record = self._source(source)
        windows = self._index(source).windows(number, self.manifest.sequence_length, self.manifest.overlap)
        return [place for w in windows for place in self._places(record, w)]

    def _places(self, source: SourceRecord, window: int) -> list[Place]:
        j = self._numbers[source.name]
        if window >= source.windows:
            return [Place(window, None, None, "tail: after the last whole window")]
        if self.manifest.layout == "chunks":
            place = self.manifest.chunk_layout.place_of(j, window)
            if isinstance(place, str):
                return [Place(window, None, None, place)]
            return [Place(window, *place, None)]
        held_out = self.manifest.held_out[j]
        i = int(np.searchsorted(held_out, window))
        if i < len(held_out) and held_out[i] == window:
            return [Place(window, None, None, "validation")]
        number = int(training_number(window, held_out))
        found = []
        for phase, record, mixture in zip(self.manifest.phase_samples, self.manifest.phases, self.manifest.mixtures):
            for which, part in enumerate(record.parts):
                if part.reads == source.name:
                    for slot in mixture.slots_of(which, number):
                        chunk, position = divmod(slot, phase.samples_per_chunk)
                        found.append(Place(window, phase.first_chunk + chunk, position, None, part.name))
        return found or [Place(window, None, None, "unused")]

    # ---- from a text to samples --------------------------------------------------------------------------------

    def search(self, text: str) -> Iterator[tuple[int, int, list[Piece]]]:
        """Yield (chunk, position, pieces that hold it) of every sample in which a text begins; reads all chunks.

        A text is found where its words stand in a document, also across the border of two windows, but in rearranged
        samples only where it was not cut, and in published rows, of which nobody knows what follows which, only within
        one. It is looked for by the tokens of its inner words, which do not depend on what stands around it. Raises
        UserError when it has no inner word, or the data no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.data.directory}: has no tokenizer, so that no text can be looked for")
        before, inner, after = _inner_words(text)
        pattern = np.array(self.tokenizer.encode(inner), np.int32)
        for chunk, record in enumerate(self.manifest.chunk_files):
            file = self._file(record)
            for start in range(0, record.samples, _SEARCHED_AT_ONCE):
                stop = min(start + _SEARCHED_AT_ONCE, record.samples)
                tokens = np.stack([file.read(p).tokens for p in range(start, stop)])
                for i, at in _candidates(tokens, pattern):
                    if self._holds(chunk, start + i, tokens[i], at, (before, inner + after)):
                        yield chunk, start + i, self._pieces_at(chunk, start + i, tokens[i], at)

    def _pieces_at(self, chunk: int, position: int, tokens: np.ndarray, at: int) -> list[Piece]:
        """The piece of a sample that token `at` belongs to."""
        assert self.tokenizer is not None
        origin = self.origin(chunk, position)
        pieces = self.pieces_of(origin)
        if not self._rearranged(origin):
            return [p for p in pieces if p.tokens[0] <= at < p.tokens[1]]
        kept = self._kept([p.tokens for p in pieces])  # whose tokens are no longer where they were in the window
        number = int(np.count_nonzero(tokens[:at] == self.tokenizer.eos_id))
        return [pieces[i] for i in kept[number : number + 1]]

    def _holds(self, chunk: int, position: int, tokens: np.ndarray, at: int, text: tuple[str, str]) -> bool:
        """Whether the text before, and that after, stand around token `at` of a sample and its neighbours."""
        before, after = (len(part.encode()) + 2 for part in text)  # tokens: at most one a byte, and some spaces
        if at < before or at + after > len(tokens):
            tokens, at = self._around(self.origin(chunk, position), tokens, at)
        # No text goes on over the end of a document, nor over what stands between the parts of a rearranged one.
        left, right = tokens[max(0, at - before) : at], tokens[at : at + after]
        left = left[max(np.flatnonzero(np.isin(left, self._marks)), default=-1) + 1 :]
        right = right[: min(np.flatnonzero(np.isin(right, self._marks)), default=len(right))]
        return self._text(left, begins=False).endswith(text[0]) and self._text(right, begins=False).startswith(
            " " + text[1]
        )

    def _around(self, origin: Origin, middle: np.ndarray, at: int) -> tuple[np.ndarray, int]:
        """The tokens of a window with those of its neighbours that are in the data set, and where `at` is."""
        overlap, source = self.manifest.overlap, self._source(origin.source)
        if self._rearranged(origin) or not source.documents:
            return middle, at
        before, after = self._window(source, origin.window - 1), self._window(source, origin.window + 1)
        head = before[: len(before) - overlap] if len(before) else before
        return np.concatenate([head, middle, after[overlap:]]), at + len(head)

    def _window(self, source: SourceRecord, window: int) -> np.ndarray:
        """The tokens of a window if it is stored as it is, else none."""
        if 0 <= window < source.windows:
            for place in self._places(source, window):
                if place.chunk is None or place.position is None:
                    if place.why == "validation":
                        held_out = self.manifest.held_out[self._numbers[source.name]]
                        return self._file(source.validation_file).read(int(np.searchsorted(held_out, window))).tokens
                elif not self._rearranged(place):
                    return self.data.sample(place.chunk, place.position).tokens
        return np.empty(0, np.int32)

    def _phase(self, chunk: int) -> int:
        return next(n for n, p in enumerate(self.manifest.phase_samples) if chunk < p.first_chunk + p.chunks)

    def _source(self, name: str) -> SourceRecord:
        return self.manifest.sources[self._numbers[name]]


def _candidates(tokens: np.ndarray, pattern: np.ndarray) -> list[tuple[int, int]]:
    """(row, column) where the pattern begins in tokens [n, S+1], perhaps to go on beyond the row."""
    rows, columns = np.nonzero(tokens == pattern[0])
    for i in range(1, len(pattern)):
        inside = columns + i < tokens.shape[1]
        kept = ~inside
        kept[inside] = tokens[rows[inside], columns[inside] + i] == pattern[i]
        rows, columns = rows[kept], columns[kept]
    return list(zip(rows.tolist(), columns.tolist()))


def _inner_words(text: str) -> tuple[str, str, str]:
    """Cut a text into what stands before its inner words, those, and the rest: their tokens are the same wherever.

    Words are what lies between single spaces, and the inner ones are all but the first and the last. After several
    spaces a word's own space may be part of a longer piece. The space in front of the inner words is left out.
    """
    words = text.split(" ")
    first = next((i for i in range(1, len(words) - 1) if words[i] and words[i - 1]), None)
    if first is None:
        raise UserError(f"--text {text!r}: give at least three words, so that one has others on both sides")
    last = max(i for i in range(first, len(words) - 1) if words[i])
    before, inner = " ".join(words[:first]), " ".join(words[first : last + 1])
    return before, inner, text[len(before) + 1 + len(inner) :]


def text_of(tokens: np.ndarray, tokenizer: Tokenizer, begins: bool) -> str:
    """Return the text of a part of a document, to the last space: a document's own first word has none."""
    anchor = [] if begins else tokenizer.encode("a")
    return tokenizer.decode([*anchor, *tokens.tolist()], skip_special=True)[0 if begins else 1 :]


def row_pieces(sample: Sample, tokenizer: Tokenizer | None, source: str, file: str, line: int) -> list[Piece]:
    """Return the documents of a published row, which have no names: what its end-of-document tokens delimit."""
    tokens = sample.tokens
    ends = [] if tokenizer is None else (np.flatnonzero(tokens == tokenizer.eos_id) + 1).tolist()
    edges = [0, *ends, *([] if ends and ends[-1] == len(tokens) else [len(tokens)])]
    return [
        Piece(
            source,
            None,
            file,
            line,
            (start, stop),
            0,
            "" if tokenizer is None else text_of(tokens[start:stop], tokenizer, begins=start > 0),
        )
        for start, stop in pairwise(edges)
    ]
