"""A folder in Hugging Face's layout: its configuration, and its tensors wherever they lie, read when asked for."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from huggingface import pickles, safetensors
from huggingface.safetensors import parse_json
from huggingface.tensors import TensorInfo, read

__all__ = ["Folder", "TensorInfo"]

_Scan = Callable[[Path], dict[str, TensorInfo]]
_FAMILIES: list[tuple[str, str, _Scan]] = [
    ("model", "safetensors", safetensors.scan),
    ("pytorch_model", "bin", pickles.scan),
]
_GIT_LFS = b"version https://git-lfs"


class Folder:
    """A checkpoint folder, checked as far as that takes no reading of tensors.

    Safetensors come before ``.bin`` files, and an index before anything it does not name.

    Raises:
        UserError: anything is missing, damaged, or contradicts the rest.
    """

    path: Path
    config: dict[str, Any]
    """What ``config.json`` says."""
    tensors: dict[str, TensorInfo]
    """Every tensor of the weight files by its name."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such folder; give one with config.json and weights, as `hf download` makes")
        config = self.path / "config.json"
        try:
            if not config.exists():
                raise UserError(f"{config}: is missing; it comes with the weights")
            self.config = _json(config)
            scan, index, shards = _find(self.path)
            holds = {file: _scan(file, scan) for file in shards}
        except OSError as e:
            raise UserError(f"{e.filename or self.path}: cannot be read ({e.strerror})") from e
        self._files = [config, *([index] if index else []), *shards]
        _check_places(self.path, {file.name: list(tensors) for file, tensors in holds.items()}, index)
        self.tensors = {name: info for tensors in holds.values() for name, info in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor as a new C-contiguous array in its stored dtype. May be called from several threads at once.

        Raises:
            UserError: there is no such tensor.
            RunError: the file changed or cannot be read any more.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path}: has no tensor {name!r} among its {len(self.tensors)}")
        return read(self.tensors[name])

    def files(self) -> list[Path]:
        """The files that this folder's content comes from: ``config.json``, the index if there is one, the weights."""
        return list(self._files)


def _find(path: Path) -> tuple[_Scan, Path | None, list[Path]]:
    """How to scan the weights, their index, and their files."""
    for stem, suffix, scan in _FAMILIES:
        index, single = path / f"{stem}.{suffix}.index.json", path / f"{stem}.{suffix}"
        if index.is_file():
            return scan, index, [path / name for name in sorted(set(_weight_map(index).values()))]
        if single.is_file():
            return scan, None, [single]
        if shards := _complete(path, rf"{stem}-([0-9]{{5}})-of-([0-9]{{5}})\.{suffix}"):
            return scan, None, shards
    expected = " or ".join(f"{stem}.{suffix}" for stem, suffix, _ in _FAMILIES)
    raise UserError(f"{path}: no weights in it; expected {expected}, or their shards")


def _weight_map(index: Path) -> dict[str, str]:
    """Shard by tensor, from an index all of whose shards are there."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and name for name in places.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    for name in sorted(set(places.values())):
        if name != Path(name).name or "\0" in name:
            raise UserError(f"{index}: names {name!r}, which is not a file of the same folder")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: names {name!r}, which is missing; fetch it")
    return places


def _complete(path: Path, pattern: str) -> list[Path]:
    """The shards 1 to N of a folder that has no index, by their names; empty if there is none."""
    shards = {(int(m[1]), int(m[2])): p for p in sorted(path.iterdir()) if (m := re.fullmatch(pattern, p.name))}
    if not shards:
        return []
    some = next(iter(shards.values())).name
    totals = {total for _, total in shards}
    if len(totals) > 1:
        raise UserError(f"{path}: holds shards of sets of {' and of '.join(map(str, sorted(totals)))}; keep one set")
    total = totals.pop()
    if lost := next((k for k in range(1, total + 1) if (k, total) not in shards), None):
        raise UserError(f"{path}: shard {lost} of {total} is missing beside {some}, and so is the index; fetch them")
    if len(shards) > total:
        raise UserError(
            f"{path}: holds {len(shards)} shards named as of {total}, such as {some}; remove those too many"
        )
    return [shards[key] for key in sorted(shards)]


def _scan(file: Path, scan: _Scan) -> dict[str, TensorInfo]:
    with open(file, "rb") as raw:
        if raw.read(len(_GIT_LFS)) == _GIT_LFS:
            raise UserError(f"{file}: is a pointer of Git LFS, not the file; run `git lfs pull` in its folder")
    return scan(file)


def _check_places(path: Path, holds: dict[str, list[str]], index: Path | None) -> None:
    """Refuse a tensor that is in two files, or not in just the one that the index says."""
    found: dict[str, list[str]] = {}
    for file, names in holds.items():
        for name in names:
            found.setdefault(name, []).append(file)
    expected = _weight_map(index) if index else {name: files[0] for name, files in found.items()}
    problems = [
        f"{name!r} expected in {expected.get(name, 'no file')}, found in {' and '.join(found.get(name, ['none']))}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != [expected.get(name)]
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        said = f"{index}: its files hold other tensors than it says" if index else f"{path}: holds a tensor twice"
        raise UserError(f"{said}: {'; '.join(problems[:5])}{more}. Fetch the folder again")


def _json(file: Path) -> dict[str, Any]:
    return parse_json(file.read_bytes(), str(file))
