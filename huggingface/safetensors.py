"""The safetensors format: length of the header, header in JSON, the tensors without gaps.

https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from errors import UserError
from huggingface.tensors import TensorInfo, is_shape

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # as in the reference implementation


def scan(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, in the header's order; only the header is read.

    Raises:
        UserError: the file is not whole, or not what the format allows.
        OSError: it cannot be read.
    """
    with open(file, "rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        length = int.from_bytes(start := raw.read(8), "little")
        if len(start) == 8 and length > _MAX_HEADER:
            raise UserError(f"{file}: is not a safetensors file: its header would have {length:,} bytes")
        if len(start) < 8 or 8 + length > size:
            _truncated(file, 8 + length if len(start) == 8 else 8, size)
        header = parse_json(raw.read(length), f"{file}: its header")
    header.pop("__metadata__", None)
    tensors = {name: _info(file, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "has unused bytes before it"
            raise UserError(f"{file}: {name!r} {what}; write the file again")
        end += info.nbytes
    if end > size:
        _truncated(file, end, size)
    if end < size:
        raise UserError(f"{file}: has {size - end:,} bytes after the last tensor of its header; write the file again")
    return tensors


def header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The bytes before the first tensor, and the size of the whole file; the tensors follow in the given order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises UserError if it is anything else; ``where`` begins the message."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is in it twice")
        return found

    try:
        found = json.loads(raw, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e})") from e
    if not isinstance(found, dict):
        raise UserError(f"{where} is a JSON {type(found).__name__}, not an object")
    return found


def _info(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if is_shape(shape):
            if kind not in DTYPES:
                raise UserError(f"{file}: {name!r} has dtype {kind!r}; known are {', '.join(DTYPES)}")
            info = TensorInfo(file, DTYPES[kind], tuple(shape), start + begin)
            if begin < 0 or end - begin != info.nbytes:
                raise UserError(
                    f"{file}: {name!r} lies in bytes {begin} to {end}, but {kind} {shape} takes {info.nbytes:,} bytes"
                )
            return info
    raise UserError(f"{file}: {name!r} is not described by a dtype, a shape and two data_offsets")


def _truncated(file: Path, expected: int, size: int) -> None:
    raise UserError(
        f"{file}: truncated: the header says {expected:,} bytes, the file has {size:,}; fetch the file again"
    )
