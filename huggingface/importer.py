"""A Hugging Face folder into the series of a run, tensor by tensor, and proven before it counts."""

import dataclasses
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoint import files
from checkpoint.manifest import Manifest, checkpoint_name, code_version, environment
from checkpoint.series import Series
from checkpoint.writer import SeriesWriter
from data import tokenizer as tokenizers
from data.tokenizer import Tokenizer
from errors import UserError
from huggingface import parity, published
from huggingface.folder import Folder
from huggingface.mapping import Format, Mapped
from huggingface.parity import Parity
from layers.model import ModelConfig
from parallel.mesh import MeshConfig
from training.config import Family, Position, RunConfig, model_from_dict, model_to_dict
from training.metrics import Ledger

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

#: What an import that was killed may leave in a run directory that it made; it is no run yet.
_LEFT_BY_A_KILL = (".lock", "config.json.part", "series")
_STRIP = 2**17  # elements; their temporaries fit the cache

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a folder goes in a run: what is known of it there."""

    run: Path
    model: ModelConfig
    recipe: RunConfig | None
    """None: the folder is of no known recipe, and its step, tokens and learning rate are not known."""
    index: int
    position: Position | None


def import_folder(
    source: Path,
    run: Path,
    formats: Mapping[str, Format],
    families: Mapping[str, Family],
    recipes: Mapping[str, Callable[[], RunConfig]],
    recipe: str | None,
    place: str | None,
    every: tuple[int, ...],
    transformers: bool,
    log: Log,
) -> tuple[Target, Parity, dict[str, float]]:
    """Add the checkpoint in a Hugging Face folder to the series of a run.

    Args:
        source: the folder.
        run: run directory; made if it is not there.
        formats: by ``model_type``.
        families: config classes by family name.
        recipes: by name; the one whose model the folder holds is found among them.
        recipe: or named here.
        place: index or published name; None takes the folder's name if it is a published one, else the next index.
        every: steps between series checkpoints of each phase, if not the recipe's.
        transformers: see `parity.check`.
        log: takes lines for people.

    Returns:
        Where it went, the proof, and seconds of copying and of proving.

    Raises:
        UserError: the folder is incomplete or of another architecture, or does not fit the run; nothing is left behind.
        RunError: what was written is not what the folder holds; nothing is left behind.
    """
    folder = Folder(source)
    form = formats.get(str(folder.config.get("model_type")))
    if form is None:
        kinds = " or ".join(map(repr, formats))
        raise UserError(f"{source}/config.json: model_type is {folder.config.get('model_type')!r}, expected {kinds}")
    try:
        target = _target(folder, form, run, families, recipes, recipe, place, every)
        if target.model.num_layers > len(folder.tensors):
            raise UserError(f"config.json says {target.model.num_layers} layers, and there are no tensors for so many")
        table = form.tensors(target.model)
        form.check_names(table, {name: t.shape for name, t in folder.tensors.items()})
        described = _described(folder, table, target.model)
    except UserError as e:
        raise UserError(f"{source}: {e}") from e
    tokenizer = _tokenizer(source, target)
    if run.exists() and any(e.manifest.index == target.index for e in Series(run).entries()):
        raise UserError(f"{run}: has a checkpoint {target.index} already; give another --as, or remove that one")

    kept: list[Path] = []
    with SeriesWriter(run) as writer:
        writer.clean()
        shapes = {name: (shape, dtype.name) for name, (shape, dtype) in described.items()}
        try:
            with writer.stream(_manifest(target), shapes) as stream, ThreadPoolExecutor(1, "hash") as pool:
                begin = time.monotonic()
                _copy(folder, form, table, described, stream.write, log)
                written = stream.tensors()
                seconds = {"copy": time.monotonic() - begin}
                hashes = pool.submit(files.hashes, folder.path, [p.name for p in folder.files()])
                proof = parity.check(form, folder, target.model, described, _reader(written), transformers)
                stream.digests = proof.digests
                stream.origin = _origin(target, folder, hashes.result())
                seconds["proof"] = time.monotonic() - begin - seconds["copy"]
                log(proof.summary())
                _keep(target, tokenizer, kept)
        except BaseException:
            for path in kept:
                path.unlink(missing_ok=True)
            raise
        Ledger(run)("import", index=target.index, source=str(source), digest=proof.digest)
    return target, proof, seconds


def _target(
    folder: Folder,
    form: Format,
    run: Path,
    families: Mapping[str, Family],
    recipes: Mapping[str, Callable[[], RunConfig]],
    recipe_name: str | None,
    place: str | None,
    every: tuple[int, ...],
) -> Target:
    model = form.config_from_hf(folder.config)
    recipe = None
    if recipe_name is not None:
        recipe = recipes[recipe_name]()
        if different := _differences(recipe.model, model):
            raise UserError(f"its model is not that of {recipe_name}: {different}")
    else:
        candidates = [r for r in (make() for make in recipes.values()) if not _differences(r.model, model)]
        recipe = candidates[0] if candidates else None
    if recipe is not None and every:
        recipe = published.with_cadence(recipe, every)
    if recipe is not None and not _is_known(recipe):
        if recipe_name is not None:
            raise UserError(f"--recipe {recipe_name}: its steps follow from data, so that it says nothing of an index")
        recipe = None
    if recipe is None and every:
        raise UserError("--every: only a recipe with known steps has a cadence, and this model is of none")
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; give a --run directory")
    if (run / "config.json").exists():
        there, model_there = _there(run, families)
        if different := _differences(model_there, model):
            raise UserError(f"{run} holds another model: {different}; give another --run directory")
        if (recipe_name or every) and there != recipe:
            raise UserError(f"{run}: was made with another --recipe or --every; leave them out, or name another --run")
        recipe, model = there, model_there
    elif run.exists() and any(p.name not in _LEFT_BY_A_KILL for p in run.iterdir()):
        raise UserError(f"{run}: not empty and not a run directory (no config.json); give another --run directory")
    elif recipe is not None:
        model = recipe.model
    if place is None:
        names = (folder.path.name, folder.path.resolve().name)  # a cache of downloads has links with the names
        place = next((name for name in names if published.is_published(name, model.family)), None)
    if place is None:
        known = [e.manifest.index for e in Series(run).entries()] if run.exists() else []
        beyond = len(recipe.positions) if recipe else 0  # not in a place that another checkpoint has by right
        return Target(run, model, recipe, max([beyond - 1, *known]) + 1, None)
    return Target(run, model, recipe, *published.locate(place, model.family, recipe))


def _is_known(recipe: RunConfig) -> bool:
    """Whether its steps are known without data."""
    try:
        return bool(recipe.positions)
    except ValueError:
        return False


def _differences(wanted: ModelConfig, found: ModelConfig) -> str:
    """Fields in which two architectures differ, but for how weights begin and which row gets no gradient."""
    if type(wanted) is not type(found):
        return f"{wanted.family} and {found.family}"
    ignored = ("init_std", "padding_id")
    names = [f.name for f in dataclasses.fields(wanted) if f.name not in ignored]
    pairs = [(n, getattr(wanted, n), getattr(found, n)) for n in names]
    return ", ".join(f"{n} is {b!r}, expected {a!r}" for n, a, b in pairs if a != b)


def _there(run: Path, families: Mapping[str, Family]) -> tuple[RunConfig | None, ModelConfig]:
    """Recipe, if there is one, and model of a run that exists; only imported checkpoints may be in it."""
    try:
        value = json.loads((run / "config.json").read_text())
        model = model_from_dict(value, families)
    except (OSError, ValueError) as e:
        raise UserError(f"{run}/config.json: not that of a run ({e}); give another --run directory") from e
    if any(e.manifest.origin is None for e in Series(run).entries()):
        raise UserError(f"{run}: is a run that was trained here; give another --run directory")
    return (RunConfig.from_dict(value, families) if "recipe" in value else None), model


def _described(
    folder: Folder, table: tuple[Mapped, ...], model: ModelConfig
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and stored dtype of each of ours: bfloat16 where all of theirs is, else float32, which holds them all."""
    result: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for row in table:
        dtype = folder.tensors[row.theirs].dtype
        if dtype not in (BFLOAT16, FLOAT32, np.dtype(np.float16)):
            raise UserError(f"{row.theirs!r} is {dtype}, expected float32, bfloat16 or float16")
        for name in row.ours:
            shape = row.part if row.layer is None else (model.num_layers, *row.part)
            narrow = dtype == BFLOAT16 and result.get(name, (shape, BFLOAT16))[1] == BFLOAT16
            result[name] = (shape, BFLOAT16 if narrow else FLOAT32)
    return result


def _copy(
    folder: Folder,
    form: Format,
    table: tuple[Mapped, ...],
    described: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    write: Callable[[str, tuple[int, ...], np.ndarray], None],
    log: Log,
) -> None:
    """Read every tensor once, in the order of the table, and write ours. Raises UserError where one is not finite."""
    progress = Progress(sum(folder.tensors[row.theirs].nbytes for row in table), log)
    own = {row.theirs for row in table}
    ties = {like: name for name, like in form.tied.items() if name in folder.tensors and name not in own}
    writing = threading.Lock()

    def one(row: Mapped) -> None:
        tensor = folder.read(row.theirs)
        check_finite(f"{folder.tensors[row.theirs].file}: {row.theirs!r}", tensor)
        if row.theirs in ties and not np.array_equal(_bits(folder.read(ties[row.theirs])), _bits(tensor)):
            raise UserError(
                f"{folder.path}: {ties[row.theirs]!r} and {row.theirs!r} are one tensor in this architecture, but hold "
                "different numbers"
            )
        for name, part in zip(row.ours, row.to_ours(tensor), strict=True):
            part = np.ascontiguousarray(part, described[name][1])
            with writing:
                write(name, () if row.layer is None else (row.layer,), part)
        progress.add(tensor.nbytes)

    each(one, table)


def each(convert: Callable[[Mapped], None], table: tuple[Mapped, ...]) -> None:
    """Convert every tensor, two at a time: while one is read or written the other is transposed. First error raised."""
    with ThreadPoolExecutor(2, "convert") as pool:
        queue = deque[Future[None]]()
        try:
            for row in table:
                queue.append(pool.submit(convert, row))
                if len(queue) > 2:
                    queue.popleft().result()
            while queue:
                queue.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def check_finite(what: str, tensor: np.ndarray) -> None:
    """Refuse a tensor with infinite entries or entries that are not numbers (UserError)."""
    # By the bits: all those of the exponent are set. Three times as fast as isfinite, which has no code for bfloat16.
    bits = _bits(np.ascontiguousarray(tensor)).reshape(-1)
    exponent = bits.dtype.type(_bits(np.array(np.inf, tensor.dtype)))
    if any(np.bitwise_and(bits[i : i + _STRIP], exponent).max() == exponent for i in range(0, bits.size, _STRIP)):
        finite = np.isfinite(tensor)
        place = np.unravel_index(int(np.argmin(finite)), tensor.shape)
        raise UserError(
            f"{what} has {tensor.size - int(finite.sum()):,} entries that are not finite, the first at "
            f"{[int(i) for i in place]}"
        )


def _bits(tensor: np.ndarray) -> np.ndarray:
    return tensor.view(f"u{tensor.dtype.itemsize}")


def _tokenizer(source: Path, target: Target) -> Tokenizer | None:
    """The folder's tokenizer, if it has one. Raises UserError where it is of another vocabulary, or not the run's."""
    if not tokenizers.files_in(source):
        return None
    tokenizer = tokenizers.load(source)
    tokenizer.check_fits(target.model.vocab_size)
    if tokenizers.files_in(target.run):
        there = tokenizers.load(target.run)
        if there.sha256 != tokenizer.sha256:
            raise UserError(f"{source}: its tokenizer is not that of {target.run}; name another --run, or remove it")
    return tokenizer


def _origin(target: Target, folder: Folder, hashes: dict[str, Any]) -> dict[str, Any]:
    """Where a checkpoint came from, for its manifest."""
    names = ("bos_token_id", "eos_token_id")
    return {
        "format": "huggingface",
        "folder": folder.path.resolve().name,
        "files": hashes,
        "position_known": target.position is not None,
        "special_ids": {name: folder.config[name] for name in names if isinstance(folder.config.get(name), int)},
    }


def _manifest(target: Target) -> Manifest:
    recipe, position = target.recipe, target.position
    step, phase = (position.step, position.phase) if position else (0, 0)
    begin, chunk, rate = 0, None, 0.0
    if recipe and position:
        begin = recipe.positions[position.index - 1].step if position.index else 0
        if recipe.data.samples_per_chunk is not None:
            chunk = (step - 1) // recipe.data.steps_per_chunk
        rate = float(recipe.optimizer.schedule(recipe.phase_steps)(step - 1))
    name = checkpoint_name("series", target.index, step)
    if recipe and position and position.index >= 0:
        name = recipe.series.name_of(position)
    batch = recipe.data.global_batch if recipe else 0
    model = json.dumps(dataclasses.asdict(target.model), sort_keys=True)
    return Manifest(
        index=target.index,
        name=name,
        kind="series",
        phase=phase,
        step=step,
        tokens=step * recipe.data.tokens_per_step if recipe else 0,
        chunk=chunk,
        samples=(begin * batch, step * batch),
        parent=None,
        parent_sha256=None,
        config_sha256=recipe.sha256 if recipe else hashlib.sha256(model.encode()).hexdigest(),
        data_sha256=None,
        mesh=dict(MeshConfig().degrees),
        device_kind="none",
        process_count=1,
        code_version=code_version(),
        versions=environment(),
        learning_rate=rate,
        loss={},
        wall_time=time.time(),
    )


def _keep(target: Target, tokenizer: Tokenizer | None, kept: list[Path]) -> None:
    """Write what a run directory holds beside its checkpoints, if it is not there; ``kept`` gets what was written."""
    config = target.recipe.to_dict() if target.recipe else {"model": model_to_dict(target.model)}
    wanted: dict[str, str | bytes] = {"config.json": json.dumps(config, indent=2) + "\n"}
    wanted |= tokenizer.files() if tokenizer else {}
    for path, content in ((target.run / name, content) for name, content in wanted.items()):
        if not path.exists():
            kept.append(path)
            files.write_atomically(path, content)


def _reader(tensors: Mapping[str, Any]) -> parity.Read:
    return lambda name, layer: tensors[name][()] if layer is None else tensors[name][layer]


class Progress:
    """A line every few seconds."""

    def __init__(self, total: int, log: Log):
        self.total, self.log, self.done = total, log, 0
        self._lock = threading.Lock()
        self.begin = self.shown = time.monotonic()

    def add(self, size: int) -> None:
        """Another ``size`` bytes are done."""
        with self._lock:
            self.done += size
        now = time.monotonic()
        if now - self.shown > 10:
            self.shown = now
            left = (now - self.begin) * (self.total - self.done) / self.done
            self.log(f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, about {left:.0f} s left")
