"""A checkpoint as a Hugging Face folder, tensor by tensor, and proven before it gets its name."""

import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from checkpoint.series import Entry
from checkpoint.tensors import Tensors
from data import tokenizer as tokenizers
from data.tokenizer import Tokenizer
from huggingface import parity
from huggingface.folder import Folder
from huggingface.importer import FLOAT32, Log, Progress, check_finite, each
from huggingface.mapping import Format, Mapped
from huggingface.parity import Parity
from huggingface.writer import FolderWriter
from layers.model import ModelConfig


def export_folder(
    entry: Entry,
    model: ModelConfig,
    recipe: str | None,
    out: Path,
    form: Format,
    dtype: Literal["stored", "float32", "bfloat16"],
    shard_bytes: int,
    tokenizer: Tokenizer | None,
    transformers: bool,
    log: Log,
) -> tuple[Parity, dict[str, float]]:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        entry: the checkpoint.
        model: its architecture.
        recipe: name of what it was trained by, for the model card.
        out: the folder to make.
        form: how the architecture is written.
        dtype: of the weights; ``stored`` as they are in the checkpoint.
        shard_bytes: largest weight file, unless one tensor is larger.
        tokenizer: goes into the folder, if there is one.
        transformers: see `parity.check`.
        log: takes lines for people.

    Returns:
        The proof, and seconds of copying and of proving.

    Raises:
        UserError: the folder exists; the architecture cannot be written in this format; a weight is not finite.
        RunError: the checkpoint is damaged; the disk is full; what was written is not the checkpoint.
    """
    tensors = Tensors(entry)
    table = form.tensors(model)
    config = form.config_to_hf(model)
    stored = {name: tensors[name].dtype for row in table for name in row.ours}
    chosen = {name: stored[name] if dtype == "stored" else np.dtype(dtype) for name in stored}
    theirs = {row.theirs: (_widest(chosen[name] for name in row.ours), row.shape) for row in table}
    dtypes = {str(d) for d, _ in theirs.values()}
    config["torch_dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    special = dict((entry.manifest.origin or {}).get("special_ids", {}))
    if tokenizer:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        special = {name: i for name, i in ids.items() if i >= 0}
    else:
        log("the run has no tokenizer, so that the folder gets none; --tokenizer names one")

    def read(name: str, layer: int | None) -> np.ndarray:
        array = tensors[name][()] if layer is None else tensors[name][layer]
        return array.astype(chosen[name], copy=False)

    with FolderWriter(out, theirs, shard_bytes) as writer:
        begin = time.monotonic()
        _copy(entry, table, theirs, read, writer, log)
        writer.text("config.json", _json(config | special))
        writer.text("generation_config.json", _json({"_from_model_config": True, **special}))
        if tokenizer:
            for name, content in tokenizers.hf_files(tokenizer, model.context_length).items():
                writer.text(name, content)
        described = {name: (tensors[name].shape, chosen[name]) for name in stored}
        seconds = {"copy": time.monotonic() - begin}
        proof = parity.check(form, Folder(writer.part), model, described, read, transformers)
        seconds["proof"] = time.monotonic() - begin - seconds["copy"]
        log(proof.summary())
        writer.text("parity.json", _json(dataclasses.asdict(proof)))
        writer.text("README.md", model_card(entry, model, recipe, proof, str(config["torch_dtype"])))
        writer.commit()
    return proof, seconds


def _copy(
    entry: Entry,
    table: tuple[Mapped, ...],
    theirs: dict[str, tuple[np.dtype, tuple[int, ...]]],
    read: parity.Read,
    writer: FolderWriter,
    log: Log,
) -> None:
    """Write every tensor, in the order of the table."""

    def one(row: Mapped) -> None:
        parts = [read(name, row.layer) for name in row.ours]
        for name, part in zip(row.ours, parts, strict=True):
            check_finite(f"{entry.path}: {name}" + ("" if row.layer is None else f" of layer {row.layer}"), part)
        tensor = row.to_theirs(parts).astype(theirs[row.theirs][0], copy=False)
        writer.write(row.theirs, tensor)
        progress.add(tensor.nbytes)

    progress = Progress(sum(int(np.prod(s)) * d.itemsize for d, s in theirs.values()), log)
    each(one, table)


def _widest(dtypes: Any) -> np.dtype:
    return FLOAT32 if FLOAT32 in (found := set(dtypes)) else found.pop()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


LOAD = {
    "amber": """    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("FOLDER")  # no remote code
""",
    "crystal": """Names and layout are those of LLM360's CrystalCoder. transformers has no class for it: its published
modelling and configuration files must be put beside the weights and named in `config.json` (`auto_map`), as in
LLM360's own folders. Without them, this project reads it: `python run.py import FOLDER --run RUN`.
""",
}


def model_card(entry: Entry, model: ModelConfig, recipe: str | None, proof: Parity, dtype: str) -> str:
    """The folder's README: what it is, and how to check it."""
    m = entry.manifest
    known = entry.is_placed
    date = datetime.datetime.fromtimestamp(m.wall_time, datetime.UTC).strftime("%Y-%m-%d")
    facts = {
        "architecture": f"{model.family}, {proof.parameters:,} parameters",
        "recipe": recipe or "not known",
        "checkpoint": f"{m.name} (index {m.index})",
        "step": f"{m.step:,}" if known else "not known",
        "tokens seen": f"{m.tokens:,}" if known else "not known",
        "learning rate": f"{m.learning_rate:.6g}" if known else "not known",
        "dtype of this folder": dtype,
        "digest of this folder's tensors": proof.digest,
        "manifest of the checkpoint, SHA-256": entry.sha256,
        "parent": f"{m.parent} ({m.parent_sha256})" if m.parent else "none",
        "configuration, SHA-256": m.config_sha256,
        "data manifest, SHA-256": m.data_sha256 or "not known",
        "imported" if m.origin else "saved": f"{date} by code {m.code_version}",
    }
    if m.origin:
        facts["imported from"] = f"{m.origin['format']} folder {m.origin['folder']}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    load = LOAD[model.family]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {recipe or model.family} {m.name}

| | |
|---|---|
{rows}

`parity.json` holds a digest of every tensor and what this folder's logits were compared with when it was written.

{load}"""
