"""A checkpoint written piece by piece is one like every other, or there is none."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint import arrays, digest, stream
from checkpoint.names import flat
from checkpoint.restore import restore
from checkpoint.series import Series, verify_files
from checkpoint.writer import SeriesWriter
from errors import RunError, UserError
from tests.checkpoint import tiny_run

ROOT = Path(__file__).resolve().parents[2]
WQ = "layers.attention.wq"


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 300)


@pytest.fixture
def state():
    """Parameters of the kinds there are: a stack, a matrix, bfloat16, a number; and what they are."""
    params, _ = tiny_run.state(10, tiny_run.mesh(2, 4))
    params["count"] = jnp.int32(7)
    named = flat(params)
    return params, named, {name: (x.shape, x.dtype.name) for name, x in named.items()}


def write_all(target, named):
    for name, x in named.items():
        if name == WQ:
            target.write(name, (1,), x[1])
            target.write(name, (0,), np.asarray(x[0]).T.copy().T)  # in another order in memory
        else:
            target.write(name, (), x)


@pytest.mark.usefixtures("small_chunks")
def test_it_is_a_checkpoint_like_every_other(tmp_path, state):
    params, named, shapes = state
    record = tiny_run.manifest("series", 0, data_sha256=None, origin={"format": "safetensors"})
    with SeriesWriter(tmp_path / "run") as writer:
        with writer.stream(record, shapes) as target:
            write_all(target, named)
            target.digests = {name: digest.digest(name, x) for name, x in named.items()}
            assert Series(tmp_path / "run").entries() == []
            saved_before = target.tensors()
            np.testing.assert_array_equal(saved_before["layers.1.attention.wq"][3:5], named[WQ][1, 3:5])
        writer.save(tiny_run.manifest("series", 1), params=params, optimizer=None)
        writer.wait()
        assert writer.clean() == []
    streamed, saved = Series(tmp_path / "run").resolve("0:")
    verify_files(streamed)
    assert streamed.manifest.origin == {"format": "safetensors"}
    assert streamed.manifest.tensors == saved.manifest.tensors
    assert streamed.manifest.digests == saved.manifest.digests
    for mesh in (tiny_run.mesh(2, 4), tiny_run.mesh(8), tiny_run.mesh(1)):
        asked = tiny_run.target(params, mesh)
        for entry in (streamed, saved):
            restored, _ = restore(entry, params=asked, optimizer=None)
            for name, x in flat(restored).items():
                assert x.sharding == flat(asked)[name].sharding
                assert np.asarray(x).tobytes() == np.asarray(named[name]).tobytes()
    for name, lazy in Series(tmp_path / "run")[0].items():
        assert lazy[...].tobytes() == np.asarray(named[name]).tobytes()
    assert len((tmp_path / "run" / "series.jsonl").read_text().splitlines()) == 2
    # Beside the arrays, the same files as from Orbax, without those that it writes only of jax's arrays.
    files = lambda entry: {name for name in entry.manifest.files if "/c" not in name}  # noqa: E731
    assert files(saved) - files(streamed) == {"params/_sharding"}
    assert files(streamed) <= files(saved)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("layers.w", (32, 4096, 11008), "bfloat16", (1, 2048, 11008)),
        ("layers.w", (32, 4096, 11008), "float32", (1, 1024, 11008)),
        ("layers.scale", (32, 4096), "float32", (1, 4096)),
        ("embedding", (32000, 4096), "float32", (4000, 4096)),
        ("w", (3, 2**25), "float32", (1, 2**24)),
        ("count", (), "int32", ()),
    ],
)
def test_chunks(name, shape, dtype, expected):
    assert arrays.chunks(name, shape, np.dtype(dtype)) == expected


@pytest.mark.usefixtures("small_chunks")
def test_few_bytes_are_in_flight(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_IN_FLIGHT", 1024)
    w = np.arange(32 * 33, dtype=np.float32).reshape(32, 33)
    with (
        SeriesWriter(tmp_path) as writer,
        writer.stream(tiny_run.manifest("series", 0), {"w": ((32, 33), "float32")}) as t,
    ):
        put, most = t._put, []
        monkeypatch.setattr(t, "_put", lambda *a: (put(*a), most.append(sum(n for n, _ in t._writes)))[0])
        t.write("w", (), w)
    assert 264 * 2 <= max(most) <= 1024
    np.testing.assert_array_equal(Series(tmp_path)[0]["w"][...], w)


def test_bfloat16_is_widened_exactly_and_nothing_else_is(tmp_path, state):
    params, named, shapes = state
    with SeriesWriter(tmp_path) as writer, writer.stream(tiny_run.manifest("series", 0), shapes) as target:
        write_all(target, named)
    (entry,) = Series(tmp_path).entries()
    asked = tiny_run.target(params, tiny_run.mesh(2, 4))
    half = asked["norm"]["half"]
    asked["norm"]["half"] = half.update(dtype=jnp.float32)
    restored, _ = restore(entry, params=asked, optimizer=None)
    np.testing.assert_array_equal(restored["norm"]["half"], np.asarray(named["norm.half"], np.float32))
    asked["norm"]["half"] = half.update(dtype=jnp.float16)
    with pytest.raises(UserError, match=r"norm\.half is bfloat16 \[24\], expected float16 \[24\]$"):
        restore(entry, params=asked, optimizer=None)
    asked["norm"]["half"] = half.update(dtype=jnp.float32, shape=(23,))
    with pytest.raises(UserError, match=r"norm\.half is bfloat16 \[24\], expected float32 \[23\]$"):
        restore(entry, params=asked, optimizer=None)


# ---- what is refused, and what an error leaves ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [],
            r"series/000: is not whole, never written: layers\.w \(0,\), \(1,\), \(2,\) … \(3,\) \(4 in all\); v \(\)$",
        ),
        ([("v", ()), ("layers.w", (0,)), ("layers.w", (2,))], r"never written: layers\.w \(1,\), \(3,\)$"),
        ([("u", ())], r"u was not declared; there are layers\.w, v$"),
        ([("layers.w", (4,))], r"layers\.w has no part \(4,\) among \(0,\), \(1,\), \(2,\) … \(3,\) \(4 in all\)"),
        ([("layers.w", (-1,))], r"has no part \(-1,\)"),
        ([("layers.w", (0, 0))], r"has no part \(0, 0\)"),
        ([("v", (0,))], r"v has no part \(0,\) among \(\)"),
        ([("v", ()), ("v", ())], r"v \(\) was written before; write every part once"),
        ([("layers.w", (1,)), ("layers.w", ())], r"layers\.w \(1,\) was written before"),
        ([("layers.w", (1,), np.ones((1, 3), np.float32))], r"w \(1,\) is float32 \[1, 3\], expected float32 \[3\]"),
        ([("layers.w", (), np.ones((4, 3), np.int32))], r"layers\.w \(\) is int32 \[4, 3\], expected float32 \[4, 3\]"),
    ],
)
def test_what_was_not_declared_is_refused_and_leaves_nothing(tmp_path, parts, message):
    shapes = {"layers.w": ((4, 3), "float32"), "v": ((2,), "float32")}

    def run():
        with SeriesWriter(tmp_path / "run") as w, w.stream(tiny_run.manifest("series", 0), shapes) as t:
            for name, index, *array in parts:
                shape = shapes.get(name, [()])[0][len(index) :]
                t.write(name, index, array[0] if array else np.ones(shape, np.float32))

    with pytest.raises(UserError, match=message):
        run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "000: no arrays"),
        ({"a": ((1,), "int32"), "a.b": ((1,), "int32")}, r"one named as a part of another: a, a\.b"),
        ({"a.b": ((1,), "int32"), "a": ((1,), "int32")}, r"one named as a part of another: a\.b, a"),
        ({"a..b": ((1,), "int32")}, r"a\.\.b: the key '' cannot name a folder"),
        ({"a": ((0, 3), "int32")}, r"a: \[0, 3\] holds no number"),
    ],
)
def test_what_cannot_be_declared(tmp_path, shapes, message):
    def run():
        with SeriesWriter(tmp_path / "run") as writer, writer.stream(tiny_run.manifest("series", 0), shapes):
            pass

    with pytest.raises(UserError, match=message):
        run()
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_what_was_there_before(run, state):
    _, named, shapes = state
    (run / "series" / "005").mkdir()  # torn
    before = sorted(p.relative_to(run) for p in run.rglob("*") if "005" not in p.parts and p.is_file())

    def spoil(writer):
        with writer.stream(tiny_run.manifest("series", 5), shapes) as target:
            write_all(target, named)
            raise ZeroDivisionError

    with SeriesWriter(run) as writer:
        with pytest.raises(ZeroDivisionError):
            spoil(writer)
        assert sorted(p.relative_to(run) for p in run.rglob("*") if p.is_file()) == before
        with pytest.raises(RunError, match=r"series/003: is finished, and a checkpoint is never overwritten"):
            writer.stream(tiny_run.manifest("series", 3), shapes).__enter__()
        with writer.stream(tiny_run.manifest("series", 5), shapes) as target:  # the same writer can go on
            write_all(target, named)
    assert [e.manifest.name for e in Series(run).entries()][-1] == "005"


def test_the_parts_not_yet_written_cannot_be_read(tmp_path):
    shapes = {"layers.w": ((2, 3), "float32")}

    def read():
        with SeriesWriter(tmp_path) as writer, writer.stream(tiny_run.manifest("series", 0), shapes) as target:
            target.write("layers.w", (1,), np.ones(3, np.float32))
            assert target.tensors()["layers.1.w"][...].tolist() == [1, 1, 1]
            target.tensors()["layers.w"][...]

    with pytest.raises(RunError, match=r"series/000: params/layers\.w cannot be read: .*missing"):
        read()


def test_digests_of_what_is_not_there(tmp_path):
    def write():
        with SeriesWriter(tmp_path) as w, w.stream(tiny_run.manifest("series", 0), {"w": ((1,), "int32")}) as target:
            target.write("w", (), np.ones(1, np.int32))
            target.digests = {"v": "0"}

    with pytest.raises(UserError, match=r"digests of params/v, but the arrays are params/w"):
        write()
    assert not (tmp_path / "series").exists()


def test_a_disk_that_cannot_hold_it_is_noticed_before(tmp_path):
    shapes = {"w": ((2**40,), "float32")}
    with (
        SeriesWriter(tmp_path) as writer,
        pytest.raises(RunError, match=r"series/000: could not be saved: it needs 4,"),
    ):
        writer.stream(tiny_run.manifest("series", 0), shapes).__enter__()


def test_a_disk_that_fills_up(tmp_path, state, monkeypatch):
    _, named, shapes = state

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run():
        with SeriesWriter(tmp_path / "run") as writer, writer.stream(tiny_run.manifest("series", 0), shapes) as target:
            monkeypatch.setattr(stream, "_write", full)
            write_all(target, named)
            monkeypatch.undo()
            with pytest.raises(RunError):
                target.tensors()  # and whoever goes on after it gets no checkpoint

    message = (
        r"series/000: could not be saved: .*No space left on device\. The finished checkpoints are untouched; free"
    )
    with pytest.raises(RunError, match=message):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_something_else_in_it_stays(tmp_path):
    def run():
        with SeriesWriter(tmp_path / "run"):
            (tmp_path / "run" / "config.json").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert (tmp_path / "run" / "config.json").exists()
    shutil.rmtree(tmp_path / "run")
    with SeriesWriter(tmp_path / "run"):
        pass
    assert (tmp_path / "run").exists()


def test_a_kill_in_the_middle_leaves_what_clean_removes(tmp_path):
    script = """
import sys, numpy as np, pathlib
from checkpoint.writer import SeriesWriter
from tests.checkpoint import tiny_run
with SeriesWriter(pathlib.Path(sys.argv[1])) as writer:
    with writer.stream(tiny_run.manifest("series", 0), {"layers.w": ((4, 3), "float32")}) as target:
        target.write("layers.w", (1,), np.ones(3, np.float32))
        target.tensors()
        print("written", flush=True)
        sys.stdin.read()
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdin=pipe, stdout=pipe)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "series/000/params/layers.w/c/1/0").stat().st_size == 12
    assert Series(tmp_path).entries() == []
    with SeriesWriter(tmp_path) as writer:
        assert writer.clean() == [tmp_path / "series/000"]


def test_several_processes_are_refused(tmp_path, monkeypatch):
    with SeriesWriter(tmp_path) as writer:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(UserError, match=r"000: 2 processes cannot stream a checkpoint; use one"):
            writer.stream(tiny_run.manifest("series", 0), {"w": ((1,), "int32")}).__enter__()
        monkeypatch.undo()
