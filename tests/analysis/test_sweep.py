"""The sweep: every checkpoint once, whatever happens in between; nothing is compiled twice; damage is named."""

import dataclasses
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest

from analysis import results
from analysis.results import Scored
from analysis.subject import Target
from analysis.sweep import sweep
from errors import RunError, UserError
from tests.training.test_loop import FAMILIES, train

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ["init", "000", "001", "002"]


@dataclasses.dataclass(frozen=True, eq=False)
class Surprise:
    """A study: how likely a few fixed rows are."""

    rows: int = 5
    before: Callable[[str], None] = lambda name: None
    kind: str = "surprise"
    needs_weights: bool = True

    def settings(self):
        return {"rows": self.rows}

    def score(self, subject):
        self.before(subject.entry.manifest.name)
        rows = np.random.default_rng(0).integers(0, 64, (self.rows, 20))
        found = subject.score(rows)
        table = pa.table({"row": range(self.rows), "logprob": [float(f.logprobs.sum()) for f in found]})
        return Scored({"logprob": float(np.mean([f.logprobs.mean() for f in found]))}, {"rows": table})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep") / "run"


@pytest.fixture
def run(tiny, trained, tmp_path):
    """A copy of a run of three chunks."""
    if not trained.exists():
        train(tiny, trained)
    return shutil.copytree(trained, tmp_path / "run")


def target(run, selector="all", **where):
    return Target(f"{run}@{selector}", FAMILIES, lambda path, config: None, **where)


def values(run, kind="surprise"):
    return {r.checkpoint["name"]: r.summary["logprob"] for r in results.of_kind(run, kind)}


def test_every_checkpoint_is_scored_once_and_compiled_for_once(run):
    compiled: list[str] = []
    seen: list[tuple[str, int]] = []
    study = Surprise(before=lambda name: seen.append((name, len(compiled))))
    listen = lambda event, duration_secs, **more: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        lines: list[str] = []
        outcome = sweep(target(run), [study], lines.append)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [name for name, _ in seen] == NAMES
    assert len(compiled) > seen[0][1]  # the first checkpoint needed its program …
    assert len({count for _, count in seen[1:]}) == 1  # … and the others did not
    assert len(compiled) == seen[1][1]
    assert outcome.code == 0
    assert [p.stem for p in outcome.made] == NAMES
    assert lines[0].startswith("init: 1 of 4, ")
    assert " left" in lines[0]
    assert list(values(run)) == NAMES
    assert len(set(values(run).values())) == 4
    result = results.of_kind(run, "surprise")[1]
    assert result.checkpoint["step"] == 4
    assert result.checkpoint["digest"] == target(run).series.resolve("0")[0].manifest.digests["params"]
    assert result.measured["mesh"] == "data=1"
    assert result.measured["versions"]["jax"] == jax.__version__
    table = result.table("rows")
    assert table.num_rows == 5
    assert np.isclose(np.sum(table["logprob"].to_numpy()) / (5 * 19), result.summary["logprob"], rtol=1e-5)


def test_what_is_there_is_kept_and_gaps_are_filled(run):
    sweep(target(run, "1"), [Surprise()], print)
    seen: list[str] = []
    outcome = sweep(target(run), [Surprise(before=seen.append)], print)
    assert seen == ["init", "000", "002"]
    assert [p.stem for p in outcome.kept] == ["001"]
    assert [r["checkpoint"]["name"] for r in outcome.to_json()["results"]] == NAMES
    assert sweep(target(run), [Surprise(before=seen.append)], print).made == []
    # A checkpoint with other weights is scored again.
    file = run / "results/surprise/001.json"
    digest = target(run).series.resolve("1")[0].manifest.digests["params"]
    file.write_text(file.read_text().replace(digest, "0" * len(digest)))
    assert [p.stem for p in sweep(target(run), [Surprise()], print).made] == ["001"]


def test_a_mesh_changes_no_more_than_rounding(run):
    sweep(target(run), [Surprise()], print)
    sweep(target(run, mesh="data=2,fsdp=2,tensor=2"), [Surprise()], print, name="mesh")
    one, other = values(run), values(run, "surprise-mesh")
    assert list(one) == list(other)
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)


def test_other_settings_do_not_mix(run):
    sweep(target(run, "latest"), [Surprise()], print)
    for selector in ("all", "0"):  # also where no checkpoint has both
        with pytest.raises(UserError, match=r"002.json: was made with other settings \(rows\); give --name"):
            sweep(target(run, selector), [Surprise(rows=3)], print)
    assert values(run).keys() == {"002"}
    sweep(target(run, "latest"), [Surprise(rows=3)], print, name="few")
    assert results.kinds(run) == ["surprise", "surprise-few"]
    sweep(target(run, "latest"), [Surprise(rows=3)], print, overwrite=True)
    assert results.of_kind(run, "surprise")[0].settings == {"rows": 3}
    with pytest.raises(UserError, match="--name 'a/b': letters"):
        sweep(target(run), [Surprise()], print, name="a/b")


@pytest.mark.parametrize("damage", ["weights", "manifest", "gone"])
def test_damage_in_the_middle_is_named_and_the_rest_goes_on(run, damage):
    folder = run / "series/001"
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "manifest":
        (folder / "manifest.json").write_bytes(b"{")
    else:
        file = max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    lines: list[str] = []
    outcome = sweep(target(run), [Surprise()], lines.append)
    expected = {"weights": "SHA-256 differs", "manifest": "manifest.json", "gone": "is gone from the series"}[damage]
    assert outcome.failed.keys() == {"001"}
    assert expected in outcome.failed["001"]
    assert any(line.startswith("001: left out: ") and expected in line for line in lines)
    assert outcome.code == 1
    assert list(values(run)) == ["init", "000", "002"]
    # Outside of what was asked for, it does not matter.
    assert sweep(target(run, "2:"), [Surprise()], print).code == 0


def test_a_study_that_fails_leaves_its_checkpoint_out(run):
    def refuse(name):
        if name == "001":
            raise RunError("nothing can be said of it")

    outcome = sweep(target(run), [Surprise(before=refuse), Surprise(kind="other")], print)
    assert outcome.failed == {"001": "surprise: nothing can be said of it"}
    assert list(values(run)) == ["init", "000", "002"]
    assert list(values(run, "other")) == NAMES


KILLED = """
    import os, signal, sys
    from tests.analysis.test_sweep import Surprise, sweep, target
    def scored(name):
        print(name, flush=True)
        if name == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
    sweep(target(sys.argv[1]), [Surprise(before=scored)], lambda line: None)
"""


def test_a_killed_sweep_goes_on_without_repeats(run):
    sweep(target(run), [Surprise()], print)
    whole = values(run)
    shutil.rmtree(run / "results")
    command = [sys.executable, "-c", "import tests.conftest\n" + textwrap.dedent(KILLED), str(run)]
    seen = []
    for at in ("001", "002", "never"):
        done = subprocess.run([*command, at], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert done.returncode == (-signal.SIGKILL if at != "never" else 0)
        seen.append(done.stdout.split())
    assert seen == [["init", "000", "001"], ["001", "002"], ["002"]]
    assert values(run) == whole


def test_results_that_are_none_are_named(run):
    sweep(target(run, "latest"), [Surprise()], print)
    file = run / "results/surprise/002.json"
    text = file.read_text()
    file.write_text(text[:50])
    with pytest.raises(RunError, match=r"002.json: not a result of a study"):
        sweep(target(run, "latest"), [Surprise()], print)
    file.write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(RunError, match=r"written by a newer version \(99\)"):
        results.read(file)
    file.write_text(text)
    results.table_path(file, "rows").unlink()
    with pytest.raises(RunError, match=r"002.rows.parquet: cannot be read .* run the study again"):
        results.read(file).table("rows")
    assert [p.stem for p in sweep(target(run, "latest"), [Surprise()], print).made] == ["002"]
    assert results.read(file).table("rows").num_rows == 5


def test_a_table_for_people():
    def result(kind, name, step, summary):
        checkpoint = {"name": name, "index": 0, "step": step, "tokens": 0, "digest": ""}
        return results.Result(kind, checkpoint, {}, summary, {}, (), Path())

    accuracy = {"value": 0.25, "stderr": 0.0125, "n": 4}
    found = [
        result("ppl", "001", 20, {"loss": 2.5, "acc": accuracy, "by": {"a": 1, "b": {"c": {"value": 2}}}}),
        result("ppl", "init", 0, {"loss": 12, "list": [1, 2], "note": "x", "ok": True}),
        result("norms", "init", 0, {"norm": 1}),
    ]
    assert results.lines(found) == [
        "norms  norm",
        " init     1",
        " ppl  loss           acc  by.a",
        "init    12             -     -",
        " 001   2.5  0.25 ± 0.013     1",
    ]
