"""Parts of a checkpoint are read alone, and what is read was compared with the manifest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import arrays, digest
from checkpoint.restore import restore
from checkpoint.series import Series
from checkpoint.tensors import Tensors
from checkpoint.writer import SeriesWriter
from errors import RunError, UserError
from tests.checkpoint import tiny_run

WQ = "layers.attention.wq"


@pytest.fixture
def saved():
    """What is in checkpoint 3 of `finished`."""
    return tiny_run.state(40, tiny_run.mesh(2, 4))[0]


def test_a_mapping_of_names_to_arrays(finished, saved):
    tensors = Series(finished)[3]
    assert set(tensors) == {"embedding", WQ, "norm.scale", "norm.half"}
    assert len(tensors) == 4
    assert (tensors[WQ].shape, tensors[WQ].dtype) == ((2, 8, 16), np.float32)
    assert repr(tensors["norm.half"]) == "Lazy(bfloat16 [24])"
    np.testing.assert_array_equal(tensors["norm.half"][...], saved["norm"]["half"])
    np.testing.assert_array_equal(tensors["embedding"][:, 3], saved["embedding"][:, 3])
    assert "layers.1.attention.wq" in tensors
    assert "layers.2.attention.wq" not in tensors


def test_one_layer_of_a_stacked_array(finished, saved):
    layer = Series(finished)[3]["layers.1.attention.wq"]
    assert layer.shape == (8, 16)
    np.testing.assert_array_equal(layer[...], saved["layers"]["attention"]["wq"][1])
    np.testing.assert_array_equal(layer[2:4, -1], saved["layers"]["attention"]["wq"][1, 2:4, -1])


def test_of_the_optimizer(finished):
    tensors = Tensors(Series(finished).resolve("3")[0], "optimizer")
    assert tensors["1.0.count"][()].shape == tensors["1.0.count"][...].shape == ()
    assert tensors["1.0.mu.layers.1.attention.wq"].shape == (8, 16)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_indices_are_those_of_numpy(finished, data):
    ends = st.none() | st.integers(-20, 20)
    step = st.none() | st.integers(-4, 4).filter(bool)
    parts = [st.integers(-n, n - 1) | st.builds(slice, ends, ends, step) for n in (2, 8, 16)]
    count = data.draw(st.integers(0, 3))
    index = [data.draw(part) for part in parts[:count]]
    if data.draw(st.booleans()):
        index.insert(count, Ellipsis)
    expected = np.asarray(tiny_run.state(40, tiny_run.mesh(1))[0]["layers"]["attention"]["wq"])[tuple(index)]
    found = Series(finished)[3][WQ][tuple(index)]
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("index", [2, -3, (0, 0, 0, 0), (slice(None), 8)])
def test_an_index_outside(finished, index):
    with pytest.raises(IndexError):
        Series(finished)[3][WQ][index]


def test_what_is_not_there_is_told_what_there_is(finished):
    tensors = Series(finished)[3]
    with pytest.raises(UserError, match=r"series/003: has no layers\.wq; there are .*embedding"):
        tensors["layers.wq"]
    message = r"has no layers\.2\.attention\.wq; the layers of layers\.attention\.wq are 0 to 1$"
    with pytest.raises(UserError, match=message):
        tensors["layers.2.attention.wq"]
    assert tensors.get("layers.2.attention.wq") is None
    with pytest.raises(UserError, match=r"@9: no such checkpoint; there are 6"):
        Series(finished)[9]
    with pytest.raises(UserError, match=r"@all: names 6 checkpoints, expected one"):
        Series(finished)["all"]
    with pytest.raises(UserError, match=r"series/003: holds no ema"):
        Tensors(Series(finished).resolve("3")[0], "ema")


def test_a_flipped_byte_is_named_and_only_files_that_are_read_are_looked_at(run, saved):
    folder = run / "series" / "003" / "params" / WQ
    files = [p for p in sorted((folder / "c").rglob("*")) if p.is_file()]
    damaged = files[0]
    raw = bytearray(damaged.read_bytes())
    raw[5] ^= 16
    damaged.write_bytes(raw)
    name = damaged.relative_to(run / "series" / "003").as_posix()
    tensors = Series(run)[3]
    for _ in range(2):
        with pytest.raises(
            RunError, match=rf"series/003: damaged: {name} has other bytes .*\. Put back an intact copy"
        ):
            tensors[WQ][...]
    np.testing.assert_array_equal(tensors["embedding"][...], saved["embedding"])
    np.testing.assert_array_equal(tensors[WQ][:, -1, -1], saved["layers"]["attention"]["wq"][:, -1, -1])
    unverified = Tensors(Series(run).resolve("3")[0], verify=False)
    assert (unverified[WQ][...] != saved["layers"]["attention"]["wq"]).sum() == 1
    damaged.unlink()
    with pytest.raises(RunError, match=rf"damaged: {name} is missing"):
        tensors[WQ][...]
    with pytest.raises(RunError, match=rf"series/003: params/{WQ} cannot be read: "):
        unverified[WQ][...]
    (folder / "zarr.json").unlink()
    with pytest.raises(RunError, match=rf"damaged: params/{WQ}/zarr\.json is missing"):
        Series(run)[3][WQ][...]


def test_a_file_is_hashed_once(run):
    tensors = Series(run)[3]
    before = tensors["embedding"][...]
    for file in (run / "series/003/params/embedding/c").rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size - 20) + file.read_bytes()[-20:])
    assert (tensors["embedding"][...] != before).all()


def test_a_layer_of_a_large_stack_has_its_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 1024)
    w = np.arange(4 * 16 * 32, dtype=np.float32).reshape(4, 16, 32)
    params = {"layers": {"w": jnp.asarray(w), "small": jnp.ones((4, 8))}, "norm": np.ones(3)}
    with SeriesWriter(tmp_path) as writer:
        writer.save(tiny_run.manifest("series", 0), params=params, optimizer=None)
    folder = tmp_path / "series/000/params"
    assert sorted(p.name for p in (folder / "layers.w/c").iterdir()) == ["0", "1", "2", "3"]
    assert [p.name for p in (folder / "layers.small/c").iterdir()] == ["0"]
    for layer in (0, 1, 3):
        for file in (folder / f"layers.w/c/{layer}").rglob("*"):
            if file.is_file():
                file.unlink()
    np.testing.assert_array_equal(Series(tmp_path)[0]["layers.2.w"][...], w[2])


def test_replicas_share_the_writing_of_large_arrays_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_SHARED_BYTES", 1024)
    everywhere = jax.sharding.NamedSharding(tiny_run.mesh(8), jax.sharding.PartitionSpec())
    w = {
        name: np.arange(rows * 32, dtype=np.float32).reshape(rows, 32) for name, rows in (("large", 64), ("small", 56))
    }
    with SeriesWriter(tmp_path) as writer:
        writer.save(tiny_run.manifest("series", 0), params=jax.device_put(w, everywhere), optimizer=None)
    folder = tmp_path / "series/000/params"
    assert len([*(folder / "large/c").iterdir()]) == 8
    assert len([*(folder / "small/c").iterdir()]) == 1
    for name, array in w.items():
        np.testing.assert_array_equal(Series(tmp_path)[0][name][...], array)


def test_every_save_has_digests_that_do_not_depend_on_the_mesh(tmp_path):
    manifests = []
    for degrees in ((1, 1), (2, 4), (8, 1)):
        params, optimizer = tiny_run.state(3, tiny_run.mesh(*degrees))
        with SeriesWriter(tmp_path / str(degrees)) as writer:
            writer.save(tiny_run.manifest("series", 0), params=params, optimizer=optimizer)
        (entry,) = Series(tmp_path / str(degrees)).entries()
        manifests.append(entry.manifest)
    one = manifests[0]
    assert all((m.tensors, m.digests) == (one.tensors, one.digests) for m in manifests)
    assert one.digests.keys() == {"params", "optimizer"}
    for name, tensor in Tensors(entry).items():
        assert one.tensors[f"params/{name}"]["digest"] == digest.digest(name, tensor[...])
    other, _ = tiny_run.state(4, tiny_run.mesh(1, 1))
    with SeriesWriter(tmp_path / "other") as writer:
        writer.save(tiny_run.manifest("series", 0), params=other, optimizer=optimizer)
    (entry,) = Series(tmp_path / "other").entries()
    assert entry.manifest.digests["params"] != one.digests["params"]
    assert entry.manifest.digests["optimizer"] == one.digests["optimizer"]


def test_a_copy_in_bfloat16_is_read_where_that_is_asked_for(tmp_path):
    weights = {"w": jnp.linspace(0, 1, 12).reshape(3, 4)}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    with SeriesWriter(tmp_path) as writer:
        writer.save(tiny_run.manifest("series", 0), params=weights, optimizer=None, copy=rounded)
    (entry,) = Series(tmp_path).entries()
    for values in (weights, rounded):
        target = tiny_run.target(values, tiny_run.mesh(2))
        restored, _ = restore(entry, params=target, optimizer=None)
        np.testing.assert_array_equal(restored["w"], values["w"])
    np.testing.assert_array_equal(Tensors(entry, "params_bfloat16")["w"][1, :2], rounded["w"][1, :2])
