"""What is in a run, and the references that name it."""

import shutil

import pytest

from checkpoint.series import Series, parse_ref
from checkpoint.writer import SeriesWriter
from errors import RunError, UserError
from tests.checkpoint import tiny_run


def names(entries):
    return [e.manifest.name for e in entries]


def test_entries_are_in_order_and_init_is_first(finished):
    assert names(Series(finished).entries()) == ["init", "000", "001", "002", "003", "004"]
    assert Series(finished).rolling().manifest.name == "00000055"


def test_a_run_without_checkpoints(tmp_path):
    series = Series(tmp_path)
    assert (series.entries(), series.rolling(), series.newest()) == ([], None, None)
    with pytest.raises(UserError, match="no finished checkpoint in it"):
        series.resolve("latest")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("0", "000"),
        ("003", "003"),
        ("init", "init"),
        ("latest", "004"),
        ("all", "init 000 001 002 003 004"),
        (":", "000 001 002 003 004"),
        ("1:4:2", "001 003"),
        ("0:360:2", "000 002 004"),
        ("-2:", "003 004"),
        ("::-2", "004 002 000"),
        ("step=0", "init"),
        ("step=30", "002"),
    ],
)
def test_selectors(finished, selector, expected):
    assert names(Series(finished).resolve(selector)) == expected.split()


def test_a_slice_is_over_indices_so_pruning_does_not_shift_it(run):
    shutil.rmtree(run / "series" / "001")
    assert names(Series(run).resolve("0:4")) == ["000", "002", "003"]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("7", r"@7: no such checkpoint; there are 6, the nearest 0 \(step 10\), .*, 4 \(step 50\)$"),
        ("step=11", r"there are 6, the nearest init \(step 0\), 0 \(step 10\), 1 .* 3 \(step 40\)$"),
        ("4:2", "no such checkpoint; there are 6"),
        ("1:4:0", "a slice cannot step by 0"),
        ("-1", "not a checkpoint selector; write DIR@K, DIR@NAME"),
        ("lattest", "not a checkpoint selector, did you mean 'latest'?"),
        ("1:2:3:4", "not a checkpoint selector"),
        ("step=-3", "not a checkpoint selector"),
    ],
)
def test_what_names_nothing_is_told_what_there_is(finished, selector, message):
    with pytest.raises(UserError, match=message):
        Series(finished).resolve(selector)


def test_a_pruned_init_is_missed(run):
    shutil.rmtree(run / "series" / "init")
    with pytest.raises(UserError, match=r"@init: no such checkpoint; there are 0 \(step 10\), .* 4 \(step 50\)$"):
        Series(run).resolve("init")


def test_parse_ref(tmp_path):
    odd = tmp_path / "a@b"
    odd.mkdir()
    assert parse_ref(f"{odd}@0:5") == (odd, "0:5")
    for ref in (str(tmp_path), f"{tmp_path}@", "@3"):
        with pytest.raises(UserError, match=r"not a checkpoint reference; write DIR@K, .* or DIR@step=N"):
            parse_ref(ref)
    with pytest.raises(UserError, match=r"there is no directory .*nowhere; write DIR@K"):
        parse_ref(f"{tmp_path}/nowhere@3")


def test_newest_is_the_furthest_step_that_can_be_resumed(run):
    assert Series(run).newest().manifest.name == "00000055"
    with SeriesWriter(run) as writer:
        params, _ = tiny_run.state(70, tiny_run.mesh(2, 4))
        writer.save(tiny_run.manifest("series", 6), params=params, optimizer=None)
        writer.wait()
        assert Series(run).newest().manifest.name == "00000055"  # 006 has no optimizer state
        tiny_run.save(writer, "rolling", 5, step=60)
        writer.wait()
        shutil.copytree(run / "rolling", run / "kept")
        tiny_run.save(writer, "series", 5)
        writer.wait()
        shutil.move(run / "kept" / "00000060", run / "rolling")  # as if killed before it was removed
        assert Series(run).newest().manifest.name == "005"


def test_a_copied_folder_is_not_a_second_checkpoint(run):
    shutil.copytree(run / "series" / "003", run / "series" / "005")
    with pytest.raises(RunError, match=r"series/005: holds the manifest of series/003; remove this copied folder"):
        Series(run).entries()


def test_a_reader_sees_what_changes_under_it(run):
    series = Series(run)
    before = series.entries()
    assert all(a is b for a, b in zip(before, series.entries(), strict=True))  # parsed once
    manifest = run / "series" / "002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"last":2.25', '"last":9.25'))
    with pytest.raises(RunError, match=r"series/002/manifest\.json: damaged"):
        series.entries()
    shutil.rmtree(run / "series" / "002")
    assert names(series.entries()) == ["init", "000", "001", "003", "004"]
