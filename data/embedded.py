"""Real text that any machine with this set-up has, for the demo: code, prose and documentation.

Each kind is a generator of (id, text) in the order of a hash of the id, so that a budget takes a fair sample and not
the letter a. The text is that of the installed Python and packages: equal environments give equal data.
"""

import ast
import importlib.metadata
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

# Not library code, or not in every Python version; site-packages lies below the standard library's folder.
_LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _stdlib() -> Iterator[tuple[str, str]]:
    """The Python standard library's sources."""
    return _texts(_sources(Path(sysconfig.get_path("stdlib"))))


def _topics() -> Iterator[tuple[str, str]]:
    """The topics of the Python language reference, as shown by `help()`."""
    from pydoc_data.topics import topics  # 700 kB: read only when asked for

    for name in _shuffled(topics):
        yield name, topics[name]


def _docstrings() -> Iterator[tuple[str, str]]:
    """The docstrings of each file of the standard library and the installed packages; nothing is imported."""
    files = {f"stdlib/{name}": path for name, path in _sources(Path(sysconfig.get_path("stdlib"))).items()}
    files |= {f"packages/{name}": path for name, path in _sources(Path(sysconfig.get_path("purelib"))).items()}
    for name, source in _texts(files):
        if text := _docstrings_of(source):
            yield name, text


def _packages() -> Iterator[tuple[str, str]]:
    """The long descriptions (README files) of the installed distributions."""
    distributions: dict[str, importlib.metadata.Distribution] = {}
    for d in importlib.metadata.distributions():
        if d.metadata["Name"]:  # a half-removed distribution has none
            distributions.setdefault(f"{d.metadata['Name']}-{d.version}", d)
    for name in _shuffled(distributions):
        metadata = distributions[name].metadata.json
        if text := metadata.get("description"):
            yield name, str(text)


KINDS: Mapping[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "stdlib": _stdlib,
    "topics": _topics,
    "docstrings": _docstrings,
    "packages": _packages,
}


def _shuffled(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (blake2b(name.encode("utf-8", "surrogateescape")).digest(), name))


def _sources(root: Path) -> dict[str, Path]:
    """Return the .py files below a folder by relative path."""
    files = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _LEFT_OUT]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                files[path.relative_to(root).as_posix()] = path
    return files


def _texts(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    for name in _shuffled(files):
        try:
            yield name, files[name].read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # PEP 263 allows other encodings, and an installation may hold dangling links


def _docstrings_of(source: str) -> str:
    try:
        with warnings.catch_warnings(action="ignore"):  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""  # a template, or Python of another version
    return "\n\n".join(_docstrings_in([tree]))


def _docstrings_in(nodes: Iterable[ast.AST]) -> Iterator[str]:
    # Statements only, in source order: ast.walk visits every expression too and takes several times as long.
    for node in nodes:
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
        for block in ("body", "orelse", "handlers", "finalbody"):
            yield from _docstrings_in(getattr(node, block, ()))
