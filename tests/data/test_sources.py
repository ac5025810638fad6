"""Every format gives its documents in one order; every bad record is named, counted, and refused or left out."""

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.sources import ReadReport, SourceSpec, read
from errors import UserError

TEXTS = ["first", "", "zweites 漢字\nline two", "third\u2028same line"]
LINES = "".join(json.dumps({"text": t, "meta": 1}, ensure_ascii=False) + "\n" for t in TEXTS).encode()


def documents(location, **options) -> list[tuple[str, str]]:
    return [(d.id, d.text) for d in read(SourceSpec("s", str(location)), **options)]


def expected(name: str, texts=TEXTS) -> list[tuple[str, str]]:
    return [(f"{name}:{i}", t) for i, t in enumerate(texts, start=1) if t]


def test_jsonl_plain_and_compressed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES[:60]) + gzip.compress(LINES[60:]))  # two members
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(LINES[:60]) + zstandard.compress(LINES[60:]))
    report = ReadReport()
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    assert documents(tmp_path, report=report) == [d for name in names for d in expected(name)]
    size = sum(len(t.encode()) for t in TEXTS)
    assert report == ReadReport(documents=9, empty=3, bad=0, bytes=3 * size)
    for name in names:
        assert documents(tmp_path / name) == expected(name)


def test_jsonl_details(tmp_path):
    # A byte order mark, a blank line, a content field, Windows line ends, no newline at the end.
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"content": "b"}\n{"text": "c"}')
    assert documents(tmp_path) == [("a.jsonl:1", "a"), ("a.jsonl:3", "b"), ("a.jsonl:4", "c")]


def test_a_line_longer_than_a_block(tmp_path):
    long = "x" * 3_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": "y"}))
    assert documents(tmp_path) == [("a.jsonl:1", long), ("a.jsonl:2", "y")]


@pytest.mark.parametrize("column", ["text", "content"])
def test_parquet(tmp_path, column):
    table = pyarrow.table({"id": range(4), column: TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert documents(tmp_path) == expected("a.parquet")


def test_text_files_are_one_document_each_in_the_order_of_their_paths(tmp_path):
    for name in ["b.txt", "a/z.py", "a.md", "A.rst", "no_suffix", ".hidden", ".git/config"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\r\n", newline="")
    order = ["A.rst", "a.md", "a/z.py", "b.txt", "no_suffix"]
    assert documents(tmp_path) == [(name, f"text of {name}\r\n") for name in order]
    assert documents(tmp_path / "a") == [("z.py", "text of a/z.py\r\n")]
    assert documents(f"{tmp_path}/*.[mt]*") == [(n, f"text of {n}\r\n") for n in ["a.md", "b.txt"]]
    assert documents(f"{tmp_path}/**/*.py") == [("a/z.py", "text of a/z.py\r\n")]


def test_pipes_are_passed_over_and_dangling_links_are_bad(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe")
    assert documents(tmp_path) == [("a.txt", "a")]
    (tmp_path / "link.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"source s: link\.txt: cannot be read \(No such file or directory\)"):
        documents(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\); allow it, or take it out"):
        documents(tmp_path)


def test_max_bytes_ends_with_the_document_that_reaches_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "äb"}) + "\n" for _ in range(9)))
    assert len(documents(tmp_path, max_bytes=6)) == 2
    assert len(documents(tmp_path, max_bytes=7)) == 3


def utf16_parquet(path: Path) -> None:
    raw = pyarrow.array([b"good", b"\xff\xfe", None], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)


def truncated_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good"]}), path)
    os.truncate(path, path.stat().st_size - 4)


def numbered(start: bytes) -> bytes:
    return b'{"text": "good"}\n' + start + b'\n{"text": "good"}\n'


RANDOM = random.Random(0)
MANY = b"".join(json.dumps({"text": RANDOM.randbytes(40).hex()}).encode() + b"\n" for _ in range(2000))

# file, its content, how many documents are still good, where the first bad record is and what is said of it
BAD = [
    ("a.txt", b"caf\xe9", 0, "a.txt: not UTF-8 (byte 0xe9 at offset 3)"),
    ("a.jsonl", numbered(b'{"text": "caf\xe9"}'), 2, "a.jsonl:2: not UTF-8 (byte 0xe9 at offset 13)"),
    ("a.jsonl", numbered(b'{"text": '), 2, "a.jsonl:2: not JSON ("),
    ("a.jsonl", numbered(b"[" * 100_000), 2, "a.jsonl:2: not JSON ("),
    ("a.jsonl", numbered(b'{"text": "x", "n": ' + b"9" * 5000 + b"}"), 2, "a.jsonl:2: not JSON (Exceeds the limit"),
    ("a.jsonl", numbered(b'{"body": "x"}'), 2, "a.jsonl:2: no string in field 'text' or 'content'"),
    ("a.jsonl", numbered(b'{"text": 7}'), 2, "a.jsonl:2: no string in field 'text' or 'content'"),
    ("a.jsonl", numbered(b'["text"]'), 2, "a.jsonl:2: no string in field 'text' or 'content'"),
    ("a.jsonl", numbered(b'{"text": "\\ud800"}'), 2, "a.jsonl:2: the text holds a lone surrogate"),
    ("a.jsonl.gz", gzip.compress(MANY)[:-9], None, "the file cannot be read from here on (the file ends"),
    ("a.jsonl.gz", b"no gzip", 0, "a.jsonl.gz:1: the file cannot be read from here on (Error -3"),
    (
        "a.jsonl.gz",
        gzip.compress(MANY[:900])[:-6] + bytes(6),
        0,
        "the file cannot be read from here on (Error -3",
    ),
    (
        "a.jsonl.zst",
        zstandard.compress(MANY)[:-9],
        None,
        "the file cannot be read from here on (the file ends",
    ),
    ("a.jsonl.gz", b"", 0, "a.jsonl.gz:1: the file cannot be read from here on (the file ends inside"),
    ("a.jsonl.zst", b"", 0, "a.jsonl.zst:1: the file cannot be read from here on (the file ends inside"),
    ("a.jsonl.zst", b"no zstd", 0, "a.jsonl.zst:1: the file cannot be read from here on (zstd decomp"),
    ("a.parquet", truncated_parquet, 0, "a.parquet:1: the file cannot be read from here on ("),
    ("a.parquet", utf16_parquet, 1, "a.parquet:2: not UTF-8 (byte 0xff at offset 0)"),
    (
        "a.parquet",
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), p),
        0,
        "no string in column 'text'",
    ),
    ("a.parquet", lambda p: pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), p), 0, "'content', only x"),
]


@pytest.mark.parametrize(
    ("name", "content", "good", "message"), BAD, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)]
)
def test_bad_records(tmp_path, name, content, good, message):
    content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    (tmp_path / "z.txt").write_text("the next file")

    with pytest.raises(UserError, match="; repair it, or leave it out with --on-bad skip") as error:
        documents(tmp_path)
    assert str(error.value).startswith(f"source s: {name}")
    assert message in str(error.value)

    report = ReadReport()
    found = documents(tmp_path, on_bad="skip", report=report)
    assert found[-1] == ("z.txt", "the next file")
    assert report.bad == (2 if "utf16" in str(content) else 1)
    assert message in report.bad_named[0]
    assert report.documents == len(found)
    if good is not None:
        assert len(found) == good + 1
    else:  # a cut stream: what was whole before the cut is kept and the rest is not made up
        assert len(found) > 1
        lines = MANY.decode().splitlines()
        assert [t for _, t in found[:-1]] == [json.loads(line)["text"] for line in lines[: len(found) - 1]]
        assert f"{name}:{len(found)}: the file cannot" in report.bad_named[0]


def test_only_the_first_bad_records_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + b"bad\n" * 50)
    report = ReadReport()
    assert len(documents(tmp_path, on_bad="skip", report=report)) == 1
    assert (report.bad, len(report.bad_named)) == (50, 5)


def test_sources_without_documents_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": ""}\nbad\n')
    for location, message in [
        (tmp_path / "empty", "no files in"),
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "*.csv", "no files in"),
        (tmp_path / "a.jsonl", r"no documents in .*a\.jsonl \(1 empty, 1 bad left out\)"),
    ]:
        with pytest.raises(UserError, match=f"source s: .*{message}"):
            documents(location, on_bad="skip")


def test_specs():
    assert SourceSpec.parse("books=/a=b") == SourceSpec("books", "/a=b")
    assert SourceSpec.parse("code=embedded:stdlib").embedded == "stdlib"
    for text, message in [
        ("books", "write NAME=PATH"),
        ("bo/oks=x", "source name 'bo/oks': use letters"),
        ("=x", "source name '': use letters"),
        ("books=", "source books: no location"),
        ("books=embedded:bible", "no embedded source 'bible'; there are stdlib, topics, docstrings, packages"),
    ]:
        with pytest.raises(UserError, match=message):
            SourceSpec.parse(text)


@pytest.mark.parametrize("kind", ["stdlib", "topics", "docstrings", "packages"])
def test_embedded_sources(kind):
    spec = SourceSpec("s", f"embedded:{kind}")
    found = list(read(spec, max_bytes=50_000))
    assert found == list(read(spec, max_bytes=50_000))
    assert sum(len(d.text.encode()) for d in found) >= 50_000
    assert len({d.id for d in found}) == len(found)
    ids = [d.id for d in found]
    assert ids != sorted(ids)  # a budget takes a sample, not the first letters


def test_embedded_ids_lead_back_to_the_text():
    import sysconfig

    for document in read(SourceSpec("s", "embedded:stdlib"), max_bytes=50_000):
        assert (Path(sysconfig.get_path("stdlib")) / document.id).read_bytes().decode() == document.text
        assert not {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(Path(document.id).parts)


def test_docstrings_are_those_of_the_source():
    from data.embedded import _docstrings_of

    source = '"""Module."""\nif 1:\n  class A:\n    """A."""\n    def f(self):\n      "f"\n\ndef g(): x = "no"\n'
    assert _docstrings_of(source) == "Module.\n\nA.\n\nf"
    assert _docstrings_of("{{ template }}}") == ""
