"""The command line: picks a verb and a recipe, changes single fields of it, calls one function.

    python run.py VERB …        one of the verbs below; `python run.py VERB --help` lists every flag

Exit codes: 0 done; 2 a mistake in what was asked (one message, no traceback); 1 a failure of the world (a full disk, a
corrupt file); 75 training was told to stop by a signal, saved, and can be continued by the same command.
"""

import dataclasses
import difflib
import importlib
import json
import math
import os
import signal
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from checkpoint import storage
from errors import RunError, UserError
from parallel.distributed import HostFlags, is_lead
from training.config import RunConfig

EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again


# ---- what can be asked ---------------------------------------------------------------------------------------------


def recipes() -> dict[str, Callable[[], RunConfig]]:
    """Recipe by name."""
    from amber_jax import recipes as amber
    from crystal_jax import recipes as crystal

    of_amber = (amber.amber_7b, amber.amber_tiny, amber.amber_360)
    of_crystal = (crystal.crystal_7b, crystal.crystal_tiny, crystal.crystal_143)
    return {recipe.__name__: recipe for recipe in of_amber + of_crystal}


def families() -> dict[str, Any]:
    """Config classes by family name, to read a run's ``config.json``."""
    from amber_jax.config import AmberConfig
    from crystal_jax.config import CrystalConfig
    from crystal_jax.optimizer import MupAdamWConfig
    from training.config import Family
    from training.optimizer import AdamWConfig

    return {
        AmberConfig.family: Family(AmberConfig, AdamWConfig),
        CrystalConfig.family: Family(CrystalConfig, MupAdamWConfig),
    }


def formats() -> dict[str, Any]:
    """How models are written in Hugging Face folders, by the ``model_type`` of those."""
    from amber_jax import convert as amber
    from crystal_jax import convert as crystal

    return {"llama": amber.FORMAT, "crystalcoder": crystal.FORMAT}


Config = Annotated[RunConfig, tyro.conf.arg(name="")]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff]


class _BadPath(Exception):
    """Carries a UserError through tyro, which would make a choice of types of it."""


def _paths(parse: Callable[[str], Path], metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    def instance(words: list[str]) -> Path:
        try:
            return parse(words[0])
        except UserError as e:
            raise _BadPath from e

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=instance,
        is_instance=lambda value: hasattr(value, "__fspath__"),
        str_from_instance=lambda value: [str(value)],
    )


RunDir = Annotated[Path, _paths(storage.path, "DIR|gs://…")]
"""A run directory, which may be in a bucket; every other path is on a disk."""


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Documents to tokens to packed samples to mixed chunks with a manifest; or checks, converts, or estimates that."""

    config: Config
    out: Path | None = None
    """Data directory to make, to go on with, or to check."""
    source: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=PATH, repeatable. PATH: folder, file or glob of text, .jsonl[.gz|.zst] or .parquet, also as a URL such as
    s3://bucket/folder; or embedded:stdlib, embedded:topics, embedded:docstrings, embedded:packages."""
    text_field: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=FIELD, repeatable: the field or column of a source that holds the text, if not `text` or `content`."""
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=LABEL, repeatable: what published rows call a source, if not by its name."""
    tokenizer: Path | None = None
    """SentencePiece .model, tokenizer.json, or a folder with one; a small one is trained on the sources if none is
    given."""
    compat: Literal["none", "original"] = "none"
    """original: also the quirks of CrystalCoder's own tools that change tokens."""
    on_bad: Literal["fail", "skip"] = "fail"
    """A document that cannot be read: stop and name it, or count it and go on."""
    max_mb_per_source: float | None = None
    """Read at most this many megabytes (1e6 bytes) of text from each source."""
    engine: Literal["local", "beam"] = "local"
    """What does the work: processes of this machine, or Apache Beam. Does not change the result."""
    workers: int = 2
    """Processes of the local engine."""
    shard_mb: float = 64.0
    """Megabytes (1e6 bytes) of source files that are tokenised at a time: what a kill can lose."""
    runner: str = "DirectRunner"
    """Beam's runner, for example FlinkRunner, SparkRunner, DataflowRunner."""
    runner_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE, repeatable: an option of Beam's runner, for example flink_master=localhost:8081."""
    from_published: Path | None = None
    """Convert this folder of AmberDatasets' or CrystalCoderDatasets' files instead of preparing sources."""
    to: Literal["arrayrecord", "jsonl"] = "arrayrecord"
    """jsonl: write the chunks in LLM360's published form too, in OUT/published."""
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read all of OUT again and compare it with its manifest; statistics of each source and chunk."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only say what would come out, by arithmetic; needs no data."""
    json: Json = False
    """Print one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train, or continue, a run: the same command does both."""

    config: Config
    data: str
    """Data directory made by `prepare`, LLM360's published files, or `synthetic` for random tokens without files."""
    mixture: str | None = None
    """SOURCE=WEIGHT,…: read prepared data in other shares of its sources, for example code=0.8,prose=0.2."""
    run: RunDir | None = None
    """Run directory, or gs://BUCKET/FOLDER; may be left out with --data synthetic, which then only times steps and
    writes nothing."""
    steps: int | None = None
    """Stop after this many steps in all (with synthetic data and no --run: time this many)."""
    simulate: int | None = None
    """Train on this many simulated CPU devices (of each process)."""
    fault: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """nan@STEP or spike@STEP, repeatable: damage the batch of a step, to see what the guard does."""
    hosts: Annotated[HostFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=HostFlags)
    json: Json = False
    """Print one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Rank the ways to train a recipe on a topology, say why, and let the compiler of the platform check them.

    Mesh, microbatches, schedule, repeats, gather and remat are what is chosen: of what the recipe says of them, only a
    mesh that is given counts.
    """

    config: Config
    topology: str
    """v5p:4x4x8, 2*v5e:16x16 (slices), h100:4x8 (nodes x GPUs), cpu:8, or amber (LLM360's cluster); @0.1 after it
    takes a tenth of its network."""
    objective: Literal["time", "memory", "cost"] = "time"
    """Least time of a step, least memory, or fewest chip-hours (smaller topologies of the chip are looked at too)."""
    top: int = 10
    """Show so many plans."""
    explain: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the arithmetic of the best plan."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile the best plans for the topology, which need not be there, and compare; half a minute each for 7B."""
    verify_top: int = 3
    """With --verify: so many of them."""
    cache: Path = Path(".cache/compiled")
    """Folder that keeps what the compiler answered."""
    timeout_s: float = 600.0
    """Time for each compilation."""
    json: Json = False
    """Print one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class SeriesArgs:
    """List the checkpoint series of a run, check it, or compare two of its checkpoints."""

    dir: tyro.conf.Positional[RunDir]
    """Run directory, or gs://BUCKET/FOLDER."""
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read every file of every checkpoint, and of the data; compare all with manifests, ledger and config. Exit code 1:
    something is not what it should be."""
    diff: tuple[str, str] | None = None
    """A B: how far the parameters of checkpoint B are from those of A. Each an index, a name, init, latest, step=N."""
    skip_data: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --check: compare the data's manifest, and do not read the data."""
    rebuild: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write series.jsonl anew from the manifests."""
    json: Json = False
    """Print one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Replay the training of a run: train again from one checkpoint to another, and compare all on the way.

    Every logged loss and every checkpoint is compared. Exit code 1: something differs.
    """

    dir: tyro.conf.Positional[RunDir]
    """Run directory, or gs://BUCKET/FOLDER."""
    from_: Annotated[str, tyro.conf.arg(name="from")] = "init"
    """Checkpoint to begin with: an index, a name, init, step=N. One without optimizer state: the nearest before it."""
    to: str = "latest"
    """Checkpoint to end with."""
    sample: int | None = None
    """Instead of all steps in one go: so many of the links between neighbouring checkpoints, each by itself, at random;
    all of them, if there are not more."""
    seed: int = 0
    """Of that choice."""
    mesh: str | None = None
    """Replay on this mesh: equal within a tolerance; by default on those of the run: equal bit for bit."""
    data: Path | None = None
    """Data directory of the run, if it is no longer where it was."""
    simulate: int | None = None
    """Replay on this many simulated CPU devices (of each process); by default as many as the run had."""
    hosts: Annotated[HostFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=HostFlags)
    json: Json = False
    """Print one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class Where:
    """On what a checkpoint is used, and how."""

    mesh: str = "data=1"
    """Degrees of parallelism."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrices and activations."""
    simulate: int | None = None
    """Run on this many simulated CPU devices."""


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits of given token ids."""

    ref: tyro.conf.Positional[str]
    """Checkpoint: DIR@K, DIR@latest, DIR@init, DIR@step=N."""
    tokens: Path
    """.npy file of token ids, integers [rows, positions]."""
    out: Path
    """.npz file to write: `logits`, float32 [rows, positions, vocabulary]."""
    where: Annotated[Where, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Where)
    json: Json = False
    """Print one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue prompts, greedily or sampled, with a key/value cache."""

    ref: tyro.conf.Positional[str]
    """Checkpoint: DIR@K, DIR@latest, DIR@init, DIR@step=N."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; repeatable, all are continued together."""
    max_new_tokens: int = 64
    """Longest continuation."""
    temperature: float = 0.0
    """0 = greedy."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 0
    """Same seed, same text."""
    special: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read special tokens spelled in the prompt as such, for example <|fim_prefix|>; else they are plain text."""
    no_cache: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the whole prefix again for every token: slow, gives the same text."""
    tokenizer: Path | None = None
    """SentencePiece .model, tokenizer.json, or a folder with one, if not the one of the run."""
    where: Annotated[Where, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Where)
    json: Json = False
    """Print one JSON object on stdout."""


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Analyze(Generic[T]):
    """One study of the checkpoints that REF names: what is missing of its results, in DIR/results."""

    ref: tyro.conf.Positional[str]
    """Checkpoints: DIR@K, DIR@latest, DIR@0:360:10, DIR@all."""
    study: Annotated[T, tyro.conf.arg(name="")]
    data: Path | None = None
    """Data directory of the run, if it is no longer where it was."""
    tokenizer: Path | None = None
    """SentencePiece .model, tokenizer.json, or a folder with one, if not the one of the run."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make results anew that were made with other settings."""
    name: str | None = None
    """Keep these results apart from those with other settings, under this name."""
    where: Annotated[Where, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Where)
    json: Json = False
    """Print one JSON object on stdout."""


class Evaluate(Analyze[T]):
    """Benchmarks by lm-evaluation-harness, of the checkpoints that REF names: what is missing of DIR/results."""


@dataclasses.dataclass(frozen=True)
class Report:
    """One HTML page about a run: loss, evaluations, analyses, data, meshes, and the series with its digests."""

    dir: tyro.conf.Positional[Path]
    """Run directory."""
    out: Path | None = None
    """Where to write it; by default DIR/report.html."""
    json: Json = False
    """Print one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class Import:
    """Add a Hugging Face folder (Llama or CrystalCoder) to the series of a run, with a proof that nothing changed."""

    hf_dir: tyro.conf.Positional[Path]
    """Folder with config.json and weights: safetensors or .bin, one file or shards."""
    run: Path
    """Run directory to add to; made if it is not there."""
    as_: Annotated[str | None, tyro.conf.arg(name="as")] = None
    """Place in the series: an index, ckpt_012, or CrystalCoder_phase2_checkpoint_018000. By default the folder's name,
    if it is of that kind, else the next index with step and tokens unknown."""
    recipe: str | None = None
    """Recipe whose arithmetic gives step, tokens and learning rate; by default the one whose model the folder holds."""
    every: tuple[int, ...] = ()
    """Steps between series checkpoints, a number for each phase, if not the recipe's."""
    transformers: bool = True
    """Compare logits with Hugging Face's transformers too, if it is installed and has the memory."""
    json: Json = False
    """Print one JSON object on stdout: the parity report."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a checkpoint as a Hugging Face folder, with a proof that nothing changed."""

    ref: tyro.conf.Positional[str]
    """Checkpoint: DIR@K, DIR@latest, DIR@init, DIR@step=N."""
    out: Path
    """Folder to make."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights in the folder."""
    shard_gb: float = 5.0
    """Largest weight file, in gigabytes (1e9 bytes)."""
    tokenizer: Path | None = None
    """Tokenizer file or folder to put beside the weights, if not the one of the run."""
    transformers: bool = True
    """Compare logits with Hugging Face's transformers too, if it is installed and has the memory."""
    json: Json = False
    """Print one JSON object on stdout: the parity report."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """From a step to the documents in it, or from a document or text to the steps and checkpoints that had seen it."""

    dir: tyro.conf.Positional[Path]
    """Run directory, or data directory."""
    step: int | None = None
    """What this step of the run read (0 is the first)."""
    row: int | None = None
    """Only this row of the step's batch."""
    chunk: int | None = None
    """With --position: what this sample of the data set is."""
    position: int | None = None
    """See --chunk."""
    document: str | None = None
    """Where this document went: FILE, FILE:LINE, or SOURCE/FILE:LINE as the other queries print it."""
    text: str | None = None
    """Where this text (three words or more) went; reads all chunks."""
    max: int = 20
    """Stop after so many samples that hold the text."""
    data: Path | None = None
    """Data directory of the run, if it is no longer where it was."""
    global_batch: int | None = None
    """Samples in a step, to name steps where only a data directory is given."""
    json: Json = False
    """Print one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class Mixtures:
    """Train the same model on several mixtures of one prepared data set, and compare the loss on each source."""

    config: Config
    data: Path
    """Data directory made by `prepare`."""
    run: Path
    """Directory for the runs, one below it for each mixture."""
    mixture: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """SOURCE=WEIGHT,…, repeatable: for example code=0.8,prose=0.2."""
    steps: int | None = None
    """Train each for so many steps; by default as many as the data set has."""
    simulate: int | None = None
    """Train on this many simulated CPU devices."""
    json: Json = False
    """Print one JSON object on stdout."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """The whole story on this machine in minutes: real text, training, a kill, another mesh, the series, text."""

    dir: Path = Path("runs/demo")
    """Run directory; the data goes beside it, with -data added to the name."""
    chunks: int = 12
    """Chunks of data, and so checkpoints besides the first."""
    steps_per_chunk: int = 32
    """Steps in each chunk, about: the text that this machine has decides."""
    json: Json = False
    """Print one JSON object on stdout."""


# ---- what is done --------------------------------------------------------------------------------------------------


def note(text: str) -> None:
    """Log a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def prepare(args: Prepare) -> tuple[dict[str, Any], int]:
    """Verb `prepare`."""
    from data import outline
    from data.prepare import prepare as prepare_data

    config = args.config
    _refuse_idle_flags(args)
    if args.dry_run:
        sizes = _outline(args)
        if not args.json:
            print("\n".join(outline.lines(sizes)))
        return sizes, 0
    if args.out is None:
        raise UserError("prepare: --out DIR is missing; only --dry-run works without one")
    if args.check:
        return _check(args.out, _engine(args, args.out), args.json)
    if args.from_published is not None:
        from data.convert import from_published
        from data.folder import WORK

        manifest = from_published(
            _published(args.from_published, config),
            args.out,
            recipe=config.recipe,
            samples_per_chunk=config.data.samples_per_chunk or 100 * config.data.global_batch,
            tokenizer=args.tokenizer,
            engine=_engine(args, args.out / WORK),
            log=note,
        )
    else:
        manifest = prepare_data(_prepare_config(args, args.out), log=note)
    shares = outline.shares(manifest, config.phases[0].mixture)
    result: dict[str, Any] = {
        "data": str(args.out),
        "chunks": len(manifest.chunk_files),
        "samples": [p.samples for p in manifest.phases],
        "samples_per_chunk": [p.samples_per_chunk for p in manifest.phases],
        "sequence_length": manifest.sequence_length,
        "vocab_size": manifest.vocab_size,
        "tokens_in_chunks": sum(p.samples for p in manifest.phases) * (manifest.sequence_length + 1),
        "sources": shares,
        "manifest_sha256": manifest.sha256,
    }
    if args.to == "jsonl":
        from data.convert import to_jsonl

        published = to_jsonl(args.out, args.out / "published", _engine(args, args.out), note)
        result["published"] = str(published)
    if not args.json:
        print("\n".join(outline.share_lines(shares)))
        samples = ", ".join(f"{p.samples:,}" for p in manifest.phases)
        print(
            f"{args.out}: {len(manifest.chunk_files)} chunks with {samples} samples of {manifest.sequence_length}+1 "
            f"tokens, manifest {manifest.sha256[:12]}"
        )
    return result, 0


#: What a way of calling `prepare` does not look at, so that giving it is a mistake.
_IDLE_FLAGS = {
    "check": (
        "source", "text_field", "label", "tokenizer", "compat", "on_bad", "max_mb_per_source", "shard_mb",
        "from_published", "to", "dry_run",
    ),
    "dry_run": ("tokenizer", "compat", "on_bad", "max_mb_per_source", "engine", "from_published", "to"),
    "from_published": ("source", "text_field", "label", "compat", "on_bad", "max_mb_per_source", "shard_mb"),
}  # fmt: skip


def _refuse_idle_flags(args: Prepare) -> None:
    """A flag that changes nothing would be believed to: UserError."""
    usual = {f.name: f.default for f in dataclasses.fields(Prepare)}
    modes = [mode for mode in _IDLE_FLAGS if getattr(args, mode)]
    idle = {name: f"--{mode.replace('_', '-')}" for mode in reversed(modes) for name in _IDLE_FLAGS[mode]}
    if args.engine == "local":
        idle |= dict.fromkeys(("runner", "runner_option"), "--engine local")
    else:
        idle["workers"] = "--engine beam"
    for name, mode in idle.items():
        if getattr(args, name) != usual[name]:
            raise UserError(f"prepare: --{name.replace('_', '-')} does nothing with {mode}; leave one of them out")


def _sources(args: Prepare) -> tuple[Any, ...]:
    """The sources that were named, with what else was said of them."""
    from data.sources import SourceSpec

    specs = {s.name: s for s in map(SourceSpec.parse, args.source)}
    if len(specs) < len(args.source):
        raise UserError("prepare: a --source name was given twice; give each source its own name")
    fields = _by_source("--text-field", args.text_field, specs)
    labels = _by_source("--label", args.label, specs)
    begun = args.config.data.bos_sources
    return tuple(
        dataclasses.replace(s, text_field=fields.get(name), label=labels.get(name), bos=name in begun)
        for name, s in specs.items()
    )


def _by_source(flag: str, words: Sequence[str], specs: Any) -> dict[str, str]:
    """The values of a flag of the form NAME=VALUE."""
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in specs or not value:
            raise UserError(f"{flag} {word}: write NAME=VALUE, NAME one of the sources: {', '.join(specs)}")
        values[name] = value
    return values


def _engine(args: Prepare, shared: Path) -> Any:
    """The engine; Beam's workers leave their results in the folder `shared`."""
    from data.engines import Beam, Local

    if args.engine == "local":
        return Local(args.workers)
    return Beam((f"--runner={args.runner}", *(f"--{option}" for option in args.runner_option)), shared)


def _plan(args: Prepare) -> dict[str, Any]:
    """What a recipe says of its layout, as fields of a PrepareConfig."""
    from data.prepare import PhasePlan

    data = args.config.data
    if data.layout == "chunks":
        if data.chunks is None:
            raise UserError(f"prepare: {args.config.recipe} leaves the number of chunks open; set --data.chunks")
        return {"layout": "chunks", "chunks": data.chunks}
    per_chunk = data.samples_per_chunk or 100 * data.global_batch  # a file of whole batches, rather small
    phases = tuple(
        PhasePlan(
            parts=p.mixture,
            samples=p.steps * data.global_batch if p.steps else None,
            chunks=p.chunks,
            samples_per_chunk=None if p.chunks else per_chunk,
        )
        for p in args.config.phases
    )
    return {"layout": "mixture", "phases": phases, "file_samples": data.file_samples}


def _outline(args: Prepare) -> dict[str, Any]:
    """The sizes of the data that a recipe would have, and of the sources that are there."""
    from data import outline

    config, data = args.config, args.config.data
    shape = {"sequence_length": data.sequence_length, "global_batch": data.global_batch}
    result: dict[str, Any] = {"recipe": config.recipe}
    if data.layout == "chunks" and config.phases[0].mixture:
        result |= outline.chunks(
            config.phases[0].mixture,
            chunks=outline.known_samples(data.chunks, "the number of chunks (--data.chunks)"),
            samples_per_chunk=outline.known_samples(data.samples_per_chunk, "--data.samples-per-chunk"),
            validation=data.validation_per_source,
            seed=data.seed,
            **shape,
        )
    elif data.layout == "mixture" and all(p.steps for p in config.phases):
        result |= outline.phases([(p.mixture, (p.steps or 0) * data.global_batch) for p in config.phases], **shape)
    if args.source:
        result["files"] = outline.files(_sources(args))
    if len(result) == 1:
        raise UserError(
            f"--dry-run: the sizes of {config.recipe} depend on its sources; give --source to count their files, or "
            "use a recipe that states its sizes, such as amber_7b or crystal_7b"
        )
    return result


def _prepare_config(args: Prepare, out: Path) -> Any:
    from data.folder import WORK
    from data.prepare import PrepareConfig

    data = args.config.data
    if not args.source:
        raise UserError("prepare: no source; give --source NAME=PATH at least once, for example code=embedded:stdlib")
    if args.max_mb_per_source is not None and not 1e-6 <= args.max_mb_per_source < math.inf:
        raise UserError(f"--max-mb-per-source {args.max_mb_per_source}: must be a positive number of megabytes")
    if not 1e-6 <= args.shard_mb < math.inf:
        raise UserError(f"--shard-mb {args.shard_mb}: must be a positive number of megabytes")
    return PrepareConfig(
        recipe=args.config.recipe,
        out=out,
        sources=_sources(args),
        sequence_length=data.sequence_length,
        overlap=data.overlap,
        vocab_size=args.config.model.vocab_size,
        validation_per_source=data.validation_per_source,
        seed=data.seed,
        original=args.compat == "original",
        tokenizer=args.tokenizer,
        on_bad=args.on_bad,
        max_bytes_per_source=None if args.max_mb_per_source is None else int(args.max_mb_per_source * 1e6),
        shard_bytes=int(args.shard_mb * 1e6),
        engine=_engine(args, out / WORK),
        **_plan(args),
    )


def _check(out: Path, engine: Any, as_json: bool) -> tuple[dict[str, Any], int]:
    """Check a data directory; the code is 1 if anything is wrong with it."""
    from data.check import check

    statistics, problems = check(out, engine, note)
    if not as_json:
        print(
            f"{'source':16} {'documents':>12} {'tokens':>16} {'bytes/token':>12} {'unknown':>9} {'empty':>7} {'bad':>7}"
        )
        for name, s in statistics["sources"].items():
            ratio = "-" if s["bytes_per_token"] is None else f"{s['bytes_per_token']:.3f}"
            print(
                f"{name:16} {s['documents']:>12,} {s['tokens']:>16,} {ratio:>12} {s['unknown']:>9,} {s['empty']:>7,} "
                f"{s['bad']:>7,}"
            )
        twice = statistics["duplicates"]
        print(f"{twice['documents']:,} documents repeat one of {twice['texts']:,} texts")
        for one, other in twice["named"]:
            print(f"  {one} = {other}")
        print(f"{out}: {'every file is as its manifest says' if not problems else f'{len(problems)} problems'}")
    for problem in problems:
        note(f"error: {problem}")
    return {**statistics, "problems": problems}, 1 if problems else 0


def open_data(path: Path, config: RunConfig) -> Any:
    """The data set of a folder: prepared by us, or LLM360's files as they were published."""
    from data.chunks import MANIFEST
    from data.loader import ChunkedData
    from data.published import is_published

    if not (path / MANIFEST).exists() and is_published(path):
        return _published(path, config)
    return ChunkedData(path)


def _prepared(data: Any) -> Any:
    """The data set, if it is one that we prepared."""
    from data.loader import ChunkedData

    if not isinstance(data, ChunkedData):
        raise UserError("this needs data in our own format; convert published files with prepare --from-published")
    return data


def _published(path: Path, config: RunConfig) -> Any:
    """LLM360's published files in a folder, read as the recipe reads its data."""
    from data.published import PublishedAmber, PublishedCrystal, is_published

    data = config.data
    shape = (data.sequence_length, config.model.vocab_size, data.seed)
    if is_published(path) == "jsonl":
        return PublishedAmber(path, *shape, lines=data.samples_per_chunk)  # known: no need to count them all first
    if is_published(path) == "hdf5":
        samples = [p.steps * data.global_batch if p.steps else None for p in config.phases]
        return PublishedCrystal(path, [p.mixture for p in config.phases], samples, *shape)
    raise UserError(f"{path}: has neither train_000.jsonl … (AmberDatasets) nor .h5 files (CrystalCoderDatasets)")


def train(args: Train) -> tuple[dict[str, Any], int]:
    """Verb `train`: this process's part, if there are several."""
    # What plans count on (`parallel.topology`): by itself JAX takes three quarters of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    from parallel import distributed
    from parallel.mesh import simulate

    if args.simulate is not None:
        simulate(args.simulate, check=False)  # asks for no device: several processes must find each other first
    with distributed.start(args.hosts) as hosts:
        if hosts.processes == 1:
            _simulate(args.simulate)
        if hosts.processes > 1 and distributed.is_lead():
            note(f"{hosts.processes} processes, as said by {hosts.how}")
        return _train(args, distributed.is_lead())


def _train(args: Train, lead: bool) -> tuple[dict[str, Any], int]:
    from data.mixed import MixedData
    from training import loop
    from training.guard import Fault

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be at least 1")
    if args.run is not None:
        storage.reach(args.run)
    config = _planned(args.config, lead) if args.config.mesh.is_auto else args.config
    data: Any
    if args.data == "synthetic":
        if args.mixture is not None:
            raise UserError("train: --mixture is of a prepared data set's sources; synthetic data has none")
        # A timed run needs its steps; of a run that is kept, the data must not depend on --steps.
        data = config.synthetic(max(100, 0 if args.run else args.steps or 0))
        if args.run is None:
            steps = args.steps or 10
            timing = loop.time_steps(config, data, steps, lambda n: note(f"step {n + 1}/{steps}") if lead else None)
            if lead and not args.json:
                print("\n".join(f"{k:32} {v}" for k, v in timing.items()))
            return timing, 0
    else:
        data = open_data(storage.local(args.data), config)
        if args.mixture is not None:
            data = MixedData.parse(_prepared(data), args.mixture)
    if args.run is None:
        raise UserError("train: --run DIR is missing; only --data synthetic works without one")
    faults = [Fault.parse(text) for text in args.fault]
    outcome = loop.train(config, args.run, data, families(), stop_at=args.steps, faults=faults)
    if lead and not args.json:
        loss = "" if outcome.validation_loss is None else f", validation loss {outcome.validation_loss:.4f}"
        again = "" if outcome.reason == "finished" else "; the same command continues"
        print(f"{args.run}: {outcome.reason} after {outcome.step} steps, {outcome.tokens:,} tokens{loss}{again}")
    return dataclasses.asdict(outcome), EXIT_STOPPED if outcome.reason == "interrupted" else 0


def _planned(config: RunConfig, lead: bool) -> RunConfig:
    """The config with the plan that is predicted to be the fastest on the devices that are there."""
    import jax

    from parallel.topology import Topology
    from training import planning

    config, prediction = planning.auto(config, Topology.of(jax.devices()))
    if lead:
        memory = f"{prediction.bytes / 1e9:.2f} GB a device, predicted"
        note(f"--mesh auto, {prediction.topology}: {prediction.plan} ({memory})")
    return config


def compiles() -> dict[str, Any]:
    """How `training.plan_check.check` has one plan compiled, and the files that make the program."""
    here = Path(__file__).resolve()
    names = ("axes", "collectives", "compiler", "flops", "hlo", "mesh", "pipeline", "plan")  # not what only predicts
    sources = [f"parallel/{name}.py" for name in names] + ["layers", "training", "amber_jax", "crystal_jax"]
    return {
        "command": [sys.executable, str(here), COMPILE],
        "sources": [here.parent / name for name in [*sources, "data/batch.py"]],
    }


def plan(args: PlanArgs) -> tuple[dict[str, Any], int]:
    """Verb `plan`. Exit code 1: a plan that was said to fit was refused, or could not be compiled."""
    import jax

    from parallel import planner
    from parallel.topology import Topology
    from training import plan_check, planning

    jax.config.update("jax_platforms", "cpu")  # no device is used; with libtpu installed, JAX would look for a TPU
    for name in ("top", "verify_top", "timeout_s"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"plan: --{name.replace('_', '-')} {getattr(args, name)}: must be positive")
    if args.cache.exists() and not args.cache.is_dir():
        raise UserError(f"plan: --cache {args.cache}: is a file; give a folder")
    topology = Topology.parse(args.topology)
    if args.verify:
        plan_check.target(topology)
    mesh = None if args.config.mesh.is_auto else args.config.mesh.resolve(topology.devices, str(topology))
    workload = planning.workload(args.config, topology.chip.platform)
    ranking = planner.rank(workload, topology, args.objective, only_mesh=mesh)
    best = ranking.best[: args.top]
    if not args.json:
        print("\n".join(planner.lines(ranking, args.top)))
    if args.explain and not args.json:
        print("\n".join(["", *planner.explain(best[0])]))
    result = {
        "topology": str(topology),
        "objective": args.objective,
        "plans": [
            {
                "topology": str(p.topology),
                "plan": p.plan.as_dict(),
                "predicted_step_s": p.seconds,
                "predicted_peak_bytes": round(p.bytes),
                "predicted_chip_hours_per_trillion_tokens": p.chip_hours,
            }
            for p in best
        ],
        "rejected": [dataclasses.asdict(r) for r in ranking.rejected],
    }
    if args.explain:
        result["explained"] = planner.explain(best[0])
    if not args.verify:
        return result, 0
    if not args.json:
        print(
            "\ncompiled for the same chips (memory of a device; step time predicted, by our bytes and the compiler's):"
        )
        print(plan_check.HEAD)
    checked = plan_check.check(
        args.config,
        workload,
        ranking.best[: args.verify_top],
        **compiles(),
        cache=args.cache,
        timeout_s=args.timeout_s,
        progress=lambda c: note(plan_check.line(c)) if args.json else print(plan_check.line(c), flush=True),
    )
    result["checked"] = [c.row() for c in checked]
    return result, 0 if all(c.fits for c in checked) else 1


def series(args: SeriesArgs) -> tuple[dict[str, Any], int]:
    """Verb `series`."""
    from checkpoint.check import rebuild
    from checkpoint.series import Series
    from training import audit

    if not (storage.reach(args.dir) / "config.json").exists():
        raise UserError(f"{args.dir}: not a run directory (no config.json in it)")
    if args.check + args.rebuild + (args.diff is not None) > 1:
        raise UserError("series: ask one thing: --check, --diff A B, or --rebuild")
    if args.diff is not None:
        return _diff(args.dir, args.diff, args.json), 0
    if args.rebuild:
        note(f"{args.dir}/series.jsonl: {rebuild(args.dir)} lines, from the manifests")
    if args.check:
        found = audit.audit(args.dir, families(), open_data, note, content=not args.skip_data)
    else:
        there = Series(args.dir)
        rolling = there.rolling()
        found = audit.unchecked(there.entries(), there.early(), [rolling] if rolling else [])
    if not args.json:
        print("\n".join(audit.listing(found.rows, args.dir)))
    for kind, texts in (("note", found.notes), ("error", found.problems)):
        for text in texts:
            note(f"{kind}: {text}")
    rows = found.rows
    result = {"run": str(args.dir), "checkpoints": rows["series"], "early": rows["early"], "rolling": rows["rolling"]}
    result |= {"bytes": sum(r["bytes"] for of_kind in rows.values() for r in of_kind)}
    return result | {"problems": [*found.problems], "notes": [*found.notes]}, 1 if found.problems else 0


def _diff(run: Path, selectors: tuple[str, str], as_json: bool) -> dict[str, Any]:
    """What changed from one checkpoint to another."""
    from checkpoint import check
    from checkpoint.series import Series

    entries = []
    for selector in selectors:
        found = Series(run).resolve(selector)
        if len(found) != 1:
            raise UserError(f"--diff: {selector} names {len(found)} checkpoints, expected one")
        entries += found
    changes = check.diff(*entries)
    names = [e.manifest.name for e in entries]
    if not as_json:
        print("\n".join(check.table(changes)))
        print(f"{names[1]} against {names[0]}, in {run}")
    whole = check.total(changes)
    return {"run": str(run), "a": names[0], "b": names[1], "tensors": [c.row() for c in changes], "total": whole.row()}


def verify(args: Verify) -> tuple[dict[str, Any], int]:
    """Verb `verify`: this process's part, if there are several."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # as in `train`
    from parallel import distributed
    from parallel.mesh import MeshConfig, simulate
    from training.record import RunRecord

    if args.sample is not None and args.sample < 1:
        raise UserError(f"--sample {args.sample}: must be at least 1")
    record = RunRecord(storage.reach(args.dir), families())
    mesh = None if args.mesh is None else MeshConfig.parse(args.mesh)
    devices = args.simulate
    if devices is None and all(s.made_by["device_kind"] == "cpu" for s in record.segments):
        # Each process has its part of them.
        meshes = [mesh] if mesh and -1 not in mesh.degrees.values() else [MeshConfig(**s.mesh) for s in record.segments]
        devices = max(m.size for m in meshes)
        devices = -(-devices // (args.hosts.processes or 1))
    if devices is not None:
        simulate(devices, check=False)
    with distributed.start(args.hosts) as hosts:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX takes it for a notice, and nobody here would ask for it
        if hosts.processes == 1:
            _simulate(devices)
        return _verify(args, record, mesh, distributed.is_lead())


def _verify(args: Verify, record: Any, mesh: Any, lead: bool) -> tuple[dict[str, Any], int]:
    from checkpoint.series import Series
    from training.metrics import Ledger
    from training.replay import Replayer

    replayer = Replayer(record, _data_of(record, args.data), mesh)
    ends = []
    for flag, selector in (("from", args.from_), ("to", args.to)):
        entries = Series(args.dir).resolve(selector)
        if len(entries) != 1:
            raise UserError(f"--{flag} {selector}: names {len(entries)} checkpoints, expected one")
        ends.append(entries[0])
    pairs = [(ends[0], ends[1])]
    if args.sample is not None:
        pairs = replayer.sample(*pairs[0], args.sample, args.seed)
    found = []
    for start, end in pairs:
        replayed = replayer.replay(start, end)
        found.append(replayed.as_dict())
        if lead:
            if not args.json:
                print("\n".join(replayed.lines()), flush=True)
            try:
                Ledger(args.dir, tidy=False)("verify", **replayed.as_dict())
            except RunError as e:  # somebody else's run, which may be only read
                note(f"not written to the ledger: {e}")
    verdicts = [r["verdict"] for r in found]
    if lead and not args.json and len(found) > 1:
        print(f"{len(found)} links: " + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)))
    return {"run": str(args.dir), "replays": found}, 1 if "DIFFERS" in verdicts else 0


def _data_of(record: Any, folder: Path | None) -> Any:
    """The data that a run was trained on, as its ledger says, or from another folder."""
    from data.mixed import MixedData

    named, weights = record.data
    if named is None and folder is None:
        return record.config.synthetic()
    data = open_data(folder or named, record.config)
    return MixedData(_prepared(data), weights) if weights else data


def logits(args: Logits) -> dict[str, Any]:
    """Verb `logits`."""
    import numpy as np

    from inference.forward import forward

    try:
        tokens = np.load(args.tokens, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"--tokens {args.tokens}: cannot read it as .npy ({e})") from e
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: give a name that ends in .npz")
    target = _target(args.ref, args.where)
    subject = target.one()
    result = forward(target.model, subject.weights, tokens, target.mesh, target.region)
    try:
        np.savez(args.out, logits=result["logits"])
    except OSError as e:
        raise RunError(f"--out {args.out}: cannot write it ({e.strerror})") from e
    shape = list(result["logits"].shape)
    if not args.json:
        print(f"{args.out}: logits float32 {shape} of {subject.name}")
    return {"checkpoint": subject.name, "out": str(args.out), "shape": shape, "dtype": "float32"}


def generate(args: Generate) -> dict[str, Any]:
    """Verb `generate`."""
    from inference.generate import Sampling

    if not args.prompt:
        raise UserError('generate: no prompt; give --prompt "…" at least once')
    for prompt in args.prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError as e:  # bytes that are not UTF-8 reach Python as lone surrogates
            raise UserError(f"--prompt {prompt!r}: not UTF-8 ({e.reason} at character {e.start})") from e
    target = _target(args.ref, args.where, tokenizer=args.tokenizer)
    subject, tokenizer = target.one(), target.tokenizer
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    prompts = [tokenizer.encode(p, special=args.special) for p in args.prompt]
    new = subject.generate(prompts, sampling, use_cache=not args.no_cache)
    texts = [tokenizer.decode(p + n) for p, n in zip(prompts, new, strict=True)]
    if not args.json:
        print("\n---\n".join(texts))
    continuations = [{"prompt": p, "text": t, "new_tokens": n} for p, t, n in zip(args.prompt, texts, new, strict=True)]
    return {"checkpoint": subject.name, "continuations": continuations}


def analyze(args: Analyze[Any]) -> tuple[dict[str, Any], int]:
    """Verb `analyze`, and `evaluate`, which is the study of that name."""
    from analysis.results import lines
    from analysis.sweep import sweep

    target = _target(args.ref, args.where, data=args.data, tokenizer=args.tokenizer)
    opened = args.study.open(target, note)
    outcome = sweep(target, opened, note, overwrite=args.overwrite, name=args.name)
    if opened and not args.json:
        print("\n".join(lines(outcome.results())))
    return outcome.to_json(), outcome.code


def report(args: Report) -> dict[str, Any]:
    """Verb `report`."""
    from analysis.report import write

    return write(args.dir, families(), args.out or args.dir / "report.html", note)


def import_hf(args: Import) -> dict[str, Any]:
    """Verb `import`."""
    from huggingface.importer import import_folder

    if args.recipe is not None and args.recipe not in recipes():
        raise UserError(f"--recipe {args.recipe!r}: unknown{_nearest(args.recipe, recipes())}")
    target, proof, seconds = import_folder(
        args.hf_dir,
        args.run,
        formats(),
        families(),
        recipes(),
        args.recipe,
        args.as_,
        args.every,
        args.transformers,
        note,
    )
    position = target.position
    tokens = target.recipe.data.tokens_per_step * position.step if target.recipe and position else None
    result = {
        "checkpoint": f"{args.run}@{target.index}",
        "recipe": target.recipe.recipe if target.recipe else None,
        "step": position.step if position else None,
        "tokens": tokens,
        "seconds": seconds,
        "parity": dataclasses.asdict(proof),
    }
    if not args.json:
        where = f"step {position.step:,}, {tokens:,} tokens" if position else "step not known"
        print(f"{result['checkpoint']}: {target.model.family}, recipe {result['recipe'] or 'not known'}, {where}")
    return result


def export(args: Export) -> dict[str, Any]:
    """Verb `export`."""
    from huggingface.exporter import export_folder

    if not 1e-6 <= args.shard_gb < math.inf:
        raise UserError(f"--shard-gb {args.shard_gb}: must be a positive number of gigabytes")
    target = _target(args.ref, Where(), tokenizer=args.tokenizer)
    model, entry = target.model, target.entry
    name = f"{target.run}@{entry.manifest.name}"
    form = next(f for f in formats().values() if f.model is type(model))
    shard_bytes = int(args.shard_gb * 1e9)
    proof, seconds = export_folder(
        entry,
        model,
        target.recipe,
        args.out,
        form,
        args.dtype,
        shard_bytes,
        target.find_tokenizer(),
        args.transformers,
        note,
    )
    if not args.json:
        print(f"{args.out}: {name} as a Hugging Face folder, digest {proof.digest}")
    return {
        "checkpoint": name,
        "out": str(args.out),
        "seconds": seconds,
        "parity": dataclasses.asdict(proof),
    }


def trace(args: Trace) -> dict[str, Any]:
    """Verb `trace`."""
    from training import trace as provenance

    asked = [name for name in ("step", "chunk", "document", "text") if getattr(args, name) is not None]
    if len(asked) != 1 or (args.chunk is None) != (args.position is None):
        raise UserError("trace: ask one thing: --step N [--row R], --chunk C --position P, --document ID, or --text T")
    tracer = provenance.RunTracer(args.dir, families(), open_data, data=args.data, global_batch=args.global_batch)
    if args.document is not None:
        found = tracer.document(args.document)
        text = provenance.document_lines(found)
    else:
        if args.step is not None:
            found = tracer.step(args.step, args.row)
        elif args.chunk is not None and args.position is not None:
            found = tracer.sample(args.chunk, args.position)
        else:
            found = tracer.text(args.text or "", args.max)
        text = provenance.lines(found)
    if not args.json:
        print("\n".join(text) or "nothing found")
    return {"dir": str(args.dir), "documents" if args.document is not None else "samples": found}


def mixtures(args: Mixtures) -> tuple[dict[str, Any], int]:
    """Verb `mixtures`."""
    from data.loader import ChunkedData
    from data.mixed import MixedData
    from training import mixtures as experiment

    _simulate(args.simulate)
    if len(set(args.mixture)) < 2:
        raise UserError("mixtures: give --mixture SOURCE=WEIGHT,… at least twice, to compare them")
    data = ChunkedData(args.data)
    views = {text: MixedData.parse(data, text) for text in args.mixture}
    rows, finished = experiment.compare(args.config, args.run, views, families(), args.steps, note)
    if rows and not args.json:
        print("\n".join(experiment.table(rows)))
    return {"data": str(args.data), "runs": rows, "finished": finished}, 0 if finished else EXIT_STOPPED


def run_demo(args: Demo) -> dict[str, Any]:
    """Verb `demo`."""
    import demo

    return demo.run(args.dir, args.chunks, args.steps_per_chunk, quiet=args.json)


def _simulate(devices: int | None) -> None:
    if devices is not None:
        from parallel.mesh import simulate

        simulate(devices)


def _target(ref: str, where: Where, **more: Any) -> Any:
    """What checkpoints of a run are looked at with: `analysis.subject.Target`."""
    from analysis.subject import Target

    _simulate(where.simulate)
    return Target(ref, families(), open_data, mesh=where.mesh, compute_dtype=where.compute_dtype, **more)


# ---- from words to calls -------------------------------------------------------------------------------------------

#: Settings of each study, by the word after `analyze`: (module, class).
STUDIES = {
    "perplexity": ("analysis.perplexity", "Perplexity"),
    "memorization": ("analysis.memorization", "Memorization"),
    "contamination": ("analysis.contamination", "Contamination"),
    "weights": ("analysis.weights", "Weights"),
    "bold": ("analysis.bold", "Bold"),
    "toxicity": ("analysis.toxicity", "Toxicity"),
    "toxigen": ("analysis.toxigen", "Toxigen"),
}


def _study(module: str, name: str) -> Any:
    """Arguments of a study: those of all, and its own settings."""
    settings = getattr(importlib.import_module(module), name)
    arguments = Analyze[settings]  # type: ignore[valid-type]
    arguments.__doc__ = settings.__doc__
    return arguments


#: verb -> (arguments, whether a recipe name comes first, function).
VERBS: dict[str, tuple[Any, bool, Callable[[Any], Any]]] = {
    "demo": (Demo, False, run_demo),
    "prepare": (Prepare, True, prepare),
    "plan": (PlanArgs, True, plan),
    "train": (Train, True, train),
    "series": (SeriesArgs, False, series),
    "verify": (Verify, False, verify),
    "trace": (Trace, False, trace),
    "mixtures": (Mixtures, True, mixtures),
    "logits": (Logits, False, logits),
    "generate": (Generate, False, generate),
    "evaluate": (Evaluate, False, analyze),
    "analyze": (Analyze, False, analyze),
    "report": (Report, False, report),
    "import": (Import, False, import_hf),
    "export": (Export, False, export),
}


#: What `plan --verify` starts for each plan: reads a request on standard input and answers it. Not for people.
COMPILE = "_compile"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    try:
        if argv == [COMPILE]:
            from training.ahead import serve

            return serve(families())
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
            return 0
        verb, rest = argv[0], argv[1:]
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}{_nearest(verb, VERBS)}; verbs are {', '.join(VERBS)}")
        arguments, takes_recipe, function = VERBS[verb]
        if verb == "evaluate":
            arguments = _study("analysis.evaluate", "Evaluate")
        if verb == "analyze":
            kind, rest = (rest[0], rest[1:]) if rest else ("", rest)
            if kind in ("-h", "--help"):
                each = [f"  {name:14} {_study(*where).__doc__.splitlines()[0]}" for name, where in STUDIES.items()]
                print("\n".join(["usage: run.py analyze KIND REF [--json] [OPTIONS]", "", "KIND is one of", *each, ""]))
                print("run.py analyze KIND --help lists the options of one")
                return 0
            if kind not in STUDIES:
                wrong = f"no study {kind!r}{_nearest(kind, STUDIES)}" if kind else "write run.py analyze KIND REF"
                raise UserError(f"analyze: {wrong}; there are {', '.join(STUDIES)}")
            verb, arguments = f"analyze {kind}", _study(*STUDIES[kind])
        result = function(_parse(verb, arguments, takes_recipe, rest))
        value, code = result if isinstance(result, tuple) else (result, 0)
        if as_json and is_lead():
            print(json.dumps(value))
        return code
    except UserError as e:
        return _fail(e, 2, as_json)
    except RunError as e:
        return _fail(e, 1, as_json)
    except OSError as e:  # a full disk, a missing right: nothing that a traceback would explain better
        return _fail(e, 1, as_json)
    except SystemExit as e:  # tyro has printed help, or what is wrong with a flag
        if as_json and e.code:
            print(json.dumps({"error": "a flag is wrong; see stderr", "exit_code": e.code}))
        return int(e.code or 0)
    except KeyboardInterrupt:
        return 130


def _fail(error: Exception, code: int, as_json: bool) -> int:
    note(f"error: {error}")
    if as_json:
        print(json.dumps({"error": str(error), "exit_code": code}))
    return code


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _overview() -> str:
    lines = [__doc__ or "", "verbs:"]
    for verb, (arguments, takes_recipe, _) in VERBS.items():
        what = {"analyze": " KIND"}.get(verb, " RECIPE" if takes_recipe else "")
        lines.append(f"  {verb + what:18} {arguments.__doc__}")
    return "\n".join([*lines, "", "recipes: " + ", ".join(recipes())])


def _parse(verb: str, arguments: Any, takes_recipe: bool, rest: list[str]) -> Any:
    from parallel.mesh import MeshConfig

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def mesh_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type is not MeshConfig:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="AXIS=N,…",
            instance_from_str=lambda words: MeshConfig.parse(words[0]),
            is_instance=lambda value: isinstance(value, MeshConfig),
            str_from_instance=lambda mesh: [str(mesh)],
        )

    @registry.primitive_rule
    def path_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        return _paths(storage.local, "PATH") if info.type is Path else None

    default: Any = tyro.MISSING_NONPROP
    prog = f"run.py {verb}"
    if takes_recipe:
        known = recipes()
        if rest and not rest[0].startswith("-"):
            name, rest = rest[0], rest[1:]
            if name not in known:
                raise UserError(f"unknown recipe {name!r}{_nearest(name, known)}; recipes are {', '.join(known)}")
        elif any(word in ("-h", "--help") for word in rest):
            note(f"RECIPE is one of {', '.join(known)}; the defaults shown are those of amber_tiny\n")
            name = "amber_tiny"
        else:
            raise UserError(
                f"{verb}: the recipe is missing; write run.py {verb} RECIPE …, with one of {', '.join(known)}"
            )
        prog += f" {name}"
        none = dataclasses.MISSING
        fields = dataclasses.fields(arguments)
        missing = {f.name: tyro.MISSING for f in fields if f.default is none and f.default_factory is none}
        config = known[name]()
        if arguments is PlanArgs:  # a mesh that is given is one to keep to
            config = dataclasses.replace(config, mesh=MeshConfig.parse("auto"))
        default = arguments(**{**missing, "config": config})
    try:
        with registry:
            return tyro.cli(arguments, args=rest, prog=prog, default=default, description=arguments.__doc__)
    except _BadPath as e:
        raise e.__cause__ or e from None


if __name__ == "__main__":
    sys.exit(main())
