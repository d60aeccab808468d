"""Turns a step's device values into the log and the display, one step late."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import optax

from gpt2_jax.errors import UserError
from gpt2_jax.model import Params
from gpt2_jax.training.metrics import MetricsLog
from gpt2_jax.training.progress import ProgressDisplay
from gpt2_jax.training.settings import TrainSettings
from gpt2_jax.training.step import StepMetrics


class Recorder:
    """Writes metrics.jsonl and shows progress.

    Reading a metric waits for the device. So a step's metrics are read only when the next step
    has been dispatched, and the device always has work.
    """

    def __init__(self, settings: TrainSettings, run_dir: Path, schedule: optax.Schedule) -> None:
        self._log = MetricsLog(run_dir / "metrics.jsonl")
        self._display = ProgressDisplay(settings.steps, settings.log_every)
        self._schedule = schedule
        self._tokens_per_step = settings.data.batch_size * settings.data.sequence_length
        self._pending: tuple[int, StepMetrics] | None = None
        self._clock = time.perf_counter()

    def __enter__(self) -> "Recorder":
        self._display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.__exit__()
        self._log.close()

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of the step just dispatched and records those of the one before."""
        previous, self._pending = self._pending, (step, metrics)
        if previous is not None:
            self._record(*previous)

    def flush(self) -> None:
        """Records the metrics still held back."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._record(*pending)

    def validation(self, step: int, evaluate: Callable[[Params], float], params: Params) -> None:
        """Measures and records the validation loss after `step` updates."""
        self.flush()
        loss = evaluate(params)
        _check_finite(step, f"validation loss {loss}", loss)
        self._log.write({"step": step, "val_loss": loss})
        self._display.say(f"step {step}  validation loss {loss:.4f}")
        self._clock = time.perf_counter()

    def _record(self, step: int, metrics: StepMetrics) -> None:
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        _check_finite(step, f"loss {loss}, gradient norm {grad_norm}", loss, grad_norm)
        learning_rate = float(self._schedule(step))
        self._log.write(
            {
                "step": step,
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": learning_rate,
                "tokens_per_second": round(self._tokens_per_step / seconds, 1),
            }
        )
        self._display.step(step, loss, learning_rate, self._tokens_per_step, seconds)


def _check_finite(step: int, report: str, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"step {step}: {report}; the run diverged, lower --optimizer.learning_rate or "
            f"lengthen --optimizer.warmup_steps"
        )
