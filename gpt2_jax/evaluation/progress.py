"""What an evaluation shows on stderr while it scores."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30


class ScoringProgress:
    """A bar on a terminal, elsewhere a line every half a minute; a context that ends it.

    Args:
      name: what is scored.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None))
        self._bar = Progress(
            *columns,
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(name, total=None)
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "ScoringProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Shows how many of all tokens are done."""
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._start) * (total - done) / done
            self._console.print(f"{self._name}: {done / total:.0%}, {left:,.0f} s left")
