"""What was saved comes back bit for bit, on any mesh, or the restore says what is wrong with it."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from checkpoint.restore import restore
from checkpoint.series import Series, verify_files
from errors import RunError, UserError
from tests.checkpoint import tiny_run


def entry(run, selector="3"):
    return Series(run).resolve(selector)[0]


@pytest.fixture
def asked():
    return tiny_run.target(tiny_run.state(0, tiny_run.mesh(2, 4)), tiny_run.mesh(4, 2))


@pytest.mark.parametrize("degrees", [(2, 4), (8,), (1,), (4, 2)])
def test_saved_on_2x4_and_restored_bit_for_bit_on_any_mesh(finished, degrees):
    tiny_run.check(entry(finished), tiny_run.mesh(*degrees))


def test_parameters_alone(finished, asked):
    params, optimizer = restore(entry(finished), params=asked[0], optimizer=None)
    saved, _ = tiny_run.state(40, tiny_run.mesh(2, 4))
    assert optimizer is None
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), params, tiny_run.place(saved, tiny_run.mesh(4, 2)))
    )


def test_optimizer_alone(finished, asked):
    params, optimizer = restore(entry(finished), params=None, optimizer=asked[1])
    assert params is None
    assert jax.tree.structure(optimizer) == jax.tree.structure(asked[1])


def test_the_manifest_describes_every_array(finished):
    tensors = {name: dict(t) for name, t in entry(finished).manifest.tensors.items()}
    assert all(len(t.pop("digest")) == 32 for t in tensors.values())
    assert tensors["params/layers.attention.wq"] == {"shape": [2, 8, 16], "dtype": "float32"}
    assert tensors["params/norm.half"] == {"shape": [24], "dtype": "bfloat16"}
    assert tensors["optimizer/1.0.count"] == {"shape": [], "dtype": "int32"}
    assert len(tensors) == 4 + 2 + 2 * 4


def test_one_array_can_be_read_without_orbax(finished):
    folder = entry(finished).path / "params" / "layers.attention.wq"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    array = tensorstore.open(spec, open=True, read=True).result()
    saved, _ = tiny_run.state(40, tiny_run.mesh(2, 4))
    np.testing.assert_array_equal(array[1].read().result(), saved["layers"]["attention"]["wq"][1])


def test_no_file_is_large(tmp_path, monkeypatch):
    """A matrix saved from one device is split, so that a reader of a part need not read the whole."""
    from checkpoint import arrays

    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 1024)
    saver = arrays.start_save(tmp_path / "000", {"params": {"w": jnp.ones((64, 16))}})
    arrays.finish_save(saver)
    assert len(list((tmp_path / "000/params/w/c").rglob("*"))) > 4
    assert max(p.stat().st_size for p in (tmp_path / "000/params/w/c").rglob("*") if p.is_file()) < 1100


# ---- what was asked for is not what is there -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p | {"embedding": jax.ShapeDtypeStruct((16, 4), jnp.float32)},
            r"embedding is float32 \[16, 8\], expected float32 \[16, 4\]$",
        ),
        (
            lambda p: p | {"embedding": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)},
            r"embedding is float32 \[16, 8\], expected bfloat16 \[16, 8\]$",
        ),
        (lambda p: p | {"bias": p["embedding"]}, "bias is not in it$"),
        (lambda p: {k: v for k, v in p.items() if k != "embedding"}, "embedding is in it but was not asked for$"),
        (lambda p: {f"w{i}": p["embedding"] for i in range(9)}, r"w4 is not in it \(and 8 more\)$"),
    ],
)
def test_another_model_is_refused_before_anything_is_read(run, asked, change, message):
    shutil.rmtree(run / "series" / "003" / "params")
    with pytest.raises(UserError, match=r"series/003: its params arrays are of another model: .*" + message):
        restore(entry(run), params=change(asked[0]), optimizer=None)


def test_another_optimizer_is_refused(finished, asked):
    with pytest.raises(UserError, match="its optimizer arrays are of another model"):
        restore(entry(finished), params=asked[0], optimizer=asked[0])


def test_parameters_without_optimizer_state_cannot_be_resumed(run, asked):
    from checkpoint.writer import SeriesWriter

    with SeriesWriter(run) as writer:
        params, _ = tiny_run.state(0, tiny_run.mesh(2, 4))
        writer.save(tiny_run.manifest("series", 6), params=params, optimizer=None)
    with pytest.raises(UserError, match=r"series/006: holds no optimizer, only params"):
        restore(entry(run, "6"), params=asked[0], optimizer=asked[1])
    restore(entry(run, "6"), params=asked[0], optimizer=None)


# ---- what is there is not what was saved ---------------------------------------------------------------------------


def test_every_flipped_byte_is_detected_and_named(run, asked):
    good = entry(run)
    verify_files(good)
    names = [p.relative_to(good.path).as_posix() for p in sorted(good.path.rglob("*")) if p.is_file()]
    chosen = random.Random(0)
    assert len(names) >= 60
    for name in names:
        file = good.path / name
        before = file.read_bytes()
        changed = bytearray(before)
        changed[chosen.randrange(len(changed))] ^= 1 << chosen.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(RunError, match=rf"series/003: damaged: {name} has") as caught:
            restore(good, params=asked[0], optimizer=asked[1])
        assert caught.value.args[0].count(";") == 0, "one file is damaged and one is named"
        file.write_bytes(before)
    tiny_run.check(good, tiny_run.mesh(2, 4))


def test_parameters_alone_need_only_their_files(run, asked):
    good = entry(run)
    file = good.path / "optimizer/1.0.count/zarr.json"
    file.write_bytes(b"x")
    restore(good, params=asked[0], optimizer=None)
    verify_files(good, ["params"])
    with pytest.raises(RunError, match=r"optimizer/1\.0\.count/zarr\.json has 1 bytes instead of"):
        verify_files(good)


def test_truncated_missing_and_extra_files_are_named(run):
    good = entry(run)
    shard = next(p for p in sorted((good.path / "params/embedding/c").rglob("*")) if p.is_file())
    name = shard.relative_to(good.path).as_posix()
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(RunError, match=rf"{name} has {size - 1} bytes instead of {size}\. Put back an intact copy"):
        verify_files(good)
    shard.unlink()
    with pytest.raises(RunError, match=f"damaged: {name} is missing"):
        verify_files(good)
    (shard.parent / "9").write_bytes(b"")
    (good.path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match=rf"note\.txt is not part of it; .* is missing; {name[:-1]}9 is not part of it"):
        verify_files(good)
    (good.path / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"damaged: manifest\.json has changed; note"):
        verify_files(good)


def test_much_damage_is_counted(run):
    good = entry(run)
    shutil.rmtree(good.path / "optimizer")
    with pytest.raises(RunError, match=r"is missing \(and \d\d more\)\. Put back"):
        verify_files(good)


def test_without_verification_a_missing_file_still_names_the_checkpoint(run, asked):
    good = entry(run)
    shutil.rmtree(good.path / "params" / "embedding")
    with pytest.raises(RunError, match=r"series/003: cannot be read: .*embedding"):
        restore(good, params=asked[0], optimizer=None, verify=False)
