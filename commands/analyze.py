"""Studies of the checkpoints that REF names: what is missing of their results, in DIR/results."""

import dataclasses
import importlib
from collections.abc import Callable
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
    "evaluate": ("analysis.evaluate", "Evaluate"),
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
    """The settings class of a study, or of several with commas between them. UserError: there is none of that name."""
    kinds = kind.split(",")
    for one in kinds:
        if one not in STUDIES:
            wrong = f"no study {one!r}{nearest(one, STUDIES)}" if one else "write run.py analyze KIND REF"
            raise UserError(f"analyze: {wrong}; there are {', '.join(STUDIES)}")
    if len(set(kinds)) < len(kinds):
        raise UserError(f"analyze: {kind} names a study twice")
    classes = {one: getattr(importlib.import_module(STUDIES[one][0]), STUDIES[one][1]) for one in kinds}
    if len(classes) == 1:
        return classes[kind]
    fields = [(one, cls, dataclasses.field(default_factory=cls)) for one, cls in classes.items()]
    several = dataclasses.make_dataclass("Several", fields, bases=(_Several,), frozen=True)
    several.__doc__ = f"{kind}: one after the other on each checkpoint, which is read once for all of them."
    return several


class _Several:
    """Settings of several studies, each in a field of its name: ``--memorization.sequences 20``."""

    def open(self, target: Any, note: Callable[[str], None]) -> list[Any]:
        """All that they ask of a checkpoint, in their order."""
        settings = [getattr(self, f.name) for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        return [study for one in settings for study in one.open(target, note)]


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
    return "\n".join(
        [*usage, "KIND,KIND makes several of them in one go; run.py analyze KIND --help lists the options"]
    )
