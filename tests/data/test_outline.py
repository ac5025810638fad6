"""Sizes by arithmetic: the fact sheet's, without any data."""

import pytest

from amber_jax.recipes import amber_7b
from crystal_jax.recipes import crystal_7b
from data import outline
from data.chunks import DataManifest
from data.sources import SourceSpec
from errors import UserError


def test_ambers_real_sizes():
    """Fact sheet 2.1 and 3.1."""
    recipe = amber_7b()
    data = recipe.data
    sizes = outline.chunks(
        recipe.phases[0].mixture,
        chunks=data.chunks,
        samples_per_chunk=data.samples_per_chunk,
        validation=data.validation_per_source,
        sequence_length=data.sequence_length,
        global_batch=data.global_batch,
        seed=data.seed,
    )
    assert sizes["samples_per_chunk"] == 1_706_976
    assert (sizes["steps_per_chunk"], sizes["samples_left_per_chunk"]) == (762, 96)
    assert sizes["tokens_on_disk"] == 1_259_133_776_640
    assert (sizes["steps"], sizes["tokens_trained"]) == (274_320, 1_258_448_486_400)
    # The fact sheet's shares and its approximate samples per chunk, which follow from rounded token counts.
    approximate = {"arxiv": 40_670, "book": 39_125, "c4": 267_976, "refinedweb": 901_537, "starcoderdata": 395_749,
                   "stackexchange": 29_486, "wikipedia": 32_401}  # fmt: skip
    for name, samples in approximate.items():
        assert abs(sizes["sources"][name]["samples_per_chunk"] - samples) <= 20
    shares = {n: round(100 * s["share"], 2) for n, s in sizes["sources"].items()}
    assert shares == {"arxiv": 2.38, "book": 2.29, "c4": 15.7, "refinedweb": 52.82, "starcoderdata": 23.18,
                      "stackexchange": 1.73, "wikipedia": 1.9}  # fmt: skip
    text = "\n".join(outline.lines(sizes))
    for figure in ("1,706,976 samples", "762 steps", "96 samples left", "1,259,133,776,640 tokens on disk"):
        assert figure in text


def test_crystals_real_sizes():
    """Fact sheet 2.3 and 3.4."""
    recipe = crystal_7b()
    batch = recipe.data.global_batch
    sizes = outline.phases(
        [(p.mixture, p.steps * batch) for p in recipe.phases], sequence_length=2048, global_batch=batch
    )
    assert [p["tokens_trained"] for p in sizes["phases"]] == [344_823_300_096, 927_304_384_512, 119_934_025_728]
    assert sizes["tokens_trained"] == 1_392_061_710_336
    billions = [{n: round(p["tokens"] / 1e9, 2) for n, p in phase["parts"].items()} for phase in sizes["phases"]]
    assert billions[0]["CommonCrawl"] == 183.95
    assert billions[1]["StarCoder_fim_shuffled"] == 582.46
    assert (billions[2]["python"], billions[2]["Wikipedia"]) == (41.1, 7.0)
    assert "phase 3: 27,728 steps" in "\n".join(outline.lines(sizes))


def test_files_are_counted(corpus):
    found = outline.files([SourceSpec("code", str(corpus / "code")), SourceSpec("topics", "embedded:topics")])
    assert found["code"]["files"] == 40
    assert found["code"]["bytes"] == sum(p.stat().st_size for p in (corpus / "code").iterdir())
    assert found["topics"] == {"files": 0, "bytes": 0}
    assert "source code: 40 files" in "\n".join(outline.lines({"files": found}))


def test_files_are_counted_without_reading_them(tmp_path):
    """Their folder is enough: a terabyte of JSON Lines is not gone through to say how large it is."""
    with open(tmp_path / "large.jsonl", "wb") as file:
        file.truncate(1 << 40)  # a hole: nothing could read it in the time of a test
    found = outline.files([SourceSpec("a", str(tmp_path))])
    assert found["a"] == {"files": 1, "bytes": 1 << 40}


def test_shares_stand_beside_the_published_ones(prepared):
    from data.mixture import Part

    manifest = DataManifest.load(prepared)
    rows = outline.shares(manifest, [Part("code", 3.0), Part("other", 5.0)])
    assert [r["published_share"] for r in rows] == [1.0, None]
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert "100.00%" in outline.share_lines(rows)[1]


def test_what_only_the_data_says_is_asked_for():
    assert outline.known_samples(3, "x") == 3
    with pytest.raises(UserError, match="--dry-run: the chunks depends on the data; give it as a flag"):
        outline.known_samples(None, "the chunks")
