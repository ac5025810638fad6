"""Runs in a bucket, against an emulator: pip install 'llm360-jax[storage]' gcp-storage-emulator."""

import importlib.util
import json
import os
import sys
import threading
import time
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from checkpoint import storage
from checkpoint.manifest import FILE
from checkpoint.series import Series, parse_ref, verify_files
from checkpoint.tensors import Tensors
from checkpoint.writer import SeriesWriter
from errors import RunError, UserError
from run import main
from tests.checkpoint import tiny_run

ROOT = Path(__file__).resolve().parent.parent.parent
MISSING = [name for name in ("gcsfs", "gcp_storage_emulator") if importlib.util.find_spec(name) is None]
needs_emulator = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="session")
def emulator():
    """The emulator's store; clients of this process, and of those that it starts, find it in the environment."""
    from gcp_storage_emulator import server

    turn = threading.Lock()
    for _, handlers in server.HANDLERS:
        handlers.update({method: conditional(handler, turn) for method, handler in handlers.items()})
    with pytest.MonkeyPatch.context() as environment:
        environment.setattr(ThreadingHTTPServer, "request_queue_size", 128)
        environment.setattr(server.server, "HTTPServer", ThreadingHTTPServer)
        started = server.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
        started._storage._write_config_to_file = lambda: None  # all that it holds, at every write
        started.start()
        url = f"http://localhost:{started._api._httpd.server_address[1]}"
        environment.setenv("STORAGE_EMULATOR_HOST", url)
        environment.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        environment.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for a login at every file
        environment.setenv("NO_GCE_CHECK", "true")  # no looking for the login of a cloud machine
        yield started._storage
        started.stop()


def conditional(handler, turn):
    """The emulator ignores ``ifGenerationMatch``; with this it answers as the service does, one request at a time."""
    from gcp_storage_emulator.exceptions import NotFound

    def checked(request, response, store, *args, **kwargs):
        body = request.data if request.method in ("POST", "PUT", "PATCH") else None  # read it, or the answer gets lost
        wanted = request.query.get("ifGenerationMatch")
        with turn:
            if wanted and "upload_id" not in request.query:
                named = request.params.get("object_id") or request.query.get("name", [None])[0] or body["meta"]["name"]
                try:
                    generation = store.get_file_obj(request.params["bucket_name"], named)["generation"]
                except NotFound:
                    generation = "0"
                if wanted != [str(generation)]:
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return handler(request, response, store, *args, **kwargs)

    return checked


@pytest.fixture
def place(emulator, request):
    return storage.path(f"gs://bucket/{request.node.name}/run")


@pytest.fixture
def impatient(monkeypatch):
    """Leases that beat and expire in moments."""
    monkeypatch.setattr(storage, "_BEAT_S", 0.1)
    monkeypatch.setattr(storage, "_SILENCE_S", 1.0)


@pytest.fixture(scope="session")
def kept(emulator):
    """A run in the bucket with init, 000, 001 and rolling step 25. Do not change it."""
    run = storage.path("gs://bucket/kept/run")
    with SeriesWriter(run) as writer:
        for index in (-1, 0, 1):
            tiny_run.save(writer, "series", index)
        tiny_run.save(writer, "rolling", 1, step=25)
    return run


# ---- names, with or without an emulator ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["runs/a", "/tmp/a@b", "C:/a", "a:b"])
def test_a_local_path_is_a_plain_one(text):
    assert storage.path(text) == storage.local(text) == Path(text)
    assert type(storage.path(text)) is type(Path())


@pytest.mark.parametrize("text", ["s3://bucket/run", "az://b/run", "hdfs://b/run", "https://host/run", "file:///run"])
def test_other_kinds_of_storage_are_refused(text, capsys):
    for call in (storage.path, storage.local, Series, SeriesWriter, lambda t: parse_ref(f"{t}@3")):
        with pytest.raises(UserError, match=text):
            call(text)
    for words in (
        ["train", "amber_tiny", "--data=synthetic", f"--run={text}"],
        ["series", text],
        ["generate", f"{text}@latest", "--prompt=a"],
        ["prepare", "amber_tiny", f"--out={text}", "--source=a=b"],
    ):
        assert main(words) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: {text}: ")
        assert len(shown.splitlines()) == 1
    assert text.partition("/")[0] not in os.listdir()


@pytest.mark.parametrize("text", ["gs://", "gs://bucket", "gs://bucket/"])
def test_a_run_is_a_folder_in_a_bucket(text):
    with pytest.raises(UserError, match="name a folder in a bucket"):
        storage.path(text)


def test_without_its_packages_a_bucket_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"llm360-jax\[storage\]"):
        storage.path("gs://bucket/run")


def test_appending_to_a_file_keeps_what_is_there(tmp_path):
    for word in ("one\n", b"two\n"):
        storage.append(tmp_path / "f", word)
    assert (tmp_path / "f").read_bytes() == storage.read(tmp_path / "f") == b"one\ntwo\n"


# ---- in a bucket ---------------------------------------------------------------------------------------------------


@needs_emulator
def test_a_bucket_that_is_not_there_is_said_before_anything_else(emulator, capsys):
    assert main(["train", "amber_tiny", "--data=synthetic", "--run=gs://other-bucket/run"]) == 2
    assert "gs://other-bucket/run: cannot be reached" in capsys.readouterr().err


@needs_emulator
def test_appending_adds_to_the_object_and_notices_another_writer(place, monkeypatch):
    for word in ("one\n", "two\n", "three\n"):
        storage.append(place / "f", word)
    assert storage.read(place / "f") == b"one\ntwo\nthree\n"
    assert storage.listing(place) == ["f"], "no parts are left"
    blob = type(storage._blob(place / "f"))
    compose = blob.compose

    def other_first(self, *args, **kwargs):
        storage.write(place / "f", b"other\n")
        return compose(self, *args, **kwargs)

    monkeypatch.setattr(blob, "compose", other_first)
    with pytest.raises(OSError, match="412"):
        storage.append(place / "f", "four\n")
    assert storage.read(place / "f") == b"other\n"


@needs_emulator
def test_a_run_in_a_bucket_is_listed_verified_and_restored_on_another_mesh(kept):
    entries = Series(str(kept)).entries()
    assert [e.manifest.name for e in entries] == ["init", "000", "001"]
    assert Series(kept).newest().manifest.step == 25
    assert parse_ref(f"{kept}@latest") == (kept, "latest")
    for entry in entries:
        verify_files(entry)
    tiny_run.check(entries[-1], tiny_run.mesh(8))
    tiny_run.check(Series(kept).rolling(), tiny_run.mesh(4, 2))
    index = [json.loads(line) for line in storage.read(kept / "series.jsonl").splitlines()]
    assert [row["manifest_sha256"] for row in index] == [e.sha256 for e in entries]
    assert [p.name for p in storage.folders(kept)] == ["rolling", "series"]
    assert not (kept / ".lock").exists()


@needs_emulator
def test_a_part_of_one_tensor_is_read_alone(kept, monkeypatch):
    read = []
    hashes = storage.sizes
    monkeypatch.setattr(storage, "sizes", lambda root, names: read.extend(names := list(names)) or hashes(root, names))
    params, _ = tiny_run.state(20, tiny_run.mesh(2, 4))
    wq = Series(kept)[1]["layers.attention.wq"]
    np.testing.assert_array_equal(wq[1, :2], np.asarray(params["layers"]["attention"]["wq"])[1, :2])
    assert all("layers.attention.wq" in name for name in read)
    assert 1 < len(read) <= 5


@needs_emulator
def test_a_flipped_byte_is_named(emulator, place):
    with SeriesWriter(place) as writer:
        tiny_run.save(writer, "series", 0)
    [entry] = Series(place).entries()
    name = "params/layers.attention.wq/c/0/0/0"
    raw = bytearray(storage.read(entry.path / name))
    raw[5] ^= 1
    storage.write(entry.path / name, bytes(raw))
    with pytest.raises(RunError, match=rf"{name} has other bytes"):
        verify_files(entry)
    with pytest.raises(RunError, match=name):
        Tensors(entry)["layers.attention.wq"][...]
    storage._blob(entry.path / name).delete()
    with pytest.raises(RunError, match=rf"{name} is missing"):
        verify_files(entry)


@needs_emulator
def test_a_checkpoint_without_a_manifest_counts_for_nothing_and_is_removed(place):
    with SeriesWriter(place) as writer:
        tiny_run.save(writer, "series", 0)
        tiny_run.save(writer, "series", 1)
    torn = place / "series" / "001"
    storage._blob(torn / FILE).delete()  # the last object that is written, the first that is removed
    assert storage.listing(torn)
    assert [e.manifest.name for e in Series(place).entries()] == ["000"]
    with SeriesWriter(place) as writer:
        assert writer.clean() == [torn]
        assert not storage.listing(torn)
        assert len(storage.read(place / "series.jsonl").splitlines()) == 1
        tiny_run.save(writer, "series", 1)
    tiny_run.check(Series(place).entries()[1], tiny_run.mesh(2, 4))


@needs_emulator
def test_a_failed_write_leaves_the_run_as_it_was(place, monkeypatch):
    with SeriesWriter(place) as writer:
        tiny_run.save(writer, "series", 0)
        writer.wait()
        monkeypatch.setattr(storage, "write", lambda *_: (_ for _ in ()).throw(OSError(5, "the network is gone")))
        tiny_run.save(writer, "series", 1)
        with pytest.raises(RunError, match=r"001: could not be saved: .*the network is gone"):
            writer.wait()
        assert not storage.listing(place / "series" / "001")
        monkeypatch.undo()
        tiny_run.save(writer, "series", 1)
    assert [e.manifest.name for e in Series(place).entries()] == ["000", "001"]


@needs_emulator
def test_a_second_writer_is_refused_while_the_first_lives(place, impatient):
    with SeriesWriter(place), pytest.raises(UserError, match=rf"process {os.getpid()} on .* writes in it"):
        SeriesWriter(place)
    with SeriesWriter(place):
        pass  # and may write afterwards


@needs_emulator
def test_of_two_that_begin_at_once_one_is_refused(place, impatient):
    gate, taken, refused = threading.Barrier(4), [], []

    def begin():
        gate.wait()
        try:
            taken.append(storage.Lease(place))
        except UserError as e:
            refused.append(e)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    taken[0].release()
    assert (len(taken), len(refused)) == (1, 3)


@needs_emulator
def test_a_silent_holder_is_taken_over_and_commits_nothing_afterwards(place, impatient):
    silent = SeriesWriter(place)
    tiny_run.save(silent, "series", 0)
    silent.wait()
    silent._lock._end.set()  # it hangs
    begin = time.monotonic()
    with SeriesWriter(place) as second:
        assert time.monotonic() - begin >= 1
        tiny_run.save(second, "series", 1)
        second.wait()
        with pytest.raises(RunError, match="another process took this run over"):
            tiny_run.save(silent, "series", 2)
        assert not storage.listing(place / "series" / "002")
        silent._lock.release()  # which is the second's by now
        second.wait()
    assert [e.manifest.name for e in Series(place).entries()] == ["000", "001"]


@needs_emulator
def test_weights_cannot_be_imported_into_a_bucket_yet(place):
    with (
        SeriesWriter(place) as writer,
        pytest.raises(UserError, match="needs a run directory on a disk"),
        writer.stream(tiny_run.manifest("series", 0), {"norm.scale": ((8,), "float32")}),
    ):
        pass


@pytest.mark.slow
@needs_emulator
def test_a_killed_run_goes_on_in_the_bucket_to_the_same_bits(place, impatient, tiny, tmp_path, monkeypatch):
    from amber_jax.config import AmberConfig
    from data.dataset import SyntheticData
    from training import loop
    from training.config import Family
    from training.metrics import read_lines
    from training.optimizer import AdamWConfig

    data = SyntheticData.of_chunks(vocab_size=64, sequence_length=32, chunks=2, samples_per_chunk=35, seed=5)
    families = {"amber": Family(AmberConfig, AdamWConfig)}
    loop.train(tiny, tmp_path, data, families)
    step = loop.Log.step

    def killed(log, number, values):
        if number == 5:
            raise KeyboardInterrupt
        step(log, number, values)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Log, "step", killed)
        patch.setattr(storage.Lease, "release", lambda lease: lease._end.set())  # as a kill: it just falls silent
        with pytest.raises(KeyboardInterrupt):
            loop.train(tiny, place, data, families)
    assert (place / ".lock").exists()
    assert max(r["step"] for r in read_lines(place / "metrics.jsonl")) == 3, "what was sent before the last save"
    outcome = loop.train(tiny, place, data, families)
    assert (outcome.reason, outcome.resumed_from) == ("finished", 4)
    known = lambda run: [  # noqa: E731
        (r["kind"], r["step"], r["loss"]) for r in read_lines(run / "metrics.jsonl")
    ]
    assert known(place) == known(tmp_path)
    ours, theirs = ([(e.manifest.digests, e.manifest.loss) for e in Series(run).entries()] for run in (place, tmp_path))
    assert ours == theirs
    events = [e["event"] for e in read_lines(place / "ledger.jsonl")]
    assert events[0] == "start"
    assert events[-1] == "finish"
    assert "resume" in events
    assert storage.folders(place)[-1].name == "tensorboard"
    assert storage.listing(place / "tensorboard")
