"""What flags of several verbs have in common, and how words become values."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from checkpoint import storage
from errors import UserError
from parallel.mesh import MeshConfig
from training.config import RunConfig

if TYPE_CHECKING:
    from analysis.subject import Target

EXIT_STOPPED = 75  # EX_TEMPFAIL: run the same command again

Config = Annotated[RunConfig, tyro.conf.arg(name="")]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff]


class BadValue(Exception):
    """Carries a UserError through tyro, which would make a choice of types of it."""


def _primitive(
    parse: Callable[[str], Any], metavar: str, is_instance: Callable[[Any], bool]
) -> tyro.constructors.PrimitiveConstructorSpec:
    def instance(words: list[str]) -> Any:
        try:
            return parse(words[0])
        except UserError as e:
            raise BadValue from e

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=instance,
        is_instance=is_instance,
        str_from_instance=lambda value: [str(value)],
    )


def _paths(parse: Callable[[str], Path], metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    return _primitive(parse, metavar, lambda value: hasattr(value, "__fspath__"))


RunDir = Annotated[Path, _paths(storage.path, "DIR|gs://…")]
"""A run directory, which may be in a bucket; every other path is on a disk."""


@dataclasses.dataclass(frozen=True)
class CompileCache:
    """Where compiled programs are kept for the next start."""

    compile_cache: str | None = None
    """Folder for compiled programs, so that the next start compiles nothing; off: none. By default
    $LLM360_COMPILE_CACHE, else llm360/compiled in the user's cache directory."""

    def enable(self) -> None:
        """Keep programs that this process compiles, and use those that others have. Before the first is compiled."""
        from parallel import compile_cache

        compile_cache.enable(self.compile_cache, note)


@dataclasses.dataclass(frozen=True)
class Where:
    """On what a checkpoint is used, and how."""

    mesh: str = "data=1"
    """Degrees of parallelism."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrices and activations."""
    simulate: int | None = None
    """Run on this many simulated CPU devices."""


def target_of(ref: str, where: Where, compiled: CompileCache, **more: Any) -> "Target":
    """The checkpoints that a reference names, and what they are looked at with; compiled programs are kept."""
    from analysis.subject import Target
    from models import families
    from training.datasets import open_data

    simulated(where.simulate)
    compiled.enable()
    return Target(ref, families(), open_data, mesh=where.mesh, compute_dtype=where.compute_dtype, **more)


def simulated(devices: int | None) -> None:
    """Make this process see so many CPU devices, if a number was given."""
    if devices is not None:
        from parallel.mesh import simulate

        simulate(devices)


def note(text: str) -> None:
    """Log a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'train'?``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def parse(arguments: Any, prog: str, description: str, words: list[str], default: Any = tyro.MISSING_NONPROP) -> Any:
    """The flags of a verb from words.

    Args:
        arguments: the dataclass of the flags.
        prog: how the command begins, for its help.
        description: what it does.
        words: what came after that.
        default: an instance to start from.

    Raises:
        SystemExit: tyro has printed help, or what is wrong with a flag.
        UserError: a value is wrong.
    """
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def of_mesh(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type is not MeshConfig:
            return None
        return _primitive(MeshConfig.parse, "AXIS=N,…", lambda value: isinstance(value, MeshConfig))

    @registry.primitive_rule
    def of_path(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        return _paths(storage.local, "PATH") if info.type is Path else None

    try:
        with registry:
            return tyro.cli(arguments, args=words, prog=prog, default=default, description=description)
    except BadValue as e:
        raise e.__cause__ or e from None


def from_recipe(arguments: Any, config: RunConfig) -> Any:
    """An instance of a verb's flags with a recipe's config, and what has no default left open."""
    none = dataclasses.MISSING
    fields = dataclasses.fields(arguments)
    missing = {f.name: tyro.MISSING for f in fields if f.default is none and f.default_factory is none}
    return arguments(**{**missing, "config": config})
