"""What a run shows while it trains: a live bar on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class ProgressDisplay:
    """Shows step, loss, tokens per second and time left.

    Args:
      steps: total number of steps.
      log_every: steps between lines where the output is not a terminal.
    """

    def __init__(self, steps: int, log_every: int) -> None:
        self._steps = steps
        self._log_every = log_every
        self._console = Console(soft_wrap=True, highlight=False)
        self._live = self._console.is_terminal
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[report]}"),
            console=self._console,
            disable=not self._live,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=steps, report="compiling ...")
        self._rate: float | None = None

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(
        self, step: int, loss: float, learning_rate: float, tokens: int, seconds: float
    ) -> None:
        """Reports one step: its loss, and the tokens it took in the seconds it took."""
        # The first step is mostly compilation; after it, a running mean smooths the rate.
        if step == 1:
            self._rate = seconds
        elif self._rate is not None:
            self._rate += 0.1 * (seconds - self._rate)
        report = f"loss {loss:.4f}  lr {learning_rate:.2e}"
        if self._rate is not None:
            left = time.gmtime(self._rate * (self._steps - step - 1))
            eta = f"{left.tm_yday - 1}d " if left.tm_yday > 1 else ""
            eta += time.strftime("%H:%M:%S" if left.tm_hour else "%M:%S", left)
            report += f"  {tokens / self._rate:,.0f} tokens/s  ETA {eta}"
        self._bar.update(self._task, completed=step + 1, report=report)
        if not self._live and (step % self._log_every == 0 or step == self._steps - 1):
            self._console.print(f"step {step}/{self._steps}  {report}")

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(message)
