"""Where a run's time goes."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, get_args

Part = Literal["compile", "data", "step", "eval", "checkpoint"]


class Stopwatch:
    """Splits wall time into parts.

    The device works while the host goes on, so the time of a step is the time between two
    results, less what the host spent in `block` meanwhile.
    """

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        self._lap_start = time.perf_counter()
        self._blocked: dict[Part, float] = {}

    @contextlib.contextmanager
    def block(self, part: Part) -> Iterator[None]:
        """Credits the time of a `with` block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.seconds[part] += seconds
            self._blocked[part] = self._blocked.get(part, 0.0) + seconds

    def lap(self, part: Part) -> float:
        """Credits the time since the last lap, without its blocks, to a part.

        Returns:
          That time and the wait for data in it, in seconds.
        """
        now = time.perf_counter()
        elapsed = max(now - self._lap_start - sum(self._blocked.values()), 1e-9)
        waited = self._blocked.get("data", 0.0)
        self._lap_start, self._blocked = now, {}
        self.seconds[part] += elapsed
        return elapsed + waited

    def report(self) -> str:
        """One line: all parts, and the share of the time spent waiting for data."""
        total = sum(self.seconds.values())
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())
        share = self.seconds["data"] / total if total else 0.0
        return f"time {total:.1f} s: {parts}; {share:.1%} waiting for data"
