"""Where runs are kept: on a disk, or as objects of Google Cloud Storage. The one place that knows the difference.

A run directory is a `pathlib.Path`, or for ``gs://bucket/run`` an `etils.epath.Path`, which has the same methods and
which Orbax takes too. What is different is here. Objects appear whole or not at all and are seen by all at once; but
there are no folders, only names with slashes, nothing can be locked, and to append is to make a new object.

S3 is refused: Orbax 0.12.8 would write such checkpoints without a word into a local folder called "s3:".
"""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from errors import RunError, UserError

_THREADS = 8  # requests under way at once; Google's client keeps ten connections
_TRIALS = 5  # to append, if others append to the same object
_PIECE = 8 * 2**20  # bytes, of an object that is read from one end to the other
_BEAT_S = 5.0
_SILENCE_S = 20.0
"""A holder of `Lease` that has said nothing for so long is taken for dead."""


def path(text: str | os.PathLike[str]) -> Path:
    """The path that a person wrote; asks no server.

    Raises:
        UserError: another kind of storage than a disk or ``gs://bucket/folder``; or what that needs is not installed.
    """
    if isinstance(text, Path) or is_remote(text):
        return cast(Path, text)
    scheme, separator, rest = os.fspath(text).partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return Path(text)
    if scheme != "gs":
        raise UserError(
            f"{text}: runs are kept on a disk or in gs://BUCKET/FOLDER, not in {scheme}://. Mount such a bucket as a "
            "folder, or copy the finished checkpoints there"
        )
    bucket, _, folder = rest.partition("/")
    if not bucket or not folder.strip("/"):
        raise UserError(f"{text}: name a folder in a bucket, gs://BUCKET/FOLDER")
    try:
        import fsspec
        import gcsfs  # noqa: F401
        from etils import epath
    except ImportError as e:
        raise UserError(f"{text}: needs packages that are not here ({e}); pip install 'llm360-jax[storage]'") from e
    # fsspec keeps listings for as long as a process lives, and other processes write in this bucket too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return cast(Path, epath.Path(f"gs://{bucket}/{folder.strip('/')}"))


def local(text: str | os.PathLike[str]) -> Path:
    """The same, where only a disk will do.

    Raises:
        UserError: it is a URL.
    """
    if "://" in os.fspath(text):
        raise UserError(f"{text}: must be on a disk; only run directories can be in gs://BUCKET/FOLDER")
    return Path(text)


def reach(place: Path) -> Path:
    """The path again, once it is known that its bucket answers.

    Raises:
        UserError: it does not, with the reason.
    """
    if is_remote(place):
        try:
            with _plain_errors(place):
                next(iter(_client().list_blobs(_split(place)[0], prefix=_split(place)[1] + "/", max_results=1)), None)
        except OSError as e:
            raise UserError(
                f"{place}: cannot be reached ({e.strerror}); look at the bucket's name and your login"
            ) from e
    return place


def is_remote(place: Any) -> bool:
    """Whether it is a path to objects."""
    return not isinstance(place, str | Path) and os.fspath(place).startswith("gs://")


def absolute(place: Path) -> Path:
    """The path, whatever the current directory."""
    return place if is_remote(place) else place.absolute()


def kvstore(folder: Path) -> dict[str, Any]:
    """What tensorstore calls a folder."""
    if not is_remote(folder):
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    bucket, name = _split(folder)
    return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}


def folders(parent: Path) -> list[Path]:
    """The folders in a folder, sorted; none if it is not there."""
    if not is_remote(parent):
        return sorted(p for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    bucket, name = _split(parent)
    with _plain_errors(parent):
        found = _client().list_blobs(bucket, prefix=f"{name}/", delimiter="/")
        for _ in found:  # the folders are known once all pages are there
            pass
        return sorted(parent / prefix.rstrip("/").rpartition("/")[2] for prefix in found.prefixes)


def listing(root: Path) -> list[str]:
    """Relative POSIX paths of all files below a folder, sorted."""
    if not is_remote(root):
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir())
    return sorted(_sizes(root))


def sizes(root: Path, names: Iterable[str]) -> list[int]:
    """Bytes of files below a folder."""
    if not is_remote(root):
        return [(root / name).stat().st_size for name in names]
    found = _sizes(root)  # one request for a thousand files
    if gone := [name for name in names if name not in found]:
        raise FileNotFoundError(errno.ENOENT, "is gone", os.fspath(root / gone[0]))
    return [found[name] for name in names]


def stamp(file: Path) -> tuple[int, ...]:
    """Changes when the file does.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not is_remote(file):
        stat = file.stat()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    with _plain_errors(file):
        blob = _blob(file)
        blob.reload()
        return (int(blob.generation),)


def each(root: Path, function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """The function of every value; below a remote folder, where each waits for a server, many at once."""
    if not is_remote(root):
        return [function(value) for value in values]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, values))


@contextlib.contextmanager
def reading(file: Path) -> Iterator[Any]:
    """An open file, to read bytes from its beginning. Raises OSError."""
    if not is_remote(file):
        with file.open("rb") as stream:
            yield stream
    else:
        with _plain_errors(file), _blob(file).open("rb", chunk_size=_PIECE) as stream:
            yield stream


def read(file: Path) -> bytes:
    """All of a file. Raises OSError."""
    if not is_remote(file):
        return file.read_bytes()
    with _plain_errors(file):
        return _blob(file).download_as_bytes()


def write(file: Path, content: bytes) -> None:
    """Make an object, or replace it by a new one."""
    with _plain_errors(file):
        _blob(file).upload_from_string(content, "application/octet-stream")


def append(file: Path, content: str | bytes) -> None:
    """Add to a file. Raises OSError."""
    data = content.encode() if isinstance(content, str) else content
    if not is_remote(file):
        with file.open("ab") as stream:
            stream.write(data)
        return
    with _plain_errors(file):
        whole = _blob(file)
        if not whole.exists():
            whole.upload_from_string(data, "application/octet-stream", if_generation_match=0)
            return
        part = _blob(file.with_name(f"{file.name}.{uuid.uuid4().hex}.part"))
        part.upload_from_string(data, "application/octet-stream")
        for trial in range(_TRIALS):
            whole.reload()
            try:  # joined in the bucket: what is there already is not sent again
                _blob(file).compose([whole, part], if_generation_match=whole.generation)
                break
            except (
                _api_errors().PreconditionFailed
            ):  # somebody else wrote; or it was done, and only the answer was lost
                size = whole.size
                whole.reload()
                if whole.size >= size + len(data) and whole.download_as_bytes(start=size)[: len(data)] == data:
                    break
                if trial == _TRIALS - 1:
                    raise
        part.delete()


def remove(folder: Path, ignore_errors: bool = False) -> None:
    """Delete a folder and all in it."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return

    def delete(blob: Any) -> None:
        with contextlib.suppress(_api_errors().NotFound):
            blob.delete()

    with contextlib.suppress(OSError) if ignore_errors else contextlib.nullcontext(), _plain_errors(folder):
        each(folder, delete, _blobs(folder))


class Lease:
    """The right to write in a remote run: the object ``.lock``, which its holder writes again every few seconds.

    One that is there is watched: a holder that writes is alive; one that is silent for 20 s is dead, and its lease is
    taken. No clocks are compared. Each change is conditional on what was there before, so that of two only one
    succeeds; and a holder that comes back to life finds out before it commits anything (`check`).

    Raises:
        UserError: another process holds it.
        RunError: the bucket cannot be written.
    """

    def __init__(self, run: Path):
        self._run, self._name, self._beats = run, uuid.uuid4().hex, 0
        self._beaten = 0.0
        self._blob = _blob(run / ".lock")
        self._generation = 0
        self._lost = False
        self._turn = threading.Lock()
        self._end = threading.Event()
        try:
            self._generation = self._wait_until_free()
            with self._turn:
                self._beat()
        except OSError as e:
            raise RunError(f"{run}: cannot be written ({e.strerror})") from e
        if self._lost:
            raise UserError(f"{run}: another process has just begun to write in it; give another run directory")
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that it is still held.

        Raises:
            RunError: it is not, or nobody can tell.
        """
        try:
            with self._turn:
                if time.monotonic() - self._beaten > 2 * _BEAT_S:  # else nobody can have seen it silent for long
                    self._beat()
        except OSError as e:
            raise RunError(f"{self._run}: cannot be written ({e.strerror}); run the same command again") from e
        if self._lost:
            raise RunError(
                f"{self._run}: another process took this run over, because this one was not heard of for "
                f"{_SILENCE_S:g} seconds; this one writes nothing more"
            )

    def release(self) -> None:
        """Let others write."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it expires anyway
            if not self._lost:
                self._blob.delete(if_generation_match=self._generation)

    def _wait_until_free(self) -> int:
        """Generation of the object to replace, 0 if there is none."""
        first, since = None, time.monotonic()
        while True:
            with _plain_errors(self._run):
                there = self._blob.bucket.get_blob(self._blob.name)
            if there is None:
                return 0
            if first is not None and there.generation != first:
                raise UserError(
                    f"{self._run}: process {self._holder()} writes in it; wait until it ends, stop it, or give another "
                    "run directory"
                )
            first = there.generation
            if time.monotonic() - since > _SILENCE_S:
                return int(first)
            time.sleep(min(1.0, _BEAT_S / 5))

    def _holder(self) -> str:
        try:
            return str(json.loads(self._blob.download_as_bytes())["holder"])
        except Exception:  # gone meanwhile; it is only to be named
            return "unknown"

    def _beat(self) -> None:
        if self._lost:
            return
        self._beats += 1
        begin = time.monotonic()
        holder = f"{os.getpid()} on {socket.gethostname()}"
        text = json.dumps({"holder": holder, "name": self._name, "beats": self._beats})
        with _plain_errors(self._run):
            try:
                self._blob.upload_from_string(text, "application/json", if_generation_match=self._generation)
            except _api_errors().PreconditionFailed:
                there = self._blob.bucket.get_blob(self._blob.name)
                ours = there is not None and json.loads(there.download_as_bytes()).get("name") == self._name
                self._lost = not ours  # ours: it was done, and only the answer was lost
                if ours:
                    self._generation, self._beaten = int(there.generation), begin
                return
            self._generation, self._beaten = int(self._blob.generation), begin

    def _live(self) -> None:
        while not self._end.wait(_BEAT_S):
            with contextlib.suppress(OSError), self._turn:  # a network that fails now may work in a moment
                self._beat()


def _split(place: Path) -> tuple[str, str]:
    bucket, _, name = os.fspath(place).removeprefix("gs://").partition("/")
    return bucket, name


@functools.cache
def _client() -> Any:
    from google.cloud import storage

    return storage.Client()


def _api_errors() -> Any:
    from google.api_core import exceptions

    return exceptions


def _blob(file: Path) -> Any:
    bucket, name = _split(file)
    with _plain_errors(file):
        return _client().bucket(bucket).blob(name)


def _sizes(folder: Path) -> dict[str, int]:
    return {blob.name[len(_split(folder)[1]) + 1 :]: blob.size for blob in _blobs(folder)}


def _blobs(folder: Path) -> list[Any]:
    bucket, name = _split(folder)
    with _plain_errors(folder):
        return list(_client().list_blobs(bucket, prefix=f"{name}/"))


@contextlib.contextmanager
def _plain_errors(place: Path) -> Iterator[None]:
    """Google's errors as those of a disk, which callers know."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.strerror:
            raise
        text = " ".join(str(e).split())[:300] or type(e).__name__
        if isinstance(e, _api_errors().NotFound):
            raise FileNotFoundError(errno.ENOENT, text, os.fspath(place)) from e
        raise OSError(errno.EIO, text, os.fspath(place)) from e
