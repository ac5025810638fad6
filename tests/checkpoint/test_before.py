"""A series that older code wrote still restores, checks and verifies, by the rules that it was written by.

`tests/fixtures/run-ebc9892.tar.gz` was written at commit ebc9892 (manifests of version 3, digests of version 1):

    run.py train amber_tiny --data synthetic --run RUN --simulate 2 --mesh fsdp=2 --model.vocab-size=64 \
        --model.num-layers=2 --model.embed=16 --model.num-heads=2 --model.head-dim=8 --model.mlp=24 \
        --model.context-length=16 --data.sequence-length=16 --data.chunks=2 --data.samples-per-chunk=24 \
        --data.global-batch=8 --optimizer.warmup-steps 2
"""

import tarfile
from pathlib import Path

import pytest

import run as cli
from checkpoint import check, digest
from checkpoint.series import Series
from checkpoint.tensors import Tensors
from models import families
from tests.checkpoint.tampered import change_one_weight
from training.record import RunRecord
from training.replay import Replayer

ARCHIVE = Path(__file__).resolve().parents[1] / "fixtures" / "run-ebc9892.tar.gz"


@pytest.fixture
def before(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run" / "before"


def test_it_is_checked_by_its_own_digests(before):
    entries = Series(before).entries()
    assert [e.manifest.name for e in entries] == ["init", "000", "001"]
    for entry in entries:
        assert (entry.manifest.version, entry.manifest.digest_version) == (3, 1)
        found = check.check(entry)
        assert found.problems == ()
        assert found.digests == entry.manifest.digests
    array = Tensors(entries[-1])["norm.scale"][...]
    said = entries[-1].manifest.tensors["params/norm.scale"]["digest"]
    assert digest.digest("norm.scale", array, version=1) == said != digest.digest("norm.scale", array)


def test_a_changed_weight_is_found_in_it(before):
    change_one_weight(Series(before).resolve("001")[0], "norm.scale", 0.5, with_digests=False)
    assert any("does not hold the numbers" in p for p in check.check(Series(before).resolve("001")[0]).problems)


def test_it_is_checked_and_replayed(before):
    assert cli.main(["series", str(before), "--check"]) == 0
    record = RunRecord(before, families())
    found = Replayer(record, record.config.synthetic()).replay(*(Series(before).resolve(n)[0] for n in ("init", "001")))
    loss, parameters = found.tolerance  # another processor may round otherwise
    assert found.loss <= loss, found
    assert all(c.parameters <= parameters for c in found.checkpoints), found
    assert [c.false_digests for c in found.checkpoints] == [(), ()]
