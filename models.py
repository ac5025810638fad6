"""What models there are, by name: recipes, config classes, and the forms in which others write them."""

import importlib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError

if TYPE_CHECKING:  # names are known without importing what they name
    from training.config import Family, RunConfig

#: Recipe -> module of the function of that name.
RECIPES = {
    "amber_7b": "amber_jax.recipes",
    "amber_tiny": "amber_jax.recipes",
    "amber_360": "amber_jax.recipes",
    "crystal_7b": "crystal_jax.recipes",
    "crystal_tiny": "crystal_jax.recipes",
    "crystal_143": "crystal_jax.recipes",
}


def recipes() -> "dict[str, Callable[[], RunConfig]]":
    """Recipe by name: a function that returns a whole run's config."""
    return {name: getattr(importlib.import_module(module), name) for name, module in RECIPES.items()}


def recipe_in_file(word: str) -> "RunConfig":
    """The config that a function in a file of the user's own returns.

    Args:
        word: FILE.py:FUNCTION, the file as seen from here. The recipe's name is the function's.

    Raises:
        UserError: no such file or function; the file cannot be imported; what the function returns is no `RunConfig`.
    """
    import dataclasses
    import importlib.util

    from training.config import RunConfig

    file, _, function = word.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"recipe {word!r}: there is no file {path.resolve()}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"recipe {word!r}: {file} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise UserError(f"recipe {word!r}: {file} cannot be imported: {_where(e, path)}") from e
    make = getattr(module, function, None)
    if not callable(make):
        own = [n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__ and callable(f)]
        raise UserError(f"recipe {word!r}: {file} has no function {function!r}; it has {', '.join(own) or 'none'}")
    try:
        config = make()
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"recipe {word!r}: the function failed: {_where(e, path)}") from e
    if not isinstance(config, RunConfig):
        raise UserError(
            f"recipe {word!r}: returned {type(config).__name__}, and a recipe is a function that returns a RunConfig "
            "(training/config.py; examples/small_llama.py is one)"
        )
    return dataclasses.replace(config, recipe=function)


def _where(error: BaseException, path: Path) -> str:
    """An error of a user's file in a line: what, and which line of the file."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")


def families() -> "Mapping[str, Family]":
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
