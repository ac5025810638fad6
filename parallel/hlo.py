"""What a compiled program communicates, read from its text (``compiled.as_text()``).

The text is XLA's HLO after partitioning: the program of one device, as it will run. It is read as the CPU, TPU and GPU
compilers of jaxlib 0.10 and 0.11 write it. No XLA library parses it for us: `cost_analysis` counts a loop's body once,
whatever its trips, and says nothing of mesh axes.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Array(NamedTuple):
    """An array as HLO writes it, ``bf16[4,256,128]``, on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes, without padding."""
        return math.ceil(math.prod(self.shape) * _bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One place in the program where devices exchange data. XLA may merge several of ours into one, and split one."""

    kind: str
    """One of KINDS."""
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ, in mesh order."""
    group: int
    """Devices in a group; of a collective-permute 2, sender and receiver."""
    results: tuple[Array, ...]
    """What one device holds afterwards: whole after an all-gather, its part after a reduce-scatter."""
    loops: tuple[int, ...]
    """Trips of the loops around it, outermost first."""

    @property
    def executions(self) -> int:
        """Times that it runs in a step."""
        return math.prod(self.loops)

    @property
    def bytes(self) -> int:
        """Bytes of the results of all executions, per device and step."""
        return sum(a.nbytes for a in self.results) * self.executions


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over the same axes, per device and step."""

    kind: str
    axes: tuple[str, ...]
    sites: int
    executions: int
    bytes: int


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a program, in no particular order.

    A branch of a conditional counts as always taken, every branch of it: an upper bound. A reduce-scatter that the TPU
    compiler writes as a fusion named ``all-reduce-scatter`` is one of that kind; one that it writes as a chain of
    collective-permutes stays that.

    Args:
        text: ``compiled.as_text()``.
        mesh: axis -> degree (``Mesh.shape``), in the order of the mesh that the program was compiled for.

    Raises:
        ValueError: a collective in a loop whose trips cannot be read, or groups in an unknown form.
    """
    program = _Program(text)
    found, chains = [], set()
    for computation, line, loops in program.walk():
        kind = line.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        chain = re.search(r"channel_id=(\d+).*chain_id\W+(\d+)", line.rest)  # one collective in several steps
        if chain and chain.groups() in chains:
            continue
        if chain:
            chains.add(chain.groups())
        result = line.type
        if line.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, …)
            result = _parts(line.type)[1]
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind, result = "reduce-scatter", program.root(computation).type
        if None in loops:
            raise ValueError(f"hlo: {line.opcode} {line.name} is in a loop whose trips are not known")
        axes, group = _axes(_groups(line.rest, math.prod(mesh.values())), mesh)
        found.append(Collective(kind, axes, group, tuple(arrays(result)), tuple(n or 0 for n in loops)))
    return found


def traffic(found: Collection[Collective]) -> list[Traffic]:
    """Collectives summed by kind and axes, most bytes first."""
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for c in found:
        groups.setdefault((c.kind, c.axes), []).append(c)
    sums = [
        Traffic(kind, axes, len(cs), sum(c.executions for c in cs), sum(c.bytes for c in cs))
        for (kind, axes), cs in groups.items()
    ]
    return sorted(sums, key=lambda t: (-t.bytes, t.kind, t.axes))


def arrays(text: str) -> Iterator[Array]:
    """Every array type in a piece of HLO, in order and with repetitions: of a whole program, all that it ever makes."""
    for dtype, dims in re.findall(r"\b(pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\]", text):
        yield Array(dtype, tuple(int(d) for d in dims.split(",") if d))


def custom_calls(text: str) -> set[str]:
    """Names of what the program calls from outside XLA: kernels, libraries."""
    return set(re.findall(r'custom_call_target="([^"]*)"', text))


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = re.match(r"[a-z]+(\d+)", dtype)
    assert match, dtype
    return int(match[1])


# ---- the program as a graph ----------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """One instruction: ``name = type opcode(rest``."""

    name: str
    type: str
    opcode: str
    rest: str
    root: bool


class _Program:
    """Computations by name, and the way from the entry into each."""

    def __init__(self, text: str):
        self.computations: dict[str, list[_Line]] = {}
        self.entry = ""
        current: list[_Line] | None = None
        for raw in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\) -> .*\{$", raw):
                current = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif raw.startswith("}"):  # attributes of a Pallas kernel span lines too, but are followed by no more
                current = None if raw.rstrip() == "}" else current
            elif current is not None and (line := _line(raw)):
                current.append(line)

    def root(self, computation: str) -> _Line:
        return next(line for line in self.computations[computation] if line.root)

    def walk(self) -> Iterator[tuple[str, _Line, tuple[int | None, ...]]]:
        """Every instruction that runs: (its computation, the instruction, trips of the loops around it)."""
        return self._walk(self.entry, ())

    def _walk(self, name: str, loops: tuple[int | None, ...]) -> Iterator[tuple[str, _Line, tuple[int | None, ...]]]:
        for line in self.computations[name]:
            yield name, line, loops
            inner = (*loops, self._trips(name, line)) if line.opcode == "while" else loops
            for callee in _callees(line):
                yield from self._walk(callee, inner)

    def _trips(self, caller: str, loop: _Line) -> int | None:
        """Trips of a loop that counts up by one, as `lax.scan` makes it; None where that cannot be seen.

        TPU programs do not say how many: that is the constant of the condition ``i < N``, less where ``i`` begins.
        """
        if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
            return int(known[1])
        condition = _attribute(loop.rest, "condition")
        lines = {line.name: line for line in self.computations[condition]}
        compare = next((line for line in lines.values() if line.root and line.opcode == "compare"), None)
        if compare is None or "direction=LT" not in compare.rest:
            return None
        counter, limit = (lines[name] for name in _operands(compare.rest))
        if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
            return None
        index = int(_attribute(counter.rest, "index"))
        above = {line.name: line for line in self.computations[caller]}
        carry = above[_operands(loop.rest)[0]]
        if carry.opcode != "tuple":
            return None
        start = above[_operands(carry.rest)[index]]
        while start.opcode in ("copy", "bitcast"):
            start = above[_operands(start.rest)[0]]
        return int(limit.rest.split(")")[0]) - int(start.rest.split(")")[0]) if start.opcode == "constant" else None


def _line(raw: str) -> _Line | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", raw)
    if not match:
        return None
    text = raw[match.end() :]
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    return _Line(match[2], text[:end], opcode, rest, match[1] is not None)


def _closing(text: str) -> int:
    """Index behind the parenthesis that closes the one ``text`` begins with."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"hlo: {text[:80]!r} has no closing parenthesis")


def _parts(tuple_type: str) -> list[str]:
    """Types of the elements of a tuple type."""
    parts, depth, start = [], 0, 1
    for at, char in enumerate(tuple_type):
        depth += (char in "([{") - (char in ")]}")
        if (depth == 1 and char == ",") or not depth:
            parts.append(tuple_type[start:at].strip())
            start = at + 1
    return parts


def _operands(rest: str) -> list[str]:
    """Names of an instruction's operands, given what follows the opcode's parenthesis."""
    inside = ("(" + rest)[: _closing("(" + rest)]
    return re.findall(r"%?([\w.\-]+)(?=[,)])", re.sub(r"/\*.*?\*/", "", inside))


def _attribute(rest: str, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", rest)
    if not match:
        raise ValueError(f"hlo: no {name} in {rest[:120]!r}")
    return match[1]


def _callees(line: _Line) -> list[str]:
    """Computations that an instruction runs. A reduction's ``to_apply`` is arithmetic on scalars and is left out."""
    if line.opcode in ("async-update", "async-done"):  # names the computation that its start runs
        return []
    names = re.findall(r"\b(?:body|condition|calls|true_computation|false_computation)=%?([\w.\-]+)", line.rest)
    if line.opcode == "call":
        names += re.findall(r"\bto_apply=%?([\w.\-]+)", line.rest)
    for branches in re.findall(r"\b(?:branch_computations|calls)=\{([^}]*)\}", line.rest):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


# ---- who talks to whom ---------------------------------------------------------------------------------------------


def _groups(rest: str, devices: int) -> np.ndarray:
    """Groups of devices, int [groups, devices in each], from any of the ways in which HLO writes them."""
    if m := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", rest):
        return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", m[1])])
    if re.search(r"replica_groups=\{\}", rest):
        return np.arange(devices)[None]
    if m := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(m[2], m[3]).reshape(_numbers(m[1]))
    # Named axes, some of them in part: mesh['a'=4,'b'=4], device_ids=([16]T(0)) {'b','a':(1)2}
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", m[1])}
        ids = np.arange(math.prod(sizes.values()))
        if m[2] and (order := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", m[2] + ")")):
            ids = _iota(order[1], order[2]).reshape(-1)
        return _along(ids, sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", m[3]))
    raise ValueError(f"hlo: no groups of devices in {rest[:200]!r}")


def _along(ids: np.ndarray, sizes: Mapping[str, int], chosen: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups along some axes of a mesh of ``sizes``; of an axis in part: (name, product before the part, its size)."""
    parts = {name: (int(before or 1), int(part or sizes[name])) for name, before, part in chosen}
    if len(parts) != len(chosen):
        raise ValueError(f"hlo: groups along two parts of one axis: {chosen}")
    shape: list[int] = []
    picked: list[int] = []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        picked.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    rest = [axis for axis in range(len(shape)) if axis not in picked]
    return ids.reshape(shape).transpose(rest + picked).reshape(-1, math.prod(shape[axis] for axis in picked))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(shape: str, transpose: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(transpose)) if transpose else ids


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Mesh axes along which the members of a group differ, and the size of a group."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(a for a, at in zip(mesh, places, strict=True) if (at != at[:, :1]).any()), groups.shape[1]
