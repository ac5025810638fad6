"""Documents from folders, JSONL, Parquet and the text every Python installation carries, in an order that never varies.

`plan` cuts a source into shards by the names and sizes of its files alone, so any number of workers, a restart or
another engine sees the same shards; `read_shard` reads one. A reader yields records in file order: a `Document`, or a
`Bad` that says which line of which file is unusable and why; the policy for bad ones is applied after the reader.

What a file is follows from its name:

    .jsonl .ndjson        JSON Lines, also with .gz or .zst
    .json.gz .json.zst    JSON Lines (C4 is published so)
    .json                 JSON Lines if a text field is given or the first line is an object that has one, else text
    .parquet              one document a row
    anything else         one document a file, also with .gz or .zst; UTF-8 without NUL bytes
"""

import glob
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import accumulate, islice
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, Literal, NamedTuple

import fsspec
import pyarrow
import pyarrow.parquet
import zstandard
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from data import embedded
from errors import RunError, UserError

OnBad = Literal["fail", "skip"]
Run = Callable[[Callable[[Any], Any], list], Iterable]  # map, or an engine's: results in the order of the list

SHARD_BYTES = 64 << 20

_BLOCK = 1 << 16  # bytes read from a file at a time
_PIECE = 1 << 9  # compressed bytes handled at a time: zstd may make 32,000 times as many of them
_ROWS = 16  # of a Parquet file at a time; more are hardly faster and a row may be very long
_PARQUET_BUFFER = 1 << 20  # without one, pyarrow holds all of a row group's column
_TEXT_FIELDS = ("text", "content")  # content: RefinedWeb and StarCoder, fact sheet 3.2
_JSON_LINES = (".jsonl", ".ndjson")
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: a gzip header and checksum
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),  # as `zstd --long=31` writes
}
_BROKEN = (EOFError, OSError, zlib.error, zstandard.ZstdError)
_BROKEN_PARQUET = (pyarrow.ArrowException, OSError)
_UNKNOWN = -1  # the size of a file that could not be examined
_BAD_NAMED = 5  # bad records that a report names; all are counted
_FIELDS_NAMED = 10


@dataclass(frozen=True)
class Document:
    """One text: of a line or row of a file, from 1, or with line 0 of the whole file."""

    file: str  # name below the source's root
    line: int
    text: str

    @property
    def id(self) -> str:
        """What leads back to the document, e.g. `relative/path.jsonl:17`; unique inside a source."""
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Bad:
    """A record that cannot be read: where (file, and line if it has lines) and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


@dataclass(frozen=True)
class SourceSpec:
    """A named source.

    location: a folder, a file or a glob, local or as the URL of any fsspec file system, or `embedded:KIND`.
    text_field: the JSON field or Parquet column that holds the text; None for `text`, else `content`.
    label: what published rows call the source; None for its name.
    bos: every document begins with the beginning-of-document token, as Crystal's code does (fact sheet 3.5).
    """

    name: str
    location: str
    text_field: str | None = None
    label: str | None = None
    bos: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise UserError(f"source name {self.name!r}: use letters, digits, '_', '-', '.'; files are named after it")
        if not self.location:
            raise UserError(f"source {self.name}: no location; write {self.name}=PATH or {self.name}=embedded:KIND")
        kind = self.embedded
        if kind is not None and kind not in embedded.KINDS:
            raise UserError(f"source {self.name}: no embedded source {kind!r}; there are {', '.join(embedded.KINDS)}")
        for what in ("text_field", "label"):
            if getattr(self, what) == "":
                raise UserError(f"source {self.name}: {what} is empty; name one, or leave it out")

    @classmethod
    def parse(cls, text: str) -> "SourceSpec":
        """Return the spec of `NAME=LOCATION`."""
        name, equals, location = text.partition("=")
        if not equals:
            raise UserError(f"source {text!r}: write NAME=PATH, e.g. books=/data/books, or NAME=embedded:stdlib")
        return cls(name, location)

    @property
    def embedded(self) -> str | None:
        """The KIND of `embedded:KIND`, else None."""
        prefix, _, kind = self.location.partition(":")
        return kind if prefix == "embedded" else None

    @property
    def published(self) -> str:
        """What published rows call the source."""
        return self.name if self.label is None else self.label

    @property
    def text_fields(self) -> tuple[str, ...]:
        """Fields that may hold the text; the first that is there does."""
        return _TEXT_FIELDS if self.text_field is None else (self.text_field,)


@dataclass
class ReadReport:
    """What has been read so far; it is filled while reading."""

    documents: int = 0
    empty: int = 0  # left out: no text
    bad: int = 0  # left out: unreadable
    bytes: int = 0  # UTF-8 bytes of the documents' text
    bad_named: list[str] = field(default_factory=list)  # the first few

    def add(self, other: "ReadReport") -> None:
        """Count what another report has seen after this one."""
        self.documents += other.documents
        self.empty += other.empty
        self.bad += other.bad
        self.bytes += other.bytes
        self.bad_named = (self.bad_named + other.bad_named)[:_BAD_NAMED]

    def check_found(self, spec: SourceSpec) -> None:
        """Raise UserError if all of a source has been read and there was no document."""
        if not self.documents:
            left_out = f" ({self.empty} empty, {self.bad} bad left out)" if self.empty or self.bad else ""
            raise UserError(f"source {spec.name}: no documents in {spec.location}{left_out}")


@dataclass(frozen=True)
class Portion:
    """A file, or the part of it that is read in one go.

    start, stop: bytes of uncompressed JSON Lines, whose lines that start among them belong to the portion; row groups
    of a Parquet file; 0, size for a whole file of any kind (a Parquet file has fewer row groups than bytes).
    """

    file: str  # name below the source's root: the first part of its documents' ids
    path: str  # what opens it; an absolute path, or a path inside the file system of the source's URL
    size: int  # bytes of the whole file when it was planned; -1 if it could not be examined
    start: int
    stop: int
    first_line: int  # number of the first line or row, from 1

    @property
    def whole(self) -> bool:
        """Whether the portion is all of the file."""
        return (self.start, self.stop) == (0, self.size)


@dataclass(frozen=True)
class Shard:
    """Consecutive portions of a source; an embedded source has one shard without portions. Shards count from 0."""

    spec: SourceSpec
    number: int
    portions: tuple[Portion, ...]
    bytes: int = 0  # of its files, about; of Parquet, those of its row groups


def listed(spec: SourceSpec) -> list[Portion]:
    """Return a source's files, whole and sorted by name; an embedded source has none. Reads nothing but folders.

    Raises UserError where files cannot be listed or there are none.
    """
    if spec.embedded is not None:
        return []
    found = _remote_files(spec) if _is_remote(spec) else _local_files(spec)
    files = [Portion(name, path, size, 0, size, 1) for name, path, size in sorted(found)]
    if not files:
        raise UserError(f"source {spec.name}: no files in {spec.location}")
    for name in (f.file for f in files):
        if any("\ud800" <= c <= "\udfff" for c in name):  # so Python keeps bytes that are no UTF-8
            raise UserError(f"source {spec.name}: the file name {name!r} is not UTF-8; rename the file")
    return files


def plan(spec: SourceSpec, shard_bytes: int = SHARD_BYTES, run: Run = map) -> tuple[Shard, ...]:
    """Cut a source into shards of about shard_bytes bytes of its files: read one after another they are the source.

    Files are sorted by name. Larger ones are cut if they are uncompressed JSON Lines (at any byte: a range owns the
    lines that start in it) or Parquet (between row groups); consecutive small ones are put together. The numbers of
    the ranges' first lines take a pass over the large JSON Lines files: `run(function, arguments)` must give the
    results in order, and may compute them anywhere, as the function and the arguments can be pickled.

    Raises UserError where files cannot be listed or there are none.
    """
    if shard_bytes < 1:
        raise UserError(f"shard_bytes = {shard_bytes}: at least 1 is needed")
    if spec.embedded is not None:
        return (Shard(spec, 0, ()),)
    files = listed(spec)
    cut = _cut_parquet(spec, files, shard_bytes, run) | _cut_json_lines(spec, files, shard_bytes, run)
    portions = (weighted for f in files for weighted in cut.get(f.file, [(f, max(f.size, 0))]))
    groups = enumerate(_grouped(portions, shard_bytes))
    return tuple(Shard(spec, i, tuple(p for p, _ in group), sum(size for _, size in group)) for i, group in groups)


def read_shard(
    shard: Shard, on_bad: OnBad = "fail", max_bytes: int | None = None, report: ReadReport | None = None
) -> Iterator[Document]:
    """Yield the documents of a shard, in order; memory is bounded by the largest one, or the largest Parquet page.

    Reading ends with the document that brings the text of this call to max_bytes UTF-8 bytes or more. Documents
    without text are counted in the report and left out. Bad records (bytes that are no UTF-8, a malformed line, no
    text field, a truncated or unreadable file) are counted, named and left out with on_bad="skip", and raise UserError
    with "fail".

    Raises RunError, whatever on_bad is, where another attempt may end otherwise: a file that is no longer what it was
    when planned, or a remote file system that fails.
    """
    report = ReadReport() if report is None else report
    total = 0
    for record in _records(shard):
        size = -1
        if isinstance(record, Document):
            try:
                size = len(record.text.encode("utf-8"))
            except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
                record = Bad(record.id, "the text holds a lone surrogate, which UTF-8 cannot encode")
        if isinstance(record, Bad):
            if on_bad == "fail":
                raise UserError(f"source {shard.spec.name}: {record}; repair it, or leave it out with --on-bad skip")
            report.bad += 1
            if len(report.bad_named) < _BAD_NAMED:
                report.bad_named.append(str(record))
        elif size == 0:
            report.empty += 1
        else:
            report.documents += 1
            report.bytes += size
            total += size
            yield record
            if max_bytes is not None and total >= max_bytes:
                return


def read(
    spec: SourceSpec, on_bad: OnBad = "fail", max_bytes: int | None = None, report: ReadReport | None = None
) -> Iterator[Document]:
    """Yield the documents of a source: those of all its shards, one after another.

    As `read_shard`, with max_bytes for the whole source; a source without any document raises UserError.
    """
    report = ReadReport() if report is None else report
    (shard,) = plan(spec, shard_bytes=sys.maxsize)  # a single pass: nothing needs to be cut
    yield from read_shard(shard, on_bad, max_bytes, report)
    report.check_found(spec)


# Listing. Both listings give (name below the root, what opens it, size).

_Files = Iterator[tuple[str, str, int]]


class _Entry(NamedTuple):
    name: str
    path: str
    size: int | None  # None: a folder


def _local_files(spec: SourceSpec) -> _Files:
    """Yield a local source's files: below its folder, or below the fixed part of its glob.

    Files and folders whose names begin with a dot are passed over (`.git`, `.DS_Store`) unless the location names
    them. Links to folders are not followed, except by a glob without `**`, which cannot run in circles.
    """
    is_url = "://" in spec.location
    location = LocalFileSystem._strip_protocol(spec.location) if is_url else os.path.expanduser(spec.location)
    path = Path(location).absolute()  # a worker may run elsewhere
    try:
        path.stat()
    except FileNotFoundError:
        fixed, patterns = _split_glob(path.parts)
        if not patterns:
            raise UserError(f"source {spec.name}: {spec.location} does not exist") from None
        root, follow = Path(*fixed), "**" not in patterns
        if root.is_dir():
            yield from _below(lambda folder: _local_folder(folder, follow), str(root), patterns)
    except OSError as error:
        raise UserError(_unreadable(str(path), error)) from error
    else:
        if path.is_dir():
            yield from _below(lambda folder: _local_folder(folder, False), str(path), ("**",))
        elif path.is_file():
            yield path.name, str(path), path.stat().st_size
        else:
            raise UserError(f"source {spec.name}: {spec.location} is no file or folder; write it to a file first")


def _local_folder(folder: str, follow: bool) -> Iterator[_Entry]:
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError as error:
        raise UserError(_unreadable(folder, error)) from error
    for entry in found:
        try:
            if entry.is_dir():
                if follow or not entry.is_symlink():
                    yield _Entry(entry.name, entry.path, None)
            elif S_ISREG((status := entry.stat()).st_mode):  # no pipes or devices
                yield _Entry(entry.name, entry.path, status.st_size)
        except OSError:  # a dangling link, a link to itself: bad when read
            yield _Entry(entry.name, entry.path, _UNKNOWN)


def _unreadable(path: str, error: OSError) -> str:
    return f"{path}: cannot be read ({error.strerror}); allow it, or take it out of the source"


def _is_remote(spec: SourceSpec) -> bool:
    protocol, separator, _ = spec.location.partition("://")
    return bool(separator) and protocol not in ("file", "local")


def _remote(spec: SourceSpec) -> tuple[Any, str]:
    """Return (fsspec file system, path in it) of a remote source's location."""
    protocol = re.split("::|://", spec.location)[0]
    try:
        return fsspec.core.url_to_fs(spec.location)
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
        todo = f"pip install {package}" if package not in ("", "fsspec") else "install what that names"
        raise UserError(f"source {spec.name}: {spec.location} cannot be read ({error}); {todo}") from error
    except Exception as error:  # every file system has its own kinds
        raise UserError(f"source {spec.name}: {spec.location} cannot be read ({error}); correct the URL") from error


def _remote_files(spec: SourceSpec) -> _Files:
    """Yield a remote source's files, as `_local_files` does."""
    system, path = _remote(spec)
    try:
        system.invalidate_cache()  # listings that this process made earlier
        try:
            info = system.info(path)
        except FileNotFoundError:
            fixed, patterns = _split_glob(path.split("/"))
            if not patterns:
                raise
            yield from _below(lambda folder: _remote_folder(spec, system, folder), "/".join(fixed), patterns)
        else:
            if info["type"] == "directory":
                yield from _below(lambda folder: _remote_folder(spec, system, folder), path, ("**",))
            else:
                yield path.rpartition("/")[2], path, _size(spec, info)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"source {spec.name}: {spec.location} does not exist ({error})") from error
    except Exception as error:  # every file system has its own kinds
        raise UserError(
            f"source {spec.name}: {spec.location} cannot be listed ({type(error).__name__}: {error}); check the URL, "
            "the network and your credentials"
        ) from error


def _remote_folder(spec: SourceSpec, system: Any, folder: str) -> Iterator[_Entry]:
    for info in system.ls(folder, detail=True):
        path = info["name"].rstrip("/")
        if path.strip("/") != folder.strip("/"):  # object stores may list a folder's own marker
            size = None if info["type"] == "directory" else _size(spec, info)
            yield _Entry(path.rpartition("/")[2], path, size)


def _size(spec: SourceSpec, info: dict) -> int:
    if info["size"] is None:
        raise UserError(f"source {spec.name}: the size of {info['name']} is not known; download it first")
    return info["size"]


def _split_glob(parts: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (parts before the first that holds *, ? or [, that and the rest)."""
    parts = tuple(parts)
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return parts[:first], parts[first:]


def _below(
    entries: Callable[[str], Iterable[_Entry]], folder: str, patterns: tuple[str, ...], above: tuple[str, ...] = ()
) -> _Files:
    """Yield the files below a folder whose path from there matches; only folders that can hold such are listed."""
    for name, path, size in entries(folder):
        parts = (*above, name)
        if size is not None:
            if _matches(parts, patterns):
                yield "/".join(parts), path, size
        elif _matches(parts, patterns, begins=True):
            yield from _below(entries, path, patterns, parts)


def _matches(parts: tuple[str, ...], patterns: tuple[str, ...], begins: bool = False) -> bool:
    """Return whether a path matches as `glob` has it, or, of a folder, whether files below it can."""
    if not parts:
        return bool(patterns) if begins else set(patterns) <= {"**"}
    if not patterns:
        return False
    (part, *_), (pattern, *_) = parts, patterns
    if part.startswith(".") and not pattern.startswith("."):
        return pattern == "**" and _matches(parts, patterns[1:], begins)
    if pattern == "**":
        return _matches(parts, patterns[1:], begins) or _matches(parts[1:], patterns, begins)
    return fnmatchcase(part, pattern) and _matches(parts[1:], patterns[1:], begins)


# Cutting. The weight of a portion is its bytes.

_Weighted = list[tuple[Portion, int]]


def _cut_json_lines(spec: SourceSpec, files: list[Portion], shard_bytes: int, run: Run) -> dict[str, _Weighted]:
    large = [f for f in files if f.size > shard_bytes and f.file.lower().endswith(_JSON_LINES)]
    ranges = [
        [replace(f, start=at, stop=min(at + shard_bytes, f.size)) for at in range(0, f.size, shard_bytes)]
        for f in large
    ]
    tasks = [(spec, r) for cut in ranges for r in cut[:-1]]
    counts = iter(run(_count_line_starts, tasks) if tasks else ())
    result = {}
    for cut in ranges:
        lines = list(islice(counts, len(cut) - 1))
        if None not in lines:  # else left whole, and bad once when read
            firsts = accumulate(lines, initial=1)
            result[cut[0].file] = [(replace(r, first_line=n), r.stop - r.start) for r, n in zip(cut, firsts)]
    return result


def _count_line_starts(task: tuple[SourceSpec, Portion]) -> int | None:
    """Return how many lines start in a range: at the file's first byte, and after newlines. None: unreadable."""
    spec, portion = task
    before = _blocks(spec, portion, max(portion.start - 1, 0), portion.stop - 1)
    try:
        newlines = sum(block.count(b"\n") for block in before)
    except OSError:
        return None
    return newlines + (portion.start == 0)


def _cut_parquet(spec: SourceSpec, files: list[Portion], shard_bytes: int, run: Run) -> dict[str, _Weighted]:
    tasks = [(spec, f) for f in files if f.size > shard_bytes and _is_parquet(f.file)]
    result = {}
    for (_, file), groups in zip(tasks, run(_row_groups, tasks) if tasks else ()):
        if groups:  # else left whole, and bad once when read
            firsts = accumulate((rows for rows, _ in groups), initial=1)
            cut = [
                (replace(file, start=i, stop=i + 1, first_line=n), size)
                for i, (n, (_, size)) in enumerate(zip(firsts, groups))
            ]
            result[file.file] = [
                (replace(group[0][0], stop=group[-1][0].stop), sum(size for _, size in group))
                for group in _grouped(cut, shard_bytes)
            ]
    return result


def _row_groups(task: tuple[SourceSpec, Portion]) -> list[tuple[int, int]] | None:
    """Return (rows, bytes) of a Parquet file's row groups. None: unreadable, or no column for the text."""
    spec, portion = task
    try:
        with _open(spec, portion) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            if _text_column(spec, file) is None:
                return None
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            return [(g.num_rows, sum(g.column(j).total_compressed_size for j in range(g.num_columns))) for g in groups]
    except _BROKEN_PARQUET:
        return None


def _grouped(portions: Iterable[tuple[Portion, int]], shard_bytes: int) -> Iterator[_Weighted]:
    """Yield runs of portions of at most shard_bytes bytes together, or one portion."""
    group: _Weighted = []
    total = 0
    for portion, size in portions:
        if group and total + size > shard_bytes:
            yield group
            group, total = [], 0
        group.append((portion, size))
        total += size
    if group:
        yield group


# Reading.


def _records(shard: Shard) -> Iterator[Document | Bad]:
    spec = shard.spec
    if spec.embedded is not None:
        for name, text in embedded.KINDS[spec.embedded]():
            yield Document(name, 0, text)
    for portion in shard.portions:
        yield from _reader(spec, portion)(spec, portion)


def _reader(spec: SourceSpec, portion: Portion) -> Callable[[SourceSpec, Portion], Iterator[Document | Bad]]:
    name = portion.file.lower()
    if _is_parquet(name):
        return _read_parquet
    plain = name.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith(_JSON_LINES):
        return _read_json_lines
    if plain.endswith(".json") and (plain != name or spec.text_field is not None or _begins_with_a_row(spec, portion)):
        return _read_json_lines
    return _read_text


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _begins_with_a_row(spec: SourceSpec, portion: Portion) -> bool:
    """Return whether the first line of a file is a JSON object that has the text."""
    try:
        first = next((line for line in _lines(_content(spec, portion)) if line.strip()), b"")
        row = json.loads(_without_mark(first).decode())
    except (OSError, ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return False  # what cannot be read at all is bad as text, too
    return isinstance(_of_row(spec, portion.file, 1, row), Document)


def _read_text(spec: SourceSpec, portion: Portion) -> Iterator[Document | Bad]:
    try:
        content = b"".join(_content(spec, portion))
        if (at := content.find(0)) >= 0:  # UTF-16, archives and other formats that are partly ASCII
            yield Bad(portion.file, f"not text (byte 0x00 at offset {at})")
        else:
            yield Document(portion.file, 0, _without_mark(content).decode("utf-8"))
    except UnicodeDecodeError as error:
        yield Bad(portion.file, _undecodable(error))
    except _BROKEN as error:
        yield Bad(portion.file, f"cannot be read ({getattr(error, 'strerror', None) or error})")


def _read_json_lines(spec: SourceSpec, portion: Portion) -> Iterator[Document | Bad]:
    number = portion.first_line - 1
    try:
        for number, line in enumerate(_portion_lines(spec, portion), start=portion.first_line):
            if number == 1:
                line = _without_mark(line)
            if not line.strip():
                continue
            where = f"{portion.file}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Bad(where, _undecodable(error))
            except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
                yield Bad(where, f"not JSON ({error})")
            else:
                yield _of_row(spec, portion.file, number, row)
    except _BROKEN as error:
        yield _broken(portion, number + 1, error)


def _of_row(spec: SourceSpec, file: str, number: int, row: Any) -> Document | Bad:
    fields = spec.text_fields
    name = next((f for f in fields if f in row), None) if isinstance(row, dict) else None
    if name is not None and isinstance(row[name], str):
        return Document(file, number, row[name])
    if not isinstance(row, dict):
        why = f"the line is {type(row).__name__}, not an object"
    else:
        why = f"only {_named(row)}" if name is None else f"{name!r} holds {type(row[name]).__name__}"
    return Bad(f"{file}:{number}", f"no string in field {_either(fields)}: {why}")


def _read_parquet(spec: SourceSpec, portion: Portion) -> Iterator[Document | Bad]:
    first = portion.first_line
    try:
        with (
            _open(spec, portion) as raw,
            pyarrow.parquet.ParquetFile(raw, buffer_size=_PARQUET_BUFFER) as file,
        ):
            column = _text_column(spec, file)
            if column is None:
                names = _named(file.schema_arrow.names)
                yield Bad(portion.file, f"no column {_either(spec.text_fields)}, only {names}")
                return
            for group in range(portion.start, min(portion.stop, file.num_row_groups)):
                yield from _read_row_group(file, group, column, portion, first)
                first += file.metadata.row_group(group).num_rows
    except _BROKEN_PARQUET as error:
        yield _broken(portion, first, error)


def _read_row_group(
    file: pyarrow.parquet.ParquetFile, group: int, column: str, portion: Portion, first: int
) -> Iterator[Document | Bad]:
    """Yield a row group's records; where it breaks, the rest of it is one bad record and the next is not touched."""
    row = first - 1
    try:
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column]):
            for scalar in batch.column(0):
                row += 1
                where = f"{portion.file}:{row}"
                try:
                    text = scalar.as_py()
                except UnicodeDecodeError as error:
                    yield Bad(where, _undecodable(error))
                    continue
                if isinstance(text, str):
                    yield Document(portion.file, row, text)
                else:
                    yield Bad(where, f"no string in column {column!r}: it holds {type(text).__name__}")
    except _BROKEN_PARQUET as error:
        yield Bad(f"{portion.file}:{row + 1}", f"row group {group} cannot be read from here on ({error})")


def _text_column(spec: SourceSpec, file: pyarrow.parquet.ParquetFile) -> str | None:
    columns = file.schema_arrow.names
    return next((f for f in spec.text_fields if f in columns), None)


def _broken(portion: Portion, number: int, error: Exception) -> Bad:
    return Bad(f"{portion.file}:{number}", f"the file cannot be read from here on ({error})")


def _either(fields: Iterable[str]) -> str:
    return " or ".join(map(repr, fields))


def _named(fields: Iterable[str]) -> str:
    """Name fields, as many and as much of them as one line of a message takes."""
    names = list(islice(fields, _FIELDS_NAMED + 1))
    return (", ".join(f"{f!r:.60}" for f in names[:_FIELDS_NAMED]) or "none") + ", …" * (len(names) > _FIELDS_NAMED)


# Bytes.


class _RemoteFile(io.RawIOBase):
    """A file of an fsspec file system. Whatever stops a read is a RunError.

    It is not a bad record: a network that fails once would leave out of one run what is in the next.
    """

    def __init__(self, file: Any, where: str):
        super().__init__()
        self._file, self._where = file, where

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:  # every file system has its own kinds
            raise _failed(self._where, error) from error

    def close(self) -> None:
        self._file.close()
        super().close()


def _failed(where: str, error: Exception) -> RunError:
    return RunError(f"{where}: reading failed ({type(error).__name__}: {error}); run again when it can be reached")


def _open(spec: SourceSpec, portion: Portion) -> IO[bytes] | _RemoteFile:
    """Open a portion's file. Raises OSError if it cannot be read, RunError if it is not as it was when planned."""
    try:
        file = _open_remote(spec, portion) if _is_remote(spec) else _open_local(portion)
    except FileNotFoundError as error:
        if portion.size == _UNKNOWN:
            raise
        raise _changed(spec, portion, "is gone") from error
    if (size := file.seek(0, os.SEEK_END)) != portion.size:
        file.close()
        raise _changed(spec, portion, f"has {size:,} bytes")
    file.seek(0)
    return file


def _open_local(portion: Portion) -> IO[bytes]:
    return open(portion.path, "rb")


def _open_remote(spec: SourceSpec, portion: Portion) -> _RemoteFile:
    system, _ = _remote(spec)
    where = f"source {spec.name}: {system.unstrip_protocol(portion.path)}"
    try:
        system.invalidate_cache(portion.path)  # else the size is that of an earlier listing
        return _RemoteFile(system.open(portion.path, "rb"), where)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # every file system has its own kinds
        raise _failed(where, error) from error


def _changed(spec: SourceSpec, portion: Portion, now: str) -> RunError:
    then = "could not be examined" if portion.size == _UNKNOWN else f"had {portion.size:,} bytes"
    return RunError(
        f"source {spec.name}: {portion.path} has changed since the plan: it {then} and {now}; put it back and run "
        "again, or begin anew in another folder"
    )


def _blocks(spec: SourceSpec, portion: Portion, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a portion's file from start up to stop, or to its end."""
    stop = portion.size if stop is None else stop
    with _open(spec, portion) as file:
        file.seek(start)
        while start < stop:
            block = file.read(min(_BLOCK, stop - start))
            if not block:
                raise _changed(spec, portion, f"ends after {start:,}")
            start += len(block)
            yield block


def _content(spec: SourceSpec, portion: Portion) -> Iterator[bytes]:
    """Yield a file's content, decompressed by its suffix; raises where the file is cut or corrupt.

    Not through the libraries' file objects: zstandard's ends a cut file without an error, gzip's loses what was whole.
    """
    decompressor = _DECOMPRESSORS.get(os.path.splitext(portion.file.lower())[1])
    if decompressor is None:
        yield from _blocks(spec, portion)
        return
    member = decompressor()  # a compressed file may be several, one after another
    for block in _blocks(spec, portion):
        for at in range(0, len(block), _PIECE):
            piece = block[at : at + _PIECE]
            while piece:
                member = member or decompressor()
                yield member.decompress(piece)
                piece = member.unused_data
                if member.eof:
                    member = None
    if member is not None:
        raise EOFError("the file ends inside a compressed stream")


def _portion_lines(spec: SourceSpec, portion: Portion) -> Iterator[bytes]:
    """Yield the lines that start in a portion."""
    if portion.whole:
        yield from _lines(_content(spec, portion))
        return
    start = _first_line_start(spec, portion)
    if start is None:
        return
    for line in _lines(_blocks(spec, portion, start)):
        yield line
        start += len(line) + 1
        if start >= portion.stop:
            return


def _first_line_start(spec: SourceSpec, portion: Portion) -> int | None:
    """Return where the first line of a range starts; a range inside one long line has none."""
    at = portion.start
    if at == 0:
        return 0
    for block in _blocks(spec, portion, at - 1, portion.stop - 1):
        if (found := block.find(b"\n")) >= 0:
            return at + found
        at += len(block)
    return None


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines without their newline; unlike text files', only \\n ends one, as JSON Lines has it."""
    held: list[bytes] = []  # parts of a line that is not complete, joined once
    for block in blocks:
        first, *rest = block.split(b"\n")
        held.append(first)
        for part in rest:
            yield b"".join(held)
            held = [part]
    if last := b"".join(held):
        yield last


def _without_mark(start: bytes) -> bytes:
    return start.removeprefix(b"\xef\xbb\xbf")  # some editors write a byte order mark; it is no text


def _undecodable(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"
