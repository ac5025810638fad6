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
# start. The other processes of pytest-xdist have the variable, and so the folder, of the one that started them. The
# user's own cache would hide what a test must compile.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["LLM360_COMPILE_CACHE"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["LLM360_COMPILE_CACHE"], ignore_errors=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
import pytest

from amber_jax.recipes import amber_tiny
from parallel import compile_cache
from parallel.mesh import MeshConfig
from tests.budget import Budget

compile_cache.enable(None, print)


def pytest_configure(config):
    """Count CPU seconds."""
    config.pluginmanager.register(Budget())


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


SMALL = [
    "--model.vocab-size=300", "--model.num-layers=1", "--model.embed=32", "--model.num-heads=2", "--model.head-dim=16",
    "--model.mlp=32", "--model.context-length=32", "--data.sequence-length=32", "--data.chunks=2",
    "--data.global-batch=8", "--data.validation-per-source=4",
]  # fmt: skip


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory):
    """A run of two chunks, of two sources, made through the command line. Not to be written to: `trained` is."""
    import run as cli

    folder = tmp_path_factory.mktemp("two-sources")
    rng = np.random.default_rng(0)
    for name in ("prose", "code"):
        (folder / name).mkdir()
        for n in range(12):
            words = rng.choice(["alpha", "beta", "gamma", "def", "return", "0", "1"], size=150)
            (folder / name / f"{n}.txt").write_text(f"{name} {n} " + " ".join(words))
    sources = [f"--source={name}={folder / name}" for name in ("prose", "code")]
    assert cli.main(["prepare", "amber_tiny", f"--out={folder / 'data'}", "--workers=1", *sources, *SMALL]) == 0
    mesh = "--mesh=data=4,fsdp=2"
    words = ["train", "amber_tiny", f"--data={folder / 'data'}", f"--run={folder / 'run'}", mesh, *SMALL]
    assert cli.main(words) == 0
    return folder


@pytest.fixture(scope="module")
def trained(two_sources, tmp_path_factory):
    """A module's own copy of that run, in ``run``, and of its data, in ``data``."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("data", "run"):
        shutil.copytree(two_sources / name, folder / name)
    return folder
