"""Every format gives its documents in one order, however it is cut into shards; every bad record is named, counted, and
refused or left out."""

import gzip
import json
import os
import pickle
import random
import struct
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.sources import Document, ReadReport, Shard, SourceSpec, plan, read, read_shard
from errors import RunError, UserError

TEXTS = ["first", "", "zweites 漢字\nline two", "third\u2028same line"]
LINES = "".join(json.dumps({"text": t, "meta": 1}, ensure_ascii=False) + "\n" for t in TEXTS).encode()


def documents(location, **options) -> list[tuple[str, str]]:
    return [(d.id, d.text) for d in read(SourceSpec("s", str(location)), **options)]


def expected(name: str, texts=TEXTS) -> list[tuple[str, str]]:
    return [(f"{name}:{i}", t) for i, t in enumerate(texts, start=1) if t]


def in_shards(spec: SourceSpec, shard_bytes: int, run=map) -> tuple[list[Document], ReadReport, tuple[Shard, ...]]:
    """Read a source shard by shard, each as a worker would get it and with a report of its own."""
    found, total = [], ReadReport()
    shards = plan(spec, shard_bytes, run)
    for shard in shards:
        report = ReadReport()
        found += read_shard(pickle.loads(pickle.dumps(shard)), "skip", report=report)
        total.add(report)
    return found, total, shards


def check_shards(spec: SourceSpec, shard_bytes: int) -> tuple[Shard, ...]:
    """Shards, one after another, are the source, and its report too."""
    report = ReadReport()
    whole = list(read(spec, "skip", report=report))
    found, total, shards = in_shards(spec, shard_bytes)
    assert found == whole
    assert total == report
    assert [s.number for s in shards] == list(range(len(shards)))
    json.dumps([asdict(s) for s in shards])
    return shards


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
    ("a.txt", "UTF-16".encode("utf-16-le"), 0, "a.txt: not text (byte 0x00 at offset 1)"),
    ("a.h5", b"\x89HDF\r\n\x1a\n", 0, "a.h5: not UTF-8 (byte 0x89 at offset 0)"),
    ("a.txt.gz", gzip.compress(b"text")[:-3], 0, "a.txt.gz: cannot be read (the file ends inside"),
    ("a.json", b"caf\xe9", 0, "a.json: not UTF-8 (byte 0xe9 at offset 3)"),
    (
        "a.jsonl",
        numbered(json.dumps(dict.fromkeys(map(str, range(12)))).encode()),
        2,
        "only '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', …",
    ),
    ("a.parquet", truncated_parquet, 0, "a.parquet:1: the file cannot be read from here on ("),
    ("a.parquet", utf16_parquet, 1, "a.parquet:2: not UTF-8 (byte 0xff at offset 0)"),
    (
        "a.parquet",
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), p),
        0,
        "no string in column 'text'",
    ),
    ("a.parquet", lambda p: pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), p), 0, "'content', only 'x'"),
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


LINE = st.sampled_from(
    [
        b'{"text": "a"}',
        '{"text": "ж漢字😀"}'.encode(),
        b'{"text": "r\\u2028"}\r',
        b'{"content": "' + b"long " * 20 + b'"}',
        b'{"text": ""}',
        b"",
        b"\r",
        b"not JSON",
        b'{"text": "caf\xe9"}',
        b'{"text": "\\ud800"}',
    ]
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(LINE, min_size=1, max_size=8), st.booleans(), st.booleans(), st.integers(1, 200))
@example([b'{"text": "a"}'], True, True, 1)
@example([b""], False, True, 1)
@example([b"", b"", b'{"text": "a"}', b"", b""], False, False, 1)
def test_ranges_of_jsonl_own_the_lines_that_start_in_them(lines, mark, newline, shard_bytes):
    content = b"\xef\xbb\xbf" * mark + b"\n".join(lines) + b"\n" * newline
    good = b'{"text": "good"}\n'
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.jsonl").write_bytes(content)
        (Path(folder) / "b.ndjson").write_bytes(good)
        shards = check_shards(SourceSpec("s", folder), shard_bytes)
        found = list(read(SourceSpec("s", folder), "skip"))
    portions = [p for s in shards for p in s.portions if p.file == "a.jsonl"]
    assert [p.start for p in portions] == list(range(0, len(content), shard_bytes)) or not content
    assert [p.stop for p in portions] == [*(p.start for p in portions[1:]), len(content)]
    starts = [0, *(i + 1 for i, byte in enumerate(content) if byte == 10)]
    assert [p.first_line for p in portions] == [1 + sum(at < p.start for at in starts) for p in portions]
    texts = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode())
            text = row.get("text", row.get("content"))
            text.encode()
        except ValueError:
            continue
        if text:
            texts[f"a.jsonl:{number}"] = text
    assert {d.id: d.text for d in found} == {**texts, "b.ndjson:1": "good"}


def test_shards_cut_large_files_and_group_small_ones(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 40)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "01234567"}\n' * 10)  # 210 bytes
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(MANY))  # whole, whatever its size
    for i in range(5):
        (tmp_path / f"d{i}.txt").write_text("d" * 40)
    cut = [
        [(p.file, p.start, p.stop, p.first_line) for p in s.portions]
        for s in check_shards(SourceSpec("s", str(tmp_path)), 100)
    ]
    packed = (tmp_path / "c.jsonl.gz").stat().st_size
    assert cut == [
        [("a.txt", 0, 40, 1)],
        [("b.jsonl", 0, 100, 1)],
        [("b.jsonl", 100, 200, 6)],  # the sixth line starts at byte 105
        [("b.jsonl", 200, 210, 11)],  # no line starts here: the tenth started at 189
        [("c.jsonl.gz", 0, packed, 1)],
        [("d0.txt", 0, 40, 1), ("d1.txt", 0, 40, 1)],
        [("d2.txt", 0, 40, 1), ("d3.txt", 0, 40, 1)],
        [("d4.txt", 0, 40, 1)],
    ]
    assert len(plan(SourceSpec("s", str(tmp_path)), 1 << 20)) == 1
    with pytest.raises(UserError, match="shard_bytes = 0: at least 1"):
        plan(SourceSpec("s", str(tmp_path)), 0)


def test_any_engine_that_keeps_the_order_gives_the_same_plan(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(MANY)
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(i) for i in range(99)]}), tmp_path / "b.parquet", 10)
    spec = SourceSpec("s", str(tmp_path))
    tasks = []

    def run(function, arguments):
        tasks.extend(arguments)
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(pickle.loads(pickle.dumps(function)), pickle.loads(pickle.dumps(arguments))))

    assert plan(spec, 1000, run) == plan(spec, 1000)
    assert len(tasks) == len(range(0, len(MANY), 1000)) - 1 + 1  # all ranges but the last, and one Parquet file
    plan(spec, 1 << 20, lambda function, arguments: pytest.fail("nothing is large, nothing needs to run"))


@pytest.mark.parametrize("shard_bytes", [1, 700, 2000, 1 << 20])
def test_parquet_is_cut_between_row_groups(tmp_path, shard_bytes):
    texts = [RANDOM.randbytes(30).hex() if i % 7 else None for i in range(95)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10)
    (tmp_path / "b.txt").write_text("b")
    shards = check_shards(SourceSpec("s", str(tmp_path)), shard_bytes)
    portions = [p for s in shards for p in s.portions if p.file == "a.parquet"]
    if shard_bytes == 1 << 20:
        assert [(p.start, p.stop, p.first_line) for p in portions] == [(0, portions[0].size, 1)]
    else:
        assert [p.first_line for p in portions] == [1 + 10 * p.start for p in portions]
        assert [p.stop for p in portions] == [*(p.start for p in portions[1:]), 10]
        assert len(portions) == (10 if shard_bytes in (1, 700) else 5)  # a group has about 700 bytes
    assert documents(tmp_path, on_bad="skip") == [
        *((f"a.parquet:{i}", t) for i, t in enumerate(texts, 1) if t),
        ("b.txt", "b"),
    ]


def test_a_broken_row_group_is_one_bad_record_however_the_file_is_cut(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [RANDOM.randbytes(500).hex() for _ in range(30)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, row_group_size=10, compression="zstd", use_dictionary=False
    )
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 200] = bytes(200)
    path.write_bytes(content)
    for shard_bytes in (1, 1 << 20):
        check_shards(SourceSpec("s", str(tmp_path)), shard_bytes)
    report = ReadReport()
    assert [t for _, t in documents(path, on_bad="skip", report=report)] == texts[:10] + texts[20:]
    assert report.bad == 1
    assert report.bad_named[0].startswith("a.parquet:11: row group 1 cannot be read from here on (")


def test_what_cannot_be_cut_stays_whole_and_is_bad_once(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * 100)
    pyarrow.parquet.write_table(pyarrow.table({"x": range(99)}), tmp_path / "b.parquet", row_group_size=9)
    (tmp_path / "c.jsonl").write_bytes(numbered(b'{"text": "x"}'))
    shards = check_shards(SourceSpec("s", str(tmp_path)), 10)
    assert [p.file for s in shards for p in s.portions if p.whole] == ["a.parquet", "b.parquet"]
    assert in_shards(SourceSpec("s", str(tmp_path)), 10)[1].bad == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_large_file_that_cannot_be_read_is_bad_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(numbered(b'{"text": "x"}'))
    (tmp_path / "a.jsonl").chmod(0)
    (tmp_path / "b.txt").write_text("b")
    check_shards(SourceSpec("s", str(tmp_path)), 10)
    with pytest.raises(UserError, match=r"a\.jsonl:1: the file cannot be read from here on \(\[Errno 13\]"):
        documents(tmp_path)


def test_max_bytes_of_a_shard_and_of_a_source(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "0123456789"}\n' * 20)
    spec = SourceSpec("s", str(tmp_path))
    shards = plan(spec, 230)  # ten lines each
    report = ReadReport()
    assert [len(list(read_shard(s, max_bytes=31, report=report))) for s in shards] == [4, 4]
    assert (report.documents, report.bytes) == (8, 80)
    assert len(list(read(spec, max_bytes=131))) == 14


def test_reports_add_up():
    first = ReadReport(1, 2, 3, 4, ["a", "b", "c"])
    first.add(ReadReport(10, 20, 30, 40, ["d", "e", "f"]))
    assert first == ReadReport(11, 22, 33, 44, ["a", "b", "c", "d", "e"])


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "a.json"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, "has changed since the plan: it had .* bytes and has .* bytes"),
        (lambda p: os.truncate(p, 5), "has changed since the plan: it had .* bytes and has 5 bytes"),
        (Path.unlink, "has changed since the plan: it had .* bytes and is gone; put it back"),
    ],
    ids=["grown", "shrunk", "gone"],
)
def test_files_that_change_after_the_plan_stop_the_run(tmp_path, name, change, message):
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["good"] * 20}), path, row_group_size=2)
    else:
        path.write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
    shards = plan(SourceSpec("s", str(tmp_path)), 50)
    change(path)
    for shard in shards:
        with pytest.raises(RunError, match=rf"^source s: .*{name} {message}"):
            list(read_shard(shard, "skip"))


def test_a_file_that_shrinks_while_it_is_read_stops_the_run(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(MANY)
    reader = read(SourceSpec("s", str(tmp_path)), "skip")
    next(reader)
    os.truncate(tmp_path / "a.jsonl", 1 << 16)
    with pytest.raises(RunError, match="and ends after 65,536; put it back and run again"):
        list(reader)


def test_a_dangling_link_that_comes_to_life_has_changed(tmp_path):
    (tmp_path / "a.txt").symlink_to("b")
    (shard,) = plan(SourceSpec("s", str(tmp_path)))
    report = ReadReport()
    assert list(read_shard(shard, "skip", report=report)) == []
    assert report.bad_named == ["a.txt: cannot be read (No such file or directory)"]
    (tmp_path / "b").write_text("text")
    with pytest.raises(RunError, match="it could not be examined and has 4 bytes"):
        list(read_shard(shard, "skip"))


def test_what_a_file_is_follows_from_its_name(tmp_path):
    rows, object_ = '{"content": "1"}\n{"content": "2"}\n', '{\n"text": "no row"\n}'
    for name, text in [
        ("a.json", rows),
        ("b.json", object_),
        ("c.json", '["text"]'),
        ("d.json", '{"name": "text"}'),
        ("e.json", ""),
        ("f.csv", "text\n1\n"),
        ("G.JSONL", rows),
        ("h.ndjson", rows),
    ]:
        (tmp_path / name).write_text(text)
    (tmp_path / "i.json.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "j.txt.zst").write_bytes(zstandard.compress(rows.encode()))
    as_rows = {"G.JSONL", "a.json", "h.ndjson", "i.json.gz"}
    as_text = {"b.json": object_, "c.json": '["text"]', "d.json": '{"name": "text"}', "f.csv": "text\n1\n"}
    as_text["j.txt.zst"] = rows
    expected_texts = {f"{n}:{i}": str(i) for n in as_rows for i in (1, 2)} | as_text
    found = documents(tmp_path)
    assert dict(found) == expected_texts
    assert len(found) == len(expected_texts)


def test_a_named_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n{"text": "no"}\n{"body": 1}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["no"], "body": ["yes"]}), tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text('{"text": "no"}\n{"body": "yes"}\n')  # rows, as a field is named
    pyarrow.parquet.write_table(pyarrow.table({"text": ["no"], "id": ["no"]}), tmp_path / "d.parquet")
    report = ReadReport()
    found = list(read(SourceSpec("s", str(tmp_path), text_field="body"), "skip", report=report))
    assert [(d.file, d.line, d.id, d.text) for d in found] == [
        ("a.jsonl", 1, "a.jsonl:1", "yes"),
        ("b.parquet", 1, "b.parquet:1", "yes"),
        ("c.json", 2, "c.json:2", "yes"),
    ]
    assert report.bad_named == [
        "a.jsonl:2: no string in field 'body': only 'text'",
        "a.jsonl:3: no string in field 'body': 'body' holds int",
        "c.json:1: no string in field 'body': only 'text'",
        "d.parquet: no column 'body', only 'text', 'id'",
    ]


def test_compressed_members_that_hold_no_text(tmp_path):
    # pzstd begins every frame with a skippable one; a window of 1 GiB is what zstd --long=30 writes.
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"size"
    parameters = zstandard.ZstdCompressionParameters(window_log=30, write_content_size=False)
    wide = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = skippable + zstandard.compress(LINES[:60]) + skippable + wide.compress(LINES[60:]) + wide.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"") + gzip.compress(LINES) + gzip.compress(b""))
    assert documents(tmp_path) == expected("a.jsonl.zst") + expected("b.jsonl.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_memory_is_bounded_by_the_largest_record(tmp_path, name):
    text = "x" * 500_000
    if name == "a.parquet":
        texts = [text + str(i) for i in range(200)]
        options = {"use_dictionary": False, "write_batch_size": 1}  # a page a row: pages are read whole
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name, **options)
        del texts
    else:
        content = json.dumps({"text": text}).encode() + b"\n"
        content *= 200  # 100 MB, of which zstd leaves 10 kB
        (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
        del content
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    arrow = 0
    for document in read(SourceSpec("s", str(tmp_path))):
        assert len(document.text) >= 500_000
        arrow = max(arrow, pyarrow.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + arrow < 50_000_000


@pytest.fixture
def bucket() -> MemoryFileSystem:
    """An empty in-memory file system, as a bucket."""
    system = fsspec.filesystem("memory")
    system.rm("/bucket", recursive=True) if system.exists("/bucket") else None
    return system


def test_remote_sources_are_read_as_local_ones(tmp_path, bucket):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "c.parquet", row_group_size=2)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "in/.hidden.jsonl").write_bytes(LINES)
    bucket.put(str(tmp_path), "/bucket/part", recursive=True)
    for below in ["", "/", "/*.jsonl", "/**/*.gz", "/i?/*", "/[a-c].*", "/a.jsonl", "/**"]:
        local = documents(f"{tmp_path}{below}")
        assert len(local) in (3, 6, 9)
        assert documents(f"file://{tmp_path}{below}") == local
        assert documents(f"memory://bucket/part{below}") == local
        if below == "":
            shards = check_shards(SourceSpec("s", "memory://bucket/part"), 50)
            assert [p.file for s in shards for p in s.portions].count("c.parquet") == 2
            cut = [[(p.file, p.start, p.stop, p.first_line) for p in s.portions] for s in shards]
            local_shards = plan(SourceSpec("s", str(tmp_path)), 50)
            assert cut == [[(p.file, p.start, p.stop, p.first_line) for p in s.portions] for s in local_shards]
    for below, message in [("absent", "does not exist"), ("*.txt", "no files in"), ("absent/*", "does not exist")]:
        with pytest.raises(UserError, match=rf"source s: .*{message}"):
            documents(f"memory://bucket/part/{below}")


def test_remote_files_that_change_after_the_plan_stop_the_run(bucket):
    bucket.pipe("/bucket/a.jsonl", LINES)
    (shard,) = plan(SourceSpec("s", "memory://bucket"))
    bucket.pipe("/bucket/a.jsonl", LINES[:-1])
    with pytest.raises(RunError, match=r"/bucket/a\.jsonl has changed since the plan"):
        list(read_shard(shard, "skip"))
    bucket.rm("/bucket/a.jsonl")
    with pytest.raises(RunError, match=r"/bucket/a\.jsonl has changed since the plan: .* is gone"):
        list(read_shard(shard, "skip"))


class Faulty(MemoryFileSystem):
    """A file system that fails as networks do: what it holds below /down cannot be listed, and reading breaks off."""

    protocol = "faulty"
    store: dict = {}  # noqa: RUF012  as MemoryFileSystem has it
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("faulty:/"))

    def ls(self, path, detail=True, **kwargs):
        if "down" in path:
            raise ConnectionResetError("peer")
        return [{**i, "size": None if "unsized" in i["name"] else i["size"]} for i in super().ls(path, True, **kwargs)]

    def _open(self, path, mode="rb", **kwargs):
        if "closed" in path and mode == "rb":
            raise PermissionError(13, "Permission denied")
        if "busy" in path and mode == "rb":
            raise TimeoutError("no answer")
        file = super()._open(path, mode, **kwargs)
        return file if mode != "rb" or "flaky" not in path else Flaky(file.getvalue())


class Flaky:
    """A file that is there and cannot be read."""

    def __init__(self, content):
        self.size, self.at = len(content), 0

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def read(self, size=-1):
        raise ValueError("the connection is gone")

    def close(self):
        pass


def test_remote_file_systems_that_fail(bucket):
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    system = Faulty()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), "/ok/flaky.parquet", filesystem=system)
    for path in ["/down/a.jsonl", "/unsized/unsized.txt", "/shut/closed.txt", "/ok2/flaky.jsonl", "/busy/busy.txt"]:
        system.pipe(path, LINES)
    for folder, error, message in [
        ("down", UserError, r"cannot be listed \(ConnectionResetError: peer\); check the URL, the network"),
        ("unsized", UserError, r"the size of /unsized/unsized\.txt is not known; download it first"),
        ("shut", UserError, r"closed\.txt: cannot be read \(Permission denied\); repair it, or leave it out"),
        ("busy", RunError, r"faulty:///busy/busy.txt: reading failed \(TimeoutError: no answer\); run again when"),
        ("ok", RunError, r"faulty:///ok/flaky.parquet: reading failed \(ValueError: the connection is gone\)"),
        ("ok2", RunError, r"faulty:///ok2/flaky.jsonl: reading failed \(ValueError: the connection is gone\)"),
    ]:
        on_bad = "fail" if folder == "shut" else "skip"
        with pytest.raises(error, match=rf"^source s: .*{message}"):
            documents(f"faulty://{folder}", on_bad=on_bad)
        if error is RunError:  # not a bad record of the planned ranges either
            with pytest.raises(RunError, match="reading failed"):
                in_shards(SourceSpec("s", f"faulty://{folder}"), 20)


def test_file_systems_that_are_not_installed_or_not_known(monkeypatch):
    monkeypatch.setitem(known_implementations, "absent", {"class": "absentfs.core.FS", "err": "Install it"})
    monkeypatch.setitem(known_implementations, "absent2", {"class": "fsspec.absent.FS", "err": "Needs a and b"})
    for location, message in [
        ("absent://b/*.gz", r"absent://b/\*\.gz cannot be read \(Install it\); pip install absentfs"),
        ("absent2://b", r"cannot be read \(Needs a and b\); install what that names"),
        ("nosuch://b", r"nosuch://b cannot be read \(Protocol not known: nosuch\); correct the URL"),
    ]:
        with pytest.raises(UserError, match=f"source s: .*{message}"):
            documents(location)


def test_links_to_folders_are_followed_by_globs_without_stars_that_descend(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.txt").write_text("a")
    (tmp_path / "real/loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to("real")
    assert documents(tmp_path) == [("real/a.txt", "a")]
    assert documents(f"{tmp_path}/**/*.txt") == [("real/a.txt", "a")]
    assert documents(f"{tmp_path}/*/*.txt") == [("link/a.txt", "a"), ("real/a.txt", "a")]
    (tmp_path / "real/b.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"source s: real/b\.txt: cannot be read \(No such file"):
        documents(f"{tmp_path}/real*/*.txt")


def test_odd_locations(tmp_path):
    (tmp_path / "a*.txt").write_text("a star in its name")
    assert documents(tmp_path / "a*.txt") == [("a*.txt", "a star in its name")]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no file or folder; write it to a file first"):
        documents(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory\); allow it"):
        documents(tmp_path / "a*.txt" / "b")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    with pytest.raises(UserError, match=r"the file name 'caf\\udce9.txt' is not UTF-8; rename the file"):
        documents(tmp_path)


def test_shards_do_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    (shard,) = plan(SourceSpec("s", "."))
    monkeypatch.chdir("/")
    assert [d.text for d in read_shard(shard)] == ["a"]


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
        (tmp_path / "absent/*.csv", "no files in"),
        (tmp_path / "a.jsonl", r"no documents in .*a\.jsonl \(1 empty, 1 bad left out\)"),
    ]:
        with pytest.raises(UserError, match=f"source s: .*{message}"):
            documents(location, on_bad="skip")


def test_specs():
    assert SourceSpec.parse("books=/a=b") == SourceSpec("books", "/a=b")
    assert SourceSpec.parse("code=embedded:stdlib").embedded == "stdlib"
    assert SourceSpec.parse("code=s3://b/*.jsonl.gz") == SourceSpec("code", "s3://b/*.jsonl.gz", None, None, False)
    assert SourceSpec("stack", "x").published == "stack"
    assert SourceSpec("stack", "x", label="the stack").published == "the stack"
    for wrong in ({"label": ""}, {"text_field": ""}):
        with pytest.raises(UserError, match=f"source s: {next(iter(wrong))} is empty"):
            SourceSpec("s", "x", **wrong)
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
    (shard,) = plan(spec, 1)
    assert found == list(read_shard(shard, max_bytes=50_000))
    assert all(d.id == d.file and d.line == 0 for d in found)
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
