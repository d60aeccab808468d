"""What is compiled for a run: the first state and the step, laid out on the devices."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model import GPT2, Params
from gpt2_jax.training.mesh import Layout
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.settings import TrainSettings
from gpt2_jax.training.step import TrainState, init_state, train_step
from gpt2_jax.training.throughput import mfu


class Engine(NamedTuple):
    """The functions of a run, ready to be jitted; nothing is compiled before it is called."""

    model: GPT2
    schedule: optax.Schedule
    mfu: Callable[[float], float | None]
    """model FLOPs utilization at a number of tokens per second; None for unknown devices"""
    layout: Layout
    abstract_state: TrainState
    """shapes, dtypes and shardings of the state"""
    init: jax.stages.Wrapped
    """(key, parameters or None) -> state"""
    step: jax.stages.Wrapped
    """(state, tokens_NBT, key) -> (state, metrics); the state is donated: updated in place"""

    def first_state(self, key: jax.Array, params: Params | None = None) -> TrainState:
        """The state before the first step, from host parameters if they are given."""
        placed = None if params is None else self.layout.place(params)
        state: TrainState = self.init(key, placed)
        return state

    def lower_step(self, sequence_length: int) -> jax.stages.Lowered:
        """The step lowered for its shapes, to look at: HLO, FLOPs, memory."""
        shape = (self.layout.passes, self.layout.rows, sequence_length + 1)
        tokens_NBT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.layout.batch)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return self.step.lower(self.abstract_state, tokens_NBT, key)


def make_engine(settings: TrainSettings, layout: Layout) -> Engine:
    """Builds model, optimizer and functions for settings on a layout."""
    model = GPT2(settings.model, dtype=jnp.dtype(settings.dtype), remat=settings.remat)
    schedule = learning_rate_schedule(settings.optimizer, settings.steps)
    optimizer = make_optimizer(settings.optimizer, schedule)
    init = functools.partial(init_state, model, optimizer)
    shapes = jax.eval_shape(init, jax.random.key(settings.seed))
    shardings = layout.shard(shapes)
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    device_kind = layout.mesh.devices.flat[0].device_kind

    def utilization(tokens_per_second: float) -> float | None:
        T, devices = settings.data.sequence_length, layout.mesh.size
        return mfu(tokens_per_second, settings.model, T, device_kind, settings.dtype, devices)

    return Engine(
        model,
        schedule,
        utilization,
        layout,
        abstract_state,
        jax.jit(init, out_shardings=shardings),
        jax.jit(
            functools.partial(
                train_step, model=model, optimizer=optimizer, gather=layout.gather_tables
            ),
            donate_argnums=0,
            out_shardings=(shardings, layout.replicated),
        ),
    )
