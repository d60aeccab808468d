"""How fast a device multiplies matrices: what bounds training, which does little else."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Square matrices, and how many products are asked for at once: an accelerator does one in less
# time than it takes to ask for it.
_CPU, _ACCELERATOR = (2048, 1), (8192, 10)
_REPEATS = 5


class MatmulPeak(NamedTuple):
    """The most that was reached."""

    platform: str
    """"cpu", "gpu" ..., as a trainer's `Program.device`"""
    device_kind: str
    flops: float
    """operations per second"""


def matmul_peak(dtype: str) -> MatmulPeak:
    """Multiplies large square matrices; the best of several repeats.

    Args:
      dtype: float32, not rounded on the way; or bfloat16, accumulated in float32.
    """
    size, count, multiply = _product(dtype)
    best = min(_seconds(multiply, count) for _ in range(_REPEATS))
    device = jax.devices()[0]
    return MatmulPeak(device.platform, device.device_kind, 2 * count * size**3 / best)


@functools.cache
def _product(dtype: str) -> tuple[int, int, Callable[[], jax.Array]]:
    """The matrices stay allocated, the program compiled."""
    size, count = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), dtype) for key in keys)
    precision = "highest" if dtype == "float32" else None
    multiply = jax.jit(
        functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)
    )
    multiply(left, right).block_until_ready()
    return size, count, lambda: multiply(left, right)


def _seconds(multiply: Callable[[], jax.Array], count: int) -> float:
    start = time.perf_counter()
    products = [multiply() for _ in range(count)]
    jax.block_until_ready(products)
    return time.perf_counter() - start
