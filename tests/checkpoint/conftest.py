"""One run with checkpoints of every kind, for the tests that only look; those that change it take a copy."""

import shutil

import pytest

from checkpoint.writer import SeriesWriter
from tests.checkpoint import tiny_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run with init, 000 .. 004 and rolling step 55. Do not change it."""
    run = tmp_path_factory.mktemp("finished")
    with SeriesWriter(run) as writer:
        for index in range(-1, 5):
            tiny_run.save(writer, "series", index)
        tiny_run.save(writer, "rolling", 4, step=55)
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "run")
