"""The manifest: a record beside a checkpoint that says exactly what it is. A checkpoint counts once it has one.

The file is canonical JSON (sorted keys, no spaces) that holds its own SHA-256, because nothing else guards it: with a
flipped bit in a learning rate it would still be valid JSON.
"""

import dataclasses
import hashlib
import json
import math
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from errors import RunError, UserError

# 3 had digests of version 1; 2 had no digests of whole items and no kind "early"; 1 had no origin, no digests, and
# always data.
VERSION = 4
FILE = "manifest.json"
Kind = Literal["series", "early", "rolling"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kept for ever; extra ones before the first of those, of parameters alone; kept until the next, to resume from."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "grain", "array_record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is, where it came from, and every byte it consists of."""

    index: int
    """Place in the series: 0 after the first chunk, -1 before the first step. Of the other kinds: that of the newest
    series checkpoint at or before it."""
    name: str
    """Folder name: of the series "init", "007" or what the recipe says; of the other kinds the step, eight digits."""
    kind: Kind
    phase: int
    """Part of the run with its own data mixture and schedule, from 0."""
    step: int
    """Updates done."""
    tokens: int
    """Tokens seen since the start of the run."""
    chunk: int | None
    """Data chunk of the last step; None before the first."""
    samples: tuple[int, int]
    """Samples [start, stop) of the run consumed since the parent."""
    parent: str | None
    """Name of the series checkpoint before this one."""
    parent_sha256: str | None
    """SHA-256 of the parent's manifest file."""
    config_sha256: str
    data_sha256: str | None
    """None for imported weights."""
    mesh: dict[str, int]
    """Degree of each mesh axis of the devices that held the arrays."""
    device_kind: str
    process_count: int
    code_version: str
    versions: dict[str, str]
    """Package versions, see `environment`."""
    learning_rate: float
    """Of the last step."""
    loss: dict[str, float]
    """"mean" and "last" since the parent; empty without steps."""
    wall_time: float
    """Seconds since 1970 when the save began."""
    tensors: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """"ITEM/NAME" (also the array's folder) -> {"shape": [int], "dtype": str, "digest": str}; items are those of
    `checkpoint.arrays.ITEMS`. The digest, of NAME and the array (`checkpoint.digest`), may be missing in old ones."""
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Path in the checkpoint -> {"bytes": int, "sha256": str}; every file but the manifest."""
    origin: dict[str, Any] | None = None
    """Where imported weights came from (format, folder, files and their hashes, …); None for trained ones."""
    parent_index: int | None = None
    """Index of the parent."""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """Item -> `checkpoint.digest.whole` of the digests of its arrays; empty in old manifests."""
    digest_version: int = 1
    """Of the digests here (`checkpoint.digest.VERSION`); manifests of version 3 and before do not say it."""
    version: int = VERSION

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"manifest: kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.index < -1 or self.step < 0:
            raise UserError(f"manifest: index {self.index} or step {self.step} is out of range (from -1, from 0)")
        expected = checkpoint_name(self.kind, self.index, self.step)
        named = self.kind == "series" and self.index >= 0 and not self.name.isdigit() and is_name(self.name)
        if self.name != expected and not named:
            raise UserError(
                f"manifest: name {self.name!r}, but {self.kind} index {self.index} at step {self.step} is {expected!r}"
            )
        if not all(math.isfinite(x) for x in (self.learning_rate, self.wall_time, *self.loss.values())):
            raise RunError(f"manifest {self.name}: learning rate, loss or time is not finite: {self.loss}")

    def to_json(self) -> str:
        """Canonical text of the manifest file; equal manifests give equal bytes."""
        body = dataclasses.asdict(self)
        return _canonical(body | {"sha256": _sha256(_canonical(body))}) + "\n"

    @classmethod
    def from_json(cls, raw: str | bytes, where: str = FILE) -> "Manifest":
        """Parse and check a manifest file's content; ``where`` names it in messages.

        Raises:
            UserError: written by a newer version of this code.
            RunError: damaged.
        """
        text = raw if isinstance(raw, str) else raw.decode(errors="replace")  # a replaced byte fails the hash below
        try:
            body = json.loads(text)
            claimed = body.pop("sha256")
            version = body["version"]
            whole = claimed == _sha256(_canonical(body)) and text == _canonical(body | {"sha256": claimed}) + "\n"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise RunError(_damaged(where, f"not a manifest: {e!r}")) from e
        if not whole:
            raise RunError(_damaged(where, "its text does not match its own SHA-256"))
        if version > VERSION:
            raise UserError(f"{where}: version {version}, but this code reads up to {VERSION}; update the code")
        try:
            return cls(**body | {"samples": tuple(body["samples"])})
        except (TypeError, KeyError, UserError, RunError) as e:
            raise RunError(_damaged(where, str(e))) from e


@dataclasses.dataclass(frozen=True)
class Entry:
    """A committed checkpoint."""

    path: Path
    manifest: Manifest
    sha256: str
    """SHA-256 of the manifest file, hex: names the checkpoint's content."""

    @property
    def is_placed(self) -> bool:
        """Whether step and tokens are known; of an imported checkpoint they may not be, and then say 0."""
        origin = self.manifest.origin
        return origin is None or bool(origin.get("position_known"))

    def has(self, item: str) -> bool:
        """Whether it holds an item, "params" or "optimizer"."""
        return any(name.startswith(item + "/") for name in self.manifest.tensors)


def read(directory: Path) -> Manifest:
    """The manifest of the checkpoint in a directory. Raises as `Manifest.from_json`; RunError if there is none."""
    path = directory / FILE
    try:
        return Manifest.from_json(path.read_bytes(), str(path))
    except OSError as e:
        raise RunError(f"{path}: cannot be read ({e.strerror}); is this a finished checkpoint?") from e


def checkpoint_name(kind: str, index: int, step: int) -> str:
    """Folder name of a checkpoint; of the series where the recipe has no names of its own."""
    if kind != "series":
        return f"{step:08d}"
    return "init" if index == -1 else f"{index:03d}"


def is_name(name: str) -> bool:
    """Whether a recipe may give a checkpoint of the series this name."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name) is not None and name not in ("init", "latest", "all")


def environment() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide what a step computes or a checkpoint holds."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_version() -> str:
    """Git commit of this code, with "-dirty" if tracked files differ; the package version where there is no git."""
    root = Path(__file__).resolve().parent.parent
    try:
        top, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").split("\n")
        if Path(top).resolve() == root:  # not some repository that an installed copy happens to lie in
            return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError, ValueError):
        pass
    try:
        return metadata.version("llm360-jax")
    except metadata.PackageNotFoundError:
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(where: str, why: str) -> str:
    return f"{where}: damaged ({why}); put back an intact copy of this checkpoint, or remove its folder"
