"""A whole run as one frozen, validated value: what a recipe returns and what ``RUN/config.json`` holds."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from checkpoint.manifest import is_name
from data.mixture import Part
from data.sample import PhaseSamples, Schedule
from errors import UserError
from layers.model import ModelConfig
from parallel.axes import BATCH_AXES, PIPELINE, TENSOR
from parallel.mesh import MeshConfig
from parallel.plan import Gather, Remat, batch_refusal, check_choices, padded_rows
from parallel.plan import Schedule as PipelineSchedule
from training.optimizer import OptimizerConfig, at_least

if TYPE_CHECKING:  # a configuration is made, checked, written and read without JAX
    from data.dataset import SyntheticData, TokenData
    from layers.region import Region


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, in which portions. Order is the prepared data's own (`data.packing`, `data.mixture`)."""

    layout: Literal["chunks", "mixture"]
    """chunks: one phase of equal chunks, every window of every source spread evenly over them (Amber, fact sheet 3.3);
    mixture: each phase is drawn from the parts of its own mixture by weight (Crystal, fact sheet 3.4)."""
    global_batch: int
    """Sequences per optimizer step over the whole mesh."""
    sequence_length: int
    """Tokens per sequence that are predicted."""
    chunks: int | None
    """In the layout "chunks": chunks of the run; None = as many as the prepared data has."""
    samples_per_chunk: int | None
    """Sequences in a chunk; None = as in the prepared data. Of a mixture only how `prepare` cuts phases that name no
    number of chunks: batches go on from one chunk into the next."""
    validation_per_source: int
    """Sequences that `prepare` draws from every source for validation."""
    seed: int
    """Seed of the validation draw, of the order inside chunks, of mixtures and of FIM."""
    overlap: int = 0
    """Tokens that neighbouring windows of a source share: Amber 0, Crystal 1 (fact sheet 3.2, 3.5)."""
    file_samples: int = 50_000
    """Windows that count as one file where a mixture takes every second file of a source (fact sheet 3.4, 3.5)."""
    bos_sources: tuple[str, ...] = ()
    """Sources whose documents begin with `<s>` (fact sheet 3.5)."""
    document_end: int | None = None
    """Token that ends a document: attention does not reach back beyond it, so that packed documents do not see one
    another. None: it does, as in the originals."""
    workers: int = 0
    """Loader processes; does not change what is read."""
    validation_every: int = 1
    """At each series checkpoint every so-manyth of a source's validation samples is read: they lie in the order of its
    documents, so that these are a fair part of them. Losses over different numbers are not of the same samples."""

    def __post_init__(self) -> None:
        for name in (
            "global_batch", "sequence_length", "chunks", "samples_per_chunk", "file_samples", "validation_every",
        ):  # fmt: skip
            at_least(f"data.{name}", getattr(self, name), 1)
        for name in ("validation_per_source", "overlap", "workers"):
            at_least(f"data.{name}", getattr(self, name), 0)
        if self.layout not in ("chunks", "mixture"):
            raise UserError(f"config: data.layout {self.layout!r}: choose chunks or mixture")
        if self.overlap > self.sequence_length:
            raise UserError(
                f"config: data.overlap={self.overlap} leaves no step from one window of {self.sequence_length}+1 "
                "tokens to the next; give at most data.sequence_length"
            )
        if self.layout == "mixture" and self.chunks is not None:
            raise UserError(
                f"config: data.chunks={self.chunks}: of a mixture each phase has its own number; set "
                "--data.chunks None and --phases.N.chunks, or --data.layout chunks"
            )
        if self.layout == "chunks" and (self.samples_per_chunk or self.global_batch) < self.global_batch:
            raise UserError(
                f"config: data.global_batch={self.global_batch} is larger than a chunk of {self.samples_per_chunk} "
                "samples, so that no step fits; lower data.global_batch or prepare fewer, larger chunks"
            )

    @property
    def steps_per_chunk(self) -> int:
        """Whole batches in a chunk; the rest of the chunk is not used (fact sheet 2.1: 762, 96 left)."""
        if self.samples_per_chunk is None:
            raise ValueError("samples_per_chunk is not known before the config is resolved with its data")
        return self.samples_per_chunk // self.global_batch

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens per step."""
        return self.global_batch * self.sequence_length


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """A part of a run with its own data mixture and learning-rate schedule. Amber has one, Crystal three."""

    steps: int | None = None
    """Updates; None = what its data has. In the layout "chunks": from ``chunks``, or in the last phase all the rest."""
    chunks: int | None = None
    """Chunks of data that belong to it, in order. Of a mixture: so many as `prepare` cuts the phase into."""
    series_every_steps: int | None = None
    """A series checkpoint after every so many steps of the phase, and after its last. None: in the layout "chunks", as
    many as a chunk has; of a mixture, ceil(steps / chunks), or without ``chunks`` only after the last step. Rounding up
    gives at most ``chunks`` checkpoints, and fewer in some short phases: of 9 steps in 6 chunks, 5, one every 2."""
    mixture: tuple[Part, ...] = ()
    """What it reads in which shares. In the layout "chunks" that follows from the sources themselves, all of them
    are read, and the mixture is only what the shares should come to."""

    def __post_init__(self) -> None:
        for name in ("steps", "chunks", "series_every_steps"):
            at_least(f"phases.{name}", getattr(self, name), 1)
        if self.steps is not None and self.chunks is not None:
            raise UserError(
                f"config: a phase has steps={self.steps} and chunks={self.chunks}, and one follows from the other; set "
                "--phases.N.chunks None, or --phases.N.steps None"
            )


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in a run a series checkpoint lies."""

    index: int
    phase: int
    step: int
    """Updates done in the run."""
    phase_step: int
    """Updates done in the phase."""


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How the step is carried out; changes speed and memory, and results only by rounding."""

    compute_dtype: Literal["float32", "bfloat16"]
    """Dtype of matrices and activations; master weights and optimizer state are float32."""
    microbatches: int
    """The global batch is worked off in this many parts, gradients summed in float32. Where they and the mesh do not
    divide it, rows of weight 0 are added at its end."""
    gather: Gather
    """Weights are gathered over fsdp once per step, once per microbatch and stage, or in each layer (ZeRO-3)."""
    remat: Remat
    """What a layer keeps for its backward pass: everything, matrix products, nothing, or its input in host memory."""
    loss_chunks: int
    """Pieces along the sequence in which logits and loss are computed."""
    remat_stage: bool = False
    """A stage (a microbatch, without a pipeline) keeps only its input, and is run again for the backward pass ("1f1b"
    does so always)."""
    schedule: PipelineSchedule = "gpipe"
    """How microbatches pass through a pipeline: all forward, then all backward; or in turn ("1f1b"), memory flat in
    microbatches."""
    repeats: int = 1
    """Times that a microbatch passes through every stage of a pipeline (circular schedule; with "gpipe")."""
    skip_idle: bool = True
    """In "1f1b" a stage is idle where it has nothing to do; False: it then computes what is thrown away."""
    unroll: int = 1
    """Layers in one turn of the loop over them: more may run faster and compile longer."""
    attention: Literal["auto", "reference", "flash", "splash", "cudnn"] = "auto"
    """Attention kernel; auto: by platform, dtype and shape (`layers.attention.select`)."""

    def __post_init__(self) -> None:
        at_least("execution.microbatches", self.microbatches, 1)
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UserError(f"compute_dtype {self.compute_dtype!r}: choose float32 or bfloat16")
        check_choices(self, "loss_chunks", "unroll")

    @property
    def region(self) -> "Region":
        """The manual region that these choices describe; attention is the reference until the platform is known."""
        from layers.region import Region

        return Region(
            compute_dtype=self.compute_dtype,
            gather=self.gather,
            remat=self.remat,
            remat_stage=self.remat_stage,
            schedule=self.schedule,
            repeats=self.repeats,
            skip_idle=self.skip_idle,
            unroll=self.unroll,
            loss_chunks=self.loss_chunks,
        )


@dataclasses.dataclass(frozen=True)
class SeriesConfig:
    """What is kept of a run. When, `PhaseConfig.series_every_steps` says; before the first step there is "init"."""

    rolling_every_steps: int | None
    """Steps between checkpoints that are kept only to resume; None: only as ``rolling_every_minutes`` says."""
    rolling_every_minutes: float | None = None
    """Minutes between them, besides."""
    optimizer_every: int = 1
    """Every so-manyth of the series has the optimizer state (indices k with (k + 1) a multiple, "init" and the last
    always): the run can be replayed from it. Parameters are in all."""
    early_base: int | None = None
    """Extra checkpoints, of parameters alone, after 1, b, b^2, … steps, before the first of the series; None: none."""
    bfloat16_copy: bool = False
    """Keep the parameters in bfloat16 too, for analyses that need no more and then read half as much."""
    name: str = "{index:03d}"
    """Name of a checkpoint of the series: of index, step, phase (from 1) and phase_step."""

    def __post_init__(self) -> None:
        at_least("series.rolling_every_steps", self.rolling_every_steps, 1)
        at_least("series.optimizer_every", self.optimizer_every, 1)
        at_least("series.early_base", self.early_base, 2)
        minutes = self.rolling_every_minutes
        if minutes is not None and not 0 < minutes < math.inf:
            raise UserError(f"config: series.rolling_every_minutes={minutes} must be positive")
        if self.rolling_every_steps is None and minutes is None:
            raise UserError(
                "config: series: neither rolling_every_steps nor rolling_every_minutes; without one of them a kill "
                "loses all since the newest checkpoint of the series"
            )
        try:
            names = {self.name_of(Position(i, p, 10 * i + p, 5 * i + p + 1)) for i in range(3) for p in range(2)}
        except (KeyError, IndexError, ValueError, AttributeError) as e:
            raise UserError(f"config: series.name={self.name!r} is no format of a position ({e!r})") from e
        if len(names) < 3 or not all(map(is_name, names)):
            raise UserError(
                f"config: series.name={self.name!r} must give every checkpoint its own name, of letters, digits, - "
                "and _"
            )
        if any(n.isdigit() for n in names) and self.name != "{index:03d}":
            raise UserError(
                f"config: series.name={self.name!r} gives names that are numbers and could be taken for an index; "
                "give {index:03d}, or put a letter in it"
            )

    def name_of(self, position: "Position") -> str:
        """Folder name of the series checkpoint at a position."""
        p = position
        return self.name.format(index=p.index, step=p.step, phase=p.phase + 1, phase_step=p.phase_step)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What becomes of a step whose loss or gradient is not finite, or far above the ones before: it is never applied.

    Limits follow from the losses and norms that were logged (`training.guard`), and a replay reads the ledger, so that
    all of it may be changed while a run is interrupted.
    """

    on_trouble: Literal["stop", "skip_batch", "skip_chunk"] = "stop"
    """Stop the run; or go on without the update of this step; or without those of the rest of its chunk (fact sheet
    5.3(a): four of Amber's 360 gave NaN wherever they were put, and were left out)."""
    loss_margin: float | None = None
    """Trouble is also a loss so much (in nats) above the mean of the last ``window``; None: only one not finite."""
    norm_factor: float | None = None
    """Trouble is also a gradient norm so many times the mean of the last ``window``; None: only one not finite."""
    window: int = 100
    """Steps that limits are taken over; with fewer behind it the run has none yet."""
    most: int = 10
    """Stop where more steps, or chunks, than this are skipped one after the other."""

    def __post_init__(self) -> None:
        if self.on_trouble not in ("stop", "skip_batch", "skip_chunk"):
            raise UserError(f"config: guard.on_trouble {self.on_trouble!r}: choose stop, skip_batch or skip_chunk")
        for name, least in (("loss_margin", 0), ("norm_factor", 1), ("window", 1), ("most", 1)):
            at_least(f"guard.{name}", getattr(self, name), least)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run. Recipes (`amber_jax.recipes`) return one; the command line changes single fields of it."""

    recipe: str
    """Name of the recipe it came from."""
    model: ModelConfig
    data: DataConfig
    phases: tuple[PhaseConfig, ...]
    """At least one, in order."""
    optimizer: OptimizerConfig
    loss_over: Literal["targets", "positions"]
    """The sum of the targets' losses is divided by their number, or by all positions of the batch, masked or not."""
    execution: ExecutionConfig
    series: SeriesConfig
    guard: GuardConfig
    mesh: MeshConfig
    """Degrees of parallelism, as ``data=2,fsdp=2``."""
    seed: int
    """Initial weights are a pure function of the model and this."""

    def __post_init__(self) -> None:
        d, e = self.data, self.execution
        if d.sequence_length > self.model.context_length:
            raise UserError(
                f"config: data.sequence_length={d.sequence_length} is longer than the model's context of "
                f"{self.model.context_length}; shorten it or raise model.context_length"
            )
        if why := batch_refusal(d.global_batch, e.microbatches, 1):
            raise UserError(f"config: {why}")
        if d.sequence_length % e.loss_chunks:
            raise UserError(
                f"config: execution.loss_chunks={e.loss_chunks} does not divide "
                f"data.sequence_length={d.sequence_length}"
            )
        end = d.document_end
        if end is not None and not 0 <= end < self.model.vocab_size:
            raise UserError(f"config: data.document_end={end} is no token of a vocabulary of {self.model.vocab_size}")
        for name, seed in (("seed", self.seed), ("data.seed", d.seed)):
            if not 0 <= seed < 2**32:
                raise UserError(f"config: {name}={seed} must be at least 0 and below 2**32")
        if not self.phases:
            raise UserError("config: phases: a run has at least one")
        self.optimizer.check_phases(len(self.phases))
        mixed = d.layout == "mixture"
        if mixed and not all(p.mixture for p in self.phases):
            raise UserError('config: data.layout is "mixture" and a phase has none; give each phase its mixture')
        if not mixed and any(p.steps is None and p.chunks is None for p in self.phases[:-1]):
            raise UserError("config: phases: each but the last needs steps or chunks")
        if mixed and (odd := set(d.bos_sources) - {part.reads for p in self.phases for part in p.mixture}):
            raise UserError(f"config: data.bos_sources: no mixture reads {', '.join(sorted(odd))}")
        chunks = [p.chunks for p in self.phases]
        if d.chunks is not None and None not in chunks and sum(chunks) != d.chunks:  # type: ignore[arg-type]
            raise UserError(
                f"config: the phases have {'+'.join(map(str, chunks))} chunks, and data.chunks is {d.chunks}; set "
                "--phases.N.chunks to match"
            )

    def region(self, platform: str) -> "Region":
        """How the model runs in the manual region on a platform: ``device.platform``, which decides on attention."""
        from layers import attention

        kernel = attention.select(
            self.execution.attention,
            platform=platform,
            dtype=self.execution.compute_dtype,
            head_dim=self.model.head_dim,
            length=self.data.sequence_length,
        )
        return dataclasses.replace(self.execution.region, attention=kernel, document_end=self.data.document_end)

    @property
    def phase_steps(self) -> tuple[int, ...]:
        """Steps of each phase; what the data decides is only known once the config is resolved with it."""
        mixed = self.data.layout == "mixture"
        known = [p.steps if mixed or not p.chunks else p.chunks * self.data.steps_per_chunk for p in self.phases]
        if known[-1] is None and self.data.chunks is not None:
            known[-1] = self.data.chunks * self.data.steps_per_chunk - sum(n or 0 for n in known[:-1])
        if None in known:
            raise ValueError("steps of a phase are not known before the config is resolved with its data")
        return tuple(n or 0 for n in known)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return sum(self.phase_steps)

    @functools.cached_property
    def positions(self) -> tuple[Position, ...]:
        """Every series checkpoint of the run in order, the one before the first step left out."""
        found: list[Position] = []
        start = 0
        for phase, (config, steps) in enumerate(zip(self.phases, self.phase_steps, strict=True)):
            every = config.series_every_steps or (steps if self.data.layout == "mixture" else self.data.steps_per_chunk)
            for done in sorted({*range(every, steps + 1, every), steps}):
                found.append(Position(len(found), phase, start + done, done))
            start += steps
        return tuple(found)

    @property
    def early_steps(self) -> tuple[int, ...]:
        """Steps of the extra checkpoints before the first of the series."""
        base, first = self.series.early_base, self.positions[0].step
        return tuple(itertools.takewhile(lambda n: n < first, (base**k for k in itertools.count()))) if base else ()

    def keeps_optimizer(self, index: int) -> bool:
        """Whether the series checkpoint of this index has the optimizer state."""
        return (index + 1) % self.series.optimizer_every == 0 or index == len(self.positions) - 1

    def phase_of(self, step: int) -> int:
        """Phase that a 0-based step belongs to."""
        ends = itertools.accumulate(self.phase_steps)
        return next((p for p, end in enumerate(ends) if step < end), len(self.phases) - 1)

    def check_mesh(self, degrees: Mapping[str, int]) -> None:
        """Refuse a mesh that does not divide the model, the batch or the sequence (UserError), before any compile.

        Args:
            degrees: mesh axis -> degree (``mesh.shape``).
        """
        from layers import params

        params.check_divides(self.model.abstract, degrees)
        stages, e = degrees[PIPELINE], self.execution
        if stages > 1 and self.model.num_layers % (stages * e.repeats):
            raise UserError(
                f"mesh: pipeline * execution.repeats = {stages}*{e.repeats} does not divide the "
                f"{self.model.num_layers} layers, and every stage holds as many layers each time; change one of them"
            )
        if stages > 1 and e.schedule == "gpipe" and e.microbatches % stages:
            raise UserError(
                f"mesh: pipeline = {stages} does not divide execution.microbatches={e.microbatches}, and in the "
                "schedule gpipe each stage embeds its share of them; change one of them, or set --execution.schedule "
                "1f1b"
            )
        if why := batch_refusal(self.data.global_batch, e.microbatches, _ways(degrees)):
            raise UserError(f"mesh: {why}; change one of them")
        if self.data.sequence_length % degrees[TENSOR]:
            raise UserError(
                f"mesh: tensor = {degrees[TENSOR]} does not divide data.sequence_length={self.data.sequence_length}, "
                "and activations between matrices are split along the sequence"
            )

    def batch_shape(self, degrees: Mapping[str, int]) -> tuple[int, int]:
        """(microbatches, rows of each) on a mesh of these degrees, padding included (`parallel.plan.padded_rows`)."""
        parts = self.execution.microbatches
        return parts, padded_rows(self.data.global_batch, parts, _ways(degrees))

    def resolve(self, data: "TokenData") -> "RunConfig":
        """This config with what it leaves open taken from the data, checked against it.

        Args:
            data: what will be read.

        Returns:
            In the layout "chunks": chunks and samples per chunk are set. Of a mixture: steps and series_every_steps of
            every phase are set, as said there, and chunks are None.

        Raises:
            UserError: vocabulary, sequence length, layout, phases or chunks of the data are not those of the recipe.
        """
        if data.vocab_size != self.model.vocab_size:
            raise UserError(
                f"data: its vocabulary has {data.vocab_size} entries, {self.recipe}'s model {self.model.vocab_size}; "
                f"prepare the data for this recipe, or set --model.vocab-size {data.vocab_size}"
            )
        if data.sequence_length != self.data.sequence_length:
            raise UserError(
                f"data: prepared for sequences of {data.sequence_length} tokens and {self.recipe} reads "
                f"{self.data.sequence_length}; prepare it again, or set --data.sequence-length {data.sequence_length}"
            )
        mixed = self.data.layout == "mixture"
        if any(p.carry != mixed for p in data.phases):
            there = "chunks" if mixed else "mixture"
            raise UserError(
                f'data: was prepared in the layout "{there}" and {self.recipe} reads "{self.data.layout}"; prepare it '
                f"for this recipe, or set --data.layout {there}"
            )
        if len(data.phases) != (wanted := len(self.phases) if mixed else 1):
            raise UserError(
                f"data: its number of phases is {len(data.phases)} and {self.recipe} reads {wanted}; prepare it for "
                "this recipe"
            )
        config = self._with_mixed(data.phases) if mixed else self._with_chunks(data.phases[0])
        Schedule(data.phases, config.phase_steps, self.data.global_batch)  # refuses steps that are not there
        names = [self.series.name_of(p) for p in config.positions]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"config: series.name={self.series.name!r} gives two checkpoints of the run the name {twice[0]!r}; put "
                "the phase or the index in it"
            )
        return config

    def _with_mixed(self, phases: Sequence[PhaseSamples]) -> "RunConfig":
        """Each phase of the run reads its own of the data; what it leaves open is all that is there."""
        resolved = []
        for n, (phase, there) in enumerate(zip(self.phases, phases, strict=True)):
            steps = phase.steps or there.steps(self.data.global_batch)
            if not steps:
                raise UserError(
                    f"data: phase {n} has {there.samples} samples, fewer than one global batch of "
                    f"{self.data.global_batch}; lower data.global_batch or prepare more"
                )
            every = phase.series_every_steps or -(-steps // (phase.chunks or 1))
            resolved.append(dataclasses.replace(phase, steps=steps, chunks=None, series_every_steps=every))
        return dataclasses.replace(self, phases=tuple(resolved))

    def _with_chunks(self, there: PhaseSamples) -> "RunConfig":
        """The phases of the run divide the one phase of the data among them, by steps or by its chunks."""
        for field in ("chunks", "samples_per_chunk"):
            wanted, found = getattr(self.data, field), getattr(there, field)
            if wanted is not None and wanted != found:
                raise UserError(
                    f"data: {field} is {found} and {self.recipe} says {wanted}; prepare the data for this recipe, or "
                    f"set --data.{field.replace('_', '-')} {found}"
                )
        data = dataclasses.replace(self.data, chunks=there.chunks, samples_per_chunk=there.samples_per_chunk)
        config = dataclasses.replace(self, data=data)
        if min(config.phase_steps) < 1:
            raise UserError(
                f"data: {there.chunks} chunks of {data.steps_per_chunk} steps leave no step for the last of "
                f"{self.recipe}'s phases; prepare more, or set --phases.N.steps"
            )
        return config

    def synthetic(self, steps_per_chunk: int = 100) -> "SyntheticData":
        """Random tokens in this recipe's layout, as much as the run reads.

        Args:
            steps_per_chunk: batches in a chunk, or in a phase, whose size the recipe leaves open.
        """
        from data.dataset import SyntheticData

        d, batch = self.data, self.data.global_batch
        if d.layout == "chunks":
            return SyntheticData.of_chunks(
                vocab_size=self.model.vocab_size,
                sequence_length=d.sequence_length,
                chunks=d.chunks or sum(p.chunks or 0 for p in self.phases) or 1,
                samples_per_chunk=d.samples_per_chunk or steps_per_chunk * batch,
                seed=d.seed,
            )
        phases: list[PhaseSamples] = []
        for phase in self.phases:
            first = sum(p.chunks for p in phases)
            steps = phase.steps or (phase.chunks or 1) * steps_per_chunk
            size = d.samples_per_chunk or steps_per_chunk * batch
            phases.append(PhaseSamples(first, steps * batch, size, carry=True))
        return SyntheticData(self.model.vocab_size, d.sequence_length, tuple(phases), d.seed)

    # ---- files -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every field; the model's family beside its fields."""
        return {**dataclasses.asdict(self), "model": model_to_dict(self.model)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], families: "Mapping[str, Family]") -> "RunConfig":
        """Inverse of `to_dict`.

        Args:
            value: what `to_dict` returned.
            families: family by name.

        Raises:
            UserError: unknown family, or unknown, missing or wrongly typed fields.
        """
        model = model_from_dict(value, families)
        fields = {**value, "model": model}
        fields["optimizer"] = _build(families[model.family].optimizer, value.get("optimizer"), "config.optimizer")
        return _build(cls, fields, "config")

    @property
    def sha256(self) -> str:
        """Hash of what decides the result of a run: everything but how and where it is carried out."""
        return hashlib.sha256(json.dumps(_essential(self), sort_keys=True).encode()).hexdigest()

    def check_same_run(self, other: "RunConfig", where: Path) -> None:
        """Refuse to continue a run under a changed recipe (UserError listing the fields that differ)."""
        mine, theirs = _flatten(_essential(self)), _flatten(_essential(other))
        changed = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
        if changed:
            lines = "\n".join(f"  {k}: the run has {theirs.get(k)!r}, asked for {mine.get(k)!r}" for k in changed)
            raise UserError(
                f"{where} belongs to another configuration ({other.recipe}):\n{lines}\n"
                "give the run's own values, or another --run directory"
            )


def _ways(degrees: Mapping[str, int]) -> int:
    """Devices that the rows of a batch are spread over."""
    return math.prod(degrees[axis] for axis in BATCH_AXES)


class Family(NamedTuple):
    """The config classes of one architecture."""

    model: type[ModelConfig]
    optimizer: type[OptimizerConfig]


def model_to_dict(model: ModelConfig) -> dict[str, Any]:
    """Its fields and its family: ``model`` in a run's ``config.json``.

    Those at their default are left out: so runs of before a field was added, and their hashes, stay what they are.
    """
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    defaults = {f.name: f.default for f in dataclasses.fields(model)}
    return {"family": model.family, **{k: v for k, v in fields.items() if v != defaults[k]}}


def model_from_dict(value: Any, families: Mapping[str, Family]) -> ModelConfig:
    """The model of a run's ``config.json``, also of one that holds nothing else (an imported run). Raises UserError."""
    if not isinstance(value, Mapping) or not isinstance(value.get("model"), Mapping):
        raise UserError("config: not a mapping of fields with a model in it")
    model = dict(value["model"])
    family = model.pop("family", None)
    if family not in families:
        raise UserError(f"config: model family {family!r} is unknown; known: {', '.join(families)}")
    return _build(families[family].model, model, "model")


#: May change between a run's interruption and its resumption.
FREE = (
    "mesh", "execution.microbatches", "execution.gather", "execution.remat", "execution.remat_stage",
    "execution.loss_chunks", "execution.schedule", "execution.repeats", "execution.skip_idle", "execution.unroll",
    "execution.attention", "data.workers", "data.validation_every", "series.rolling_every_steps",
    "series.rolling_every_minutes", "series.optimizer_every", "series.early_base", "series.bfloat16_copy", "guard",
)  # fmt: skip


def _essential(config: RunConfig) -> dict[str, Any]:
    value = config.to_dict()
    for path in FREE:
        *parents, leaf = path.split(".")
        node = value
        for parent in parents:
            node = node[parent]
        del node[leaf]
    return value


def _flatten(value: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, (list, tuple)):
            item = dict(enumerate(item))
        flat.update(_flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item})
    return flat


def _build(cls: Any, value: Any, where: str) -> Any:
    """A dataclass from plain values, strictly: every field there, none unknown, every type right."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(value, Mapping):
        raise UserError(f"config: {where} is {type(value).__name__}, expected fields {sorted(names)}")
    if unknown := sorted(set(value) - set(names)):
        raise UserError(f"config: {where} has unknown fields {unknown}; if newer code wrote it, update this")
    added = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    if missing := sorted(set(names) - set(value) - (added if issubclass(cls, ModelConfig) else set())):
        raise UserError(f"config: {where} lacks {missing}")
    arguments = {}
    for name in [name for name in names if name in value]:
        item, hint = value[name], hints[name]
        of = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
        if dataclasses.is_dataclass(hint) and not isinstance(item, (ModelConfig, OptimizerConfig)):
            item = _build(hint, item, f"{where}.{name}")
        elif of and isinstance(item, (list, tuple)):
            if dataclasses.is_dataclass(of):
                item = tuple(_build(of, x, f"{where}.{name}.{n}") for n, x in enumerate(item))
            elif not all(_fits(x, of) for x in item):
                raise UserError(f"config: {where}.{name} is {item!r}, which is not {hint}")
            item = tuple(item)
        elif not _fits(item, hint):
            raise UserError(f"config: {where}.{name} is {item!r}, which is not {hint}")
        arguments[name] = item
    return cls(**arguments)


def _fits(item: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:  # a list of the right kind is built, not checked
        return False
    if typing.get_origin(hint) is Literal:
        return item in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(item, h) for h in typing.get_args(hint))
    if hint is float:
        return isinstance(item, (int, float)) and not isinstance(item, bool)
    if hint is int:
        return isinstance(item, int) and not isinstance(item, bool)
    return isinstance(item, hint)
