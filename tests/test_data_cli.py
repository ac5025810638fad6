"""Data on the command line: phases, checks, conversions, traces and mixing experiments, as a user meets them."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from checkpoint.series import Series
from data.dataset import ChunkedData
from training import loop
from training.metrics import read_lines
from training.mixtures import table

from .test_cli import SMALL, call

MODEL = [
    "--model.vocab-size=320", "--model.num-layers=1", "--model.embed=32", "--model.num-heads=2", "--model.head-dim=16",
    "--model.mlp=32", "--data.sequence-length=32", "--data.global-batch=8", "--data.validation-per-source=4",
]  # fmt: skip
CRYSTAL = [
    *MODEL, "--model.rotary-dims=4", "--data.file-samples=5", *(f"--phases.{n}.chunks=1" for n in range(3)),
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "(", ")", "def", "return", "\n", "0", "1"]
    for name in ("prose", "docs", "code"):
        (folder / name).mkdir()
        for n in range(20):
            (folder / name / f"{n}.txt").write_text(f"{name} " + " ".join(rng.choice(words, size=60)))
    return folder


@pytest.fixture(scope="module")
def amber(work):
    """Prepared data of two sources, and a run on it."""
    import run

    sources = ["--source", f"words={work / 'prose'}", "--source", f"code={work / 'code'}"]
    small = [*SMALL, "--mesh=data=4,fsdp=2"]
    assert run.main([str(w) for w in ["prepare", "amber_tiny", "--out", work / "a", *sources, *SMALL]]) == 0
    train = ["train", "amber_tiny", "--data", work / "a", "--run", work / "ra", *small]
    assert run.main([str(w) for w in train]) == 0
    return work


def test_a_dry_run_of_amber_needs_no_data(capsys):
    code, out, _ = call(capsys, "prepare", "amber_7b", "--dry-run")
    assert code == 0
    for figure in ("1,706,976 samples", "762 steps", "96 samples left", "1,259,133,776,640 tokens on disk"):
        assert figure in out
    code, out, _ = call(capsys, "prepare", "crystal_7b", "--dry-run", "--json")
    assert json.loads(out)["tokens_trained"] == 1_392_061_710_336
    code, _, err = call(capsys, "prepare", "amber_tiny", "--dry-run")
    assert code == 2
    assert "depend on its sources" in err


def test_a_dry_run_counts_files(work, capsys):
    _, out, _ = call(capsys, "prepare", "amber_tiny", "--dry-run", "--source", f"a={work / 'prose'}", "--json")
    assert json.loads(out)["files"]["a"]["files"] == 20


def test_crystal_is_prepared_and_trained_in_phases(work, capsys):
    """Three phases with FIM, from text to checkpoints; stopped inside a phase and continued."""
    sources = [word for name in ("prose", "docs", "code") for word in ("--source", f"{name}={work / name}")]
    code, out, _ = call(capsys, "prepare", "crystal_tiny", "--out", work / "c", *sources, *CRYSTAL, "--json")
    assert code == 0
    prepared = json.loads(out)
    assert prepared["chunks"] == 3
    steps = [n // 8 for n in prepared["samples"]]
    mesh = ["--mesh=data=4,fsdp=2"]
    train = ["train", "crystal_tiny", "--data", work / "c", "--run", work / "rc", *CRYSTAL, *mesh]
    assert sum(steps) < 60
    assert call(capsys, *train, "--steps", steps[0] + 2)[0] == 0
    code, out, _ = call(capsys, *train, "--json")
    assert code == 0
    assert json.loads(out)["step"] == sum(steps)
    phases = {e.manifest.phase for e in Series(work / "rc").entries()}
    assert phases == {0, 1, 2}

    # Every row of a step in the last phase can be named, with its part, epoch and documents.
    code, out, _ = call(capsys, "trace", work / "rc", "--step", sum(steps) - 1, "--json")
    assert code == 0
    samples = json.loads(out)["samples"]
    assert len(samples) == 8
    assert {s["part"] for s in samples} <= {p.name for p in ChunkedData(work / "c").manifest.phases[2].parts}
    assert all(s["documents"] and s["checkpoints"] == 1 for s in samples)


def test_traces_lead_from_a_step_to_documents_and_back(amber, capsys):
    code, out, _ = call(capsys, "trace", amber / "ra", "--step", 3, "--row", 5, "--json")
    assert code == 0
    (sample,) = json.loads(out)["samples"]
    assert (sample["step"], sample["row"], sample["first_checkpoint"]) == (3, 5, "000")
    documents = [d["document"] for d in sample["documents"]]
    code, out, _ = call(capsys, "trace", amber / "ra", "--document", documents[0], "--json")
    (found,) = json.loads(out)["documents"]
    assert found["document"] == documents[0]
    assert (3, 5) in [(w.get("step"), w.get("row")) for w in found["windows"]]
    source, _, file = documents[0].partition("/")
    folder = {"words": "prose", "code": "code"}[source]
    assert found["text"] in (None, (amber / folder / file).read_text())

    text = " ".join((amber / folder / file).read_text().split(" ")[20:30])
    code, out, _ = call(capsys, "trace", amber / "ra", "--text", text, "--json")
    assert code == 0
    hits = json.loads(out)["samples"]
    assert all(d["document"] == documents[0] for h in hits for d in h["documents"])
    # What a person reads names the same things.
    code, out, _ = call(capsys, "trace", amber / "ra", "--step", 3, "--row", 5)
    assert out.startswith("step 3 row 5  chunk 0 position ")
    assert documents[0] in out
    code, out, _ = call(capsys, "trace", amber / "ra", "--document", documents[0])
    assert "step 3 row 5" in out
    code, out, _ = call(capsys, "trace", amber / "a", "--chunk", 0, "--position", 1)
    assert code == 0
    assert "chunk 0 position 1" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "ask one thing"),
        (["--step", 1, "--text", "a b c"], "ask one thing"),
        (["--chunk", 1], "ask one thing"),
        (["--step", 10**6], r"--step 1000000: the run has steps 0 to"),
        (["--step", 1, "--row", 8], "--row 8: a batch has rows 0 to 7"),
        (["--chunk", 9, "--position", 0], "--chunk 9: the data has chunks 0 to 1"),
        (["--chunk", 0, "--position", 10**6], "--position 1000000: chunk 0 has positions 0 to"),
        (["--document", "nothing"], "no document 'nothing'; ids look like 'words/0.txt'"),
        (["--text", "two words"], "give at least three words"),
    ],
)
def test_questions_that_make_no_sense_are_refused(amber, capsys, words, message):
    code, _, err = call(capsys, "trace", amber / "ra", *words)
    assert code == 2
    assert message in err


def test_traces_need_the_runs_own_data(amber, work, capsys, tmp_path):
    sources = ["--source", f"words={work / 'prose'}"]
    assert call(capsys, "prepare", "amber_tiny", "--out", tmp_path / "b", *sources, *SMALL)[0] == 0
    code, _, err = call(capsys, "trace", amber / "ra", "--step", 0, "--data", tmp_path / "b")
    assert code == 2
    assert "is not the data that" in err
    code, _, err = call(capsys, "trace", tmp_path / "b", "--step", 0)
    assert "a data directory has no steps; give --global-batch" in err
    assert call(capsys, "trace", tmp_path / "b", "--step", 0, "--global-batch", 4)[0] == 0
    code, _, err = call(capsys, "trace", tmp_path, "--step", 0)
    assert code == 2
    assert "not a run that was trained here" in err


def test_checks_convert_and_train_on_published_files(amber, capsys, tmp_path):
    code, out, _ = call(
        capsys, "prepare", "amber_tiny", "--out", amber / "a", "--check", "--json", "--workers", 1, *SMALL
    )
    assert code == 0
    assert json.loads(out)["problems"] == []
    sources = ["--source", f"words={amber / 'prose'}", "--source", f"code={amber / 'code'}", "--workers", 1]
    code, out, _ = call(
        capsys, "prepare", "amber_tiny", "--out", amber / "a", *sources, "--to", "jsonl", "--json", *SMALL
    )
    assert code == 0
    published = json.loads(out)["published"]
    convert = ["prepare", "amber_tiny", "--from-published", published, "--out", tmp_path / "b", "--workers", 1, *SMALL]
    assert call(capsys, *convert)[0] == 0
    assert ChunkedData(tmp_path / "b").manifest.chunk_files == ChunkedData(amber / "a").manifest.chunk_files
    # The same losses from the published files as they are: their order is the same.
    train = ["train", "amber_tiny", "--run", tmp_path / "r", "--data", published, "--steps", 3, "--mesh=data=4,fsdp=2"]
    code, _, err = call(capsys, *train, *SMALL)
    assert code == 0, err
    losses = [
        [r["loss"] for r in read_lines(run / "metrics.jsonl") if r["kind"] == "train"][:3]
        for run in (tmp_path / "r", amber / "ra")
    ]
    assert losses[0] == losses[1]
    code, out, _ = call(capsys, "trace", tmp_path / "r", "--step", 1, "--row", 2, "--json")
    assert code == 0
    (mine,) = json.loads(out)["samples"]
    code, out, _ = call(capsys, "trace", amber / "ra", "--step", 1, "--row", 2, "--json")
    (theirs,) = json.loads(out)["samples"]
    assert [d["text"] for d in mine["documents"]] == [d["text"] for d in theirs["documents"]]
    document = mine["documents"][0]
    line = (Path(published) / "train" / document["file"]).read_text().splitlines()[document["line"] - 1]
    assert json.loads(line)["source"] == theirs["source"]
    code, _, err = call(capsys, "trace", tmp_path / "r", "--document", "x")
    assert code == 2
    assert "published files can be asked only for steps" in err
    path = amber / "a" / "chunks" / "001.arrayrecord"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + b"x" + content[-8:])
    code, _, err = call(capsys, "prepare", "amber_tiny", "--out", amber / "a", "--check", "--workers", 1, *SMALL)
    path.write_bytes(content)
    assert code == 1
    assert "001.arrayrecord: SHA-256 differs from the manifest" in err


def test_mixtures_are_trained_compared_and_traced(amber, capsys, tmp_path):
    words = ["mixtures", "amber_tiny", "--data", amber / "a", "--run", tmp_path / "m", "--mesh=data=4,fsdp=2", *SMALL]
    both = ["--mixture", "words=0.9,code=0.1", "--mixture", "words=0.1,code=0.9"]
    code, out, _ = call(capsys, *words, *both, "--json")
    assert code == 0
    rows = json.loads(out)["runs"]
    for row, share in zip(rows, (0.9, 0.1)):
        samples = ChunkedData(amber / "a").phases[0].samples
        assert abs(row["shares"]["words"] - share) <= 1 / samples
        assert set(row["losses"]) == {"words", "code"}
    runs = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert runs == ["words_0.1_code_0.9", "words_0.9_code_0.1"]
    first = [json.loads((tmp_path / "m" / r / "metrics.jsonl").read_text().splitlines()[0]) for r in runs]
    assert first[0]["loss"] == first[1]["loss"]  # the same first weights, measured on the same validation samples
    # A step of a mixture leads to its documents, and those back to every step that reads them.
    code, out, _ = call(capsys, "trace", rows[0]["run"], "--step", 2, "--json")
    assert code == 0
    samples = json.loads(out)["samples"]
    assert [s["row"] for s in samples] == list(range(8))
    for sample in samples[:3]:
        code, out, _ = call(capsys, "trace", rows[0]["run"], "--document", sample["documents"][0]["document"], "--json")
        windows = json.loads(out)["documents"][0]["windows"]
        assert (2, sample["row"]) in [(w.get("step"), w.get("row")) for w in windows]

    lines = table(rows)  # in which each source's lowest loss is starred
    assert lines[0].split() == ["mixture", "steps", "all", "words", "code"]
    for line, row in zip(lines[1:], rows):
        starred = {n: row["losses"][n] == min(r["losses"][n] for r in rows) for n in ("words", "code")}
        cells = [f"{row['losses'][n]:.4f}{'*' * starred[n]}" for n in ("words", "code")]
        assert line.split() == [row["mixture"], str(row["steps"]), f"{row['loss']:.4f}", *cells]
    for wrong, message in (
        (both[:2], "at least twice"),
        (["--mixture", "words=1", "--mixture", "css=1"], "source 'css' is not there"),
    ):
        code, _, err = call(capsys, *words, *wrong)
        assert code == 2
        assert message in err


def test_mixtures_stopped_by_a_signal_go_on(amber, capsys, tmp_path, monkeypatch):
    """The signal arrives in the first run: exit code 75, and a checkpoint from which the same command goes on."""
    words = ["mixtures", "amber_tiny", "--data", amber / "a", "--run", tmp_path / "m", "--mesh=data=4,fsdp=2", *SMALL]
    words += ["--mixture", "words=1", "--mixture", "code=1", "--json"]
    write = loop.MetricsWriter.write

    def write_and_signal(self, kind, step, values):
        write(self, kind, step, values)
        if kind == "train" and step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.MetricsWriter, "write", write_and_signal)
    code, out, err = call(capsys, *words)
    assert code == 75
    assert json.loads(out) == {"data": str(amber / "a"), "runs": [], "finished": False}
    assert "words_1: stopped by a signal after" in err
    assert "the same command continues" in err
    assert 2 <= Series(tmp_path / "m" / "words_1").newest().manifest.step <= 3
    assert not (tmp_path / "m" / "code_1").exists()


def test_mixtures_need_something_to_compare_by(work, capsys, tmp_path):
    small = [*SMALL, "--data.validation-per-source=0"]
    assert (
        call(capsys, "prepare", "amber_tiny", "--out", tmp_path / "d", "--source", f"a={work / 'prose'}", *small)[0]
        == 0
    )
    words = ["mixtures", "amber_tiny", "--data", tmp_path / "d", "--run", tmp_path / "m", *small]
    code, _, err = call(capsys, *words, "--mixture", "a=1", "--mixture", "a=2")
    assert code == 2
    assert "has no validation samples to compare mixtures by" in err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text-field", "b=x"], "--text-field b=x: write NAME=VALUE, NAME one of the sources: a"),
        (["--label", "a"], "--label a: write NAME=VALUE"),
        (["--source", "a=y"], "a --source name was given twice"),
        (["--shard-mb", 0], "--shard-mb 0.0: must be a positive number"),
        (["--runner", "FlinkRunner"], "--runner does nothing with --engine local"),
        (["--engine", "beam", "--workers", 4], "--workers does nothing with --engine beam"),
        (["--check"], "--source does nothing with --check"),
        (["--from-published", "x"], "--source does nothing with --from-published"),
        (["--dry-run", "--on-bad", "skip"], "--on-bad does nothing with --dry-run"),
        (["--engine", "beam", "--runner", "NoSuchRunner"], "Beam"),
    ],
)
def test_wrong_flags_are_refused(work, capsys, tmp_path, words, message):
    pytest.importorskip("apache_beam") if "NoSuchRunner" in words else None
    code, _, err = call(
        capsys, "prepare", "amber_tiny", "--out", tmp_path / "x", "--source", f"a={work / 'prose'}", *words, *SMALL
    )
    assert code == 2
    assert message in err
