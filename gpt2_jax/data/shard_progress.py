"""What the making of shards shows: a live bar for the shard under way, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class ShardProgress:
    """Shows each shard's name, tokens and tokens per second.

    Args:
      action: what is done, such as "tokenizing".
    """

    def __init__(self, action: str) -> None:
        self._console = Console(soft_wrap=True, highlight=False)
        self._bar = Progress(
            TextColumn(action),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[rate]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task(action, total=0, rate="")
        self._started: float | None = None
        self._in_all = self._in_shard = 0

    def __enter__(self) -> "ShardProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, tokens: int) -> None:
        """A shard of so many tokens is under way."""
        if self._started is None:
            self._started = time.monotonic()
        self._in_shard = 0
        self._bar.reset(self._task, total=tokens)

    def advance(self, tokens: int) -> None:
        """So many more of its tokens are there."""
        self._in_shard += tokens
        self._in_all += tokens
        self._bar.update(self._task, advance=tokens, rate=self._rate())

    def finish(self, name: str) -> None:
        """The shard is written; a line says so."""
        self._console.print(f"{name}  {self._in_shard:,} tokens  {self._rate()}")

    def _rate(self) -> str:
        """The mean since the first shard was begun: pieces come in bursts."""
        seconds = time.monotonic() - (self._started or 0)
        return f"{self._in_all / max(seconds, 1e-6):,.0f} tokens/s"
