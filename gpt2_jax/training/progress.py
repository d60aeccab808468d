"""What a run shows while it trains: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gpt2_jax.training.metrics import Record
from gpt2_jax.training.settings import TrainSettings

_LABELS = {"val_loss": "validation loss"}


class ProgressDisplay:
    """Shows step, loss, learning rate, gradient norm, tokens per second, MFU and time left.

    Args:
      settings: the run.
      mfu: gives the model FLOPs utilization at a number of tokens per second; None if unknown.
      first: updates done before.
      quiet: show nothing, as all processes but one do.
    """

    def __init__(
        self,
        settings: TrainSettings,
        mfu: Callable[[float], float | None] = lambda _: None,
        first: int = 0,
        *,
        quiet: bool = False,
    ) -> None:
        self._steps = settings.steps
        self._log_every = settings.log_every
        self._tokens = settings.data.tokens_per_step
        self._mfu = mfu
        self._console = Console(soft_wrap=True, highlight=False, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[report]}"),
            console=self._console,
            disable=not self._live,
            expand=True,
        )
        self._task = self._bar.add_task(
            "train", total=settings.steps, completed=first, report="compiling ..."
        )
        self._steps_seen = 0
        self._rate: float | None = None

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(
        self, step: int, loss: float, learning_rate: float, grad_norm: float, seconds: float
    ) -> None:
        """Reports one step and the seconds it took."""
        # The first step warms up; from the second on, a running mean smooths the rate.
        self._steps_seen += 1
        if self._steps_seen == 2:
            self._rate = seconds
        elif self._rate is not None:
            self._rate += 0.1 * (seconds - self._rate)
        report = f"loss {loss:.4f}  lr {learning_rate:.2e}  norm {grad_norm:.3f}"
        if self._rate is not None:
            speed = self._tokens / self._rate
            mfu = self._mfu(speed)
            report += f"  {speed:,.0f} tokens/s  MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"
            report += f"  ETA {_duration(self._rate * (self._steps - step - 1))}"
        self._bar.update(self._task, completed=step + 1, report=report)
        if not self._live and (step % self._log_every == 0 or step == self._steps - 1):
            self._console.print(f"step {step}/{self._steps}  {report}", markup=False)

    def evaluation(self, step: int, values: Record) -> None:
        """Reports what was measured after `step` updates: numbers, or lists of texts."""
        for name, value in values.items():
            if isinstance(value, list):
                for text in value:
                    self.say(f"step {step}  sample: {text!r}")
            else:
                self.say(f"step {step}  {_LABELS.get(name, name)} {value:.4f}")

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(message, markup=False)


def _duration(seconds: float) -> str:
    left = time.gmtime(seconds)
    days = int(seconds // 86_400)
    return (f"{days}d " if days else "") + time.strftime(
        "%H:%M:%S" if left.tm_hour or days else "%M:%S", left
    )
