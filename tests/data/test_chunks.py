"""Record files and the manifest: what was written comes back, and nothing else is accepted."""

import dataclasses
import json
import os
import resource
import shutil

import numpy as np
import pytest

from data.chunks import DataManifest, FileRecord, SampleFile, token_dtype, write_samples, written
from data.index import DocumentIndex, IndexWriter
from errors import RunError, UserError


def write(root, windows, *, tokens=9, vocab_size=1000, high=1000) -> tuple[np.ndarray, FileRecord]:
    stream = np.random.default_rng(0).integers(0, high, 100 * tokens).astype(token_dtype(vocab_size))
    path = root / "chunks" / "000.arrayrecord"
    write_samples(path, stream, np.array(windows, np.int64), tokens)
    return stream, FileRecord.of(root, path, len(windows))


@pytest.mark.parametrize("vocab_size", [1000, 65_536, 65_537])
def test_samples_come_back(tmp_path, vocab_size):
    stream, record = write(tmp_path, [7, 0, 99], vocab_size=vocab_size, high=vocab_size)
    file = SampleFile(tmp_path, record, tokens=9, vocab_size=vocab_size)
    for position, window in enumerate([7, 0, 99]):
        sample = file.read(position)
        assert sample.dtype == np.int32
        assert sample.tolist() == stream[9 * window : 9 * window + 9].tolist()
    with pytest.raises(IndexError, match=r"position 3 is outside 0\.\.2"):
        file.read(3)
    assert token_dtype(vocab_size).itemsize == (4 if vocab_size > 65_536 else 2)


def test_no_samples_are_a_file_too(tmp_path):
    _, record = write(tmp_path, [])
    SampleFile(tmp_path, record, tokens=9, vocab_size=1000)


def test_a_flipped_bit_anywhere_in_a_sample_is_named(tmp_path):
    stream, record = write(tmp_path, range(20))
    path = tmp_path / record.file
    good = path.read_bytes()
    at = good.index(stream[9 * 5 : 9 * 6].tobytes())
    for byte in range(18):
        path.write_bytes(good[: at + byte] + bytes([good[at + byte] ^ 1 << byte % 8]) + good[at + byte + 1 :])
        file = SampleFile(tmp_path, record, tokens=9, vocab_size=1000)
        assert file.read(4).tolist() == stream[36:45].tolist()
        with pytest.raises(RunError, match=r"000\.arrayrecord: sample 5 is corrupt \(.*hash mismatch.*; restore"):
            file.read(5)
        record.check_size(tmp_path)
        with pytest.raises(RunError, match=r"000\.arrayrecord: SHA-256 differs from the manifest"):
            record.check_content(tmp_path)


def test_files_that_are_not_what_the_manifest_says(tmp_path):
    _, record = write(tmp_path, range(20))
    path = tmp_path / record.file
    with pytest.raises(RunError, match="sample 0 has 18 bytes, not 8 tokens of 2"):
        SampleFile(tmp_path, record, tokens=8, vocab_size=1000).read(0)
    with pytest.raises(RunError, match=r"sample 0 holds id \d+, outside the vocabulary of 500"):
        SampleFile(tmp_path, record, tokens=9, vocab_size=500).read(0)
    with pytest.raises(RunError, match="not a readable record file of 21 samples"):
        SampleFile(tmp_path, dataclasses.replace(record, samples=21), tokens=9, vocab_size=1000)
    path.write_bytes(b"x" * record.bytes)
    with pytest.raises(RunError, match="not a readable record file of 20 samples"):
        SampleFile(tmp_path, record, tokens=9, vocab_size=1000)
    os.truncate(path, 100)
    with pytest.raises(RunError, match=r"000\.arrayrecord: 100 bytes, the manifest says \d+"):
        record.check_size(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match=r"000\.arrayrecord: missing \(No such file"):
        SampleFile(tmp_path, record, tokens=9, vocab_size=1000)


@pytest.fixture
def small_disk():
    """Let no file grow beyond 100 kB: for a writer the same as a disk that is full at that point."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing_behind(tmp_path, small_disk):
    with pytest.raises(RunError, match=r"000\.arrayrecord: cannot be written \(.*too large.*; free space"):
        write(tmp_path, list(range(100)) * 100)
    with (
        pytest.raises(RunError, match=r"index: cannot be written \(.*too large.*; free space"),
        written(tmp_path / "index") as part,
    ):
        part.write_bytes(bytes(200_000))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyError), written(tmp_path / "x") as part:
        {}[part.write_text("new")]
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_manifest_round_trip(prepared, tmp_path):
    manifest = DataManifest.load(prepared)
    manifest.save(tmp_path)
    assert DataManifest.load(tmp_path) == manifest
    assert DataManifest.load(tmp_path).sha256 == manifest.sha256
    assert (tmp_path / "manifest.json").read_bytes() == (prepared / "manifest.json").read_bytes()
    assert sum(s.per_chunk for s in manifest.sources) == manifest.samples_per_chunk


def edit(**changes):
    return lambda m: m | changes


BAD_MANIFESTS = [
    (lambda m: [m], "malformed: manifest is not an object"),
    (edit(format=2), r"format 2 is newer than this program reads \(1\); upgrade"),
    (edit(format=0), "malformed: format 0, this program reads 1"),
    (edit(format="1"), "malformed: manifest.format = '1' is not of type int"),
    (edit(extra=1), "malformed: manifest: field 'extra' is unknown"),
    (lambda m: {k: v for k, v in m.items() if k != "seed"}, "malformed: manifest: field 'seed' is missing"),
    (edit(seed=True), "malformed: manifest.seed = True is not of type int"),
    (edit(sources=3), "malformed: manifest.sources is not a list"),
    (edit(sources=[3]), r"malformed: manifest.sources\[0\] is not an object"),
    (edit(tokenizer={"file": 1, "sha256": ""}), "malformed: manifest.tokenizer.file = 1 is not of type str"),
    (edit(order="other"), "malformed: order 'other', this program knows 'argsort"),
    (edit(dtype="uint32"), "malformed: dtype uint32 does not fit a vocabulary of 400"),
    (edit(chunks=3), "malformed: 4 chunk files are listed for 3 chunks"),
    (edit(samples_per_chunk=1), "malformed: not every chunk file has samples_per_chunk = 1"),
    (lambda m: m | {"sources": m["sources"][:1]}, "malformed: the sources' per_chunk do not add up"),
]


@pytest.mark.parametrize(("change", "message"), BAD_MANIFESTS, ids=[m[:60] for _, m in BAD_MANIFESTS])
def test_bad_manifests_are_refused(prepared, tmp_path, change, message):
    (tmp_path / "manifest.json").write_text(json.dumps(change(json.loads((prepared / "manifest.json").read_text()))))
    with pytest.raises(UserError, match=f"manifest.json: {message}"):
        DataManifest.load(tmp_path)


def test_absent_and_garbled_manifests_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: not found; prepare the data first"):
        DataManifest.load(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"{\xff")
    with pytest.raises(UserError, match=r"manifest\.json: not a data manifest"):
        DataManifest.load(tmp_path)


def test_index_finds_documents_of_windows_and_windows_of_documents(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 40, 3000)  # three frames of ids
    writer = IndexWriter(tmp_path, "a")
    for start in range(0, 3000, 700):
        part = lengths[start : start + 700]
        writer.add([f"é {start + i}.txt" for i in range(len(part))], part)
    writer.save(tmp_path, "a")
    writer.close()
    owner = np.repeat(np.arange(3000), lengths)  # the document of every token
    within = np.concatenate([np.arange(n) for n in lengths])
    index = DocumentIndex(tmp_path, "a")
    assert len(index) == 3000
    assert index.offsets[-1] == writer.tokens == lengths.sum()
    for window in range(0, len(owner) // 17, 7):
        spans = index.spans(window, 17)
        assert [s.number for s in spans for _ in range(s.start, s.stop)] == owner[
            17 * window : 17 * window + 17
        ].tolist()
        assert [s.skip + i for s in spans for i in range(s.stop - s.start)] == within[17 * window :][:17].tolist()
        for s in spans:
            assert window in index.windows(s.number, 17)
    for number in (0, 1023, 1024, 2999):
        assert index.id(number) == f"é {number}.txt"
        assert index.find(f"é {number}.txt") == number
        assert set(index.windows(number, 17)) == {t // 17 for t in np.flatnonzero(owner == number).tolist()}
    assert index.find("absent") is None
    with pytest.raises(IndexError, match=r"document 3000 is outside 0\.\.2999"):
        index.id(3000)


def test_a_damaged_index_is_named(prepared, tmp_path):
    shutil.copytree(prepared / "index", tmp_path / "index")
    (tmp_path / "index" / "code.documents.zst").write_bytes(b"x" * 100)
    with pytest.raises(RunError, match=r"code\.documents\.zst: not readable"):
        DocumentIndex(tmp_path, "code").id(0)
    (tmp_path / "index" / "code.offsets.npy").write_bytes(b"x")
    with pytest.raises(RunError, match=r"code\.offsets\.npy: not a readable document index"):
        DocumentIndex(tmp_path, "code")
