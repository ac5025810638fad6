"""Proof that a Hugging Face folder and a checkpoint of ours hold the same model.

Both sides are read back from the disk, one layer in memory at a time. Every number is compared through a digest of each
tensor, taken of their bytes where they lie and of ours. And as a wrong table of names would pass that, both sides also
*run*: theirs in NumPy by their names and their layout (`Format.reference`), ours by our model.
"""

import dataclasses
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import digest
from errors import RunError
from huggingface.folder import Folder
from huggingface.mapping import Format
from huggingface.transformers_logits import NOT_USABLE
from inference import layerwise
from layers.model import ModelConfig

#: Largest difference of two logits over the largest logit; float32 through 32 layers leaves much less.
TOLERANCE = 1e-4
_ROWS, _LENGTH = 2, 16

Read = Callable[[str, int | None], np.ndarray]
Described = Mapping[str, tuple[tuple[int, ...], np.dtype]]


@dataclasses.dataclass(frozen=True)
class Parity:
    """What was compared. Digests and logits agree, or this would not exist."""

    tensors: int
    """Ours; layers are stacked."""
    parameters: int
    digests: dict[str, str]
    """Of each of our tensors as it is compared, in the dtype of the folder's."""
    digest: str
    """Of all of them."""
    tokens: list[list[int]]
    """What the logits are of."""
    largest_logit: float
    largest_difference: float
    """Between the logits of both sides."""
    tolerance: float
    """Of the difference, over the largest logit."""
    transformers: dict[str, Any]
    """``version`` and ``largest_difference`` to our logits, or ``skipped`` and why."""

    def summary(self) -> str:
        """One line."""
        other = self.transformers
        theirs = f"skipped ({other['skipped']})" if "skipped" in other else f"{other['largest_difference']:.1e}"
        return (
            f"parity: {self.tensors} tensors, {self.parameters:,} parameters equal bit for bit; logits differ by at "
            f"most {self.largest_difference:.1e} (largest {self.largest_logit:.2f}); transformers: {theirs}"
        )


def check(
    form: Format, folder: Folder, model: ModelConfig, described: Described, read: Read, transformers: bool
) -> Parity:
    """Compare a folder with parameters of ours.

    Args:
        form: the folder's format.
        folder: theirs.
        model: the architecture of both.
        described: shape (of all layers) and dtype of each of ours, by name.
        read: gives one of ours, of one layer where they are stacked.
        transformers: compare with its logits too, where it is installed.

    Raises:
        RunError: they are not the same model; says which tensors or by how much.
    """
    rows = {row.theirs: row for row in form.tensors(model)}
    theirs, ours = _Digests(described), _Digests(described)

    def read_theirs(name: str) -> np.ndarray:
        tensor = folder.read(name)
        for ours_name, part, offset, strides in rows[name].pieces(tensor):
            theirs.add(ours_name, part, offset, strides)
        return tensor

    def read_ours(name: str, layer: int | None) -> np.ndarray:
        array = read(name, layer)
        ours.add(name, array, (layer or 0) * array.size)
        return array

    tokens = (np.arange(_ROWS * min(_LENGTH, model.context_length)) * 7919 + 13).reshape(_ROWS, -1) % model.vocab_size
    expected = form.reference(folder.config, read_theirs, tokens)
    found = layerwise.logits(model, read_ours, tokens)
    first, second = theirs.finish(), ours.finish()
    if different := [name for name in described if first[name] != second[name]]:
        raise RunError(
            f"{folder.path}: {len(different)} tensors do not hold the same numbers as the checkpoint: "
            f"{', '.join(different[:5])}; nothing is kept. A disk or memory may be failing: try again, and report it"
        )
    largest, difference = float(np.max(np.abs(expected))), float(np.max(np.abs(expected - found)))
    _refuse(folder, "the folder's own mathematics", difference, largest)
    parameters = sum(int(np.prod(shape)) for shape, _ in described.values())
    return Parity(
        tensors=len(described),
        parameters=parameters,
        digests=second,
        digest=digest.whole(second),
        tokens=tokens.tolist(),
        largest_logit=largest,
        largest_difference=difference,
        tolerance=TOLERANCE,
        transformers=_transformers(folder, tokens, found, parameters) if transformers else {"skipped": "not asked for"},
    )


class _Digests:
    """Digests of tensors that come in pieces; of a piece that comes again the first counts."""

    def __init__(self, described: Described):
        self._described = described
        self._lanes: dict[str, np.ndarray] = {}
        self._seen: set[tuple[str, int]] = set()

    def add(self, name: str, part: np.ndarray, offset: int, strides: tuple[int, ...] | None = None) -> None:
        if (name, offset) in self._seen:
            return
        self._seen.add((name, offset))
        lanes = digest.partial(part.astype(self._described[name][1], copy=False), offset, strides)
        self._lanes[name] = self._lanes[name] + lanes if name in self._lanes else lanes

    def finish(self) -> dict[str, str]:
        return {n: digest.finish(n, shape, dtype, self._lanes[n]) for n, (shape, dtype) in self._described.items()}


def _refuse(folder: Folder, what: str, difference: float, largest: float) -> None:
    if not difference <= TOLERANCE * largest:  # also where one of them is not a number
        raise RunError(
            f"{folder.path}: logits of the checkpoint differ from {what} by {difference:.3g}, where the largest is "
            f"{largest:.3g}; nothing is kept"
        )


def _transformers(folder: Folder, tokens: np.ndarray, found: np.ndarray, parameters: int) -> dict[str, Any]:
    """Compare with transformers, in a process of its own, where it is installed, knows the model and has the memory."""
    if folder.config.get("model_type") != "llama":
        return {"skipped": "it knows Llama only, without running a folder's code"}
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return {"skipped": "transformers and torch are not installed"}
    needed = parameters * 4 * 1.2 + 1.5e9
    if (free := _available_memory()) < needed:
        return {"skipped": f"it would need {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"}
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "tokens.npy"), Path(scratch, "logits.npy")
        np.save(inputs, tokens)
        command = [sys.executable, "-m", "huggingface.transformers_logits", str(folder.path.resolve())]
        done = subprocess.run(
            [*command, str(inputs), str(outputs)], cwd=Path(__file__).parent.parent, capture_output=True, text=True
        )
        if done.returncode == NOT_USABLE:
            return {"skipped": f"it is installed but cannot be imported: {done.stderr.strip()[-300:]}"}
        if done.returncode:
            said = done.stderr.strip()[-800:]
            raise RunError(f"{folder.path}: transformers cannot run it; --no-transformers leaves it out: {said}")
        difference = float(np.max(np.abs(np.load(outputs) - found)))
    _refuse(folder, f"those of transformers {done.stdout.strip()}", difference, float(np.max(np.abs(found))))
    return {"version": done.stdout.strip(), "largest_difference": difference}


def _available_memory() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return 0.0
