"""What models there are, by name: recipes, config classes, and the forms in which others write them."""

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

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
