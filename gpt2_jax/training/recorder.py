"""Turns values on the device into the log and the display, one step late."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from gpt2_jax.errors import UserError
from gpt2_jax.lora_settings import adapter_parameter_count
from gpt2_jax.training.distributed import is_primary
from gpt2_jax.training.engine import Engine
from gpt2_jax.training.metrics import Record, records_until, rewrite
from gpt2_jax.training.outputs import Outputs
from gpt2_jax.training.progress import ProgressDisplay
from gpt2_jax.training.settings import TrainSettings
from gpt2_jax.training.step import StepMetrics
from gpt2_jax.training.stopwatch import Stopwatch
from gpt2_jax.training.trackers import open_trackers


@contextlib.contextmanager
def open_recorder(
    settings: TrainSettings, engine: Engine, first: int, opt_state: optax.OptState
) -> Iterator["Recorder"]:
    """Opens files and display for a run that begins after `first` updates.

    Records of a resumed run from after its checkpoint are dropped: they will come again.
    """
    run_dir = Path(settings.run_dir)
    path = run_dir / "metrics.jsonl"
    earlier = records_until(path, first)
    skipped = int(optax.tree.get(opt_state, "total_notfinite", 0))
    if is_primary():
        rewrite(path, earlier)
        trackers = open_trackers(settings, run_dir, first)
        for record in earlier:
            if record["step"] == first:  # they drop all from the first step on
                for tracker in trackers:
                    tracker.write(record)
        outputs = Outputs(path, trackers)
    else:
        outputs = Outputs(None)
    with outputs, ProgressDisplay(settings, engine.mfu, first, quiet=not is_primary()) as display:
        data, layout = settings.data, engine.layout
        if settings.lora is not None:
            count = adapter_parameter_count(settings.model, settings.lora)
            base = f"the {settings.model.parameter_count:,} frozen ones of {settings.init_from}"
            display.say(f"training {count:,} parameters beside {base}")
        display.say(
            f"{data.tokens_per_step:,} tokens a step = "
            f"{data.micro_batch_size} sequences x {data.sequence_length:,} tokens x "
            f"{layout.rows // data.micro_batch_size} device(s) x {layout.passes} pass(es)"
        )
        if first:
            display.say(f"resuming after step {first}")
        yield Recorder(settings, outputs, display, engine.schedule, earlier, skipped)


class Recorder:
    """Writes records and shows progress.

    Reading a value waits for the device. So what a step gives is read only when the next has
    been dispatched, and the device always has work.

    Args:
      settings: the run.
      outputs: where records go.
      display: what the user sees.
      schedule: of the learning rate.
      earlier: records of a resumed run.
      skipped: steps it has skipped.
    """

    def __init__(
        self,
        settings: TrainSettings,
        outputs: Outputs,
        display: ProgressDisplay,
        schedule: optax.Schedule,
        earlier: Sequence[Record] = (),
        skipped: int = 0,
    ) -> None:
        self.stopwatch = Stopwatch()
        self.val_losses = {r["step"]: r["val_loss"] for r in earlier if "val_loss" in r}
        """validation losses by step"""
        self._outputs = outputs
        self._display = display
        self._schedule = schedule
        self._tokens_per_step = settings.data.tokens_per_step
        self._max_skipped = settings.optimizer.max_skipped_steps
        self._pending: tuple[int, StepMetrics | Record] | None = None
        self._skipped = skipped
        self._known = {(r["step"], name) for r in earlier for name in r}

    def has(self, step: int, name: str) -> bool:
        """Whether a resumed run measured this before it was stopped."""
        return (step, name) in self._known

    def sync(self) -> None:
        """Records what is held back, and waits until the disk has it."""
        self.flush()
        self._outputs.sync()

    def finish(self, ending: str | None) -> None:
        """Records what is held back and says why the run ended, if not by its last step."""
        self.flush()
        if ending is not None:
            self._display.say(ending)
        self._display.say(self.stopwatch.report())

    def push(self, step: int, values: StepMetrics | Record) -> None:
        """Takes what has just been dispatched, and records what came before it."""
        previous, self._pending = self._pending, (step, values)
        if previous is not None:
            self._record(*previous)

    def flush(self) -> None:
        """Records what is still held back."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._record(*pending)

    def _record(self, step: int, values: StepMetrics | Record) -> None:
        host: Any = jax.device_get(values)
        if isinstance(values, StepMetrics):
            self._record_step(step, host)
        else:
            self._record_evaluation(step, host)

    def _record_step(self, step: int, metrics: StepMetrics) -> None:
        seconds = self.stopwatch.lap("step")
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        # A skipped step leaves the schedule where it was. On the host: the devices are busy with
        # the next step, and would answer only after it.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            learning_rate = float(self._schedule(step - self._skipped))
        self._skipped = int(metrics.skipped)
        self._outputs.write(
            {
                "step": step,
                "loss": loss if math.isfinite(loss) else None,
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                "learning_rate": learning_rate,
                "skipped": self._skipped,
                "tokens_per_second": round(self._tokens_per_step / seconds, 1),
            }
        )
        self._display.step(step, loss, learning_rate, grad_norm, seconds)
        if metrics.skipped_in_a_row:
            self._display.say(
                f"step {step}  gradient not finite: update skipped, {self._skipped} in all"
            )
        if metrics.skipped_in_a_row >= self._max_skipped:
            raise UserError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; "
                f"{metrics.skipped_in_a_row} steps in a row had no finite gradient: the run "
                f"diverged, lower --optimizer.learning_rate or lengthen --optimizer.warmup_steps"
            )

    def _record_evaluation(self, step: int, values: Record) -> None:
        self.stopwatch.lap("eval")
        values = {
            name: value if isinstance(value, list) else float(value)
            for name, value in values.items()
        }
        for name, value in values.items():
            if not isinstance(value, list) and not math.isfinite(value):
                raise UserError(
                    f"step {step}: {name} is {value}; the run diverged, lower "
                    f"--optimizer.learning_rate or lengthen --optimizer.warmup_steps"
                )
        self._outputs.write({"step": step, **values})
        self._display.evaluation(step, values)
        if "val_loss" in values:
            self.val_losses[step] = values["val_loss"]
