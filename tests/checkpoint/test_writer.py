"""Committed or absent: what the writer leaves behind, whatever happens to it."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.restore import restore
from checkpoint.series import Series, verify_files
from checkpoint.writer import SeriesWriter
from errors import RunError, UserError
from tests.checkpoint import tiny_run

ROOT = Path(__file__).resolve().parents[2]


def start(run, *mode, **environment):
    command = [sys.executable, "-m", "tests.checkpoint.tiny_run", str(run), *mode]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment)


def names(run, kind="series"):
    return sorted(p.name for p in (run / kind).iterdir()) if (run / kind).exists() else []


def test_save_is_asynchronous_and_what_it_saves_is_what_was_there(tmp_path):
    mesh = tiny_run.mesh(2, 4)
    params = {
        "embedding": jax.device_put(
            np.ones((4096, 2048), np.float32), tiny_run.shardings({"embedding": 0}, mesh)["embedding"]
        )
    }
    host = {"m": np.full(8_000_000, 3.0, np.float32), "v": jnp.full(8_000_000, 4.0)}
    spoil = jax.jit(lambda p: jax.tree.map(lambda x: x * 0 - 1, p), donate_argnums=0)
    with SeriesWriter(tmp_path) as writer:
        writer.save(tiny_run.manifest("series", 0), params=params, optimizer=host)
        assert Series(tmp_path).entries() == []  # not yet committed
        spoiled = jax.block_until_ready(spoil(params))  # donated
        host["m"][:] = -1  # overwritten
        host["v"].delete()
        writer.wait()
        (entry,) = Series(tmp_path).entries()
    asked = tiny_run.target(spoiled, mesh), {n: jax.ShapeDtypeStruct((8_000_000,), np.float32) for n in "mv"}
    asked = asked[0], tiny_run.target(asked[1], mesh)
    (params, optimizer) = restore(entry, params=asked[0], optimizer=asked[1])
    assert (bool((params["embedding"] == 1).all()), bool((optimizer["m"] == 3).all())) == (True, True)
    assert bool((optimizer["v"] == 4).all())


def test_the_index_has_a_line_per_series_checkpoint(finished):
    lines = [json.loads(line) for line in (finished / "series.jsonl").read_text().splitlines()]
    entries = Series(finished).entries()
    assert [line["manifest_sha256"] for line in lines] == [e.sha256 for e in entries]
    assert [(line["name"], line["step"]) for line in lines][:2] == [("init", 0), ("000", 10)]


def test_rolling_checkpoints_go_when_a_newer_one_is_there(run):
    with SeriesWriter(run) as writer:
        tiny_run.save(writer, "rolling", 4, step=57)
        writer.wait()
        assert names(run, "rolling") == ["00000057"]
        tiny_run.save(writer, "series", 5)
    assert names(run, "rolling") == []


def test_a_finished_checkpoint_is_never_overwritten(run):
    message = r"series/003: is finished, and a checkpoint is never overwritten; remove it"
    with SeriesWriter(run) as writer, pytest.raises(RunError, match=message):
        tiny_run.save(writer, "series", 3, seed=9)
    tiny_run.check(Series(run).resolve("3")[0], tiny_run.mesh(2, 4))


def test_a_torn_checkpoint_is_not_listed_and_is_saved_over(run):
    (run / "series" / "004" / "manifest.json").unlink()
    (run / "series" / "005.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert Series(run).entries()[-1].manifest.name == "003"
    with SeriesWriter(run) as writer:
        tiny_run.save(writer, "series", 4)
        tiny_run.save(writer, "series", 5)
    assert names(run) == ["000", "001", "002", "003", "004", "005", "init"]
    for entry in Series(run).entries():
        verify_files(entry)


def test_clean_removes_what_a_crash_left(run):
    (run / "series" / "004" / "manifest.json").unlink()
    (run / "series" / "005.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (run / "rolling" / "00000052").mkdir()
    with SeriesWriter(run) as writer:
        removed = writer.clean()
        assert [p.relative_to(run).as_posix() for p in removed] == [
            "series/004",
            "series/005.orbax-checkpoint-tmp",
            "rolling/00000052",
        ]
        assert writer.clean() == []
    assert names(run) == ["000", "001", "002", "003", "init"]
    assert names(run, "rolling") == ["00000055"]


@pytest.mark.parametrize("damage", ["", "half a line", None])
def test_clean_rebuilds_the_index_from_the_manifests(run, damage):
    index = run / "series.jsonl"
    whole = index.read_text()
    if damage is None:
        index.unlink()
    else:
        index.write_text(whole[: len(whole) // 2] + damage)
    with SeriesWriter(run) as writer:
        writer.clean()
    assert index.read_text() == whole


def test_an_empty_item_is_refused(tmp_path):
    record = tiny_run.manifest("series", 0)
    message = r"000: optimizer holds no array; give None to save without"
    with SeriesWriter(tmp_path) as writer, pytest.raises(UserError, match=message):
        writer.save(record, params={"w": jnp.ones(1)}, optimizer=())


def test_one_writer_at_a_time(tmp_path):
    message = rf"process {os.getpid()} on .* writes in it; wait until it ends, stop it, or"
    with SeriesWriter(tmp_path), pytest.raises(UserError, match=message):
        SeriesWriter(tmp_path)
    with SeriesWriter(tmp_path):
        pass


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run: cannot be made or written \(Not a directory\)"):
        SeriesWriter(tmp_path / "file" / "run")


def test_a_save_that_cannot_begin_says_so_and_lets_the_process_end(tmp_path):
    (tmp_path / "series").write_text("in the way")
    threads = set(threading.enumerate())
    message = r"series/000: could not be saved: .*Not a directory"
    with SeriesWriter(tmp_path) as writer, pytest.raises(RunError, match=message):
        tiny_run.save(writer, "series", 0)
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=20)
        assert not thread.is_alive(), f"Orbax left {thread} to wait for the folder for five minutes"


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(tmp_path):
    def run():
        with SeriesWriter(tmp_path) as writer:
            tiny_run.save(writer, "series", 0)
            (tmp_path / "series.jsonl").mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run()
    assert re.search(r"Besides: .*series/000: is saved, but not listed: .*Is a directory", caught.value.__notes__[0])
    tiny_run.check(Series(tmp_path).newest(), tiny_run.mesh(2, 4))
    (tmp_path / "series.jsonl").rmdir()
    with SeriesWriter(tmp_path) as writer:
        writer.clean()
    assert (tmp_path / "series.jsonl").read_text().count("\n") == 1


def test_a_full_disk_leaves_the_finished_checkpoints_and_says_so(tmp_path):
    process = start(tmp_path, "full-disk")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith(f"{tmp_path}/series/001: could not be saved: ")
    assert "File too large" in out
    assert out.endswith("The finished checkpoints are untouched; free some disk space and run the same command again\n")
    assert names(tmp_path) == ["000", "001"]
    for entry in Series(tmp_path).entries():
        tiny_run.check(entry, tiny_run.mesh(2, 4))


def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [start(tmp_path, "pair", process, port, XLA_FLAGS="") for process in "01"]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert [e.manifest.name for e in Series(tmp_path).entries()] == ["init", "000"]
    tiny_run.check(Series(tmp_path).newest(), tiny_run.mesh(1))  # by one process, on one device


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    """Three lives of one run, each killed in the middle of a save."""
    chosen = random.Random(1)
    torn = 0
    for life in range(3):
        process = start(tmp_path / str(life), "endless")
        for _ in range(3):
            assert process.stdout.readline(), process.stderr.read()
        time.sleep(chosen.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        run = tmp_path / str(life)
        entries = Series(run).entries()
        assert len(entries) >= 3
        newest = Series(run).newest()
        for entry in [*entries, newest]:
            tiny_run.check(entry, tiny_run.mesh(4, 2))
        with SeriesWriter(run) as writer:  # the lock went with the process
            torn += len(writer.clean())
            assert len((run / "series.jsonl").read_text().splitlines()) == len(entries)
            assert names(run) == sorted(e.manifest.name for e in entries)
            assert Series(run).newest() == newest
            tiny_run.save(writer, "series", 500)
        assert Series(run).newest().manifest.name == "500"
    assert torn > 0, "no kill fell into a save; choose other moments"
