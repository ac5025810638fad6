"""The document index: from tokens of a stream to documents, and back."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.index import KINDS, DocumentIndex, PartIndex, check_line, text_hash, write_index
from errors import RunError, UserError


def write(root, lengths, files, cuts) -> DocumentIndex:
    """Write documents of these lengths in files [(name, line numbers)] as shards that end at the cuts."""
    places = [(name, line) for name, lines in files for line in lines]
    parts, begin = [], 0
    for n, end in enumerate([*sorted(cuts), len(lengths)]):
        own = lengths[begin:end]
        arrays = {
            "offsets": np.cumsum(own),
            "lines": [line for _, line in places[begin:end]],
            "hashes": [text_hash(f"{i}".encode()) for i in range(begin, end)],
        }
        for kind, values in arrays.items():
            (root / f"a-{n}.{kind}").write_bytes(np.array(values, KINDS[kind]).tobytes())
        names = [name for name, _ in places[begin:end]]
        parts.append(
            PartIndex(root, f"a-{n}", len(own), sum(own), tuple((x, names.count(x)) for x in dict.fromkeys(names)))
        )
        begin = end
    write_index(root, "a", parts)
    return DocumentIndex(root, "a")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 17), st.booleans())
def test_windows_and_documents_find_each_other(tmp_path_factory, data, sequence_length, overlaps):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=60))
    n, overlap = len(lengths), int(overlaps)
    cuts = data.draw(st.lists(st.integers(0, n), max_size=4))
    half = n // 2
    files = [(f"{i}.py", [0]) for i in range(half)] + [("x:7.jsonl", [2 * i + 1 for i in range(n - half)])]
    index = write(tmp_path_factory.mktemp("i"), lengths, files, cuts)
    owner = np.repeat(np.arange(n), lengths)  # the document of every token
    within = np.concatenate([np.arange(k) for k in lengths])
    assert (len(index), index.offsets[-1]) == (n, len(owner))
    size, stride = sequence_length + 1, sequence_length + 1 - overlap
    holding = {i: set() for i in range(n)}
    for window in range(-(-len(owner) // stride)):
        start, stop = window * stride, min(window * stride + size, len(owner))
        spans = index.spans(start, stop)
        assert [s.number for s in spans for _ in range(s.start, s.stop)] == owner[start:stop].tolist()
        assert [s.skip + i for s in spans for i in range(s.stop - s.start)] == within[start:stop].tolist()
        for number in owner[start:stop].tolist():
            holding[number].add(window)
    for number in range(n):
        assert holding[number] <= set(index.windows(number, sequence_length, overlap))
        extra = set(index.windows(number, sequence_length, overlap)) - holding[number]
        assert not extra, (number, extra)
        name, line = [(name, line) for name, lines in files for line in lines][number]
        assert index.where(number) == (name, line)
        assert index.id(number) == (f"{name}:{line}" if line else name)
        assert index.find(index.id(number)) == number
        assert int(index.hashes[number]) == text_hash(f"{number}".encode())
    for absent in ("absent", "0.py:1", "x:7.jsonl", "x:7.jsonl:2", "x:7.jsonl:x", ""):
        assert index.find(absent) is None
    with pytest.raises(IndexError, match=rf"document {n} is outside 0\.\.{n - 1}"):
        index.id(n)


def test_the_arrays_are_numpys(tmp_path):
    """They are written without memory maps, which end a process with a bus error where a disk is full."""
    index = write(tmp_path, [3, 4, 5], [("a", [1, 2, 3])], [1])
    for kind, dtype in KINDS.items():
        path = tmp_path / "index" / f"a.{kind}.npy"
        np.save(tmp_path / "again.npy", np.array(getattr(index, kind), dtype))
        assert path.read_bytes() == (tmp_path / "again.npy").read_bytes()
    assert index.offsets.tolist() == [0, 3, 7, 12]


def test_a_damaged_index_is_named(prepared, tmp_path):
    shutil.copytree(prepared / "index", tmp_path / "index")
    DocumentIndex(tmp_path, "code")
    (tmp_path / "index" / "code.lines.npy").write_bytes((prepared / "index" / "prose.lines.npy").read_bytes())
    with pytest.raises(RunError, match=r"code\.files\.json: its counts do not fit the arrays beside it"):
        DocumentIndex(tmp_path, "code")
    (tmp_path / "index" / "code.offsets.npy").write_bytes(b"x")
    with pytest.raises(RunError, match=r"code\.files\.json: not a readable document index"):
        DocumentIndex(tmp_path, "code")


def test_lines_beyond_the_index_are_refused():
    assert check_line("a", (1 << 32) - 1) == (1 << 32) - 1
    with pytest.raises(UserError, match="a: line 4294967296 is beyond what the index can name"):
        check_line("a", 1 << 32)
