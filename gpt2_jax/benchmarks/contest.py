"""How fast generation is, ours and others', with the same weights and prompts, by turns.

Every engine has a process of its own, which sleeps while another is measured. A round measures
each engine once, and the memory's bandwidth just before, so that whatever else the machine does
hits all alike; what is compared are medians.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import jax

from gpt2_jax.benchmarks.bandwidth import read_bandwidth
from gpt2_jax.benchmarks.engines import Engine, EngineName, ModelFiles, open_engine, title
from gpt2_jax.benchmarks.figures import Load, Measured, Tokens, Turn
from gpt2_jax.benchmarks.worker import Worker

# OpenMP's threads look out for work for up to 0.2 s before they sleep.
SETTLE_SECONDS = 0.3

P = ParamSpec("P")
R = TypeVar("R")


class Contest:
    """Engines with the same model, each in its process; a context that ends the processes.

    Args:
      names: the engines.
      model: what all of them load.
      threads: CPU cores for each.
      report: told what is being done.
    """

    def __init__(
        self,
        names: Sequence[EngineName],
        model: ModelFiles,
        threads: int,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.failures: dict[EngineName, str] = {}
        """engines of others that did not work, and what they said"""
        self.devices: dict[EngineName, str] = {}
        """where each runs: cpu or gpu"""
        self.device = ""
        """where JAX runs, and memory's bandwidth is measured"""
        self._names, self._model, self._threads, self._report = names, model, threads, report
        self._stack = ExitStack()

    def __enter__(self) -> "Contest":
        with ExitStack() as stack:
            self._meter = stack.enter_context(Worker(self._threads))
            self.device = self._meter.run(jax.default_backend)
            self._workers = {
                name: stack.enter_context(Worker(self._threads)) for name in self._names
            }
            for name in self._names:
                device = self._call(name, "loading", _open, name, self._model)
                if device is not None:
                    self.devices[name] = device
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self, load: Load, rounds: int) -> Measured:
        """Measures the engines that work, by turns.

        Args:
          load: what to ask them for.
          rounds: how often each is measured.
        """
        prompts, new = load.prompts(self._model.config.vocab_size), load.new_tokens
        what = f"batch {load.batch}"
        tokens: dict[EngineName, Tokens] = {}
        for name in self._working():
            continued = self._call(name, f"{what}, warming up", _continue, prompts, new)
            if continued is not None:
                tokens[name] = continued
        turns: dict[EngineName, list[Turn]] = {name: [] for name in self._working()}
        for number in range(1, rounds + 1):
            for name in self._working():
                bandwidth = self._meter.run(read_bandwidth)
                doing = f"{what}, round {number} of {rounds}"
                seconds = self._call(name, doing, _time, prompts, new)
                if seconds is not None:
                    turns[name].append(Turn(*seconds, bandwidth))
        working = self._working()
        return Measured(
            load,
            {name: tokens[name] for name in working},
            {name: turns[name] for name in working},
        )

    def _working(self) -> list[EngineName]:
        return [name for name in self._names if name not in self.failures]

    def _call(
        self,
        name: EngineName,
        doing: str,
        function: Callable[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R | None:
        """Calls a function in an engine's process; None if the engine is another's and fails."""
        self._report(f"{title(name)}: {doing}")
        time.sleep(SETTLE_SECONDS)
        try:
            return self._workers[name].run(function, *args, **kwargs)
        except Exception as error:
            if name.startswith("ours"):
                raise
            self.failures[name] = " ".join(f"{type(error).__name__}: {error}".split())
            return None


# The rest runs in the process of an engine.

_engine: Engine | None = None


def _open(name: EngineName, model: ModelFiles) -> str:
    global _engine
    _engine = open_engine(name, model)
    return _engine.device


def _continue(prompts: Tokens, new_tokens: int) -> Tokens:
    """What the engine makes of the prompts; all that `_time` does has then been done once."""
    assert _engine is not None
    _engine.generate(prompts, 1)
    tokens = _engine.generate(prompts, new_tokens)
    for row in tokens:
        if len(row) != new_tokens:
            raise ValueError(f"made {len(row)} tokens where {new_tokens} were asked for")
    return tokens


def _time(prompts: Tokens, new_tokens: int) -> tuple[float, float]:
    """Seconds for the first tokens, and for all of them, the first ones included."""
    assert _engine is not None
    _engine.generate(prompts, 1)  # its threads are awake now
    start = time.perf_counter()
    _engine.generate(prompts, 1)
    first = time.perf_counter()
    _engine.generate(prompts, new_tokens)
    return first - start, time.perf_counter() - first
