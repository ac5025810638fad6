"""PyTorch's ``.bin`` files: a zip archive of a pickle, ``data.pkl``, and the bytes of each storage, ``data/KEY``.

A pickle is a program for a stack machine. Python's own machine can call any function; the one here has the instructions
that `torch.save` writes for tensors and no others, decodes them with `pickletools`, and can call nothing: a global is a
name to it. So nothing that a file holds is ever run. https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from errors import UserError
from huggingface.tensors import TensorInfo, is_shape

_STORAGES = {
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
}
_GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *_STORAGES,
}
_MAX_PICKLE = 2**24  # bytes; a 7B model takes 2**16
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that torch before 1.6 began its files with
_MARK = object()
_REFUSED = "it is not read, and nothing in it was run. Convert it to safetensors where you trust it"


@dataclass(frozen=True)
class _Entry:
    """The bytes of a file in the archive, which are stored as they are."""

    offset: int
    size: int


@dataclass(frozen=True)
class _Global:
    """The name of something in a Python module. It is never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    elements: int
    offset: int


def scan(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, in its order; their bytes are not read.

    Raises:
        UserError: the file is not whole, not in this format, or asks for anything but tensors.
    """
    try:
        with open(file, "rb") as raw:
            if raw.read(len(_LEGACY)) == _LEGACY:
                raise UserError(
                    f"{file}: is in the format of torch before 1.6; save it again with a current torch: "
                    "torch.save(torch.load(FILE, weights_only=True), FILE)"
                )
            entries, program = _open_archive(file, raw)
    except UserError:
        raise
    except Exception as e:  # zipfile meets damage with exceptions of many kinds
        raise UserError(f"{file}: truncated, or not a PyTorch file ({type(e).__name__}: {e}); fetch it again") from e
    try:
        found = _Machine(file, entries).run(program)
    except UserError:
        raise
    except Exception as e:  # likewise pickletools, and the machine when its stack runs empty
        raise UserError(f"{file}: its data.pkl is damaged ({type(e).__name__}: {e}); fetch it again") from e
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds a {_kind(found)}, not a dict of tensors; save model.state_dict()")
    for name, value in found.items():
        if not isinstance(value, TensorInfo):
            raise UserError(
                f"{file}: {name!r} is of type {_kind(value)}, not a tensor; save model.state_dict() and nothing else"
            )
    return found


def _open_archive(file: Path, raw: IO[bytes]) -> tuple[dict[str, _Entry], bytes]:
    """The entries below the archive's folder by relative name, and the pickle."""
    with zipfile.ZipFile(raw) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if len(infos) < len(archive.infolist()):
            raise UserError(f"{file}: has two entries of one name; save it again with torch.save")
        pickled = [name for name in infos if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise UserError(f"{file}: is a zip archive without one FOLDER/data.pkl; only files of torch.save are read")
        folder = pickled[0].removesuffix("data.pkl")
        entries = {
            name.removeprefix(folder): _locate(file, raw, info)
            for name, info in infos.items()
            if name.startswith(folder)
        }
        order = archive.read(folder + "byteorder") if "byteorder" in entries else b"little"
        if order != b"little":
            raise UserError(f"{file}: has byteorder {order!r}; only 'little' is read: save it again on such a machine")
        if entries["data.pkl"].size > _MAX_PICKLE:
            raise UserError(f"{file}: its data.pkl has {entries['data.pkl'].size:,} bytes, too many for names alone")
        return entries, archive.read(pickled[0])  # checks its CRC


def _locate(file: Path, raw: IO[bytes], info: zipfile.ZipInfo) -> _Entry:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise UserError(f"{file}: its entry {info.filename} is compressed or encrypted; save it again with torch.save")
    raw.seek(info.header_offset)
    start = raw.read(30)  # "PK\3\4", fields that the directory repeats, length of the name, length of the extra field
    name, extra = (int.from_bytes(start[i : i + 2], "little") for i in (26, 28))
    offset = info.header_offset + 30 + name + extra
    if start[:4] != b"PK\3\4" or offset + info.file_size > raw.seek(0, 2):
        raise UserError(f"{file}: damaged at its entry {info.filename}; fetch it again")
    return _Entry(offset, info.file_size)


class _Machine:
    """Runs a pickle of tensors. Values are numbers, text, tuples, dicts with text as keys, and the classes here.

    Nothing here recurses into values, so that how deep a file nests them does not matter.
    """

    def __init__(self, file: Path, entries: dict[str, _Entry]):
        self._file = file
        self._entries = entries
        self._stack: list[Any] = []

    def run(self, program: bytes) -> Any:
        """The value that the program builds."""
        stack = self._stack
        memo: dict[Any, Any] = {}
        arg: Any
        for opcode, arg, _ in pickletools.genops(program):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case (
                    "NONE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"
                ):
                    stack.append(arg)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "MARK":
                    stack.append(_MARK)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple([stack.pop() for _ in range(int(opcode.name[-1]))][::-1]))
                case "TUPLE":
                    stack.append(tuple(self._pop_to_mark()))
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM":
                    self._update([stack.pop(), stack.pop()][::-1])
                case "SETITEMS":
                    self._update(self._pop_to_mark())
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "GLOBAL":
                    stack.append(self._global(arg.replace(" ", ".")))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(self._global(f"{module}.{name}"))
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "REDUCE":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self._call(function, args))
                case "BUILD" if isinstance(stack[-2], dict):
                    stack.pop()  # attributes of an OrderedDict: the `_metadata` of a state_dict
                case _:
                    raise UserError(
                        f"{self._file}: its pickle uses {opcode.name}, which tensors do not need; {_REFUSED}"
                    )
        raise EOFError("no end")

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _update(self, items: list[Any]) -> None:
        """Set ``[name, value, name, value, ...]`` in the dict on top of the stack."""
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(name, str):
                raise UserError(f"{self._file}: names a value by a {type(name).__name__}, not by text; {_REFUSED}")
            self._stack[-1][name] = value

    def _global(self, name: str) -> _Global:
        if name not in _GLOBALS:
            raise UserError(f"{self._file}: asks for {name!r}, which is not part of a tensor; {_REFUSED}")
        return _Global(name)

    def _storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", _Global(kind), str(key), str(), int(elements)) if kind in _STORAGES:
                dtype, entry = _STORAGES[kind], self._entries.get(f"data/{key}")
                if entry is None:
                    raise UserError(f"{self._file}: has no entry data/{key}, which its pickle names; fetch it again")
                if not 0 <= elements * dtype.itemsize <= entry.size:
                    raise UserError(
                        f"{self._file}: data/{key} has {entry.size:,} bytes, too few for {elements:,} of {dtype.name}"
                    )
                return _Storage(key, dtype, elements, entry.offset)
        raise UserError(f"{self._file}: refers to something other than a tensor's storage; {_REFUSED}")

    def _call(self, function: Any, args: Any) -> Any:
        match function, args:
            case _Global("collections.OrderedDict"), ():
                return {}
            case _Global("torch._utils._rebuild_parameter"), (TensorInfo() as tensor, bool(), dict()):
                return tensor
            case (
                _Global("torch._utils._rebuild_tensor_v2"),
                (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *flags),
            ) if not any(flags):  # flags: conjugated or negative views, which only complex numbers have
                return self._tensor(storage, offset, shape, strides)
        name = function.name if isinstance(function, _Global) else type(function).__name__
        raise UserError(f"{self._file}: calls {name} in a way that torch.save does not; {_REFUSED}")

    def _tensor(self, storage: _Storage, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> TensorInfo:
        if not is_shape(shape) or len(strides) != len(shape) or not all(type(s) is int and s >= 0 for s in strides):
            raise UserError(f"{self._file}: a tensor in data/{storage.key} has no valid shape and strides")
        start = storage.offset + offset * storage.dtype.itemsize
        info = TensorInfo(self._file, storage.dtype, tuple(shape), start, _minimal(tuple(shape), strides))
        reach = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides))
        if info.nbytes and not 0 <= offset < reach <= storage.elements:
            raise UserError(
                f"{self._file}: a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset} reaches "
                f"outside of data/{storage.key}, which has {storage.elements:,} elements"
            )
        if info.nbytes > storage.elements * storage.dtype.itemsize:
            raise UserError(
                f"{self._file}: a tensor of shape {list(shape)} repeats the {storage.elements:,} elements of "
                f"data/{storage.key} (torch's expand); save it after .contiguous()"
            )
        return info


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, TensorInfo) else type(value).__name__.lstrip("_")


def _minimal(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides with 0 along axes where they mean nothing; None if the elements are in C order."""
    strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides))
    expected = 1
    for n, s in zip(shape[::-1], strides[::-1]):
        if n > 1 and s != expected:
            return strides
        expected *= n
    return None
