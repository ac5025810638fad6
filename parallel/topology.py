"""What an accelerator can do at best, so that a measured speed can be told as a fraction of it."""

import dataclasses
import time

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Peak:
    """Dense matrix throughput of all devices of a mesh together."""

    flops: float
    """FLOP/s."""
    source: str
    """Where the number is from: a data sheet, or a measurement on this machine."""


_GOOGLE = "Google Cloud TPU documentation, peak compute per chip (bf16)"
_NVIDIA = "NVIDIA data sheet, dense BF16 tensor cores (half of the figure with sparsity), SXM"

#: jax's device_kind -> (bf16 FLOP/s per jax device, source).
CHIPS = {
    "TPU v4": (275e12, _GOOGLE),
    "TPU v5 lite": (197e12, _GOOGLE),
    "TPU v5": (459e12, _GOOGLE),
    "TPU v5p": (459e12, _GOOGLE),
    "TPU v6 lite": (918e12, _GOOGLE),
    "NVIDIA A100-SXM4-40GB": (312e12, _NVIDIA),
    "NVIDIA A100-SXM4-80GB": (312e12, _NVIDIA),
    "NVIDIA H100 80GB HBM3": (989.4e12, _NVIDIA),
    "NVIDIA H200": (989.4e12, _NVIDIA),
}


def peak(devices: list[jax.Device]) -> Peak | None:
    """Peak of these devices together, or None for an accelerator that the table does not know.

    CPU devices have no data sheet that holds for this machine, and simulated ones share its cores: for them one large
    float32 matrix product is timed, and that is the peak of all of them together.
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return Peak(_measured_matmul(devices[0]), "measured: one float32 matrix product on this machine's cores")
    if kind not in CHIPS:
        return None
    flops, source = CHIPS[kind]
    return Peak(flops * len(devices), source)


def _measured_matmul(device: jax.Device, size: int = 1024, repeats: int = 5) -> float:
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
