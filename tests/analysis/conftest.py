"""A run that several studies are made on."""

import shutil

import numpy as np
import pytest

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
