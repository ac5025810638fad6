"""The data set of a run, opened from its folder: prepared by us, LLM360's published files, or random tokens."""

from pathlib import Path
from typing import Any

from data.chunks import MANIFEST
from data.dataset import ChunkedData
from data.mixed import MixedData
from errors import UserError
from training.config import RunConfig
from training.record import RunRecord


def open_data(path: Path, config: RunConfig) -> Any:
    """The data set of a folder: prepared by us, or LLM360's files as they were published."""
    from data.published import is_published

    if not (path / MANIFEST).exists() and is_published(path):
        return published(path, config)
    return ChunkedData(path)


def prepared(data: Any) -> ChunkedData:
    """The data set, if it is one that we prepared (else UserError)."""
    if not isinstance(data, ChunkedData):
        raise UserError("this needs data in our own format; convert published files with prepare --from-published")
    return data


def published(path: Path, config: RunConfig) -> Any:
    """LLM360's published files in a folder, read as the recipe reads its data. UserError: there are none."""
    from data.published import PublishedAmber, PublishedCrystal, is_published

    data = config.data
    shape = (data.sequence_length, config.model.vocab_size, data.seed)
    if is_published(path) == "jsonl":
        return PublishedAmber(path, *shape, lines=data.samples_per_chunk)  # known: no need to count them all first
    if is_published(path) == "hdf5":
        samples = [p.steps * data.global_batch if p.steps else None for p in config.phases]
        return PublishedCrystal(path, [p.mixture for p in config.phases], samples, *shape)
    raise UserError(f"{path}: has neither train_000.jsonl … (AmberDatasets) nor .h5 files (CrystalCoderDatasets)")


def of_run(record: RunRecord, folder: Path | None) -> Any:
    """The data that a run was trained on, as its ledger says, or from another folder."""
    named, weights = record.data
    if named is None and folder is None:
        return record.config.synthetic()
    data = open_data(folder or named or Path(), record.config)
    return MixedData(prepared(data), weights) if weights else data
