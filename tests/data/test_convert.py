"""Published files in and out: nothing changes on the way, and every sample can be named."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from data.chunks import DataManifest
from data.convert import from_published, to_jsonl
from data.dataset import ChunkedData
from data.engines import Local
from data.mixture import Part
from data.published import PublishedAmber, PublishedCrystal
from data.tokenizer import load
from data.trace import Tracer
from errors import RunError, UserError


def quiet(line: str) -> None:
    pass


def convert(data, out, **changes) -> DataManifest:
    values = {"recipe": "r", "samples_per_chunk": 7, "tokenizer": None, "engine": Local(1), "log": quiet}
    return from_published(data, out, **{**values, **changes})


@pytest.fixture(scope="module")
def published(prepared, tmp_path_factory):
    """The prepared corpus in Amber's published form."""
    return to_jsonl(prepared, tmp_path_factory.mktemp("jsonl"), Local(1), quiet)


def amber(folder, prepared) -> PublishedAmber:
    manifest = DataManifest.load(prepared)
    return PublishedAmber(folder, manifest.sequence_length, manifest.vocab_size, manifest.seed)


def test_ours_in_the_published_form_is_the_fact_sheets(prepared, published):
    manifest, data = DataManifest.load(prepared), ChunkedData(prepared)
    assert sorted(p.name for p in (published / "train").glob("*.jsonl")) == [f"train_00{c}.jsonl" for c in range(4)]
    for chunk in range(4):
        text = (published / "train" / f"train_00{chunk}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert text.splitlines()[0] == json.dumps({"token_ids": rows[0]["token_ids"], "source": "code"})
        counts = [(s.name, s.per_chunk) for s in manifest.sources]
        assert [r["source"] for r in rows] == [name for name, n in counts for _ in range(n)]
        everything = sorted(data.sample(chunk, p).tokens.tolist() for p in range(manifest.phases[0].samples_per_chunk))
        assert sorted(r["token_ids"] for r in rows) == everything
    valid = (published / "valid" / "prose.jsonl").read_text().splitlines()
    assert [json.loads(r)["token_ids"] for r in valid] == data.validation("prose").tokens.tolist()


def test_there_and_back_is_the_same_data(prepared, published, tmp_path):
    """The chunks are the same bytes: the published order and the seed say all of it."""
    manifest = convert(amber(published, prepared), tmp_path / "set", tokenizer=prepared)
    ours = DataManifest.load(prepared)
    assert manifest.chunk_files == ours.chunk_files
    assert [s.validation_file for s in manifest.sources] == [s.validation_file for s in ours.sources]
    assert manifest.tokenizer == ours.tokenizer
    # And without conversion: the same samples at the same places.
    raw, data = amber(published, prepared), ChunkedData(tmp_path / "set")
    assert raw.phases == data.phases
    for chunk, position in [(0, 0), (1, 5), (3, 2)]:
        assert raw.sample(chunk, position).tokens.tolist() == data.sample(chunk, position).tokens.tolist()


def test_converted_samples_are_named_by_file_and_line(prepared, published, tmp_path):
    convert(amber(published, prepared), tmp_path / "set", tokenizer=prepared)
    tracer, theirs = Tracer(ChunkedData(tmp_path / "set")), Tracer(ChunkedData(prepared))
    for chunk, position in [(0, 0), (2, 3), (3, 1)]:
        pieces = tracer.pieces(chunk, position)
        file, line = pieces[0].file, pieces[0].line
        row = json.loads((published / "train" / file).read_text().splitlines()[line - 1])
        assert row["token_ids"] == tracer.data.sample(chunk, position).tokens.tolist()
        assert {p.source for p in pieces} == {row["source"]} == {theirs.origin(chunk, position).source}
        assert [p.text for p in pieces] == [p.text for p in theirs.pieces(chunk, position)]
    with pytest.raises(UserError, match="published rows have no document ids"):
        tracer.find("x")


def test_a_conversion_goes_on_and_is_never_overwritten(prepared, published, tmp_path):
    data = amber(published, prepared)

    def stop(line: str) -> None:
        if line.startswith("convert"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(data, tmp_path / "set", log=stop)
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*.arrayrecord") if p.parent.name == "chunks"}
    convert(data, tmp_path / "set")
    assert done
    assert {p: p.stat().st_mtime_ns for p in done} == done
    with pytest.raises(UserError, match="from another configuration"):
        convert(data, tmp_path / "set", recipe="other")


def test_files_with_other_blocks_are_refused(prepared, published, tmp_path):
    shutil.copytree(published, tmp_path / "p", ignore=shutil.ignore_patterns(".llm360-index"))
    path = tmp_path / "p" / "train" / "train_002.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::-1]))
    with pytest.raises(UserError, match=r"train_002\.jsonl: its blocks of sources are prose: \d+, code: \d+, those of"):
        convert(amber(tmp_path / "p", prepared), tmp_path / "set")
    path.write_text("".join(lines[:-1]) + lines[-1].replace(":", ";", 1))
    with pytest.raises((UserError, RunError), match=r"train_002\.jsonl"):
        convert(amber(tmp_path / "p", prepared), tmp_path / "set2")


def test_lines_are_found_by_the_engine(prepared, published, tmp_path):
    shutil.copytree(published, tmp_path / "p", ignore=shutil.ignore_patterns(".llm360-index"))
    lines: list[str] = []
    convert(amber(tmp_path / "p", prepared), tmp_path / "set", engine=Local(2), log=lines.append)
    assert [line.split(":")[0] for line in lines] == ["lines", "validation", "convert"]
    assert ChunkedData(tmp_path / "set").manifest.chunk_files == DataManifest.load(prepared).chunk_files
    path = tmp_path / "p" / "train" / "train_003.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"train_003\.jsonl has \d+ lines, not \d+ as .*train_000\.jsonl"):
        convert(amber(tmp_path / "p", prepared), tmp_path / "set2")


def test_writing_the_published_form_goes_on_and_leaves_nothing_else(prepared, published, tmp_path):
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_jsonl(prepared, tmp_path, Local(1), stop)
    (tmp_path / "train" / "train_001.jsonl").unlink()
    (tmp_path / "train" / "train_002.jsonl.0.part").write_text("half")
    kept = tmp_path / "train" / "train_003.jsonl"
    before = kept.stat().st_mtime_ns
    to_jsonl(prepared, tmp_path, Local(1), quiet)
    assert kept.stat().st_mtime_ns == before

    def content(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".jsonl", ".part")}

    assert content(tmp_path) == content(published)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.model", "train", "valid"]


def test_mixtures_have_no_jsonl_form(crystal, tmp_path):
    with pytest.raises(UserError, match="prepared as mixtures of phases, which have no published JSONL form"):
        to_jsonl(crystal, tmp_path, Local(1), quiet)


def hdf5(path, rows: np.ndarray) -> None:
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=rows.astype(np.int32), chunks=(1, *rows.shape[1:]), compression="gzip")


def test_crystals_rows_are_converted_with_their_masks(tmp_path):
    rng, length = np.random.default_rng(0), 6
    rows = {}
    for phase, names in ((1, ("A", "B")), (2, ("A",))):
        for name in names:
            for n in range(2):
                made = rng.integers(0, 50, (5, 3, length))
                made[:, 1] = rng.integers(0, 2, (5, length))
                rows[f"phase{phase}/x/{name}/data-{n:05}.h5"] = made
                hdf5(tmp_path / "p" / f"phase{phase}/x/{name}/data-{n:05}.h5", made)
    parts = [(Part("A", 0.3), Part("B", 0.7)), (Part("A", 1.0, start=0.5),)]
    data = PublishedCrystal(tmp_path / "p", parts, [None, 12], length, 50, seed=3)
    manifest = convert(data, tmp_path / "set", samples_per_chunk=4)
    assert [len(p.chunk_files) for p in manifest.phases] == [-(-data.phases[0].samples // 4), 3]
    ours = ChunkedData(tmp_path / "set")
    tracer = Tracer(ours)
    for n, phase in enumerate(ours.phases):
        for slot in range(phase.samples):
            chunk, position = phase.first_chunk + slot // 4, slot % 4
            sample = ours.sample(chunk, position)
            (piece,) = tracer.pieces(chunk, position)
            ids, mask, labels = rows[piece.file][piece.line - 1]
            assert sample.inputs.tolist() == ids.tolist()
            assert sample.weights.tolist() == mask.tolist()
            assert sample.targets.tolist() == labels.tolist()
            assert data.place(n, slot)[1:] == (piece.file, piece.line - 1)
    again = dataclasses.replace(manifest)
    assert again.sha256 == DataManifest.load(tmp_path / "set").sha256


def test_rows_that_only_happen_to_follow_one_another_hold_no_text_together(prepared, tmp_path):
    """Published rows are shuffled: a text is found in a row, and not where one row's end meets another's begin."""
    tokenizer = load(prepared)
    words = "batch stream batch stream batch stream"
    ids = tokenizer.encode(words)
    length = len(ids) - 1
    row = np.stack([ids[:-1], np.ones(length, int), ids[1:]])
    hdf5(tmp_path / "p" / "phase1" / "A" / "data-0.h5", np.stack([row, row, row]))
    data = PublishedCrystal(tmp_path / "p", [(Part("A", 1.0),)], [None], length, tokenizer.vocab_size, seed=3)
    convert(data, tmp_path / "set", samples_per_chunk=3, tokenizer=prepared)
    tracer = Tracer(ChunkedData(tmp_path / "set"))
    assert sorted((c, p) for c, p, _ in tracer.search(words)) == [(0, 0), (0, 1), (0, 2)]
    assert list(tracer.search(words.replace("batch", "stream", 1))) == []
    assert list(tracer.search(f"stream {words}")) == []
    assert list(tracer.search(f"{words} batch")) == []
