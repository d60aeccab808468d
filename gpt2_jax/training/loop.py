"""The thin loop around the pure step: batches in, metrics and checkpoints out."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.model import GPT2, Params
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.metrics import plot_losses, read_metrics
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.recorder import Recorder
from gpt2_jax.training.settings import TrainSettings, to_json
from gpt2_jax.training.step import TrainState, eval_step, init_state, train_step


def train(
    settings: TrainSettings,
    batches: Callable[[int], np.ndarray],
    validation_NT: np.ndarray,
    *,
    overwrite: bool = False,
) -> TrainState:
    """Trains a model from scratch and fills `settings.run_dir`.

    Args:
      settings: the run.
      batches: batch(step), int32 [batch_size, T + 1].
      validation_NT: held-out windows, int32 [N, T + 1].
      overwrite: whether a run already in the directory may be replaced.

    Returns:
      The final state.

    Raises:
      UserError: before anything is written, if the run directory won't do; later, if the loss
        stops being a number.
    """
    run_dir = _claim_run_dir(settings, overwrite)
    model = GPT2(settings.model, dtype=jnp.dtype(settings.dtype))
    schedule = learning_rate_schedule(settings.optimizer, settings.steps)
    optimizer = make_optimizer(settings.optimizer, schedule)
    key = jax.random.key(settings.seed)

    # Everything compiled is compiled here; the state is donated, so it is updated in place.
    state = jax.jit(functools.partial(init_state, model, optimizer))(key)
    step_function = jax.jit(
        functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            micro_batch_size=settings.data.micro_batch_size,
        ),
        donate_argnums=0,
    )
    evaluate = _make_evaluation(model, validation_NT, settings.data.micro_batch_size)

    with Recorder(settings, run_dir, schedule) as recorder, Checkpoints(run_dir) as checkpoints:
        for step in range(settings.steps):
            if step % settings.validation.every == 0:
                recorder.validation(step, evaluate, state.params)
            state, metrics = step_function(state, batches(step), key)
            recorder.step(step, metrics)
            done = step + 1
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                recorder.flush()
                checkpoints.save(state)
        recorder.validation(settings.steps, evaluate, state.params)
    title = f"{run_dir.name}: {settings.model.parameter_count:,} parameters"
    plot_losses(read_metrics(run_dir / "metrics.jsonl"), run_dir / "loss.png", title)
    return state


def _make_evaluation(
    model: GPT2, windows_NT: np.ndarray, batch_size: int
) -> Callable[[Params], float]:
    """Returns the function that measures the mean loss over fixed windows; compiled once."""
    eval_function = jax.jit(functools.partial(eval_step, model=model))
    # The last batch is filled up with windows from the front, which are not counted again.
    count = len(windows_NT)
    order = np.arange(-(-count // batch_size) * batch_size) % count
    batches_BT = windows_NT[order].reshape(-1, batch_size, windows_NT.shape[1])

    def evaluate(params: Params) -> float:
        losses = [eval_function(params, tokens_BT) for tokens_BT in batches_BT]
        return float(np.concatenate([np.asarray(loss_B) for loss_B in losses])[:count].mean())

    return evaluate


def _claim_run_dir(settings: TrainSettings, overwrite: bool) -> Path:
    """Makes the run directory and writes config.json, the mark of a run."""
    run_dir = Path(settings.run_dir)
    contents = [run_dir / name for name in ("config.json", "metrics.jsonl", "loss.png")]
    checkpoints = run_dir / "checkpoints"
    if any(path.exists() for path in (*contents, checkpoints)):
        if not overwrite:
            raise UserError(
                f"{run_dir} already holds a run; give another --run_dir, "
                f"or --overwrite to replace that run"
            )
        shutil.rmtree(checkpoints, ignore_errors=True)
        for path in contents:
            path.unlink(missing_ok=True)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        scratch = run_dir / ".config.json"
        scratch.write_text(to_json(settings), encoding="utf-8")
        scratch.replace(run_dir / "config.json")
    except OSError as error:
        raise UserError(
            f"cannot write run directory {run_dir}: {error.strerror}; give another --run_dir"
        ) from None
    return run_dir
