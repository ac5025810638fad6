"""Files put together by hand: pickles from their instructions, archives, and safetensors from any header."""

import json
import pickle
import zipfile


def value(x):
    return pickle.dumps(x, 2)[2:-1]


def a_global(name):
    module, _, rest = name.rpartition(".")
    return f"c{module}\n{rest}\n".encode()


def call(function, *args):
    return a_global(function) + b"(" + b"".join(args) + b"tR"


def storage(kind="torch.FloatStorage", key="0", elements=6):
    return b"(" + value("storage") + a_global(kind) + value(key) + value("cpu") + value(elements) + b"tQ"


def tensor(store=None, offset=0, shape=(2, 3), strides=(3, 1), *flags):
    hooks = call("collections.OrderedDict")
    args = [store or storage(), *map(value, (offset, shape, strides, False)), hooks, *map(value, flags)]
    return call("torch._utils._rebuild_tensor_v2", *args)


def mapping(items):
    return b"}(" + b"".join(value(name) + content for name, content in items.items()) + b"u"


def archive(path, program, entries=None, compression=zipfile.ZIP_STORED, folder="archive"):
    """A PyTorch file of a program, here without its first and last instruction, and of ``{"data/0": bytes, ...}``."""
    entries = {"data/0": bytes(24), "byteorder": b"little"} | (entries or {})
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{folder}/data.pkl", b"\x80\x02" + program + b".")
        for name, content in entries.items():
            file.writestr(f"{folder}/{name}", content)
    return path


def safetensors(path, header, data=b"", length=None):
    """A safetensors file of any header, text or what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path
