"""Stopping on SIGTERM or SIGINT between two steps, in all processes at the same one."""

import signal
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class StopRequest:
    """A context in which the first SIGTERM or SIGINT only asks the loop to stop.

    The second one ends the process at once, as if nothing caught it.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.signal: str | None = None
        """name of the signal that came"""
        self._previous: dict[signal.Signals, Any] = {}
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._count_votes = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._votes: jax.Array | None = None

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                break  # not in the main thread, where signals are not ours to handle
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        # The operating system's own handling needs no Python: it works during a long step too.
        for other in self._previous:
            signal.signal(other, signal.SIG_DFL)

    def describe(self, step: int) -> str:
        """Why the run ends after `step` steps, and how it goes on."""
        why = f"stopped by {self.signal} after {step} steps"
        if self.signal is None:
            why = f"stopped after {step} steps, as another process was told to"
        return f"{why}; the same command goes on from there"

    def agreed(self) -> bool:
        """Whether to stop now; every process must ask after every step.

        Several processes count their votes on the devices, and read the count one step late:
        all then see the same, and none waits.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        devices = len(self._sharding.mesh.local_devices)
        mine = np.full(devices, self.signal is not None, np.int32)
        shape = (self._sharding.mesh.size,)
        votes = jax.make_array_from_process_local_data(self._sharding, mine, shape)
        previous, self._votes = self._votes, self._count_votes(votes)
        return previous is not None and int(previous) > 0
