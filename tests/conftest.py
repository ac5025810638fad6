"""Eight simulated CPU devices for every test, and the small things that tests share."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests run small programs a few times: what takes the time is compiling them, and without LLVM's optimizations it takes
# half as long. What is computed is the same up to rounding.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import atexit
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

# Many tests train the same tiny model: each program is compiled once for all of them, and for the processes that they
# start. Another process of pytest finds the folder of the first one.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import pytest

from amber_jax.recipes import amber_tiny
from parallel.mesh import MeshConfig


@pytest.fixture
def mesh_of():
    """``mesh_of("data=2,tensor=2")``: a mesh over as many of the eight devices as it needs."""

    def make(text):
        config = MeshConfig.parse(text)
        return config.build(jax.devices()[: config.size])

    return make


@pytest.fixture
def tiny():
    """amber_tiny at a size that compiles in a second and that eight devices divide in every way."""
    recipe = amber_tiny()
    model = dataclasses.replace(
        recipe.model, vocab_size=64, context_length=32, num_layers=2, embed=32, num_heads=8, head_dim=4, mlp=48
    )
    data = dataclasses.replace(recipe.data, global_batch=8, sequence_length=32, chunks=None)
    optimizer = dataclasses.replace(recipe.optimizer, peak_learning_rate=1e-2, warmup_steps=5)
    series = dataclasses.replace(recipe.series, rolling_every_steps=3)
    mesh = MeshConfig(data=8)
    return dataclasses.replace(recipe, model=model, data=data, optimizer=optimizer, series=series, mesh=mesh)
