"""A checkpoint is what its manifest says, in its files and in its numbers; and how two differ."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint import check, digest, files
from checkpoint.manifest import FILE
from checkpoint.series import Series
from checkpoint.writer import SeriesWriter
from errors import RunError, UserError
from tests.checkpoint import tiny_run
from tests.checkpoint.tampered import change_one_weight

WQ = "layers.attention.wq"


def entry_of(run, selector="3"):
    """A checkpoint as it is on the disk now."""
    return Series(run).resolve(selector)[0]


def rewrite(entry, **fields):
    """Another manifest that is valid by itself."""
    (entry.path / FILE).write_text(dataclasses.replace(entry.manifest, **fields).to_json())


def test_a_sound_checkpoint_has_the_digests_of_its_manifest(finished):
    for entry in [*Series(finished).entries(), Series(finished).rolling()]:
        found = check.check(entry)
        assert found.problems == ()
        assert found.vouched
        assert found.digests == entry.manifest.digests
        assert found.digests.keys() == {"params", "optimizer"}


@pytest.mark.parametrize("size", [1, 40, 300])
def test_pieces_of_any_size_give_the_same_digests(finished, monkeypatch, size):
    monkeypatch.setattr(check, "_PIECE_BYTES", size)
    entry = entry_of(finished)
    boxes = list(check.boxes(entry, f"params/{WQ}", (2, 8, 16)))
    assert len(boxes) == {1: 8, 40: 8, 300: 4}[size], "one chunk of [2, 4, 4] at least, of float32"
    covered = np.zeros((2, 8, 16), int)
    for box in boxes:
        covered[box] += 1
    assert (covered == 1).all()
    assert check.check(entry).digests == entry.manifest.digests


def test_damaged_files_are_named_and_the_other_item_is_still_read(run):
    entry = entry_of(run)
    chunk = next(p for p in sorted((entry.path / "params" / WQ).rglob("*")) if p.is_file() and p.name != "zarr.json")
    raw = bytearray(chunk.read_bytes())
    raw[3] ^= 1
    chunk.write_bytes(raw)
    (entry.path / "params" / "norm.scale" / "zarr.json").unlink()
    (entry.path / "letter.txt").write_text("x")
    (problem,) = check.check(entry).problems
    assert problem.startswith(f"{entry.path}: damaged: ")
    for part in (
        f"{chunk.relative_to(entry.path)} has other bytes",
        "params/norm.scale/zarr.json is missing",
        "letter.txt is not part of it",
    ):
        assert part in problem
    assert check.check(entry).digests == {"optimizer": entry.manifest.digests["optimizer"]}


def test_a_manifest_that_changed_since_it_was_read(run):
    entry = entry_of(run)
    rewrite(entry, learning_rate=7.0)
    assert f"{FILE} has changed" in check.check(entry).problems[0]


def test_a_weight_changed_with_all_files_rewritten(run):
    change_one_weight(entry_of(run), WQ, 1e-3, with_digests=False)
    entry = entry_of(run)
    (problem,) = check.check(entry).problems
    assert problem == f"{entry.path}: does not hold the numbers that were saved (digest differs): params/{WQ}"
    change_one_weight(entry, WQ, 1e-3, with_digests=True)
    before, entry = entry.manifest.digests, entry_of(run)
    found = check.check(entry)
    assert found.problems == (), "by itself it is sound: what it should be, only the rest of the run says"
    assert found.digests["params"] == entry.manifest.digests["params"] != before["params"]


def test_the_digest_of_an_item_is_that_of_its_arrays(run):
    entry = entry_of(run)
    rewrite(entry, digests=entry.manifest.digests | {"optimizer": "0" * 32})
    (problem,) = check.check(entry_of(run)).problems
    assert problem == f"{entry.path}: the manifest's digest of optimizer is not that of the arrays in its list"


def test_a_manifest_of_older_code_vouches_for_files_only(run):
    entry = entry_of(run)
    tensors = {n: {k: v for k, v in t.items() if k != "digest"} for n, t in entry.manifest.tensors.items()}
    rewrite(entry, tensors=tensors, digests={}, version=2)
    found = check.check(entry_of(run))
    assert (found.problems, found.vouched) == ((), False)
    assert found.digests == entry.manifest.digests, "known all the same"


def test_an_array_that_is_not_as_described(run):
    entry = entry_of(run)
    tensors = {n: dict(t) for n, t in entry.manifest.tensors.items()}
    tensors["params/embedding"]["shape"] = [8, 16]
    rewrite(entry, tensors=tensors)
    (problem,) = check.check(entry_of(run)).problems
    assert "params/embedding is float32 [16, 8] on the disk, not as the manifest says" in problem


def test_the_copy_in_bfloat16_is_the_parameters_rounded(tmp_path):
    params, _ = tiny_run.state(1, tiny_run.mesh(2, 4))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wrong = rounded | {"embedding": rounded["embedding"] * 2}
    with SeriesWriter(tmp_path) as writer:
        for index, copy in ((0, rounded), (1, wrong)):
            writer.save(tiny_run.manifest("series", index), params=params, optimizer=None, copy=copy)
    good, bad = Series(tmp_path).entries()
    assert check.check(good).problems == ()
    assert check.check(good).digests.keys() == {"params", "params_bfloat16"}
    (problem,) = check.check(bad).problems
    assert problem == f"{bad.path}: is not the rounded copy of the parameters: params_bfloat16/embedding"


def test_a_folder_that_is_gone(run):
    entry = entry_of(run)
    shutil.rmtree(entry.path)
    assert f"{FILE} has changed" in check.check(entry).problems[0]


# ---- two of them ---------------------------------------------------------------------------------------------------


def test_a_difference_is_that_of_numpy(finished, monkeypatch):
    monkeypatch.setattr(check, "_PIECE_BYTES", 100)
    monkeypatch.setattr(check, "_BLOCK", 7)
    first, second = (tiny_run.state(step, tiny_run.mesh(1))[0] for step in (10, 20))
    changes = {c.name: c for c in check.diff(entry_of(finished, "0"), entry_of(finished, "1"))}
    assert changes.keys() == {"embedding", WQ, "norm.scale", "norm.half"}
    a, b = (np.asarray(x["layers"]["attention"]["wq"], np.float64) for x in (first, second))
    found = changes[WQ]
    assert found.norm == pytest.approx(np.linalg.norm(a.ravel()), rel=1e-12)
    assert found.change == pytest.approx(np.linalg.norm((b - a).ravel()), rel=1e-12)
    assert found.largest == np.abs(b - a).max()
    assert (found.differing, found.numbers) == (a.size, a.size)
    assert found.relative == found.change / found.norm
    total = check.total(list(changes.values()))
    assert total.change == pytest.approx(np.sqrt(sum(c.change**2 for c in changes.values())))
    assert total.numbers == 16 * 8 + 2 * 8 * 16 + 8 + 24


def test_one_changed_number_is_counted(run):
    shutil.copytree(run, run.with_name("other"))
    change_one_weight(entry_of(run), "norm.scale", 0.5)
    changes = {c.name: c for c in check.diff(entry_of(run.with_name("other")), entry_of(run))}
    assert [c.differing for c in changes.values() if c.name != "norm.scale"] == [0, 0, 0]
    found = changes["norm.scale"]
    assert (found.differing, found.largest, found.change) == (1, pytest.approx(0.5), pytest.approx(0.5))
    assert "norm.scale" in "\n".join(check.table(list(changes.values())))


def test_zeros_have_no_relative_change():
    change = check.Change("x", 3, norm=0.0, change=1.0, largest=1.0, differing=1)
    assert change.relative is None
    assert change.row()["relative"] is None
    assert dataclasses.replace(change, change=float("nan")).row()["change"] is None, "JSON has no NaN"


def test_other_models_are_not_compared(finished, tmp_path):
    with SeriesWriter(tmp_path) as writer:
        for index, name, shape in ((0, "embedding", (16, 8)), (1, "scale", (8,)), (2, "embedding", (16, 4))):
            record = tiny_run.manifest("series", index)
            writer.save(record, params={name: jnp.ones(shape)}, optimizer=None)
    first, second, third = Series(tmp_path).entries()
    with pytest.raises(UserError, match="of different models: only one of them has embedding, scale"):
        check.diff(first, second)
    with pytest.raises(UserError, match=r"embedding is \[16, 8\] and \[16, 4\]"):
        check.diff(first, third)
    with pytest.raises(UserError, match=r"only one of them has .*norm\.scale"):
        check.diff(first, entry_of(finished))


def test_a_damaged_file_is_not_compared(run):
    chunk = entry_of(run).path / "params" / "embedding" / "c" / "0" / "0"
    raw = bytearray(chunk.read_bytes())
    raw[0] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(RunError, match=r"series/003: damaged: params/embedding/c/0/0 has other bytes"):
        check.diff(entry_of(run, "2"), entry_of(run))


# ---- the list ------------------------------------------------------------------------------------------------------


def test_the_list_is_made_again_from_the_manifests(run):
    file = run / "series.jsonl"
    expected = file.read_text()
    file.write_text(expected[: len(expected) // 2])
    assert check.rebuild(run) == 6
    assert file.read_text() == expected
    file.unlink()
    check.rebuild(run)
    assert file.read_text() == expected


def test_the_list_is_left_to_whoever_writes_in_the_run(run):
    lock = files.Lock(run)
    (run / "series.jsonl").unlink()
    with pytest.raises(UserError, match="writes in it"):
        check.rebuild(run)
    assert not (run / "series.jsonl").exists()
    lock.release()
    check.rebuild(run)


def test_digests_are_of_names_without_the_item(finished):
    entry = entry_of(finished)
    array = np.asarray(tiny_run.state(40, tiny_run.mesh(1))[0]["norm"]["half"])
    assert check._digests(entry, "params/norm.half", ["bfloat16"]) == [digest.digest("norm.half", array)]
