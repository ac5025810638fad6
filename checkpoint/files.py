"""Files that must be what they were: hashes, atomic writes, removal that a crash cannot misread, a lock."""

import fcntl
import hashlib
import os
import re
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpoint import storage
from errors import RunError, UserError

_THREADS = 8  # hashlib releases the GIL; more threads than cores hide the latency of network disks


def listing(root: Path) -> list[str]:
    """Relative POSIX paths of all files below a folder, sorted."""
    return storage.listing(root)


def hashes(root: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``{"bytes": int, "sha256": str}`` of each file by its relative path."""

    def one(name: str) -> tuple[str, dict[str, Any]]:
        with storage.reading(root / name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return name, {"bytes": file.tell(), "sha256": digest}

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(one, names))


def differences(root: Path, expected: dict[str, dict[str, Any]], found: Iterable[str]) -> list[str]:
    """What is wrong with the files ``found`` below a folder, one sentence per file; empty if they are as expected.

    Args:
        root: the folder.
        expected: as from `hashes`.
        found: the relative paths that are there.
    """
    there = set(found)
    problems = dict.fromkeys(expected.keys() - there, "is missing")
    problems |= dict.fromkeys(there - expected.keys(), "is not part of it")
    both = sorted(expected.keys() & there)
    for name, size in zip(both, storage.sizes(root, both), strict=True):
        if size != (wanted := expected[name]["bytes"]):
            problems[name] = f"has {size:,} bytes instead of {wanted:,}"
    # Largest first, so that no thread starts on the largest file when the others are done.
    whole = sorted(expected.keys() & there - problems.keys(), key=lambda name: -expected[name]["bytes"])
    for name, now in hashes(root, whole).items():
        if now["sha256"] != expected[name]["sha256"]:
            problems[name] = "has other bytes (SHA-256 differs)"
    return [f"{name} {problem}" for name, problem in sorted(problems.items())]


def damaged(folder: Path, problems: list[str]) -> RunError:
    """What to tell about a checkpoint with such `differences`."""
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return RunError(
        f"{folder}: damaged: {'; '.join(problems[:5])}{more}. Put back an intact copy, or remove the folder"
    )


def reason(error: BaseException) -> str:
    """The useful end of an exception chain, on one line: Orbax hides tensorstore's message in the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\s*\[(tensorstore_spec|source locations)=.*", "", " ".join(str(error).split()))
    return (text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}") or type(error).__name__


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole, on the disk, or not at all."""
    if storage.is_remote(path):  # as every object
        storage.write(path, content.encode() if isinstance(content, str) else content)
        return
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name as well
    finally:
        os.close(folder)


def remove(folder: Path, marker: str) -> None:
    """Delete a folder, the file ``marker`` first: a folder without it counts for nothing if the rest is interrupted."""
    (folder / marker).unlink(missing_ok=True)
    storage.remove(folder)


def lock(run: Path) -> "Lock | storage.Lease":
    """Take the right to write in a run directory. Raises as the two do."""
    return storage.Lease(run) if storage.is_remote(run) else Lock(run)


class Lock:
    """The right to write in a run directory: an advisory lock that the system drops however the process ends.

    Raises:
        UserError: another process holds it.
        RunError: the directory cannot be made or locked.
    """

    def __init__(self, run: Path):
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._file = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise RunError(f"{run}: cannot be made or written ({e.strerror})") from e
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BlockingIOError as e:
            holder = os.pread(self._file, 300, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise UserError(
                f"{run}: process {holder} writes in it; wait until it ends, stop it, or give another run directory"
            ) from e
        except OSError as e:
            os.close(self._file)
            raise RunError(f"{run}/.lock: cannot be locked ({e.strerror})") from e

    def check(self) -> None:
        """Make sure that it is still held, which the system does."""

    def release(self) -> None:
        """Let others write."""
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)
