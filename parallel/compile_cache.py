"""Compiled programs on the disk, so that a second start of the same thing compiles nothing.

JAX looks programs up by a hash of everything that goes into them (the program, the compiler's options and version, the
devices). What it lacks and is here: an entry appears whole or not at all, whatever kills the process; a damaged one is
found by its SHA-256, removed, and compiled anew; the folder has a bound; and one that cannot be used costs one line on
stderr and nothing else.
"""

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import UserError

#: Environment variable that names the folder, or "off".
VARIABLE = "LLM360_COMPILE_CACHE"
#: Largest sum of the entries' sizes; those that were not used for longest go first. A 7B step is 1 to 20 MB.
MOST_BYTES = 4 * 2**30
_SUFFIX = ".program"
_SUM_BYTES = 32  # SHA-256 of what follows it, at the beginning of an entry


def enable(where: str | None, note: Callable[[str], None]) -> Path | None:
    """Let JAX keep what it compiles from now on, and take from there what is kept. Starts no backend.

    Args:
        where: a folder, "off", or None: `VARIABLE`, then JAX's own setting (which is left as it is), then
            `llm360/compiled` in the user's cache directory.
        note: told, once, why nothing is kept.

    Returns:
        The folder in use: of `where`, the one for processors like this one. None: nothing is kept by us.

    Raises:
        UserError: `where` names a file.
    """
    chosen = where or os.environ.get(VARIABLE)
    if not chosen and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    if chosen != "off" and chosen and Path(chosen).is_file():
        raise UserError(f"--compile-cache {chosen}: is a file; give a folder, or off")
    import jax
    from jax._src import compilation_cache  # its store of entries has no public name

    compilation_cache.reset_cache()
    if chosen == "off":
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    path = (Path(chosen) if chosen else _user_cache() / "llm360" / "compiled").absolute() / processor()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        note(f"{path}: compiled programs are not kept: {e.strerror}")
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs take most of a start
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache._cache, compilation_cache._cache_initialized = _cache_of(path, note), True
    return path


def hits() -> int:
    """Programs that this process found compiled so far."""
    from jax._src import compilation_cache

    return getattr(compilation_cache._cache, "hits", 0)


def processor() -> str:
    """A name for processors that run the same code: a program compiled for another one can end in SIGILL."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        # "flags" on x86, "Features" on Arm. Of the virtual machine's own, none changes what code is made.
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        features = platform.processor()
    known = " ".join(sorted(features.partition(":")[2].split()) or [features])
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"


def _user_cache() -> Path:
    """The user's cache directory; raises nothing where there is no home."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir())


def _cache_of(path: Path, note: Callable[[str], None]) -> Any:
    from jax._src.compilation_cache_interface import CacheInterface

    class Programs(CacheInterface):
        """What JAX asks for entries and gives them to."""

        def __init__(self) -> None:
            self._path = path  # JAX's name for it
            self.hits = 0
            self._writes = True

        def get(self, key: str) -> bytes | None:
            file = path / f"{key}{_SUFFIX}"
            try:
                raw = file.read_bytes()
            except OSError:
                return None
            value = raw[_SUM_BYTES:]
            if hashlib.sha256(value).digest() != raw[:_SUM_BYTES]:
                file.unlink(missing_ok=True)
                return None
            with contextlib.suppress(OSError):  # somebody else's, or gone: it was read all the same
                os.utime(file)  # used now
            self.hits += 1
            return value

        def put(self, key: str, value: bytes) -> None:
            if not self._writes:
                return
            part = None
            try:
                _make_room(path, len(value))
                with tempfile.NamedTemporaryFile(dir=path, suffix=".part", delete=False) as file:
                    part = Path(file.name)
                    file.write(hashlib.sha256(value).digest() + value)
                part.replace(path / f"{key}{_SUFFIX}")
            except OSError as e:
                self._writes = False
                note(f"{path}: compiled programs are kept no longer: {e.strerror}")
                if part is not None:
                    part.unlink(missing_ok=True)

    return Programs()


def _make_room(path: Path, needed: int) -> None:
    """Remove the entries that were not used for longest, until so many bytes more are within the bound."""
    found = []
    for file in path.iterdir():
        try:
            stat = file.stat()
        except FileNotFoundError:  # another process removed it
            continue
        found.append((stat.st_mtime, stat.st_size, file))
    excess = sum(size for _, size, _ in found) + needed - MOST_BYTES
    for _, size, file in sorted(found):
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= size
