"""Floating-point operations of a function, counted in its jaxpr: exact for matrix products, and before any compiler."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the matrix products of ``function(*args)``; the arguments may be `jax.ShapeDtypeStruct`.

    See `count`.
    """
    return count(jax.make_jaxpr(function)(*args))


def count(jaxpr: Any) -> int:
    """FLOPs of the matrix products in a (closed) jaxpr, 2 for a multiplication and an addition.

    What `jax.checkpoint` computes again is counted again. Inside a `shard_map` shapes are those of one device, so that
    a step whose products are all in one is counted per device. A scan counts its body times its length, a conditional
    its most expensive branch, a Pallas kernel its body times its grid: of attention kernels that skip masked blocks by
    a conditional this is the count without skipping. Not counted: everything that is not a matrix product, and calls
    into libraries (cuDNN attention).

    Raises:
        ValueError: a matrix product in a ``while`` loop, whose trips a jaxpr does not say.
    """
    return sum(_count(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _count(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)
    inner = [count(jaxpr) for value in parameters.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("flops: a matrix product in a while loop; write the loop as a scan, whose length is known")
    if name == "pallas_call":
        return sum(inner) * math.prod(parameters["grid_mapping"].grid)
    return sum(inner) * (parameters["length"] if name == "scan" else 1)


def _jaxprs(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
            yield item
