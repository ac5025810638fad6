"""A small corpus and the data set prepared from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.mixture import Part
from data.prepare import PhasePlan, PrepareConfig, prepare
from data.sources import SourceSpec
from tests.data.made_up import code, prose


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "code").mkdir()
    for i in range(40):
        (root / "code" / f"{i:02}.py").write_text(code(i, 30))
    with open(root / "prose.jsonl", "w") as file:
        for i in range(200):
            file.write(json.dumps({"text": prose(i, i % 60)}) + "\n")
    return root


@pytest.fixture(scope="session")
def config(corpus, tmp_path_factory) -> PrepareConfig:
    return PrepareConfig(
        recipe="amber_tiny",
        out=tmp_path_factory.mktemp("data") / "set",
        sources=(SourceSpec("code", str(corpus / "code")), SourceSpec("prose", str(corpus / "prose.jsonl"))),
        sequence_length=16,
        vocab_size=400,
        chunks=4,
        validation_per_source=5,
        seed=7,
    )


@pytest.fixture(scope="session")
def prepared(config) -> Path:
    prepare(config, log=lambda line: None)
    return config.out


PHASES = (
    PhasePlan((Part("prose", 0.6, half="even"), Part("code", 0.4, half="even")), chunks=2),
    PhasePlan(
        (
            Part("prose", 0.2, half="odd"),
            Part("code_fim", 0.7, source="code", epochs=2, fim_rate=0.9, shuffle=True),
            Part("tenth", 0.1, source="code", start=0.1, stop=0.3),
        ),
        chunks=3,
    ),
)


@pytest.fixture(scope="session")
def crystal_config(config, tmp_path_factory) -> PrepareConfig:
    """Two phases of mixtures in Crystal's manner: overlapping windows, halves, epochs, FIM."""
    return replace(
        config,
        recipe="crystal_tiny",
        out=tmp_path_factory.mktemp("data") / "crystal",
        sources=tuple(replace(s, bos=s.name == "code") for s in config.sources),
        layout="mixture",
        chunks=1,
        phases=PHASES,
        overlap=1,
        file_samples=7,
    )


@pytest.fixture(scope="session")
def crystal(crystal_config) -> Path:
    prepare(crystal_config, log=lambda line: None)
    return crystal_config.out
