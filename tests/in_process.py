"""Benchmarks' contestants in the process of the test, where they can be looked at and replaced."""

from types import ModuleType


class InProcess:
    """Stands for `Worker`: the same, in this process. Keeps each contestant apart.

    Args:
      module: it keeps a contestant in variables of its own.
      names: these variables, None before a contestant is made.
    """

    def __init__(self, module: ModuleType, *names: str) -> None:
        self._module = module
        self._state: dict[str, object] = dict.fromkeys(names)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._state = dict.fromkeys(self._state)

    def run(self, function, *args):
        vars(self._module).update(self._state)
        result = function(*args)
        self._state = {name: vars(self._module)[name] for name in self._state}
        return result
