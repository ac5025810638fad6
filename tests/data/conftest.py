"""A small corpus and the data set prepared from it."""

import json
from pathlib import Path

import pytest

from data.prepare import PrepareConfig, prepare
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
