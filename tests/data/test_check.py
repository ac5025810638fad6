"""The check of a whole data set: it counts right, and finds what is wrong."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from data.check import check
from data.chunks import DataManifest, FileRecord, write_records
from data.dataset import ChunkedData
from data.engines import Local
from data.index import DocumentIndex
from data.prepare import PrepareConfig, prepare
from data.sources import SourceSpec
from data.tokenizer import load
from data.trace import Tracer
from errors import RunError, UserError


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("which", ["prepared", "crystal"])
def test_statistics_are_what_a_plain_count_gives(which, request, tmp_path):
    root = request.getfixturevalue(which)
    shutil.copytree(root, tmp_path / "set")
    statistics, problems = check(tmp_path / "set", Local(1), quiet)
    assert problems == []
    assert json.loads((tmp_path / "set" / "statistics.json").read_text()) == json.loads(json.dumps(statistics))
    data, tokenizer = ChunkedData(root), load(root)
    tracer = Tracer(data)
    for chunk, file in enumerate(data.manifest.chunk_files):
        counted = {}
        for position in range(file.samples):
            sample = data.sample(chunk, position)
            mine = counted.setdefault(tracer.origin(chunk, position).source, np.zeros(6, int))
            ids = sample.tokens.tolist()
            pieces = [
                tokenizer.decode([tokenizer.encode("a")[0], i]) for i in ids if i not in tokenizer.special.values()
            ]
            unknown = [tokenizer.byte_of[i] > 127 for i in ids if i in tokenizer.byte_of]
            text = sum(1 if "\ufffd" in p else len(p.encode()) - 1 for p in pieces)
            mine += [1, len(ids), int(sample.weights.sum()), ids.count(2), text, sum(unknown)]
        found = {name: list(c.values()) for name, c in statistics["chunks"][chunk].items()}
        assert found == {name: c.tolist() for name, c in counted.items()}
    for source in data.manifest.sources:
        known = statistics["sources"][source.name]
        assert known["in_validation"]["samples"] == source.validation == 5
        assert known["bytes_per_token"] == source.bytes / source.tokens


def test_what_is_wrong_is_named(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    root = tmp_path / "set"
    for name, at in (
        ("chunks/001.arrayrecord", 5000),
        ("validation/prose.arrayrecord", 4000),
        ("index/code.lines.npy", 130),
    ):
        content = bytearray((root / name).read_bytes())
        content[at] ^= 1
        (root / name).write_bytes(content)
    (root / "chunks" / "002.arrayrecord").unlink()
    (root / "tokenizer.model").write_bytes((root / "tokenizer.model").read_bytes() + b"\x00")
    _, problems = check(root, Local(1), quiet)
    for part in (
        "001.arrayrecord: SHA-256 differs",
        "002.arrayrecord: missing",
        "prose.arrayrecord: SHA-256 differs",
        "code.lines.npy: SHA-256 differs",
        "tokenizer.model: ",
    ):
        assert any(part in p for p in problems), (part, problems)
    assert len(problems) == 5
    assert not (root / "statistics.json").exists()
    with pytest.raises(UserError, match="not found; prepare the data first"):
        check(tmp_path, Local(1), quiet)


def test_an_index_that_is_gone_does_not_hide_the_rest(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    (tmp_path / "set" / "index" / "code.hashes.npy").unlink()
    (tmp_path / "set" / "chunks" / "002.arrayrecord").unlink()
    statistics, problems = check(tmp_path / "set", Local(1), quiet)
    assert [p.split(": missing")[0] for p in problems] == [
        str(tmp_path / "set" / "chunks" / "002.arrayrecord"),
        str(tmp_path / "set" / "index" / "code.hashes.npy"),
    ]
    assert statistics["duplicates"]["documents"] >= 0  # of the source whose index is whole


def test_another_data_set_in_the_same_place_is_checked_by_its_own_manifest(prepared, crystal, tmp_path):
    for other in (prepared, crystal, prepared):
        shutil.copytree(other, tmp_path / "set")
        assert check(tmp_path / "set", Local(1), quiet)[1] == []
        shutil.rmtree(tmp_path / "set")


def test_its_progress_is_told_and_nothing_stays(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    before = {p.name for p in (tmp_path / "set").iterdir()}
    lines: list[str] = []
    for engine in (Local(2), Local(1)):
        check(tmp_path / "set", engine, lines.append)
    samples = sum(f.samples for f in DataManifest.load(prepared).chunk_files) + 2 * 5
    assert len(lines) == 2
    assert all(line.startswith(f"check: 6 of 6 tasks, {samples:,} samples, ") for line in lines)
    assert {p.name for p in (tmp_path / "set").iterdir()} == {*before, "statistics.json"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    os.chmod(tmp_path / "set", 0o555)
    try:
        with pytest.raises(RunError, match=r"set: cannot be written \(Permission denied\); allow it, or free space"):
            check(tmp_path / "set", Local(1), quiet)
    finally:
        os.chmod(tmp_path / "set", 0o755)


def test_ids_outside_the_vocabulary_are_found_behind_right_hashes(prepared, tmp_path):
    """A file that was wrong when its hash was taken."""
    shutil.copytree(prepared, tmp_path / "set")
    manifest = DataManifest.load(prepared)
    path = tmp_path / "set" / "chunks" / "000.arrayrecord"
    record = manifest.chunk_files[0]
    ids = np.full((record.samples, 17), 5, "<u2")
    ids[9, 3] = 400
    write_records(path, (row.tobytes() for row in ids))
    files = (FileRecord.of(tmp_path / "set", path, record.samples), *manifest.chunk_files[1:])
    phase = dataclasses.replace(manifest.phases[0], chunk_files=files)
    dataclasses.replace(manifest, phases=(phase,)).save(tmp_path / "set")
    _, problems = check(tmp_path / "set", Local(1), quiet)
    assert problems == [f"{path}: sample 9 holds id 400, outside the vocabulary of 400"]


def test_equal_documents_are_counted_and_named(tmp_path, monkeypatch):
    """Across sources and files; the same with the hashes compared in several ranges."""
    for name, texts in {"a": ["one two", "three", "one two", "x" * 400], "b": ["three", "four", "one two"]}.items():
        rows = [{"text": t} for t in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sources = (*(SourceSpec(n, str(tmp_path / f"{n}.jsonl")) for n in "ab"), SourceSpec("c", "embedded:topics"))
    config = PrepareConfig(
        recipe="r", out=tmp_path / "set", sources=sources, sequence_length=3, vocab_size=400,
        validation_per_source=0, seed=0, chunks=1, max_bytes_per_source=20_000,
    )  # fmt: skip
    prepare(config, log=quiet)
    expected = {
        "documents": 3,
        "texts": 2,
        "named": {("a/a.jsonl:1", "a/a.jsonl:3"), ("a/a.jsonl:3", "b/b.jsonl:3"), ("a/a.jsonl:2", "b/b.jsonl:1")},
    }
    for at_once in (1 << 24, 2):
        monkeypatch.setattr("data.check._HASHES_AT_ONCE", at_once)
        monkeypatch.setattr("data.check._HASHES_READ", at_once)
        twice = check(tmp_path / "set", Local(1), quiet)[0]["duplicates"]
        assert {**twice, "named": set(twice["named"])} == expected
    assert len(DocumentIndex(config.out, "a")) == 4
    assert DataManifest.load(config.out).sources[0].documents == 4
