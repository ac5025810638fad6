"""No damage to a file changes a value in silence: of a checkpoint, and of the data it was trained on."""

import collections
import random

import pytest

from bench import corruption

FLIPS = 20  # for each of the seeds; `python bench/corruption.py` does more


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """A checkpoint in a run of its own, and a data set; every damage is undone."""
    folder = tmp_path_factory.mktemp("damaged")
    run = folder / "run"
    return {
        "checkpoint": corruption.checkpoint(run, corruption.make_run(run)),
        "data": corruption.data_set(corruption.make_data(folder / "data")),
    }


def judged(target, damages):
    """The verdicts, by reading; one that must not be is an error."""
    found = collections.defaultdict(collections.Counter)
    for v in corruption.trials(target, damages, [*target.readings]):
        assert v.verdict in ("refused", "unchanged"), v
        found[v.reading][v.verdict] += 1
    return found


@pytest.mark.parametrize("what", ["checkpoint", "data"])
@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_is_found_or_read_by_nobody(targets, what, seed):
    found = judged(targets[what], corruption.flips(targets[what], FLIPS, random.Random(seed)))
    assert all(counts.total() == FLIPS for counts in found.values())
    assert all(counts["refused"] >= FLIPS // 4 for counts in found.values()), found
    if what == "checkpoint":
        assert found["restore"] == {"refused": FLIPS}, "it verifies every file"


@pytest.mark.parametrize("what", ["checkpoint", "data"])
def test_a_file_cut_off_or_gone_is_found_or_read_by_nobody(targets, what):
    damages = corruption.losses_of_files(targets[what], random.Random(0))
    found = judged(targets[what], random.Random(0).sample(damages, 30))
    assert all(counts["refused"] > 10 for counts in found.values()), found


def test_a_judge_sees_what_must_not_be(targets, tmp_path):
    """Of a reader that looks at nothing but the bytes, and of one that fails without a word."""
    (tmp_path / "file").write_bytes(b"abc")

    def fail():
        raise ValueError((tmp_path / "file").read_bytes() == b"abc")

    readings = {"bytes": lambda: {"file": (tmp_path / "file").read_bytes()}, "nothing": dict}
    target = corruption.Target(tmp_path, (str(tmp_path),), readings)
    (damage,) = corruption.flips(target, 1, random.Random(0))
    assert [v.verdict for v in corruption.trials(target, [damage], ["bytes", "nothing"])] == ["SILENT", "unchanged"]
    assert (tmp_path / "file").read_bytes() == b"abc"
    silent = corruption.Target(tmp_path, (str(tmp_path),), {"bytes": fail})
    assert silent.judge("bytes", damage, {})[0] == "unnamed"
