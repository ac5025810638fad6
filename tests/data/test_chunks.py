"""Record files and the manifest: what was written comes back, and nothing else is accepted."""

import dataclasses
import json
import os
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chunks import DataManifest, FileRecord, SampleFile, decode, encode, token_dtype, write_records, written
from data.sample import Sample
from errors import RunError, UserError


def write(root, windows, *, tokens=9, vocab_size=1000, high=1000) -> tuple[np.ndarray, FileRecord]:
    dtype = token_dtype(vocab_size)
    stream = np.random.default_rng(0).integers(0, high, 100 * tokens).astype(dtype)
    path = root / "chunks" / "000.arrayrecord"
    samples = [Sample.of_tokens(stream[tokens * w : tokens * (w + 1)]) for w in windows]
    write_records(path, (encode(s, dtype) for s in samples))
    return stream, FileRecord.of(root, path, len(windows))


@pytest.mark.parametrize("vocab_size", [1000, 65_536, 65_537])
def test_samples_come_back(tmp_path, vocab_size):
    stream, record = write(tmp_path, [7, 0, 99], vocab_size=vocab_size, high=vocab_size)
    file = SampleFile(tmp_path, record, sequence_length=8, vocab_size=vocab_size)
    for position, window in enumerate([7, 0, 99]):
        sample = file.read(position)
        assert (sample.inputs.dtype, sample.targets.dtype, sample.weights.dtype) == (np.int32, np.int32, np.float32)
        assert sample.is_window
        assert sample.tokens.tolist() == stream[9 * window : 9 * window + 9].tolist()
    with pytest.raises(IndexError, match=r"position 3 is outside 0\.\.2"):
        file.read(3)
    assert token_dtype(vocab_size).itemsize == (4 if vocab_size > 65_536 else 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 20), st.sampled_from([300, 70_000]))
def test_samples_with_other_targets_and_masks_come_back(data, length, vocab_size):
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=length, max_size=length)
    mask = st.lists(st.sampled_from([0.0, 1.0]), min_size=length, max_size=length)
    sample = Sample(
        np.array(data.draw(ids), np.int32), np.array(data.draw(ids), np.int32), np.array(data.draw(mask), np.float32)
    )
    dtype = token_dtype(vocab_size)
    back = decode(encode(sample, dtype), length, dtype)
    for given_values, found in zip(sample, back):
        assert found.dtype == given_values.dtype
        assert found.tolist() == given_values.tolist()


def test_a_masked_target_outside_the_vocabulary_is_found(tmp_path):
    sample = Sample(np.array([1, 2], np.int32), np.array([2, 70], np.int32), np.array([1, 0], np.float32))
    path = tmp_path / "chunks" / "000.arrayrecord"
    write_records(path, [encode(sample, token_dtype(100))])
    record = FileRecord.of(tmp_path, path, 1)
    assert SampleFile(tmp_path, record, sequence_length=2, vocab_size=71).read(0).targets.tolist() == [2, 70]
    with pytest.raises(RunError, match="sample 0 holds id 70, outside the vocabulary of 70"):
        SampleFile(tmp_path, record, sequence_length=2, vocab_size=70).read(0)


def test_no_samples_are_a_file_too(tmp_path):
    _, record = write(tmp_path, [])
    SampleFile(tmp_path, record, sequence_length=8, vocab_size=1000)


def test_a_flipped_bit_anywhere_in_a_sample_is_named(tmp_path):
    stream, record = write(tmp_path, range(20))
    path = tmp_path / record.file
    good = path.read_bytes()
    at = good.index(stream[9 * 5 : 9 * 6].tobytes())
    for byte in range(18):
        path.write_bytes(good[: at + byte] + bytes([good[at + byte] ^ 1 << byte % 8]) + good[at + byte + 1 :])
        file = SampleFile(tmp_path, record, sequence_length=8, vocab_size=1000)
        assert file.read(4).tokens.tolist() == stream[36:45].tolist()
        with pytest.raises(RunError, match=r"000\.arrayrecord: sample 5 is corrupt \(.*hash mismatch.*; restore"):
            file.read(5)
        record.check_size(tmp_path)
        with pytest.raises(RunError, match=r"000\.arrayrecord: SHA-256 differs from the manifest"):
            record.check_content(tmp_path)


def test_files_that_are_not_what_the_manifest_says(tmp_path):
    _, record = write(tmp_path, range(20))
    path = tmp_path / record.file
    with pytest.raises(RunError, match=r"sample 0 is corrupt .18 bytes, which are no sample of 7 tokens of 2 bytes"):
        SampleFile(tmp_path, record, sequence_length=7, vocab_size=1000).read(0)
    with pytest.raises(RunError, match=r"sample 0 holds id \d+, outside the vocabulary of 500"):
        SampleFile(tmp_path, record, sequence_length=8, vocab_size=500).read(0)
    with pytest.raises(RunError, match="not a readable record file of 21 samples"):
        SampleFile(tmp_path, dataclasses.replace(record, samples=21), sequence_length=8, vocab_size=1000)
    path.write_bytes(b"x" * record.bytes)
    with pytest.raises(RunError, match="not a readable record file of 20 samples"):
        SampleFile(tmp_path, record, sequence_length=8, vocab_size=1000)
    os.truncate(path, 100)
    with pytest.raises(RunError, match=r"000\.arrayrecord: 100 bytes, the manifest says \d+"):
        record.check_size(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match=r"000\.arrayrecord: missing \(No such file"):
        SampleFile(tmp_path, record, sequence_length=8, vocab_size=1000)


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


def test_manifest_round_trip(prepared, crystal, tmp_path):
    manifest = DataManifest.load(prepared)
    manifest.save(tmp_path)
    assert DataManifest.load(tmp_path) == manifest
    assert DataManifest.load(tmp_path).sha256 == manifest.sha256
    assert (tmp_path / "manifest.json").read_bytes() == (prepared / "manifest.json").read_bytes()
    assert sum(s.per_chunk for s in manifest.sources) == manifest.phases[0].samples_per_chunk
    DataManifest.load(crystal).save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == (crystal / "manifest.json").read_bytes()


def edit(**changes):
    return lambda m: m | changes


def phase(**changes):
    return lambda m: m | {"phases": [m["phases"][0] | changes]}


BAD_MANIFESTS = [
    (lambda m: [m], "malformed: manifest is not an object"),
    (edit(format=3), r"format 3 is newer than this program reads \(2\); upgrade"),
    (edit(format=1), r"format 1 is older than what this program reads \(2\); prepare the data again"),
    (edit(format="1"), "malformed: manifest.format = '1' is not of type int"),
    (edit(extra=1), "malformed: manifest: field 'extra' is unknown"),
    (lambda m: {k: v for k, v in m.items() if k != "seed"}, "malformed: manifest: field 'seed' is missing"),
    (edit(seed=True), "malformed: manifest.seed = True is not of type int"),
    (edit(layout="row"), "malformed: manifest.layout = 'row' is none of 'chunks', 'mixture'"),
    (edit(sources=3), "malformed: manifest.sources is not a list"),
    (edit(sources=[3]), r"malformed: manifest.sources\[0\] is not an object"),
    (edit(tokenizer={"file": 1, "sha256": ""}), "malformed: manifest.tokenizer.file = 1 is not of type str"),
    (edit(order="other"), "malformed: order 'other', this program knows "),
    (edit(dtype="uint32"), "malformed: dtype uint32 does not fit a vocabulary of 400"),
    (edit(phases=[]), "malformed: 0 phases: the layout 'chunks' has one"),
    (phase(samples=3), r"malformed: phases\[0\]: chunk_files do not hold 3 samples"),
    (phase(parts=[{"name": "x"}]), r"malformed: manifest.phases\[0\].parts\[0\]: field '\w+' is missing"),
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
