"""The same training run in JAX and in PyTorch: same weights, data, schedule; step by step."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from numpy.typing import ArrayLike

from gpt2_jax import tokenizer
from gpt2_jax.data.batches import Windows, training_batches
from gpt2_jax.data.dataset import PYTHON_DOCUMENTATION, open_dataset
from gpt2_jax.data.text import python_documentation
from gpt2_jax.errors import UserError
from gpt2_jax.files import written_beside
from gpt2_jax.interop.huggingface import stored_state_dict
from gpt2_jax.model import GPT2
from gpt2_jax.training.engine import make_engine
from gpt2_jax.training.mesh import make_layout
from gpt2_jax.training.settings import (
    DataSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
)
from gpt2_jax.training.step import TrainState, train_step
from parity.adamw import TorchAdamW, global_norm
from parity.gradients import Gradients, without_dropout
from parity.models import Models
from parity.outcomes import Check
from parity.reference import ReferenceGPT2

LOSS_BOUND = {"float32": 1e-3, "bfloat16": 5e-3}
"""Largest difference of the two losses at any step, by what JAX computes in; PyTorch computes in
float32. Losses are of order 10."""
NORM_BOUND = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference of the two gradients' norms before clipping, as a share of PyTorch's."""

Batches = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One training run."""

    losses: list[float]
    """mean loss of each batch before its step, nats per token"""
    norms: list[float]
    """global norm of each gradient before clipping"""
    parameters: Gradients
    """after the last step, by Hugging Face's names"""


def run_settings(
    models: Models,
    steps: int,
    dtype: str = "float32",
    optimizer: OptimizerSettings | None = None,
) -> TrainSettings:
    """A short run with everything on: passes, clipping, decay, warm-up and cosine.

    The rate is llm.c's for batches this small.
    """
    config = without_dropout(models.config)
    length = min(64, config.n_positions)
    return TrainSettings(
        run_dir="nowhere",  # it is not run by the loop, which would write there
        steps=steps,
        model=config,
        data=DataSettings(PYTHON_DOCUMENTATION, length, batch_size=4, micro_batch_size=2),
        mesh=MeshSettings(data=1),
        optimizer=optimizer
        or OptimizerSettings(
            learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=steps // 10
        ),
        dtype=dtype,  # type: ignore[arg-type]
    )


def batches_of(settings: TrainSettings) -> Batches:
    """int32 [B, T + 1] by step, of Python's documentation.

    A vocabulary smaller than GPT-2's gets its bytes, modulo the vocabulary if need be.
    """
    data, vocab_size = settings.data, settings.model.vocab_size
    if vocab_size >= tokenizer.VOCAB_SIZE:
        windows, _ = open_dataset(data.path, data.sequence_length, vocab_size)
    else:
        text = "\n".join(python_documentation()).encode()
        tokens = np.frombuffer(text, np.uint8).astype(np.int32) % vocab_size
        windows = Windows([tokens], data.sequence_length)
    return training_batches(windows, data.batch_size, settings.seed)


def train_in_jax(models: Models, settings: TrainSettings, batches: Batches) -> Curve:
    """Trains by the very functions of `scripts/train.py`."""
    layout = make_layout(settings)
    engine = make_engine(settings, layout)
    key = jax.random.key(settings.seed)
    state = engine.first_state(key, jax.device_get(models.params))
    losses, norms = [], []
    for step in range(settings.steps):
        tokens_NBT = batches(step).reshape(layout.passes, layout.rows, -1)
        state, metrics = engine.step(state, jnp.asarray(tokens_NBT), key)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return Curve(losses, norms, stored_state_dict(jax.device_get(state.params), models.config))


def train_in_torch(models: Models, settings: TrainSettings, batches: Batches) -> Curve:
    """Trains the reference as build-nanogpt does."""
    model = copy.deepcopy(models.reference)
    optimizer = TorchAdamW(model, settings.optimizer, settings.steps)
    passes = settings.data.batch_size // settings.data.micro_batch_size
    losses, norms = [], []
    for step in range(settings.steps):
        total = 0.0
        for part in torch.from_numpy(batches(step).astype(np.int64)).chunk(passes):
            loss = model.loss(part[:, :-1], part[:, 1:]) / passes
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(optimizer.step())
    return Curve(losses, norms, _parameters_of(model))


def check_trajectory(
    ours: Curve, theirs: Curve, *, name: str = "training", dtype: str = "float32"
) -> list[Check]:
    """Compares two runs at every step: JAX's in a dtype, PyTorch's in float32."""
    return [
        _compare(f"{name}: losses", ours.losses, theirs.losses, LOSS_BOUND[dtype], dtype),
        # A loss does not tell a gradient from its double: clipping and AdamW undo any factor.
        _compare(
            f"{name}: gradient norms",
            np.divide(ours.norms, theirs.norms),
            np.ones(len(theirs.norms)),
            NORM_BOUND[dtype],
            dtype,
        ),
    ]


def _compare(name: str, ours: ArrayLike, theirs: ArrayLike, bound: float, dtype: str) -> Check:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    differences = np.abs(ours - theirs)
    worst = int(np.argmax(np.nan_to_num(differences, nan=np.inf)))
    first = next((i for i, d in enumerate(differences) if not d <= bound), None)
    details = () if first is None else (
        f"they part at step {first}: {ours[first]:.6f} in JAX, {theirs[first]:.6f} in PyTorch",
    )  # fmt: skip
    largest, where = float(differences[worst]), f"step {worst}"
    return Check(name, largest, bound, ours.shape, dtype, where=where, details=details)


def llm_c_curves(
    models: Models, tokens: np.ndarray, batch: int = 4, steps: int = 10
) -> tuple[Curve, Curve]:
    """llm.c's test_gpt2 in JAX and in PyTorch: the same batch over and over.

    AdamW at 1e-4 with betas 0.9 and 0.999, weight decay 0.01 on every parameter, no clipping.

    Args:
      models: the weights to begin with.
      tokens: batch * T + 1 tokens of a text, in order.
      batch: sequences.
      steps: of the optimizer.
    """
    config = without_dropout(models.config)
    inputs_BT = tokens[:-1].reshape(batch, -1).astype(np.int64)
    targets_BT = tokens[1:].reshape(batch, -1).astype(np.int64)
    # Windows overlap by one token: together they are the inputs and the targets.
    windows_BT = np.concatenate([inputs_BT, targets_BT[:, -1:]], axis=1)

    adamw = optax.adamw(1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    step = jax.jit(
        functools.partial(train_step, model=GPT2(config), optimizer=adamw), donate_argnums=0
    )
    params = jax.tree.map(jnp.array, models.params)  # a copy: the state is donated
    state = TrainState(jnp.zeros((), jnp.int32), params, adamw.init(params))
    ours = Curve([], [], {})
    for _ in range(steps):
        state, metrics = step(state, jnp.asarray(windows_BT[None], jnp.int32), jax.random.key(0))
        ours.losses.append(float(metrics.loss))
        ours.norms.append(float(metrics.grad_norm))

    model = copy.deepcopy(models.reference)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    theirs = Curve([], [], {})
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT))
        loss.backward()
        theirs.losses.append(loss.item())
        theirs.norms.append(float(global_norm(model.parameters())))
        optimizer.step()
    return (
        dataclasses.replace(ours, parameters=stored_state_dict(state.params, models.config)),
        dataclasses.replace(theirs, parameters=_parameters_of(model)),
    )


def plot_trajectory(ours: Curve, theirs: Curve, path: Path, title: str) -> None:
    """Draws both losses over the steps, and their difference below, as a PNG.

    Raises:
      UserError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, difference = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    losses.plot(theirs.losses, label="PyTorch", linewidth=4, alpha=0.4)
    losses.plot(ours.losses, label="JAX", linewidth=1)
    losses.set(ylabel="loss, nats per token")
    losses.set_title(title, parse_math=False)
    losses.legend()
    differences = np.abs(np.subtract(ours.losses, theirs.losses))
    bound = LOSS_BOUND["float32"]
    difference.set(yscale="log", ylim=(1e-8, 3 * max(bound, differences.max())))
    # An exact zero has no place on a logarithmic axis.
    difference.plot(np.where(differences > 0, differences, np.nan), ".", color="tab:red")
    difference.axhline(bound, color="gray", linestyle="--", label="allowed")
    difference.set(xlabel="step", ylabel="difference")
    difference.legend()
    for axes in (losses, difference):
        axes.grid(alpha=0.3)
    try:
        with written_beside(path) as scratch:
            figure.savefig(scratch, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file") from None


def _parameters_of(model: ReferenceGPT2) -> Gradients:
    return {name: p.detach().numpy() for name, p in model.named_parameters()}
