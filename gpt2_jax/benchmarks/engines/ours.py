"""This project's own `generate`."""

from typing import cast

import jax

from gpt2_jax.benchmarks.engines import ModelFiles
from gpt2_jax.cli import keep_compiled_programs
from gpt2_jax.generation.decode import generate
from gpt2_jax.interop.pretrained import load_pretrained
from gpt2_jax.packed import PackedParams, Precision, pack


class Engine:
    """With the weights packed beforehand, on JAX's first device."""

    def __init__(self, model: ModelFiles, precision: str) -> None:
        keep_compiled_programs()
        self.device = jax.default_backend()
        self._params, self._config = load_pretrained(model.directory)
        self._precision = cast(Precision, precision)
        self._packed: dict[bool, PackedParams] = {}

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """See `engines.Engine`."""
        single = len(prompts) == 1
        if single not in self._packed:
            self._packed = {single: pack(self._params, self._precision, rows=len(prompts))}
        return generate(self._packed[single], self._config, prompts, max_new_tokens=max_new_tokens)
