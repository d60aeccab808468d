"""How fast this machine reads memory: what bounds generation, which reads all weights each step."""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpt2_jax.benchmarks.worker import cpu_cores

# More than caches hold; on an accelerator, much longer than it takes to start.
_CPU_BYTES, _ACCELERATOR_BYTES = 2**29, 2**32
_REPEATS = 7


def read_bandwidth() -> dict[str, float]:
    """Reads a large array with all of the device, in every way that comes close to its limit.

    A sum compiled by XLA for the CPU does not, so there it is numpy, a thread for each core, and
    PyTorch where it is installed. The largest is nearest to the truth.

    Returns:
      Bytes per second by method, the median of several repeats.
    """
    size, methods = _methods()
    return {
        name: size / statistics.median(_seconds(method) for _ in range(_REPEATS))
        for name, method in methods.items()
    }


@functools.cache
def _methods() -> tuple[int, dict[str, Callable[[], object]]]:
    """How many bytes are read, and in which ways; they stay allocated."""
    import jax

    if jax.default_backend() == "cpu":
        return _CPU_BYTES, _on_cpu(_CPU_BYTES)
    return _ACCELERATOR_BYTES, _on_accelerator(_ACCELERATOR_BYTES)


def _seconds(read: Callable[[], object]) -> float:
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def _on_cpu(size: int) -> dict[str, Callable[[], object]]:
    threads = cpu_cores()
    data = np.ones(size // 8, np.uint64)
    parts = np.array_split(data, threads)
    pool = ThreadPoolExecutor(threads)
    methods: dict[str, Callable[[], object]] = {
        "numpy sum": lambda: list(pool.map(np.sum, parts)),
        "numpy or": lambda: list(pool.map(np.bitwise_or.reduce, parts)),
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        numbers = torch.from_numpy(data.view(np.float32))
        methods["torch sum"] = numbers.sum
    return methods


def _on_accelerator(size: int) -> dict[str, Callable[[], object]]:
    import jax
    import jax.numpy as jnp

    data = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(data).block_until_ready()
    return {"jax sum": lambda: total(data).block_until_ready()}
