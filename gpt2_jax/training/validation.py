"""The held-out loss, and what else a run measures on its parameters while it trains."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.model import GPT2, AdaptedParams, Params
from gpt2_jax.training.mesh import Layout
from gpt2_jax.training.step import eval_step

Measure = Callable[[Params | AdaptedParams], dict[str, Any]]


class Probe(NamedTuple):
    """Something measured every so many steps, by a function from outside `training`.

    It must not change the parameters, and compile once.
    """

    name: str
    """a key of the records it makes"""
    every: int
    """steps between measurements; also after the last step"""
    make: Callable[[GPT2, Layout], Measure]
    """given model and layout, returns the measurement: parameters to scalars, or lists of texts"""

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to measure after `step` of `steps` updates."""
        return step == steps or step % self.every == 0


def out_of_patience(losses: Mapping[int, float], patience: int) -> bool:
    """Whether the lowest validation loss is at least `patience` measurements old.

    Args:
      losses: by step.
      patience: measurements; 0 is without end.
    """
    if not patience or not losses:
        return False
    best = min(losses, key=losses.__getitem__)
    return sum(step > best for step in losses) >= patience


def validation_probe(windows_NT: np.ndarray, every: int) -> Probe:
    """Measures "val_loss", the mean loss over fixed windows [N, T + 1]."""
    return Probe("val_loss", every, functools.partial(_make_validation, windows_NT))


def _make_validation(windows_NT: np.ndarray, model: GPT2, layout: Layout) -> Measure:
    # The last batch is filled up with windows from the front, which do not count again.
    count = len(windows_NT)
    order = np.arange(-(-count // layout.rows) * layout.rows)
    batches = [
        (layout.put_rows(windows_NT[rows % count]), layout.put_rows(rows < count))
        for rows in order.reshape(-1, layout.rows)
    ]

    @functools.partial(jax.jit, out_shardings=layout.replicated)
    def sum_losses(
        params: Params | AdaptedParams, tokens_BT: jax.Array, counts_B: jax.Array
    ) -> jax.Array:
        loss_B = eval_step(
            layout.gather_tables(params), tokens_BT, model=model, positions=layout.positions
        )
        return jnp.sum(loss_B * counts_B)

    # All of it is dispatched and nothing read: the training step queues up behind it.
    def measure(params: Params | AdaptedParams) -> dict[str, Any]:
        sums = [sum_losses(params, *batch) for batch in batches]
        return {"val_loss": functools.reduce(jnp.add, sums) / count}

    return measure
