"""A run that is killed at random moments ends as if nobody had: the short form of `python bench/soak.py`."""

import random
import shutil

import pytest

from bench import soak
from checkpoint.manifest import FILE


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_same_bits(tmp_path):
    setting = soak.Setting(tmp_path, chunks=5, meshes=("fsdp=2",))
    result = soak.soak(setting, kills=3, exact=True, seed=1)
    assert result["wrong"] == []
    assert result["largest_relative_difference_of_a_loss"] == 0
    assert result["losses_compared"] >= setting.steps
    assert result["series_checkpoints"] == 1 + 5
    assert result["arrays_compared_bit_for_bit"] > 100
    assert result["kills_that_left_something"] >= 1, "no kill fell into a save; choose another seed"

    # What the soak would say of a run that is not as it should be.
    one = soak.Soak(setting, exact=True, random=random.Random(0))
    one.reference = {step: (loss + 1, norm) for step, (loss, norm) in soak.losses(one.whole).items()}
    one.check_losses("here")
    assert len(one.wrong) == setting.steps
    one.wrong.clear()
    shutil.rmtree(one.run / "series" / "002")
    shutil.copytree(one.whole / "series" / "001", one.run / "series" / "005.orbax-checkpoint-tmp")
    (one.run / "series" / "005.orbax-checkpoint-tmp" / FILE).unlink()
    one.compare()
    assert [w.partition(":")[0].partition(" has ")[0] for w in one.wrong] == [
        "the series",
        "half-written at the end",
        "series.jsonl lists other checkpoints than there are",
    ]
