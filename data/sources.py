"""Documents from folders, JSONL, Parquet and the text every Python installation carries, in an order that never varies.

A reader yields records in file order: a `Document`, or a `Bad` that says which line of which file is unusable and why.
`read` turns records into documents and applies the policy for bad ones.
"""

import glob
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import pyarrow
import pyarrow.parquet
import zstandard

from data import embedded
from errors import UserError

OnBad = Literal["fail", "skip"]

_BLOCK = 1 << 16  # bytes read from a file at a time, and at most lost before the place where a stream is corrupt
_TEXT_FIELDS = ("text", "content")  # content: RefinedWeb and StarCoder, fact sheet 3.2
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: a gzip header and checksum
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
_BAD_NAMED = 5  # bad records that a report names; all are counted


@dataclass(frozen=True)
class Document:
    """One text. The id leads back to it, e.g. `relative/path.jsonl:17`, and is unique inside a source."""

    id: str
    text: str


@dataclass(frozen=True)
class Bad:
    """A record that cannot be read: where (file, and line if it has lines) and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


@dataclass(frozen=True)
class SourceSpec:
    """A named source. The location is a folder, a file, a glob, or `embedded:KIND`."""

    name: str
    location: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise UserError(f"source name {self.name!r}: use letters, digits, '_', '-', '.'; files are named after it")
        if not self.location:
            raise UserError(f"source {self.name}: no location; write {self.name}=PATH or {self.name}=embedded:KIND")
        kind = self.embedded
        if kind is not None and kind not in embedded.KINDS:
            raise UserError(f"source {self.name}: no embedded source {kind!r}; there are {', '.join(embedded.KINDS)}")

    @classmethod
    def parse(cls, text: str) -> "SourceSpec":
        """Return the spec of `NAME=PATH` or `NAME=embedded:KIND`."""
        name, equals, location = text.partition("=")
        if not equals:
            raise UserError(f"source {text!r}: write NAME=PATH, e.g. books=/data/books, or NAME=embedded:stdlib")
        return cls(name, location)

    @property
    def embedded(self) -> str | None:
        """The KIND of `embedded:KIND`, else None."""
        prefix, _, kind = self.location.partition(":")
        return kind if prefix == "embedded" else None


@dataclass
class ReadReport:
    """What `read` has seen so far; it is filled while reading."""

    documents: int = 0
    empty: int = 0  # left out: no text
    bad: int = 0  # left out: unreadable
    bytes: int = 0  # UTF-8 bytes of the documents' text
    bad_named: list[str] = field(default_factory=list)  # the first few


def read(
    spec: SourceSpec, on_bad: OnBad = "fail", max_bytes: int | None = None, report: ReadReport | None = None
) -> Iterator[Document]:
    """Yield the documents of a source: files sorted by relative path, documents by position in the file.

    Reading ends with the document that brings the text to max_bytes UTF-8 bytes or more. Documents without text are
    counted and left out. Bad records (bytes that are no UTF-8, a malformed line, no text field, a truncated file) are
    counted and left out with on_bad="skip", and raise UserError with "fail". So does a source without any document.
    """
    report = ReadReport() if report is None else report
    for record in _records(spec):
        size = -1
        if isinstance(record, Document):
            try:
                size = len(record.text.encode("utf-8"))
            except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
                record = Bad(record.id, "the text holds a lone surrogate, which UTF-8 cannot encode")
        if isinstance(record, Bad):
            if on_bad == "fail":
                raise UserError(f"source {spec.name}: {record}; repair it, or leave it out with --on-bad skip")
            report.bad += 1
            if len(report.bad_named) < _BAD_NAMED:
                report.bad_named.append(str(record))
        elif size == 0:
            report.empty += 1
        else:
            report.documents += 1
            report.bytes += size
            yield record
            if max_bytes is not None and report.bytes >= max_bytes:
                return
    if not report.documents:
        left_out = f" ({report.empty} empty, {report.bad} bad left out)" if report.empty or report.bad else ""
        raise UserError(f"source {spec.name}: no documents in {spec.location}{left_out}")


def _records(spec: SourceSpec) -> Iterator[Document | Bad]:
    if spec.embedded is not None:
        for name, text in embedded.KINDS[spec.embedded]():
            yield Document(name, text)
        return
    for path, name in _files(spec):
        yield from _reader(name)(path, name)


def _files(spec: SourceSpec) -> list[tuple[Path, str]]:
    """Return (path, name) of a source's files, sorted by name: the path below the folder, or below a glob's fixed part.

    Files and folders whose names begin with a dot are passed over (`.git`, `.DS_Store`), unless named directly, and
    links to folders are not followed.
    """
    location = Path(spec.location).expanduser()
    if location.is_dir():
        root, paths = location, []
        for folder, folders, names in os.walk(location, onerror=_unreadable_folder):
            folders[:] = [f for f in folders if not f.startswith(".")]
            paths += [Path(folder, n) for n in names if not n.startswith(".")]
        paths = [p for p in paths if p.is_file() or not p.exists()]  # no pipes or devices; a dangling link is an error
    elif location.exists():
        root, paths = location.parent, [location]
    else:
        fixed = next((i for i, part in enumerate(location.parts) if glob.has_magic(part)), None)
        if fixed is None:
            raise UserError(f"source {spec.name}: {spec.location} does not exist")
        root = Path(*location.parts[:fixed])
        paths = [p for p in map(Path, glob.glob(str(location), recursive=True)) if p.is_file()]
    files = sorted((p.relative_to(root).as_posix(), p) for p in paths)
    if not files:
        raise UserError(f"source {spec.name}: no files in {spec.location}")
    return [(path, name) for name, path in files]


def _unreadable_folder(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); allow it, or take it out of the source")


def _reader(name: str) -> Callable[[Path, str], Iterator[Document | Bad]]:
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return _read_jsonl
    return _read_parquet if name.endswith(".parquet") else _read_text


def _read_text(path: Path, name: str) -> Iterator[Document | Bad]:
    try:
        yield Document(name, _without_mark(path.read_bytes()).decode("utf-8"))
    except UnicodeDecodeError as error:
        yield Bad(name, _undecodable(error))
    except OSError as error:
        yield Bad(name, f"cannot be read ({error.strerror})")


def _read_jsonl(path: Path, name: str) -> Iterator[Document | Bad]:
    number = 0
    try:
        for number, line in enumerate(_lines(_blocks(path)), start=1):
            where = f"{name}:{number}"
            if number == 1:
                line = _without_mark(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Bad(where, _undecodable(error))
            except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
                yield Bad(where, f"not JSON ({error})")
            else:
                text = _text_field(row) if isinstance(row, dict) else None
                yield Bad(where, "no string in field 'text' or 'content'") if text is None else Document(where, text)
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        yield Bad(f"{name}:{number + 1}", f"the file cannot be read from here on ({error})")


def _text_field(row: dict) -> str | None:
    value = next((row[f] for f in _TEXT_FIELDS if f in row), None)
    return value if isinstance(value, str) else None


def _read_parquet(path: Path, name: str) -> Iterator[Document | Bad]:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            column = next((c for c in _TEXT_FIELDS if c in columns), None)
            if column is None:
                yield Bad(name, f"no column 'text' or 'content', only {', '.join(columns) or 'none'}")
                return
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for scalar in batch.column(0):
                    row += 1
                    try:
                        text = scalar.as_py()
                    except UnicodeDecodeError as error:
                        yield Bad(f"{name}:{row}", _undecodable(error))
                        continue
                    if isinstance(text, str):
                        yield Document(f"{name}:{row}", text)
                    else:
                        yield Bad(f"{name}:{row}", f"no string in column {column!r}")
    except (pyarrow.ArrowException, OSError) as error:
        yield Bad(f"{name}:{row + 1}", f"the file cannot be read from here on ({error})")


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's content, decompressed by its suffix; raises where the file is cut or corrupt.

    Not through the libraries' file objects: zstandard's ends a cut file without an error, gzip's loses what was whole.
    """
    decompressor = _DECOMPRESSORS.get(path.suffix)
    member = decompressor and decompressor()  # a compressed file may be several, one after another
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            if decompressor is None:
                yield block
                continue
            while block:
                member = member or decompressor()
                yield member.decompress(block)
                block = member.unused_data
                if member.eof:
                    member = None
    if member is not None:
        raise EOFError("the file ends inside a compressed stream")


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
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
