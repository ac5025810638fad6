"""What studies are made on: a run with the chosen checkpoints of its series, opened once, and one checkpoint of it."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpoint import storage
from checkpoint.manifest import Entry
from checkpoint.series import Series, parse_ref
from data.chunks import MANIFEST
from data.dataset import ChunkedData
from data.published import is_published
from data.tokenizer import Tokenizer, files_in, load
from errors import UserError
from inference.sampling import Sampling
from layers.model import ModelConfig
from parallel.mesh import MeshConfig
from training.config import Family, RunConfig, model_from_dict
from training.metrics import read_lines
from training.record import RunRecord
from training.trace import RunTracer

if TYPE_CHECKING:  # settings of studies and their results are read without JAX
    from jax.sharding import Mesh

    from inference.score import TokenScores
    from layers.region import Region

AddBos = Literal["auto", "yes", "no"]
#: Families whose published evaluations put <s> before each text: that of Amber by Hugging Face's LLaMA tokenizer. The
#: CrystalCoder tokenizer adds none (fact sheet 1.9). Neither model saw one in training.
_BOS_FAMILIES = ("amber",)
OpenData = Callable[[Path, RunConfig], Any]


class Target:
    """A run and those checkpoints of it that a reference names, with what their study needs.

    Args:
        ref: ``DIR@K``, ``DIR@0:360:10``, ``DIR@all`` and so on.
        families: config classes by family name.
        open_data: gives the data set of a folder, as `train` reads it.
        mesh: degrees of parallelism, ``data=2,tensor=2``.
        compute_dtype: float32 or bfloat16.
        data: data directory of the run, if it is no longer where it was.
        tokenizer: tokenizer file or folder, if not the one of the run.

    Raises:
        UserError: the reference names nothing, the mesh does not fit the model or this machine.
    """

    def __init__(
        self,
        ref: str,
        families: Mapping[str, Family],
        open_data: OpenData,
        *,
        mesh: str = "data=1",
        compute_dtype: str = "float32",
        data: Path | None = None,
        tokenizer: Path | None = None,
    ):
        self.run, self.selector = parse_ref(ref)
        self.series = Series(self.run)
        self._families, self._open_data, self._data, self._tokenizer = families, open_data, data, tokenizer
        try:
            config = json.loads((self.run / "config.json").read_text())
            self.model: ModelConfig = model_from_dict(config, families)
            self.recipe: str | None = config.get("recipe")
        except (OSError, ValueError) as e:
            raise UserError(f"{self.run}: cannot read its config.json ({e}); is it a run directory?") from e
        self.wanted_mesh = MeshConfig.parse(mesh)
        self._compute_dtype = compute_dtype

    @cached_property
    def region(self) -> "Region":
        """How the model runs there."""
        from layers.region import Region

        return Region(self._compute_dtype)

    @cached_property
    def mesh(self) -> "Mesh":
        """Where the model runs."""
        import jax

        from layers import params

        wanted, devices = self.wanted_mesh, jax.devices()
        if -1 not in wanted.degrees.values() and jax.process_count() == 1:
            devices = devices[: wanted.size]  # looking at a checkpoint need not take the whole machine
        mesh = wanted.build(devices)
        params.check_divides(self.model.abstract, mesh.shape)
        return mesh

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, or the one that was given.

        Raises:
            UserError: there is none, or it does not fit the model.
        """
        found = self.find_tokenizer()
        if found is None:
            raise UserError(f"{self.run}: has no tokenizer; give one with --tokenizer")
        return found

    def find_tokenizer(self) -> Tokenizer | None:
        """As `tokenizer`, but None where none was given and the run has none."""
        where = self._tokenizer or self.run
        if self._tokenizer is None and not files_in(where):
            return None
        with tempfile.TemporaryDirectory() as scratch:
            if storage.is_remote(where):
                for file in files_in(where):
                    Path(scratch, file.name).write_bytes(storage.read(file))
                where = Path(scratch)
            found = load(where)
        found.check_fits(self.model.vocab_size)
        return found

    def one(self) -> "Subject":
        """The checkpoint that the reference names, with its parameters.

        Raises:
            UserError: it names none, or several.
            RunError: damaged or missing files.
        """
        entry = self.entry
        return Subject(self, entry, self.load(entry))

    @cached_property
    def entry(self) -> Entry:
        """The checkpoint that the reference names. UserError: it names none, or several."""
        entries = self.series.resolve(self.selector)
        if len(entries) != 1:
            raise UserError(f"{self.run}@{self.selector}: names {len(entries)} checkpoints, and this verb takes one")
        return entries[0]

    def begins_with_bos(self, asked: AddBos) -> bool:
        """Whether ``<s>`` is put before a text. UserError: it should be, and the tokenizer has none."""
        has = self.tokenizer.bos_id >= 0
        if asked == "yes" and not has:
            raise UserError(f"--add-bos yes: {self.tokenizer.path} has no <s>")
        return has and (asked == "yes" or (asked == "auto" and self.model.family in _BOS_FAMILIES))

    @cached_property
    def trained(self) -> bool:
        """Whether the run was trained here: its ledger says on what. An imported series has a ledger, too."""
        return any(e.get("data") for e in read_lines(self.run / "ledger.jsonl"))

    @cached_property
    def record(self) -> RunRecord:
        """How the run was trained. UserError: it was not trained here."""
        return RunRecord(self.run, self._families)

    @cached_property
    def data(self) -> Any:
        """The data set that was trained on, or given.

        Raises:
            UserError: synthetic, or not there; of a run that was not trained here: none was given, or published files
                and no recipe that says how they are read.
        """
        if not self.trained:
            return self._given()
        named, _ = self.record.data
        if self._data is None and named is None:
            raise UserError(f"{self.run}: was trained on synthetic data, which is made of no documents; give --data")
        return self._open_data(self._data or named or Path(), self.record.config)

    def _given(self) -> Any:
        if self._data is None:
            raise UserError(f"{self.run}: was not trained here, so that its data is not known; give --data")
        if (self._data / MANIFEST).exists() or not is_published(self._data):
            return ChunkedData(self._data)
        if self.recipe is None:
            raise UserError(
                f"{self._data}: published files are read as a recipe says, and {self.run} is of none; convert them "
                "(prepare --from-published)"
            )
        return self._open_data(self._data, self.record.config)

    @cached_property
    def tracer(self) -> RunTracer:
        """From documents to steps and back.

        Raises:
            UserError: the run was not trained here; the data is not there, or is not what was trained on.
        """
        if not self.trained:
            raise UserError(f"{self.run}: was not trained here, so that which step read what is not known")
        return RunTracer(self.run, self._families, self._open_data, data=self._data)

    def readers(self, chunk: int, position: int) -> list[tuple[int, int]]:
        """Each (step, row) of the run that read a sample of its data set, in order; not those that the guard skipped.

        Args:
            chunk, position: in the data set, not in a mixture that the run made of it.

        Raises:
            UserError: as `tracer`.
        """
        mixed, schedule = self.tracer.mixed, self.tracer.schedule
        assert schedule is not None  # it is a run
        places = mixed.places(chunk, position) if mixed else [(chunk, position)]
        read = [found for place in places if (found := schedule.reader(*place))]
        return [(step, row) for step, row in read if self.record.skipped(step) == step]

    def load(self, entry: Entry) -> Any:
        """Parameters of a checkpoint, placed on `mesh`. Raises RunError: damaged or missing files."""
        import jax

        from checkpoint.restore import restore
        from layers import params

        weights, _ = restore(entry, params=params.abstract_arrays(self.model.abstract, self.mesh), optimizer=None)
        return jax.block_until_ready(weights)


@dataclasses.dataclass(frozen=True)
class Subject:
    """One checkpoint, ready to be scored."""

    target: Target
    entry: Entry
    weights: Any
    """Parameters on the target's mesh; None for a study that reads them itself."""

    @property
    def name(self) -> str:
        """``DIR@NAME``."""
        return f"{self.target.run}@{self.entry.manifest.name}"

    def score(self, rows: Any, batch_tokens: int = 16384) -> "list[TokenScores]":
        """Teacher-forced scores of rows of tokens: `inference.score.score`."""
        from inference.score import score

        t = self.target
        return score(t.model, self.weights, rows, t.mesh, t.region, batch_tokens)

    def generate(
        self, prompts: Any, sampling: Sampling, *, use_cache: bool = True, seeds: Any = None
    ) -> list[list[int]]:
        """Continuations of prompts, any number of them and of any lengths: `inference.generate.generate`."""
        from inference.generate import generate

        t, eos_id = self.target, self.target.tokenizer.eos_id
        return generate(t.model, self.weights, prompts, t.mesh, t.region, sampling, eos_id, use_cache, seeds)
