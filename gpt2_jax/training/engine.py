"""What is compiled for a run: the first state and the step, laid out on the devices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from gpt2_jax.config import GPT2Config
from gpt2_jax.lora import adapt
from gpt2_jax.model import GPT2, AdaptedParams, Params, param_shapes
from gpt2_jax.precision import round_kernels
from gpt2_jax.training.mesh import Layout
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.settings import TrainSettings
from gpt2_jax.training.step import StepMetrics, TrainState, init_state, train_step
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
    jitted_step: jax.stages.Wrapped
    """(state, tokens_NBT, key, frozen) -> (state, metrics); the state is donated"""
    frozen: Params | None
    """the base beside which an adapter is trained: arrays, or ShapeDtypeStructs to look at the
    program only; its kernels are in the compute dtype, which they would be rounded to anyway"""
    complete: Callable[[Params], Params | AdaptedParams]
    """makes of a state's parameters what the model computes with"""

    def step(
        self, state: TrainState, tokens_NBT: jax.Array, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        """The next state and what the step reports; the state given is updated in place."""
        result: tuple[TrainState, StepMetrics] = self.jitted_step(
            state, tokens_NBT, key, self.frozen
        )
        return result

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
        return self.jitted_step.lower(self.abstract_state, tokens_NBT, key, self.frozen)


def make_engine(settings: TrainSettings, layout: Layout, base: Params | None = None) -> Engine:
    """Builds model, optimizer and functions for settings on a layout.

    Args:
      settings: the run.
      layout: where it lies.
      base: with `settings.lora`, the frozen parameters, host arrays; None to look at the
        program only.
    """
    lora, dtype = settings.lora, jnp.dtype(settings.dtype)
    dropout = 0.0 if lora is None else lora.dropout
    model = GPT2(settings.model, dtype=dtype, remat=settings.remat, lora_dropout=dropout)
    schedule = learning_rate_schedule(settings.optimizer, settings.steps)
    optimizer = make_optimizer(settings.optimizer, schedule)
    init = functools.partial(init_state, model, optimizer, lora=lora)
    abstract_state = _abstract(jax.eval_shape(init, jax.random.key(settings.seed)), layout)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    frozen = None if lora is None else _freeze(settings.model, base, dtype, layout)
    device_kind = layout.mesh.devices.flat[0].device_kind

    def complete(params: Params, frozen: Params | None) -> Params | AdaptedParams:
        return params if lora is None or frozen is None else adapt(frozen, params, lora)

    def gathered(params: Params, frozen: Params | None) -> Params | AdaptedParams:
        return layout.gather_tables(complete(params, frozen))

    def utilization(tokens_per_second: float) -> float | None:
        T, devices = settings.data.sequence_length, layout.mesh.size
        return mfu(tokens_per_second, settings.model, T, device_kind, settings.dtype, devices, lora)

    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        complete=gathered,
        positions=layout.positions,
    )
    return Engine(
        model,
        schedule,
        utilization,
        layout,
        abstract_state,
        jax.jit(init, out_shardings=shardings),
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated)),
        frozen,
        functools.partial(complete, frozen=frozen),
    )


def _abstract(tree: Any, layout: Layout) -> Any:
    """Shapes, dtypes and shardings of a tree."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        layout.shard(tree),
    )


def _freeze(config: GPT2Config, base: Params | None, dtype: DTypeLike, layout: Layout) -> Params:
    """The base on the devices, kernels in the compute dtype; without arrays, its shapes."""
    rounded = functools.partial(round_kernels, dtype=dtype)
    abstract = _abstract(jax.eval_shape(rounded, param_shapes(config)), layout)
    if base is None:
        return abstract
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params: Params = jax.jit(rounded, out_shardings=shardings)(layout.place(base))
    return params
