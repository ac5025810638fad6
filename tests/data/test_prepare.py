"""The whole way from documents to chunks: against the fact sheet in plain Python, and the same every time."""

import dataclasses
import json
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import compat
from data.chunks import DataManifest, SampleFile
from data.engines import Beam, Local
from data.fim import Fim, rearrange
from data.folder import WORK
from data.index import DocumentIndex
from data.mixture import Part
from data.packing import permutation, validation_windows
from data.pieces import SentencePieces
from data.prepare import PhasePlan, PrepareConfig, prepare
from data.sources import SourceSpec
from data.tokenizer import Tokenizer, load
from errors import RunError, UserError
from tests.data.made_up import prose

ROOT = Path(__file__).resolve().parents[2]


def quiet(line: str) -> None:
    pass


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def plain_windows(texts: list[str], tokenizer: Tokenizer, size: int, overlap: int, bos: bool) -> list[list[int]]:
    """Fact sheet 3.2 (overlap 0) and 3.5 (overlap 1): a buffer that gives off windows."""
    buffer, windows = [], []
    for text in texts:
        if text:
            buffer += [*([1] if bos else []), *tokenizer.encode(text), 2]
        while len(buffer) >= size:
            windows.append(buffer[:size])
            buffer = buffer[size - overlap :]
    return windows


def plain_prepare(sources: dict[str, list[str]], tokenizer: Tokenizer, config: PrepareConfig):
    """Fact sheet 3.2 and 3.3, line by line: return the chunks, and the validation samples of each source."""
    chunks = [[] for _ in range(config.chunks)]
    validation = {}
    for name, texts in sources.items():
        windows = plain_windows(texts, tokenizer, config.sequence_length + 1, 0, False)
        per_chunk = (len(windows) - config.validation_per_source) // config.chunks
        used = windows[: config.validation_per_source + config.chunks * per_chunk]
        drawn = validation_windows(len(used), config.validation_per_source, config.seed, name).tolist()
        validation[name] = [used[i] for i in drawn]
        for k, window in enumerate(w for i, w in enumerate(used) if i not in drawn):
            chunks[k % config.chunks].append(window)
    return [[c[e] for e in permutation(len(c), config.seed, i)] for i, c in enumerate(chunks)], validation


def stored(root: Path, manifest: DataManifest):
    def samples(record):
        sizes = {"sequence_length": manifest.sequence_length, "vocab_size": manifest.vocab_size}
        file = SampleFile(root, record, **sizes)
        return [file.read(i).tokens.tolist() for i in range(record.samples)]

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
            assert source.bytes == sum(len(t.encode()) for t in kept)
            index = DocumentIndex(config.out, source.name)
            numbers = [i for i, t in enumerate(documents, start=1) if t]
            assert [index.id(i) for i in range(len(index))] == [f"{source.name}.jsonl:{n}" for n in numbers]
            ends = [len(tokenizer.encode(t)) + 1 for t in kept]
            assert [int(n) for n in index.offsets[1:] - index.offsets[:-1]] == ends


def plain_mixture(corpora: dict[str, list[str]], bos: set[str], tokenizer: Tokenizer, config: PrepareConfig, manifest):
    """Fact sheet 3.4 to 3.6 in plain Python, from the seeded permutation of slots on: samples of each phase."""
    training, numbers = {}, {}
    for name, texts in corpora.items():
        windows = plain_windows(texts, tokenizer, config.sequence_length + 1, 1, name in bos)
        drawn = set(validation_windows(len(windows), config.validation_per_source, config.seed, name).tolist())
        numbers[name] = [i for i in range(len(windows)) if i not in drawn]
        training[name] = [windows[i] for i in numbers[name]]
    phases = []
    for record, mixture in zip(manifest.phases, manifest.mixtures):
        rows = []  # of each part: (epoch, number of the training window)
        for part in record.parts:
            own = range(len(training[part.reads]))
            if part.half != "all":
                own = [k for k in own if k // config.file_samples % 2 == (part.half == "odd")]
            order = [(e, k) for e in range(part.epochs) for k in own]
            if part.shuffle:  # its order is `packing.Shuffle`'s, which has tests of its own
                mine = next(r for r in mixture.rows if r.part == part)
                order = [order[i] for i in mine._order.at(np.arange(len(order))).tolist()]
            rows.append(order[int(len(order) * part.start) : int(len(order) * part.stop)])
        owners = mixture.at(np.arange(record.samples))[0].tolist()  # likewise `mixture.Interleave`'s
        taken, samples = [0] * len(rows), []
        for i in owners:
            part = record.parts[i]
            epoch, k = rows[i][taken[i] % len(rows[i])]
            taken[i] += 1
            window = training[part.reads][k]
            if part.fim_rate:
                key = ("fim", config.seed, part.reads, epoch, numbers[part.reads][k])
                sample = rearrange(np.array(window), part.fim_rate, key, tokenizer, Fim.of(tokenizer), config.original)
                samples.append([x.tolist() for x in sample])
            else:
                samples.append([window[:-1], window[1:], [1.0] * config.sequence_length])
        phases.append((samples, taken))
    return phases


def test_mixed_phases_are_the_fact_sheets(crystal_config, crystal, corpus):
    manifest, tokenizer = DataManifest.load(crystal), load(crystal)
    corpora = {
        "code": [p.read_text() for p in sorted((corpus / "code").iterdir())],
        "prose": [json.loads(line)["text"] for line in (corpus / "prose.jsonl").read_text().splitlines()],
    }
    expected = plain_mixture(corpora, {"code"}, tokenizer, crystal_config, manifest)
    assert [p.carry for p in manifest.phase_samples] == [True, True]
    rearranged = 0
    for (samples, taken), record in zip(expected, manifest.phases):
        shares = [p.weight / sum(q.weight for q in record.parts) for p in record.parts]
        assert all(abs(n - share * len(samples)) <= 1 for n, share in zip(taken, shares))
        sizes = {"sequence_length": manifest.sequence_length, "vocab_size": manifest.vocab_size}
        found = [
            [x.tolist() for x in SampleFile(crystal, f, **sizes).read(i)]
            for f in record.chunk_files
            for i in range(f.samples)
        ]
        assert found == samples
        rearranged += sum(Fim.of(tokenizer).prefix_id in inputs for inputs, _, _ in found)
    assert rearranged


def test_the_originals_tokens_are_made_on_request(crystal_config, corpus, tmp_path):
    pytest.importorskip("ftfy")
    config = dataclasses.replace(crystal_config, out=tmp_path / "set", original=True)
    manifest = prepare(config, log=quiet)
    assert manifest.compat == "original"
    tokenizer = load(config.out)
    texts = [p.read_text() for p in sorted((corpus / "code").iterdir())]
    kept = [ids for ids in compat.encode(texts, tokenizer) if ids is not None]
    code = manifest.sources[0]
    assert code.tokens == sum(len(ids) + 2 for ids in kept)  # `<s>` and `</s>`
    assert code.documents == len(kept)


@pytest.mark.parametrize("which", ["config", "crystal_config"])
def test_workers_and_shards_do_not_show(which, request, prepared, crystal, tmp_path):
    config = request.getfixturevalue(which)
    reference = contents(prepared if which == "config" else crystal)
    for n, (workers, shard_bytes) in enumerate([(2, 1 << 26), (1, 700), (4, 3000)]):
        again = dataclasses.replace(config, out=tmp_path / str(n), engine=Local(workers), shard_bytes=shard_bytes)
        prepare(again, log=quiet)
        assert contents(again.out) == reference, (workers, shard_bytes)


@pytest.mark.parametrize("which", ["config", "crystal_config"])
def test_beam_gives_the_same_bytes(which, request, prepared, crystal, tmp_path):
    pytest.importorskip("apache_beam", reason="the package apache_beam is not installed (extra: scale)")
    config = request.getfixturevalue(which)
    again = dataclasses.replace(config, out=tmp_path / "set", shard_bytes=3000)
    engine = Beam(("--direct_running_mode=multi_processing", "--direct_num_workers=2"), again.out / WORK)
    prepare(dataclasses.replace(again, engine=engine), log=quiet)
    assert contents(again.out) == contents(prepared if which == "config" else crystal)


@pytest.mark.parametrize("overlap", [0, 1])
def test_tens_of_thousands_of_documents_are_the_fact_sheets(prepared, tmp_path, overlap):
    """Every window of 20,000 random documents, at every place; some fill windows exactly, some spell `</s>`."""
    rng, tokenizer = random.Random(overlap), load(prepared)
    pool = ["", "0" * 15, "0" * 32, "</s>", "<s>a</s>", "é☃", "\n\n\n", "    x", "reader finds what was read"]
    texts = ["".join(rng.choice(pool) for _ in range(rng.randrange(4))) for _ in range(20_000)]
    lines = [json.dumps({"text": t}) + "\n" for t in texts]
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_text("".join(lines[5000 * i : 5000 * (i + 1)]))
    config = PrepareConfig(
        recipe="r",
        out=tmp_path / "set",
        sources=(SourceSpec("s", str(tmp_path / "*.jsonl"), bos=bool(overlap)),),
        sequence_length=16,
        overlap=overlap,
        vocab_size=tokenizer.vocab_size,
        chunks=7,
        validation_per_source=50,
        seed=3,
        tokenizer=tokenizer.path,
        shard_bytes=30_000,
    )
    manifest = prepare(config, log=quiet)
    windows = plain_windows(texts, tokenizer, 17, overlap, bool(overlap))
    assert manifest.sources[0].windows == len(windows) > 10_000
    chunks, validation = stored(config.out, manifest)
    held_out = manifest.held_out[0].tolist()
    assert validation["s"] == [windows[w] for w in held_out]
    for c, chunk in enumerate(chunks):
        _, numbers = manifest.chunk_layout.window_of(c, np.arange(len(chunk)))
        assert chunk == [windows[w] for w in numbers.tolist()]
        assert len(set(numbers.tolist()) | set(held_out)) == len(chunk) + 50


def test_a_limit_on_text_does_not_depend_on_shards(config, tmp_path):
    limited = dataclasses.replace(config, max_bytes_per_source=4000, chunks=2)
    for n, shard_bytes in enumerate([1 << 26, 500, 3000]):
        again = dataclasses.replace(limited, out=tmp_path / str(n), shard_bytes=shard_bytes, engine=Local(1 + n % 2))
        manifest = prepare(again, log=quiet)
        assert contents(again.out) == contents(tmp_path / "0")
    code, prose = manifest.sources
    assert 4000 <= code.bytes < 4000 + 1200  # the last document is whole
    assert 4000 <= prose.bytes < 4000 + 400


@pytest.mark.parametrize("which", ["config", "crystal_config"])
def test_killed_ten_times_gives_the_same_bytes(which, request, prepared, crystal, tmp_path):
    """SIGKILL at random moments, tokenising, writing chunks or between; the command is then given again."""
    config = dataclasses.replace(request.getfixturevalue(which), out=tmp_path / "set", shard_bytes=400)
    reference = contents(prepared if which == "config" else crystal)
    script = (
        "import pickle, sys\n"
        "from data.prepare import prepare\n"
        "print('ready', flush=True)\n"
        "prepare(pickle.load(open(sys.argv[1], 'rb')), log=lambda line: None)\n"
    )
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    (tmp_path / "script.py").write_text(script)
    rng, kills, alive = random.Random(which), 0, 0
    while kills < 10:
        process = subprocess.Popen(
            [sys.executable, tmp_path / "script.py", tmp_path / "config"],
            env={"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        killed = process.wait() != 0
        process.stdout.close()
        kills += killed
        if not killed:  # it was done before: it is begun anew, for the kills that are left
            assert contents(config.out) == reference
            shutil.rmtree(config.out)
            alive += 1
            assert alive < 30
    prepare(config, log=quiet)
    assert contents(config.out) == reference


def test_workers_that_finish_out_of_order_do_not_show(config, tmp_path):
    # Enough text for several batches of very different content in each worker.
    sources = (SourceSpec("code", "embedded:stdlib"), SourceSpec("prose", "embedded:topics"))
    real = dataclasses.replace(config, sources=sources, max_bytes_per_source=1_500_000)
    for workers in (1, 2):
        prepare(dataclasses.replace(real, out=tmp_path / str(workers), engine=Local(workers)), log=quiet)
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
    assert prepare(dataclasses.replace(config, engine=Local(2)), log=lines.append) == DataManifest.load(prepared)
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
def test_an_interrupted_run_goes_on(config, prepared, tmp_path, stop_at):
    def stop(line: str) -> None:
        if line.startswith(stop_at):
            raise KeyboardInterrupt

    again = dataclasses.replace(config, out=tmp_path / "set")
    with pytest.raises(KeyboardInterrupt):
        prepare(again, log=stop)
    with pytest.raises(UserError, match="not found; prepare the data first"):
        DataManifest.load(again.out)
    kept = {p: p.stat().st_mtime_ns for p in again.out.rglob("*.tokens")}
    prepare(again, log=lambda line: kept.update({p: 0 for p in kept if p.exists() and p.stat().st_mtime_ns != kept[p]}))
    assert 0 not in kept.values()  # nothing was tokenised twice
    assert len(kept) == {"training": 0, "source prose": 2, "chunks:": 2}[stop_at]
    assert contents(again.out) == contents(prepared)


def test_a_full_disk_loses_nothing(config, prepared, tmp_path):
    """Files may not grow beyond some size, for a writer the same as a disk that is full there; then they may again."""
    again = dataclasses.replace(config, out=tmp_path / "set")

    def stop(line: str) -> None:
        if line.startswith("source prose"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(again, log=stop)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot be written \(.*; free space"):
            prepare(again, log=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = []
    prepare(again, log=lines.append)
    assert "tokenise: all 2 tasks were done before" in lines
    assert contents(again.out) == contents(prepared)


def test_a_vocabulary_above_65536_is_stored_in_32_bits(config, prepared, tmp_path):
    pieces = SentencePieces((prepared / "tokenizer.model").read_bytes())
    added = {f"<{i}>": i for i in range(pieces.size, 65_600)}
    (tmp_path / "large.model").write_bytes(pieces.with_added(added))
    large = dataclasses.replace(config, out=tmp_path / "set", tokenizer=tmp_path / "large.model", vocab_size=65_600)
    manifest = prepare(large, log=quiet)
    assert (manifest.dtype, DataManifest.load(prepared).dtype) == ("uint32", "uint16")
    assert stored(large.out, manifest) == stored(prepared, DataManifest.load(prepared))


def test_an_unfinished_folder_of_another_configuration_is_refused(config, tmp_path):
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(dataclasses.replace(config, out=tmp_path / "set"), log=stop)
    with pytest.raises(UserError, match="unfinished data set of other sources or another tokenizer; give those to go"):
        prepare(dataclasses.replace(config, out=tmp_path / "set", vocab_size=401), log=quiet)


def test_another_layout_takes_the_tokens_of_an_unfinished_one(config, prepared, tmp_path):
    """A mistake in the number of chunks costs no tokenising, and leaves nothing behind."""

    def stop(line: str) -> None:
        if line.startswith("chunks:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(dataclasses.replace(config, out=tmp_path / "set", chunks=9, seed=8), log=stop)
    assert len(list((tmp_path / "set" / "chunks").iterdir())) == 9
    lines = []
    prepare(dataclasses.replace(config, out=tmp_path / "set"), log=lines.append)
    assert "tokenise: all 2 tasks were done before" in lines
    assert contents(tmp_path / "set") == contents(prepared)


def stopped_at(config: PrepareConfig, line_begins: str) -> None:
    def stop(line: str) -> None:
        if line.startswith(line_begins):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, log=stop)


@pytest.mark.parametrize("removed", [1, 2, 3, 4])
def test_killed_between_two_layouts_loses_nothing(config, prepared, tmp_path, monkeypatch, removed):
    """While what was written of the first is taken away for the second; then the first is asked for again."""
    first = dataclasses.replace(config, out=tmp_path / "set")
    stopped_at(first, "chunks:")
    remove, calls = shutil.rmtree, []

    def killed(folder: Path) -> None:
        remove(folder)
        calls.append(folder)
        if len(calls) == removed:
            raise KeyboardInterrupt

    monkeypatch.setattr("data.prepare.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(dataclasses.replace(first, chunks=3), log=quiet)
    monkeypatch.undo()
    prepare(first, log=quiet)
    assert contents(first.out) == contents(prepared)


def test_a_layout_that_cannot_be_taken_away_is_not_mixed_with_another(config, tmp_path, monkeypatch):
    first = dataclasses.replace(config, out=tmp_path / "set")
    stopped_at(first, "chunks:")

    def denied(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("data.prepare.shutil.rmtree", denied)
    with pytest.raises(RunError, match=r"cannot be written .*Permission denied"):
        prepare(dataclasses.replace(first, seed=8), log=quiet)
    assert not (first.out / "manifest.json").exists()


def test_a_file_lost_after_it_was_written_is_written_again(config, prepared, tmp_path):
    again = dataclasses.replace(config, out=tmp_path / "set")
    stopped_at(again, "chunks:")
    (again.out / "chunks" / "002.arrayrecord").unlink()
    with pytest.raises(RunError, match=r"002\.arrayrecord: missing .*the same command writes it again"):
        prepare(again, log=quiet)
    assert not (again.out / "manifest.json").exists()
    prepare(again, log=quiet)
    assert contents(again.out) == contents(prepared)


def test_what_was_skipped_is_not_taken_for_good(config, prepared, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "0" * 500}) + "\nbad\n")
    spec = SourceSpec("digits", str(tmp_path / "bad.jsonl"))
    skips = dataclasses.replace(
        config, out=tmp_path / "set", sources=(spec,), on_bad="skip", tokenizer=prepared / "tokenizer.model"
    )
    stopped_at(skips, "validation:")
    with pytest.raises(UserError, match=r"bad\.jsonl:2: not JSON .*an earlier call left it out with --on-bad skip"):
        prepare(dataclasses.replace(skips, on_bad="fail"), log=quiet)
    assert prepare(skips, log=quiet).sources[0].bad == 1


def test_a_limit_on_text_ends_where_it_is_reached(config, prepared, tmp_path):
    """Exactly, and what comes after it is not counted, whatever shard it is in."""
    rows = [json.dumps({"text": t}) for t in ("0" * 2000, "1" * 2000, "", "2" * 2000)]
    rows[0] += " " * 87  # 2100 bytes with the newline: the second shard has the second and third row, and no more
    rows[2] += " " * 100
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    limited = dataclasses.replace(
        config, sources=(SourceSpec("a", str(tmp_path / "a.jsonl")),), max_bytes_per_source=4000,
        tokenizer=prepared / "tokenizer.model",
    )  # fmt: skip
    for shard_bytes in (1 << 26, 2100):
        mine = dataclasses.replace(limited, out=tmp_path / str(shard_bytes), shard_bytes=shard_bytes)
        (source,) = prepare(mine, log=quiet).sources
        assert (source.documents, source.bytes, source.empty) == (2, 4000, 0)


def test_a_limit_on_text_reads_no_more_parquet_than_it_needs(config, prepared, tmp_path):
    rows = [prose(i, 40) for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", row_group_size=20)
    limited = dataclasses.replace(
        config, out=tmp_path / "set", sources=(SourceSpec("a", str(tmp_path / "a.parquet")),), chunks=1,
        max_bytes_per_source=10_000, shard_bytes=5000, tokenizer=prepared / "tokenizer.model",
    )  # fmt: skip
    stopped_at(limited, "validation:")
    tokenised = [json.loads(p.read_text())["bytes"] for p in (limited.out / WORK).glob("a-*.json")]
    assert 10_000 <= sum(tokenised) < 30_000 < len("".join(rows))


def test_going_on_does_not_plan_again(config, corpus, tmp_path, monkeypatch):
    """A plan takes a pass over all large files."""
    again = dataclasses.replace(config, out=tmp_path / "set", shard_bytes=3000)
    stopped_at(again, "validation:")
    monkeypatch.setattr("data.sources._blocks", None)  # what reads
    stopped_at(again, "validation:")


def test_sources_that_changed_meanwhile_are_refused(config, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    sources = tuple(
        dataclasses.replace(s, location=s.location.replace(str(corpus), str(tmp_path / "corpus")))
        for s in config.sources
    )
    mine = dataclasses.replace(config, sources=sources, out=tmp_path / "set")

    def stop(line: str) -> None:
        if line.startswith("source"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(mine, log=stop)
    (tmp_path / "corpus" / "code" / "new.py").write_text("x = 1")
    with pytest.raises(RunError, match=r"source code: the files of .* are not those that this data set was begun with"):
        prepare(mine, log=quiet)


def test_progress_is_logged(config, tmp_path):
    lines = []
    prepare(dataclasses.replace(config, out=tmp_path / "set"), log=lines.append)
    assert lines[0] == "training a tokenizer of 400 ids"
    assert lines[1].startswith("tokenise: 2 of 2")
    assert lines[2].startswith("source code: 40 documents, ")
    assert lines[2].endswith(" MB; left out: 0 empty, 0 bad")
    assert lines[4] == "validation: 10 windows held out"
    assert lines[-1].startswith("chunks: 4 of 4")


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
    with pytest.raises(RunError, match=r"cannot be written .*; free space"):
        prepare(dataclasses.replace(config, out=tmp_path / "file" / "set"), log=quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "no sources; give at least one --source NAME=PATH"),
        ({"sources": (SourceSpec("a", "x"), SourceSpec("a", "y"))}, "source a is named twice"),
        ({"chunks": 0}, "chunks = 0: at least 1"),
        ({"sequence_length": 0}, "sequence_length = 0: at least 1"),
        ({"vocab_size": 0}, "vocab_size = 0: at least 1"),
        ({"overlap": -1}, "overlap = -1: at least 0"),
        ({"overlap": 17}, "overlap = 17: windows of 17 tokens must move on"),
        ({"layout": "mixture"}, "the layout 'mixture' with 0 phases"),
        ({"phases": (PhasePlan((Part("code", 1.0),), chunks=1),)}, "the layout 'chunks' with 1 phases"),
        ({"max_bytes_per_source": 0}, "max_bytes_per_source = 0: at least 1"),
        ({"validation_per_source": -1}, "validation_per_source = -1: at least 0"),
        ({"on_bad": "ignore"}, "on_bad = 'ignore': it is one of fail, skip"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(config, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            (Part("code", 1.0), Part("js", 1.0)),
            "part js reads the source 'js', which is not given; .* --source js=PATH",
        ),
        ((Part("code", 1.0),), "source prose: no phase reads it"),
    ],
)
def test_mixtures_of_other_sources_are_refused(crystal_config, parts, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(crystal_config, phases=(PhasePlan(parts, chunks=1),))


def test_phases_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="a phase without a mixture"):
        PhasePlan((), chunks=1)
    with pytest.raises(UserError, match="its number of chunks or its samples_per_chunk, and not both"):
        PhasePlan((Part("code", 1.0),))


def test_a_tokenizer_without_fim_tokens_is_refused(crystal_config, prepared, tmp_path):
    without = dataclasses.replace(crystal_config, out=tmp_path / "set", tokenizer=prepared / "tokenizer.model")
    with pytest.raises(UserError, match="fim_prefix"):
        prepare(without, log=quiet)


def test_workers_need_no_jax():
    code = "import sys, data.prepare; assert not {'jax', 'grain'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
