"""A data directory while it is being made: whose it is, what is done, and when it is whole.

Until its manifest is written, DATA/work.part holds what was begun and the journals of what is finished. The same
command goes on with it; another one is refused, as is anything that is not ours.
"""

import fcntl
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from data.chunks import FORMAT, MANIFEST, DataManifest, written
from errors import RunError, UserError

WORK = "work.part"


def finished(out: Path, config_sha256: str, log: Callable[[str], object]) -> DataManifest | None:
    """Return the manifest of a directory that is whole, None if it is not there; UserError if it is of another request.

    Raises RunError when one of its files is missing.
    """
    if not (out / MANIFEST).exists():
        return None
    manifest = DataManifest.load(out)
    if manifest.config_sha256 != config_sha256:
        raise UserError(
            f"{out} holds data prepared for {manifest.recipe} from another configuration; it is never overwritten: "
            "choose another --out, or delete the folder yourself"
        )
    for file in manifest.files:
        file.check_size(out)
    shutil.rmtree(out / WORK, ignore_errors=True)
    log(f"{out}: already prepared from this configuration, nothing to do")
    return manifest


@contextmanager
def working(out: Path, sha256: str) -> Iterator[Path]:
    """Yield the work folder of a directory that is being made.

    `sha256` is of what must be the same to go on. The folder goes when the block ends well. Raises UserError when the
    directory is of another request, not ours, or another process on this machine is at work in it, and RunError for a
    full disk.
    """
    work = out / WORK
    claim = json.dumps({"sha256": sha256, "format": FORMAT}) + "\n"
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not work.is_dir():
            raise UserError(f"{out} exists and was not begun by prepare; choose another --out or an empty folder")
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            _hold(lock, out)
            path = work / "claim.json"
            if path.exists() and path.read_text() != claim:
                raise UserError(
                    f"{out} holds an unfinished data set of other sources or another tokenizer; give those to go on "
                    "with it (and the same recipe, vocabulary, --compat and --max-mb-per-source), or choose another "
                    "--out, or delete the folder"
                )
            for torn in out.rglob("*.part"):  # what a kill left half written
                if torn.is_file():
                    torn.unlink()
            with written(path) as part:
                part.write_text(claim)
            yield work
            shutil.rmtree(work)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error}); free space and run the same command again") from error


def share(value: Any, work: Path) -> Path:
    """Write a value for the tasks of all processes to read with `shared`: once, not in each of thousands of tasks."""
    path = work / f"shared-{uuid4().hex}.pickle"  # a name of its own: processes keep what they have read
    with written(path) as part:
        part.write_bytes(pickle.dumps(value))
    return path


@lru_cache(maxsize=1)
def shared(path: Path) -> Any:
    """Return what `share` wrote, read once in each process."""
    with open(path, "rb") as file:
        return pickle.load(file)  # written by this very command, in its own work folder


def _hold(lock: IO[str], out: Path) -> None:
    """Hold a lock that the system drops however this process ends: two writers of one file would spoil it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another process prepares it; wait until it ends, or stop it") from None
    except OSError:
        return  # a file system without locks: nothing is worse than before
