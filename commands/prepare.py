"""Documents to tokens to packed samples to mixed chunks with a manifest; or checks, converts, or estimates that."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from commands.flags import Config, Json, note
from errors import UserError


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

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


def run(args: Args) -> tuple[dict[str, Any], int]:
    """Verb `prepare`."""
    from data import outline

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
        from training.datasets import published

        manifest = from_published(
            published(args.from_published, config),
            args.out,
            recipe=config.recipe,
            samples_per_chunk=config.data.samples_per_chunk or 100 * config.data.global_batch,
            tokenizer=args.tokenizer,
            engine=_engine(args, args.out / WORK),
            log=note,
        )
    else:
        from data.prepare import prepare

        manifest = prepare(_prepare_config(args, args.out), log=note)
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

        result["published"] = str(to_jsonl(args.out, args.out / "published", _engine(args, args.out), note))
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


def _refuse_idle_flags(args: Args) -> None:
    """A flag that changes nothing would be believed to: UserError."""
    usual = {f.name: f.default for f in dataclasses.fields(Args)}
    modes = [mode for mode in _IDLE_FLAGS if getattr(args, mode)]
    idle = {name: f"--{mode.replace('_', '-')}" for mode in reversed(modes) for name in _IDLE_FLAGS[mode]}
    if args.engine == "local":
        idle |= dict.fromkeys(("runner", "runner_option"), "--engine local")
    else:
        idle["workers"] = "--engine beam"
    for name, mode in idle.items():
        if getattr(args, name) != usual[name]:
            raise UserError(f"prepare: --{name.replace('_', '-')} does nothing with {mode}; leave one of them out")


def _sources(args: Args) -> tuple[Any, ...]:
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


def _engine(args: Args, shared: Path) -> Any:
    """The engine; Beam's workers leave their results in the folder `shared`."""
    from data.engines import Beam, Local

    if args.engine == "local":
        return Local(args.workers)
    return Beam((f"--runner={args.runner}", *(f"--{option}" for option in args.runner_option)), shared)


def _plan(args: Args) -> dict[str, Any]:
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


def _outline(args: Args) -> dict[str, Any]:
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


def _prepare_config(args: Args, out: Path) -> Any:
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
