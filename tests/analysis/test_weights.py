"""Norms, updates and cosines of every tensor against numbers computed here from the whole arrays."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from analysis import results, weights
from analysis.subject import Subject, Target
from analysis.sweep import sweep
from analysis.weights import Sums, Weights, group_of, measure
from checkpoint.manifest import Manifest
from checkpoint.series import Series
from checkpoint.writer import SeriesWriter
from errors import RunError, UserError
from tests.checkpoint.tiny_run import manifest, mesh, place, save, state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A series of three checkpoints, and a model config beside it."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    with SeriesWriter(folder) as writer:
        for index in (-1, 0, 1):
            save(writer, "series", index)
    (folder / "config.json").write_text(json.dumps({"model": _model()}))
    return folder


def _model():
    from amber_jax.recipes import amber_tiny
    from training.config import model_to_dict

    return model_to_dict(amber_tiny().model)


def _target(run, selector="all"):
    from models import families
    from training.datasets import open_data

    return Target(f"{run}@{selector}", families(), open_data)


def _copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def _arrays(step):
    """The tensors of a saved state, layer by layer, in float64."""
    values, _ = state(step, mesh(2, 4))
    whole = {
        "embedding": values["embedding"],
        "norm.scale": values["norm"]["scale"],
        "norm.half": values["norm"]["half"],
    }
    layers = {f"layers.{n}.attention.wq": w for n, w in enumerate(values["layers"]["attention"]["wq"])}
    return {n: np.asarray(a).astype(np.float64).ravel() for n, a in {**whole, **layers}.items()}


def _expected(w, o):
    return {
        "norm": np.linalg.norm(w),
        "rms": np.sqrt(np.mean(w**2)),
        "largest": np.abs(w).max(),
        "update": np.linalg.norm(w - o) / np.linalg.norm(o),
        "cosine": w @ o / np.linalg.norm(w) / np.linalg.norm(o),
    }


def test_figures_of_every_tensor_and_of_the_model(run, tmp_path):
    run = _copy(run, tmp_path)
    target = _target(run)
    outcome = sweep(target, Weights().open(target, print), print)
    assert (outcome.code, len(outcome.made)) == (0, 6)
    moved = {r.checkpoint["name"]: r for r in results.of_kind(run, "weights")}
    last = {r.checkpoint["name"]: r for r in results.of_kind(run, "weights-to/001")}
    assert moved["init"].summary["previous"] is None
    assert "update" not in moved["init"].summary
    assert [moved[n].summary["previous"]["name"] for n in ("000", "001")] == ["init", "000"]
    assert last["000"].summary["reference"] == last["000"].settings["reference"]
    assert last["000"].summary["reference"]["name"] == "001"
    assert last["001"].summary["distance"] == 0
    assert last["001"].summary["cosine"] == pytest.approx(1)

    new, old, end = _arrays(10), _arrays(0), _arrays(20)
    rows = {r["tensor"]: r for r in moved["000"].table("tensors").to_pylist()}
    to_last = {r["tensor"]: r for r in last["000"].table("tensors").to_pylist()}
    assert rows.keys() == to_last.keys() == new.keys()
    for name, w in new.items():
        wanted, row = _expected(w, old[name]), rows[name]
        assert row["numbers"] == w.size
        assert row["group"] == group_of(name)
        for ours, theirs in (
            ("norm",) * 2,
            ("rms",) * 2,
            ("largest",) * 2,
            ("update",) * 2,
            ("cosine_previous", "cosine"),
        ):
            assert row[ours] == pytest.approx(wanted[theirs], rel=1e-12), (name, ours)
        assert to_last[name]["distance"] == pytest.approx(_expected(w, end[name])["update"], rel=1e-12)
        assert to_last[name]["cosine"] == pytest.approx(_expected(w, end[name])["cosine"], rel=1e-12)

    together = lambda values, names: np.concatenate([values[n] for n in names])  # noqa: E731
    layers = [n for n in new if n.startswith("layers")]
    for names, summary in ((list(new), moved["000"].summary), (layers, moved["000"].summary["groups"]["attention"])):
        wanted = _expected(together(new, names), together(old, names))
        assert summary["norm"] == pytest.approx(wanted["norm"])
        assert summary["update"] == pytest.approx(wanted["update"])
        assert summary["cosine_previous"] == pytest.approx(wanted["cosine"])
    assert set(moved["000"].summary["groups"]) == {"embedding", "attention", "norms"}


def test_a_longer_series_keeps_results_and_has_a_new_last(run, tmp_path):
    run = _copy(run, tmp_path)
    sweep(_target(run), Weights().open(_target(run), print), print)
    with SeriesWriter(run) as writer:
        save(writer, "series", 2)
    outcome = sweep(_target(run), Weights().open(_target(run), print), print)
    assert len(outcome.kept) == 3  # of "weights"
    assert sorted(str(p.relative_to(run / "results")) for p in outcome.made) == [
        "weights-to/002/000.json", "weights-to/002/001.json", "weights-to/002/002.json", "weights-to/002/init.json",
        "weights/002.json",
    ]  # fmt: skip


def test_manifests_are_read_once_in_a_sweep(run, tmp_path, monkeypatch):
    run, read = _copy(run, tmp_path), []
    parse = Manifest.from_json
    monkeypatch.setattr(Manifest, "from_json", lambda text, where="": read.append(where) or parse(text, where))
    (study,) = Weights("none").open(_target(run), print)
    entries = study.series.entries()
    read.clear()
    for entry in entries:
        study.score(Subject(_target(run), entry, None))
    assert not read


def test_a_filled_gap_is_noticed(run, tmp_path):
    run = _copy(run, tmp_path)
    shutil.move(run / "series" / "000", tmp_path / "000")
    sweep(_target(run), Weights("none").open(_target(run), print), print)
    assert results.read(run / "results/weights/001.json").summary["previous"]["name"] == "init"
    shutil.move(tmp_path / "000", run / "series" / "000")
    said = []
    outcome = sweep(_target(run), Weights("none").open(_target(run), said.append), print)
    assert "is not against 000" in said[0]
    assert {p.stem for p in outcome.made} == {"000", "001"}
    assert results.read(run / "results/weights/001.json").summary["previous"]["name"] == "000"


def test_what_is_compared_with_is_named(run):
    assert [s.kind for s in Weights("init").open(_target(run), print)] == ["weights", "weights-to/init"]
    assert [s.kind for s in Weights("0").open(_target(run), print)] == ["weights", "weights-to/000"]
    with pytest.raises(UserError, match=r"--to '7': 0 checkpoints .* give last, none, or one of init, 000, 001"):
        Weights("7").open(_target(run), print)


def test_damage_and_other_models_are_left_out_by_name(run, tmp_path):
    run = _copy(run, tmp_path)
    file = next(p for p in (run / "series/000/params/embedding/c").rglob("*") if p.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    target = _target(run)
    outcome = sweep(target, Weights("none").open(target, print), print)
    assert outcome.code == 1
    assert set(outcome.failed) == {"000", "001"}  # itself, and the one that is compared with it
    assert all("embedding" in why and "000" in why for why in outcome.failed.values())

    (tmp_path / "other").mkdir()
    with SeriesWriter(tmp_path / "other") as writer:
        values, _ = state(0, mesh(2, 4))
        del values["embedding"]
        writer.save(dataclasses.replace(manifest("series", -1)), params=place(values, mesh(2, 4)), optimizer=None)
    other = Series(tmp_path / "other").entries()[0]
    with pytest.raises(RunError, match="do not have the same tensors"):
        measure(Series(run).entries()[0], other)


def test_sums_that_are_not_finite_are_none():
    assert Sums(2, square=float("nan"), largest=float("inf")).figures() == {
        "numbers": 2, "norm": None, "rms": None, "largest": None, "update": None, "cosine": None
    }  # fmt: skip
    assert Sums(2).figures()["norm"] == 0
    added = Sums(1, 4.0, 2.0) + Sums(1, 9.0, 3.0)
    assert (added.square, added.largest) == (13.0, 3.0)
    assert np.isnan((Sums(1, 4.0, float("nan")) + Sums(1, 9.0, 3.0)).largest)


def test_groups():
    names = ["embedding.table", "layers.attention.wq", "layers.mlp_norm.scale", "layers.2.mlp.up", "head.kernel", "x.y"]
    assert [group_of(n) for n in names] == ["embedding", "attention", "norms", "mlp", "head", "other"]
    assert weights.GROUPS[-1] == "other"
