"""The whole way from documents to chunks: against the fact sheet in plain Python, and the same every time."""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.chunks import DataManifest, SampleFile
from data.index import DocumentIndex
from data.packing import permutation, validation_windows
from data.prepare import PrepareConfig, prepare
from data.sources import SourceSpec
from data.tokenizer import Tokenizer, load
from errors import RunError, UserError


def quiet(line: str) -> None:
    pass


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def plain_prepare(sources: dict[str, list[str]], tokenizer: Tokenizer, config: PrepareConfig):
    """Fact sheet 3.2 and 3.3, line by line: return the chunks, and the validation samples of each source."""
    size = config.sequence_length + 1
    chunks = [[] for _ in range(config.chunks)]
    validation = {}
    for name, texts in sources.items():
        buffer, windows = [], []
        for text in texts:
            if text:
                buffer += [*tokenizer.encode(text), 2]
            while len(buffer) >= size:
                windows.append(buffer[:size])
                buffer = buffer[size:]
        per_chunk = (len(windows) - config.validation_per_source) // config.chunks
        used = windows[: config.validation_per_source + config.chunks * per_chunk]
        drawn = validation_windows(len(used), config.validation_per_source, config.seed, name).tolist()
        validation[name] = [used[i] for i in drawn]
        for k, window in enumerate(w for i, w in enumerate(used) if i not in drawn):
            chunks[k % config.chunks].append(window)
    return [[c[e] for e in permutation(len(c), config.seed, i)] for i, c in enumerate(chunks)], validation


def stored(root: Path, manifest: DataManifest):
    def samples(record):
        file = SampleFile(root, record, tokens=manifest.sequence_length + 1, vocab_size=manifest.vocab_size)
        return [file.read(i).tolist() for i in range(record.samples)]

    return [samples(f) for f in manifest.chunk_files], {s.name: samples(s.validation_file) for s in manifest.sources}


# A word start and n digits are n+1 ids, and one more ends the document: 15 digits fill one window of 17 exactly.
texts = st.one_of(
    st.text("0", max_size=40),
    st.sampled_from(["", "</s>", "<s>x</s></s>", "0" * 15, "0" * 32, "\n\n    return x", "word " * 3000]),
    st.text(max_size=30),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(texts, max_size=12), min_size=1, max_size=3), st.integers(0, 3), st.integers(1, 4))
@example([["0" * 15] * 7, ["0" * 15] * 6], 2, 4)  # nothing over: the second source has just enough
def test_prepared_data_is_the_fact_sheets(prepared, corpora, validation, chunks):
    tokenizer = load(prepared)
    enough = [] if len(corpora) == 2 and corpora[1] == ["0" * 15] * 6 else ["0" * 17 * (validation + chunks)]
    corpora = {f"s{i}": [*documents, *enough] for i, documents in enumerate(corpora)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, documents in corpora.items():
            lines = "".join(json.dumps({"text": t}) + "\n" for t in documents)
            (root / f"{name}.jsonl").write_text(lines)
        config = PrepareConfig(
            recipe="r",
            out=root / "out",
            sources=tuple(SourceSpec(name, str(root / f"{name}.jsonl")) for name in corpora),
            sequence_length=16,
            vocab_size=tokenizer.vocab_size,
            chunks=chunks,
            validation_per_source=validation,
            seed=3,
            tokenizer=tokenizer.path,
        )
        manifest = prepare(config, log=quiet)
        assert stored(config.out, manifest) == plain_prepare(corpora, tokenizer, config)
        for source, documents in zip(manifest.sources, corpora.values()):
            kept = [t for t in documents if t]
            assert (source.documents, source.empty) == (len(kept), len(documents) - len(kept))
            assert source.tokens == 17 * source.windows + source.tail_tokens
            assert source.windows == source.validation + chunks * source.per_chunk + source.unused
            index = DocumentIndex(config.out, source.name)
            numbers = [i for i, t in enumerate(documents, start=1) if t]
            assert [index.id(i) for i in range(len(index))] == [f"{source.name}.jsonl:{n}" for n in numbers]
            ends = [len(tokenizer.encode(t)) + 1 for t in kept]
            assert [int(n) for n in index.offsets[1:] - index.offsets[:-1]] == ends


def test_another_run_with_more_workers_gives_the_same_bytes(config, prepared, tmp_path):
    again = dataclasses.replace(config, out=tmp_path / "set", workers=2)
    assert prepare(again, log=quiet).sha256 == DataManifest.load(prepared).sha256
    assert contents(again.out) == contents(prepared)


def test_workers_that_finish_out_of_order_do_not_show(config, tmp_path):
    # Enough text for several batches of very different content in each worker.
    sources = (SourceSpec("code", "embedded:stdlib"), SourceSpec("prose", "embedded:topics"))
    real = dataclasses.replace(config, sources=sources, max_bytes_per_source=1_500_000)
    for workers in (1, 2):
        prepare(dataclasses.replace(real, out=tmp_path / str(workers), workers=workers), log=quiet)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_manifest_says_what_was_read(prepared, corpus):
    manifest = DataManifest.load(prepared)
    code, prose = manifest.sources
    assert (code.documents, code.empty, code.bad, code.location) == (40, 0, 0, str(corpus / "code"))
    assert code.bytes == sum(p.stat().st_size for p in (corpus / "code").iterdir())
    assert prose.documents + prose.empty == 200
    assert str(prepared) not in (prepared / "manifest.json").read_text()
    for file in manifest.files:
        file.check_content(prepared)
    assert load(prepared / manifest.tokenizer.file).sha256 == manifest.tokenizer.sha256


def test_only_the_data_set_is_left(prepared):
    assert sorted(p.name for p in prepared.iterdir()) == [
        "chunks",
        "index",
        "manifest.json",
        "tokenizer.model",
        "validation",
    ]


def test_complete_data_is_returned_as_it_is(config, prepared):
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    lines = []
    assert prepare(dataclasses.replace(config, workers=2), log=lines.append) == DataManifest.load(prepared)
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*")} == before
    assert lines == [f"{prepared}: already prepared from this configuration, nothing to do"]


def test_complete_data_that_has_lost_a_file_is_reported(config, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    (tmp_path / "set" / "chunks" / "003.arrayrecord").unlink()
    with pytest.raises(RunError, match=r"003\.arrayrecord: missing .*; restore it or prepare the data again"):
        prepare(dataclasses.replace(config, out=tmp_path / "set"), log=quiet)


def test_complete_data_is_never_overwritten(config, prepared):
    for change in ({"seed": 8}, {"recipe": "other"}, {"sources": config.sources[::-1]}, {"on_bad": "skip"}):
        with pytest.raises(
            UserError, match="from another configuration; it is never overwritten: choose another --out"
        ):
            prepare(dataclasses.replace(config, **change), log=quiet)


def test_a_folder_of_somebody_else_is_not_touched(config, tmp_path):
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "mine").touch()
    with pytest.raises(UserError, match="exists and was not begun by prepare; choose another --out or an empty folder"):
        prepare(dataclasses.replace(config, out=tmp_path), log=quiet)
    assert (tmp_path / "chunks" / "mine").exists()


@pytest.mark.parametrize("stop_at", ["training", "source prose", "chunks:"])
def test_an_interrupted_run_is_done_again(config, prepared, tmp_path, stop_at):
    def stop(line: str) -> None:
        if line.startswith(stop_at):
            raise KeyboardInterrupt

    again = dataclasses.replace(config, out=tmp_path / "set")
    with pytest.raises(KeyboardInterrupt):
        prepare(again, log=stop)
    with pytest.raises(UserError, match="not found; prepare the data first"):
        DataManifest.load(again.out)
    prepare(again, log=quiet)
    assert contents(again.out) == contents(prepared)


def test_progress_is_logged(config, tmp_path):
    lines = []
    prepare(dataclasses.replace(config, out=tmp_path / "set"), log=lines.append)
    assert lines[0] == "training a tokenizer of 400 pieces"
    assert lines[1].startswith("source code: 40 documents, ")
    assert lines[1].endswith("MB/s); left out: 0 empty, 0 bad")
    assert lines[3] == "validation: 10 windows held out"
    assert lines[4].startswith("chunks: 4 of ")


def test_bad_records_are_refused_or_counted(config, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "0" * 500}) + "\nbad\n")
    spec = SourceSpec("digits", str(tmp_path / "bad.jsonl"))
    bad = dataclasses.replace(config, out=tmp_path / "set", sources=(*config.sources, spec))
    with pytest.raises(UserError, match=r"source digits: bad\.jsonl:2: not JSON .* --on-bad skip"):
        prepare(bad, log=quiet)
    lines = []
    source = prepare(dataclasses.replace(bad, on_bad="skip"), log=lines.append).sources[2]
    assert (source.documents, source.bad) == (1, 1)
    assert source.bad_named[0].startswith("bad.jsonl:2: not JSON")
    assert "left out: 0 empty, 1 bad\n  bad: bad.jsonl:2: not JSON" in "\n".join(lines)


def test_a_tokenizer_of_another_size_is_refused(config, prepared, tmp_path):
    other = dataclasses.replace(config, out=tmp_path, vocab_size=32000, tokenizer=prepared / "tokenizer.model")
    with pytest.raises(UserError, match=r"has 400 ids, and the model a vocabulary of 32000; .*--model.vocab-size 400"):
        prepare(other, log=quiet)


def test_a_source_too_small_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"source code: .* tokens found, .* needed"):
        prepare(dataclasses.replace(config, out=tmp_path, chunks=100_000), log=quiet)


def test_a_folder_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be written .*; free space or choose another --out"):
        prepare(dataclasses.replace(config, out=tmp_path / "file" / "set"), log=quiet)


def test_a_lost_worker_is_reported(config, tmp_path):
    # Stands for a worker that the kernel kills for its memory.
    script = (
        "import os, data.prepare as p\n"
        "def die(task): os._exit(9)\n"
        "if __name__ == '__main__':\n"
        "    with p._pool(2) as pool: list(p._ordered(die, iter([(0, 0)]), pool, 2))\n"
    )
    (tmp_path / "die.py").write_text(script)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, tmp_path / "die.py"], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60
    )
    assert "RunError: a worker process was lost (out of memory?); run again with fewer --workers" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "no sources; give at least one --source NAME=PATH"),
        ({"sources": (SourceSpec("a", "x"), SourceSpec("a", "y"))}, "source a is named twice"),
        ({"chunks": 0}, "chunks = 0: at least 1"),
        ({"sequence_length": 0}, "sequence_length = 0: at least 1"),
        ({"vocab_size": 0}, "vocab_size = 0: at least 1"),
        ({"workers": 0}, "workers = 0: at least 1"),
        ({"max_bytes_per_source": 0}, "max_bytes_per_source = 0: at least 1"),
        ({"validation_per_source": -1}, "validation_per_source = -1: at least 0"),
        ({"on_bad": "ignore"}, "on_bad = 'ignore': it is one of fail, skip"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(config, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change)


def test_workers_need_no_jax():
    code = "import sys, data.prepare; assert not {'jax', 'grain'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
