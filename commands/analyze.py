"""One study of the checkpoints that REF names: what is missing of its results, in DIR/results."""

import dataclasses
import importlib
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from commands.flags import CompileCache, Json, Where, nearest, note, target_of
from errors import UserError

T = TypeVar("T")

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


@dataclasses.dataclass(frozen=True)
class Args(Generic[T]):
    """Flags of all studies; each has settings besides."""

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
    compiled: Annotated[CompileCache, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompileCache)
    json: Json = False
    """Print one JSON object on stdout."""


def settings_of(kind: str) -> Any:
    """The settings class of a study. UserError: there is none of that name."""
    if kind not in STUDIES:
        wrong = f"no study {kind!r}{nearest(kind, STUDIES)}" if kind else "write run.py analyze KIND REF"
        raise UserError(f"analyze: {wrong}; there are {', '.join(STUDIES)}")
    module, name = STUDIES[kind]
    return getattr(importlib.import_module(module), name)


def run(args: Args[Any]) -> tuple[dict[str, Any], int]:
    """Make what is missing of the results."""
    from analysis.results import lines
    from analysis.sweep import sweep

    target = target_of(args.ref, args.where, args.compiled, data=args.data, tokenizer=args.tokenizer)
    opened = args.study.open(target, note)
    outcome = sweep(target, opened, note, overwrite=args.overwrite, name=args.name)
    if opened and not args.json:
        print("\n".join(lines(outcome.results())))
    return outcome.to_json(), outcome.code


def overview() -> str:
    """What studies there are."""
    each = [f"  {kind:14} {settings_of(kind).__doc__.splitlines()[0]}" for kind in STUDIES]
    usage = ["usage: run.py analyze KIND REF [--json] [OPTIONS]", "", "KIND is one of", *each, ""]
    return "\n".join([*usage, "run.py analyze KIND --help lists the options of one"])
